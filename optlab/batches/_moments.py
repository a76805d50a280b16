r"""Moments of per-example gradients, by routes that differ in what they cost.

A *route* is a function ``(losses, params, examples, mask) -> Moments`` of one
group of examples; `plain_grads` documents its arguments. Groups are merged
exactly, so that a batch may be passed in microbatches, or spread over devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.batches._independence import check_program
from optlab.batches._losses import Losses
from optlab.batches._losses import checked
from optlab.batches._losses import single


class Moments(NamedTuple):
  """Count, mean and second moments of a group of gradients.

  Attributes:
    count: Scalar, the number n of examples, in the accumulators' dtype.
    units: Scalar, the number of independent draws behind the second moments:
      n, or the number of microbatches where only their means are known.
    value: Scalar, the mean loss.
    grads: Tree of the parameters' shapes, the mean gradient g.
    sum_sq_diff_grads: Tree of the parameters' shapes, ``sum_i (g_i - g)^2``
      per coordinate, or ``None`` where the route doesn't know it.
    sum_sq_diff_norm: Tree of the parameters with a scalar a leaf, ``sum_i
      ||g_i - g||^2`` of that leaf, or ``None``.
    sum_sq_norm: The same of ``sum_i ||g_i||^2``, of routes that know it in
      place of the last: groups are then merged by a sum of scalars.
  """

  count: jax.Array
  units: jax.Array
  value: jax.Array
  grads: base.ArrayTree
  sum_sq_diff_grads: Any = None
  sum_sq_diff_norm: Any = None
  sum_sq_norm: Any = None


Route = Callable[[Losses, base.Params, base.Batch, jax.Array], Moments]
InnerProducts = Callable[
  [Losses, base.Params, base.Updates, base.Batch, jax.Array], jax.Array
]


def merge(a: Moments, b: Moments) -> Moments:
  r"""Moments of the union of two groups of examples (Chan et al. 1983).

  .. math:: M = M_a + M_b + \frac{n_a n_b}{n_a + n_b} (g_b - g_a)^2

  Args:
    a: Moments of a group, which may be empty.
    b: Moments of another, by the same route.

  Returns:
    The moments of both together; exact for groups of unequal size.
  """
  count = a.count + b.count
  share = b.count / jnp.maximum(count, 1.0)
  weight = a.count * share
  delta = jax.tree.map(jnp.subtract, b.grads, a.grads)

  def add(x, y, spread):
    if x is None:
      return None
    return jax.tree.map(lambda x, y, s: x + y + weight * s, x, y, spread)

  squares = jax.tree.map(lambda d: jnp.square(jnp.abs(d)), delta)
  return Moments(
    count=count,
    units=a.units + b.units,
    value=a.value + share * (b.value - a.value),
    grads=jax.tree.map(lambda x, d: x + share * d, a.grads, delta),
    sum_sq_diff_grads=add(a.sum_sq_diff_grads, b.sum_sq_diff_grads, squares),
    sum_sq_diff_norm=add(
      a.sum_sq_diff_norm, b.sum_sq_diff_norm, _sq_norms(delta, weight.dtype)
    ),
    sum_sq_norm=jax.tree.map(jnp.add, a.sum_sq_norm, b.sum_sq_norm),
  )


def _sq_norms(tree, dtype):
  """The squared norm of each leaf."""
  return jax.tree.map(lambda leaf: trees.sq_norm(leaf, dtype), tree)


def merge_over(moments: Moments, axis_name: Any) -> Moments:
  """Merges the groups of all devices along a mapped axis.

  Args:
    moments: Each device's own.
    axis_name: Name of the axis of `jax.shard_map` or `jax.vmap`.

  Returns:
    The moments of all together, on every device.
  """
  total = lambda x: jax.lax.psum(x, axis_name)
  count = total(moments.count)
  share = moments.count / jnp.maximum(count, 1.0)
  grads = total(jax.tree.map(lambda g: share * g, moments.grads))
  delta = jax.tree.map(jnp.subtract, moments.grads, grads)

  def add(x, spread):
    if x is None:
      return None
    return total(jax.tree.map(lambda x, s: x + moments.count * s, x, spread))

  squares = jax.tree.map(lambda d: jnp.square(jnp.abs(d)), delta)
  norm = _sq_norms(delta, count.dtype)
  return Moments(
    count=count,
    units=total(moments.units),
    value=total(share * moments.value),
    grads=grads,
    sum_sq_diff_grads=add(moments.sum_sq_diff_grads, squares),
    sum_sq_diff_norm=add(moments.sum_sq_diff_norm, norm),
    sum_sq_norm=jax.tree.map(total, moments.sum_sq_norm),
  )


def centred(moments: Moments) -> Moments:
  """Fills in ``sum_sq_diff_norm`` where a route knows ``sum_sq_norm``."""
  if moments.sum_sq_norm is None:
    return moments
  count = moments.count

  def leaf(total, grads):
    spread = total - count * trees.sq_norm(grads, count.dtype)
    return jnp.where(spread < 0.0, 0.0, spread)  # Rounding; NaN stays.

  return moments._replace(
    sum_sq_diff_norm=jax.tree.map(leaf, moments.sum_sq_norm, moments.grads)
  )


# Helpers of the routes. Losses are one number an example; a mask is 1 where the
# example counts, and sums are divided by its sum.


def check_route(params: base.Params, mask: jax.Array) -> None:
  """Raises a ``TypeError`` for what a route can't differentiate or sum."""
  checks.check_params('params', params)
  dtype = getattr(mask, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'mask must be a floating array of ones and zeros, shape (n,), got'
      f' {type(mask).__name__} of dtype {dtype}; jnp.ones(n) counts every'
      ' example.'
    )


