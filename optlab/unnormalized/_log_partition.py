"""The log-normalizer of a trained model, with an error bar or not at all.

What a training run tracks is no score: it lags, and it cannot see what its
noise did not cover. This draws anew, and gives NaN where the figure would not
be worth printing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import special

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


@checks.domains(
  log_density=_likelihood.LOG_DENSITY_OF_ROWS,
  noise=_likelihood.NOISE,
  num=checks.Integer(),
  chunk=checks.Integer(),
  min_ess=checks.NON_NEGATIVE,
  max_share=checks.POSITIVE,
)
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
    TypeError: ``log_density`` is not a function, ``noise`` no distribution,
      a count no integer, or a bound not a real number.
    ValueError: ``num`` is not a positive multiple of ``chunk``, or a bound out
      of range.

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
  checks.enforce(log_partition, locals())
  checks.check_int('num', num, chunk, 'Lower chunk, or draw more.')
  if num % chunk:
    raise ValueError(f'num must be a multiple of chunk, {chunk}, got {num}.')

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


ESTIMATE = checks.Pair(LogPartition._fields, 'a result of log_partition')


@checks.domains(first=ESTIMATE, second=ESTIMATE, sigmas=checks.POSITIVE)
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
    TypeError: An estimate is none, or ``sigmas`` not a real number.
    ValueError: ``sigmas`` is not a finite number above 0.
  """
  checks.enforce(agree, locals())
  error = jnp.hypot(first.standard_error, second.standard_error)
  close = jnp.abs(first.value - second.value) <= sigmas * error
  return first.ok & second.ok & close
