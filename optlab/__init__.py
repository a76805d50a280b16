"""Functional optimization research in JAX: six method families for optax.

Here stand the names of every day; each wing (`newton`, `first_order`,
`batches`, `bilevel`, `multi_block`, `unnormalized`) exports all of its own.
"""

from optlab import batches
from optlab import bilevel
from optlab import first_order
from optlab import multi_block
from optlab import newton
from optlab import tracking
from optlab import training
from optlab import unnormalized
from optlab.aliases import adadagrad_norm
from optlab.base import Estimate
from optlab.base import GradientEstimator
from optlab.batches import adadagrad
from optlab.batches import augmented_inner_product_test
from optlab.batches import ghost_norms
from optlab.batches import grow_batch
from optlab.batches import growing_init
from optlab.batches import growing_step
from optlab.batches import host_loader
from optlab.batches import inner_product_test
from optlab.batches import norm_test
from optlab.batches import per_example
from optlab.bilevel import BilevelBatch
from optlab.bilevel import bo_rep
from optlab.bilevel import implicit
from optlab.bilevel import saba
from optlab.bilevel import soba
from optlab.bilevel import stocbio
from optlab.bilevel import unrolled
from optlab.estimators import stateless
from optlab.estimators import value_and_grad
from optlab.estimators import with_curvature
from optlab.estimators import with_storm
from optlab.first_order import adagrad_norm
from optlab.first_order import diffgrad
from optlab.first_order import normalized_momentum
from optlab.multi_block import BlockBatch
from optlab.multi_block import bsvrb
from optlab.multi_block import sample_blocks
from optlab.newton import Dense
from optlab.newton import cg
from optlab.newton import cholesky
from optlab.newton import dense
from optlab.newton import empirical_fisher
from optlab.newton import fisher
from optlab.newton import gauss_newton
from optlab.newton import gns_newton
from optlab.newton import hessian
from optlab.newton import lanczos
from optlab.newton import linear_gauss_newton
from optlab.newton import sparse_matrix
from optlab.training import ArgminResult
from optlab.training import MinimizeResult
from optlab.training import TrainState
from optlab.training import argmin
from optlab.training import init
from optlab.training import minimize
from optlab.training import report
from optlab.training import train_step
from optlab.unnormalized import NoiseBatch
from optlab.unnormalized import contrastive_divergence
from optlab.unnormalized import fit_gaussian
from optlab.unnormalized import log_partition
from optlab.unnormalized import meco
from optlab.unnormalized import nce
from optlab.unnormalized import noise_batch

__version__ = '0.1.0'

__all__ = [
  'ArgminResult',
  'BilevelBatch',
  'BlockBatch',
  'Dense',
  'Estimate',
  'GradientEstimator',
  'MinimizeResult',
  'NoiseBatch',
  'TrainState',
  'adadagrad',
  'adadagrad_norm',
  'adagrad_norm',
  'argmin',
  'augmented_inner_product_test',
  'batches',
  'bilevel',
  'bo_rep',
  'bsvrb',
  'cg',
  'cholesky',
  'contrastive_divergence',
  'dense',
  'diffgrad',
  'empirical_fisher',
  'first_order',
  'fisher',
  'fit_gaussian',
  'gauss_newton',
  'ghost_norms',
  'gns_newton',
  'grow_batch',
  'growing_init',
  'growing_step',
  'hessian',
  'host_loader',
  'implicit',
  'init',
  'inner_product_test',
  'lanczos',
  'linear_gauss_newton',
  'log_partition',
  'meco',
  'minimize',
  'multi_block',
  'nce',
  'newton',
  'noise_batch',
  'norm_test',
  'normalized_momentum',
  'per_example',
  'report',
  'saba',
  'sample_blocks',
  'soba',
  'sparse_matrix',
  'stateless',
  'stocbio',
  'tracking',
  'train_step',
  'training',
  'unnormalized',
  'unrolled',
  'value_and_grad',
  'with_curvature',
  'with_storm',
]