def _mean_and_pullback(losses, params, examples, mask):
  """Mean loss and gradient by one reverse pass, in the accumulators' dtype."""
  check_route(params, mask)
  wide = mask.dtype
  count = jnp.sum(mask)

  def mean(params):
    values = checked(losses, params, examples, mask).astype(wide)
    values = jnp.where(mask > 0.0, values, 0.0)
    return jnp.sum(values) / jnp.maximum(count, 1.0)

  value, grads = jax.value_and_grad(mean)(params)
  return value, jax.tree.map(lambda g: g.astype(wide_like(g, wide)), grads)


def wide_like(leaf: jax.Array, wide: Any) -> Any:
  """The dtype in which sums of ``leaf`` are kept."""
  return jnp.promote_types(leaf.dtype, wide)


def plain_grads(
  losses: Losses, params: base.Params, examples: base.Batch, mask: jax.Array
) -> Moments:
  """The route of a plain gradient: no variance, for tests that need none.

  Together with inner products it serves `inner_product_test`. Cost: one
  gradient.

  Args:
    losses: ``(params, examples) -> (n,)`` losses.
    params: The parameters.
    examples: Batch of n examples on the leading axes.
    mask: Shape (n,), 1 where an example counts and 0 where it doesn't.

  Returns:
    `Moments` without second moments.

  Raises:
    TypeError: ``mask`` is not a floating array, or a leaf of ``params`` not.
    ValueError: ``losses`` does not give one loss per example.
  """
  value, grads = _mean_and_pullback(losses, params, examples, mask)
  count = jnp.sum(mask)
  return Moments(count, count, value, grads)


def microbatch_means(
  losses: Losses, params: base.Params, examples: base.Batch, mask: jax.Array
) -> Moments:
  r"""The route of microbatch means: the trace of the covariance for nothing.

  K microbatches of :math:`n_k` examples with means :math:`g_k` give

  .. math:: V \approx \frac{1}{K - 1} \sum_k n_k \|g_k - g\|^2,

  which is unbiased, but has the variance of K draws in place of n. Any model;
  needs ``microbatch_size`` at most half of the batch. Cost: one gradient.

  It takes what `plain_grads` takes; its `Moments` are of one unit, with a
  ``sum_sq_diff_norm`` that merging makes.

  Raises:
    TypeError: ``mask`` is not a floating array, or a leaf of ``params`` not.
    ValueError: ``losses`` does not give one loss per example, or `per_example`
      makes fewer than two microbatches.
  """
  value, grads = _mean_and_pullback(losses, params, examples, mask)
  count = jnp.sum(mask)
  units = jnp.minimum(count, 1.0)
  zeros = jax.tree.map(lambda g: jnp.zeros_like(count), grads)
  return Moments(count, units, value, grads, None, zeros)


