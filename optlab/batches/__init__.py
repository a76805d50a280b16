"""Batches that grow: per-example moments, tests, growth, data."""

from optlab.batches._adadagrad import adadagrad
from optlab.batches._ghost import ghost_norms
from optlab.batches._ghost import ghost_sq_norms
from optlab.batches._growing import EpochState
from optlab.batches._growing import GrowingState
from optlab.batches._growing import growing_init
from optlab.batches._growing import growing_specs
from optlab.batches._growing import growing_step
from optlab.batches._growth import GrowBatchInfo
from optlab.batches._growth import GrowBatchState
from optlab.batches._growth import grow_batch
from optlab.batches._growth import next_size
from optlab.batches._host_loader import HostLoader
from optlab.batches._host_loader import LoaderState
from optlab.batches._host_loader import bucket_sizes
from optlab.batches._host_loader import host_loader
from optlab.batches._independence import check_losses
from optlab.batches._local import local_step
from optlab.batches._losses import Losses
from optlab.batches._moments import InnerProducts
from optlab.batches._moments import Moments
from optlab.batches._moments import Route
from optlab.batches._noise_scale import NoiseScaleInfo
from optlab.batches._noise_scale import NoiseScaleState
from optlab.batches._noise_scale import noise_scale
from optlab.batches._noise_scale import size_schedule
from optlab.batches._per_example import per_example
from optlab.batches._rates import BatchRate
from optlab.batches._rates import BatchRateState
from optlab.batches._rates import batch_learning_rate
from optlab.batches._reader import StreamState
from optlab.batches._rest import Rest
from optlab.batches._rest import drop
from optlab.batches._rest import keep
from optlab.batches._rest import wrap
from optlab.batches._routes import jvp_inner_products
from optlab.batches._routes import microbatch_means
from optlab.batches._routes import plain_grads
from optlab.batches._routes import vmap_grads
from optlab.batches._routes import vmap_inner_products
from optlab.batches._statistics import AveragesState
from optlab.batches._statistics import Test
from optlab.batches._stream import Stream
from optlab.batches._stream import stream
from optlab.batches._stream_step import stream_step
from optlab.batches._tests import augmented_inner_product_test
from optlab.batches._tests import coordinate_norm_test
from optlab.batches._tests import inner_product_test
from optlab.batches._tests import norm_test
from optlab.batches._windows import PaddedBatch
from optlab.batches._windows import ResidentBatch

__all__ = [
  'AveragesState',
  'BatchRate',
  'BatchRateState',
  'EpochState',
  'GrowBatchInfo',
  'GrowBatchState',
  'GrowingState',
  'HostLoader',
  'InnerProducts',
  'LoaderState',
  'Losses',
  'Moments',
  'NoiseScaleInfo',
  'NoiseScaleState',
  'PaddedBatch',
  'ResidentBatch',
  'Rest',
  'Route',
  'Stream',
  'StreamState',
  'Test',
  'adadagrad',
  'augmented_inner_product_test',
  'batch_learning_rate',
  'bucket_sizes',
  'check_losses',
  'coordinate_norm_test',
  'drop',
  'ghost_norms',
  'ghost_sq_norms',
  'grow_batch',
  'growing_init',
  'growing_specs',
  'growing_step',
  'host_loader',
  'inner_product_test',
  'jvp_inner_products',
  'keep',
  'local_step',
  'microbatch_means',
  'next_size',
  'noise_scale',
  'norm_test',
  'per_example',
  'plain_grads',
  'size_schedule',
  'stream',
  'stream_step',
  'vmap_grads',
  'vmap_inner_products',
  'wrap',
]
