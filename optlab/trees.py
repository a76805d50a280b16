"""Arithmetic on pytrees of mixed dtypes, in float32 or wider."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optlab import base

_SMALL = 1 << 14  # Numbers of a leaf.


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


def norm(tree: base.Params) -> jax.Array:
  """Euclidean norm in float32 or wider; of an empty tree, zero.

  Where the squares would over- or underflow, they are of numbers scaled by the
  largest magnitude.
  """
  dtype = real_dtype(tree)
  plain = jnp.sqrt(sq_norm(tree, dtype))
  return jax.lax.cond(
    _is_accurate(plain), lambda: plain, lambda: _scaled_norm(tree)
  )


def norms(
  *trees: base.Params, product: tuple[base.Params, base.Params]
) -> tuple[jax.Array, ...]:
  """The norm of each tree, and an inner product, all in one look.

  Args:
    *trees: Real trees of one structure.
    product: Two more of them.

  Returns:
    What `norm` returns of each, and the inner product of the last two.
  """
  # Small leaves are stacked: there, a reduction costs what its launch does.
  pairs = [*((tree, tree) for tree in trees), product]
  sums = [jnp.zeros((), accumulator_dtype(pairs))] * len(pairs)
  columns = [
    list(zip(*(jax.tree.leaves(side) for side in sides), strict=True))
    for sides in zip(*pairs, strict=True)
  ]
  for left, right in zip(*columns, strict=True):
    if left[0].size <= _SMALL:
      product_of = jnp.stack(wide(left)) * jnp.stack(wide(right))
      parts = list(jnp.sum(product_of, tuple(range(1, product_of.ndim))))
    else:
      parts = [inner_product(a, b) for a, b in zip(left, right, strict=True)]
    sums = [total + part for total, part in zip(sums, parts, strict=True)]
  *squares, last = sums
  plain = tuple(map(jnp.sqrt, squares))
  accurate = functools.reduce(jnp.logical_and, map(_is_accurate, plain))
  lengths = jax.lax.cond(
    accurate,
    lambda: plain,
    lambda: tuple(_scaled_norm(tree).astype(last.dtype) for tree in trees),
  )
  return *lengths, last


def _is_accurate(plain: jax.Array) -> jax.Array:
  """Whether no square that matters left the range of its dtype."""
  info = jnp.finfo(plain.dtype)
  return (plain > info.tiny**0.25) & (plain < info.max)


def _scaled_norm(tree: base.Params) -> jax.Array:
  top = largest(tree)
  usual = (top > 0) & jnp.isfinite(top)
  divisor = jnp.where(usual, top, 1)
  small = jax.tree.map(
    lambda leaf: leaf.astype(accumulator_dtype(leaf)) / divisor, tree
  )
  # The largest is NaN where a number is NaN, infinite where one is infinite.
  return jnp.where(usual, top * jnp.sqrt(sq_norm(small, top.dtype)), top)


def dot(a: base.ArrayTree, b: base.ArrayTree) -> jax.Array:
  """The inner product of two real trees, in the widest of their dtypes."""
  products = jax.tree.leaves(jax.tree.map(leaf_dot, a, b))
  dtype = accumulator_dtype(a, b)
  return sum(
    (product.astype(dtype) for product in products),
    start=jnp.zeros((), dtype),
  )


def leaf_dot(rows: jax.Array, leaf: jax.Array) -> jax.Array:
  """Inner products of ``leaf`` with ``rows``, which may have leading axes."""
  if leaf.ndim == 1 and not is_split(leaf):
    return rows @ leaf
  axes = tuple(range(rows.ndim - leaf.ndim, rows.ndim))
  return jnp.sum(rows * leaf, axes)


def is_split(leaf: jax.Array) -> bool:
  """Whether the type of an array says that devices split it.

  Such arrays can't be flattened, and products don't say how to contract them;
  sums of element-wise products do.
  """
  spec = jax.typeof(leaf).sharding.spec
  return any(axis is not None for axis in spec)


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


def wide(tree: base.ArrayTree) -> Any:
  """Each leaf in float32 or wider."""
  return jax.tree.map(
    lambda leaf: jnp.asarray(leaf).astype(accumulator_dtype(leaf)), tree
  )


def is_nonzero(tree: base.ArrayTree) -> jax.Array:
  """Whether any number of a tree is not zero."""
  found = [jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)]
  return jnp.any(jnp.stack(found)) if found else jnp.asarray(False)


def largest(tree: base.Params) -> jax.Array:
  """The largest magnitude in a tree, a real number; of an empty tree, zero."""
  dtype = real_dtype(tree)
  tops = [
    jnp.max(jnp.abs(leaf), initial=0).astype(dtype)
    for leaf in jax.tree.leaves(tree)
  ]
  return jnp.max(jnp.stack(tops)) if tops else jnp.zeros((), dtype)


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


def is_finite(*trees: base.Params) -> jax.Array:
  """Whether all floating point numbers are finite."""
  # A maximum carries NaN on, and costs a third of a conjunction on CPUs.
  return jnp.isfinite(
    largest(
      [
        leaf
        for leaf in jax.tree.leaves(trees)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
      ]
    )
  )


def all_finite(tree: base.ArrayTree) -> jax.Array:
  """Whether every number in ``tree`` is finite; true for an empty tree."""
  leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves)) if leaves else jnp.asarray(True)


def sq_norm(tree: base.ArrayTree, dtype: Any) -> jax.Array:
  """The sum of all squared magnitudes in ``tree``, summed in ``dtype``."""
  return sum(
    (
      jnp.sum(jnp.square(jnp.abs(leaf).astype(dtype)))
      for leaf in jax.tree.leaves(tree)
    ),
    start=jnp.zeros((), dtype),
  )


def real_dtype(tree: base.ArrayTree) -> Any:
  """The dtype of magnitudes of a tree's leaves, at least float32."""
  return jnp.finfo(accumulator_dtype(tree)).dtype


def inner_product(a: base.ArrayTree, b: base.ArrayTree) -> jax.Array:
  """The Euclidean inner product, in float32 or wider."""
  dtype = accumulator_dtype(a, b)
  return sum(
    (
      jnp.sum(x.astype(dtype) * y.astype(dtype))
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ),
    start=jnp.zeros((), dtype),
  )


def accumulator_dtype(*trees: base.Params) -> Any:
  """The widest dtype of the leaves, and at least float32.

  Args:
    *trees: Pytrees of arrays.

  Returns:
    The dtype in which sums over the leaves are kept.
  """
  # Of each leaf by itself, so that a Python number counts as the array that it
  # becomes; a jax.ShapeDtypeStruct has a dtype and is no array.
  dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(trees)]
  return jnp.result_type(jnp.float32, *dtypes)
