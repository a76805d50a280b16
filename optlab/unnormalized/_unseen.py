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

from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch
from optlab.unnormalized import _pareto
from optlab.unnormalized import _walk

CENTRES = 500  # Rows that are kicked, each as often.
MOST = 0.1  # The largest share that counts as an error; more is refused.


class Kicked(NamedTuple):
  """What kicks tell.

  Attributes:
    share: The share of the mass beyond the largest weight, and its standard
      error; infinite where the density is.
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
  these: in a few columns it meets modes many spreads away. A third of it is a
  Gaussian with the moments of all rows, which meets the model in many columns.

  Args:
    log_density: The model, ``rows -> [rows]``.
    noise: The noise.
    key: PRNG key.
    reservoir: Rows that are the model's where the noise has been.
    layout: Of a row.
    value: log Z by the noise.
    largest: The largest log weight of its draws.
    num: How many to kick, at least.

  Returns:
    What they tell: nothing where rows are all discrete, or all one, because
    kicks leave them; of some discrete columns, the share alone.
  """
  every = max(reservoir.rows.shape[0] // CENTRES, 1)
  discrete = reservoir.whole | layout.discrete
  around = _around(jax.random.fold_in(key, 1), reservoir.rows, every, discrete)
  fixed = jnp.any((around.spread == 0) & ~discrete) | jnp.all(discrete)
  around = around._replace(
    spread=jnp.where(discrete | (around.spread == 0), 1, around.spread)
  )

  def add(unused, inputs):
    there, log_r = _kicked(around, *inputs)
    rows = jax.vmap(layout.unravel)(there)
    log_p = log_density(rows).astype(value.dtype)
    log_p = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p)
    log_q = noise.log_prob(rows).astype(value.dtype)
    log_q = jnp.where(jnp.isnan(log_q), -jnp.inf, log_q)
    beyond = (log_p > -jnp.inf) & (log_p - log_q > largest)
    return unused, (log_p - log_r - value, beyond)

  times = 3 * -(-num // (2 * around.centres.shape[0]))
  whole = (jnp.arange(times) % 3 == 2) & ~jnp.any(discrete)
  _, found = jax.lax.scan(add, (), (jax.random.split(key, times), whole))
  log_w, beyond = (leaf.ravel() for leaf in found)
  mass = jnp.where(beyond, jnp.exp(log_w), 0)
  # And one standard error: a few kicks that met a mode may have met too little.
  share = jnp.mean(mass) + jnp.sqrt(jnp.sum(mass**2)) / mass.size
  endless = _endless(
    jax.random.fold_in(key, 2), around, reservoir.log_p[::every],
    lambda there: log_density(jax.vmap(layout.unravel)(there)),
  )  # fmt: skip
  weights = _likelihood.importance_weights(log_w)
  # Where bits that no row had are not met, mass is missing.
  told = ~fixed & ~jnp.any(discrete) & (weights.ess >= 400)
  # One draw or two may fall on the top of a mode by chance.
  few = fixed | ((jnp.sum(beyond) < 3) & (share < jnp.inf))
  gap = weights.log_scale + jnp.log(weights.total / log_w.size)
  # A tail that is not met makes log Z look smaller, never larger.
  told &= (gap > 0) | (_pareto.k_hat(log_w) < 0.7)
  error = jnp.sqrt(1 / jnp.maximum(weights.ess, 1) - 1 / log_w.size)
  return Kicked(
    share=jnp.where(endless, jnp.inf, jnp.where(few, 0, share)),
    gap=jnp.where(told, gap, 0),
    gap_error=jnp.where(told, error, jnp.inf),
  )


class _Around(NamedTuple):
  """What is known of rows of the model."""

  centres: jax.Array  # shape [num, size], some of them
  mean: jax.Array  # shape [size]
  spread: jax.Array  # shape [size]
  factor: jax.Array  # shape [size, size], of a covariance in spreads
  discrete: jax.Array  # bool [size], columns that no kick moves
  same: jax.Array  # bool [num, num], centres that are alike in these


def _around(key, rows, every, discrete):
  centres, mean, spread = rows[::every], jnp.mean(rows, 0), jnp.std(rows, 0)
  white = (rows - mean) / jnp.where(spread > 0, spread, 1)
  products = jnp.matmul(white.T, white, precision='highest') / rows.shape[0]
  one = jnp.eye(mean.size, dtype=rows.dtype)
  # Where columns do not hang together what few rows say of that is noise.
  products = jnp.where(_apart(products, rows.shape[0]), one, products)
  # A little wider.
  factor = jnp.linalg.cholesky(1.1 * products + 1e-3 * one)
  code = jnp.where(discrete, jax.random.normal(key, mean.shape, rows.dtype), 0)
  codes = jnp.sum(code * centres, 1)
  return _Around(
    centres, mean, spread, factor, discrete, codes[:, None] == codes
  )


def _apart(products, num):
  """Whether a covariance would be shrunk by half and more to that of spheres.

  By the rule of Chen, Wiesel, Eldar, Hero, IEEE Transactions on Signal
  Processing 2010.
  """
  size = products.shape[0]
  squares, square = jnp.sum(products**2), jnp.trace(products) ** 2
  above = (1 - 2 / size) * squares + square
  return 2 * above > (num + 1 - 2 / size) * (squares - square / size)


def _endless(key, around, here, log_density):
  """Whether the density hardly falls along a column, a million spreads out.

  Its mass between t and 2 t is then no less than that where the row was.
  """
  place_key, far_key = jax.random.split(key)
  centres, discrete = around.centres, around.discrete
  logits = jnp.where(discrete, -jnp.inf, jnp.zeros(centres.shape))
  place = jax.random.categorical(place_key, logits)
  uniform = jax.random.uniform(far_key, place.shape, centres.dtype, 5.0, 6.0)
  axis = jnp.arange(discrete.size) == place[:, None]
  move = jnp.where(axis, 10 ** uniform[:, None] * around.spread, 0)
  rises = []
  for there in (centres + move, centres - move):
    log_p = log_density(there).astype(here.dtype)
    rises.append(log_p + math.log(10) * uniform - here)
  # NaN is none.
  count = jnp.sum(jnp.stack(rises) > math.log(0.01))
  return (count >= 3) & ~jnp.all(discrete)


def _kicked(around, key, whole):
  """A draw around each centre, or around all; the log density of both kinds."""
  centres, mean, spread, factor, discrete, same = around
  shape, dtype = centres.shape, centres.dtype
  kick_key, divide_key = jax.random.split(key)
  kicks = jax.random.normal(kick_key, shape, dtype)
  divisor = jax.random.normal(divide_key, (shape[0], 1), dtype)
  starts = jnp.where(discrete, 0, (centres - mean) / spread)
  far = jnp.matmul(kicks, factor.T, precision='highest')
  ends = jnp.where(whole, far, starts + jnp.where(discrete, 0, kicks / divisor))
  there = jnp.where(discrete, centres, mean + spread * ends)
  # A product, because a sum over few columns is slow; far out it loses digits
  # that do not count.
  squares = jnp.sum(ends**2, 1)[:, None] + jnp.sum(starts**2, 1)
  squares -= 2 * jnp.matmul(ends, starts.T, precision='highest')
  size = jnp.sum(~discrete).astype(dtype)
  power = (size + 1) / 2
  log_cauchy = jnp.where(
    same, -power * jnp.log1p(jnp.maximum(squares, 0)), -jnp.inf
  )
  log_cauchy = special.logsumexp(log_cauchy, 1) - jnp.log(float(shape[0]))
  log_cauchy += special.gammaln(power) - power * jnp.log(jnp.pi)
  solved = jax.scipy.linalg.solve_triangular(factor, ends.T, lower=True)
  log_gauss = -jnp.sum(solved**2, 0) / 2 - size / 2 * jnp.log(2 * jnp.pi)
  log_gauss -= jnp.sum(jnp.log(jnp.diagonal(factor)))
  third = jnp.log(jnp.asarray(3, dtype))
  both = jnp.logaddexp(log_cauchy + jnp.log(2.0) - third, log_gauss - third)
  log_r = jnp.where(jnp.any(discrete), log_cauchy, both)
  return there, log_r - jnp.sum(jnp.log(spread))
