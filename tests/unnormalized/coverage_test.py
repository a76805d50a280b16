"""What noise misses: counted by NCE, seen by MECO; conditional models."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Uniform:
  """Rows of one column in [-width, width]."""

  def __init__(self, width):
    self.width = width

  def sample(self, key, num):
    return jax.random.uniform(key, (num, 1), minval=-1.0) * self.width

  def log_prob(self, rows):
    inside = jnp.abs(rows[:, 0]) <= self.width
    return jnp.where(inside, -math.log(2 * self.width), -jnp.inf)


def precision_model(log_precision, x):
  return -jnp.exp(log_precision) * x[:, 0] ** 2 / 2


def last_state(estimator, params, noise, data, num, steps, rate=0.05):
  tx = optax.adam(rate)
  state = optlab.init(params, estimator, tx)
  step = optlab.train_step(estimator, tx)

  def advance(state, key):
    return step(state, optlab.noise_batch(noise, key, data, num))

  keys = jax.random.split(jax.random.key(0), steps)
  return jax.jit(lambda state: jax.lax.scan(advance, state, keys)[0])(state)


@pytest.mark.parametrize('method', [optlab.nce, optlab.unnormalized.ence])
def test_data_outside_the_noise_count_with_a_term_of_zero(method):
  # Two rows out of five lie outside, so both losses are their inside rows' sum
  # over five.
  model = optlab.unnormalized.with_log_normalizer(precision_model)
  params = optlab.unnormalized.NceParams(jnp.zeros(()), jnp.float32(0.3))
  noise = Uniform(1.0)
  data = jnp.asarray([[0.1], [-0.4], [0.9], [1.5], [-7.0]])
  batch = optlab.noise_batch(noise, jax.random.key(0), data, 64)
  estimator = method(model, **({'nu': 1.0} if method is optlab.nce else {}))
  state = estimator.init(params)
  got, state = jax.jit(estimator.estimate)(params, state, batch)
  assert state.info.rejected == 0

  def loss(params):
    h_data = model(params, data[:3]) - batch.data_log_prob[:3]
    h_noise = model(params, batch.noise) - batch.noise_log_prob
    if method is optlab.nce:
      return jnp.sum(jax.nn.softplus(-h_data)) / 5 + jnp.mean(
        jax.nn.softplus(h_noise)
      )
    return 0.5 * (
      jnp.sum(jnp.exp(-h_data / 2)) / 5 + jnp.mean(jnp.exp(h_noise / 2))
    )

  value, grads = jax.value_and_grad(loss)(params)
  np.testing.assert_allclose(got.value, value, rtol=1e-6)
  for a, b in zip(got.grads, grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_nce_finds_log_z_where_noise_covers_two_thirds_of_the_data():
  data = jax.random.normal(jax.random.key(1), (4000, 1))
  quadratic = lambda unused, x: -(x[:, 0] ** 2) / 2 + 0 * unused
  model = optlab.unnormalized.with_log_normalizer(quadratic)
  params = optlab.unnormalized.NceParams(jnp.zeros(()), jnp.zeros(()))
  state = last_state(optlab.nce(model), params, Uniform(1.0), data, 4000, 300)
  log_z = state.params.log_normalizer
  np.testing.assert_allclose(log_z, HALF_LOG_2PI, atol=0.05)


def test_meco_warns_where_noise_misses_part_of_the_data():
  data = jax.random.normal(jax.random.key(1), (128, 1))
  estimator = optlab.meco(precision_model)
  narrow = last_state(estimator, jnp.zeros(()), Uniform(0.5), data, 128, 200)
  info = narrow.estimator_state.info
  assert jnp.exp(narrow.params) < 0.2  # The trap: the truth is one,
  assert info.ess > 0.9 * 128  # and the weights look perfect.
  assert info.rejected == 0
  assert info.coverage.warning
  assert info.coverage.missed > 0.5
  assert info.coverage.data_ess < 0.5 * 128
  wide = optlab.unnormalized.gaussian(jnp.zeros(1), 2 * jnp.eye(1))
  good = last_state(estimator, jnp.zeros(()), wide, data, 128, 200)
  info = good.estimator_state.info
  assert abs(good.params - jnp.log(1 / jnp.mean(data**2))) < 0.3
  assert not info.coverage.warning
  assert info.coverage.missed < 0.05
  assert info.coverage.data_ess > 0.5 * 128
  np.testing.assert_allclose(
    info.coverage.data_log_prob, jnp.mean(wide.log_prob(data)), rtol=1e-5
  )
  report = optlab.report(good)
  assert report['estimator_state/info/coverage/warning'] == 0


def test_without_scores_of_the_data_coverage_is_unknown():
  data = jnp.ones((4, 1))
  batch = optlab.noise_batch(
    Uniform(2.0), jax.random.key(0), data, 4, score_data=False
  )
  estimator = optlab.meco(precision_model)
  state = estimator.init(jnp.zeros(()))
  _, state = estimator.estimate(jnp.zeros(()), state, batch)
  assert state.info.coverage.missed == -1
  assert not state.info.coverage.warning


@pytest.mark.parametrize('m', [16, 64, 256])
def test_noise_that_is_the_data_s_distribution_gives_no_warning(m):
  noise = optlab.unnormalized.gaussian(jnp.zeros(2), jnp.eye(2))
  estimator = optlab.meco(lambda p, x: -p * jnp.sum(x**2, -1) / 2)

  def warns(key):
    data = jax.random.normal(jax.random.fold_in(key, 1), (64, 2))
    batch = optlab.noise_batch(noise, key, data, m)
    params = jnp.ones(())
    _, state = estimator.estimate(params, estimator.init(params), batch)
    return state.info.coverage.warning

  keys = jax.random.split(jax.random.key(0), 300)
  assert np.mean(jax.jit(jax.vmap(warns))(keys)) < 0.03


def test_bits_beside_noise_that_has_a_density_are_told():
  """Else a density is fitted to them, far from the bits' likelihood."""
  model = lambda theta, x: theta * jnp.sum(x, -1)
  theta, meco, nce = jnp.zeros(()), optlab.meco(model), optlab.nce(model)
  rows = jax.random.normal(jax.random.key(0), (32, 2))
  bits = (rows > 0).astype(jnp.float32)
  log_q = jnp.zeros(32)

  @jax.jit
  def judge(data, noise):
    batch = optlab.NoiseBatch(data, noise, log_q, log_q)
    _, by_meco = meco.estimate(theta, meco.init(theta), batch)
    _, by_nce = nce.estimate(theta, nce.init(theta), batch)
    coverage = by_meco.info.coverage
    return coverage.discrete, coverage.warning, by_nce.info.discrete

  assert all(judge(bits, rows))
  assert all(judge((3 * rows).astype(int), rows))
  assert not any(judge(bits, bits[::-1]))
  assert not any(judge(rows, rows[::-1] + 1))
  assert not any(judge(jnp.ones((32, 2)), rows))


