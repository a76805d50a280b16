"""Numbers of a whole tree: norms, products, the largest, whether it is finite.

Sums are kept in float32 or wider. `optlab.trees` has them all.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optlab import base

_SMALL = 1 << 14  # Numbers of a leaf.


def norm(tree: base.Params) -> jax.Array:
  """Euclidean norm in float32 or wider; of an empty tree, zero.

  Where the squares would over- or underflow, they are of scaled numbers.
  """
  dtype = real_dtype(tree)
  plain = _root(sq_norm(tree, dtype))
  return jax.lax.cond(
    _is_accurate(plain), lambda: plain, lambda: _scaled_norm(tree, plain)
  )


def norms(
  *trees: base.Params, products: Sequence[tuple[base.Params, base.Params]]
) -> tuple[jax.Array, ...]:
  """The norm of each tree, and inner products, all in one look.

  Args:
    *trees: Real trees of one structure.
    products: Pairs of more of them; of bools, the product counts.

  Returns:
    What `norm` returns of each, and the inner product of each pair.
  """
  # Small leaves are stacked: there, a reduction costs what its launch does.
  pairs = [*((tree, tree) for tree in trees), *products]
  sums = jnp.zeros(len(pairs), accumulator_dtype(pairs))
  columns = [
    list(zip(*(jax.tree.leaves(side) for side in sides), strict=True))
    for sides in zip(*pairs, strict=True)
  ]
  for left, right in zip(*columns, strict=True):
    if left[0].size <= _SMALL:
      product_of = jnp.stack(wide(left)) * jnp.stack(wide(right))
      sums += jnp.sum(product_of, tuple(range(1, product_of.ndim)))
    else:
      parts = [inner_product(a, b) for a, b in zip(left, right, strict=True)]
      sums += jnp.stack(parts).astype(sums.dtype)
  plain, rest = _root(sums[: len(trees)]), sums[len(trees) :]
  lengths = jax.lax.cond(
    jnp.all(_is_accurate(plain)),
    lambda: plain,
    lambda: jnp.stack(list(map(_scaled_norm, trees, plain))),
  )
  return *lengths, *rest


def _root(square: jax.Array) -> jax.Array:
  """The square root; its slope at zero is zero, as that of no branch taken."""
  zero = square == 0
  return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def _is_accurate(plain: jax.Array) -> jax.Array:
  """Whether no square that matters left the range of its dtype."""
  info = jnp.finfo(plain.dtype)
  return (plain > info.tiny**0.25) & (plain < info.max)


def _scaled_norm(tree: base.Params, plain: jax.Array) -> jax.Array:
  """The norm where the plain one left the range of its squares."""
  root, scale = scaled_norm(tree, plain)
  return root / scale


def scaled_norm(
  tree: base.Params, plain: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The norm times a power of two, and the power: one kernel.

  Args:
    tree: Real or complex numbers.
    plain: Their norm by their squares, which says what power to take.
  """
  info = jnp.finfo(plain.dtype)
  power = 2.0 ** (
    info.maxexp * 11 // 16
  )  # The least number's square is normal.
  scale = jnp.where(plain < 1, power, 1 / power).astype(plain.dtype)
  scale = jnp.where(_is_accurate(plain), 1, scale)  # In a lane of a vmap.
  scaled = jax.tree.map(
    lambda leaf: jnp.abs(leaf).astype(plain.dtype) * scale, tree
  )
  # Else XLA squares constants and scale apart, and zeros become NaN.
  scaled = jax.lax.optimization_barrier(scaled)
  return _root(sq_norm(scaled, plain.dtype)), scale


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
