"""Optimizers by text: ``adam``, ``optax.contrib.muon``, ``my.tx:make(b1=.8)``.

A list in the arguments is a search space: ``adam(b1=[0.8, 0.9])`` is tuned over
both, each with the whole grid of learning rates.
"""

import ast
from collections.abc import Callable, Iterable
import importlib
import inspect
import itertools
import re
import sys
from typing import Any, NamedTuple

import optax

import optlab

from ..lab import flags

HOMES = (optlab, optlab.first_order, optlab.newton, optax, optax.contrib)
RATE = 'learning_rate'


class Optimizer(NamedTuple):
  """An optimizer with all of its arguments but the learning rate.

  Attributes:
    text: What makes it, with one value for each argument.
    make: ``learning_rate -> transformation``.
    tuned: Whether it takes the learning rate; else the argument is ignored.
    default: Its own learning rate, or ``None``.
  """

  text: str
  make: Callable[[Any], optax.GradientTransformation]
  tuned: bool
  default: float | None = None


def variants(text: str) -> list[Optimizer]:
  """The optimizers that a text stands for: one, or all of a search space.

  Args:
    text: A name of optlab or optax, or a dotted name, ``module:function`` too,
      with keyword arguments in parentheses if there are any.

  Returns:
    Them, in the order of the lists.

  Raises:
    UserError: There is none of that name, or it needs other arguments.
  """
  name = r'\w+(?:\.\w+)*(?::\w+(?:\.\w+)*)?'
  match = re.fullmatch(rf'\s*({name})\s*(?:\((.*)\))?\s*', text, re.DOTALL)
  if match is None:
    raise flags.UserError(f'--methods={text}: is not NAME or NAME(key=value)')
  name, arguments = match[1], _arguments(text, match[2] or '')
  function = resolve(name)
  space = {
    key: value if isinstance(value, list) else [value]
    for key, value in arguments.items()
  }
  return [
    _optimizer(text, name, function, dict(zip(space, values, strict=True)))
    for values in itertools.product(*space.values())
  ]


def _arguments(text: str, inside: str) -> dict[str, Any]:
  """Keyword arguments of literals."""
  try:
    call: Any = ast.parse(f'f({inside})', mode='eval').body
    if call.args or any(keyword.arg is None for keyword in call.keywords):
      raise ValueError('arguments are given as key=value')
    found = {keyword.arg: _literal(keyword) for keyword in call.keywords}
    if len(found) < len(call.keywords):
      raise ValueError('an argument is there twice')
    if any(value == [] for value in found.values()):
      raise ValueError('a search space is empty')
    return found
  except (SyntaxError, ValueError) as error:
    reason = 'invalid syntax' if isinstance(error, SyntaxError) else error
    raise flags.UserError(f'--methods={text}: {reason}') from error


def _literal(keyword: ast.keyword) -> Any:
  try:
    return ast.literal_eval(keyword.value)
  except ValueError as error:
    raise ValueError(
      f'{keyword.arg}={ast.unparse(keyword.value)}: is no number, string or'
      ' list of them; a schedule or another function goes into a function of'
      ' your own, given as MODULE:FUNCTION(key=value)'
    ) from error


def resolve(name: str) -> Callable[..., Any]:
  """The function of a name.

  Args:
    name: Of optlab or optax, or with dots, or ``module:function``.

  Returns:
    The function.

  Raises:
    UserError: There is none.
  """
  found: Any = None
  if '.' not in name and ':' not in name:
    homes = (getattr(home, name, None) for home in HOMES)
    found = next((entry for entry in homes if callable(entry)), None)
    where = 'neither optlab nor optax has an optimizer of that name'
  else:
    module, _, attributes = name.partition(':')
    parts = module.split('.')
    splits = (
      [(module, attributes.split('.'))]
      if attributes
      else [
        ('.'.join(parts[:i]), parts[i:]) for i in range(len(parts) - 1, 0, -1)
      ]
    )
    found, where = _import(splits)
  if not callable(found):
    reason = where or f'{type(found).__name__} {name} cannot be called'
    raise flags.UserError(f'--methods={name}: {reason}')
  return found


def _import(splits: Iterable[tuple[str, list[str]]]) -> tuple[Any, str]:
  """The first of these that there is, and else the reason why not."""
  reason = ''
  if '' not in sys.path:  # A program that is installed starts elsewhere.
    sys.path.insert(0, '')
  for module, attributes in splits:
    try:
      found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
      if error.name and not module.startswith(error.name):
        return None, f'{module} needs {error.name}, which is not installed'
      continue
    for attribute in attributes:
      found = getattr(found, attribute, None)
    if found is not None:
      return found, ''
    reason = reason or f'{module} has no {".".join(attributes)}'
  return None, reason or 'there is no such module'


def _optimizer(text, name, function, fixed: dict[str, Any]) -> Optimizer:
  """One of the optimizers, whose arguments are checked by making it."""
  try:
    parameters = inspect.signature(function).parameters
  except (TypeError, ValueError) as error:
    raise flags.UserError(
      f'--methods={text}: {name} does not say what arguments it takes'
    ) from error
  kinds = inspect.Parameter
  variable = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
  unknown = [key for key in fixed if key not in parameters and not variable]
  if unknown:
    raise flags.UserError(f'--methods={text}: {name} has no {unknown[0]}')
  needed = [
    key
    for key, parameter in parameters.items()
    if parameter.default is kinds.empty
    and parameter.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    and key not in fixed
  ]
  if set(needed) - {RATE}:
    missing = ', '.join(key for key in needed if key != RATE)
    raise flags.UserError(
      f'--methods={text}: neither optlab nor optax has an optimizer of that'
      f' name that needs a learning rate alone; it needs {missing} too'
    )
  takes_rate = RATE in parameters and RATE not in fixed
  default = parameters[RATE].default if takes_rate else None
  if not isinstance(default, (int, float)):
    default = None
  # A default of its own is kept: the method knows its length of step.
  tuned = takes_rate and RATE in needed

  def make(rate):
    return function(**(fixed | ({RATE: rate} if tuned else {})))

  try:
    made = make(0.1)
  except (TypeError, ValueError) as error:
    raise flags.UserError(f'--methods={text}: {error}') from error
  if not (hasattr(made, 'init') and hasattr(made, 'update')):
    raise flags.UserError(
      f'--methods={text}: {name} gives a {type(made).__name__}, no optimizer'
    )
  shown = ', '.join(f'{key}={value!r}' for key, value in fixed.items())
  return Optimizer(f'{name}({shown})' if fixed else name, make, tuned, default)
