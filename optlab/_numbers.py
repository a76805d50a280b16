"""Checks of numbers: reals in an interval, integers that give shapes."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
  scalar = is_array and value.ndim == 0
  if traced and scalar and jnp.issubdtype(value.dtype, jnp.integer):
    if isinstance(value, jax.core.Tracer):
      return
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
