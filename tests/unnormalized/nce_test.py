"""NCE and eNCE against recorded traces and the curvature of their losses."""

import functools
import json
import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'meco'
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def golden(name):
  return json.loads((GOLDEN / f'{name}.json').read_text())


def natural(theta, x):
  """Gaussian of variance one by its natural parameter; the golden model."""
  return theta * x[:, 0] - x[:, 0] ** 2 / 2


MODEL = optlab.unnormalized.with_log_normalizer(natural)
MAKERS = {
  'nce': lambda: optlab.nce(MODEL),
  'ence': lambda: optlab.unnormalized.ence(MODEL, max_exponent=300.0),
}
over_methods = pytest.mark.parametrize('method', MAKERS)


def standard_log_prob(x):
  return -(x[:, 0] ** 2) / 2 - HALF_LOG_2PI


def trace(estimator, params):
  recorded = golden('sgd_traces')
  tx = optax.sgd(0.1)
  state = optlab.init(params, estimator, tx)
  step = jax.jit(optlab.train_step(estimator, tx))
  rows = []
  for data, noise in zip(recorded['X'], recorded['Z'], strict=True):
    data, noise = (np.asarray(part)[:, None] for part in (data, noise))
    batch = optlab.NoiseBatch(
      data, noise, standard_log_prob(noise), standard_log_prob(data)
    )
    before = state.params
    state, value = step(state, batch)
    rows.append((before, value))
  return rows, state.params


@pytest.mark.usefixtures('x64')
@over_methods
def test_sgd_trace(method):
  (case,) = (
    case for case in golden('sgd_traces')['cases'] if case['method'] == method
  )
  start = optlab.unnormalized.NceParams(
    jnp.zeros(()), jnp.asarray(HALF_LOG_2PI)
  )
  rows, last = trace(MAKERS[method](), start)
  for (params, value), want in zip(rows, case['steps'], strict=True):
    np.testing.assert_allclose(params.model, want['theta'], atol=1e-12)
    np.testing.assert_allclose(params.log_normalizer, want['log_z'])
    np.testing.assert_allclose(value, want['value'])
  np.testing.assert_allclose(last.model, case['final_theta'])
  np.testing.assert_allclose(last.log_normalizer, case['final_log_z'])


@pytest.mark.usefixtures('x64')
def test_meco_trace_is_not_that_of_nce():
  meco, _ = (
    case for case in golden('sgd_traces')['cases'] if case['method'] == 'meco'
  )
  start = optlab.unnormalized.NceParams(
    jnp.zeros(()), jnp.asarray(HALF_LOG_2PI)
  )
  _, last = trace(MAKERS['nce'](), start)
  assert abs(last.model - meco['final_theta']) > 0.1


@pytest.mark.usefixtures('x64')
@over_methods
def test_curvature_at_the_optimum_dies_with_the_distance(method):
  # The loss is a mean over data plus a mean over noise, so its population
  # gradient is a quadrature over one row of each; the other row sits so far
  # out that its share is exactly zero.
  estimator = MAKERS[method]()
  far = 1000.0

  def gradient(params, data, noise):
    row = lambda x: jnp.reshape(x, (1, 1))
    batch = optlab.NoiseBatch(
      row(data),
      row(noise),
      standard_log_prob(row(noise)),
      standard_log_prob(row(data)),
    )
    estimate, _ = estimator.estimate(params, estimator.init(params), batch)
    return jnp.stack([estimate.grads.model, estimate.grads.log_normalizer])

  nodes = jnp.linspace(-14.0, 30.0, 3001)
  width = nodes[1] - nodes[0]

  def population(vector, mu):
    params = optlab.unnormalized.NceParams(vector[0], vector[1])
    of_data = jax.vmap(lambda x: gradient(params, x, -far))(nodes)
    of_noise = jax.vmap(lambda z: gradient(params, far, z))(nodes)
    p = jnp.exp(-((nodes - mu) ** 2) / 2 - HALF_LOG_2PI) * width
    q = jnp.exp(-(nodes**2) / 2 - HALF_LOG_2PI) * width
    return p @ of_data + q @ of_noise

  hessian = jax.jit(jax.jacfwd(population))
  for case in golden('landscape')['cases']:
    mu = case['mu']
    if mu == 0:  # The two rows apart by 1000 do not separate there.
      continue
    optimum = jnp.asarray([mu, mu**2 / 2 + HALF_LOG_2PI])
    h = np.asarray(hessian(optimum, mu))
    profiled = h[0, 0] - h[0, 1] * h[1, 0] / h[1, 1]
    # The table's own quadrature is good to about 1e-11.
    np.testing.assert_allclose(
      profiled, case[method]['profiled'], rtol=1e-4, err_msg=f'mu={mu}'
    )
    low, high = np.linalg.eigvalsh(0.5 * (h + h.T))
    np.testing.assert_allclose(high, case[method]['lam_max'], rtol=1e-6)
    np.testing.assert_allclose(low, case[method]['lam_min'], rtol=1e-4)


