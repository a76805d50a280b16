"""The tracked normalizer of `meco`: one, or one for each context.

A model of y given x has a normalizer for every x, and the mean of their
logarithms is not the logarithm of their mean. There each context has a row of a
block table. A step sees some of them, by the rows of noise that name them,
and costs what they cost, not what the table costs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import tables
from optlab.unnormalized import _alike
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _slots


class Followed(NamedTuple):
  """What a batch makes of the trackers, and they of it.

  Attributes:
    log_normalizer: The trackers, updated.
    weight: The total weight of each average.
    cotangents: Of the log densities of data and of noise.
    goods: Which rows of data and of noise were not dropped.
    data_good: Which rows of data count.
    value: The negative log-likelihood.
    ess: Effective number of rows of noise.
    held: Whether no tracker moved.
    alike: What tells whether rows of one context have one normalizer.
  """

  log_normalizer: jax.Array
  weight: jax.Array
  cotangents: tuple[jax.Array, jax.Array]
  goods: tuple[jax.Array, jax.Array]
  data_good: jax.Array
  value: jax.Array
  ess: jax.Array
  held: jax.Array
  alike: Any = None


class Rate(NamedTuple):
  """How an average moves: its gamma, and whether its start is debiased."""

  gamma: jax.Array
  debias: bool


def one(
  state: Any,
  rate: Rate,
  log_p_data: jax.Array,
  log_w: jax.Array,
  noise_good: jax.Array,
  drift: jax.Array,
) -> Followed:
  """Follows one normalizer by the noise of a batch.

  Args:
    state: What has ``log_normalizer`` and ``weight``.
    rate: Of the average.
    log_p_data: ``[n]``, log densities of the data.
    log_w: ``[m]``, log weights of the noise, -inf in rows that are not good.
    noise_good: bool ``[m]``.
    drift: By how much the normalizer's logarithm moved since the last step.
  """
  dtype = log_p_data.dtype
  data_good = jnp.isfinite(log_p_data)
  weights = _likelihood.importance_weights(log_w)
  m = _likelihood.num_good(noise_good, dtype)
  log_g = weights.log_scale + jnp.log(weights.total) - jnp.log(m)
  log_u, weight, held = _average(state, log_g, rate, drift)
  usable = jnp.any(data_good) & jnp.any(noise_good)
  share = jnp.where(usable, jnp.exp(weights.log_scale - log_u) / m, 0)
  return Followed(
    log_normalizer=log_u,
    weight=weight,
    cotangents=(
      _likelihood.mean_cotangent(jnp.asarray(-1, dtype), data_good & usable),
      weights.scaled * share,
    ),
    goods=(data_good, noise_good),
    data_good=data_good,
    value=log_u - _likelihood.mean_of(log_p_data, data_good),
    ess=weights.ess,
    held=held,
  )


class One(NamedTuple):
  """Some trackers, as the state of one."""

  log_normalizer: jax.Array
  weight: jax.Array


def many(
  state: Any,
  rate: Rate,
  log_p_data: jax.Array,
  log_w: jax.Array,
  noise_good: jax.Array,
  batch: Any,
) -> Followed:
  """Follows the normalizer of each context that the noise of a batch names.

  Args:
    state: What has tables ``log_normalizer`` and ``weight``, and ``alike``.
    rate: Of the averages.
    log_p_data: As for `one`.
    log_w: As for `one`.
    noise_good: As for `one`.
    batch: What has ``contexts`` and ``noise_contexts``.
  """
  dtype = log_p_data.dtype
  log_p_data, log_w, noise_good = map(
    _slots.whole, (log_p_data, log_w, noise_good)
  )
  seen = _slots.number(batch, state.weight.shape[0])
  noise_good &= seen.noise_named
  log_w = jnp.where(noise_good, log_w, -jnp.inf)
  noise = _slots.sums(seen, log_w, noise_good)
  rows = One(
    *tables.gather_rows((state.log_normalizer, state.weight), seen.context)
  )
  log_u, weight, held = _average(rows, noise.log_mean, rate, 0)
  # Data count where a normalizer is known and noise stands against them.
  known = (noise.count > 0) & (weight > 0)
  finite = jnp.isfinite(log_p_data)
  data_good = finite & seen.found & known[seen.data]
  n = _likelihood.num_good(data_good, dtype)
  count = jax.ops.segment_sum(data_good.astype(dtype), seen.data, log_w.size)
  share = jnp.exp(noise.log_scale - log_u) / jnp.maximum(noise.count, 1)
  share = jnp.where(noise.log_scale > -jnp.inf, share * count / n, 0)
  log_u_table, weight_table = tables.scatter_rows(
    (state.log_normalizer, state.weight),
    (log_u, weight),
    seen.context,
    seen.used & ~held,
  )
  return Followed(
    log_normalizer=log_u_table,
    weight=weight_table,
    cotangents=(
      _likelihood.mean_cotangent(jnp.asarray(-1, dtype), data_good),
      noise.scaled * share[seen.noise],
    ),
    goods=(data_good | ~seen.data_named, noise_good | ~seen.noise_named),
    data_good=data_good,
    value=_likelihood.mean_of(log_u[seen.data] - log_p_data, data_good),
    ess=_likelihood.mean_of(noise.ess, seen.used & (noise.count > 0)),
    held=~jnp.any(seen.used & ~held),
    alike=_alike.after(state.alike, seen, noise, noise_good),
  )


def _average(state, log_g, rate, drift):
  """The trackers, their weights, and whether noise without weight held them."""
  has_weight = log_g > -jnp.inf
  gamma = rate.gamma
  # 1 - (1 - gamma)^t, in a form that a schedule may drive.
  weight = (1 - gamma) * state.weight + gamma
  gamma_t = gamma / weight
  if not rate.debias:
    weight = jnp.ones_like(weight)
  log_u = jnp.where(
    has_weight,
    jnp.logaddexp(
      jnp.log1p(-gamma_t) + state.log_normalizer + drift,
      jnp.log(gamma_t) + log_g,
    ),
    state.log_normalizer,
  )
  return log_u, jnp.where(has_weight, weight, state.weight), ~has_weight


def check(method: str, batch: Any, n: int, m: int) -> None:
  """Raises unless the batch names a context for every row.

  Args:
    method: For the message.
    batch: Data and noise, checked.
    n: Rows of data.
    m: Rows of noise.
  """
  for name, size in (('contexts', n), ('noise_contexts', m)):
    value = getattr(batch, name)
    if value is None:
      raise ValueError(
        f'{method} with contexts needs batch.{name}, the context of every row:'
        ' build the batch with optlab.unnormalized.conditional_batch.'
      )
    dtype = getattr(value, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
      raise TypeError(
        f'{method}: {name} must be an integer array, got {value!r}; convert it'
        ' with jnp.asarray(contexts, jnp.int32).'
      )
    if jnp.shape(value) != (size,):
      raise ValueError(
        f'{method}: {name} must have shape {(size,)}, got {jnp.shape(value)}.'
      )


def refuse(method: str, batch: Any, remedy: str) -> None:
  """Raises a ``ValueError`` if a batch names contexts that nothing follows."""
  if batch.contexts is not None or batch.noise_contexts is not None:
    raise ValueError(
      f'{method} got a batch that names contexts, and has no tracker for each:'
      f' {remedy}'
    )
