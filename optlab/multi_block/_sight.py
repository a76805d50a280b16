"""Whether the lower level of a block has a solution in sight."""

from typing import Any

import jax
import jax.numpy as jnp

from optlab import base
from optlab import trees

PRODUCTS = 6  # Hessian-vector products of a look.
FAR = 1e4  # What is so many times farther than y is long is not in sight.
MEMORY = 0.8  # Decay of what was seen before.


def judge(
  average: jax.Array, lost: jax.Array, new: jax.Array, looked: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """How often of late no solution was in sight, and whether none is now.

  One sample may lack curvature by chance; to leave it out would be a bias.
  """
  moved = MEMORY * average + (1 - MEMORY) * lost
  moved = jnp.where(new, lost, moved)
  average = jnp.where(looked, moved, average).astype(average.dtype)
  return average, (lost == 1) & counts(average)


def counts(average: jax.Array) -> jax.Array:
  """Whether that is often enough to leave a block out."""
  return average > 0.905


def is_lost(
  product: Any, slope: base.ArrayTree, inner: base.ArrayTree, curvature: Any
) -> jax.Array:
  r"""One if curvature can't stop a descent anywhere near, zero if it can.

  And 0.9 where there is neither slope nor curvature, and so nothing to judge.

  Conjugate gradients on :math:`d_{yy} g\, d = -d_y g`: where the slope has a
  part without curvature, one of their steps is as long as rounding allows.

  Args:
    product: ``direction -> direction``, with the Hessian of the lower level.
    slope: The lower gradient.
    inner: The lower variable.
    curvature: The largest curvature as far as it is known.
  """
  eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(inner))
  norm = trees.norm(slope)
  start = trees.cast_like(slope, trees.zeros_accumulator(slope))
  start = trees.scaled(inverse(norm), start)

  def turn(_, carry):
    residual, direction, square, longest, steepest = carry
    image = trees.cast_like(product(trees.cast_like(direction, inner)), start)
    length, stretch, along = trees.norms(
      direction, image, products=[(direction, image)]
    )
    steepest = jnp.maximum(steepest, stretch * inverse(length))
    least = eps * steepest * length**2
    # A direction of negative curvature is for others to judge.
    go = (along >= -least) & (square > eps**2)
    divisor = jnp.maximum(along, least)
    step = square * inverse(divisor)
    far = jnp.where(divisor > 0, step * length, jnp.inf)
    residual = trees.scale_add(-step, image, residual)
    new = jnp.where(go, trees.norm(residual) ** 2, 0)
    direction = trees.scale_add(new * inverse(square), direction, residual)
    longest = jnp.where(go, jnp.maximum(longest, far), longest)
    return residual, direction, new, longest, steepest

  zero = jnp.zeros_like(norm)
  carry = start, start, zero + 1, zero, curvature.astype(norm.dtype)
  *_, longest, steepest = jax.lax.fori_loop(0, PRODUCTS, turn, carry)
  natural = trees.norm(inner) + norm * inverse(steepest)
  far = (steepest == 0) | (longest * norm > FAR * natural)
  lost = far & (norm > 0) & jnp.isfinite(norm)
  return jnp.where(lost, 1.0, jnp.where((steepest > 0) | (norm > 0), 0.0, 0.9))


def inverse(number: jax.Array) -> jax.Array:
  """One over it, or zero where it is not positive."""
  return jnp.where(number > 0, 1 / jnp.where(number > 0, number, 1), 0)
