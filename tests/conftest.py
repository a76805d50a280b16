"""Fixtures that the test modules share."""

import os
import pathlib

# Compiling takes most of the tests' time. These take two thirds off it, here
# and in the programs that tests start: no slow passes, the older and plainer
# emitter of loops, no threads beside those of the test workers.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'true'
os.environ['XLA_FLAGS'] = ' '.join([
  os.environ.get('XLA_FLAGS', ''),
  '--xla_cpu_use_fusion_emitters=false',
  '--xla_cpu_parallel_codegen_split_count=1',
])

import jax
import pytest

# Two devices, so that every sharding test runs on any machine. Before the
# first use of a backend.
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_platforms', 'cpu')


@pytest.fixture
def x64():
  """Runs the test in float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def data_dir():
  """Folder of real data sets, named by the environment variable OPTLAB_DATA."""
  path = os.environ.get('OPTLAB_DATA')
  if not path:
    pytest.skip('OPTLAB_DATA is unset: it names a folder with libsvm/, mnist/')
  return pathlib.Path(path)
