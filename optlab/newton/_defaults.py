"""The solvers that follow from what an operator shows."""

import jax

from optlab import base
from optlab.newton import _blocks
from optlab.newton import _krylov
from optlab.newton import _linear
from optlab.newton import _multishift
from optlab.newton import _operators

WIDE = 200  # unknowns, from which on a matrix is tried by products first
LARGE = 10_000  # parameters, from which on no basis is kept


def solver(operator: base.Operator, b: base.ArrayTree, shift) -> base.Prepared:
  """The default of `gns_newton`.

  A factorization of some hundred unknowns costs as much as a hundred products
  and more: LAPACK's threads spin on after it, on cores that XLA needs.
  """
  matrix = _operators.matrix_of(operator)
  if matrix is not None and len(matrix) >= WIDE:
    return _krylov.few_products(_linear.cholesky())(operator, b, shift)
  return exact_solver(operator, b, shift)


def exact_solver(
  operator: base.Operator, b: base.ArrayTree, shift
) -> base.Prepared:
  """The default of `gns_newton_paper`: what can be is factorized."""
  return _choice(operator, b)(operator, b, shift)


def _choice(operator, b):
  if _operators.matrix_of(operator) is not None:
    return _linear.cholesky()
  if _operators.factor_of(operator) is not None:
    return _linear.woodbury()
  if _blocks.blocks_of(operator) is not None:
    return _blocks.blockwise()
  if sum(leaf.size for leaf in jax.tree.leaves(b)) > LARGE:
    return _multishift.multishift_cg()
  return _krylov.lanczos()
