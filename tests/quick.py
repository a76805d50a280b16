"""`make quick`: the tests of what was changed, in under 90 seconds.

Changed is what git shows against the last commit, or in that if nothing is.
A module of a wing or of the core brings its doctests, the tests of the folder
that mirrors it, and the wing's rows of the contract table (the core: all); a
part of `experiments` the tests that name it. Those that failed last come first,
and after 80 seconds the rest is skipped and left to `make test`.
"""

import importlib
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 80.0
# Of all public names, in seconds.
ALWAYS = ('tests/public_test.py', 'tests/domains_test.py')
BY_NAME = {
  'README': ['tests/readme_test.py', 'tests/package_test.py'],
  'setup': ['tests/package_test.py'],
  'docs': ['tests/docs_test.py'],
  'notebooks': ['tests/notebooks_test.py'],
}


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


def home_of(path: str) -> str | None:
  """The folder of tests that mirrors a file of the library or of the tests."""
  top, *below = pathlib.PurePath(path).parts
  home = below[0] if len(below) > 1 else 'core'
  mirrored = top in ('optlab', 'tests') and (ROOT / 'tests' / home).is_dir()
  return home if mirrored and home != 'experiments' else None


def tests_of(path: str) -> list[str]:
  """The tests that a file concerns."""
  top, stem = pathlib.PurePath(path).parts[0], pathlib.PurePath(path).stem
  if not (ROOT / path).exists():
    return []
  if stem.endswith('_test'):
    return [path]
  if home := home_of(path):
    doctests = [path] if top == 'optlab' and path.endswith('.py') else []
    return [*doctests, f'tests/{home}', 'tests/contract_test.py']
  if top == 'experiments':
    return [
      str(test.relative_to(ROOT))
      for test in sorted((ROOT / 'tests').rglob('*_test.py'))
      if stem in test.read_text()
    ]
  return BY_NAME.get(stem, BY_NAME.get(top, []))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Leaves the contract's rows of wings that were not changed."""
  homes = {home_of(path) for path in changed()} - {None}
  if 'core' in homes:
    return
  rows = {
    row.name
    for home in homes
    for row in importlib.import_module(f'tests.{home}.rows').ROWS
  }

  def concerns(item: pytest.Item) -> bool:
    row = getattr(item, 'callspec', None) and item.callspec.params.get('row')
    return 'contract_test.py' not in item.nodeid or not row or row.name in rows

  items[:] = filter(concerns, items)


def pytest_runtest_setup() -> None:
  """Leaves the rest to `make test` when the time is up."""
  if time.time() > float(os.environ['OPTLAB_QUICK_UNTIL']):
    pytest.skip(f'left to `make test` after {SECONDS:.0f} seconds')


def main() -> int:
  """Runs them on two workers."""
  paths = changed()
  chosen = dict.fromkeys([test for path in paths for test in tests_of(path)])
  print('changed:', *paths, '\ntests:', *chosen, *ALWAYS)
  os.environ['OPTLAB_QUICK_UNTIL'] = str(time.time() + SECONDS)
  words = ['-q', '-rs', '--ff', '-n', '2', '--dist=loadgroup']
  words += ['-m', 'not slow and not crash', '-p', 'tests.quick']
  return int(pytest.main([*words, *chosen, *ALWAYS]))


if __name__ == '__main__':
  sys.exit(main())
