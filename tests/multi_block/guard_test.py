"""No block can ruin a run: growth, stiffness, bad data; who it was is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

BLOCKS, SAMPLED, STIFF = 20, 5, 7
METHODS = {
  'v2': optlab.bsvrb,
  'v1': functools.partial(
    optlab.bsvrb, dual=optlab.multi_block.track_hessians(0.5)
  ),
  'rsvrb': optlab.multi_block.rsvrb,
}
over_methods = pytest.mark.parametrize('name', METHODS)
# Where the three share what is tested.
over_one_and_more = pytest.mark.parametrize(
  'name',
  ['v2', *(pytest.param(n, marks=pytest.mark.slow) for n in ('v1', 'rsvrb'))],
)


def upper(x, y, batch):
  return 0.5 * jnp.sum((y - 1.0) ** 2)


def quadratic(x, y, curvature):
  return 0.5 * jnp.sum(curvature * (y - x) ** 2)


def run(
  name, lower, data, *, steps=1500, start=0.5, dtype=jnp.float32, wrap=None,
  sampled=SAMPLED, lr=0.1, learning_rate=0.02, seed=0, first=None,
  make_optimizer=optax.sgd, **kwargs,
):  # fmt: skip
  """A run from x = 0, whose minimum is at x = 1; the last state and the path.

  ``data(step, blocks)`` is what the lower objective gets of each block.
  """
  make = METHODS[name]
  estimator = make(upper, lower, BLOCKS, inner_lr=lr, **kwargs)
  if wrap is not None:
    estimator = wrap(estimator)
  tx = make_optimizer(learning_rate)
  train_step = optlab.train_step(estimator, tx)
  x, inner = jnp.zeros(2, dtype), jnp.full((BLOCKS, 2), start, dtype)
  state = optlab.init(x, estimator, tx, inner)
  if first is not None:
    state = state._replace(
      estimator_state=jax.jit(estimator.init)(x, inner, first)
    )

  def step(state, index):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
    blocks = optlab.sample_blocks(keys[0], BLOCKS, sampled)
    parts = blocks, None, data(index, blocks).astype(dtype)
    batch = optlab.BlockBatch(*parts)
    if name == 'rsvrb':
      outer = optlab.sample_blocks(keys[1], BLOCKS, sampled)
      batch = optlab.multi_block.PairedBlockBatch(*parts, outer)
    state, _ = train_step(state, batch)
    return state, state.params

  return jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))(state)


def one_stiff(step, blocks):
  return jnp.where(blocks == STIFF, 100.0, 1.0)


@functools.cache
def compiled(name):
  """``(curvature, others, since, of_all) -> (state, path)`` of a method."""

  def go(curvature, others, since, of_all):
    def data(step, blocks):
      bad = (step >= since) & ((blocks == STIFF) | of_all)
      return jnp.where(bad, curvature, others)

    return run(name, quadratic, data)

  return jax.jit(go)


def run_with(name, curvature, others=1.0, since=0, of_all=False):
  """A run in which one block, or all, have another curvature from a step on."""
  return compiled(name)(curvature, others, since, of_all)


def names_the_stiff_block(state):
  named = optlab.report(state)
  return any(
    int(value) == STIFF
    for path, value in named.items()
    if path.endswith(('worst_block', 'stiffest_block'))
  )


@over_one_and_more
def test_one_stiff_block_does_not_move_x(name):
  state, path = run_with(name, 100.0)
  np.testing.assert_allclose(state.params, 1.0, atol=0.01)
  assert jnp.abs(path).max() < 2.0
  assert names_the_stiff_block(state)
  assert optlab.report(state)['estimator_state/info/slowed'] == 1


@over_one_and_more
def test_blocks_that_all_run_away_are_told(name):
  """Steps of x that are too long: no block is worse than others."""
  even = lambda step, blocks: jnp.ones(blocks.shape)
  state, path = run(name, quadratic, even, steps=100, lr=0.5, learning_rate=5.0)
  assert jnp.abs(path).max() > 1e6 and not state.estimator_state.info.ok


@pytest.mark.parametrize('name', ['v2', 'rsvrb'])
def test_x_that_moves_too_fast_for_the_blocks_is_told(name):
  """One block a step: they swing with x, ever farther, none by itself."""
  even = lambda step, blocks: jnp.ones(blocks.shape)
  for rate, good in ((0.003, True), (0.3, False)):
    state, path = run(
      name, quadratic, even, steps=4000, sampled=1, learning_rate=rate
    )
    info = state.estimator_state.info
    size = jnp.max(jnp.abs(state.estimator_state.inner))
    assert (jnp.abs(path[-1]).max() < 1.01) == good == info.ok
    assert not good or info.lower_lag < 0.1 * size
    assert info.total_not_ok < 10 if good else info.total_not_ok > 1000


@pytest.mark.parametrize(
  'name', ['v2', 'rsvrb', pytest.param('v1', marks=pytest.mark.slow)]
)
def test_steps_of_a_length_of_their_own_are_told(name):
  """Blocks that a step seldom looks at swing with x, and no farther."""
  even = lambda step, blocks: jnp.ones(blocks.shape)
  for make, rate, good in (
    (optax.adam, 0.001, True),
    (optax.adam, 0.1, False),
    (optax.sign_sgd, 0.1, False),
  ):
    state, path = run(
      name, quadratic, even, steps=4000, sampled=1, learning_rate=rate,
      make_optimizer=make,
    )  # fmt: skip
    info = state.estimator_state.info
    assert (jnp.abs(path[-500:] - 1).max() < 0.1) == good == info.ok
    assert (info.total_not_ok == 0) if good else info.total_not_ok > 2000


@pytest.mark.parametrize('name', ['v2', 'rsvrb'])
@pytest.mark.parametrize('sampled', [BLOCKS // 2, BLOCKS])
def test_a_cycle_of_blocks_that_are_less_than_half_behind_is_told(
  name, sampled
):
  """Curvatures of .3 to 3, all or half of the blocks in each step."""
  curvatures = jnp.geomspace(0.3, 3.0, BLOCKS)[:, None]
  for rate, good in ((0.003, True), (0.1, False)):
    state, path = run(
      name, quadratic, lambda step, blocks: curvatures[blocks], start=0.0,
      steps=1000 * BLOCKS // sampled, sampled=sampled, learning_rate=rate,
      make_optimizer=optax.adam,
    )  # fmt: skip
    info = state.estimator_state.info
    assert (jnp.abs(path[-300:] - 1).max() < 0.1) == good == info.ok
    assert (info.total_not_ok == 0) if good else info.total_not_ok > 1000


@pytest.mark.parametrize('sampled', [SAMPLED, BLOCKS])
@pytest.mark.parametrize('above', [0.0, 1.0])
def test_noise_about_zero_is_no_lag(sampled, above):
  """Where all that y is, is noise, of its own level or that of x."""

  def lower(x, y, noise):
    return 0.5 * jnp.sum((y - x - (1.0 - above) * noise) ** 2)

  def noise(step, blocks):
    key = jax.random.fold_in(jax.random.key(1), step)
    return jax.random.normal(key, (*blocks.shape, 2))

  def upper(x, y, noise):
    return 0.5 * jnp.sum((y - above * noise) ** 2)

  estimator = optlab.bsvrb(upper, lower, BLOCKS, inner_lr=0.5)
  tx = optax.sgd(0.003)
  train_step = optlab.train_step(estimator, tx)

  def step(state, index):
    key = jax.random.fold_in(jax.random.key(0), index)
    blocks = optlab.sample_blocks(key, BLOCKS, sampled)
    found = noise(index, blocks)
    state, _ = train_step(state, optlab.BlockBatch(blocks, found, found))
    return state, state.estimator_state.info.ok

  state = optlab.init(jnp.zeros(2), estimator, tx, jnp.zeros((BLOCKS, 2)))
  _, ok = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(3000)))(state)
  assert jnp.all(ok)


def test_without_the_guard_it_ruins_the_run():
  """So the guard is what helps."""
  _, path = run('v2', quadratic, one_stiff, steps=60, guarded=False)
  assert not jnp.abs(path).max() < 100.0


@over_methods
def test_every_block_stiff(name):
  state, _ = run_with(name, 100.0, of_all=True)
  np.testing.assert_allclose(state.params, 1.0, atol=0.01)
  assert state.estimator_state.info.slowed == BLOCKS


@over_methods
def test_a_block_that_becomes_stiff_later(name):
  state, _ = run_with(name, 100.0, since=301)
  np.testing.assert_allclose(state.params, 1.0, atol=0.01)
  assert names_the_stiff_block(state)


def test_a_curvature_that_grows_with_x():
  """e^{4x} passes the bound on the way to x = 1."""

  def lower(x, y, stiff):
    return 0.5 * jnp.sum(jnp.exp(stiff * x) * (y - x) ** 2)

  state, _ = run(
    'v2', lower, lambda step, blocks: jnp.where(blocks == STIFF, 4.0, 0.0)
  )
  np.testing.assert_allclose(state.params, 1.0, atol=0.01)


def test_a_slow_block_is_fast_again_where_its_curvature_falls():
  def lower(x, y, quartic):
    return jnp.sum(0.5 * (y - x) ** 2 + quartic * (y - x) ** 4)

  state, _ = run(
    'v2', lower, lambda step, blocks: jnp.where(blocks == STIFF, 1.0, 0.0),
    start=30.0,
  )  # fmt: skip
  info = state.estimator_state.info
  assert info.stiffest_block == STIFF
  assert info.slowed == 0
  np.testing.assert_allclose(state.params, 1.0, atol=0.02)


@pytest.mark.parametrize(
  'name', ['v2', pytest.param('v1', marks=pytest.mark.slow)]
)
def test_a_step_out_of_the_domain_is_taken_back(name):
  """A logarithm has a slope, but no value, at negative y."""

  def lower(x, y, weight):
    return jnp.sum(y - weight * jnp.log(y)) + 0.5 * jnp.sum((y - x) ** 2)

  def weights(step, blocks):
    return jnp.where(blocks == STIFF, 1e-3, 1.0)

  state, _ = run(name, lower, weights, start=3.0, lr=0.5)
  inner = optlab.multi_block.inner_variables(state.estimator_state)
  assert jnp.all(inner > 0)
  assert state.estimator_state.info.total_rejected > 0
  weight = weights(0, jnp.arange(BLOCKS))[:, None]
  middle = state.params - 1.0
  exact = 0.5 * (middle + jnp.sqrt(middle**2 + 4.0 * weight))
  np.testing.assert_allclose(inner, exact, atol=0.01)


@pytest.mark.parametrize(
  'kwargs',
  [
    {'sampled': BLOCKS},
    {'sampled': 1, 'steps': 6000, 'learning_rate': 0.005},
    {'dtype': jnp.bfloat16},
    pytest.param(
      {'wrap': functools.partial(optlab.with_storm, beta=0.1)},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {
        'first': optlab.BlockBatch(
          jnp.arange(BLOCKS), None, one_stiff(0, jnp.arange(BLOCKS))
        )
      },
      marks=pytest.mark.slow,
    ),
  ],
  ids=['all sampled', 'one sampled', 'bfloat16', 'with_storm', 'first pass'],
)
def test_the_cases_next_to_it(kwargs):
  state, _ = run('v2', quadratic, one_stiff, **kwargs)
  np.testing.assert_allclose(state.params.astype(jnp.float32), 1.0, atol=0.01)
  assert names_the_stiff_block(state)


def test_seeds_in_one_program():
  def last(seed):
    state, _ = run('v2', quadratic, one_stiff, seed=seed)
    return state.params, state.estimator_state.info.stiffest_block

  params, stiffest = jax.vmap(last)(jnp.arange(3))
  np.testing.assert_allclose(params, 1.0, atol=0.01)
  np.testing.assert_array_equal(stiffest, STIFF)


@over_methods
def test_data_that_are_nan_stop_the_optimizer_too(name):
  """From step 20 on every step is rejected: x stands still."""
  state, path = run_with(name, np.nan, since=20, of_all=True)
  np.testing.assert_array_equal(path[20:], path[19:-1])
  assert jnp.any(path[19] != path[18])
  info = state.estimator_state.info
  assert (info.rejected, info.total_rejected) == (SAMPLED, 1480 * SAMPLED)
  for leaf in jax.tree.leaves(state):
    assert jnp.all(jnp.isfinite(leaf))


@over_methods
def test_one_block_whose_data_are_nan_is_left_out_and_named(name):
  state, _ = run_with(name, np.nan, since=20)
  np.testing.assert_allclose(state.params, 1.0, atol=0.01)
  info = state.estimator_state.info
  assert info.worst_block == STIFF
  assert info.worst_block_rejected == info.total_rejected
  assert info.block_rejected[STIFF] == info.total_rejected > 300
  # What is solved is a problem without it; the first few may be chance.
  assert info.not_ok_block == STIFF
  assert info.total_not_ok > info.total_rejected - 20


@over_methods
def test_no_curvature_of_a_block_ruins_the_run(name):
  for curvature in (1e4, 1.0, 0.0, np.inf):
    state, path = run_with(name, curvature)
    np.testing.assert_allclose(state.params, 1.0, atol=0.01)
    assert jnp.abs(path).max() < 2.0
    info = state.estimator_state.info
    left_out = np.isinf(curvature)
    assert (info.total_not_ok > 0) == left_out
    assert (info.worst_block == STIFF) == left_out


@over_methods
def test_a_block_that_is_not_convex_is_left_out_told_and_named(name):
  for curvature in (-0.1, -1.0, -100.0):
    state, path = run_with(name, curvature)
    np.testing.assert_allclose(state.params, 1.0, atol=0.01)
    assert jnp.abs(path).max() < 2.0
    info = state.estimator_state.info
    assert info.total_not_ok > 300 and info.not_ok_block == STIFF
    assert info.worst_block == STIFF
    assert info.block_rejected[STIFF] == info.total_rejected > 300


@over_methods
def test_where_no_block_is_convex_the_optimizer_stands_still(name):
  state, path = run_with(name, -1.0, of_all=True)
  assert jnp.abs(path).max() < 2.0
  np.testing.assert_array_equal(jnp.ptp(path[500:], axis=0), 0.0)
  assert state.estimator_state.info.rejected == SAMPLED


def lower_of_many_kinds(x, y, kind_and_shape):
  """Quadratic; linear; linear along one axis; Huber; linear by chance."""
  kind, shape = kind_and_shape
  away = jnp.abs(y - x)
  huber = jnp.sum(jnp.where(away < 1.0, 0.5 * away**2, away - 0.5))
  along = 0.5 * (y[0] - x[0]) ** 2 - 0.1 * y @ x
  kinds = quadratic(x, y, 1.0), -x @ y, along, huber, 0.1 * jnp.sum(y)
  chosen = jnp.asarray(kinds)[kind.astype(int)]
  return jnp.where(shape > 0, chosen, quadratic(x, y, 1.0))


@over_one_and_more
def test_a_block_without_a_lower_solution_is_left_out_told_and_named(name):
  """The tails of a Huber loss are linear, but end."""

  @jax.jit
  def go(kind, since, of_all, by_chance, start):
    def data(step, blocks):
      bad = (step >= since) & ((blocks == STIFF) | of_all)
      keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.fold_in(jax.random.key(3), step), blocks
      )
      bad &= jax.vmap(jax.random.uniform)(keys) >= by_chance
      return jnp.stack([jnp.broadcast_to(kind, bad.shape), bad], -1)

    return run(name, lower_of_many_kinds, data, start=start, lr=0.3, steps=1000)

  # Linear, from step 500 on, along one axis.
  for kind, since in (1, 0), (1, 500), (2, 0):
    state, path = go(kind, since, False, 0.0, 0.5)
    np.testing.assert_allclose(state.params, 1.0, atol=0.01)
    assert jnp.abs(path).max() < 10.0
    info = state.estimator_state.info
    assert info.worst_block == info.not_ok_block == STIFF
    assert info.total_rejected == info.total_not_ok > 100
  # Linear everywhere: the optimizer stands still.
  state, path = go(1, 0, True, 0.0, 0.5)
  assert jnp.abs(path).max() < 0.1
  assert not state.estimator_state.info.ok
  # Far out on a Huber loss: on the way the blocks are told, then used.
  state, _ = go(3, 0, True, 0.0, 20.0)
  np.testing.assert_allclose(state.params, 1.0, atol=0.01)
  info = state.estimator_state.info
  assert info.ok and info.total_not_ok > BLOCKS
  # No curvature in a third of the samples of each block, whose level has some.
  state, _ = go(4, 0, True, 0.67, 0.5)
  assert jnp.abs(state.params - 1.0).max() < 0.2
  assert state.estimator_state.info.total_rejected < 100


@pytest.mark.parametrize(
  'name', ['v2', pytest.param('v1', marks=pytest.mark.slow)]
)  # `rsvrb` follows each sampled Hessian, and tells half of them.
def test_curvature_that_is_negative_by_chance_is_no_reason(name):
  """Samples of -0.5 and 2.5 of each block, whose lower level is convex."""

  def noise(step, blocks):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.fold_in(jax.random.key(3), step), blocks
    )
    return jax.vmap(lambda k: 3.0 * jax.random.bernoulli(k) - 0.5)(keys)

  state, _ = run(name, quadratic, noise)
  np.testing.assert_allclose(state.params, 1.0, atol=0.01)
  info = state.estimator_state.info
  # Of 7,500 visits half are of negative curvature.
  assert info.total_not_ok > 3000 and info.total_rejected < 100


@pytest.mark.parametrize('lr', [0.1, None])
def test_data_that_are_nan_above_say_nothing_of_the_curvature_below(lr):
  spoiled = lambda x, y, scale: scale * upper(x, y, None)
  lower = lambda x, y, batch: quadratic(x, y, 1.0)
  estimator = optlab.bsvrb(spoiled, lower, 4, inner_lr=lr)
  estimate = jax.jit(estimator.estimate)
  state = estimator.init(jnp.zeros(2), jnp.zeros((4, 2)))
  for step in range(12):
    blocks = jnp.arange(2) + 2 * (step % 2)
    # One block's at each visit, and all of the first step.
    scale = jnp.where((blocks == 2) | (step == 0), jnp.nan, 1.0)
    batch = optlab.BlockBatch(blocks, scale, scale)
    result, state = estimate(jnp.zeros(2), state, batch)
    assert np.all(np.isfinite(result.grads))
  info = state.info
  assert info.worst_block == 2 and info.total_rejected == 2 + 6
  np.testing.assert_allclose(info.largest_curvature, 1.0, rtol=1e-3)
  slow = 0 if lr else 4
  assert info.slowed == slow == np.sum(state.pace.scale < 1)


def test_a_stiff_block_from_a_batch_with_padding_and_repeats():
  padded = jnp.array([STIFF, BLOCKS, 3, STIFF, 2**31 - 1], jnp.int32)
  plain = jnp.array([STIFF, 3], jnp.int32)
  states = []
  for blocks in (padded, plain):
    estimator = optlab.bsvrb(upper, quadratic, BLOCKS)
    state = estimator.init(jnp.zeros(2), jnp.full((BLOCKS, 2), 0.5))
    batch = optlab.BlockBatch(blocks, None, one_stiff(0, blocks))
    step = jax.jit(estimator.estimate)
    for _ in range(3):
      _, state = step(jnp.zeros(2), state, batch)
    states.append(state)
  for a, b in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert states[0].info.stiffest_block == STIFF


@over_one_and_more
def test_steps_too_short_for_any_block_to_follow_are_told(name):
  """Rates that are tracers, zero too, which a number may not be."""

  def train(lr):
    noise = lambda step, blocks: jnp.sin(7.0 * step + blocks)
    lower = lambda x, y, n: quadratic(x, y, 1.0) + 0.1 * n * jnp.sum(y)
    return run(name, lower, noise, steps=600, lr=lr)[0]

  states = jax.jit(jax.vmap(train))(np.float32([0.0, 1e-5, 0.3]))
  info = states.estimator_state.info
  assert not np.any(info.ok[:2]) and np.all(info.total_not_ok[:2] > 1000)
  assert np.all(info.not_ok_block[:2] >= 0)
  assert info.total_not_ok[2] == 0 and np.all(
    np.abs(states.params[2] - 1) < 0.1
  )


def test_step_sizes_from_own_curvature():
  """Curvatures over sixteen decades, and no rate to choose."""
  curvatures = jnp.logspace(-8, 8, BLOCKS)

  def inner_error(name, **kwargs):
    state, _ = run(
      name, quadratic, lambda step, blocks: curvatures[blocks], **kwargs
    )
    inner = optlab.multi_block.inner_variables(state.estimator_state)
    error = jnp.max(jnp.abs(inner - state.params))
    return error, state.params, state.estimator_state.info

  for name in ('v1', 'v2'):
    error, params, info = inner_error(name, lr=None)
    assert error < 0.01 and info.dual_residual < 0.01
    np.testing.assert_allclose(params, 1.0, atol=0.01)
  slow, _, info = inner_error('v2', lr=0.1)
  assert slow > 0.05 and info.dual_residual > 0.1
  assert curvatures[info.unsolved_block] < 0.1
  with pytest.raises(ValueError, match='inner_lr must be a number where'):
    optlab.bsvrb(upper, quadratic, BLOCKS, inner_lr=None, guarded=False)


# Tables on many devices.


@over_one_and_more
def test_tables_split_over_an_explicit_mesh(name):
  """All tables lie like the lower variables, before and after a step."""

  def two_steps(where):
    estimator = METHODS[name](upper, quadratic, BLOCKS)
    x = jnp.zeros(2)
    inner = jnp.full((BLOCKS, 2), 0.5)
    blocks = jnp.array([STIFF, 3, BLOCKS], jnp.int32)
    x, blocks = (jax.device_put(leaf, where(False)) for leaf in (x, blocks))
    state = estimator.init(x, jax.device_put(inner, where(True)))
    batch = optlab.BlockBatch(blocks, None, one_stiff(0, blocks))
    if name == 'rsvrb':
      batch = optlab.multi_block.PairedBlockBatch(*batch, blocks)
    step = jax.jit(estimator.estimate)
    for _ in range(2):
      estimate, state = step(x, state, batch)
      x = x - 0.1 * estimate.grads
    return x, state

  alone = two_steps(lambda table: jax.devices()[0])
  mesh = jax.make_mesh(
    (2,), ('blocks',), axis_types=(jax.sharding.AxisType.Explicit,)
  )
  with jax.set_mesh(mesh):
    split = two_steps(lambda table: jax.P('blocks') if table else jax.P())
  for a, b in zip(*map(jax.tree.leaves, (alone, split)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    if b.ndim and b.shape[0] == BLOCKS:
      assert b.addressable_shards[0].data.shape[0] == BLOCKS // 2


@over_methods
def test_init_of_abstract_variables(name):
  estimator = METHODS[name](upper, quadratic, BLOCKS)
  shapes = [
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2,), (BLOCKS, 2))
  ]
  concrete = estimator.init(jnp.zeros(2), jnp.zeros((BLOCKS, 2)))
  for state in (
    estimator.init(*shapes),
    jax.eval_shape(estimator.init, *shapes),
  ):
    kinds = [
      jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
      for tree in (state, concrete)
    ]
    assert kinds[0] == kinds[1]


def test_the_first_pass_is_in_chunks(monkeypatch):
  """Chunks of eight blocks of twenty, in any order, give what one pass does."""
  order = jnp.asarray(np.random.default_rng(0).permutation(BLOCKS))
  first = optlab.BlockBatch(order, None, one_stiff(0, order).at[3].set(jnp.nan))
  x, inner = jnp.ones(2), jnp.arange(2.0 * BLOCKS).reshape(BLOCKS, 2)
  states = []
  for chunk in (1024, 8):
    monkeypatch.setattr('optlab.multi_block._state.CHUNK', chunk)
    estimator = optlab.bsvrb(upper, quadratic, BLOCKS)
    states.append(jax.jit(estimator.init)(x, inner, first))
  # Figures of the last visit alone.
  last = {'rejected': 0, 'dual_residual': 0.0, 'unsolved_block': 0}
  whole, chunks = (
    state._replace(info=state.info._replace(**last)) for state in states
  )
  for a, b in zip(*map(jax.tree.leaves, (whole, chunks)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  assert whole.info.total_rejected == 1
  assert jnp.sum(whole.visited == 0) == BLOCKS - 1


def test_memory_of_the_first_pass_does_not_grow_with_the_blocks():
  def temporary_bytes(m):
    estimator = optlab.bsvrb(
      lambda x, y, batch: 0.5 * jnp.mean((batch @ y) ** 2),
      lambda x, y, batch: 0.5 * jnp.mean((batch @ (y - x)) ** 2),
      m,
    )
    shapes = jnp.zeros(8), jnp.zeros((m, 8))
    data = jnp.zeros((m, 8, 8))
    first = optlab.BlockBatch(jnp.arange(m), data, data)
    compiled = jax.jit(estimator.init).lower(*shapes, first).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  small, large = temporary_bytes(4096), temporary_bytes(16384)
  tables = (16384 - 4096) * 4 * (4 * 8 + 16)  # Two copies at the most.
  assert large - small < 2 * tables


def test_auxiliary_output_of_the_upper_level():
  estimator = optlab.bsvrb(
    lambda x, y, batch: (upper(x, y, batch), {'y': y}),
    lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2),
    BLOCKS,
    has_aux=True,
  )
  inner = jnp.arange(2.0 * BLOCKS).reshape(BLOCKS, 2)
  state = estimator.init(jnp.zeros(2), inner)
  blocks = jnp.array([4, 1])
  estimate, _ = jax.jit(estimator.estimate)(
    jnp.zeros(2), state, optlab.BlockBatch(blocks)
  )
  np.testing.assert_array_equal(estimate.aux['y'], inner[blocks])
