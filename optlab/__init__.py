"""Functional optimization research in JAX: six method families for optax."""

from optlab.base import Estimate
from optlab.base import GradientEstimator
from optlab.estimators import stateless
from optlab.estimators import value_and_grad
from optlab.estimators import with_curvature
from optlab.training import MinimizeResult
from optlab.training import TrainState
from optlab.training import init
from optlab.training import minimize
from optlab.training import train_step

__version__ = '0.1.0'
