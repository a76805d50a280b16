"""Groups of one-hot columns, of which one need not be stored."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneHot:
  """One column left out of each group of columns that sum to one.

  ``A = S M + 1 e^T``, where ``S`` is ``A`` without the columns left out, ``M``
  subtracts from each entry that of its group's column, and ``e`` marks those.

  Attributes:
    members: int32, shape ``(q,)``, the columns that stayed of all groups.
    left_of: int32, shape ``(q,)``, the column left out of a member's group.
    left_out: int32, shape ``(groups,)``.
  """

  members: jax.Array
  left_of: jax.Array
  left_out: jax.Array

  def differences(self, vector: jax.Array) -> jax.Array:
    """``M v``."""
    return vector.at[self.members].add(-vector[self.left_of])

  def restored(self, rows: jax.Array) -> jax.Array:
    """``M^T u``, where ``u``, a vector or a matrix, is zero at ``left_out``."""
    return rows.at[self.left_of].add(-rows[self.members])


def without(csr: Any) -> tuple[Any, OneHot | None]:
  """Leaves the fullest column out of each group that sums to one.

  Args:
    csr: A scipy matrix of float64 in rows; changed in place.

  Returns:
    The matrix, with empty columns for those left out, and which they are.
  """
  csc = csr.tocsc()
  counts = np.diff(csc.indptr)
  others = np.concatenate([[0], np.cumsum(csc.data != 1.0)])[csc.indptr]
  members, left_of, left_out = [], [], []
  group, covered = [], np.zeros(csr.shape[0], bool)
  for column in np.flatnonzero((counts > 0) & (np.diff(others) == 0)):
    rows = csc.indices[csc.indptr[column] : csc.indptr[column + 1]]
    if covered[rows].any():
      group, covered[:] = [], False
    group.append(column)
    covered[rows] = True
    if counts[group].sum() == csr.shape[0]:
      fullest = max(group, key=counts.__getitem__)
      members += [column for column in group if column != fullest]
      left_of += [fullest] * (len(group) - 1)
      left_out.append(fullest)
      group, covered[:] = [], False
  if not left_out:
    return csr, None
  csr.data[np.isin(csr.indices, left_out)] = 0.0
  csr.eliminate_zeros()
  found = (members, left_of, left_out)
  return csr, OneHot(*(jnp.asarray(part, jnp.int32) for part in found))
