"""The log-normalizer of a trained model, with an error bar or not at all.

What a training run tracks is no score: it lags, and it cannot see what its
noise did not cover. These draw anew, or integrate on a grid, and give NaN where
the figure would not be worth printing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import special
import numpy as np

from optlab import base
from optlab import checks
from optlab import trees
from optlab.unnormalized import _likelihood


class LogPartition(NamedTuple):
  """An importance-sampling estimate of log Z.

  Attributes:
    value: The estimate; NaN where it is refused.
    standard_error: Its standard error (delta method).
    ess: Effective sample size of the weights.
    largest_share: The largest weight's share of their sum.
    rejected: int32, draws whose weight was NaN or infinite.
    ok: Whether the effective sample size is at least ``min_ess`` and no share
      above ``max_share``.
  """

  value: jax.Array
  standard_error: jax.Array
  ess: jax.Array
  largest_share: jax.Array
  rejected: jax.Array
  ok: jax.Array


def log_partition(
  log_density: Callable[[base.ArrayTree], jax.Array],
  noise: _likelihood.Noise,
  key: jax.Array,
  num: int = 100_000,
  *,
  chunk: int = 10_000,
  min_ess: float | jax.Array = 100.0,
  max_share: float | jax.Array = 0.1,
) -> LogPartition:
  r"""Estimates log Z by importance sampling with fresh draws.

  .. math:: \log Z \approx \log \tfrac{1}{N} \sum_j p_0(z_j) / q(z_j)

  Args:
    log_density: The model at its parameters, ``rows -> [rows]``.
    noise: The distribution to draw from, wider than the model.
    key: PRNG key.
    num: Draws in all, a multiple of ``chunk``.
    chunk: Draws evaluated at a time.
    min_ess: The smallest effective sample size that is not refused.
    max_share: The largest share of one draw that is not refused.

  Returns:
    A `LogPartition`.

  Raises:
    TypeError: ``log_density`` is not a function.
    ValueError: ``num`` is not a positive multiple of ``chunk``.

  Examples:
    >>> import jax, jax.numpy as jnp, optlab
    >>> from optlab import unnormalized
    >>> noise = unnormalized.gaussian(jnp.zeros(1), 2 * jnp.eye(1))
    >>> result = optlab.log_partition(
    ...     lambda x: -x[:, 0] ** 2 / 2, noise, jax.random.key(0))
    >>> print(f'{result.value:.2f} {result.standard_error:.4f} {result.ok}')
    0.92 0.0012 True

  Notes:
    The effective sample size cannot see a hole in the support of ``noise``:
    estimate twice, with a second and wider noise, and see that they `agree`.
    Cost: ``num`` evaluations of the model, no gradient.
  """
  checks.check_callable('log_density', log_density, 'rows -> [rows]')
  checks.check_int('chunk', chunk, 1)
  checks.check_int('num', num, chunk, 'Lower chunk, or draw more.')
  if num % chunk:
    raise ValueError(f'num must be a multiple of chunk, {chunk}, got {num}.')
  _likelihood.check_noise('noise', noise)
  checks.check_non_negative('min_ess', min_ess)
  checks.check_positive('max_share', max_share)

  def add(sums, key):
    rows = noise.sample(key, chunk)
    log_q = noise.log_prob(rows)
    dtype = trees.accumulator_dtype(log_q)
    log_p, log_q = log_density(rows).astype(dtype), log_q.astype(dtype)
    _likelihood.check_rows(log_p, chunk)
    good = _likelihood.good_noise(log_p, log_q)
    log_w = jnp.where(good, log_p - log_q, -jnp.inf)
    chunk_sums = (
      special.logsumexp(log_w),
      special.logsumexp(2 * log_w),
      jnp.max(log_w),
      jnp.sum(~good).astype(jnp.int32),
    )
    return sums, chunk_sums

  keys = jax.random.split(key, num // chunk)
  _, (first, second, top, rejected) = jax.lax.scan(add, None, keys)
  log_sum, log_squares = special.logsumexp(first), special.logsumexp(second)
  rejected = jnp.sum(rejected).astype(jnp.int32)
  good = jnp.maximum(num - rejected, 1).astype(log_sum.dtype)
  some = log_sum > -jnp.inf
  ess = jnp.where(some, jnp.exp(2 * log_sum - log_squares), 0)
  share = jnp.where(some, jnp.exp(jnp.max(top) - log_sum), 1)
  ok = some & (ess >= min_ess) & (share <= max_share)
  return LogPartition(
    value=jnp.where(ok, log_sum - jnp.log(good), jnp.nan),
    standard_error=jnp.sqrt(
      jnp.maximum(1 / jnp.maximum(ess, 1e-30) - 1 / good, 0)
    ),
    ess=ess,
    largest_share=share,
    rejected=rejected,
    ok=ok,
  )


def agree(
  first: LogPartition, second: LogPartition, sigmas: float | jax.Array = 4.0
) -> jax.Array:
  """Whether two estimates with different noise are the same up to their errors.

  Args:
    first: An estimate.
    second: Another, with wider noise.
    sigmas: Standard errors of the difference that pass.

  Returns:
    Boolean scalar; false where either is refused.

  Raises:
    TypeError: ``sigmas`` is not a real number.
    ValueError: ``sigmas`` is not a finite number above 0.
  """
  for name, estimate in (('first', first), ('second', second)):
    checks.check_fields(
      name, estimate, LogPartition._fields, 'a result of log_partition'
    )
  checks.check_positive('sigmas', sigmas)
  error = jnp.hypot(first.standard_error, second.standard_error)
  close = jnp.abs(first.value - second.value) <= sigmas * error
  return first.ok & second.ok & close


class GridLogPartition(NamedTuple):
  """log Z by quadrature in one or two dimensions.

  Attributes:
    value: The finest figure; NaN where the checks fail.
    spacing_error: Its change when the spacing was halved.
    box_error: Its change when the box grew by half.
    ok: Whether both are at most ``tolerance``.
  """

  value: jax.Array
  spacing_error: jax.Array
  box_error: jax.Array
  ok: jax.Array


def grid_log_partition(
  log_density: Callable[[jax.Array], jax.Array],
  low: jax.typing.ArrayLike,
  high: jax.typing.ArrayLike,
  num: int = 256,
  *,
  tolerance: float | jax.Array = 1e-4,
) -> GridLogPartition:
  """Integrates the density on a grid: exact up to a checked error.

  The midpoint rule, three times: on the box, on the box at half the spacing,
  and on a box half as wide again at that spacing.

  Args:
    log_density: The model at its parameters, ``[rows, d] -> [rows]``.
    low: ``[d]``, d one or two, the lower corner of the box.
    high: ``[d]``, the upper corner.
    num: Cells on each side of the first grid.
    tolerance: The largest change, in nats, that passes.

  Returns:
    A `GridLogPartition`.

  Raises:
    TypeError: ``log_density`` is not a function.
    ValueError: The corners have not one or two entries, or do not bound a box.

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
  checks.check_callable('log_density', log_density, '[rows, d] -> [rows]')
  checks.check_int('num', num, 2)
  checks.check_positive('tolerance', tolerance)
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

  def integrate(low, high, num):
    width = (high - low) / num
    sides = [
      low[i] + width[i] * (np.arange(num) + 0.5) for i in range(low.size)
    ]
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

  middle, half = (low + high) / 2, (high - low) / 2
  coarse = integrate(low, high, num)
  fine = integrate(low, high, 2 * num)
  large = integrate(middle - 1.5 * half, middle + 1.5 * half, 3 * num)
  spacing_error, box_error = jnp.abs(fine - coarse), jnp.abs(large - fine)
  ok = (spacing_error <= tolerance) & (box_error <= tolerance)
  return GridLogPartition(
    jnp.where(ok, large, jnp.nan), spacing_error, box_error, ok
  )