def test_nce_weighs_each_row_by_a_bounded_share():
  # A noise row far above the density ratio counts fully, and no more.
  estimator = optlab.nce(MODEL, nu=1.0)
  params = optlab.unnormalized.NceParams(jnp.float32(50.0), jnp.float32(0.0))
  batch = optlab.NoiseBatch(
    np.zeros((1, 1), np.float32),
    np.full((1, 1), 9.0, np.float32),
    np.full(1, -40.0, np.float32),
    np.zeros(1, np.float32),
  )
  estimate, _ = jax.jit(estimator.estimate)(
    params, estimator.init(params), batch
  )
  np.testing.assert_allclose(estimate.grads.model, 9.0, rtol=1e-6)


def test_ence_clips_its_exponent_and_keeps_the_direction():
  estimator = optlab.unnormalized.ence(MODEL, max_exponent=10.0)
  params = optlab.unnormalized.NceParams(jnp.float32(50.0), jnp.float32(0.0))
  batch = optlab.NoiseBatch(
    np.zeros((1, 1), np.float32),
    np.full((1, 1), 9.0, np.float32),
    np.full(1, -40.0, np.float32),
    np.zeros(1, np.float32),
  )
  estimate, _ = jax.jit(estimator.estimate)(
    params, estimator.init(params), batch
  )
  np.testing.assert_allclose(
    estimate.grads.model, 0.25 * math.exp(10.0) * 9.0, rtol=1e-5
  )


def test_normalized_descent_survives_any_magnitude():
  tx = optlab.normalized_momentum(0.5, beta=0.0)
  for scale in (1e-36, 1.0, 1e30, 1e38):
    grads = {'a': jnp.float32(3 * scale / 10), 'b': jnp.float32(-scale * 0.4)}
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates['a'], -0.3, rtol=1e-5)
    np.testing.assert_allclose(updates['b'], 0.4, rtol=1e-5)
  for bad in (0.0, math.nan, math.inf):
    grads = {'a': jnp.float32(bad), 'b': jnp.float32(bad)}
    updates, _ = tx.update(grads, tx.init(grads))
    assert updates['a'] == 0


def test_bad_arguments():
  with pytest.raises(ValueError, match='nu must be in'):
    optlab.nce(MODEL, nu=0.0)
  with pytest.raises(ValueError, match='max_exponent'):
    optlab.unnormalized.ence(MODEL, max_exponent=-1.0)
  with pytest.raises(TypeError, match='log_density'):
    optlab.unnormalized.with_log_normalizer(3.0)


def test_a_normalizer_that_is_no_scalar_is_named():
  model = optlab.unnormalized.with_log_normalizer(lambda p, x: p * x)
  params = optlab.unnormalized.NceParams(jnp.ones(()), jnp.zeros(4))
  with pytest.raises(ValueError, match='a scalar, got shape .4,.; of several'):
    model(params, jnp.ones(4))


@functools.cache
def warnings(method, normalizer, draw):
  """Imbalances and warnings of 800 steps, and the mean that was found."""
  rows = 1.0 + draw(jax.random.key(0), (1024, 1))
  noise = optlab.unnormalized.gaussian(jnp.zeros(1), 4 * jnp.eye(1))
  model = MODEL if normalizer else natural
  params = jnp.zeros(())
  if normalizer:
    params = optlab.unnormalized.NceParams(params, params)
  make = optlab.nce if method == 'nce' else optlab.unnormalized.ence
  estimator = make(model)
  tx = optlab.normalized_momentum(optax.cosine_decay_schedule(0.05, 800))
  step = optlab.train_step(estimator, tx)

  def advance(state, key):
    data = jax.random.choice(key, rows, (128,))
    key = jax.random.fold_in(key, 1)
    state, _ = step(state, optlab.noise_batch(noise, key, data, 128, True))
    info = state.estimator_state.info
    return state, (info.imbalance, info.warning)

  keys = jax.random.split(jax.random.key(1), 800)
  state = optlab.init(params, estimator, tx)
  state, found = jax.jit(lambda s: jax.lax.scan(advance, s, keys))(state)
  return state, *found


@over_methods
@pytest.mark.parametrize(
  'draw',
  [
    jax.random.normal,
    pytest.param(jax.random.rademacher, marks=pytest.mark.slow),
  ],
)
def test_a_model_without_a_normalizer_is_told(method, draw):
  """It is bent until its mass is one: a mean of 1 was .5, without a word."""
  state, imbalances, warned = warnings(method, False, draw)
  assert abs(state.params - 1) > 0.3
  assert not np.any(warned[:99])  # Nothing is judged before.
  assert np.all(warned[99:])
  assert np.all(imbalances[99:] > 0.1)
  state, imbalances, warned = warnings(method, True, draw)
  assert abs(state.params.model - 1) < 0.2
  assert not np.any(warned[400:])
  assert np.all(abs(imbalances[400:]) < 0.05)


def test_a_step_that_is_held_leaves_the_balance():
  estimator = optlab.nce(MODEL)
  params = optlab.unnormalized.NceParams(jnp.zeros(()), jnp.zeros(()))
  rows = jnp.linspace(-1.0, 1.0, 8)[:, None]
  batch = optlab.NoiseBatch(
    rows, 2 * rows, standard_log_prob(2 * rows), standard_log_prob(rows)
  )
  estimate = jax.jit(estimator.estimate)
  _, before = estimate(params, estimator.init(params), batch)
  bad = batch._replace(data=jnp.full((8, 1), jnp.nan))
  _, after = estimate(params, before, bad)
  assert after.info.held
  chex.assert_trees_all_equal(before.balance, after.balance)
  assert before.balance.step == 1
