"""Whether a run grows by a factor a step."""

from typing import Any

import jax
import jax.numpy as jnp

LEAP, RISE = 3.0, 14.0  # Logarithms, of one step's growth and of all.


def start(dtype: Any) -> jax.Array:
  """Before the first step: mean, last logarithm, whether there is one."""
  return jnp.zeros(3, dtype)


def follow(
  old: jax.Array, step: jax.Array, sizes: Any
) -> tuple[jax.Array, jax.Array]:
  r"""How sizes grow, and whether they run away: by about a million, steadily.

  The mean of a step's growth over the last part of the run, times the steps. It
  is :math:`4 p / 3` for what grows as :math:`t^p`, as far as one step alone may
  lead, and without end for what grows by a factor a step.

  Args:
    old: The mean and the logarithm of the sizes, before.
    step: The steps before.
    sizes: Two that grow together where y runs away: norms of g_y and y.
  """
  first, second = (size.astype(old.dtype) for size in sizes)
  seen = (first > 0) & (second > 0) & jnp.isfinite(first + second)
  log = lambda size: 0.5 * jnp.log(jnp.where(seen, size, 1))
  count = step.astype(old.dtype)
  now = jnp.where(seen, log(first) + log(second), old[1])
  # What was zero has no growth yet.
  known = seen & (old[2] > 0)
  # What leaps up and comes down again by as much has not grown.
  leap = jnp.where(known, jnp.minimum(now - old[1], LEAP), 0)
  mean = old[0] + 4 / jnp.maximum(count, 4) * (leap - old[0])
  new = jnp.stack([mean, now, jnp.maximum(old[2], seen)])
  return new.astype(old.dtype), mean * count > RISE
