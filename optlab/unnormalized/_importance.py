"""log Z by importance sampling, and what speaks against the figure."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch
from optlab.unnormalized import _pareto
from optlab.unnormalized import _unseen
from optlab.unnormalized import _walk


class Bounds(NamedTuple):
  """What is still not refused, see `log_partition`."""

  min_ess: Any
  max_share: Any
  max_k_hat: Any


def estimate(
  log_density: Any,
  noise: _noise_batch.Noise,
  key: jax.Array,
  sizes: tuple[int, int, int],
  bounds: Bounds,
  data: Any,
) -> tuple[jax.Array, ...]:
  """The fields of `LogPartition`, in their order.

  Args:
    log_density: The model, ``rows -> [rows]``.
    noise: The noise.
    key: PRNG key.
    sizes: Draws in all, draws at a time, steps of the walk.
    bounds: What is still not refused.
    data: Rows where the model should have mass, or ``None``.
  """
  num, chunk, walk_steps = sizes
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
  # A constant in the log density takes digits from all that is added to it;
  # half precision has few.
  model = jax.eval_shape(lambda: log_density(noise.sample(key, chunk)))
  rounding = jnp.maximum(
    jnp.finfo(log_w.dtype).eps * jnp.abs(value),
    _likelihood.rounding(model.dtype, reservoir.log_p),
  )
  error = jnp.hypot(error, jnp.where(some, rounding, 0))

  walk_key, kick_key = jax.random.split(jax.random.fold_in(key, 1))
  walked = _walk.walk(
    log_density, noise, walk_key, reservoir, layout, walk_steps
  )
  change, second_error = _walk.change_of(
    value, reservoir.log_w, walked.log_w, weights.ess
  )
  # Where walkers outweigh every draw there is a tail that no draw stands for.
  # It may be thin and wide, and then no weight tells of it but theirs alone.
  # More of them than the largest draw explains are mass that none has met.
  beyond = jnp.sum(walked.log_w > weights.log_scale + 0.7).astype(error.dtype)
  error = jnp.hypot(error, jnp.minimum(beyond / 4, 1) * second_error)
  kicked = _unseen.kick(
    log_density, noise, kick_key, reservoir, layout, value,
    weights.log_scale + rounding, min(num, 10_000),
  )  # fmt: skip
  error = jnp.hypot(error, jnp.minimum(kicked.share, 1))
  rejected += walked.infinite
  # Rounding alone is no disagreement.
  bound = 3 * jnp.hypot(second_error, plain_error)
  bound += jnp.finfo(log_w.dtype).eps ** 0.5
  ok = (
    some
    & ~_walk.repeated(noise, jax.random.fold_in(key, 2))
    & (rejected == 0)
    & (rounding < 0.5)
    & ~walked.escaped
    & _walk.alone(
      log_density, reservoir.rows, reservoir.log_p, layout, model.dtype
    )
    & (weights.ess >= bounds.min_ess)
    & (share <= bounds.max_share)
    & (k_hat <= jnp.minimum(bounds.max_k_hat, _pareto.largest_ok(num)))
    & (jnp.abs(change) <= bound)
    & (beyond <= 3 + walked.log_w.size * (4 * share + 2 * kicked.share))
    & (kicked.share <= _unseen.MOST)
    & (jnp.abs(kicked.gap) <= 4 * jnp.hypot(error, kicked.gap_error))
  )
  data_gap = jnp.full((), jnp.nan, log_w.dtype)
  if data is not None:
    data_gap, reached = _reached(
      log_density, noise, data, weights.log_scale, share
    )
    ok &= reached
  return (
    jnp.where(ok, value, jnp.nan), error, weights.ess, share, k_hat,
    value + change, second_error, rejected, data_gap, ok,
  )  # fmt: skip


def _reached(log_density, noise, data, largest, share):
  """What rows that weigh more than every draw say, and whether they are few."""
  if data is None:
    return jnp.full((), jnp.nan, largest.dtype), jnp.asarray(True)
  log_p, log_q = log_density(data), noise.log_prob(data)
  n = jnp.shape(jax.tree.leaves(data)[0])[0]
  _likelihood.check_rows(log_p, n)
  log_w = (log_p - log_q).astype(largest.dtype)
  # Where the model has no density a row has nothing to say; NaN is more.
  missed = (log_p != -jnp.inf) & ~(log_w <= largest)
  count = jnp.sum(missed)
  gap = -jnp.log1p(-count / n).astype(largest.dtype)
  return gap, count <= 3 + 4 * n * share


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
    rows = _noise_batch.draw('noise', noise, key, chunk)
    log_q = noise.log_prob(rows).astype(dtype)
    log_p = log_density(rows)
    _likelihood.check_rows(log_p, chunk)
    log_p = log_p.astype(dtype)
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
