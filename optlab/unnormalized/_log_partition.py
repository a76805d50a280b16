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
from optlab.unnormalized import _importance
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch
from optlab.unnormalized import _tempered as _tempered_smc


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
    data_gap: By how much rows of ``data`` say that log Z is larger; NaN without
      any.
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
  data_gap: jax.Array
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
  data: base.ArrayTree | None = None,
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
      is outside its support; NaN is an error. A row's must not depend on those
      beside it, as with statistics of the batch: that is refused.
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
    data: Rows that lie where the model should have its mass, those that it was
      trained on, say: a mode that holds some of them and that the estimate
      missed is then seen. ``None`` leaves that unseen.

  Returns:
    A `LogPartition`.

  Raises:
    TypeError: ``log_density`` is not a function, ``noise`` no distribution,
      ``key`` no PRNG key, a count no integer, or a bound not a real number.
    ValueError: ``num`` is not a positive multiple of ``chunk``, a bound out of
      range, or ``noise`` a batch of distributions; ``data`` have no rows, or
      rows of another shape than the noise's.

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
    ``tests/unnormalized/log_partition_test.py``, no theory. Where the walk
    meets rows that outweigh every draw there is a tail that no draw stands for,
    such as that of a Cauchy model under a wide Gaussian; the error is then no
    smaller than that of the second estimate. The mass where the model outweighs
    every draw is estimated by a third, whose noise are the model's rows kicked
    by Cauchy steps: it is part of the error, and above a tenth refuses. So does
    another log Z by these, which tells of noise whose ``log_prob`` is off by a
    constant.

    That finds a mode which no draw met some thirty spreads away in one column,
    ten in three, and hardly any in ten, where kicks go astray. A density that
    hardly falls along a column, a million spreads out, is refused. Beside
    discrete columns, which no kick moves, only modes are told. Draws that
    repeat are refused, as of a sampler that ignores its key or rounds to
    levels: let it add uniform noise, a level wide (`jax.random.uniform`).

    A constant is seen where the model is near to one Gaussian: in up to some
    sixty columns, and in 250 whose correlations are weak. A third of the draws
    are from that with the moments of its rows. Beyond, ``ok`` takes the noise's
    density on trust. Try noise of your own there: with ``noise.log_prob`` as
    the model and a Gaussian fitted to draws of it as the noise, `tempered_smc`
    must find zero, up to its error.

    A needle, much narrower than its distance, or a mode further out, is seen by
    none. With ``data`` it is, if four rows and more are in it: rows that weigh
    more than every draw are mass that no draw stands for, and more of them than
    the largest draw explains refuse the estimate; tempering runs from the data
    to the noise as well, and refuses where that finds more mass. A model that
    is far from its data, or noise that is, is then refused too. A mode where
    neither noise nor data are stays invisible: draw from a wider noise as well,
    and see that both `agree`. A periodic model must be minus infinity outside
    of its box.

    Within `jax.shard_map`, a key on each device, pass that ``check_vma=False``.

    Cost: ``num`` evaluations of the model and of the noise's density,
    ``walk_steps`` times the walking rows, and 17,000 of kicks and the looks
    beside them; no gradient.
  """
  checks.enforce(log_partition, locals())
  checks.check_int('num', num, chunk, 'Lower chunk, or draw more.')
  if num % chunk:
    raise ValueError(f'num must be a multiple of chunk, {chunk}, got {num}.')

  noise = _noise_batch.as_noise('noise', noise)
  key = checks.as_key('key', key)
  if data is not None:
    draws = jax.eval_shape(lambda: noise.sample(jax.random.key(0), 1))
    _noise_batch.check_kind('data', data, draws)
  if method is not None:
    with_data = {} if data is None else {'data': data}
    return _tempered(method(log_density, noise, key, **with_data))
  bounds = _importance.Bounds(min_ess, max_share, max_k_hat)
  return LogPartition(
    *_importance.estimate(
      log_density, noise, key, (num, chunk, walk_steps), bounds, data
    )
  )


def _tempered(found):
  """The result of tempering in the form of the others."""
  found = _tempered_smc.Found(*found)
  value, ok = found.value, found.ok
  smallest_ess = jnp.min(found.runs.smallest_ess)
  return LogPartition(
    value=jnp.where(ok, value, jnp.nan),
    standard_error=found.standard_error,
    ess=smallest_ess,
    largest_share=1 / smallest_ess,
    k_hat=jnp.full((), -jnp.inf, value.dtype),
    second=found.second,
    second_error=found.second_error,
    rejected=found.rejected,
    data_gap=jnp.asarray(found.data_gap, value.dtype),
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
    Boolean scalar; false where either is refused, and where both are one: the
    same noise with the same key.

  Raises:
    TypeError: An estimate is none, or ``sigmas`` not a real number.
    ValueError: ``sigmas`` is not a finite number above 0.
  """
  checks.enforce(agree, locals())
  error = jnp.hypot(first.standard_error, second.standard_error)
  close = jnp.abs(first.value - second.value) <= sigmas * error
  # An estimate agrees with itself, which says nothing.
  same = (first.value == second.value) & (
    first.standard_error == second.standard_error
  )
  return first.ok & second.ok & close & ~(same & (error > 0))