def vmap_grads(
  losses: Losses, params: base.Params, examples: base.Batch, mask: jax.Array
) -> Moments:
  """The route of per-example gradients: right for every model, and dear.

  It knows the second moment of every coordinate, which
  `coordinate_norm_test` needs. Cost: a `jax.vmap` of `jax.grad`, n times the
  memory of the parameters (pass microbatches to bound it), and on a CPU tens of
  times the time of a plain gradient.

  It takes what `plain_grads` takes; its `Moments` have every central moment.

  Raises:
    TypeError: ``mask`` is not a floating array, or a leaf of ``params`` not.
    ValueError: ``losses`` does not give one loss per example.
  """
  check_route(params, mask)
  check_program(losses, params, examples)
  wide = mask.dtype
  values, grads = jax.vmap(jax.value_and_grad(single(losses)), (None, 0))(
    params, examples
  )
  count = jnp.sum(mask)

  def rows(leaf):
    leaf = leaf.astype(wide_like(leaf, wide))
    return trees.where(mask > 0.0, leaf, jnp.zeros_like(leaf))

  def mean(leaf):
    return jnp.sum(rows(leaf), 0) / jnp.maximum(count, 1.0)

  means = jax.tree.map(mean, grads)

  def spread(leaf, mean):
    rest = rows(leaf.astype(mean.dtype) - mean)
    # The second term is 0 but for the rounding of the mean (Chan et al.).
    excess = jnp.square(jnp.abs(jnp.sum(rest, 0))) / jnp.maximum(count, 1.0)
    return jnp.sum(jnp.square(jnp.abs(rest)), 0) - excess

  squares = jax.tree.map(spread, grads, means)
  norms = jax.tree.map(lambda leaf: jnp.sum(leaf).astype(wide), squares)
  return Moments(count, count, mean(values), means, squares, norms)


def jvp_inner_products(
  losses: Losses,
  params: base.Params,
  grads: base.Updates,
  examples: base.Batch,
  mask: jax.Array,
) -> jax.Array:
  r"""Inner products of per-example gradients with the mean, by one JVP.

  The derivative of the vector of losses along g is the vector of
  :math:`p_i = \langle g_i, g \rangle`: no per-example gradient is formed. Any
  model with forward-mode derivatives. Cost: about 0.6 of a gradient.

  Args:
    losses: ``(params, examples) -> (n,)`` losses.
    params: The parameters.
    grads: The mean gradient g of the whole batch.
    examples: A group of n examples of the batch.
    mask: Shape (n,), 1 where an example counts and 0 where it doesn't.

  Returns:
    Shape (n,), the deviations :math:`p_i - \|g\|^2`, 0 where masked.

  Raises:
    TypeError: ``mask`` is not a floating array, or a leaf of ``params`` not.
    ValueError: ``losses`` does not give one loss per example.
  """
  check_route(params, mask)
  wide = mask.dtype
  # Of complex parameters: the direction of steepest ascent.
  tangent = trees.conjugate(trees.cast_like(grads, params))
  _, products = jax.jvp(
    lambda p: checked(losses, p, examples, mask), (params,), (tangent,)
  )
  deviations = products.astype(wide) - trees.sq_norm(tangent, wide)
  return jnp.where(mask > 0.0, deviations, 0.0)


def vmap_inner_products(
  losses: Losses,
  params: base.Params,
  grads: base.Updates,
  examples: base.Batch,
  mask: jax.Array,
) -> jax.Array:
  r"""Inner products with the mean gradient from per-example gradients.

  For models whose derivative has no forward mode (`jax.custom_vjp`), and where
  the deviations are far below the rounding of :math:`\|g\|^2`. Cost: as
  `vmap_grads`; XLA shares it where both run on the whole batch.

  It takes what `jvp_inner_products` takes, and returns
  :math:`\langle g_i - g, g \rangle`.

  Raises:
    TypeError: ``mask`` is not a floating array, or a leaf of ``params`` not.
    ValueError: ``losses`` does not give one loss per example.
  """
  check_route(params, mask)
  wide = mask.dtype
  check_program(losses, params, examples)
  rows = jax.vmap(jax.grad(single(losses)), (None, 0))(params, examples)
  rows, grads = trees.conjugate(rows), trees.conjugate(grads)

  def product(rows, mean):
    rows = rows.astype(wide_like(rows, wide)) - mean
    return jnp.sum(
      rows.reshape(len(rows), -1) * jnp.conj(mean.reshape(1, -1)), 1
    ).real

  products = jax.tree.leaves(jax.tree.map(product, rows, grads))
  deviations = sum(products, start=jnp.zeros_like(mask))
  return jnp.where(mask > 0.0, deviations, 0.0)