def test_a_constant_that_takes_the_digits_is_told():
  noise = optlab.unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
  batch = optlab.noise_batch(noise, jax.random.key(0), jnp.ones((4, 1)), 64)

  @jax.jit
  def warns(constant):
    model = lambda p, x: precision_model(p, x) + constant
    estimator, params = optlab.meco(model), jnp.zeros(())
    _, state = estimator.estimate(params, estimator.init(params), batch)
    return state.info.coverage.warning

  assert not warns(1e4)
  assert warns(1e8)
  assert warns(-1e8)
  half = lambda p, x: (precision_model(p, x) + 300).astype(jnp.bfloat16)
  estimator, params = optlab.meco(half), jnp.zeros(())
  _, state = estimator.estimate(params, estimator.init(params), batch)
  assert state.info.coverage.warning


# Conditional models.


def conditional_model(theta, rows):
  """y given x is N(theta x, e^x): log Z(x) varies."""
  x, y = rows[:, 0], rows[:, 1]
  return -((y - theta * x) ** 2) / (2 * jnp.exp(x))


def conditional_batch(key, repeat=1, tile=1):
  keys = jax.random.split(key, 3)
  x = jax.random.normal(keys[0], (64,))
  y = x + jnp.exp(x / 2) * jax.random.normal(keys[1], x.shape)
  many = jnp.tile(jnp.repeat(x, repeat), tile)
  z = 3 * jax.random.normal(keys[2], many.shape)
  log_q = -(z**2) / 18 - math.log(3) - HALF_LOG_2PI
  return optlab.NoiseBatch(jnp.stack([x, y], 1), jnp.stack([many, z], 1), log_q)


