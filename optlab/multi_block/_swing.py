r"""Whether all blocks swing with x, ever farther: x moves too fast for them.

A block is about :math:`v_i^\top \nabla_y g_i / \|H_i v_i\|` from its solution,
along the way that :math:`f_i` feels. Where x runs away from blocks that come
after it, this grows, and stays as large as they are; what noise leaves of it
does not grow.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optlab.multi_block import _points

SHORT, MEMORY = 10, 100  # Steps, and visits of a block, of the means.
LARGE, GROWTH = 0.5, 2.0  # Of a lag, beside the blocks and the least it was.


def start(dtype: Any) -> jax.Array:
  """Means of the lag: signed, its size, all of it; of the blocks; the least."""
  return jnp.zeros(5, dtype)


def follow(
  old: jax.Array,
  step: jax.Array,
  share: jax.Array,
  toward: jax.Array,
  bent: jax.Array,
  length: jax.Array,
  use: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The means after a step, and whether the blocks swing ever farther.

  Args:
    old: The means before.
    step: The steps before.
    share: The part of the blocks that a step looks at.
    toward: How far each sampled block is from its solution, with a sign.
    bent: The norms of the products with their dual variables.
    length: The norms of the blocks.
    use: Those that count.
  """
  total = lambda numbers: jnp.sum(jnp.where(use, numbers, 0))
  root = lambda numbers: jnp.sqrt(total(numbers * numbers))
  # Zero where a square has left the range of numbers.
  finite = lambda number: jnp.where(jnp.isfinite(number), number, 0)
  scale = root(bent)
  lag = finite(total(toward * bent) / jnp.where(scale > 0, scale, 1))
  first = 1 / (step.astype(old.dtype) + 1)
  blend = lambda old, new, w: old + jnp.maximum(w, first) * (new - old)
  near, far, spread, size, least = old
  near = blend(near, lag, 1 / SHORT)
  far = blend(far, jnp.abs(near), share / MEMORY)
  spread = blend(spread, jnp.abs(lag), share / MEMORY)
  size = blend(size, finite(root(length)), share / MEMORY)
  # From then on it has no reason to grow.
  late = share * step >= _points.VISITS
  least = jnp.where(late, jnp.minimum(least, spread), spread)
  grows = late & (spread > LARGE * size) & (spread > GROWTH * least)
  new = jnp.stack([near, far, spread, size, least])
  return new.astype(old.dtype), grows
