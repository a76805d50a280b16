"""Lists the programs and runs them: `optlab`, or `python -m experiments`."""

import ast
import importlib.util
import os
import pathlib
import runpy
import sys

from . import leave_if_asked

FOLDER = pathlib.Path(__file__).parent
NEEDS = ('flax', 'matplotlib', 'orbax', 'rich', 'sklearn')


def programs() -> dict[str, str]:
  """The name of every program, and the first line of its documentation."""
  found = {}
  for path in sorted(FOLDER.glob('[!_]*.py')):
    text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
    found[path.stem] = text.partition('\n')[0]
  return found


def main() -> None:
  """Runs ``optlab [PROGRAM [flags]]``."""
  known = programs()
  name = sys.argv[1] if len(sys.argv) > 1 else '--help'
  if name in ('--help', '-h', 'help'):
    width = max(map(len, known))
    lines = [f'  {program:{width}}  {line}' for program, line in known.items()]
    head = 'optlab PROGRAM [flags] runs one; optlab PROGRAM --help its flags.\n'
    try:
      print('\n'.join([head, *lines]), flush=True)
    except OSError as error:  # As of `| head`: who reads has enough.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      if not isinstance(error, BrokenPipeError):
        sys.exit(f'optlab: standard output: {error.strerror}')
    return
  if name not in known:
    sys.exit(f'optlab: no program {name}; `optlab` lists them')
  missing = [need for need in NEEDS if importlib.util.find_spec(need) is None]
  if missing:
    sys.exit(
      f'optlab {name} needs {", ".join(missing)}: '
      "pip install 'optlab-jax[experiments]'"
    )
  leave_if_asked()
  sys.argv = sys.argv[1:]
  runpy.run_module(f'{__package__}.{name}', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
