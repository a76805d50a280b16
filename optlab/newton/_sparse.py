"""Sparse data matrices whose products are gathers, for linear models on CPUs.

XLA adds into scattered places one by one on a CPU. Here every product, the
transposed one and the weighted Gram matrix included, gathers from a vector into
a table of fixed width and sums its rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab import checks
from optlab import trees
from optlab.newton import _one_hot
from optlab.newton import _sparse_product

MAX_GRAM_COLUMNS = 46_340  # Squared, an int32.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gather:
  """The linear map ``v -> sums of v[index] * values`` over short rows.

  Attributes:
    index: uint16 or int32, shape ``(pieces, width)``; ``size`` where there is
      nothing.
    values: Like ``index``, or ``None`` for ones.
    segment: int32, shape ``(pieces,)``, the output that a piece belongs to;
      ``None`` where each output has one piece.
    shape: Static, ``(outputs, size)``.
  """

  index: jax.Array
  values: jax.Array | None
  segment: jax.Array | None
  shape: tuple[int, int] = dataclasses.field(metadata={'static': True})

  def __call__(self, vector: jax.Array) -> jax.Array:
    # Padding reads the zero behind the vector. A scatter puts the vector there,
    # which XLA does not fuse with the gather: it would compute what made the
    # vector once for every entry of the table (an optimization barrier is
    # dropped on CPUs).
    padded = jnp.zeros(self.shape[1] + 1, vector.dtype)
    padded = padded.at[jnp.arange(self.shape[1])].set(
      vector, indices_are_sorted=True, unique_indices=True
    )
    table = padded.at[self.index].get(mode='promise_in_bounds')
    if self.values is not None:
      table = table * self.values.astype(vector.dtype)
    sums = jnp.sum(table, axis=1)
    if self.segment is None:
      return sums
    return jax.ops.segment_sum(
      sums, self.segment, self.shape[0], indices_are_sorted=True
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseMatrix:
  """A matrix of shape ``(m, d)``; ``matrix @ vector`` differentiates.

  ``vector`` has shape ``(d,)``, or ``(d, k)`` for k products at once.

  Attributes:
    rows: The product with a vector, of what is stored.
    columns: The product of its transpose.
    pairs: ``weights -> entries`` of ``S^T diag(weights) S``, or ``None``.
    place: int32, shape ``(entries, 2)``, where they stand in its lower
      triangle.
    one_hot: The columns that are not stored, or ``None``.
  """

  rows: Gather
  columns: Gather
  pairs: Gather | None = None
  place: jax.Array | None = None
  one_hot: _one_hot.OneHot | None = None

  @property
  def shape(self) -> tuple[int, int]:
    return self.rows.shape

  def __matmul__(self, vector: jax.Array) -> jax.Array:
    shape = jnp.shape(vector)
    if shape[:1] != self.shape[1:] or len(shape) > 2:
      raise ValueError(
        f'vector must have shape {self.shape[1:]} for a SparseMatrix of shape'
        f' {self.shape}, or columns of it, got {shape}.'
      )
    checks.check_floating(
      'vector', vector, 'The entries are read in its dtype.'
    )
    vector = jnp.asarray(vector)
    if vector.ndim == 1:
      return _sparse_product.product(self, vector)
    return _sparse_product.product(self, vector.T).T

  def gram(self, weights: jax.Array) -> jax.Array:
    """``A^T diag(weights) A``, shape ``(d, d)``, in the dtype of the weights.

    Args:
      weights: Shape ``(m,)``.

    Returns:
      The symmetric matrix.

    Raises:
      ValueError: The matrix was made without ``gram``.
    """
    if self.pairs is None or self.place is None:
      raise ValueError(
        'this SparseMatrix has no Gram matrix; make it with'
        ' sparse_matrix(..., gram=True).'
      )
    if jnp.shape(weights) != self.shape[:1]:
      raise ValueError(
        f'weights must have shape {self.shape[:1]}, one a row, got'
        f' {jnp.shape(weights)}.'
      )
    d = self.shape[1]
    row, column = self.place[:, 0], self.place[:, 1]
    lower = jnp.zeros((d, d), weights.dtype)
    lower = lower.at[row, column].set(self.pairs(weights), unique_indices=True)
    if self.one_hot is not None:
      full = lower + jnp.tril(lower, -1).T
      sums = _restored_sums(self, weights, full)
      full = self.one_hot.restored(self.one_hot.restored(full).T)
      left_out = self.one_hot.left_out
      lower = full.at[left_out].add(sums).at[:, left_out].add(sums[:, None])
      lower = lower.at[jnp.ix_(left_out, left_out)].add(jnp.sum(weights))
    # Symmetric to the last bit.
    return jnp.tril(lower) + jnp.tril(lower, -1).T


def _restored_sums(matrix, weights, gram):
  """``M^T S^T w``; where ``S`` is of ones, the Gram's diagonal holds it."""
  is_binary = matrix.columns.values is None
  sums = jnp.diagonal(gram) if is_binary else matrix.columns(weights)
  return matrix.one_hot.restored(sums)


