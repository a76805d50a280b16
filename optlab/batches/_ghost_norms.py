r"""Squared norms of per-example gradients that are products of two factors.

A dense layer and an embedding have, for a matrix of the parameters, the
gradient :math:`G = K^\top O` with a known factor K, a row a position (the
layer's input; for an embedding a one in the column of its token), and a factor
O of the cotangents. Then :math:`\|G\|^2 = \langle K K^\top, O O^\top \rangle`,
and the product of two such gradients is that of their mixed Gram matrices.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optlab import trees

_PART = 2**16  # Numbers of a gradient of one example that are made at a time.


class Kind(NamedTuple):
  """A dense layer or an embedding.

  Attributes:
    positions: The rows of both factors.
    axis: The axis of the matrix that the known factor is along, or ``None``
      where the leaf is not a matrix seen along its axes.
    sizes: The shape of the matrix, with the known factor's axis as ``axis``.
    side: Which operand the matrix is.
    contract: The contracted axes of the data.
    split: How many axes of the result come first in the product.
    mode: How an embedding treats tokens out of range; ``None`` for a layer.
    offsets: The axes of an embedding's result that are of its rows.
  """

  positions: int
  axis: int | None
  sizes: tuple[int, int]
  side: int = 0
  contract: tuple[int, ...] = ()
  split: int = 0
  mode: Any = None
  offsets: tuple[int, ...] = ()

  @property
  def is_gather(self) -> bool:
    """Whether it is an embedding."""
    return self.mode is not None

  def factors(self, data: Any, dy: Any) -> tuple[Any, Any]:
    """The known factor, rows or tokens, and the one of the cotangents."""
    if self.is_gather:
      return self.tokens(data), self.rows(dy)
    return self.inputs(data), self.outputs(dy)

  def inputs(self, data: Any) -> Any:
    """The input of a dense layer, a row a position."""
    free = [axis for axis in range(data.ndim) if axis not in self.contract]
    data = data.transpose(*free, *self.contract)
    return data.reshape(self.positions, -1)

  def outputs(self, dy: Any) -> Any:
    """The cotangent of its result."""
    first = math.prod(dy.shape[: self.split])
    # The data's free axes come first where the data is the left operand.
    dy = dy.reshape(first, -1) if dy.size else dy.reshape(first, 0)
    return dy if self.side == 1 else dy.T

  def tokens(self, indices: Any) -> Any:
    """The rows that an embedding takes, -1 where it takes none."""
    tokens = indices.reshape(-1)
    last = self.sizes[0] - 1
    if self.mode == lax.GatherScatterMode.CLIP:
      return jnp.clip(tokens, 0, last)
    return jnp.where((tokens < 0) | (tokens > last), -1, tokens)

  def rows(self, dy: Any) -> Any:
    """The cotangents of the rows."""
    first = [axis for axis in range(dy.ndim) if axis not in self.offsets]
    return dy.transpose(*first, *self.offsets).reshape(self.positions, -1)


def embedding(eqn: Any, axes: tuple[int, ...] | None) -> Kind | None:
  """A gather of whole rows, if it is one."""
  numbers = eqn.params['dimension_numbers']
  shape = eqn.invars[0].aval.shape
  indices = eqn.invars[1].aval.shape
  whole = (1, *shape[1:])
  if (
    tuple(numbers.collapsed_slice_dims) != (0,)
    or tuple(numbers.start_index_map) != (0,)
    or numbers.operand_batching_dims
    or tuple(eqn.params['slice_sizes']) != whole
    or indices[-1:] != (1,)
  ):
    return None
  return Kind(
    positions=math.prod(indices),
    axis=0 if axes == (0, 1) else None,
    sizes=(shape[0], math.prod(shape[1:])),
    mode=eqn.params['mode'],
    offsets=tuple(numbers.offset_dims),
  )


def dense(eqn: Any, side: int, axes: tuple[int, ...] | None) -> Kind | None:
  """A product with a matrix that meets nothing else, if it is one."""
  contract, batch = eqn.params['dimension_numbers']
  if batch[0]:
    return None
  data, matrix = eqn.invars[1 - side].aval, eqn.invars[side].aval
  depth = math.prod(data.shape[axis] for axis in contract[1 - side])
  width = matrix.size // max(1, depth)
  inner = {axes[i] for i in contract[side]} - {-1} if axes else set()
  axis = inner.pop() if len(inner) == 1 else None
  if axes is None or sorted(i for i in axes if i >= 0) != [0, 1]:
    axis = None
  return Kind(
    positions=data.size // max(1, depth),
    axis=axis,
    sizes=(width, depth) if axis == 1 else (depth, width),
    side=side,
    contract=tuple(contract[1 - side]),
    split=(data.ndim - len(contract[1 - side]))
    if side == 1
    else matrix.ndim - len(contract[side]),
  )


def _matmul(a, b, wide):
  return jnp.matmul(a, b, preferred_element_type=wide)


def sq_norm(kind: Kind, factors: Any, wide: Any) -> jax.Array:
  """The squared norm of a gradient from its factors."""
  known, other = factors
  if kind.is_gather:
    # Rows of one token are added up where it first occurs.
    first = jnp.argmax(known[:, None] == known[None], 1)
    other = jnp.where(known[:, None] < 0, 0, other)
    promoted = other.astype(jnp.promote_types(other.dtype, wide))
    rows = jnp.zeros_like(promoted).at[first].add(promoted)
    return trees.sq_norm(rows, wide)
  if kind.positions == 1:
    return trees.sq_norm(known, wide) * trees.sq_norm(other, wide)
  depth, width = known.shape[1], other.shape[1]
  if kind.positions * (depth + width) < depth * width:
    gram = lambda a: jnp.matmul(a, jnp.conj(a).T, preferred_element_type=None)
    if not jnp.iscomplexobj(known) and not jnp.iscomplexobj(other):
      gram = lambda a: _matmul(a, a.T, wide)
    return jnp.sum((gram(known) * jnp.conj(gram(other))).real).astype(wide)
  return _sq_norm_of_product(known, other, wide)


def _sq_norm_of_product(known, other, wide):
  """Of a gradient that is made for it, in parts where it is large."""
  if known.shape[1] > other.shape[1]:
    known, other = other, known
  depth, width = known.shape[1], other.shape[1]
  most = max(_PART, len(known) * (depth + width) // 8)
  size = -(-width // -(-depth * width // most))
  is_complex = jnp.iscomplexobj(known) or jnp.iscomplexobj(other)

  def part(start, size):
    columns = lax.dynamic_slice_in_dim(other, start, size, 1)
    if is_complex:
      return trees.sq_norm(jnp.matmul(known.T, columns), wide)
    return trees.sq_norm(_matmul(known.T, columns, wide), wide)

  # A loop: side by side XLA would make them all at once.
  total = lax.fori_loop(
    1, width // size, lambda i, x: x + part(i * size, size), part(0, size)
  )
  rest = width % size
  return total + part(width - rest, rest) if rest else total


def message(
  kind: Kind, factors: Any, before: Kind, its_data: Any, wide: Any
) -> tuple[jax.Array, jax.Array]:
  """What an earlier meeting needs of a later one, for their product.

  Args:
    kind: The later one.
    factors: Of its gradient.
    before: The earlier one.
    its_data: The operand that gives the earlier one's known factor.
    wide: The dtype of the products.

  Returns:
    The Gram matrix of the later factor along the known axis of the earlier with
    that, and the later factor along the other axis.
  """
  known, other = factors
  along, rest = (known, other) if kind.axis == before.axis else (other, known)
  if before.is_gather:
    theirs = before.tokens(its_data)
    if along.ndim == 1:
      gram = ((along[:, None] == theirs[None]) & (theirs >= 0)).astype(wide)
    else:
      gram = jnp.where(theirs >= 0, along[:, theirs], 0).astype(wide)
  else:
    theirs = before.inputs(its_data)
    if along.ndim == 1:
      gram = jnp.where(along >= 0, theirs[:, along], 0).astype(wide).T
    else:
      gram = _matmul(along, theirs.T, wide)
  return gram, rest.astype(wide)


def product(kind: Kind, factors: Any, told: Any, wide: Any) -> jax.Array:
  """Twice the inner product with the gradient of a later meeting."""
  del kind
  gram, rest = told
  return 2 * jnp.sum(gram * _matmul(rest, factors[1].T, wide))
