r"""Routes: how the moments of a group of gradients are had, and at what cost.

A *route* is a function ``(losses, params, examples, mask) -> Moments`` of one
group of examples; `plain_grads` documents its arguments.
"""

import jax
import jax.numpy as jnp

from optlab import base
from optlab import trees
from optlab.batches import _along
from optlab.batches._independence import check_program
from optlab.batches._losses import Losses
from optlab.batches._losses import checked
from optlab.batches._losses import single
from optlab.batches._moments import Moments
from optlab.batches._moments import check_route
from optlab.batches._moments import wide_like


def _mean_and_pullback(losses, params, examples, mask):
  """Mean loss and gradient by one reverse pass, in the accumulators' dtype."""
  check_route(params, mask, examples)
  wide = mask.dtype
  count = jnp.sum(mask)

  def mean(params):
    values = checked(losses, params, examples, mask).astype(wide)
    values = jnp.where(mask > 0.0, values, 0.0)
    return jnp.sum(values) / jnp.maximum(count, 1.0)

  value, grads = jax.value_and_grad(mean)(params)
  return value, jax.tree.map(lambda g: g.astype(wide_like(g, wide)), grads)


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


def _by_example(derivative, closed, losses, params, examples):
  """A derivative of each loss, which lie as the program has its examples."""
  loss, along = single(losses), None
  if _along.pins(closed):
    loss, along = _along.one_by_one(loss, params, examples)
  mapped = jax.vmap(derivative(loss), (None, 0), spmd_axis_name=along)
  return mapped(params, examples)


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
  check_route(params, mask, examples)
  closed = check_program(losses, params, examples)
  wide = mask.dtype
  values, grads = _by_example(
    jax.value_and_grad, closed, losses, params, examples
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
  check_route(params, mask, examples)
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
  check_route(params, mask, examples)
  wide = mask.dtype
  closed = check_program(losses, params, examples)
  rows = _by_example(jax.grad, closed, losses, params, examples)
  rows, grads = trees.conjugate(rows), trees.conjugate(grads)

  def product(rows, mean):
    rows = rows.astype(wide_like(rows, wide)) - mean
    return jnp.sum(
      rows.reshape(len(rows), -1) * jnp.conj(mean.reshape(1, -1)), 1
    ).real

  products = jax.tree.leaves(jax.tree.map(product, rows, grads))
  deviations = sum(products, start=jnp.zeros_like(mask))
  return jnp.where(mask > 0.0, deviations, 0.0)
