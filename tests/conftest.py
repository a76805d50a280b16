"""Fixtures that the test modules share."""

import importlib.metadata
import os
import pathlib

import jax
import pytest

# Two devices, so that every sharding test runs on any machine. Before the
# first use of a backend.
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_platforms', 'cpu')

# Compiling takes most of the tests' time. These take more than half off it,
# here and in the programs that tests start: no slow passes, no threads beside
# those of the test workers, and the plainer emitter of loops, where there is a
# choice; a flag that the library does not know would end the process.
jax.config.update('jax_disable_most_optimizations', True)
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'true'
flags = '--xla_cpu_parallel_codegen_split_count=1'
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  flags += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'


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
