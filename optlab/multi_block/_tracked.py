"""What `rsvrb` tracks of each block: samples, recursion, hypergradient."""

import math
from typing import NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp

from optlab import tables
from optlab import tracking
from optlab import trees
from optlab.multi_block import _dual
from optlab.multi_block import _sight
from optlab.multi_block import _system


class Tracked(NamedTuple):
  """What `rsvrb` tracks of each block; lower and upper variables are flat."""

  inner_grad: jax.Array  # shape (num_blocks, dim), of d_y g
  upper_x: jax.Array  # shape (num_blocks, params), of d_x f
  upper_y: jax.Array  # shape (num_blocks, dim), of d_y f
  cross: jax.Array  # shape (num_blocks, dim, params), of d_yx g
  hessian: jax.Array  # shape (num_blocks, dim, dim), of d_yy g


def start(params, inner):
  """Trackers of zeros."""
  dtype = trees.accumulator_dtype(params, inner)
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  dim = sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(inner))
  shapes = (dim,), (size,), (dim,), (dim, size), (dim, dim)
  return Tracked(*(trees.zeros_rows(inner, s, dtype) for s in shapes))


def sample(problem, params, table, batch):
  """Fresh samples of all tracked quantities for each block, and values."""
  rows = tables.gather_rows(table, batch.blocks)
  flat_params, unravel_params = flatten_util.ravel_pytree(params)

  def block(inner, upper_batch, lower_batch):
    flat, unravel = flatten_util.ravel_pytree(inner)

    def upper_flat(x, y):
      value, aux = problem.upper(unravel_params(x), unravel(y), upper_batch)
      return value, (value, aux)

    def lower_grad(x, y):
      def value(y):
        return problem.lower(unravel_params(x), unravel(y), lower_batch)

      return jax.grad(value)(y)

    (upper_x, upper_y), (value, aux) = jax.grad(
      upper_flat, (0, 1), has_aux=True
    )(flat_params, flat)
    # The lower variables are few and the parameters many: reverse mode.
    cross = jax.jacrev(lower_grad, 0)(flat_params, flat)
    hessian = _system.matrix(
      problem, params, inner, lower_batch,
      lambda: jax.jacfwd(lower_grad, 1)(flat_params, flat),
    )  # fmt: skip
    grad = lower_grad(flat_params, flat)
    return Tracked(grad, upper_x, upper_y, cross, hessian), value, aux

  return jax.vmap(block)(rows, batch.upper, batch.lower)


def first_pass(tracked, problem, params, inner, first):
  """Trackers that are set to their samples."""
  samples, _, _ = sample(problem, params, inner, first)
  use = tables.distinct_blocks(first.blocks, tracked.hessian.shape[0])
  use &= tables.finite_rows(samples)
  return tables.scatter_rows(tracked, samples, first.blocks, use)


def follow(tracked, now, before, blocks, ok, rate, scale):
  """Trackers after their step; rows that were not sampled forget, too."""
  index = jnp.where(ok, blocks, tracked.hessian.shape[0])

  def leaf(table, now, before):
    fresh = scale * (now - (1 - rate) * before)
    fresh = jnp.where(trees.align(ok, fresh), fresh, 0)
    decayed = ((1 - rate) * table).astype(table.dtype)
    return decayed.at[index].add(
      fresh.astype(table.dtype), mode='drop',
      out_sharding=tables.layout(table),
    )  # fmt: skip

  return jax.tree.map(leaf, tracked, now, before)


def follow_hypergrad(state, tracked, outer, rate, floor, lost):
  """The estimate after its step; at the first, the hypergradient itself."""
  num_blocks = tracked.hessian.shape[0]
  use = tables.distinct_blocks(outer, num_blocks)
  use &= ~_sight.counts(tables.gather_rows(lost, outer))
  rows = [tables.gather_rows(t, outer) for t in (tracked, state.tracked)]
  # Both points in one batch: see project_floor on solves that run at once.
  both = jax.vmap(_hypergradient, (0, None, None))(
    jax.tree.map(lambda *leaf: jnp.stack(leaf), *rows), use, floor
  )
  unravel = flatten_util.ravel_pytree(state.hypergrad)[1]
  new, old = unravel(both[0]), unravel(both[1])
  recursive = tracking.storm(state.hypergrad, new, old, rate)
  return trees.where(state.step == 0, new, recursive)


def _hypergradient(rows, use, floor):
  hessian = _dual.project_floor(rows.hessian, floor, use)
  factor = jnp.linalg.cholesky(hessian)
  dual = jax.vmap(lambda f, b: jax.scipy.linalg.cho_solve((f, True), b))(
    factor, rows.upper_y
  )
  parts = rows.upper_x - jnp.einsum('idx,id->ix', rows.cross, dual)
  parts = jnp.where(use[:, None], parts, 0)
  return jnp.sum(parts, 0) / jnp.maximum(jnp.sum(use), 1)


def move(inner, inner_grad, length):
  """The lower variables after a step along their trackers, which are flat."""
  unravel = flatten_util.ravel_pytree(
    jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), inner)
  )[1]
  return jax.tree.map(
    lambda y, s: (y - trees.align(length, s).astype(s.dtype) * s).astype(
      y.dtype
    ),
    inner,
    jax.vmap(unravel)(inner_grad),
  )
