"""Fixtures that the test modules share."""

import functools
import gc
import importlib.metadata
import os
import pathlib
import shutil

import jax
from jax._src.interpreters import mlir
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

# And what took a while to compile is kept: for the other workers, for the
# programs that tests start, for the next run. Its name holds all that it was
# made from.
CACHE = pathlib.Path(__file__).parent.parent / '.jax_cache'
jax.config.update(
  'jax_compilation_cache_dir',
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE)),
)
for name, value in (
  ('jax_persistent_cache_min_compile_time_secs', 0.05),
  ('jax_persistent_cache_min_entry_size_bytes', -1),
):
  os.environ[name.upper()] = str(value)
  jax.config.update(name, value)


# A new context of MLIR for each program takes longer than to compile a small
# one. The tests of a file share one, where the library has this function.
shared_context = functools.cache(getattr(mlir, 'make_ir_context', int))
mlir.make_ir_context = shared_context

# A user's program for the type checkers; as a module with doctests it would run
# in every worker.
collect_ignore = ['typing/user.py']


def pytest_configure(config):
  """Empties the store when it is large; what is old in it has no reader."""
  size = sum(entry.stat().st_size for entry in CACHE.glob('*'))
  if size > 2**30 and not hasattr(config, 'workerinput'):
    shutil.rmtree(CACHE)


def pytest_collection_modifyitems(items):
  """One worker runs all tests of a file, which share what is compiled."""
  for item in items:
    if not item.get_closest_marker('xdist_group'):
      file = item.nodeid.partition('::')[0]
      item.add_marker(pytest.mark.xdist_group(file))


def pytest_collection_finish():
  """What lives as long as the tests is not looked at again by the collector."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


def pytest_runtest_teardown(item, nextitem):
  """The same after each file: what its tests compiled stays until the end."""
  if nextitem is not None and nextitem.path != item.path:
    shared_context.cache_clear()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_precision():
  """A test that sets the precision of its process gives it back."""
  before = jax.config.jax_enable_x64
  yield
  jax.config.update('jax_enable_x64', before)


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
