r"""What keeps a block whose steps are too long for it from ruining the run.

A block is looked at more closely at its first visit, and where its lower
gradient is not finite or several times what it was of late, or its Hessian
stretches its dual variable by more than its step can bear. Then a few
Hessian-vector products give its largest curvature. Where that is above what the
step size can bear, the block's own steps are shorter until a later look finds
less; where its
last steps have also made the lower gradient grow, at the same parameters and
data, the visit is rejected: the block goes back to where its last visit left
it, and takes no part in the hypergradient. So it is where its Hessian turns its
dual variable back, at this visit and on average: its lower level is not convex.

A block whose lower gradient points where there is no curvature has no lower
solution in sight, if any: its lower variable goes on, as the tails of a Huber
loss end somewhere, but the block takes no part in the hypergradient.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import trees
from optlab.multi_block import _sight
from optlab.multi_block import _system

PRODUCTS = 6  # Hessian-vector products of a look.
GROWTH = 4.0  # A gradient above so many times its average is looked at.
MEMORY = 0.9  # Decay of that average.


class Pace(NamedTuple):
  """How fast each block may go; tables of shape ``(num_blocks,)``."""

  scale: jax.Array  # of the block's steps since its last visit, in (0, 1]
  curvature: jax.Array  # the largest of its lower problem, as last measured
  grad_norm: jax.Array  # of its lower gradient, averaged over visits
  bend: jax.Array  # curvature along its dual variable, averaged over visits
  flat: jax.Array  # in [0, 1], how often looks saw no lower solution of late


class Verdict(NamedTuple):
  """What became of the sampled blocks; all of shape ``(sampled,)``."""

  rejected: jax.Array  # bool
  flat: jax.Array  # bool, no lower solution in sight
  pace: Pace


def start(inner: base.ArrayTree) -> Pace:
  """The pace of blocks of which nothing is known."""
  dtype = trees.accumulator_dtype(inner)
  return Pace(
    scale=trees.zeros_rows(inner, (), dtype) + 1,
    curvature=trees.zeros_rows(inner, (), dtype),
    grad_norm=trees.zeros_rows(inner, (), dtype),
    bend=trees.zeros_rows(inner, (), dtype),
    flat=trees.zeros_rows(inner, (), dtype),
  )


def stable_curvature(
  inner_lr: Any, lr_ratio: Any, alpha: Any, fraction: Any
) -> jax.Array:
  r"""The largest curvature that steps of full length can bear.

  The mean square of the error of MSVR on a quadratic contracts iff
  :math:`\tau m L / I` is below
  :math:`2 / ((1 - p) (1 + \alpha) / (1 - \alpha) + p)` at :math:`p = I / m`:
  exact at both ends, and within 1 % in between.
  """
  bound = 2 / ((1 - fraction) * (1 + alpha) / (1 - alpha) + fraction)
  rate = inner_lr * jnp.maximum(lr_ratio, 1.0)
  return jnp.where(rate > 0, bound / jnp.where(rate > 0, rate, 1), jnp.inf)


def shortened(
  curvature: jax.Array, stable: jax.Array, idle: float = 1.0
) -> jax.Array:
  """How long a block's steps may be: half of what it can bear, or all."""
  half = 0.5 * stable / jnp.maximum(curvature, stable)
  return jnp.where(
    curvature > stable, half, jnp.where(curvature > 0, 1.0, idle)
  )


