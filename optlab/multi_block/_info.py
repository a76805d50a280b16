"""What multi-block methods report of their blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import tables
from optlab import trees


class BSVRBInfo(NamedTuple):
  """Diagnostics of `bsvrb` and `rsvrb`; blocks are named by their index.

  A block is rejected where its samples are not finite, or where its steps have
  made its lower gradient grow. It is slowed where its curvature is more than
  steps of full length can bear. It is not ok where its Hessian has negative
  curvature along its dual variable, or none where its lower gradient points,
  for which the formula is wrong; where that is so on average over its visits,
  it is rejected too. Nor is it where its steps are too short: ``dual_residual``
  is large there as well; nor where it is rejected in more than half of its
  visits, and so left out. A step of which no block is left is not ok, nor a run
  whose blocks and lower gradients grow by a factor a step, or, from 50 visits a
  block on, whose blocks are half of themselves behind their solutions and stay
  there: x moves too fast for them. No block is -1.
  """

  rejected: jax.Array  # shape (), int32, blocks left out of the last step
  total_rejected: jax.Array  # shape (), int32
  slowed: jax.Array  # shape (), int32, blocks whose steps are shorter now
  worst_block: jax.Array  # shape (), int32, rejected most often
  worst_block_rejected: jax.Array  # shape (), int32, how often
  stiffest_block: jax.Array  # shape (), int32, of the largest curvature
  largest_curvature: jax.Array  # shape ()
  lower_lag: jax.Array  # shape (), how far y* is from y at least, of late
  dual_residual: jax.Array  # shape (), the largest norm of g_yy v - f_y
  unsolved_block: jax.Array  # shape (), int32, whose it was
  ok: jax.Array  # shape (), bool, all sampled blocks of the last step are
  total_not_ok: jax.Array  # shape (), int32, visits of blocks that were not
  not_ok_block: jax.Array  # shape (), int32, the last of them
  block_rejected: jax.Array  # shape (num_blocks,), int32


MANY = 4  # Rejections that may be chance.


def start(inner: Any) -> BSVRBInfo:
  """Nothing to report yet."""
  # Arrays of their own: a state that is donated may not name one twice.
  count = lambda value: jnp.full((), value, jnp.int32)
  return BSVRBInfo(
    rejected=count(0),
    total_rejected=count(0),
    slowed=count(0),
    worst_block=count(-1),
    worst_block_rejected=count(0),
    stiffest_block=count(-1),
    largest_curvature=jnp.zeros((), trees.accumulator_dtype(inner)),
    lower_lag=jnp.zeros((), trees.accumulator_dtype(inner)),
    dual_residual=jnp.zeros((), trees.accumulator_dtype(inner)),
    unsolved_block=count(-1),
    ok=jnp.ones((), bool),
    total_not_ok=count(0),
    not_ok_block=count(-1),
    block_rejected=trees.zeros_rows(inner, (), jnp.int32),
  )


def after(
  info: BSVRBInfo,
  sampled: Any,
  blocks: jax.Array,
  away: Any = False,
  visits: Any = 0,
  lower_lag: Any = 0.0,
) -> BSVRBInfo:
  """The report after a step; it looks at the sampled blocks alone.

  Args:
    info: The report before.
    sampled: What the step sampled.
    blocks: Their numbers.
    away: Whether all of them run away, or are far behind x.
    visits: How often each was sampled so far, on average.
    lower_lag: How far they are from their solutions.
  """
  bad = sampled.use & ~sampled.ok
  rejected = jnp.sum(bad).astype(jnp.int32)
  rows = tables.gather_rows(info.block_rejected, blocks) + bad
  count, worst = _top(rows, bad, blocks)
  # Its own count has grown, if it was the worst before.
  worse = count > info.worst_block_rejected
  curvature, stiffest = _top(sampled.pace.curvature, sampled.use, blocks)
  stiffer = curvature > info.largest_curvature
  left, unsolved = _top(sampled.left, sampled.ok, blocks)
  slowed = (sampled.pace.scale < 1) * 1 - (sampled.rows.pace.scale < 1) * 1
  written = sampled.use & (
    jnp.any(sampled.ok) | sampled.rejected | sampled.flat
  )
  not_ok = sampled.concave | sampled.flat | sampled.behind
  # The problem that is solved is then one without it.
  not_ok |= bad & (rows > jnp.maximum(0.5 * visits, MANY))
  last, last_block = _top(not_ok.astype(jnp.int32), sampled.use, blocks)
  # A run that is lost is so for all of them.
  not_ok |= sampled.use & away
  new = BSVRBInfo(
    rejected=rejected,
    total_rejected=info.total_rejected + rejected,
    slowed=info.slowed + jnp.sum(jnp.where(written, slowed, 0)),
    worst_block=jnp.where(worse, worst, info.worst_block),
    worst_block_rejected=jnp.where(worse, count, info.worst_block_rejected),
    stiffest_block=jnp.where(stiffer, stiffest, info.stiffest_block),
    largest_curvature=jnp.where(stiffer, curvature, info.largest_curvature),
    lower_lag=lower_lag,
    dual_residual=jnp.where(jnp.any(sampled.ok), left, info.dual_residual),
    unsolved_block=jnp.where(
      jnp.any(sampled.ok), unsolved, info.unsolved_block
    ),
    # A step of which nothing is left is no good either.
    ok=(last <= 0)
    & ~jnp.asarray(away)
    & (jnp.any(sampled.ok) | ~jnp.any(sampled.use)),
    total_not_ok=info.total_not_ok + jnp.sum(not_ok),
    not_ok_block=jnp.where(last > 0, last_block, info.not_ok_block),
    block_rejected=tables.scatter_rows(
      info.block_rejected, rows, blocks, sampled.use
    ),
  )
  return trees.cast_like(new, info)


def _top(values, use, blocks):
  """The largest of the values in use, and whose it is."""
  masked = jnp.where(use, values, jnp.full_like(values, -1))
  index = jnp.argmax(masked)
  return masked[index], jnp.asarray(blocks)[index].astype(jnp.int32)
