"""The sampled blocks of a multi-block step, evaluated at two points.

What `bsvrb` does with the rows of its tables: gather them, bring them up to the
current and to the previous point, take the samples there, and leave out what is
not finite.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import flatten_util
import jax.numpy as jnp

from optlab import base
from optlab import tables
from optlab import trees
from optlab.multi_block import _blocks
from optlab.multi_block import _clock
from optlab.multi_block import _dual
from optlab.multi_block import _guard
from optlab.multi_block import _rows
from optlab.multi_block import _sight
from optlab.multi_block import _swing
from optlab.multi_block import _system


def sample(
  problem: _system.Problem,
  dual: _dual.Dual,
  params: base.Params,
  state: Any,
  batch: Any,
  stable: Callable[[jax.Array], jax.Array] | None,
  idle: float = 1.0,
) -> _rows.Sampled:
  """Evaluates the sampled blocks now and before, leaving out the bad ones."""
  _blocks.check_batch(batch, problem.num_blocks)
  use = tables.distinct_blocks(batch.blocks, problem.num_blocks)
  table = _rows.Rows(*(getattr(state, name) for name in _rows.Rows._fields))
  rows = tables.gather_rows(table, batch.blocks)
  elapsed = rows.pace.scale * _clock.elapsed(state.clock, rows.touched)
  inner = _clock.advance(rows.inner, rows.inner_grad, elapsed)
  just_visited = (rows.visited == state.step) & (rows.visited > 0)
  held = dual.held(rows.dual, elapsed, just_visited)
  points = params, state.previous_params
  problem = problem.at_step(state.step)

  def evaluate(inner, held, batch, use):
    return _points(problem, dual, points, inner, held, batch, use)

  data = batch.upper, batch.lower
  blockwise, total, (stretch, along, left, *gap, aux) = evaluate(
    inner, held, data, use
  )
  (value, _), inner_grad, dual_sample = blockwise
  finite = tables.finite_rows(blockwise, 1)
  # One pass over what is as large as params: a difference of finite numbers
  # that overflows only leads to the second look.
  apart = _difference(*total)
  verdict = _guard.Verdict(*(jnp.zeros_like(use),) * 2, rows.pace)
  if stable is not None:
    verdict = _guard.look(
      problem, params, stable(jnp.sum(use)), state.step, rows,
      _first(inner), _first(blockwise[1]), stretch, along, batch.lower,
      finite, use, idle,
    )  # fmt: skip
  flat = verdict.flat & finite
  keep = use & ~verdict.rejected & ~flat
  bad = jnp.any(use & ~(finite & keep)) | ~trees.all_finite(apart)

  norms = [jax.vmap(trees.norm)(t) for t in (_first(inner_grad), rows.inner)]
  ok, total = _without_bad(evaluate, inner, held, data, keep, bad, total)
  return _rows.Sampled(
    rows=rows,
    inner=inner,
    held=held,
    clock=state.clock[0],
    use=use,
    ok=ok,
    left=left,
    concave=use & (along < -1e-3 * stretch),
    behind=use & ~flat & _is_behind(problem, state, rows, norms, gap[0], use),
    gap=_swing.Gap(norms[1], use & finite, *gap),
    flat=flat,
    rejected=verdict.rejected,
    pace=verdict.pace,
    sizes=tuple(jnp.sum(jnp.where(use & finite, norm, 0)) for norm in norms),
    value=value[0],
    aux=aux,
    inner_grad=inner_grad,
    dual=dual_sample,
    hypergrad=total,
  )


def _is_behind(problem, state, rows, norms, toward, use):
  """Which blocks have farther to go than in all steps at their pace.

  And than a tenth of their length, once they were visited often.
  """
  time = rows.pace.scale * jnp.sum(state.clock[0])
  visits = state.step * jnp.sum(use) / problem.num_blocks
  slope, length = norms
  toward = jnp.abs(toward)
  far = (toward > time * slope) & (toward > 0.1 * length)
  # Where nothing moves, dual variables don't either.
  return (far | (time == 0)) & (visits >= _swing.VISITS)


def _without_bad(evaluate, inner, held, data, keep, bad, total):
  """Which blocks are fine, and the sum over them.

  The sum over all has taken in what is not finite. Add up anew, one block at a
  time. A loop and not a cond, which under vmap would always be taken.
  """

  def add(carry):
    index, ok, total = carry

    def one(tree, axis=0):
      return jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1, axis), tree
      )

    mask = one(keep)
    alone, part, _ = evaluate(one(inner, 1), one(held, 1), one(data), mask)
    fine = mask[0] & tables.finite_rows(alone, 1)[0] & trees.all_finite(part)
    total = trees.where(fine, jax.tree.map(jnp.add, total, part), total)
    return index + 1, ok.at[index].set(fine), total

  sampled = keep.shape[0]
  start = jnp.where(bad, 0, sampled).astype(jnp.int32)
  empty = jax.tree.map(jnp.zeros_like, total)
  carry = start, keep & ~bad, trees.where(bad, empty, total)
  _, ok, total = jax.lax.while_loop(lambda c: c[0] < sampled, add, carry)
  return ok, total


def _points(problem, dual, points, inner, held, batch, use):
  """Samples of all blocks at both points, and the sums of hypergradients.

  The points are spelled out where the params come in: under a vmap over them,
  products of two columns take the place of products with a vector, for which
  XLA's CPU backend is several times slower, and the params are copied.
  """
  upper_batch, lower_batch = batch
  first, second = (
    jax.tree.map(lambda leaf, k=k: leaf[k], inner) for k in (0, 1)
  )
  inners = first, second

  def total_upper(params, inner):
    each = jax.vmap(problem.upper, (None, 0, 0))
    value, aux = each(params, inner, upper_batch)
    return jnp.sum(jnp.where(use, value, 0)), (value, aux)

  def total_lower(params, inner):
    value = jax.vmap(problem.lower, (None, 0, 0))(params, inner, lower_batch)
    return jnp.sum(value), value

  value, aux, upper_x, upper_y = [], [], [], []
  for x, y in zip(points, inners, strict=True):
    (_, (block_values, block_aux)), grads = jax.value_and_grad(
      total_upper, argnums=(0, 1), has_aux=True
    )(x, y)
    value.append(block_values)
    aux.append(block_aux)
    upper_x.append(grads[0])
    upper_y.append(grads[1])
  # At once, so that the factorizations of `track_hessians` are one batch.
  directions = jax.tree.map(
    lambda v, y: jnp.where(trees.align(use[None], v), v, 0).astype(y.dtype),
    jax.vmap(dual.direction)(held, _stack(*upper_y)),
    inner,
  )

  slopes = jax.grad(total_lower, argnums=(0, 1), has_aux=True)
  lower_y, samples, total, stretch = [], [], [], ()
  lower_values = []
  for k, (x, y) in enumerate(zip(points, inners, strict=True)):
    # The gradient, pushed forward along the dual variables, gives
    # Hessian-vector and cross products in one sweep. Other blocks' lower
    # variables don't enter.
    (_, slope), (cross, product), lower_value = jax.jvp(
      lambda y, x=x: slopes(x, y),
      (y,),
      (jax.tree.map(lambda leaf, k=k: leaf[k], directions),),
      has_aux=True,
    )
    lower_values.append(lower_value)
    product = _system.products(
      problem, x, y, lower_batch,
      jax.tree.map(lambda leaf, k=k: leaf[k], directions), product,
    )  # fmt: skip
    hessian = functools.partial(_hessians, problem, x, y, lower_batch)
    lower_y.append(slope)
    if not stretch:
      pushed = trees.inner_product(_difference(*points), cross)
      stretch = (
        *_stretch(product, _first(directions), upper_y[0], slope),
        pushed,
      )
    samples.append(dual.sample(product, upper_y[k], hessian))
    total.append(
      jax.tree.map(
        lambda upper_x, cross: (
          upper_x.astype(trees.accumulator_dtype(upper_x)) - cross
        ),
        upper_x[k],
        cross,
      )
    )
  changed = jax.vmap(trees.inner_product)(
    _first(directions), _difference(*lower_y)
  )
  # The lower values as well: a logarithm has a slope where it has no value.
  values = jnp.stack(value), jnp.stack(lower_values)
  blockwise = values, _stack(*lower_y), _stack(*samples)
  return blockwise, tuple(total), (*stretch, changed, aux[0])


def _hessians(problem, x, y, batch):
  """The matrix of each block."""

  def block(y, batch):
    flat, unravel = flatten_util.ravel_pytree(y)
    value = lambda flat: problem.lower(x, unravel(flat), batch)
    return _system.matrix(
      problem, x, y, batch, lambda: jax.hessian(value)(flat)
    )

  return jax.vmap(block)(y, batch)


def _stretch(products, directions, upper_grads, slopes):
  """By how much the Hessian of each block stretches its dual variable.

  And its curvature along it: no lower level that is convex turns it back. And
  the norm of what the dual variable leaves of the upper gradient, and how far
  the lower solution is at least, with its sign, and the norm of the product.
  """
  norms = jax.vmap(trees.norm)
  length, bent = norms(directions), norms(products)
  along = jax.vmap(trees.inner_product)(directions, products)
  scale = _sight.inverse(length)
  # Plain squares: it is to be read, and decides nothing.
  left = jax.vmap(lambda tree: trees.sq_norm(tree, length.dtype))(
    jax.tree.map(jnp.subtract, products, upper_grads)
  )
  pull = jax.vmap(trees.inner_product)(directions, slopes)
  toward = pull * _sight.inverse(bent)
  return bent * scale, along * scale * scale, jnp.sqrt(left), toward, bent


def _difference(tree, other):
  return jax.tree.map(jnp.subtract, tree, other)


def _first(tree):
  """What belongs to the current point."""
  return jax.tree.map(lambda leaf: leaf[0], tree)


def _stack(*trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