def sparse_matrix(matrix: Any, *, gram: bool = False) -> SparseMatrix:
  r"""Prepares a scipy sparse matrix, once, on the host.

  Choose it over ``jax.experimental.sparse`` for the data of a linear model on a
  CPU: on w8a (49,749 rows, 4 % filled) both products together take a third of
  the time of dense ones in float32. With ``gram`` it also lists all pairs of
  entries that share a row, so that the Hessian :math:`A^\top W A` of
  `linear_gauss_newton` costs one gather of as many weights; worth it where rows
  are short. Of one-hot columns beside each other, which sum to one in every
  row, the fullest is not stored: a row of mushrooms has 9 entries and 44 pairs
  in place of 21 and 231. Results are those of the whole matrix up to the
  rounding of its norm.

  Args:
    matrix: ``scipy.sparse`` matrix or array of shape ``(m, d)``.
    gram: Whether to prepare ``SparseMatrix.gram``, which takes two bytes per
      pair, four above 65,535 rows.

  Returns:
    A `SparseMatrix`.

  Raises:
    TypeError: ``matrix`` is not sparse, or complex.
    ValueError: ``gram`` of more than 46,340 columns, whose Gram matrix has over
      2^31 entries.

  Examples:
    >>> import jax.numpy as jnp, scipy.sparse, optlab
    >>> data = scipy.sparse.csr_array([[1.0, 0.0], [2.0, 3.0]])
    >>> matrix = optlab.sparse_matrix(data, gram=True)
    >>> print(matrix @ jnp.array([1.0, 1.0]))
    [1. 5.]
    >>> print(matrix.gram(jnp.array([1.0, 1.0])))
    [[5. 6.]
     [6. 9.]]
  """
  if not hasattr(matrix, 'tocsr'):
    raise TypeError(
      f'matrix must be a scipy sparse matrix, got {type(matrix).__name__}; use'
      ' a dense array as it is.'
    )
  if np.iscomplexobj(matrix):
    raise TypeError(f'matrix must be real, got dtype {matrix.dtype}.')
  if gram and matrix.shape[1] > MAX_GRAM_COLUMNS:
    raise ValueError(
      f'gram takes at most {MAX_GRAM_COLUMNS:,} columns, got'
      f' {matrix.shape[1]:,}; leave it out and solve by products (lanczos, cg).'
    )
  csr = matrix.tocsr().astype(np.float64)
  csr.sum_duplicates()
  csr, one_hot = _one_hot.without(csr)
  made = SparseMatrix(_gather(csr), _gather(csr.T.tocsr()), one_hot=one_hot)
  if not gram:
    return made
  pairs, keys = _pairs(csr)
  place = np.stack(np.divmod(keys, csr.shape[1]), axis=1)
  return dataclasses.replace(
    made, pairs=_gather(pairs), place=jnp.asarray(place, jnp.int32)
  )


def _pairs(csr):
  """Products of entries that share a row, one row per place in the Gram."""
  m, d = csr.shape
  counts = np.diff(csr.indptr)
  keys, samples = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
  values = [np.zeros(0)]
  for count in np.unique(counts[counts > 0]):
    chosen = np.flatnonzero(counts == count)
    entries = csr.indptr[chosen][:, None] + np.arange(count)
    i, j = np.tril_indices(count)  # Columns ascend within a row.
    columns = csr.indices[entries].astype(np.int32)
    keys.append((columns[:, i] * np.int32(d) + columns[:, j]).ravel())
    samples.append(np.repeat(chosen.astype(np.int32), len(i)))
    data = csr.data[entries]
    values.append((data[:, i] * data[:, j]).ravel())
  keys, samples = np.concatenate(keys), np.concatenate(samples)
  values = np.concatenate(values)
  found = np.zeros(d * d, np.int64)
  np.add.at(found, keys, 1)
  used = np.flatnonzero(found)
  position = np.zeros(d * d, np.int32)
  position[used] = np.arange(len(used))
  order = np.argsort(position[keys], kind='stable')
  indptr = np.concatenate([[0], np.cumsum(found[used])])
  kind = type(csr)
  shape = (len(used), m)
  return kind((values[order], samples[order], indptr), shape=shape), used


def _gather(csr):
  """Rows cut into pieces of one width, as wide as wastes little."""
  counts = np.diff(csr.indptr)
  mean = csr.nnz / max(1, len(counts))
  widest = int(counts.max(initial=1))
  if widest <= 2 * mean:
    width, pieces = widest, np.ones_like(counts)
  else:
    mean = csr.nnz / max(1, np.count_nonzero(counts))
    width = int(np.clip(2 ** np.round(np.log2(max(mean, 1.0))), 4, 128))
    pieces = -(-counts // width)
  total = int(pieces.sum())
  start = np.concatenate([[0], np.cumsum(pieces)])[:-1]
  within = np.arange(csr.nnz) - np.repeat(csr.indptr[:-1], counts)
  piece = np.repeat(start, counts) + within // width
  kind = np.uint16 if csr.shape[1] < 2**16 else np.int32
  index = np.full((total, width), csr.shape[1], kind)
  index[piece, within % width] = csr.indices
  values = None
  if not np.all(csr.data == 1.0):
    values = np.zeros((total, width))
    values[piece, within % width] = csr.data
    values = jnp.asarray(values, trees.accumulator_dtype(jnp.asarray(values)))
  segment = None
  if not np.all(pieces == 1):
    segment = np.repeat(np.arange(len(counts), dtype=np.int32), pieces)
    segment = jnp.asarray(segment)
  return Gather(jnp.asarray(index), values, segment, csr.shape)
