"""Batches from sources that are read forward, and steps in parts of a batch."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optlab
from tests.batches.softmax import N
from tests.batches.softmax import dataset
from tests.batches.softmax import losses


class Loader:
  """Batches of 7 in an order of their own, as a loader of another library."""

  def __init__(self, orders, state=None):
    self.orders, self.state = orders, state

  def __iter__(self):
    x, y = dataset()
    for order in self.orders:
      for k in range(0, len(order), 7):
        rows = order[k : k + 7]
        yield x[rows], y[rows]


class Positioned(Loader):
  """The same with the state of grain's iterators."""

  def __iter__(self):
    return Iterator(list(super().__iter__()))


class Iterator:
  def __init__(self, items):
    self.items, self.place, self.read = items, 0, 0

  def __iter__(self):
    return self

  def __next__(self):
    if self.place == len(self.items):
      raise StopIteration
    self.place, self.read = self.place + 1, self.read + 1
    return self.items[self.place - 1]

  def get_state(self):
    return {'place': self.place}

  def set_state(self, state):
    self.place = state['place']


TX = optlab.adadagrad(0.3, optlab.norm_test(0.7), 6, N)
PARAMS = {'w': np.zeros((4, 3), np.float32)}


def start(estimator, tx=TX):
  return optlab.init(jax.tree.map(jnp.asarray, PARAMS), estimator, tx)


@pytest.mark.parametrize('route', ['ghost_norms', 'vmap_grads'])
def test_a_stream_takes_the_steps_of_the_resident_loop(route):
  """The same examples in the same order, in two programs for all sizes."""
  traced = []

  def counted(params, batch):
    traced.append(1)
    return losses(params, batch)

  estimator = optlab.per_example(
    counted, getattr(optlab.batches, route), microbatch_size=8
  )
  data = jax.tree.map(jnp.asarray, dataset())
  resident = optlab.growing_init(
    start(estimator).params, estimator, TX, data, jax.random.key(0)
  )
  step = jax.jit(optlab.growing_step(estimator, TX))
  begin, states = resident.epochs.order, []
  orders = [begin]
  for _ in range(12):
    epoch = resident.epochs.epoch
    resident, value = step(resident, data)
    states.append((value, int(optlab.batches.next_size(resident))))
    if resident.epochs.epoch > epoch:
      orders.append(resident.epochs.order)
  state = start(estimator)
  stream = optlab.batches.stream(Loader(np.asarray(orders)), 8)
  streamed = optlab.batches.stream_step(estimator, TX)
  assert states[-1][1] == N
  for k, (value, size) in enumerate(states):
    state, found = streamed(state, stream)
    np.testing.assert_allclose(found, value, 1e-5)
    assert int(optlab.batches.next_size(state)) == size
    if k == 1:
      before = len(traced)
  assert len(traced) == before
  ones = optlab.batches.stream(Loader(np.asarray(orders)), 1)
  alone, _ = streamed(start(estimator), ones)
  assert int(optlab.batches.next_size(alone)) == states[0][1]
  ones.close()
  np.testing.assert_allclose(
    state.params['w'], resident.train.params['w'], 1e-4, 1e-6
  )
  stream.close()


