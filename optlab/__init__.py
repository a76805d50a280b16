"""Functional optimization research in JAX: six method families for optax."""

from optlab.base import Estimate
from optlab.base import GradientEstimator
from optlab.bilevel import BilevelBatch
from optlab.bilevel import BilevelState
from optlab.bo_rep import bo_rep
from optlab.bo_rep import refine
from optlab.curvature import empirical_fisher
from optlab.curvature import fisher
from optlab.curvature import gauss_newton
from optlab.curvature import hessian
from optlab.curvature import linear_gauss_newton
from optlab.estimators import stateless
from optlab.estimators import value_and_grad
from optlab.estimators import with_curvature
from optlab.gns import gns_newton
from optlab.gns import gns_newton_paper
from optlab.hypergradient import implicit
from optlab.hypergradient import soba
from optlab.krylov import cg
from optlab.krylov import lanczos
from optlab.linear import cholesky
from optlab.linear import eigh
from optlab.linear import woodbury
from optlab.neumann import TtsaState
from optlab.neumann import stocbio
from optlab.neumann import ttsa
from optlab.normalized_momentum import ScaleByNormalizedMomentumState
from optlab.normalized_momentum import normalized_momentum
from optlab.normalized_momentum import scale_by_normalized_momentum
from optlab.operators import Dense
from optlab.operators import LowRank
from optlab.operators import dense
from optlab.saba import IndexedBatch
from optlab.saba import SabaState
from optlab.saba import saba
from optlab.training import MinimizeResult
from optlab.training import TrainState
from optlab.training import init
from optlab.training import minimize
from optlab.training import train_step
from optlab.unrolled import UnrolledState
from optlab.unrolled import unrolled
from optlab.variance_reduction import WithStormState
from optlab.variance_reduction import with_storm

__version__ = '0.1.0'
