"""Conditional models: a tracker for each context."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
SIZE, N, M = 5, 8, 24


def model(params, rows):
  """Two features of x and y; the normalizer varies with x."""
  x, y = rows
  return params['a'] * x * y - params['b'] ** 2 * (1 + x**2) * y**2


PARAMS = {'a': jnp.asarray(0.3), 'b': jnp.asarray(0.8)}


def some_batch(seed=0, contexts=SIZE):
  """Rows of some of the contexts, in no order."""
  rng = np.random.default_rng(seed)
  known = np.linspace(-1, 1, contexts)
  data, noise = rng.integers(0, contexts, N), rng.integers(0, contexts, M)
  y, z = rng.normal(size=N), 2 * rng.normal(size=M)
  arrays = known[data], y, known[noise], z, -(z**2) / 8 - math.log(2)
  x, y, x_noise, z, log_q = map(jnp.asarray, arrays)
  return optlab.NoiseBatch(
    (x, y), (x_noise, z), log_q - HALF_LOG_2PI, None,
    jnp.asarray(data, jnp.int32), jnp.asarray(noise, jnp.int32),
  )  # fmt: skip


def by_hand(params, table, weight, batch, gamma):
  """The step by its definition, context by context."""
  table, weight, m = np.array(table), np.array(weight), len(batch.noise[1])
  log_p = np.asarray(model(params, batch.noise))
  log_w = log_p - np.asarray(batch.noise_log_prob)
  data, noise = np.asarray(batch.contexts), np.asarray(batch.noise_contexts)
  good = np.isfinite(log_w)
  coefficients, counts = np.zeros(m), np.zeros(len(table))
  finite = np.isfinite(np.asarray(model(params, batch.data)))
  usable = finite & np.isin(data, noise[good]) & (data < len(table))
  for c in range(len(table)):
    rows = good & (noise == c)
    if not rows.any():
      continue
    weight[c] = 1 - (1 - gamma) * (1 - weight[c])
    step = gamma / weight[c]
    mean = np.exp(log_w[rows]).mean()
    u = (1 - step) * np.exp(table[c]) + step * mean
    table[c] = np.log(u)
    counts[c] = np.sum(usable & (data == c))
    share = counts[c] / usable.sum() / rows.sum() / u
    coefficients[rows] = share * np.exp(log_w[rows])

  def loss(params):
    where = jnp.asarray(good & (coefficients > 0))
    clean = jax.tree.map(lambda z: jnp.where(where, z, 0.0), batch.noise)
    noise_part = jnp.sum(jnp.asarray(coefficients) * model(params, clean))
    clean = jax.tree.map(lambda z: jnp.where(usable, z, 0.0), batch.data)
    data_part = jnp.where(usable, model(params, clean), 0)
    return noise_part - jnp.sum(data_part) / usable.sum()

  return table, weight, jax.grad(loss)(params), usable


@pytest.mark.usefixtures('x64')
def test_each_context_has_its_own_average():
  gamma = 0.3
  params = jax.tree.map(lambda leaf: leaf.astype(float), PARAMS)
  estimator = optlab.meco(model, gamma, contexts=SIZE)
  state = estimator.init(params)
  table, weight = np.zeros(SIZE), np.zeros(SIZE)
  step = jax.jit(estimator.estimate)
  for seed in range(6):
    batch = some_batch(seed)
    nan = batch.noise[1].at[3].set(jnp.nan)
    lost = batch.data[1].at[2].set(jnp.nan)
    # Padding, by an index beyond the end and by one below zero.
    batch = batch._replace(
      noise=(batch.noise[0], nan),
      data=(batch.data[0], lost),
      contexts=batch.contexts.at[0].set(SIZE),
      noise_contexts=batch.noise_contexts.at[1].set(-1).at[2].set(SIZE + 7),
    )
    table, weight, want, usable = by_hand(params, table, weight, batch, gamma)
    got, state = step(params, state, batch)
    np.testing.assert_allclose(state.log_normalizer, table, rtol=1e-12)
    np.testing.assert_allclose(state.weight, weight, rtol=1e-12)
    for name, leaf in got.grads.items():
      np.testing.assert_allclose(leaf, want[name], rtol=1e-10)
    log_p = np.asarray(model(params, batch.data))[usable]
    value = table[np.asarray(batch.contexts)[usable]] - log_p
    np.testing.assert_allclose(got.value, value.mean(), rtol=1e-12)
    # Padding is not counted, other rows that do not count are.
    assert state.info.rejected == 1 + N - 1 - usable.sum()


@pytest.mark.usefixtures('x64')
def test_one_context_is_plain_meco():
  params = jax.tree.map(lambda leaf: leaf.astype(float), PARAMS)
  plain, one = optlab.meco(model), optlab.meco(model, contexts=1)
  plain_state, state = plain.init(params), one.init(params)
  plain_step, step = jax.jit(plain.estimate), jax.jit(one.estimate)
  for seed in range(3):
    batch = some_batch(seed)
    zeros = lambda part: jnp.zeros(part[0].shape, jnp.int8)
    named = batch._replace(
      contexts=zeros(batch.data), noise_contexts=zeros(batch.noise)
    )
    batch = batch._replace(contexts=None, noise_contexts=None)
    want, plain_state = plain_step(params, plain_state, batch)
    got, state = step(params, state, named)
    for a, b in zip(
      jax.tree.leaves((got, state.info)),
      jax.tree.leaves((want, plain_state.info)),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_allclose(
      state.log_normalizer[0], plain_state.log_normalizer, rtol=1e-12
    )


def test_contexts_that_are_not_seen_are_held():
  estimator = optlab.meco(model, contexts=50)
  state = estimator.init(PARAMS)._replace(log_normalizer=jnp.arange(50.0))
  _, new = jax.jit(estimator.estimate)(PARAMS, state, some_batch())
  moved = np.asarray(new.log_normalizer != state.log_normalizer)
  seen = np.unique(some_batch().noise_contexts)
  assert set(np.flatnonzero(moved)) == set(seen)
  assert set(np.flatnonzero(new.weight)) == set(seen)


def test_what_is_bad_in_one_context_leaves_the_others_alone():
  estimator = optlab.meco(model, contexts=SIZE)
  step = jax.jit(estimator.estimate)
  _, state = step(PARAMS, estimator.init(PARAMS), some_batch(1))
  batch, spoiled = some_batch(), 2
  mine, theirs = (c == spoiled for c in (batch.contexts, batch.noise_contexts))
  away = batch._replace(
    contexts=jnp.where(mine, SIZE, batch.contexts),
    noise_contexts=jnp.where(theirs, SIZE, batch.noise_contexts),
  )
  want, held = step(PARAMS, state, away)
  assert mine.any()
  for bad in (jnp.nan, jnp.inf):
    noise = batch.noise[0], jnp.where(theirs, bad, batch.noise[1])
    got, new = step(PARAMS, state, batch._replace(noise=noise))
    for a, b in zip(
      jax.tree.leaves((got.value, got.grads, new.log_normalizer)),
      jax.tree.leaves((want.value, want.grads, held.log_normalizer)),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)
    assert new.info.rejected == theirs.sum() + mine.sum()
    assert not new.info.held


def test_without_noise_of_its_context_nothing_moves():
  estimator = optlab.meco(model, contexts=SIZE)
  batch = some_batch()
  batch = batch._replace(
    contexts=jnp.zeros_like(batch.contexts),
    noise_contexts=jnp.full_like(batch.noise_contexts, SIZE),
  )
  got, state = estimator.estimate(PARAMS, estimator.init(PARAMS), batch)
  assert all(leaf == 0 for leaf in got.grads.values())
  assert state.info.held
  assert state.info.rejected == N


def conditional(theta, rows):
  """y given x is N(theta x, e^x)."""
  x, y = rows
  return -((y[:, 0] - theta * x) ** 2) / (2 * jnp.exp(x))


def test_a_conditional_model_reaches_the_likelihood():
  # One tracker ends at .55, and the truth is 1.
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (500,))
  y = x + jnp.exp(x / 2) * jax.random.normal(keys[1], x.shape)
  best = jnp.sum(x * y / jnp.exp(x)) / jnp.sum(x * x / jnp.exp(x))
  noise = optlab.unnormalized.gaussian(jnp.zeros(1), 9 * jnp.eye(1))
  estimator = optlab.meco(conditional, contexts=500)
  tx = optax.adam(optax.cosine_decay_schedule(0.1, 600))
  step = optlab.train_step(estimator, tx)

  def advance(state, key):
    rows = jax.random.permutation(key, 500)[:50]
    return step(
      state,
      optlab.unnormalized.conditional_batch(
        noise, key, x[rows], y[rows, None], rows, 16
      ),
    )

  state = optlab.init(jnp.zeros(()), estimator, tx)
  keys = jax.random.split(keys[2], 600)
  state, _ = jax.jit(lambda s: jax.lax.scan(advance, s, keys))(state)
  assert abs(state.params - best) < 0.03
  # The trackers are the normalizers, log sqrt(2 pi e^x).
  error = state.estimator_state.log_normalizer - x / 2 - HALF_LOG_2PI
  assert abs(jnp.mean(error)) < 0.03


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
@pytest.mark.parametrize('rows_too', [False, True])
def test_tables_split_over_devices(kind, rows_too):
  kind = getattr(jax.sharding.AxisType, kind)
  mesh = jax.make_mesh((2,), ('data',), axis_types=(kind,))
  estimator = optlab.meco(model, contexts=6)
  batch = some_batch(contexts=6)
  alone = estimator.init(PARAMS)
  want, one = jax.jit(estimator.estimate)(PARAMS, alone, batch)
  split = jax.NamedSharding(mesh, jax.P('data'))
  with jax.set_mesh(mesh):
    state = estimator.init(PARAMS)
    tables = jax.device_put((state.log_normalizer, state.weight), split)
    state = state._replace(log_normalizer=tables[0], weight=tables[1])
    if rows_too:
      batch = jax.device_put(batch, split)
    got, state = jax.jit(estimator.estimate)(PARAMS, state, batch)
  assert state.log_normalizer.sharding.is_equivalent_to(split, 1)
  np.testing.assert_allclose(state.log_normalizer, one.log_normalizer, 1e-6)
  np.testing.assert_allclose(got.value, want.value, rtol=1e-6)
  for name, leaf in got.grads.items():
    np.testing.assert_allclose(leaf, want.grads[name], rtol=1e-5)


# Noise contrastive estimation with a normalizer for each context.


@pytest.mark.parametrize('method', ['nce', 'ence'])
def test_nce_subtracts_each_row_s_normalizer(method):
  keys = jax.random.split(jax.random.key(0), 4)
  rows = lambda key, num: jax.random.normal(key, (num, 2))
  contexts = jnp.asarray([0, 2, 2, 1, 9], jnp.int8)  # The last is padding.
  noise_contexts = jnp.asarray([2, -1, 0, 0, 1, 2])
  data, noise = rows(keys[0], 5), rows(keys[1], 6)
  batch = optlab.NoiseBatch(
    data, noise, rows(keys[2], 6)[:, 0], rows(keys[3], 5)[:, 0], contexts,
    noise_contexts,
  )  # fmt: skip
  model = lambda theta, x: theta * x[:, 0] - x[:, 1] ** 2
  params = optlab.unnormalized.NceParams(
    jnp.float32(0.3), jnp.asarray([0.1, -0.4, 0.8])
  )
  make = {'nce': optlab.nce, 'ence': optlab.unnormalized.ence}[method]
  got, state = jax.jit(
    lambda batch: make(model, contexts=3).estimate(
      params, make(model, contexts=3).init(params), batch
    )
  )(batch)
  # The same rows, without padding, of a model that knows their contexts.
  good, noise_good = np.arange(4), np.asarray([0, 2, 3, 4, 5])
  pairs = lambda x, index: jnp.concatenate([x, index[:, None] * 1.0], 1)
  plain = optlab.NoiseBatch(
    pairs(data, contexts)[good],
    pairs(noise, noise_contexts)[noise_good],
    batch.noise_log_prob[noise_good],
    batch.data_log_prob[good],
  )

  def normalized(params, x):
    index = x[:, 2].astype(int)
    return model(params['model'], x) - params['log_normalizer'][index]

  if method == 'nce':
    single = optlab.nce(normalized, 6 / 5)
  else:
    single = make(normalized)
  params = params._asdict()
  want, _ = jax.jit(single.estimate)(params, single.init(params), plain)
  np.testing.assert_allclose(got.value, want.value, rtol=1e-5)
  for name, leaf in want.grads.items():
    np.testing.assert_allclose(getattr(got.grads, name), leaf, rtol=1e-5)
  assert state.info.rejected == 0
  assert not state.info.held


def test_nce_finds_a_conditional_model():
  # With one normalizer for all contexts the slope is far off.
  keys = jax.random.split(jax.random.key(0), 3)
  index = jnp.arange(600) % 20
  x = jnp.linspace(-2.0, 2.0, 20)[index]
  y = x + jnp.exp(x / 2) * jax.random.normal(keys[0], x.shape)
  best = jnp.sum(x * y / jnp.exp(x)) / jnp.sum(x * x / jnp.exp(x))
  noise = optlab.unnormalized.gaussian(jnp.zeros(1), 9 * jnp.eye(1))
  estimator = optlab.nce(conditional, contexts=20)
  tx = optax.adam(optax.cosine_decay_schedule(0.1, 400))
  step = optlab.train_step(estimator, tx)

  def advance(state, key):
    return step(
      state,
      optlab.unnormalized.conditional_batch(
        noise, key, x, y[:, None], index, 4
      ),
    )

  params = optlab.unnormalized.NceParams(jnp.zeros(()), jnp.zeros(20))
  state = optlab.init(params, estimator, tx)
  keys = jax.random.split(keys[2], 400)
  state, _ = jax.jit(lambda s: jax.lax.scan(advance, s, keys))(state)
  assert abs(state.params.model - best) < 0.05
  truth = jnp.linspace(-2.0, 2.0, 20) / 2 + HALF_LOG_2PI
  assert abs(jnp.mean(state.params.log_normalizer - truth)) < 0.05


def spreading(params, rows):
  """N(a x, e^(b x)): its normalizer varies with x."""
  x, y = rows
  return -((y[:, 0] - params[0] * x) ** 2) / 2 / jnp.exp(params[1] * x)


def shifting(params, rows):
  """N(a x, e^-b): its normalizer is one."""
  x, y = rows
  return -((y[:, 0] - params[0] * x) ** 2) / 2 * jnp.exp(params[1])


@functools.cache
def coarse(method, log_density, contexts, wide=1.0, num=8):
  """Parameters, and whether each of 600 steps is told, by so many contexts."""
  key = jax.random.key(3)
  x = jnp.sort(jax.random.normal(key, (120,)))
  scale = jnp.exp(x / 2) if log_density is spreading else 1.0
  y = (x + scale * jax.random.normal(jax.random.key(0), (120,)))[:, None]
  index = jnp.arange(120) * contexts // 120
  noise = optlab.fit_gaussian(y, inflate=2.0 * wide)
  params = jnp.zeros(2)
  if method == 'nce':
    estimator = optlab.nce(log_density, contexts=contexts)
    params = optlab.unnormalized.NceParams(params, jnp.zeros(contexts))
  else:
    estimator = optlab.meco(log_density, contexts=contexts)
  tx = optax.adam(optax.cosine_decay_schedule(0.05, 600))
  step = optlab.train_step(estimator, tx)

  def advance(state, key):
    batch = optlab.unnormalized.conditional_batch(noise, key, x, y, index, num)
    state, _ = step(state, batch)
    info = state.estimator_state.info
    return state, getattr(info, 'coverage', info).conditional

  keys = jax.random.split(jax.random.key(1), 600)
  state = optlab.init(params, estimator, tx)
  state, told = jax.jit(lambda s: jax.lax.scan(advance, s, keys))(state)
  return getattr(state.params, 'model', state.params), told


@pytest.mark.parametrize('method', ['meco', 'nce'])
def test_rows_of_one_context_with_normalizers_of_their_own_are_told(method):
  """A slope of 1 was found as .7, without a word."""
  params, told = coarse(method, spreading, 1)
  assert params[1] < 0.8
  assert np.all(told[50:])
  assert not np.any(told[:49])
  params, told = coarse(method, spreading, 120)
  assert abs(params[1] - 1) < 0.15
  assert not np.any(told)


SLOW = pytest.mark.slow  # Others of the kind.


@pytest.mark.parametrize(
  ('wide', 'num'),
  [
    (10.0, 2),
    pytest.param(1.0, 8, marks=SLOW),
    pytest.param(10.0, 8, marks=SLOW),
  ],
)
def test_rows_of_one_context_and_one_normalizer_are_not(wide, num):
  params, told = coarse('meco', shifting, 1, wide, num)
  assert abs(params[0] - 1) < 0.1
  assert not np.any(told)


def test_bad_arguments():
  batch, plain = some_batch(), optlab.meco(model)
  many = optlab.meco(model, contexts=SIZE)
  run = lambda make, batch: make.estimate(PARAMS, make.init(PARAMS), batch)
  with pytest.raises(ValueError, match='do not go together'):
    optlab.meco(model, contexts=3, ratio_correction=True)
  with pytest.raises(ValueError, match='names contexts.*number of contexts'):
    run(plain, batch)
  for name in ('contexts', 'noise_contexts'):
    with pytest.raises(ValueError, match=f'needs batch.{name}.*conditional_b'):
      run(many, batch._replace(**{name: None}))
    with pytest.raises(TypeError, match=f'{name} must be an integer array'):
      run(many, batch._replace(**{name: jnp.zeros(N)}))
    with pytest.raises(ValueError, match=rf'{name} must have shape \(\d+,\)'):
      run(many, batch._replace(**{name: jnp.zeros((3,), int)}))
  scored = batch._replace(data_log_prob=jnp.zeros(N))
  with pytest.raises(ValueError, match='nce.*a normalizer for each'):
    run(optlab.nce(model), scored)
  for params, error, match in (
    (PARAMS, TypeError, 'params must be NceParams'),
    (
      optlab.unnormalized.NceParams(PARAMS, jnp.zeros(())),
      ValueError,
      rf'log_normalizer of shape \({SIZE},\), got \(\)',
    ),
  ):
    estimator = optlab.nce(model, contexts=SIZE)
    with pytest.raises(error, match=match):
      estimator.estimate(params, estimator.init(params), scored)
  chains = optlab.contrastive_divergence(model, 0.1, 1)
  with pytest.raises(ValueError, match='contrastive_divergence.*from one con'):
    state = chains.init(PARAMS, jax.random.key(0), batch.data)
    chains.estimate(PARAMS, state, batch)
