"""Optimizers that take a gradient: diffGrad, AdaGrad-Norm, normalized steps."""

from optlab.first_order._adagrad_norm import ScaleByAdaGradNormState
from optlab.first_order._adagrad_norm import adagrad_norm
from optlab.first_order._adagrad_norm import scale_by_adagrad_norm
from optlab.first_order._diffgrad import ScaleByDiffGradState
from optlab.first_order._diffgrad import diffgrad
from optlab.first_order._diffgrad import scale_by_diffgrad
from optlab.first_order._normalized_momentum import (
  ScaleByNormalizedMomentumState,
)
from optlab.first_order._normalized_momentum import normalized_momentum
from optlab.first_order._normalized_momentum import scale_by_normalized_momentum

__all__ = [
  'ScaleByAdaGradNormState',
  'ScaleByDiffGradState',
  'ScaleByNormalizedMomentumState',
  'adagrad_norm',
  'diffgrad',
  'normalized_momentum',
  'scale_by_adagrad_norm',
  'scale_by_diffgrad',
  'scale_by_normalized_momentum',
]
