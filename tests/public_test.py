"""Every public callable is tried on bad inputs, or is a plain record."""

import ast
import inspect
import pathlib
import sys
from typing import Any

import pytest

import optlab
from tests import inputs
from tests.batches import bad_input_test as batches
from tests.bilevel import bad_input_test as bilevel
from tests.core import bad_input_test as core
from tests.first_order import bad_input_test as first_order
from tests.multi_block import bad_input_test as multi_block
from tests.newton import bad_input_test as newton
from tests.public import PUBLIC
from tests.unnormalized import bad_input_test as unnormalized

WINGS = ('newton', 'first_order', 'batches', 'bilevel', 'multi_block',
         'unnormalized')  # fmt: skip
TABLES = (core, newton, first_order, batches, bilevel, multi_block,
          unnormalized)  # fmt: skip
SOURCES = sorted(pathlib.Path(optlab.__file__).parent.rglob('*.py'))


def test_every_public_callable_has_a_row():
  public = {
    name
    for name, value in PUBLIC.items()
    if inspect.isfunction(value)
    or (inspect.isclass(value) and value is not Any)
  }
  rows = {row.name for module in TABLES for row in module.table.rows}
  records = {
    # Users read them and optlab fills them; what takes one checks it.
    name
    for name, value in PUBLIC.items()
    if inspect.isclass(value) and value is not Any and issubclass(value, tuple)
  }
  declared = {
    name for name, value in PUBLIC.items() if getattr(value, 'domains', None)
  }
  assert (
    public - rows - records - declared - {'Solver', 'Noise', 'report'} == set()
  )
  assert rows - public == set()


def test_the_good_arguments_are_good():
  # Those that run at once are tried on shapes.
  for name, call in inputs.GOOD.items():
    if name not in ('minimize', 'mixture'):
      inputs.traced(lambda call=call: (call(), 0)[1])


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module or ''
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_no_optional_package_is_needed():
  """Whatever is imported comes with jax and optax, or is for types alone."""
  needed = {'jax', 'numpy', 'optax', 'optlab', 'chex'}
  for path in SOURCES:
    for name in imports(path):
      root = name.split('.')[0]
      assert root in needed or root in sys.stdlib_module_names


@pytest.mark.parametrize('wing', WINGS)
def test_a_wing_imports_the_core_alone(wing):
  others = tuple(f'optlab.{other}' for other in WINGS if other != wing)
  for path in (pathlib.Path(optlab.__file__).parent / wing).glob('*.py'):
    for name in imports(path):
      assert not (name + '.').startswith(tuple(f'{o}.' for o in others)), path


def test_the_core_imports_no_wing():
  wings = tuple(f'optlab.{wing}.' for wing in WINGS)
  for path in pathlib.Path(optlab.__file__).parent.glob('*.py'):
    if path.name not in ('__init__.py', 'aliases.py'):  # The roof.
      for name in imports(path):
        assert not (name + '.').startswith(wings), path
