"""Functional optimization research in JAX: six method families for optax."""

from optlab.base import Estimate
from optlab.base import GradientEstimator
from optlab.block_dual import track_hessians
from optlab.block_dual import track_products
from optlab.block_sampling import epoch_of_blocks
from optlab.block_sampling import sample_blocks
from optlab.bsvrb import BlockBatch
from optlab.bsvrb import bsvrb
from optlab.bsvrb import dual_variables
from optlab.bsvrb import inner_variables
from optlab.curvature import Dense
from optlab.curvature import LowRank
from optlab.curvature import dense
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
from optlab.linear import cg
from optlab.linear import cholesky
from optlab.linear import eigh
from optlab.linear import lanczos
from optlab.linear import woodbury
from optlab.rsvrb import PairedBlockBatch
from optlab.rsvrb import rsvrb
from optlab.tracking import ema
from optlab.tracking import msvr
from optlab.tracking import msvr_gamma
from optlab.tracking import storm
from optlab.training import MinimizeResult
from optlab.training import TrainState
from optlab.training import init
from optlab.training import minimize
from optlab.training import train_step

__version__ = '0.1.0'