@pytest.mark.parametrize('repeat, tile', [(1, 1), (4, 1), (1, 4)])
def test_a_conditional_model_is_refused(repeat, tile):
  batch = conditional_batch(jax.random.key(0), repeat, tile)
  estimator = optlab.meco(conditional_model)
  theta = jnp.zeros(())
  state = estimator.init(theta)
  estimate, state = jax.jit(estimator.estimate)(theta, state, batch)
  assert np.isnan(estimate.value)
  assert estimate.grads == 0
  assert state.info.coverage.conditional
  assert state.info.held
  assert state.log_normalizer == 0


def test_a_conditional_model_is_refused_in_any_order_of_the_noise():
  batch = conditional_batch(jax.random.key(0), 2)
  moved = jnp.asarray(np.random.default_rng(0).permutation(128))
  theta, estimator = jnp.zeros(()), optlab.meco(conditional_model)
  judge = jax.jit(
    lambda batch: estimator.estimate(theta, estimator.init(theta), batch)
  )

  def conditional(data, noise):
    estimate, state = judge(batch._replace(data=data, noise=noise))
    found = state.info.coverage.conditional
    assert np.isnan(estimate.value) == found
    return found

  data, noise = batch.data, batch.noise[moved]
  assert conditional(data, noise)
  assert conditional(data.astype(jnp.bfloat16), noise.astype(jnp.bfloat16))
  # Another number among them, and the model is a joint one.
  assert not conditional(data, noise.at[7, 0].add(1.0))


def test_one_array_in_data_and_noise_is_refused():
  batch = conditional_batch(jax.random.key(0))
  split = lambda rows: {'x': rows[:, 0], 'y': rows[:, 1]}
  data = split(batch.data)
  noise = {'x': data['x'], 'y': batch.noise[:, 1]}
  model = lambda theta, rows: -((rows['y'] - theta * rows['x']) ** 2)
  estimator = optlab.meco(model)
  theta = jnp.zeros(())
  with pytest.raises(ValueError, match=r"data\['x'\].*one array.*conditional"):
    estimator.estimate(
      theta,
      estimator.init(theta),
      optlab.NoiseBatch(data, noise, batch.noise_log_prob),
    )


def test_nce_with_one_normalizer_refuses_a_conditional_model():
  batch = conditional_batch(jax.random.key(0))
  # Classes repeat; that noise has those of the data row by row tells.
  classes = (jnp.arange(64) * 7) % 3
  data, noise = ({'class': classes + 0, 'y': rows[:, 1]} for rows in batch[:2])
  model = lambda theta, rows: -((rows['y'] - theta * rows['class']) ** 2)
  labelled = optlab.NoiseBatch(data, noise, batch.noise_log_prob)
  meco = optlab.meco(model)
  theta = jnp.zeros(())
  _, state = jax.jit(meco.estimate)(theta, meco.init(theta), labelled)
  assert state.info.coverage.conditional
  nce = optlab.nce(optlab.unnormalized.with_log_normalizer(model))
  params = optlab.unnormalized.NceParams(theta, theta)
  labelled = labelled._replace(data_log_prob=jnp.zeros(64))
  got, state = jax.jit(nce.estimate)(params, nce.init(params), labelled)
  assert np.isnan(got.value)
  assert got.grads.model == 0
  assert state.info.conditional
  assert state.info.held
  shared = labelled._replace(noise=noise | {'class': data['class']})
  with pytest.raises(ValueError, match=r"nce: data\['class'\].*one array"):
    nce.estimate(params, nce.init(params), shared)


