"""GNS-Newton: curvature, solvers for shifted systems, and the search."""

from optlab.base import Prepared
from optlab.newton._blocks import Blocks
from optlab.newton._blocks import blockwise
from optlab.newton._blocks import layerwise
from optlab.newton._blocks import leaf_blocks
from optlab.newton._conjugate import cg
from optlab.newton._curvature import empirical_fisher
from optlab.newton._curvature import fisher
from optlab.newton._curvature import gauss_newton
from optlab.newton._curvature import hessian
from optlab.newton._diagonals import Diagonal
from optlab.newton._diagonals import hutchinson
from optlab.newton._diagonals import row_norms
from optlab.newton._gns import gns_newton
from optlab.newton._gns import gns_newton_paper
from optlab.newton._gram import linear_gauss_newton
from optlab.newton._krylov import lanczos
from optlab.newton._least_squares import least_squares
from optlab.newton._linear import cholesky
from optlab.newton._linear import eigh
from optlab.newton._linear import woodbury
from optlab.newton._multishift import multishift_cg
from optlab.newton._operators import Dense
from optlab.newton._operators import LowRank
from optlab.newton._operators import OperatorFactory
from optlab.newton._operators import dense
from optlab.newton._search import SearchRule
from optlab.newton._search import Trial
from optlab.newton._search import adaptive
from optlab.newton._search import double
from optlab.newton._search import hold
from optlab.newton._search import measured
from optlab.newton._sparse import SparseMatrix
from optlab.newton._sparse import sparse_matrix
from optlab.newton._step import GNSNewtonInfo
from optlab.newton._step import GNSNewtonState

__all__ = [
  'Blocks',
  'Dense',
  'Diagonal',
  'GNSNewtonInfo',
  'GNSNewtonState',
  'LowRank',
  'OperatorFactory',
  'Prepared',
  'SearchRule',
  'SparseMatrix',
  'Trial',
  'adaptive',
  'blockwise',
  'cg',
  'cholesky',
  'dense',
  'double',
  'eigh',
  'empirical_fisher',
  'fisher',
  'gauss_newton',
  'gns_newton',
  'gns_newton_paper',
  'hessian',
  'hold',
  'hutchinson',
  'lanczos',
  'layerwise',
  'leaf_blocks',
  'least_squares',
  'linear_gauss_newton',
  'measured',
  'multishift_cg',
  'row_norms',
  'sparse_matrix',
  'woodbury',
]
