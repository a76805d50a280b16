"""Products with a sparse matrix, as a primitive that jax transforms by gathers.

By jax's own rules a gather transposes to a scatter, which XLA adds one by one
on a CPU. Here the transpose is the product with the transposed tables, at every
order of differentiation, and under ``vmap``.
"""

import dataclasses
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir
import jax.numpy as jnp


def product(matrix: Any, vector: jax.Array) -> jax.Array:
  """``A v``.

  Args:
    matrix: A `SparseMatrix` of shape ``(m, d)``.
    vector: Shape ``(..., d)``.

  Returns:
    Shape ``(..., m)``, in the dtype of ``vector``.
  """
  matrix = dataclasses.replace(matrix, pairs=None, place=None)
  leaves, kind = jax.tree.flatten(matrix)
  return _product.bind(*leaves, vector, kind=kind, transposed=False)


def _forward(matrix, vector):
  if matrix.one_hot is None:
    return matrix.rows(vector)
  stored = matrix.rows(matrix.one_hot.differences(vector))
  return stored + jnp.sum(vector[matrix.one_hot.left_out])


def _backward(matrix, vector):
  sums = matrix.columns(vector)
  if matrix.one_hot is None:
    return sums
  sums = matrix.one_hot.restored(sums)
  return sums.at[matrix.one_hot.left_out].add(jnp.sum(vector))


def _compute(*operands, kind, transposed):
  """The product by jax's own operations."""
  *leaves, vector = operands
  matrix = kind.unflatten(leaves)
  one = lambda v: (_backward if transposed else _forward)(matrix, v)
  if vector.ndim == 1:
    return one(vector)
  # As fast as `vmap` on a CPU, without a table for each.
  flat = jax.lax.map(one, vector.reshape(-1, vector.shape[-1]))
  return flat.reshape(*vector.shape[:-1], flat.shape[-1])


_product = core.Primitive('sparse_product')
_product.def_impl(_compute)
mlir.register_lowering(
  _product, mlir.lower_fun(_compute, multiple_results=False)
)


@_product.def_abstract_eval
def _shape(*operands, kind, transposed):
  *leaves, vector = operands
  size = kind.unflatten(leaves).shape[1 if transposed else 0]
  return jax.core.ShapedArray((*vector.shape[:-1], size), vector.dtype)


def _jvp(primals, tangents, **how):
  *leaves, vector = primals
  *entries, move = tangents
  out = _product.bind(*primals, **how)
  total = jnp.zeros_like(out)
  if not isinstance(move, ad.Zero):
    total = _product.bind(*leaves, move, **how)
  moved = [
    i
    for i, x in enumerate(entries)
    if not isinstance(x, ad.Zero) and x.dtype != jax.dtypes.float0
  ]
  if moved:

    def of(*some):
      found = list(leaves)
      for i, x in zip(moved, some, strict=True):
        found[i] = x
      return _compute(*found, vector, **how)

    total += jax.jvp(
      of, [leaves[i] for i in moved], [entries[i] for i in moved]
    )[1]
  return out, total


def _transpose(cotangent, *operands, kind, transposed):
  *leaves, vector = operands
  if isinstance(cotangent, ad.Zero):
    back = ad.Zero(vector.aval)
  else:
    back = _product.bind(
      *leaves, cotangent, kind=kind, transposed=not transposed
    )
  return *[None] * len(leaves), back


def _batch(operands, dims, **how):
  if any(dim is not None for dim in dims[:-1]):
    compute = lambda *operands: _compute(*operands, **how)
    return jax.vmap(compute, dims)(*operands), 0
  *leaves, vector = operands
  return _product.bind(*leaves, jnp.moveaxis(vector, dims[-1], 0), **how), 0


ad.primitive_jvps[_product] = _jvp
ad.primitive_transposes[_product] = _transpose
batching.primitive_batchers[_product] = _batch
