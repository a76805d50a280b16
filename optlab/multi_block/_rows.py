"""The rows of the tables of `bsvrb` that a step samples, follows and writes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import tables
from optlab import tracking
from optlab import trees
from optlab.multi_block import _dual
from optlab.multi_block import _guard


class Rows(NamedTuple):
  """The rows of the tables that one step sampled."""

  touched: jax.Array
  visited: jax.Array
  inner: base.ArrayTree
  inner_grad: base.ArrayTree
  dual: Any
  pace: _guard.Pace


class Sampled(NamedTuple):
  """What one step sampled; points are stacked on a leading axis of two."""

  rows: Rows
  inner: base.ArrayTree  # at both points
  held: Any  # at both points
  clock: jax.Array  # shape (2,), now
  use: jax.Array  # shape (sampled,), those that count
  ok: jax.Array  # shape (sampled,), those of them that are not rejected
  left: jax.Array  # shape (sampled,), what their dual variables leave unsolved
  concave: jax.Array  # shape (sampled,), those with negative curvature
  behind: jax.Array  # shape (sampled,), those whose steps are too short
  gap: Any  # how far they are from their solutions, for `_swing.follow`
  flat: jax.Array  # shape (sampled,), those without a solution in sight
  rejected: jax.Array  # shape (sampled,), not for their data
  pace: _guard.Pace
  sizes: Any  # norms of their lower gradients and variables, summed
  value: jax.Array  # shape (sampled,)
  aux: Any  # of the upper objectives, leading axis sampled
  inner_grad: base.ArrayTree  # samples at both points
  dual: Any  # samples at both points
  hypergrad: tuple[base.Updates, base.Updates]  # sums over those, a point each


def follow(
  dual: _dual.Dual,
  sampled: Sampled,
  alpha: float | jax.Array,
  gamma: float | jax.Array,
  *,
  first_visit: bool = False,
) -> Rows:
  """The sampled rows after the step of their trackers."""
  first = first_visit | (sampled.rows.visited < 0) | sampled.flat

  def step(tracker, samples):
    def leaf(old, sample):
      sample = sample.astype(old.dtype)
      new = tracking.msvr(old, sample[0], sample[1], alpha, gamma)
      return jnp.where(trees.align(first, new), sample[0], new)

    return jax.tree.map(leaf, tracker, samples)

  rows = sampled.rows
  return Rows(
    touched=jnp.broadcast_to(sampled.clock, rows.touched.shape),
    visited=rows.visited,
    inner=jax.tree.map(lambda leaf: leaf[0], sampled.inner),
    inner_grad=step(rows.inner_grad, sampled.inner_grad),
    dual=dual.update(
      rows.dual,
      sampled.held,
      lambda tracker: step(tracker, sampled.dual),
      sampled.ok,
    ),
    pace=sampled.pace,
  )


def write(
  state: Any,
  sampled: Sampled,
  rows: Rows,
  blocks: jax.Array,
  visited: int | jax.Array,
) -> Any:
  """The state with the rows in its tables, those that are ok as visited.

  A rejected block stands where its last visit left it, its trackers as they
  were; where a whole step is rejected for its data, nothing is written. A block
  without a solution in sight goes on, but forgets its dual variable: its next
  visit is as its first.
  """
  # What is written depends on what was read, here as elsewhere: else the write
  # could come first, and the table would have to be copied.
  rows = rows._replace(visited=jnp.maximum(rows.visited, visited))
  old = sampled.rows
  stands = old._replace(
    touched=rows.touched,
    pace=rows.pace._replace(grad_norm=old.pace.grad_norm),
  )
  rows = trees.where(sampled.ok | sampled.flat, rows, stands)
  forget = lambda leaf: jnp.where(trees.align(sampled.flat, leaf), 0, leaf)
  rows = rows._replace(
    visited=jnp.where(sampled.flat, -1, rows.visited),
    dual=jax.tree.map(forget, rows.dual),
  )
  use = sampled.use & (jnp.any(sampled.ok) | sampled.rejected | sampled.flat)
  table = Rows(*(getattr(state, name) for name in Rows._fields))
  table = tables.scatter_rows(table, rows, blocks, use)
  return state._replace(**table._asdict())
