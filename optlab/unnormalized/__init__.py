"""Unnormalized models: MECO and its peers, noise, scores."""

from optlab.unnormalized._conditional import conditional_batch
from optlab.unnormalized._contrastive import ContrastiveDivergenceInfo
from optlab.unnormalized._contrastive import ContrastiveDivergenceState
from optlab.unnormalized._contrastive import contrastive_divergence
from optlab.unnormalized._coverage import Coverage
from optlab.unnormalized._discrete import Bernoulli
from optlab.unnormalized._discrete import Categorical
from optlab.unnormalized._discrete import Product
from optlab.unnormalized._discrete import bernoulli
from optlab.unnormalized._discrete import categorical
from optlab.unnormalized._discrete import product
from optlab.unnormalized._discrete_samplers import discrete_langevin_sampler
from optlab.unnormalized._discrete_samplers import gibbs_sampler
from optlab.unnormalized._flow import Flow
from optlab.unnormalized._flow import fit_flow
from optlab.unnormalized._flow import init_flow
from optlab.unnormalized._follow import follow
from optlab.unnormalized._grid import GridLogPartition
from optlab.unnormalized._grid import grid_log_partition
from optlab.unnormalized._kernels import hmc_sampler
from optlab.unnormalized._kernels import kernel_sampler
from optlab.unnormalized._langevin import LangevinResult
from optlab.unnormalized._langevin import langevin
from optlab.unnormalized._learned_normalizer import NceParams
from optlab.unnormalized._learned_normalizer import with_log_normalizer
from optlab.unnormalized._likelihood import LogDensity
from optlab.unnormalized._log_partition import LogPartition
from optlab.unnormalized._log_partition import agree
from optlab.unnormalized._log_partition import log_partition
from optlab.unnormalized._meco import MecoInfo
from optlab.unnormalized._meco import MecoState
from optlab.unnormalized._meco import meco
from optlab.unnormalized._nce import NceInfo
from optlab.unnormalized._nce import NceState
from optlab.unnormalized._nce import ence
from optlab.unnormalized._nce import nce
from optlab.unnormalized._noise import Gaussian
from optlab.unnormalized._noise import GaussianMixture
from optlab.unnormalized._noise import fit_gaussian
from optlab.unnormalized._noise import gaussian
from optlab.unnormalized._noise import gaussian_mixture
from optlab.unnormalized._noise import lattice
from optlab.unnormalized._noise_batch import Adapted
from optlab.unnormalized._noise_batch import Noise
from optlab.unnormalized._noise_batch import NoiseBatch
from optlab.unnormalized._noise_batch import noise_batch
from optlab.unnormalized._noise_mixture import Mixture
from optlab.unnormalized._noise_mixture import defensive
from optlab.unnormalized._noise_mixture import mixture
from optlab.unnormalized._samplers import Moved
from optlab.unnormalized._samplers import Sampler
from optlab.unnormalized._samplers import langevin_sampler
from optlab.unnormalized._score_matching import DenoisingScoreMatchingInfo
from optlab.unnormalized._score_matching import DenoisingScoreMatchingState
from optlab.unnormalized._score_matching import denoising_score_matching
from optlab.unnormalized._tempered import tempered_smc

__all__ = [
  'Adapted',
  'Bernoulli',
  'Categorical',
  'ContrastiveDivergenceInfo',
  'ContrastiveDivergenceState',
  'Coverage',
  'DenoisingScoreMatchingInfo',
  'DenoisingScoreMatchingState',
  'Flow',
  'Gaussian',
  'GaussianMixture',
  'GridLogPartition',
  'LangevinResult',
  'LogDensity',
  'LogPartition',
  'MecoInfo',
  'MecoState',
  'Mixture',
  'Moved',
  'NceInfo',
  'NceParams',
  'NceState',
  'Noise',
  'NoiseBatch',
  'Product',
  'Sampler',
  'agree',
  'bernoulli',
  'categorical',
  'conditional_batch',
  'contrastive_divergence',
  'defensive',
  'denoising_score_matching',
  'discrete_langevin_sampler',
  'ence',
  'fit_flow',
  'fit_gaussian',
  'follow',
  'gaussian',
  'gaussian_mixture',
  'gibbs_sampler',
  'grid_log_partition',
  'hmc_sampler',
  'init_flow',
  'kernel_sampler',
  'langevin',
  'langevin_sampler',
  'lattice',
  'log_partition',
  'meco',
  'mixture',
  'nce',
  'noise_batch',
  'product',
  'tempered_smc',
  'with_log_normalizer',
]
