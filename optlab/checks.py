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
import numbers
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base


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


def check_real(
  name: str,
  value: Any,
  *,
  low: float = -np.inf,
  high: float = np.inf,
  low_open: bool = False,
  high_open: bool = False,
  remedy: str = '',
  schedule: bool = False,
) -> None:
  """Raises unless ``value`` is a real number in the interval.

  Args:
    name: The argument's name, for the message.
    value: A number, an array of numbers, or a tracer, which passes.
    low: Lower end of the interval.
    high: Upper end of the interval.
    low_open: Whether the lower end is excluded.
    high_open: Whether the upper end is excluded.
    remedy: What to do about it, for the message.
    schedule: Whether a schedule passes.

  Raises:
    TypeError: ``value`` is not numeric.
    ValueError: ``value`` is NaN or outside the interval.
  """
  if isinstance(value, jax.core.Tracer) or (schedule and callable(value)):
    return
  dtype = getattr(value, 'dtype', None)
  if dtype is None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  else:
    real = isinstance(value, (np.generic, np.ndarray, jax.Array)) and (
      jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    )
  if not real:
    raise TypeError(
      f'{name} must be a real number{" or a schedule" * schedule}, got'
      f' {value!r} of type {type(value).__name__}.'
      + ' Schedule it by optax.inject_hyperparams.'
      * callable(value)
    )
  array = np.asarray(value)
  above = array > low if low_open else array >= low
  below = array < high if high_open else array <= high
  if not np.all(above & below):  # NaN fails both.
    interval = (
      f'{"(" if low_open or low == -np.inf else "["}{low}, '
      f'{high}{")" if high_open or high == np.inf else "]"}'
    )
    raise ValueError(
      f'{name} must be in {interval}, got {value!r}.'
      + (f' {remedy}' if remedy else '')
    )


def check_positive(
  name: str, value: Any, remedy: str = '', *, schedule: bool = False
) -> None:
  """Raises unless ``value`` is a finite number above zero, see `check_real`."""
  check_real(
    name,
    value,
    low=0.0,
    high=np.inf,
    low_open=True,
    high_open=True,
    remedy=remedy,
    schedule=schedule,
  )


def check_non_negative(
  name: str, value: Any, remedy: str = '', *, schedule: bool = False
) -> None:
  """Raises unless ``value`` is a finite number >= 0, see `check_real`."""
  check_real(
    name,
    value,
    low=0.0,
    high=np.inf,
    high_open=True,
    remedy=remedy,
    schedule=schedule,
  )


def check_int(
  name: str,
  value: Any,
  minimum: int,
  remedy: str = '',
  *,
  traced: bool = False,
) -> None:
  """Raises unless ``value`` is a Python or numpy integer >= ``minimum``.

  Integers that give shapes or lengths cannot be tracers.

  Args:
    name: The argument's name, for the message.
    value: The integer.
    minimum: The smallest value allowed.
    remedy: What to do about it, for the message.
    traced: Whether scalar arrays and tracers pass too, for integers that give
      no shape.

  Raises:
    TypeError: ``value`` is not an integer.
    ValueError: ``value`` is below ``minimum``.
  """
  is_array = isinstance(value, (np.ndarray, jax.Array))
  if traced and is_array:
    if isinstance(value, jax.core.Tracer):
      return
    if value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer):
      value = int(value)
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise TypeError(
      f'{name} must be an integer, got {value!r} of type'
      f' {type(value).__name__}.'
      + ' It is part of the program: pass a Python integer.'
      * (is_array and not traced)
    )
  if value < minimum:
    raise ValueError(
      f'{name} must be at least {minimum}, got {value}.'
      + (f' {remedy}' if remedy else '')
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


def check_floating(name: str, tree: Any, remedy: str = '') -> None:
  """Raises a ``TypeError`` for leaves of integers or bools.

  Args:
    name: Name of ``tree``, for the message.
    tree: A tree of arrays.
    remedy: What to do about it, for the message.
  """
  for path, leaf in jax.tree.leaves_with_path(tree):
    dtype = jnp.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f'{name}{jax.tree_util.keystr(path)} must be floating, got dtype'
        f' {dtype}.' + (f' {remedy}' if remedy else '')
      )


def check_params(name: str, tree: Any) -> None:
  """Raises a ``TypeError`` for a leaf that no gradient step can move.

  Args:
    name: Name of ``tree``, for the message.
    tree: Parameters, a tree of floating or complex arrays.
  """
  for path, leaf in jax.tree.leaves_with_path(tree):
    where = f'{name}{jax.tree_util.keystr(path)}'
    dtype = getattr(leaf, 'dtype', None)
    if dtype is None and isinstance(leaf, numbers.Number):
      dtype = np.asarray(leaf).dtype
    if dtype is None:
      raise TypeError(
        f'{where} must be an array, got {leaf!r} of type'
        f' {type(leaf).__name__}; keep functions and settings out of the'
        ' parameters, for example by nnx.split or equinox.partition.'
      )
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f'{where} must be floating, got dtype {dtype}; what is not trained'
        ' belongs to the loss, to the batch or to the model state.'
      )


def as_key(name: str, value: Any) -> jax.Array:
  """A copy of a PRNG key, typed; or a ``TypeError`` that names it."""
  dtype = getattr(value, 'dtype', None)
  if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return jax.random.clone(value)
  if dtype == jnp.uint32 and value.shape[-1:] == (2,):
    return jax.random.wrap_key_data(jnp.array(value))
  raise TypeError(
    f'{name} must be a PRNG key such as jax.random.key(0), got {value!r}.'
  )


def as_array(name: str, value: Any) -> jax.Array:
  """An array of ``value``, or a ``TypeError`` that names it."""
  try:
    return jnp.asarray(value)
  except (TypeError, ValueError) as error:
    raise TypeError(
      f'{name} must be an array of numbers, got {value!r}.'
    ) from error


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


def check_same_tree(
  name: str, tree: base.ArrayTree, like_name: str, like: base.ArrayTree
) -> None:
  """Raises a ``ValueError`` unless both trees have one structure and shapes.

  Args:
    name: Name of ``tree``, for the message.
    tree: The tree to check.
    like_name: Name of ``like``, for the message.
    like: The tree that it must match.
  """
  treedef, like_treedef = jax.tree.structure(tree), jax.tree.structure(like)
  if treedef != like_treedef:
    raise ValueError(
      f'{name} must have the tree structure of {like_name}: got {treedef},'
      f' expected {like_treedef}.'
    )
  leaves = jax.tree.leaves_with_path(tree)
  for (path, leaf), other in zip(leaves, jax.tree.leaves(like), strict=True):
    if jnp.shape(leaf) != jnp.shape(other):
      raise ValueError(
        f'{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but'
        f' {like_name}{jax.tree_util.keystr(path)} has shape'
        f' {jnp.shape(other)}.'
      )


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
