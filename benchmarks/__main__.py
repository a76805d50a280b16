"""Runs every benchmark, or those named: python -m benchmarks [NAME...]."""

import importlib
import pathlib
import sys


def main(names: list[str]) -> None:
  """Runs the benchmarks one after the other."""
  folder = pathlib.Path(__file__).parent
  found = [path.stem for path in sorted(folder.glob('[a-z]*.py'))]
  for name in names or found:
    if name not in found:
      sys.exit(f'error: no benchmark {name}; there are {", ".join(found)}')
    module = importlib.import_module(f'benchmarks.{name}')
    if hasattr(module, 'main'):
      print(f'\n== {name}')
      module.main()


if __name__ == '__main__':
  main(sys.argv[1:])
