"""`make quick`: the tests of what was changed, in under 90 seconds.

Changed is what git shows against the last commit, or in it if nothing is. A
wing's modules, tests and rows bring the tests of the wing, its rows of the
contract table first; what the core changes, every wing may feel, so its tests
and the contract's follow. A program or a part of one brings the tests that name
it. Those that failed last come first, and after 80 seconds the others are left
to `make test`: the last line says how many.
"""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 80.0


def git(*words: str) -> list[str]:
  """Lines that git writes."""
  done = subprocess.run(
    ['git', *words], cwd=ROOT, check=True, capture_output=True, text=True
  )
  return done.stdout.split('\n')[:-1]


def changed() -> list[str]:
  """Files that differ from the last commit, or that it changed."""
  found = git('diff', '--name-only', 'HEAD')
  found += git('ls-files', '--others', '--exclude-standard')
  return found or git('diff', '--name-only', 'HEAD~1', 'HEAD')


def tests_of(path: str) -> list[str]:
  """The tests that a file concerns."""
  top, *below = pathlib.PurePath(path).parts
  stem = pathlib.PurePath(path).stem
  home = below[0] if len(below) > 1 else 'core'
  if stem.endswith('_test'):
    return [path]
  if top in ('optlab', 'tests') and (ROOT / 'tests' / home).is_dir():
    doctests = [path] if top == 'optlab' and path.endswith('.py') else []
    return [*doctests, f'tests/{home}', 'tests/contract_test.py']
  if top == 'experiments':
    names = [
      str(test.relative_to(ROOT))
      for test in sorted((ROOT / 'tests').rglob('*_test.py'))
      if stem in test.read_text()
    ]
    return [*names, 'tests/package_test.py']
  by_name = {
    'README': ['tests/readme_test.py', 'tests/package_test.py'],
    'setup': ['tests/package_test.py'],
    'docs': ['tests/docs_test.py'],
    'notebooks': ['tests/notebooks_test.py'],
  }
  return by_name.get(stem, by_name.get(top, []))
