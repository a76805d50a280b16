"""The log-normalizer of a trained model, with an error bar or not at all.

What a training run tracks is no score: it lags, and it cannot see what its
noise did not cover. This draws anew, and gives NaN where the figure would not
be worth printing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch
from optlab.unnormalized import _pareto
from optlab.unnormalized import _walk


class LogPartition(NamedTuple):
  """An estimate of log Z.

  Attributes:
    value: The estimate; NaN where it is refused.
    standard_error: Its standard error, larger where the weights' tail is heavy.
    ess: Effective sample size of the weights.
    largest_share: The largest weight's share of their sum.
    k_hat: Tail index of the weights; their variance is finite below 1/2.
    second: A second estimate, which sees mass that the noise misses.
    second_error: The standard error of its difference to the first.
    rejected: int32, draws whose weight was NaN or infinite.
    ok: Whether the estimate may be used.
  """

  value: jax.Array
  standard_error: jax.Array
  ess: jax.Array
  largest_share: jax.Array
  k_hat: jax.Array
  second: jax.Array
  second_error: jax.Array
  rejected: jax.Array
  ok: jax.Array


@checks.domains(
  log_density=_likelihood.LOG_DENSITY_OF_ROWS,
  noise=_noise_batch.NOISE,
  num=checks.Integer(),
  chunk=checks.Integer(),
  min_ess=checks.NON_NEGATIVE,
  max_share=checks.POSITIVE,
  max_k_hat=checks.Real(),
  walk_steps=checks.Integer(),
  method=checks.Function('such as tempered_smc returns', optional=True),
)
def log_partition(
  log_density: Callable[[base.ArrayTree], jax.Array],
  noise: _noise_batch.Noise,
  key: jax.Array,
  num: int = 100_000,
  *,
  chunk: int = 10_000,
  min_ess: float | jax.Array = 100.0,
  max_share: float | jax.Array = 0.1,
  max_k_hat: float | jax.Array = 0.7,
  walk_steps: int = 50,
  method: Callable[..., Any] | None = None,
) -> LogPartition:
  r"""Estimates log Z by importance sampling with fresh draws.

  .. math:: \log Z \approx \log \tfrac{1}{N} \sum_j p_0(z_j) / q(z_j)

  The estimate is refused where its error could not be told: where few weights
  carry the sum, where their tail is so heavy that the largest has not been
  seen, where a draw was rejected, and where a second estimate differs. For
  that, rows resampled by weight walk by Metropolis steps, which leave the
  model's distribution alone: with :math:`f = q / (q + p_0 / Z)`, whose mean the
  walk must not change,

  .. math:: \log Z_2 = \log Z
    + \log \overline{f}_{\text{before}} - \log \overline{f}_{\text{after}}

  is larger than log Z where the model has mass that the noise misses.

  Args:
    log_density: The model at its parameters, ``rows -> [rows]``. Minus infinity
      is outside its support; NaN is an error.
    noise: The distribution to draw from, wider than the model.
    key: PRNG key.
    num: Draws in all, a multiple of ``chunk``.
    chunk: Draws evaluated at a time.
    min_ess: The smallest effective sample size that is not refused.
    max_share: The largest share of one draw that is not refused.
    max_k_hat: The largest tail index that is not refused; with few draws it is
      ``1 - 1 / log10(num)``, if that is less.
    walk_steps: Steps of the walk of ``min(num, chunk, 2000)`` rows.
    method: ``None`` is importance sampling. `tempered_smc` is for ten to a
      hundred dimensions; the arguments above after ``key`` are then not used,
      and k-hat is minus infinity.

  Returns:
    A `LogPartition`.

  Raises:
    TypeError: ``log_density`` is not a function, ``noise`` no distribution,
      a count no integer, or a bound not a real number.
    ValueError: ``num`` is not a positive multiple of ``chunk``, a bound out of
      range, or ``noise`` a batch of distributions.

  Examples:
    >>> import jax, jax.numpy as jnp, optlab
    >>> from optlab import unnormalized
    >>> noise = unnormalized.gaussian(jnp.zeros(1), 2 * jnp.eye(1))
    >>> result = optlab.log_partition(
    ...     lambda x: -x[:, 0] ** 2 / 2, noise, jax.random.key(0))
    >>> print(f'{result.value:.2f} {result.standard_error:.4f} {result.ok}')
    0.92 0.0012 True

  References:
    Vehtari, Simpson, Gelman, Yao, Gabry, `Pareto Smoothed Importance Sampling
    <https://arxiv.org/abs/1507.02646>`_, JMLR 2024; the second estimate is the
    bridge of Meng, Wong, Statistica Sinica 1996

  Notes:
    The standard error is the delta method's, times ``1 + 5 h + 20 h^2`` where
    k-hat is above 0.3 by h: the sample variance of heavy weights is too small
    just where the estimate is. The factor is fitted to the coverage in
    ``tests/unnormalized/log_partition_test.py``, no theory. A second mode that
    no draw met, behind a valley that no walk crosses, is seen by neither: draw
    from a wider noise as well, and see that both `agree`. Cost: ``num``
    evaluations of the model and of the noise's density, and ``walk_steps``
    times the walking rows; no gradient.
  """
  checks.enforce(log_partition, locals())
  checks.check_int('num', num, chunk, 'Lower chunk, or draw more.')
  if num % chunk:
    raise ValueError(f'num must be a multiple of chunk, {chunk}, got {num}.')

  noise = _noise_batch.as_noise('noise', noise)
  if method is not None:
    return _tempered(method(log_density, noise, key))
  draws, reservoir, layout = _draw(log_density, noise, key, num, chunk)
  log_w, rejected = draws
  weights = _likelihood.importance_weights(log_w)
  some = weights.log_scale > -jnp.inf
  value = weights.log_scale + jnp.log(weights.total) - jnp.log(float(num))
  share = jnp.where(some, 1 / weights.total, 1)
  k_hat = _pareto.k_hat(log_w)
  variance = 1 / jnp.maximum(weights.ess, 1e-30) - 1 / num
  plain_error = jnp.sqrt(jnp.maximum(variance, 0))
  heavy = jnp.clip(k_hat - 0.3, 0, 1)
  error = plain_error * (1 + 5 * heavy + 20 * heavy**2)

  walked = _walk.walk(
    log_density,
    noise,
    jax.random.fold_in(key, 1),
    reservoir,
    layout,
    walk_steps,
  )
  change, second_error = _walk.change_of(
    value, reservoir.log_w, walked.log_w, weights.ess
  )
  rejected += walked.infinite
  # Rounding alone is no disagreement.
  bound = 3 * jnp.hypot(second_error, plain_error)
  bound += jnp.finfo(log_w.dtype).eps ** 0.5
  ok = (
    some
    & (rejected == 0)
    & ~walked.escaped
    & (weights.ess >= min_ess)
    & (share <= max_share)
    & (k_hat <= jnp.minimum(max_k_hat, _pareto.largest_ok(num)))
    & (jnp.abs(change) <= bound)
  )
  return LogPartition(
    value=jnp.where(ok, value, jnp.nan),
    standard_error=error,
    ess=weights.ess,
    largest_share=share,
    k_hat=k_hat,
    second=value + change,
    second_error=second_error,
    rejected=rejected,
    ok=ok,
  )


def _tempered(found):
  """The result of tempering in the form of the others."""
  value, error, second, second_error, runs, rejected, ok = found
  return LogPartition(
    value=jnp.where(ok, value, jnp.nan),
    standard_error=error,
    ess=jnp.min(runs.smallest_ess),
    largest_share=1 / jnp.min(runs.smallest_ess),
    k_hat=jnp.full((), -jnp.inf, value.dtype),
    second=second,
    second_error=second_error,
    rejected=rejected,
    ok=ok,
  )


def _draw(log_density, noise, key, num, chunk):
  """All log weights, the rejected draws, and rows resampled by weight."""
  rows = jax.eval_shape(lambda: noise.sample(key, chunk))
  log_q = jax.eval_shape(
    lambda rows: _noise_batch.scores('noise', noise, rows), rows
  )
  dtype = jnp.promote_types(jnp.float32, log_q.dtype)
  layout = _walk.layout(rows)
  chains = min(num, chunk, 2000)

  def add(carry, key):
    reservoir, rejected = carry
    rows = noise.sample(key, chunk)
    log_q = noise.log_prob(rows).astype(dtype)
    log_p = log_density(rows).astype(dtype)
    _likelihood.check_rows(log_p, chunk)
    good = _likelihood.good_noise(log_p, log_q)
    log_w = jnp.where(good, log_p - log_q, -jnp.inf)
    flat = _walk.flatten(rows, dtype)
    reservoir = _walk.add(
      reservoir, jax.random.fold_in(key, 1), flat, log_w, log_p
    )
    rejected += jnp.sum(~good).astype(jnp.int32)
    return (reservoir, rejected), log_w

  start = _walk.empty(chains, layout.discrete.size, dtype)
  keys = jax.random.split(key, num // chunk)
  (reservoir, rejected), log_w = jax.lax.scan(
    add, (start, jnp.zeros((), jnp.int32)), keys
  )
  return (log_w.reshape(num), rejected), reservoir, layout


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
