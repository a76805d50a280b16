"""What setup.cfg cannot say: the programs' name, and the package's page."""

import pathlib
import re
import sys

README = pathlib.Path(__file__).parent / 'README.md'


def page(readme: str) -> str:
  """The README without what only a clone can show: its picture, its files."""
  readme = re.sub(r'!\[[^]]*\]\([^)]*\)\n\n', '', readme)
  return re.sub(r'\[([^]]*)\]\((?!https?:)[^)]*\)', r'\1', readme)


def packages() -> dict:
  """The folder `experiments` is installed as the package `optlab_experiments`.

  In an editable install one folder serves all, and `optlab` finds the programs
  beside it (`optlab/__main__.py`): with a second name setuptools would install
  a hook of the import system, which no type checker sees through.
  """
  from setuptools import find_packages

  found = find_packages(include=['optlab', 'optlab.*'])
  folders = {'': '.'}
  if 'editable_wheel' not in sys.argv:
    programs = find_packages(include=['experiments', 'experiments.*'])
    found += [f'optlab_{name}' for name in programs]
    folders['optlab_experiments'] = 'experiments'
  return {'packages': found, 'package_dir': folders}


if __name__ == '__main__':
  from setuptools import setup

  setup(
    long_description=page(README.read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    **packages(),
  )
