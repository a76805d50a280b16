r"""Whether all blocks swing with x: it moves too fast for them.

A block is about :math:`v_i^\top \nabla_y g_i / \|H_i v_i\|` from its solution,
along the way that :math:`f_i` feels. Where x runs away from blocks that come
after it, this is as large as they are, and x pushes their solutions on by as
much a step as they go. What noise of theirs leaves of it x has no part in. A
smaller one is that of blocks on their way, or of a cycle: in a cycle they go as
far as they are long, again and again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SHORT = 10  # Steps of the mean of a lag with a sign.
MEMORY = 50, 100  # Visits of a block, of the means of lags and of lengths.
VISITS = 50  # Of a block on average, after which its steps must have led it.
ENOUGH = 200  # The same, after which few are still on their way.
EARLY = 10  # The same, after which a lag has no reason to grow by far.
LARGE, GROWTH = 0.5, 2.0  # Of a lag, beside the blocks and the least it was.
SMALL, LEAP = 0.15, 10.0  # The same of one that grows by far.
# The way of blocks that turn, their least lag, and both at once, beside them.
WAY, LITTLE, OFTEN = 1.5, 0.05, 0.2
STEADY = 0.4  # Of their lags, beside the same without a sign: less is noise.


class Gap(NamedTuple):
  """How far the sampled blocks are from their solutions."""

  length: jax.Array  # shape (sampled,), of the blocks
  use: jax.Array  # shape (sampled,), bool, those that count
  toward: jax.Array  # shape (sampled,), the lag, with a sign
  bent: jax.Array  # shape (sampled,), norms of the products H_i v_i
  pushed: jax.Array  # shape (), what the last step of x did to all v_i' g_y
  changed: jax.Array  # shape (sampled,), what this and those of y did to each


def start(dtype: Any) -> jax.Array:
  """Before the first step; see `follow`."""
  return jnp.zeros(7, dtype)


def follow(
  old: jax.Array, step: jax.Array, share: jax.Array, gap: Gap
) -> tuple[jax.Array, jax.Array]:
  """The means after a step, and whether the blocks swing.

  Args:
    old: The means before.
    step: The steps before.
    share: The part of the blocks that a step looks at.
    gap: How far they are.
  """
  total = lambda numbers: jnp.sum(jnp.where(gap.use, numbers, 0))
  root = lambda numbers: jnp.sqrt(total(numbers * numbers))
  # Zero where a square has left the range of numbers.
  finite = lambda number: jnp.where(jnp.isfinite(number), number, 0)
  scale = root(gap.bent)
  part = lambda number: finite(number / jnp.where(scale > 0, scale, 1))
  first = 1 / (step.astype(old.dtype) + 1)
  blend = lambda old, new, w: old + jnp.maximum(w, first) * (new - old)
  long = lambda old, new, visits=MEMORY[0]: blend(old, new, share / visits)
  near, far, spread, size, least, push, move = old
  lag = part(total(gap.toward * gap.bent))
  near = blend(near, lag, 1 / SHORT)
  far, spread = long(far, jnp.abs(near)), long(spread, jnp.abs(lag))
  size = long(size, finite(root(gap.length)), MEMORY[1])
  push = long(push, jnp.abs(part(gap.pushed)))
  move = long(move, jnp.abs(part(total(gap.changed) - gap.pushed)))
  visits = share * step
  late = visits >= VISITS
  # The least since each of the two.
  starts = (visits < EARLY) | (late & (visits - share < VISITS))
  least = jnp.where(starts, spread, jnp.minimum(least, spread))
  large = spread > LARGE * size
  leaps = (large | (late & (spread > SMALL * size))) & (spread > LEAP * least)
  grows = leaps | (late & large & (spread > GROWTH * least))
  way = MEMORY[1] / share * move  # Of a block, in so many visits.
  turns = (visits >= ENOUGH) & (way > WAY * size) & (far > LITTLE * size)
  turns &= (far * way > OFTEN * size * size) & (far > STEADY * spread)
  swings = (late & (far > LARGE * size)) | turns
  swings &= (far > 0.35 * spread) & (push > 0.5 * move)
  new = jnp.stack([near, far, spread, size, least, push, move])
  return new.astype(old.dtype), grows | swings