def test_parts_merge_to_the_whole_batch():
  """All moments, auxiliary output and the model state; keys move on."""

  def full(params, count, batch, keys):
    noise = jax.vmap(jax.random.normal)(keys)
    rows = len(batch[1])
    return losses(params, batch), (count + rows, (batch[0], noise))

  estimator = optlab.per_example(
    full, optlab.batches.vmap_grads, layers=True, has_aux=True, has_state=True,
    has_key=True,
  )  # fmt: skip
  plain = optlab.per_example(losses, layers=True)
  kept = []

  def watch(updates, state, params=None, **extras):
    del params
    return updates, {
      name: extras[name] for name in state if name != 'grads'
    } | {'grads': updates}

  expected, _ = plain.estimate(PARAMS, (), dataset())
  names = ('sum_sq_diff_grads', 'sum_sq_diff_norms', 'sum_sq_diff_norm')
  like = {name: expected.extras[name] for name in (*names, 'sample_size')}
  like['grads'] = expected.grads
  tx = optax.GradientTransformationExtraArgs(lambda params: like, watch)
  state = optlab.init(PARAMS, estimator, tx, jnp.int32(0), jax.random.key(0))
  step = optlab.batches.stream_step(estimator, tx, batch_size=N)
  for _ in range(2):
    stream = optlab.batches.stream([dataset()], 16, prefetch=0)
    after, (value, (x, noise)) = step(state._replace(params=PARAMS), stream)
    kept.append(float(noise))
    for name, leaf in like.items():
      for a, b in zip(
        *map(jax.tree.leaves, (after.opt_state[name], leaf)), strict=True
      ):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6)
    np.testing.assert_allclose(value, expected.value, 1e-6)
    np.testing.assert_allclose(x, dataset()[0].mean(0), 1e-5, 1e-6)
    state = after
  assert kept[0] != kept[1]
  assert state.estimator_state.step == 2
  assert state.estimator_state.model_state == 2 * N  # Each example once.


@pytest.mark.parametrize('prefetch', [0, 3])
@pytest.mark.parametrize('kind', [Loader, Positioned])
def test_a_stream_goes_on_where_a_checkpoint_was(kind, prefetch, tmp_path):
  orders = np.arange(N)[None]
  make = lambda: optlab.batches.stream(kind(orders), 16, prefetch=prefetch)
  stream = make()
  seen = [stream.take(n) for n in (16, 9, 3, 11, 16)]
  assert np.all(seen[-1].examples[0][1:] == dataset()[0][:15])
  first = stream.position()
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'stream', first._asdict())
    checkpointer.wait_until_finished()
    place = checkpointer.restore(tmp_path / 'stream', first._asdict())
  again = make()
  again.seek(optlab.batches.StreamState(**place))
  assert again.position() == first
  for n in (13, 16, 2):
    for a, b in zip(
      *map(jax.tree.leaves, (stream.take(n), again.take(n))), strict=True
    ):
      np.testing.assert_array_equal(a, b)
  # Back to the beginning, in the same stream.
  stream.seek(make().position())
  np.testing.assert_array_equal(
    stream.take(16).examples[0], seen[0].examples[0]
  )
  stream.close()
  again.close()


def test_a_position_of_the_source_is_used_and_not_read_again():
  source = Positioned(np.tile(np.arange(N), (50, 1)))
  stream = optlab.batches.stream(source, 16, prefetch=0)
  stream.seek(optlab.batches.StreamState(0, 200, 3, {'place': 200}))
  stream.take(5)
  assert stream.position().source == {'place': 201}
  assert stream.position()[:3] == (0, 201, 1)


def test_single_examples_lists_and_generators():
  x, y = dataset()
  singles = optlab.batches.stream(
    list(zip(x, y, strict=True)), 8, batched=False
  )
  for k in range(7):  # Twice around.
    batch = singles.take(8)
    rows = np.arange(8 * k, 8 * k + 8) % N
    np.testing.assert_array_equal(batch.examples[0], x[rows])
    assert batch.examples[1].dtype == y.dtype
  singles.close()
  ends = optlab.batches.stream(iter([x, x[:3]]), 64)
  with pytest.raises(EOFError, match='with 43 examples left of 50: take'):
    ends.take(50)
  assert ends.take(43).size == 43
  with pytest.raises(EOFError, match='with 0 examples left of 1'):
    ends.take(1)
  with pytest.raises(ValueError, match='source must be new.*make it'):
    ends.seek(ends.position())
  ends.close()


def test_a_source_that_ends_leaves_the_state():
  estimator = optlab.per_example(losses, optlab.ghost_norms)
  stream = optlab.batches.stream(iter([dataset()]), 16)
  step = optlab.batches.stream_step(estimator, optax.sgd(0.1), batch_size=30)
  state = start(estimator, optax.sgd(0.1))
  state, _ = step(state, stream)
  kept = np.asarray(state.params['w'])
  with pytest.raises(EOFError):
    step(state, stream)
  np.testing.assert_array_equal(state.params['w'], kept)
  stream.close()


