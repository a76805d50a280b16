r"""Moments of per-example gradients, and how those of groups are merged.

Groups are merged exactly, so that a batch may be passed in microbatches, or
spread over devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import _varying
from optlab import base
from optlab import checks
from optlab import trees
from optlab.batches._losses import Losses


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


#: ``(losses, params, examples, mask) -> Moments`` of one group of examples.
Route = Callable[[Losses, base.Params, base.Batch, jax.Array], Moments]
#: ``(losses, params, grads, examples, mask) -> [examples]``, with that mean.
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
    least = count * trees.sq_norm(grads, count.dtype)
    spread = jnp.where(
      total < least, 0.0, total - least
    )  # Rounding; NaN stays.
    # Factors of the gradients whose squares underflow, though the product's
    # does not.
    return jnp.where(total < 0.5 * least, jnp.nan, spread)

  return moments._replace(
    sum_sq_diff_norm=jax.tree.map(leaf, moments.sum_sq_norm, moments.grads)
  )


# Helpers of the routes. Losses are one number an example; a mask is 1 where the
# example counts, and sums are divided by its sum.


def check_route(
  params: base.Params, mask: jax.Array, examples: base.Batch
) -> None:
  """Raises for what a route can't differentiate or sum."""
  checks.check_params('params', params)
  dtype = getattr(mask, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'mask must be a floating array of ones and zeros, shape (n,), got'
      f' {type(mask).__name__} of dtype {dtype}; jnp.ones(n) counts every'
      ' example.'
    )
  # There jax sums the gradients of all devices, and squares are of the sums.
  over = set().union(*map(_varying.varies_over, jax.tree.leaves(examples)))
  for path, leaf in jax.tree.leaves_with_path(params):
    if missing := over - _varying.varies_over(leaf):
      where, axis = jax.tree_util.keystr(path), sorted(missing, key=str)[0]
      raise ValueError(
        f'params{where} are alike on all devices of the mapped axis {axis!r},'
        f' and examples are not: pass axis_name={axis!r} to per_example, which'
        ' merges what the devices find; or, for the moments of each device by'
        f' itself, jax.lax.pcast(params, {axis!r}, to="varying").'
      )


def wide_like(leaf: jax.Array, wide: Any) -> Any:
  """The dtype in which sums of ``leaf`` are kept."""
  return jnp.promote_types(leaf.dtype, wide)
