"""How much mass the model has where it outweighs every draw of the noise.

Weights tell nothing of where no draw has been. Rows of the model, kicked by
steps of all lengths, are noise of another kind, and their weights do.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import special

from optlab.unnormalized import _noise_batch
from optlab.unnormalized import _walk

CENTRES = 500  # Rows that are kicked, each as often.
MOST = 0.1  # The largest share that counts as an error; more is refused.


class Kicked(NamedTuple):
  """What kicks tell.

  Attributes:
    share: The share of the mass beyond the largest weight; infinite where the
      density is.
    gap: By how much log Z is larger by these draws; zero where few of them
      carry it.
    gap_error: The standard error of the gap, infinite where it is zero so.
  """

  share: jax.Array
  gap: jax.Array
  gap_error: jax.Array


def kick(
  log_density: Callable[[Any], jax.Array],
  noise: _noise_batch.Noise,
  key: jax.Array,
  reservoir: _walk.Reservoir,
  layout: _walk.Layout,
  value: jax.Array,
  largest: jax.Array,
  num: int,
) -> Kicked:
  """Estimates log Z anew, and the mass beyond the largest weight.

  By a mixture of Cauchy distributions around rows of the model, as wide as
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
    What they tell: nothing where rows are discrete in a column, or all one,
    because kicks leave them. In many columns few kicks meet the model, and they
    tell of little but a density that is far off.
  """
  every = max(reservoir.rows.shape[0] // CENTRES, 1)
  centres = reservoir.rows[::every]
  spread = jnp.std(reservoir.rows, 0)
  fixed = jnp.any((spread == 0) | reservoir.whole | layout.discrete)
  spread = jnp.where(spread > 0, spread, 1)

  def add(sums, key):
    there, log_r = _kicked(key, centres, spread)
    rows = jax.vmap(layout.unravel)(there)
    log_p = log_density(rows).astype(value.dtype)
    log_p = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p)
    log_q = noise.log_prob(rows).astype(value.dtype)
    log_q = jnp.where(jnp.isnan(log_q), -jnp.inf, log_q)
    beyond = (log_p > -jnp.inf) & (log_p - log_q > largest)
    log_w = log_p - log_r - value
    mass = jnp.where(beyond, jnp.exp(log_w), 0)
    # Squares of what is far too large do not overflow.
    weights = jnp.exp(jnp.minimum(log_w, 30))
    new = (mass, (mass > 0).astype(mass.dtype), weights, weights**2)
    return tuple(a + jnp.sum(b) for a, b in zip(sums, new, strict=True)), None

  times = -(-num // centres.shape[0])
  num = times * centres.shape[0]
  start = (jnp.zeros((), value.dtype),) * 4
  (mass, hits, total, squares), _ = jax.lax.scan(
    add, start, jax.random.split(key, times)
  )
  tiny = jnp.finfo(value.dtype).tiny
  ess = total**2 / jnp.maximum(squares, tiny)
  told = ~fixed & (ess >= 400)
  # One draw or two may fall on the top of a mode by chance.
  few = fixed | ((hits < 3) & (mass < jnp.inf))
  return Kicked(
    share=jnp.where(few, 0, mass / num),
    gap=jnp.where(told, jnp.log(jnp.maximum(total / num, tiny)), 0),
    gap_error=jnp.where(
      told, jnp.sqrt(1 / jnp.maximum(ess, 1) - 1 / num), jnp.inf
    ),
  )


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