@pytest.mark.parametrize('prefetch', [0, 2])
def test_bad_examples_are_named_and_the_rest_goes_on(prefetch):
  good = {'x': np.ones((3, 2), np.float32)}
  nan = {'x': np.full((3, 2), np.nan, np.float32)}
  wide = {'x': np.ones((3, 3), np.float32)}
  double = {'x': np.ones((3, 2))}
  for bad, match in (
    (nan, r"finite numbers, got others in item 1 of pass 0\['x'\]: leave"),
    (wide, r'one shape and dtype.*got .*item 1 of pass 0'),
    (double, r'one shape and dtype.*float64.*item 1 of pass 0'),
    ((good['x'],), 'one shape and dtype'),
    ({'x': np.float32(1.0)}, 'source.*item 1 of.*examples on its leading axis'),
    (
      {'x': np.ones((0, 2), np.float32)},
      'source.*item 1 of.*at least one exam',
    ),
  ):
    stream = optlab.batches.stream([good, bad, good], 3, prefetch=prefetch)
    stream.take(3)
    with pytest.raises(ValueError, match=match):
      stream.take(3)
    assert stream.take(3).size == 3
    stream.close()
  # What a device without 64 bits would make of a number counts.
  for item, match in (
    (np.array([1.0, 1e300]), 'finite numbers, got others in item 0'),
    (np.array([1, 2**40]), 'integers within int32, got others in item 0'),
    (np.array([1, None]), 'numbers, got object in item 0'),
    (np.array(['a', 'b']), 'numbers, got <U1 in item 0'),
    (np.ma.masked_array([1.0, 2.0], [False, True]), 'got a masked one'),
  ):
    stream = optlab.batches.stream([item], 2, prefetch=prefetch)
    with pytest.raises(ValueError, match=match):
      stream.take(2)
    stream.close()
  # A place that the source does not have any more.
  stream = optlab.batches.stream([good, good], 3, prefetch=prefetch)
  gone = stream.position()._replace(chunks=5)
  with pytest.raises(ValueError, match='source must have the item 5 of pass 0'):
    stream.seek(gone)
  with pytest.raises(ValueError, match='state must be a position.*offset=-1'):
    stream.seek(gone._replace(chunks=0, offset=-1))
  with pytest.raises(TypeError, match='state must be a StreamState.*got 5'):
    stream.seek(5)
  with pytest.raises(TypeError, match='size must be known on the host'):
    jax.jit(stream.take)(2)
  stream.close()
  with pytest.raises(ValueError, match='stream is closed'):
    stream.take(3)
  stream = optlab.batches.stream([good, nan], 6, finite=False)
  assert np.isnan(stream.take(6).examples['x']).sum() == 6
  stream.close()


def test_it_reads_ahead():
  read = []

  def source():
    for k in range(9):
      read.append(k)
      yield np.full(4, k)

  stream = optlab.batches.stream(source(), 4, prefetch=3)
  stream.take(4)
  end = time.monotonic() + 10
  while len(read) < 4 and time.monotonic() < end:
    time.sleep(0.01)
  assert read == [0, 1, 2, 3]
  stream.close()


def test_microbatches_over_two_devices():
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  split = jax.NamedSharding(mesh, jax.P('data'))
  estimator = optlab.per_example(losses, optlab.ghost_norms)
  step = optlab.batches.stream_step(estimator, TX)
  ends = []
  for sharding in (None, split):
    stream = optlab.batches.stream([dataset()], 10, sharding=sharding)
    assert sharding is None or stream.take(7).examples[0].sharding == split
    stream.seek(optlab.batches.StreamState(0, 0, 0, None))
    state = start(estimator)
    for _ in range(4):
      state, _ = step(state, stream)
    ends.append(state)
    stream.close()
  np.testing.assert_allclose(*(end.params['w'] for end in ends), 1e-5, 1e-6)
  with pytest.raises(ValueError, match='multiple of the devices.*got 9'):
    optlab.batches.stream([dataset()], 9, sharding=split)