def bent(
  average: jax.Array, along: jax.Array, concave: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The average curvature along a dual variable, and whether it is concave.

  One sample may be concave by chance; to leave it out would be a bias.
  """
  moved = MEMORY * average + (1 - MEMORY) * along.astype(average.dtype)
  average = jnp.where(jnp.isfinite(moved), moved, average)
  return average, concave & (average < 0)


def largest_eigenvalue(matrix: jax.Array) -> jax.Array:
  """The largest magnitude of the eigenvalues of a matrix, from below."""

  def turn(_, vector):
    return matrix @ (vector / jnp.maximum(jnp.linalg.norm(vector), 1e-30))

  start = _spread(jnp.ones(matrix.shape[-1:], matrix.dtype))
  return jnp.linalg.norm(jax.lax.fori_loop(0, PRODUCTS, turn, start))


def _is_due(pace: Pace, along: jax.Array, step: jax.Array) -> jax.Array:
  """Which blocks are looked at again though nothing is wrong with them."""
  # One step in eight, at irregular times: visits may be periodic.
  turn = (step.astype(jnp.uint32) * jnp.uint32(2654435769)) >> 26
  refresh = (pace.scale < 1) | ~(along > 0)
  return (pace.flat > 0.05) | ((turn < 8) & refresh) | (turn == 0)


def look(
  problem: _system.Problem,
  params: base.Params,
  stable: jax.Array,
  step: jax.Array,
  rows: Any,
  now: base.ArrayTree,
  slope: base.ArrayTree,
  stretch: jax.Array,
  along: jax.Array,
  batch: Any,
  finite: jax.Array,
  use: jax.Array,
  idle: float,
) -> Verdict:
  """Looks at blocks that are new or suspicious, and judges them.

  Args:
    problem: The objectives of a block, with the damping of now.
    params: The current point.
    stable: From `stable_curvature`.
    step: The steps so far.
    rows: The sampled rows, with ``inner``, ``visited`` and ``pace``.
    now: Where their steps since have led them.
    slope: Samples of the lower gradient there.
    stretch: A bound on their curvature there, from below.
    along: Their curvature along the dual variable there.
    batch: The data of the samples.
    finite: bool array of shape ``(sampled,)``: whether all samples are finite.
    use: bool array of shape ``(sampled,)``: which rows count.
    idle: For `shortened`.
  """
  dtype = rows.pace.scale.dtype
  stable = jnp.asarray(stable, dtype)
  norm = jax.vmap(trees.norm)(slope).astype(dtype)
  new = rows.visited < 0
  finite &= jnp.isfinite(norm)
  suspect = use & (
    new
    | ~finite
    | (norm > GROWTH * rows.pace.grad_norm)
    | (rows.pace.scale * stretch > stable)
    | _is_due(rows.pace, along, step)
  )

  def measure(_):
    before, curvature, lost = jax.vmap(
      lambda *args: _measure(problem.lower, params, *args)
    )(rows.inner, now, slope, norm, batch)  # fmt: skip
    seen = before, curvature, lost
    return jnp.asarray(True), *(part.astype(dtype) for part in seen)

  # A loop of at most one turn: a cond is always taken under vmap.
  unknown = jnp.full_like(norm, jnp.inf), rows.pace.curvature
  carry = ~jnp.any(suspect), *unknown, jnp.zeros_like(norm)
  _, before, measured, lost = jax.lax.while_loop(
    lambda c: ~c[0], measure, carry
  )
  if problem.curvature is not None:
    # Steps of the dual variable feel this one.
    measured = jnp.maximum(measured, stretch.astype(dtype))
  elif problem.damping is not None:
    measured += jnp.asarray(problem.damping, dtype)
  known = suspect & jnp.isfinite(measured)
  lost, flat = _sight.judge(rows.pace.flat, lost * known, new, known)
  measured = jnp.maximum(measured, 0.25 * rows.pace.curvature)
  curvature = jnp.where(known, measured, rows.pace.curvature)
  scale = rows.pace.scale
  # Data which is not finite says nothing of a block that stands where it did.
  still = norm <= GROWTH * before
  overflown = suspect & ~finite & jnp.isfinite(before) & ~still
  # Finite curvature at the last visit has not shown what was met on the way.
  steeper = jnp.maximum(curvature, 2 * stable * _sight.inverse(scale))
  curvature = jnp.where(overflown & jnp.isfinite(stable), steeper, curvature)
  too_long = scale * curvature > stable
  # By more than rounding: a block that has not moved has not grown.
  longer = norm > 1.05 * before
  grown = ~new & (overflown | (suspect & too_long & longer))
  bend, concave = bent(rows.pace.bend, along, along < -1e-3 * stretch)
  average = MEMORY * rows.pace.grad_norm + (1 - MEMORY) * norm
  pace = Pace(
    scale=shortened(curvature, stable, idle).astype(dtype),
    curvature=curvature,
    grad_norm=jnp.where(
      jnp.isfinite(norm), jnp.where(new, norm, average), rows.pace.grad_norm
    ),
    bend=bend,
    flat=lost,
  )
  # A block that never moves ruins nothing.
  moves = use & jnp.isfinite(stable)
  rejected = grown | (moves & concave)
  return Verdict(rejected, moves & flat & ~rejected, pace)


def _measure(lower, params, stored, now, slope, norm, batch):
  """The gradient's norm at the last visit, the largest curvature seen.

  And whether there is a lower solution in sight.
  """

  def grad(inner):
    return jax.grad(lower, argnums=1)(params, inner, batch)

  last = grad(stored)
  before = trees.norm(last)
  grown = ~(norm <= before)
  point = trees.where(grown, stored, now)
  there = trees.where(grown, last, slope)
  start = jax.tree.map(_spread, there)
  _, product = jax.linearize(grad, point)

  def turn(_, carry):
    vector, length = carry
    vector = _scaled(vector, length, point)
    vector = product(vector)
    return vector, trees.norm(vector)

  _, curvature = jax.lax.fori_loop(
    0, PRODUCTS, turn, (start, trees.norm(start))
  )
  # Between the two points, if what they differ by is not rounding.
  minus = lambda a, b: trees.norm(jax.tree.map(jnp.subtract, a, b))
  bend, way = minus(slope, last), minus(now, stored)
  eps = max(jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(stored))
  noise = 100 * eps * curvature * (trees.norm(stored) + trees.norm(now))
  secant = bend / jnp.where(way > 0, way, 1)
  sure = grown & (way > 0) & (bend > noise) & jnp.isfinite(secant)
  curvature = jnp.maximum(curvature, jnp.where(sure, secant, 0))
  return before, curvature, _sight.is_lost(product, there, point, curvature)


def _spread(leaf):
  """A gradient with something in every direction, of a size of its own."""
  wave = jnp.cos(1.0 + jnp.arange(leaf.size, dtype=jnp.float32))
  top = jnp.max(jnp.abs(leaf), initial=0)
  size = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
  clean = jnp.where(jnp.isfinite(leaf), leaf, 0) / size.astype(leaf.dtype)
  return clean + wave.reshape(leaf.shape).astype(leaf.dtype)


def _scaled(vector, length, like):
  return trees.cast_like(trees.scaled(_sight.inverse(length), vector), like)
