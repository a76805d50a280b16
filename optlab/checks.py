"""Domains of arguments: an error names the argument, the value, the remedy.

A public function says its arguments' domains once, and enforces them with one
call; the tests of bad values are made from what it says:

    @checks.domains(learning_rate=checks.LEARNING_RATE, beta=checks.DECAY)
    def method(learning_rate, beta=0.9):
      checks.enforce(method, locals())

Checks see Python and numpy numbers and concrete arrays; tracers pass, so that
hyperparameters may be vmapped over and injected.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab._arrays import as_array
from optlab._arrays import as_key
from optlab._arrays import check_arrays
from optlab._arrays import check_floating
from optlab._arrays import check_params
from optlab._arrays import check_real_params
from optlab._arrays import check_same_tree
from optlab._numbers import check_int
from optlab._numbers import check_non_negative
from optlab._numbers import check_positive
from optlab._numbers import check_real


class Domain(Protocol):
  """What an argument may be; ``check`` raises for everything else."""

  def check(self, name: str, value: Any) -> None: ...


class Real(NamedTuple):
  """A real number in an interval; where it says so, a schedule or ``None``."""

  low: float = -np.inf
  high: float = np.inf
  low_open: bool = False
  high_open: bool = False
  remedy: str = ''
  schedule: bool = False
  optional: bool = False

  def check(self, name: str, value: Any) -> None:
    """Raises unless ``value`` is in the domain."""
    if value is None and self.optional:
      return
    check_real(
      name,
      value,
      low=self.low,
      high=self.high,
      low_open=self.low_open,
      high_open=self.high_open,
      remedy=self.remedy,
      schedule=self.schedule,
    )


class Integer(NamedTuple):
  """An integer, of a shape or length; ``traced`` where it gives none."""

  minimum: int = 1
  remedy: str = ''
  traced: bool = False
  optional: bool = False

  def check(self, name: str, value: Any) -> None:
    """Raises unless ``value`` is in the domain."""
    if value is None and self.optional:
      return
    check_int(name, value, self.minimum, self.remedy, traced=self.traced)


class Dtype(NamedTuple):
  """A real floating dtype."""

  optional: bool = False

  def check(self, name: str, value: Any) -> None:
    """Raises unless ``value`` is in the domain."""
    if value is None and self.optional:
      return
    try:
      real = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
      real = False
    if not real or value is None:
      raise TypeError(
        f'{name} must be a real floating dtype such as jnp.bfloat16, got'
        f' {value!r}; for complex leaves it is that of their parts.'
      )


class Function(NamedTuple):
  """A function, with its signature in words."""

  expected: str
  optional: bool = False

  def check(self, name: str, value: Any) -> None:
    """Raises unless ``value`` is in the domain."""
    if value is None and self.optional:
      return
    check_callable(name, value, self.expected)


class Pair(NamedTuple):
  """A pair of functions: an estimator, a transformation."""

  fields: tuple[str, ...]
  expected: str
  optional: bool = False

  def check(self, name: str, value: Any) -> None:
    """Raises unless ``value`` is in the domain."""
    if value is None and self.optional:
      return
    check_fields(name, value, self.fields, self.expected)


POSITIVE = Real(low=0.0, low_open=True, high_open=True)
NON_NEGATIVE = Real(low=0.0, high_open=True)
DECAY = Real(low=0.0, high=1.0, high_open=True)  # [0, 1)
FRACTION = Real(low=0.0, high=1.0, low_open=True)  # (0, 1]
OPEN_FRACTION = Real(low=0.0, high=1.0, low_open=True, high_open=True)  # (0, 1)
LEARNING_RATE = NON_NEGATIVE._replace(
  schedule=True, remedy='Updates descend; to ascend, negate the objective.'
)
ESTIMATOR = Pair(
  base.GradientEstimator._fields,
  'a GradientEstimator such as optlab.value_and_grad(loss)',
)
TRANSFORMATION = Pair(
  ('init', 'update'), 'an optax transformation such as optax.sgd(0.1)'
)

F = TypeVar('F', bound=Callable[..., Any])


def domains(**arguments: Domain) -> Callable[[F], F]:
  """Says once what the arguments of a function may be, by name.

  The function itself is returned, not a wrapper; it calls `enforce`.
  """

  def declare(function: F) -> F:
    function.__dict__['domains'] = arguments
    return function

  return declare


def enforce(function: Callable[..., Any], values: dict[str, Any]) -> None:
  """Raises for the first argument that is outside its domain.

  Args:
    function: A function with `domains`.
    values: Its arguments by name, ``locals()`` on its first line.
  """
  for name, domain in function.__dict__['domains'].items():
    domain.check(name, values[name])


def check_scalar(name: str, value: Any, remedy: str = '') -> None:
  """Raises a ``TypeError`` unless a function returned a real scalar.

  Args:
    name: The function's name, for the message.
    value: What it returned.
    remedy: What to do about it, for the message.
  """
  try:
    # Which have shapes in some releases of jax.
    if value is None or isinstance(value, (tuple, list)):
      raise TypeError
    shape, dtype = jnp.shape(value), jnp.result_type(value)
  except (TypeError, ValueError):
    raise TypeError(f'{name} must return a scalar, got {value!r}.') from None
  if shape or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'{name} must return a real scalar of floats, got shape {shape} and dtype'
      f' {dtype}.' + (f' {remedy}' if remedy else '')
    )


def check_callable(name: str, value: Any, expected: str) -> None:
  """Raises a ``TypeError`` unless ``value`` is callable.

  Args:
    name: The argument's name, for the message.
    value: The function.
    expected: Its signature, for the message.
  """
  if not callable(value):
    raise TypeError(
      f'{name} must be a function {expected}, got {value!r} of type'
      f' {type(value).__name__}.'
    )


def check_fields(
  name: str, value: Any, fields: tuple[str, ...], expected: str
) -> None:
  """Raises a ``TypeError`` unless ``value`` has the attributes ``fields``.

  Args:
    name: The argument's name, for the message.
    value: A pair of functions, or a batch.
    fields: The attributes that are needed.
    expected: What it must be and who makes it, for the message.
  """
  if not all(hasattr(value, field) for field in fields):
    raise TypeError(
      f'{name} must be {expected}, with {" and ".join(fields)}; got'
      f' {type(value).__name__}.'
    )


def check_transformation(name: str, tx: Any) -> None:
  """Raises a ``TypeError`` unless ``tx`` is a transformation of optax."""
  TRANSFORMATION.check(name, tx)


def check_learning_rate(learning_rate: Any) -> None:
  """Raises unless it is a schedule or a finite number >= 0."""
  LEARNING_RATE.check('learning_rate', learning_rate)


def require_extra(method: str, maker: str, **extras: Any) -> None:
  """Raises a ``ValueError`` for every extra argument that is ``None``.

  Args:
    method: The transformation that needs them.
    maker: Who makes them, for the message.
    **extras: The extra arguments by name.
  """
  missing = [name for name, value in extras.items() if value is None]
  if missing:
    raise ValueError(
      f'{method} needs the extra argument{"s" * (len(missing) > 1)}'
      f' {", ".join(missing)}: pass'
      f' {", ".join(f"{name}=..." for name in missing)} to update, or take'
      f' them from {maker}.'
    )
