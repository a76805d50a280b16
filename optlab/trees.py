"""Arithmetic on pytrees of mixed dtypes, in float32 or wider."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optlab import base
from optlab._reductions import accumulator_dtype
from optlab._reductions import all_finite
from optlab._reductions import dot
from optlab._reductions import inner_product
from optlab._reductions import is_finite
from optlab._reductions import is_nonzero
from optlab._reductions import is_split
from optlab._reductions import largest
from optlab._reductions import leaf_dot
from optlab._reductions import norm
from optlab._reductions import norms
from optlab._reductions import real_dtype
from optlab._reductions import scaled_norm
from optlab._reductions import sq_norm
from optlab._reductions import wide


def at_step(value: base.ScalarOrSchedule, step: jax.Array) -> Any:
  """A number, or a schedule's value at a step."""
  return value(step) if callable(value) else value


def cast_like(tree: Any, like: Any) -> Any:
  """Casts each leaf to the dtype of the leaf of ``like``, or that dtype."""
  return jax.tree.map(
    lambda leaf, to: cast(leaf, getattr(to, 'dtype', to)), tree, like
  )


def cast(leaf: Any, dtype: Any) -> jax.Array:
  """An array of a dtype; PRNG keys, which can't be cast, as they are."""
  leaf = jnp.asarray(leaf)
  return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def zeros_accumulator(tree: Any) -> Any:
  """Zeros laid out like ``tree`` over devices, in float32 or wider.

  Args:
    tree: Arrays, or `jax.ShapeDtypeStruct` in their place.

  Returns:
    A tree of arrays.
  """
  return jax.tree.map(
    lambda leaf: jnp.zeros_like(leaf, dtype=accumulator_dtype(leaf)), tree
  )


def zeros_rows(table: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """Zeros of a shape for each row of a block table, split over devices as it.

  Args:
    table: Pytree of arrays with one leading axis of blocks.
    shape: The shape of a row.
    dtype: The dtype of the zeros.

  Returns:
    Shape ``(blocks, *shape)``.
  """
  zeros = jnp.zeros_like(jax.tree.leaves(table)[0], dtype=dtype)
  column = zeros[(slice(None),) + (0,) * (zeros.ndim - 1)]
  column = column.reshape(column.shape + (1,) * len(shape))
  return jnp.broadcast_to(column, (len(column), *shape))


def combine(function: Callable[..., Any], *trees: base.Params) -> Any:
  """Maps ``function`` in float32 or wider, back to the first tree's dtypes."""

  def leaf_wise(first, *rest):
    dtype = accumulator_dtype(first)
    leaves = [leaf.astype(dtype) for leaf in (first, *rest)]
    return function(*leaves).astype(jnp.asarray(first).dtype)

  return jax.tree.map(leaf_wise, *trees)


def scale_add(scale: Any, x: base.ArrayTree, y: base.ArrayTree) -> Any:
  """``scale * x + y`` leaf by leaf, in the dtypes of ``y``."""
  return jax.tree.map(
    lambda a, b: (jnp.asarray(scale, b.dtype) * a + b).astype(b.dtype), x, y
  )


def scaled(scale: Any, x: base.ArrayTree) -> Any:
  """``scale * x`` leaf by leaf, in the dtypes of ``x``."""
  return jax.tree.map(lambda a: jnp.asarray(scale, a.dtype) * a, x)


def divided(x: base.ArrayTree, by: Any) -> Any:
  """``x / by`` leaf by leaf, in the dtypes of ``x``."""
  return jax.tree.map(lambda a: a / jnp.asarray(by, a.dtype), x)


def project(tree: base.Params, centre: base.Params, radius: Any) -> base.Params:
  """The nearest point in the ball of ``radius`` around ``centre``."""
  distance = norm(combine(jnp.subtract, tree, centre))
  outside = distance > radius
  scale = radius / jnp.where(outside, distance, 1.0)
  return combine(
    lambda leaf, middle: jnp.where(
      outside, middle + scale.astype(leaf.dtype) * (leaf - middle), leaf
    ),
    tree,
    centre,
  )


def map_updates(
  function: Callable[..., Any], updates: base.Updates, *rest: Any
) -> Any:
  """Maps over the leaves of ``updates``; where it is None, so is the result."""
  return jax.tree.map(
    lambda leaf, *others: None if leaf is None else function(leaf, *others),
    updates,
    *rest,
    is_leaf=lambda leaf: leaf is None,
  )


def cast_updates(
  updates: base.Updates, grads: base.Updates, params: base.Params | None
) -> base.Updates:
  """Casts updates by optax's rule: to the wider of gradient and parameter."""
  like = grads if params is None else params
  return map_updates(
    lambda leaf, g, p: leaf.astype(jnp.promote_types(g.dtype, p.dtype)),
    updates,
    grads,
    like,
  )


def conjugate(tree: base.Params) -> base.Params:
  """The complex conjugate of complex leaves; others as they are."""
  return jax.tree.map(
    lambda leaf: jnp.conj(leaf) if jnp.iscomplexobj(leaf) else leaf, tree
  )


def where(condition: Any, on_true: Any, on_false: Any) -> Any:
  """Selects between two trees; PRNG keys too.

  Args:
    condition: A bool of shape (), or of the leading axes of every leaf, to
      whose trailing axes it is broadcast.
    on_true: A tree.
    on_false: A tree of the same structure; its dtypes are kept.

  Returns:
    A tree.
  """

  def leaf(new, old):
    new, old = jnp.asarray(new), jnp.asarray(old)
    return jnp.where(align(condition, old), cast(new, old.dtype), old)

  return jax.tree.map(leaf, on_true, on_false)


def align(array: Any, like: jax.Array) -> jax.Array:
  """Gives ``array`` trailing axes, so that it broadcasts against ``like``."""
  array = jnp.asarray(array)
  return array.reshape(array.shape + (1,) * (like.ndim - array.ndim))


def dtypes(tree: Any) -> Any:
  """The dtypes of a tree's leaves."""
  return jax.tree.map(lambda leaf: leaf.dtype, tree)


def rounded(tree: base.Params) -> base.Params:
  """Numbers as narrow dtypes hold them, which a compiler may skip."""

  def leaf(x):
    info = jnp.finfo(x.dtype)
    if info.bits >= 32:
      return x
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)

  return jax.tree.map(leaf, tree)


def strong(tree: Any) -> Any:
  """Without weak types, which a step would lose and be compiled anew."""
  return jax.tree.map(
    lambda leaf: (
      leaf.astype(leaf.dtype) if getattr(leaf, 'weak_type', False) else leaf
    ),
    tree,
  )


def own(tree: Any) -> Any:
  """A copy without weak types, so that state in equals state out.

  A `jax.ShapeDtypeStruct`, whose numbers nobody knows, stays one.
  """

  def leaf(value):
    if isinstance(value, jax.ShapeDtypeStruct):
      return value
    return jnp.array(value, jnp.asarray(value).dtype)

  return jax.tree.map(leaf, tree)
