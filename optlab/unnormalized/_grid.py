"""log Z by quadrature, in one and two dimensions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import special
import numpy as np

from optlab import base
from optlab import checks
from optlab.unnormalized import _likelihood


class GridLogPartition(NamedTuple):
  """log Z by quadrature in one or two dimensions.

  Attributes:
    value: The finest figure; NaN where the checks fail.
    spacing_error: Its change when the spacing was halved.
    box_error: Its change when the box grew by half.
    ok: Whether both are at most ``change_tol``, and the value's last digit is.
  """

  value: jax.Array
  spacing_error: jax.Array
  box_error: jax.Array
  ok: jax.Array


@checks.domains(
  log_density=checks.Function('[rows, d] -> [rows]'),
  num=checks.Integer(minimum=2),
  change_tol=checks.POSITIVE,
)
def grid_log_partition(
  log_density: Callable[[jax.Array], jax.Array],
  low: base.ArrayLike,
  high: base.ArrayLike,
  num: int = 256,
  *,
  change_tol: float | jax.Array = 1e-4,
) -> GridLogPartition:
  """Integrates the density on a grid: exact up to a checked error.

  The midpoint rule, three times: on the box, on the box at half the spacing,
  and on a box half as wide again at that spacing.

  Args:
    log_density: The model at its parameters, ``[rows, d] -> [rows]``.
    low: ``[d]``, d one or two, the lower corner of the box.
    high: ``[d]``, the upper corner.
    num: Cells on each side of the first grid.
    change_tol: The largest change, in nats, that passes.

  Returns:
    A `GridLogPartition`.

  Raises:
    TypeError: ``log_density`` is not a function, ``num`` no integer,
      ``change_tol`` not a real number, or a corner not one of numbers.
    ValueError: ``num`` is below two, ``change_tol`` not positive; the
      corners have not one or two entries, or do not bound a box.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> result = unnormalized.grid_log_partition(
    ...     lambda x: -jnp.sum(x ** 2, -1) / 2, [-6.0, -6.0], [6.0, 6.0], 64)
    >>> print(f'{result.value:.3f} {result.ok}')
    1.838 True

  Notes:
    Cost: ``(1 + 4 + 9) num^2`` evaluations of the model in two dimensions.
  """
  checks.enforce(grid_log_partition, locals())
  low, high = _corners(low, high)
  middle, half = (low + high) / 2, (high - low) / 2
  coarse = _integrate(log_density, low, high, num)
  fine = _integrate(log_density, low, high, 2 * num)
  large = _integrate(
    log_density, middle - 1.5 * half, middle + 1.5 * half, 3 * num
  )
  spacing_error, box_error = jnp.abs(fine - coarse), jnp.abs(large - fine)
  rounding = jnp.finfo(large.dtype).eps / 2 * jnp.abs(large)
  errors = jnp.stack([spacing_error, box_error, rounding])
  ok = jnp.all(errors <= change_tol)
  return GridLogPartition(
    jnp.where(ok, large, jnp.nan), spacing_error, box_error, ok
  )


def _corners(low, high):
  """The corners of the box as arrays, if they bound one."""
  for name, end in (('low', low), ('high', high)):
    if not np.issubdtype(np.asarray(end).dtype, np.number):
      raise TypeError(f'{name} must be numbers, got {end!r}.')
  low, high = (np.atleast_1d(np.asarray(end)) for end in (low, high))
  if low.ndim != 1 or low.shape != high.shape or low.size not in (1, 2):
    raise ValueError(
      'low and high must have one or two entries, got shapes'
      f' {low.shape} and {high.shape}; use log_partition in more dimensions.'
    )
  if not np.all(low < high):
    raise ValueError(f'low must be below high, got {low} and {high}.')
  if not np.all(np.isfinite(high - low)):
    raise ValueError(f'low and high must be finite, got {low} and {high}.')
  return low, high


def _integrate(log_density, low, high, num):
  """The midpoint rule with ``num`` cells on each side."""
  width = (high - low) / num
  sides = [low[i] + width[i] * (np.arange(num) + 0.5) for i in range(low.size)]
  points = np.stack(np.meshgrid(*sides, indexing='ij'), -1)
  points = jnp.asarray(
    points.reshape(num, -1, low.size), jnp.result_type(float)
  )

  def slab(rows):
    log_p = log_density(rows)
    _likelihood.check_rows(log_p, rows.shape[0])
    return special.logsumexp(log_p)

  # One slab of the grid at a time.
  parts = jax.lax.map(slab, points)
  return special.logsumexp(parts) + np.sum(np.log(width))
