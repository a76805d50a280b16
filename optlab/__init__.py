"""Functional optimization research in JAX: six method families for optax."""

from optlab.base import Estimate
from optlab.base import GradientEstimator
from optlab.contrastive import contrastive_divergence
from optlab.contrastive import langevin
from optlab.estimators import stateless
from optlab.estimators import value_and_grad
from optlab.estimators import with_curvature
from optlab.flow import fit_flow
from optlab.flow import init_flow
from optlab.likelihood import NoiseBatch
from optlab.likelihood import noise_batch
from optlab.log_partition import agree
from optlab.log_partition import grid_log_partition
from optlab.log_partition import log_partition
from optlab.meco import meco
from optlab.nce import NceParams
from optlab.nce import ence
from optlab.nce import nce
from optlab.nce import normalized_descent
from optlab.nce import with_log_normalizer
from optlab.noise import defensive
from optlab.noise import fit_gaussian
from optlab.noise import follow
from optlab.noise import gaussian
from optlab.noise import gaussian_mixture
from optlab.noise import mixture
from optlab.training import MinimizeResult
from optlab.training import TrainState
from optlab.training import init
from optlab.training import minimize
from optlab.training import train_step

__version__ = '0.1.0'
