"""Whether weighted draws stand still under steps that leave the model alone.

Importance weights only see where the noise has been. Rows resampled by them
are distributed as the model, if the noise covers it; then a Metropolis walk,
which keeps that distribution, changes no mean. Where the model has mass that
the noise misses (a hole, a heavy tail, a density that is not proper) the walk
finds it and leaves.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np

from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch

DRAWS = 500  # Of each of two keys, where rows may repeat.


class Reservoir(NamedTuple):
  """Rows resampled by weight from draws that pass by, and their moments."""

  log_total: jax.Array  # shape (), log of the weights so far
  rows: jax.Array  # shape [chains, size], flat
  log_w: jax.Array  # shape [chains], log p - log q of the rows
  log_p: jax.Array  # shape [chains]
  low: jax.Array  # shape [size], of all draws
  high: jax.Array  # shape [size]
  whole: jax.Array  # bool [size], coordinates that were an integer in each draw


class Layout(NamedTuple):
  """How a row becomes a vector; made from the shapes of rows."""

  unravel: Any
  discrete: np.ndarray  # bool [size], coordinates of integers and bools


def layout(rows: Any) -> Layout:
  """The layout of a row, from abstract rows ``[num, ...]``."""
  row = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), rows)
  _, unravel = flatten_util.ravel_pytree(row)
  flags = [
    np.full(leaf.size, not jnp.issubdtype(leaf.dtype, jnp.floating))
    for leaf in jax.tree.leaves(row)
  ]
  return Layout(unravel, np.concatenate(flags))


def flatten(rows: Any, dtype: Any) -> jax.Array:
  """Rows as vectors, ``[num, size]``."""
  leaves = jax.tree.leaves(rows)
  return jnp.concatenate(
    [leaf.reshape(leaf.shape[0], -1).astype(dtype) for leaf in leaves], 1
  )


def empty(chains: int, size: int, dtype: Any) -> Reservoir:
  """A reservoir that no draw has passed."""
  none = jnp.full((chains,), -jnp.inf, dtype)
  return Reservoir(
    jnp.full((), -jnp.inf, dtype),
    jnp.zeros((chains, size), dtype),
    none,
    none,
    jnp.full((size,), jnp.inf, dtype),
    jnp.full((size,), -jnp.inf, dtype),
    jnp.ones((size,), bool),
  )


def add(
  reservoir: Reservoir,
  key: jax.Array,
  rows: jax.Array,
  log_w: jax.Array,
  log_p: jax.Array,
) -> Reservoir:
  """Lets draws pass: each place takes one of them in proportion to weight."""
  pick_key, take_key = jax.random.split(key)
  chains = reservoir.log_w.shape
  weights = _likelihood.importance_weights(log_w)
  ends = jnp.cumsum(weights.scaled)
  uniform = jax.random.uniform(pick_key, chains, log_w.dtype)
  pick = jnp.searchsorted(ends, uniform * ends[-1])
  pick = jnp.minimum(pick, log_w.shape[0] - 1)
  log_total = jnp.logaddexp(
    reservoir.log_total, weights.log_scale + jnp.log(weights.total)
  )
  share = jnp.exp(weights.log_scale - log_total) * weights.total
  take = jax.random.uniform(take_key, chains, log_w.dtype) < share
  return Reservoir(
    log_total,
    jnp.where(take[:, None], rows[pick], reservoir.rows),
    jnp.where(take, log_w[pick], reservoir.log_w),
    jnp.where(take, log_p[pick], reservoir.log_p),
    jnp.minimum(reservoir.low, jnp.min(rows, 0)),
    jnp.maximum(reservoir.high, jnp.max(rows, 0)),
    reservoir.whole & whole(rows),
  )


def whole(rows: jax.Array) -> jax.Array:
  """Which coordinates are integers in all draws, as those of no density are."""
  # Large floats have no fraction.
  return jnp.all((rows == jnp.round(rows)) & (jnp.abs(rows) < 1e6), 0)


def repeated(noise: _noise_batch.Noise, key: jax.Array) -> jax.Array:
  """Whether draws repeat, as those of no density do.

  So they do where a sampler ignores its key, or takes from few rows. A few
  that repeat are atoms, or all the digits there are.
  """
  draws = [noise.sample(key, DRAWS) for key in jax.random.split(key)]
  leaves = jax.tree.leaves(draws)
  if any(jnp.finfo(leaf.dtype).bits < 32 for leaf in leaves if _is_real(leaf)):
    return jnp.asarray(False)
  dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))
  rows = jnp.concatenate([flatten(rows, dtype) for rows in draws])
  # Rows alike are one number, and it is others' by a rare chance.
  code = jnp.sum(rows * jax.random.normal(key, rows.shape[1:], dtype), 1)
  code = jnp.sort(code)
  alike = code[1:] == code[:-1]
  groups = jnp.sum(alike & ~jnp.append(False, alike[:-1]))
  return ~jnp.all(whole(rows)) & (groups > DRAWS / 25)


def alone(
  log_density: Any, rows: jax.Array, log_p: jax.Array, shape: Layout, dtype: Any
) -> jax.Array:
  """Whether the density of rows is the same without others beside them.

  It is another where a model normalizes by the batch that it sees.
  """
  best = jnp.argsort(-log_p)[: -(-log_p.size // 2)]
  here = log_p[best]
  there = log_density(jax.vmap(shape.unravel)(rows[best])).astype(here.dtype)
  finite = jnp.isfinite(here)
  gap = jnp.where(finite, jnp.abs(there - here), 0)
  size = jnp.where(finite, jnp.abs(here), 0)
  # Sums of another order differ by digits.
  rounding = 20 * _likelihood.rounding(dtype, here) + 1e-3 * jnp.mean(size)
  return jnp.mean(gap) <= 0.01 + rounding  # NaN is not.


def _is_real(leaf):
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def propose(
  key: jax.Array, rows: jax.Array, reservoir: Reservoir, discrete: np.ndarray
) -> jax.Array:
  """Symmetric proposals: kicks of all scales, and one integer drawn anew."""
  kick_key, scale_key, which_key, value_key = jax.random.split(key, 4)
  num, size = rows.shape
  spread = jnp.std(reservoir.rows, 0)
  # Scales over two decades, because modes are narrower than all of them.
  exponent = jax.random.uniform(scale_key, (num, 1), rows.dtype, -2.0, 0.7)
  kick = jax.random.normal(kick_key, rows.shape, rows.dtype)
  moved = rows + 10**exponent * spread / math.sqrt(size) * kick
  discrete = discrete | reservoir.whole  # Bits may come as floats.
  logits = jnp.broadcast_to(jnp.where(discrete, 0.0, -jnp.inf), (num, size))
  place = jax.random.categorical(which_key, logits)[:, None]
  low, high = reservoir.low, reservoir.high
  # A bit may not have been met in both its states.
  is_bit = (low >= 0) & (high <= 1)
  low, high = jnp.where(is_bit, 0, low), jnp.where(is_bit, 1, high)
  uniform = jax.random.uniform(value_key, rows.shape, rows.dtype)
  width = high - low + 1
  drawn = low + jnp.minimum(jnp.floor(uniform * width), width - 1)
  changed = jnp.where(jnp.arange(size) == place, drawn, rows)
  return jnp.where(discrete, changed, moved)


class Walked(NamedTuple):
  """Where a walk ends, and what it met."""

  log_w: jax.Array  # shape [chains], log p - log q of the rows
  infinite: jax.Array  # shape (), int32, proposals of infinite density
  escaped: jax.Array  # shape (), bool, whether a row left the noise's support


def walk(
  log_density: Any,
  noise: _noise_batch.Noise,
  key: jax.Array,
  reservoir: Reservoir,
  shape: Layout,
  num_steps: int,
) -> Walked:
  """Walks from the reservoir; where the density is NaN it counts as zero."""
  unravel = jax.vmap(shape.unravel)

  def weigh(rows, log_p):
    log_q = noise.log_prob(unravel(rows)).astype(log_p.dtype)
    return log_p - jnp.where(jnp.isnan(log_q), -jnp.inf, log_q)

  def step(carry, key):
    rows, log_p, escaped = carry
    move_key, test_key = jax.random.split(key)
    there = propose(move_key, rows, reservoir, shape.discrete)
    log_p_there = log_density(unravel(there)).astype(log_p.dtype)
    uniform = jax.random.uniform(test_key, log_p.shape, log_p.dtype)
    accept = jnp.log(uniform) < log_p_there - log_p  # NaN is not.
    accept &= log_p_there < jnp.inf
    rows = jnp.where(accept[:, None], there, rows)
    log_p = jnp.where(accept, log_p_there, log_p)
    escaped |= jnp.any(weigh(rows, log_p) == jnp.inf)
    return (rows, log_p, escaped), jnp.sum(log_p_there == jnp.inf)

  start = (reservoir.rows, reservoir.log_p, jnp.asarray(False))
  (rows, log_p, escaped), infinite = jax.lax.scan(
    step, start, jax.random.split(key, num_steps)
  )
  infinite = jnp.sum(infinite).astype(jnp.int32)
  return Walked(weigh(rows, log_p), infinite, escaped)


def change_of(value, before, after, ess):
  """By how much the walk moves log Z, and the standard error of that."""
  f_before, f_after = (
    jax.nn.sigmoid(value - log_w) for log_w in (before, after)
  )
  means = jnp.mean(f_before), jnp.mean(f_after)
  change = jnp.log(means[0]) - jnp.log(means[1])
  pairs = f_after / means[1] - f_before / means[0]
  # Rows of few draws are copies of each other.
  num = pairs.size * ess / (pairs.size + ess)
  return change, jnp.std(pairs) / jnp.sqrt(jnp.maximum(num, 1))
