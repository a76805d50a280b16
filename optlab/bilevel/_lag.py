r"""Whether the lower variable follows x, by what a step has at hand.

For any z, :math:`z^\top g_y` is about :math:`z^\top g_{yy} (y - y^*)`, and so
y* is at least :math:`|z^\top g_y| / \|g_{yy} z\|` away, along the way that f
feels. Beside how far y moves a step this gives the steps that it has to go yet.
A mean of the signed lag over a few steps is what noise leaves of it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optlab import base
from optlab import trees
from optlab.bilevel import _dual

SHORT, MEMORY = 10, 100  # Steps of the means.
EARLY = 50  # Steps after which y must not be half of itself away.
LEAST = 0.1  # A shorter lag, beside y or what it was at most, does not matter.
LARGE = 0.5  # A longer one, beside y, does.


def start(dtype: Any) -> jax.Array:
  """Before the first step; see `BilevelState`."""
  return jnp.zeros(7, dtype)


def beside(
  dual: base.Params, slope: base.Params, after: Any, old: base.Params
) -> tuple[tuple, tuple]:
  """What is to be looked at beside a step of z, for `trees.norms`.

  Norms of g_y and y; products of z with g_y, of the move of y with itself, and
  what the lower step tells of constraints.

  Args:
    dual: The linear-system variable z.
    slope: The lower gradient.
    after: The `Step` of y.
    old: The lower variable before.
  """
  moved = trees.wide(after.inner)
  moved = jax.tree.map(jnp.subtract, moved, trees.wide(old))
  return (slope, after.inner), (
    (dual, slope),
    (moved, moved),
    *((tree, tree) for tree in after.found),
  )


def follow(
  pace: jax.Array,
  step: jax.Array,
  along: jax.Array,
  scale: jax.Array,
  moved: jax.Array,
  size: jax.Array,
  *,
  every: int = 1,
  calm: Any = 1,
) -> tuple[jax.Array, jax.Array]:
  r"""The means after a step, and whether y is behind.

  It is where it has more steps to go than it has taken: what has converged, or
  follows x at some distance, has fewer by far. Or where the lag is half of y,
  which stands out from noise, or grows: x and y swing or run away together. It
  must also matter: at the end of a decaying rate any lag takes for ever.

  Args:
    pace: The means before.
    step: The steps before.
    along: :math:`z^\top g_y`.
    scale: The norm of :math:`g_{yy} z`, or more.
    moved: The square of how far y has moved.
    size: The norm of y.
    every: Steps from one move of y to the next.
    calm: Steps for which the noise of g_y lasts.
  """
  # Zero where a square has left the range of numbers.
  finite = lambda number: jnp.where(jnp.isfinite(number), number, 0)
  lag = finite(along / jnp.where(scale > 0, scale, 1))
  count = step.astype(pace.dtype)
  first = 1 / (count + 1)
  blend = lambda old, new, w: old + jnp.maximum(w, first) * (new - old)
  near, far, spread, move, peak, wide, early = pace
  # Together the two forget no later than y's mean does.
  calm = jnp.clip(calm, 1, 0.5 * MEMORY / SHORT)
  near = blend(near, lag, 1 / (SHORT * calm))
  # Long after, over the last part of the run: a cycle may take long.
  slow = jnp.minimum(1 / MEMORY, 5 * first)
  far = blend(far, jnp.abs(near), calm * slow)
  spread = blend(spread, jnp.abs(lag), slow)
  wide = blend(wide, size, slow)  # y may pass through zero.
  moving = jnp.minimum(1 / max(MEMORY, 2 * every), 10 * first)
  move = blend(move, jnp.sqrt(finite(moved)), moving)
  peak = jnp.maximum(peak, far)
  late, soon = step >= _dual.PATIENCE, step >= EARLY
  early = jnp.where(late, early, spread)
  size = jnp.maximum(size, wide)
  slower = (far > count * move) & (far > LEAST * size) & (far > 0.5 * spread)
  swings = (far > LARGE * wide) & (far > 0.8 * spread)
  grows = (spread > LARGE * wide) & (spread > 10 * early)
  # A smaller one that has long stayed what it was is a cycle.
  stays = (far > 1.5 * LEAST * wide) & (far > 0.3 * peak)
  stays &= (far > 0.65 * spread) & (step >= 2 * _dual.PATIENCE)
  behind = ((slower | swings) & (far > LEAST * peak)) | grows | stays
  # Before, one that is plain, and no transient that is half over.
  plain = slower & (far > LARGE * size) & (far > 0.8 * spread) & soon
  new = jnp.stack([near, far, spread, move, peak, wide, early]).astype(
    pace.dtype
  )
  return new, (behind & late) | plain
