"""Fixtures that the test modules share."""

import os
import pathlib

import jax
import pytest

# Two devices, so that every sharding test runs on any machine. Before the
# first use of a backend.
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_platforms', 'cpu')
# Compiling takes most of the tests' time; this takes a third off it.
jax.config.update('jax_disable_most_optimizations', True)


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
