"""The command `optlab`: it finds the programs and hands over to them.

They are the package `optlab_experiments` of a wheel, or the folder
`experiments` beside this package in a clone and in an editable install.
"""

import importlib
import importlib.util
import pathlib
import sys

PROGRAMS = 'optlab_experiments'


def main() -> None:
  """Runs ``optlab [PROGRAM [flags]]``."""
  folder = pathlib.Path(__file__).parent.parent / 'experiments'
  if (folder / '__main__.py').exists():
    spec = importlib.util.spec_from_file_location(
      PROGRAMS, folder / '__init__.py', submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    sys.modules[PROGRAMS] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PROGRAMS])
  importlib.import_module(f'{PROGRAMS}.__main__').main()


if __name__ == '__main__':
  main()
