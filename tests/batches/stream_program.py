"""One of two processes that read a source each: PLACE PROCESS FILE."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optlab
from tests.batches.softmax import dataset
from tests.batches.softmax import losses

WIDTH, HALF, ROWS = 8, 4, 40
TX = optlab.adadagrad(0.3, optlab.norm_test(0.7), WIDTH, ROWS, multiple_of=8)
ESTIMATOR = optlab.per_example(losses, optlab.ghost_norms)


def half(process):
  """The rows of a process: its half of every eight, over and over."""
  rows = np.arange(ROWS).reshape(-1, WIDTH)
  rows = rows[:, process * HALF : (process + 1) * HALF].ravel()
  return [leaf[np.tile(rows, 20)] for leaf in dataset()]


def source(process):
  """In chunks that differ, so that the positions do."""
  x, y = half(process)
  cut = 4 + 3 * process
  return [(x[k : k + cut], y[k : k + cut]) for k in range(0, len(x), cut)]


def split():
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  return jax.NamedSharding(mesh, jax.P('data'))


def steps(stream, state, count):
  step = optlab.batches.stream_step(ESTIMATOR, TX)
  sizes = []
  for _ in range(count):
    state, _ = step(state, stream)
    sizes.append(int(optlab.batches.next_size(state)))
  return state, sizes


def start():
  return optlab.init({'w': jnp.zeros((4, 3))}, ESTIMATOR, TX)


def main(place, process, path):
  process = int(process)
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 1)
  jax.distributed.initialize(place, 2, process)
  make = lambda items: optlab.batches.stream(items, WIDTH, sharding=split())
  stream = make(source(process))
  state, sizes = steps(stream, start(), 4)
  position = stream.position()
  assert np.any(position.chunks != position.chunks[0])
  again = make(source(process))
  again.seek(position)
  ends = [steps(stream, state, 2), steps(again, state, 2)]
  first, second = (np.asarray(end.params['w']) for end, _ in ends)
  np.testing.assert_array_equal(first, second)
  np.savez(f'{path}.{process}', w=first, sizes=sizes + ends[0][1])

  with pytest.raises(ValueError, match='size must be microbatch_size=8.*got 6'):
    stream.take(6)
  with pytest.raises(ValueError, match='a position of 2 processes, got one of'):
    stream.seek(optlab.batches.StreamState(0, 0, 0, None))
  with pytest.raises(ValueError, match='the devices of all 2 processes'):
    optlab.batches.stream(source(process), WIDTH)
  # One that ends, and one that yields other shapes, stop both.
  x, y = half(process)
  short = make(iter([(x[: 8 - 2 * process], y[: 8 - 2 * process])]))
  short.take(WIDTH)
  left = 'source has ended, .*' + ('in process 1', 'with 2 examples')[process]
  for _ in range(2):
    with pytest.raises(EOFError, match=left):
      short.take(WIDTH)
  other = make([(x[:8, : 4 - process], y[:8])])
  with pytest.raises(ValueError, match='one shape and dtype in every process'):
    other.take(WIDTH)
  for opened in (stream, again, short, other):
    opened.close()


if __name__ == '__main__':
  main(*sys.argv[1:])
