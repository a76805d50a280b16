"""Whether the last particles of tempering are draws of the model, and of all.

Repeats that all miss a mode agree. What tells are fresh draws of the noise and
a walk of the particles, which leaves draws of the model as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch
from optlab.unnormalized import _unseen
from optlab.unnormalized import _walk

FRESH = 32  # Draws for each particle.


def judged(
  found: Any,
  log_density: Callable[[Any], jax.Array],
  noise: _noise_batch.Noise,
  key: jax.Array,
  flat: jax.Array,
  discrete: bool,
) -> Any:
  """The result on all of the noise; refused where particles do not stand still.

  They must, as draws of the model would under steps that leave it alone.
  """
  dtype = found.value.dtype
  layout = _walk.layout(jax.eval_shape(lambda: noise.sample(key, 1)))
  rows = jax.vmap(layout.unravel)(flat)
  log_p = log_density(rows)
  rounding = _likelihood.rounding(log_p.dtype, log_p)
  model_dtype, log_p = log_p.dtype, log_p.astype(dtype)
  log_w = log_p - noise.log_prob(rows).astype(dtype)
  missed, share = unmet(log_density, noise, key, found.value, log_w)
  value, second = (
    log_z + jnp.log(share) for log_z in (found.value, found.second)
  )
  fresh = noise.sample(key, 64)
  floats = flat.astype(log_p.dtype)
  whole = _walk.whole(_walk.flatten(fresh, floats.dtype))
  reservoir = _walk.Reservoir(
    value, floats, log_w, log_p, jnp.min(floats, 0), jnp.max(floats, 0), whole
  )
  walked = _walk.walk(log_density, noise, key, reservoir, layout, 50)
  kicked = _unseen.kick(
    log_density, noise, jax.random.fold_in(key, 4), reservoir, layout, value,
    jnp.max(log_w) + rounding, 10_000,
  )  # fmt: skip
  # Particles share ancestors: a fifth of them are their own.
  own = jnp.asarray(flat.shape[0] / 5, dtype)
  change, change_error = _walk.change_of(value, log_w, walked.log_w, own)
  ok = found.ok & (missed <= 50 / log_w.size)
  # Copies of a few draws are no sample of the noise within the support.
  ok &= share * log_w.size >= 8 * found.runs.share.size
  ok &= (walked.infinite == 0) & ~walked.escaped
  ok &= _walk.alone(log_density, floats, log_p, layout, model_dtype)
  ok &= ~_walk.repeated(noise, jax.random.fold_in(key, 5))
  if not discrete:
    ok &= ~jnp.any(whole)  # MALA does not move bits.
  ok &= jnp.abs(change) <= 3 * change_error + 1e-3
  # Of draws of the model few come to outweigh all; they all do if it is no
  # density.
  beyond = jnp.sum(walked.log_w > jnp.max(log_w) + 0.7)
  ok &= beyond <= 5 + own / 8
  ok &= (rounding < 0.5) & (kicked.share <= _unseen.MOST)
  # A thin tail that the particles have not reached in full; mass that less than
  # one of them stands for; digits; and the share of the draws.
  told = (jnp.abs(change) > change_error) & (change_error < 0.5)
  errors = (
    found.standard_error,
    jnp.where(told, change, 0),
    1 / own,
    rounding,
    # A tail that they stand for, and too little.
    jnp.where(jnp.abs(kicked.gap) > 2 * kicked.gap_error, kicked.gap, 0),
    jnp.minimum(kicked.share, 1),
    jnp.sqrt((1 / share - 1) / (FRESH * log_w.size)),
  )
  standard_error = jnp.sqrt(sum(error**2 for error in errors))
  ok &= jnp.abs(kicked.gap) <= 0.1 + 3 * jnp.hypot(
    found.standard_error, kicked.gap_error
  )
  return found._replace(
    value=value,
    second=second,
    rejected=found.rejected + walked.infinite,
    standard_error=standard_error,
    ok=ok & jnp.isfinite(value),
  )


def unmet(log_density, noise, key, value, log_w):
  """The share of mass where fresh draws outweigh each of the particles.

  Were the particles draws of the model, it would be about one over their
  number; a mode that they lost, or never met, is more. NaN is infinite. The
  second figure is the share of draws where the model has density; over these
  ``value`` is log Z.
  """

  def add(carry, key):
    rows = noise.sample(key, log_w.size)
    log_p = log_density(rows).astype(value.dtype)
    log_q = noise.log_prob(rows).astype(value.dtype)
    gap = jnp.where(log_p == -jnp.inf, -jnp.inf, log_p - log_q)
    over = jnp.where(gap > jnp.max(log_w), jnp.exp(gap - value), 0)
    over = jnp.where(jnp.isnan(gap), jnp.inf, over)
    figures = jnp.mean(over), jnp.mean(gap > -jnp.inf), jnp.sum(over > 0)
    return jax.tree.map(jnp.add, carry, figures), None

  keys = jax.random.split(jax.random.fold_in(key, 1), FRESH)
  zero = jnp.zeros((), value.dtype)
  start = zero, zero, jnp.zeros((), jnp.int32)
  (total, inside, count), _ = jax.lax.scan(add, start, keys)
  # One draw or two may fall on the top of a narrow mode by chance.
  total = jnp.where((count > 2) | (total == jnp.inf), total, 0)
  return total / jnp.maximum(inside, 1e-30), inside / FRESH
