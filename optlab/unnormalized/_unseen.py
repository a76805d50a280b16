"""How much mass the model has where it outweighs every draw of the noise.

Weights tell nothing of where no draw has been. Rows of the model, kicked by
steps of all lengths, are noise of another kind, and their weights do.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy import special

from optlab.unnormalized import _noise_batch
from optlab.unnormalized import _walk

CENTRES = 500  # Rows that are kicked, each as often.
MOST = 0.1  # The largest share that counts as an error; more is refused.


def share(
  log_density: Callable[[Any], jax.Array],
  noise: _noise_batch.Noise,
  key: jax.Array,
  reservoir: _walk.Reservoir,
  layout: _walk.Layout,
  value: jax.Array,
  largest: jax.Array,
  num: int,
) -> jax.Array:
  """The share of the mass beyond the largest weight, by importance sampling.

  From a mixture of Cauchy distributions around rows of the model, as wide as
  these: in a few columns it meets modes many spreads away.

  Args:
    log_density: The model, ``rows -> [rows]``.
    noise: The noise.
    key: PRNG key.
    reservoir: Rows that are the model's where the noise has been.
    layout: Of a row.
    value: log Z by the noise.
    largest: The largest log weight of its draws.
    num: How many to draw, at least.

  Returns:
    A scalar, infinite where the density is. It is zero where rows are discrete
    in a column, or all one: kicks leave them.
  """
  every = max(reservoir.rows.shape[0] // CENTRES, 1)
  centres = reservoir.rows[::every]
  spread = jnp.std(reservoir.rows, 0)
  fixed = jnp.any((spread == 0) | reservoir.whole | layout.discrete)
  spread = jnp.where(spread > 0, spread, 1)

  def add(total, key):
    there, log_r = _kicked(key, centres, spread)
    rows = jax.vmap(layout.unravel)(there)
    log_p = log_density(rows).astype(value.dtype)
    log_p = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p)
    log_q = noise.log_prob(rows).astype(value.dtype)
    log_q = jnp.where(jnp.isnan(log_q), -jnp.inf, log_q)
    beyond = (log_p > -jnp.inf) & (log_p - log_q > largest)
    mass = jnp.where(beyond, jnp.exp(log_p - log_r - value), 0)
    return total + jnp.mean(mass), None

  times = -(-num // centres.shape[0])
  total, _ = jax.lax.scan(
    add, jnp.zeros((), value.dtype), jax.random.split(key, times)
  )
  return jnp.where(fixed, 0, total / times)


def _kicked(key, centres, spread):
  """A draw around each centre, and the log density of all of them together."""
  num, size = centres.shape
  kick_key, divide_key = jax.random.split(key)
  kicks = jax.random.normal(kick_key, centres.shape, centres.dtype)
  divisor = jax.random.normal(divide_key, (num, 1), centres.dtype)
  there = centres + spread * kicks / divisor
  middle = jnp.mean(centres, 0)
  ends, starts = ((rows - middle) / spread for rows in (there, centres))
  # A product, because a sum over few columns is slow; far out it loses digits
  # that do not count.
  squares = jnp.sum(ends**2, 1)[:, None] + jnp.sum(starts**2, 1)
  squares -= 2 * jnp.matmul(ends, starts.T, precision='highest')
  squares = jnp.maximum(squares, 0)
  power = (size + 1) / 2
  constant = math.lgamma(power) - power * math.log(math.pi) - math.log(num)
  log_r = special.logsumexp(-power * jnp.log1p(squares), 1) + constant
  return there, log_r - jnp.sum(jnp.log(spread))