def test_columns_that_are_alike_by_chance_are_no_condition():
  # A constant column, bits, and noise equal to the data as a whole.
  bits = jnp.asarray([[1.0, 0.0, 1.0], [1.0, 1.0, 2.0], [1.0, 0.0, 3.0]])
  other = bits.at[:, 2].add(0.5)
  estimator = optlab.meco(lambda p, x: p * jnp.sum(x, -1))
  theta = jnp.zeros(())
  for noise in (other, bits):
    batch = optlab.NoiseBatch(bits, noise, jnp.zeros(3))
    estimate, state = estimator.estimate(theta, estimator.init(theta), batch)
    assert np.isfinite(estimate.value)
    assert not state.info.coverage.conditional


# Auxiliary output.

METHODS = {
  'meco': optlab.meco,
  'ratio_corrected': lambda f, **k: optlab.meco(f, ratio_correction=True, **k),
  'nce': optlab.nce,
  'ence': optlab.unnormalized.ence,
  'contrastive_divergence': lambda f, **k: optlab.contrastive_divergence(
    f, 0.1, 2, **k
  ),
}


@pytest.mark.parametrize('method', METHODS)
def test_auxiliary_output_comes_out_beside_the_value(method):
  def model(theta, x):
    log_p = theta * x[:, 0] - x[:, 0] ** 2 / 2
    return log_p, {'features': x[:, 0] ** 2}

  noise = optlab.unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
  batch = optlab.noise_batch(noise, jax.random.key(0), jnp.ones((4, 1)), 4)
  theta = jnp.float32(0.5)
  inner = ()
  if method == 'contrastive_divergence':
    inner = (jax.random.key(0), batch.noise)
  plain = METHODS[method](lambda theta, x: model(theta, x)[0])
  rich = METHODS[method](model, has_aux=True)
  tx = optax.sgd(0.1)
  states = []
  for estimator in (plain, rich):
    state = optlab.init(theta, estimator, tx, *inner)
    states.append(jax.jit(optlab.train_step(estimator, tx))(state, batch))
  (plain_state, value), (state, out) = states
  got, aux = out
  assert got == value
  assert state.params == plain_state.params
  assert aux['features'].shape == (8,)
  np.testing.assert_array_equal(aux['features'][:4], 1.0)
  for wrong, estimator in (
    ('has_aux', METHODS[method](model)),
    ('log densities, aux', METHODS[method](lambda t, x: x[:, 0], has_aux=True)),
  ):
    with pytest.raises(ValueError, match=wrong):
      estimator.estimate(theta, estimator.init(theta, *inner), batch)


# Meshes of explicit axes.


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
  'm, sharded',
  [(8, 'both'), (7, 'data'), pytest.param(8, 'data', marks=pytest.mark.slow)],
)
def test_explicit_meshes_give_the_same_numbers(method, sharded, m):

  def model(params, x):
    return jnp.tanh(x @ params['w']) @ params['v'] - jnp.sum(x**2, -1) / 2

  params = {'w': jnp.ones((2, 3)), 'v': jnp.linspace(0.0, 1.0, 3)}
  noise = optlab.unnormalized.gaussian(jnp.zeros(2), jnp.eye(2))
  data = jax.random.normal(jax.random.key(0), (8, 2))
  batch = optlab.noise_batch(noise, jax.random.key(1), data, m)
  estimator = METHODS[method](model)
  inner = ()
  if method == 'contrastive_divergence':
    inner = (jax.random.key(2), data)
  run = lambda batch: jax.jit(estimator.estimate)(
    params, estimator.init(params, *inner), batch
  )[0]
  want = run(batch)
  kind = jax.sharding.AxisType.Explicit
  mesh = jax.make_mesh((2,), ('data',), axis_types=(kind,))
  on = lambda leaf, axes: jax.device_put(
    leaf, jax.NamedSharding(mesh, jax.P(axes))
  )
  rest = 'data' if sharded == 'both' else None
  with jax.set_mesh(mesh):
    got = run(
      optlab.NoiseBatch(
        on(batch.data, 'data'),
        on(batch.noise, rest),
        on(batch.noise_log_prob, rest),
        on(batch.data_log_prob, 'data'),
      )
    )
  np.testing.assert_allclose(got.value, want.value, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(got.grads), jax.tree.leaves(want.grads), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
