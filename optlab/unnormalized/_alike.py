r"""Whether rows of one context have one normalizer, which a tracker needs.

Noise is drawn beside every row. Over a context's :math:`R` rows, the mean
weights of their noise, :math:`r_i`, in units of the mean of all, scatter about
one. Where the rows have one normalizer that is the noise's doing,

.. math:: \sum_i (r_i - 1)^2 \approx \sum_i (1 - 1/R) v_i,

in the mean, for :math:`v_i` the variance of a mean of so many weights, from
their own scatter. Where they have not, that of their normalizers comes on top.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import tracking
from optlab import trees
from optlab.unnormalized import _slots

MEMORY = 100  # Steps of the means.
LATE = 50  # Steps before which nothing is said.
LEAST = 0.02  # Variance of normalizers, in units of their mean, that counts.
ERRORS = 5.0  # Of the mean over so many steps.


class Alike(NamedTuple):
  """Means over steps, where a context has several rows in the batch."""

  step: jax.Array  # shape (), int32, steps that had such rows
  excess: jax.Array  # shape (), variance of their normalizers
  square: jax.Array  # shape (), of the same of a step


def start(dtype: Any) -> Alike:
  """Before the first step."""
  zero = lambda kind: jnp.zeros((), kind)  # Each a buffer of its own.
  return Alike(zero(jnp.int32), zero(dtype), zero(dtype))


def follow(
  old: Alike,
  batch: Any,
  contexts: int,
  log_w: jax.Array,
  good: jax.Array,
) -> Alike:
  """The means after a step.

  Args:
    old: The same before the step.
    batch: What has ``contexts`` and ``noise_contexts``.
    contexts: How many there are.
    log_w: ``[m]``, log weights of the noise, -inf in rows that are not good.
    good: bool ``[m]``.
  """
  log_w, good = _slots.whole(log_w), _slots.whole(good)
  seen = _slots.number(batch, contexts)
  good &= seen.noise_named
  sums = _slots.sums(seen, jnp.where(good, log_w, -jnp.inf), good)
  return after(old, seen, sums, good)


def after(
  old: Alike, seen: _slots.Slots, noise: _slots.Sums, good: jax.Array
) -> Alike:
  """The same where the slots and the sums of the noise are known."""
  relative = jnp.exp(noise.log_scale - noise.log_mean)[seen.noise]
  scaled = jnp.where(good, noise.scaled * relative, jnp.nan)
  data = jnp.where(seen.found, seen.data, scaled.size)
  return _means(old, data, seen.noise, scaled)


def _means(old, data, noise, scaled):
  """By slots of data and noise, and weights over the mean of their slot."""
  n, m = data.size, noise.size
  num = m // n
  if num * n != m or num < 2:
    return old
  draws = scaled.reshape(n, num)
  means = jnp.mean(draws, 1)
  # Draws stand beside their row.
  judged = jnp.all(noise.reshape(n, num) == data[:, None], 1)
  judged &= (data < m) & jnp.isfinite(means)
  place = jnp.where(judged, data, m)
  add = lambda rows: jax.ops.segment_sum(rows, place, m + 1)[place]
  rows = add(judged.astype(means.dtype))
  judged &= rows > 1
  free = jnp.where(judged, 1 - 1 / jnp.maximum(rows, 1), 0)
  variance = jnp.var(draws, 1) / (num - 1)
  centre = add(jnp.where(judged, means, 0)) / jnp.maximum(rows, 1)
  total = lambda values: jnp.sum(jnp.where(judged, values, 0))
  weight = jnp.sum(free)
  gap = (means - centre) ** 2 - free * variance
  excess = total(gap) / jnp.maximum(weight, 1)
  counts = (weight > 0) & jnp.isfinite(excess**2)
  rate = jnp.maximum(1 / MEMORY, 1 / (old.step.astype(excess.dtype) + 1))
  means = tracking.ema(old[1:], (excess, excess**2), rate)
  return trees.where(counts, Alike(old.step + 1, *means), old)


def differ(alike: Alike) -> jax.Array:
  """Whether rows of one context have normalizers that differ."""
  error = jnp.sqrt(alike.square / (2 * MEMORY))
  far = (alike.excess > LEAST) & (alike.excess > ERRORS * error)
  return (alike.step >= LATE) & far
