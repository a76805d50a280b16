"""The growing loop and the host loader: sizes, epochs, restarts, shards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optlab
from optlab.batches import _layout
from tests.batches.softmax import N
from tests.batches.softmax import dataset
from tests.batches.softmax import losses

PARAMS = {'w': np.zeros((4, 3), np.float32)}
GROWING = optlab.adadagrad(0.3, optlab.norm_test(0.7), 6, N)
ESTIMATOR = optlab.per_example(losses, optlab.ghost_norms, microbatch_size=4)


def start(tx=GROWING, estimator=ESTIMATOR, seed=0, **kwargs):
  params = jax.tree.map(jnp.asarray, PARAMS)
  data = jax.tree.map(jnp.asarray, dataset())
  state = optlab.growing_init(
    params, estimator, tx, data, jax.random.key(seed), **kwargs
  )
  return state, data


def read(state):
  return int(optlab.batches.next_size(state))


def equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(x, y)


def test_one_program_from_the_first_size_to_all():
  """It takes the steps of plain batches gathered by hand."""
  state, data = start()
  step = jax.jit(
    optlab.growing_step(ESTIMATOR, GROWING, rest=optlab.batches.keep),
    donate_argnums=0,
  )
  plain = optlab.per_example(losses, optlab.batches.vmap_grads)
  by_hand = jax.jit(optlab.train_step(plain, GROWING))
  expected = optlab.init(jax.tree.map(jnp.asarray, PARAMS), plain, GROWING)
  sizes, seen = [], []
  for _ in range(12):
    size = min(read(state), N - int(state.epochs.position))
    first = int(state.epochs.position)
    rows = np.asarray(state.epochs.order)[first : first + size]
    epoch = int(state.epochs.epoch)
    state, value = step(state, data)
    sizes.append(size)
    seen.append((epoch, rows))
    expected, expected_value = by_hand(
      expected, jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert read(state) == read(expected)
  np.testing.assert_allclose(
    state.train.params['w'], expected.params['w'], rtol=1e-4, atol=1e-6
  )
  assert step._cache_size() == 1
  assert sizes[0] == 6
  assert max(sizes) == N
  # Every epoch passes over every example once, in another order each.
  for epoch in range(seen[-1][0]):
    rows = np.concatenate([rows for e, rows in seen if e == epoch])
    np.testing.assert_array_equal(np.sort(rows), np.arange(N))
  first, second = (
    np.concatenate([rows for e, rows in seen if e == k]) for k in (0, 1)
  )
  assert not np.array_equal(first, second)


def test_constant_sizes_share_the_program():
  tx = optax.sgd(0.1)
  state, data = start(tx)

  @jax.jit
  def two_steps(size):
    step = optlab.growing_step(ESTIMATOR, tx, batch_size=size)
    return step(step(state, data)[0], data)[0].epochs

  pairs = (3, 6), (20, 0), (30, 20), (50, 0), (0, 2), (-3, 2)
  for size, position in pairs:
    epochs = two_steps(jnp.int32(size))
    # 30, the 10 that are left with 20 of the next epoch; what is more than
    # the data is all of them, what is less than one example one.
    assert epochs.position == position
  assert two_steps._cache_size() == 1
  with pytest.raises(ValueError, match='needs a batch size'):
    optlab.growing_step(ESTIMATOR, tx)(state, data)


SIZES = (4, 3, 11, 5, 9, 11, 2, 10, 8, 1, 7, 11, 6, 3)


def counts_of(rest, sizes=SIZES, length=11, seeds=2):
  """How often each batch has each example; a run with one program a rule."""
  estimator = optlab.per_example(
    lambda x, rows: (rows @ x, rows),
    optlab.batches.plain_grads,
    microbatch_size=4,
    has_aux=True,
  )
  tx, data = optax.sgd(0.1), jnp.eye(length)

  def run(key):
    state = optlab.growing_init(jnp.zeros(length), estimator, tx, data, key)

    def body(state, size):
      step = optlab.growing_step(estimator, tx, batch_size=size, rest=rest)
      before = state.epochs
      state, (_, share) = step(state, data)
      moved = length * (state.epochs.epoch - before.epoch)
      return state, (share, moved + state.epochs.position - before.position)

    return jax.lax.scan(body, state, jnp.asarray(sizes))[1]

  keys = jax.random.split(jax.random.key(0), seeds)
  shares, moved = jax.jit(jax.vmap(run))(keys)
  seen = [[np.round(s / s[s > 0].min()) for s in lane] for lane in shares]
  return np.array(seen), np.asarray(moved)


def test_a_batch_that_wraps_takes_every_example_equally_often():
  seen, moved = counts_of(optlab.batches.wrap)
  np.testing.assert_array_equal(seen.sum(-1), np.tile(SIZES, (2, 1)))
  np.testing.assert_array_equal(moved, np.tile(SIZES, (2, 1)))
  # Of no batch twice; of no two examples one more than once more often.
  assert seen.max() == 1
  total = seen.cumsum(1)
  assert np.all(total.max(-1) - total.min(-1) <= 1)
  assert not np.array_equal(*seen)


def test_a_rest_that_is_kept_or_dropped():
  seen, moved = counts_of(optlab.batches.keep)
  sizes = [4, 3, 4, 5, 6, 11, 2, 9, 8, 1, 2, 11, 6, 3]
  np.testing.assert_array_equal(seen.sum(-1), [sizes, sizes])
  np.testing.assert_array_equal(moved, [sizes, sizes])
  ends = np.flatnonzero(np.cumsum(sizes) % 11 == 0)
  np.testing.assert_array_equal(
    seen.cumsum(1)[:, ends], np.tile(np.arange(1, 7)[:, None], (2, 1, 11))
  )
  seen, moved = counts_of(optlab.batches.drop)
  np.testing.assert_array_equal(seen.sum(-1), np.tile(SIZES, (2, 1)))
  assert seen.max() == 1
  np.testing.assert_array_equal(
    moved[0] - SIZES, [0, 0, 4, 0, 6, 2, 0, 9, 1, 0, 2, 4, 0, 0]
  )
  # 101 examples at batch 10: never one alone at the full rate.
  for rest in (optlab.batches.wrap, optlab.batches.drop):
    seen, _ = counts_of(rest, (10,) * 12, 101, 1)
    assert np.all(seen.sum(-1) == 10)


def test_data_of_numpy_may_be_constants():
  tx = optax.sgd(0.1)
  state, data = start(tx)
  step = optlab.growing_step(ESTIMATOR, tx, batch_size=6)
  np.testing.assert_array_equal(
    jax.jit(lambda state: step(state, dataset()))(state)[1],
    jax.jit(step)(state, data)[1],
  )


def test_a_rule_of_the_rest_says_two_numbers():
  state, data = start(optax.sgd(0.1))
  loader = optlab.host_loader(lambda rows: rows, 5, (2,), rest=lambda s, n: s)
  step = optlab.growing_step(
    ESTIMATOR, optax.sgd(0.1), batch_size=2, rest=lambda size, left: [size]
  )
  for run in (
    lambda: loader.take(loader.init(0), 2),
    lambda: jax.eval_shape(step, state, data),
  ):
    with pytest.raises(TypeError, match=r'rest must return .*\(taken, skipped'):
      run()


def test_seeds_under_vmap_are_the_seeds_alone():
  state, data = start()
  keys = jax.random.split(jax.random.key(3), 2)
  states = jax.vmap(
    lambda key: optlab.growing_init(
      state.train.params, ESTIMATOR, GROWING, data, key
    )
  )(keys)
  step = optlab.growing_step(ESTIMATOR, GROWING)

  def run(state):
    return jax.lax.scan(lambda s, _: step(s, data), state, length=8)

  together, values = jax.jit(jax.vmap(run))(states)
  alone = jax.jit(run)
  for i in range(2):
    last, expected = alone(jax.tree.map(lambda leaf, i=i: leaf[i], states))
    np.testing.assert_allclose(values[i], expected, rtol=1e-5)
    assert together.epochs.position[i] == last.epochs.position
    np.testing.assert_array_equal(together.epochs.order[i], last.epochs.order)


def test_resumes_bit_for_bit(tmp_path):
  """In the middle of an epoch, with its key and permutation."""
  state, data = start()
  step = jax.jit(optlab.growing_step(ESTIMATOR, GROWING))
  for _ in range(3):
    state, _ = step(state, data)
  assert 0 < state.epochs.position < N
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'state', start()[0])
  for _ in range(6):
    state, _ = step(state, data)
    restored, _ = step(restored, data)
  equal(restored, state)


def test_over_two_devices_the_union_of_their_windows():
  """Each device takes half of the batch from its own half of the data."""
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  tx = optlab.adadagrad(0.3, optlab.norm_test(0.7), 6, N, multiple_of=2)
  estimator = optlab.per_example(
    losses, optlab.ghost_norms, microbatch_size=4, axis_name='data'
  )
  state, data = start(tx, estimator, num_shards=2)
  specs = optlab.batches.growing_specs('data')
  traces = []

  def counted(*args):
    traces.append(1)
    return optlab.growing_step(estimator, tx, axis_name='data')(*args)

  step = jax.jit(
    jax.shard_map(
      counted,
      mesh=mesh,
      in_specs=(specs, jax.P('data')),
      out_specs=(specs, jax.P()),
    )
  )
  plain = optlab.per_example(losses, optlab.ghost_norms)
  by_hand = jax.jit(optlab.train_step(plain, tx))
  expected = optlab.init(state.train.params, plain, tx)
  place = lambda spec: jax.NamedSharding(mesh, spec)
  state = jax.device_put(state, jax.tree.map(place, specs))
  data = jax.device_put(data, place(jax.P('data')))
  sizes, wrapped = [], False
  for _ in range(6):
    first, half = int(state.epochs.position), read(state) // 2
    before = np.asarray(state.epochs.order).reshape(2, N // 2)
    state, value = step(state, data)
    after = np.asarray(state.epochs.order).reshape(2, N // 2)
    rows = np.concatenate(
      [
        shard * N // 2 + rows
        for shard in range(2)
        for rows in (
          before[shard][first : first + half],
          after[shard][: max(first + half - N // 2, 0)],
        )
      ]
    )
    sizes.append(len(set(rows)))
    wrapped |= first + half > N // 2
    expected, expected_value = by_hand(
      expected, jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert read(state) == read(expected)
    assert read(state) % 2 == 0
  assert sizes[0] == 6
  assert sizes[-1] > 6
  assert wrapped
  assert len(traces) == 1


@pytest.mark.parametrize('length', [N - 8, 2 * N])
def test_data_of_another_length_are_an_error(length):
  state, data = start()
  other = jax.tree.map(
    lambda leaf: jnp.resize(leaf, (length, *leaf.shape[1:])), data
  )
  step = optlab.growing_step(ESTIMATOR, GROWING)
  with pytest.raises(
    ValueError, match=f'the {N} examples.*got {length}: start'
  ):
    jax.eval_shape(step, state, other)


def test_bad_input_of_the_loop():
  big = optlab.adadagrad(0.1, optlab.norm_test(0.5), 8, N + 1)
  with pytest.raises(
    ValueError, match='max_batch_size must be at most the 40 examples.*got 41'
  ):
    start(big)
  with pytest.raises(ValueError, match='num_shards=3, got 40.*leave out 1'):
    start(num_shards=3)
  with pytest.raises(ValueError, match='multiple of the 4 devices.*6: take 8'):
    start(num_shards=4)
  with pytest.raises(ValueError, match='at most the 40 examples.*got 41'):
    step = optlab.growing_step(ESTIMATOR, GROWING, batch_size=41)
    jax.eval_shape(step, *start())
  # The rule starts with 6 examples: one microbatch of 4, and a half.
  means = optlab.per_example(
    losses, optlab.batches.microbatch_means, microbatch_size=4
  )
  with pytest.raises(ValueError, match='at least two microbatches.*got 6'):
    start(estimator=means)
  whole = optlab.per_example(losses, optlab.ghost_norms)
  with pytest.raises(
    ValueError, match='microbatch_size to read a ResidentBatch'
  ):
    start(estimator=whole)


def host_run(steps, checkpoint=None, tmp_path=None):
  """Trains from the host; optionally through a checkpoint after a few steps."""
  x, y = dataset()
  buckets = optlab.batches.bucket_sizes(6, N)
  loader = optlab.host_loader(lambda rows: (x[rows], y[rows]), N, buckets)
  step = jax.jit(optlab.train_step(ESTIMATOR, GROWING))
  train = optlab.init(jax.tree.map(jnp.asarray, PARAMS), ESTIMATOR, GROWING)
  state = (train, loader.init(0))
  sizes = []
  for i in range(steps):
    if i == checkpoint:
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'host', state)
        checkpointer.wait_until_finished()
        fresh = optlab.init(train.params, ESTIMATOR, GROWING)
        state = checkpointer.restore(tmp_path / 'host', (fresh, loader.init(7)))
      loader = optlab.host_loader(lambda rows: (x[rows], y[rows]), N, buckets)
    train, position = state
    batch, position = loader.take(
      optlab.batches.LoaderState(*position), read(train)
    )
    assert batch.examples[0].shape[0] in buckets
    sizes.append(int(batch.size))
    train, _ = step(train, batch)
    state = (train, position)
  return state, sizes, step._cache_size(), len(buckets)


def test_the_host_loader_compiles_once_a_bucket_and_restarts(tmp_path):
  state, sizes, compiled, buckets = host_run(9)
  assert 1 < compiled <= buckets
  assert sizes[0] == 6
  assert max(sizes) == N
  again, _, _, _ = host_run(9, checkpoint=3, tmp_path=tmp_path)
  equal(again, state)


@pytest.mark.parametrize('rest', ['wrap', 'keep', 'drop'])
def test_the_host_loader_passes_over_every_example_equally_often(rest):
  rule = getattr(optlab.batches, rest)
  loader = optlab.host_loader(lambda rows: rows, 11, (4, 11), rest=rule)
  seen, _ = counts_of(rule, seeds=1)
  state, counts = loader.init(1), []
  for size, alike in zip(SIZES, seen[0].sum(-1), strict=True):
    batch, state = loader.take(state, size)
    assert int(batch.size) == alike  # As the resident loop.
    rows = batch.examples[: int(batch.size)]
    counts.append(np.bincount(rows, minlength=11))
  assert np.max(counts) == 1
  total = np.cumsum(counts, 0)
  if rest != 'drop':
    assert np.all(total.max(-1) - total.min(-1) <= 1)
  np.testing.assert_array_equal(np.sort(state.order), np.arange(11))
  assert not np.array_equal(state.order, loader.init(1).order)
  # From a checkpoint: no part of a run is in the loader.
  again = optlab.host_loader(lambda rows: rows, 11, (4, 11), rest=rule)
  for a, b in zip(
    *(jax.tree.leaves(one.take(state, 9)) for one in (loader, again)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_bad_input_of_the_loader():
  with pytest.raises(TypeError, match='gather must be a function'):
    optlab.host_loader(None, N, (8,))
  with pytest.raises(ValueError, match='num_examples must be at least 1'):
    optlab.host_loader(lambda rows: rows, 0, (8,))
  for buckets in ((), (8, 8), (16, 8)):
    with pytest.raises(ValueError, match='buckets must be increasing'):
      optlab.host_loader(lambda rows: rows, N, buckets)
  loader = optlab.host_loader(lambda rows: rows, N, (8, 16))
  for size in (0, 17):
    with pytest.raises(ValueError, match='batch_size must be at '):
      loader.take(loader.init(0), size)
  with pytest.raises(ValueError, match='seed must be at least 0'):
    loader.init(-1)
  few = optlab.host_loader(lambda rows: rows[:-1], N, (8, 16))
  with pytest.raises(ValueError, match='each of the 8 indices, got 7'):
    few.take(few.init(0), 8)  # Padding would stand in the place of an example.
  other = optlab.host_loader(lambda rows: rows, N + 1, (8, 16)).init(0)
  with pytest.raises(ValueError, match='of 40 examples, got one of 41: start'):
    loader.take(other, 8)
  with pytest.raises(ValueError, match='max_batch_size must be at least 8'):
    optlab.batches.bucket_sizes(8, 4)
  assert optlab.batches.bucket_sizes(6, 50, multiple_of=4) == (
    8,
    12,
    24,
    48,
    52,
  )


@pytest.mark.parametrize(
  'kind',
  [
    jax.sharding.AxisType.Auto,
    pytest.param(jax.sharding.AxisType.Explicit, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize('route', ['ghost_norms', 'microbatch_means'])
def test_every_device_does_its_part(kind, route, tmp_path):
  """Data that jit splits: half of the work on each of two, the same numbers."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(256, 512)), jnp.float32)
  data = x, jnp.argmax(x[:, :10], 1)
  params = {'w': jnp.asarray(rng.normal(size=(512, 10)) / 22, jnp.float32)}
  estimator = optlab.per_example(
    losses, getattr(optlab.batches, route), microbatch_size=64
  )
  tx = optax.chain(
    optlab.grow_batch(optlab.norm_test(0.5), 128, 256), optax.sgd(0.1)
  )
  step = jax.jit(optlab.growing_step(estimator, tx))
  start = optlab.growing_init(params, estimator, tx, data, jax.random.key(0))
  mesh = jax.make_mesh((2,), ('data',), axis_types=(kind,))
  split = jax.device_put(data, jax.NamedSharding(mesh, jax.P('data')))
  whole = jax.NamedSharding(mesh, jax.P())
  flops = lambda *args: step.lower(*args).compile().cost_analysis()['flops']
  alone = flops(start, data)
  expected = step(step(start, data)[0], data)[0]
  with jax.set_mesh(mesh):
    spread = optlab.growing_init(
      jax.device_put(params, whole), estimator, tx, split, jax.random.key(0)
    )
    spread = jax.device_put(spread, whole)
    assert flops(spread, split) < 0.6 * alone
    state, _ = step(spread, split)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / 'state', state)
      checkpointer.wait_until_finished()
      state = checkpointer.restore(tmp_path / 'state', spread)
    state, _ = step(state, split)
  assert state.epochs.layout == spread.epochs.layout
  np.testing.assert_allclose(
    state.train.params['w'], expected.train.params['w'], 1e-5, 1e-6
  )
  assert read(state) == read(expected)


@pytest.mark.parametrize(
  'impl, kind', [('threefry2x32', 0), ('threefry2x32', 1), ('rbg', 0)]
)
def test_the_permutation_is_that_of_jax(impl, kind):
  """Also where the devices draw its bits together."""
  key = jax.random.key(5, impl=impl)
  kind = list(jax.sharding.AxisType)[kind]
  mesh = jax.make_mesh((2,), ('data',), axis_types=(kind,))
  rows = jax.device_put(
    jnp.zeros((96, 3)), jax.NamedSharding(mesh, jax.P('data'))
  )
  layout = _layout.layout_of(rows)
  with jax.set_mesh(mesh):
    draw = jax.jit(lambda *args: _layout.permutation(args[0], 96, *args[1:]))
    found = draw(
      jax.device_put(key, jax.NamedSharding(mesh, jax.P())), rows, layout
    )
  np.testing.assert_array_equal(found, jax.random.permutation(key, 96))
