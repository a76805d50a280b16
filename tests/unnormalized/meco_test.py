"""MECO against closed forms, recorded traces, and the ways it can be wrong."""

import functools
import json
import math
import pathlib

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


def standard_log_prob(x):
  return -(x[:, 0] ** 2) / 2 - HALF_LOG_2PI


def population(log_density):
  """Value, gradient and log Z where the noise rows integrate exactly."""
  estimator = optlab.meco(log_density, gamma=1.0)

  @jax.jit
  def evaluate(params, *batch):
    state = estimator.init(params)
    batch = optlab.NoiseBatch(*(jnp.asarray(part, float) for part in batch))
    return estimator.estimate(params, state, batch)

  return evaluate


def grid(low, high, num):
  """Midpoints, and log densities of the uniform that make means integrals."""
  width = (high - low) / num
  points = low + width * (np.arange(num) + 0.5)
  return points[:, None], np.full(num, -math.log(high - low))


def sigma_points(mean, covariance):
  """2d points with exactly this mean and covariance."""
  mean, scale = np.asarray(mean), np.linalg.cholesky(covariance)
  steps = math.sqrt(len(mean)) * scale.T
  return np.concatenate([mean + steps, mean - steps])


# Closed forms.


@pytest.mark.usefixtures('x64')
def test_gaussian_mean_has_the_exact_likelihood_and_gradient():
  noise, log_q = grid(-24.0, 40.0, 2048)
  models = {
    'natural': population(natural),
    'location': population(lambda theta, x: -((x[:, 0] - theta) ** 2) / 2),
  }
  for case in golden('gauss1d_mean')['cases']:
    # Two points with the moments that the model sees.
    data = np.asarray([[case['mu'] - 1.0], [case['mu'] + 1.0]])
    theta = jnp.asarray(case['theta'])
    for name, evaluate in models.items():
      want = case[name]
      estimate, state = evaluate(theta, data, noise, log_q)
      np.testing.assert_allclose(estimate.value, want['L'], rtol=1e-10)
      np.testing.assert_allclose(
        estimate.grads, want['grad'], rtol=1e-8, atol=1e-8
      )
      np.testing.assert_allclose(
        state.log_normalizer, want['log_z'], rtol=1e-10
      )


@pytest.mark.usefixtures('x64')
def test_gaussian_precision_has_the_exact_gradient_and_hessian():
  noise, log_q = grid(-30.0, 30.0, 4096)

  def model(params, x):
    lam, b = params
    return -lam * x[:, 0] ** 2 / 2 + b * x[:, 0]

  evaluate = population(model)

  def gradient(params, data):
    return evaluate(params, data, noise, log_q)[0].grads

  # With gamma = 1 the Jacobian of the gradient is the likelihood's Hessian.
  hessian = jax.jit(jax.jacfwd(gradient))
  for case in golden('gauss1d_precision')['cases']:
    spread, mean = math.sqrt(case['data_var']), case['data_mean']
    data = np.asarray([[mean - spread], [mean + spread]])
    params = jnp.asarray([case['lam'], case['b']])
    estimate, state = evaluate(params, data, noise, log_q)
    close = {'rtol': 1e-7, 'atol': 1e-9}
    np.testing.assert_allclose(estimate.value, case['L'], **close)
    np.testing.assert_allclose(
      estimate.grads, [case['grad_lam'], case['grad_b']], **close
    )
    np.testing.assert_allclose(state.log_normalizer, case['log_z'], **close)
    np.testing.assert_allclose(hessian(params, data), case['hess'], **close)


@pytest.mark.usefixtures('x64')
def test_gaussian_in_many_dimensions_has_the_exact_gradient():
  def model(params, x):
    precision, b = params
    return -0.5 * jnp.einsum('ni,ij,nj->n', x, precision, x) + x @ b

  for case in golden('gaussNd_precision')['cases']:
    precision, b = np.asarray(case['P']), np.asarray(case['b'])
    covariance = np.linalg.inv(precision)
    # Noise equal to the model has constant weights; its sigma points then
    # integrate the gradient, which is quadratic, exactly.
    noise = sigma_points(covariance @ b, covariance)
    # Every sigma point lies at the same distance, d in whitened squares.
    size = len(b)
    log_det = np.linalg.slogdet(covariance)[1]
    log_q = -0.5 * (size + log_det) - size * HALF_LOG_2PI
    estimate, state = population(model)(
      (jnp.asarray(precision), jnp.asarray(b)),
      sigma_points(case['data_mean'], case['data_cov']),
      noise,
      np.full(2 * size, log_q),
    )
    np.testing.assert_allclose(estimate.value, case['L'], rtol=1e-9)
    np.testing.assert_allclose(state.log_normalizer, case['log_z'], rtol=1e-9)
    grad_precision, grad_b = estimate.grads
    np.testing.assert_allclose(grad_precision, case['grad_P'], atol=1e-9)
    np.testing.assert_allclose(grad_b, case['grad_b'], atol=1e-9)
    np.testing.assert_allclose(state.info.ess, len(noise), rtol=1e-9)


def _gamma_case(case):
  def model(params, x):
    log_x = jnp.log(x[:, 0])
    return (params['shape'] - 1) * log_x - params['rate'] * x[:, 0]

  mean, log_mean = case['data_mean_x'], case['data_mean_logx']
  spread = math.sqrt(mean**2 - math.exp(2 * log_mean))
  params = {name: case[name] for name in ('rate', 'shape')}
  # x = exp(t) on a grid of t: the uniform in t has density 1 / x in x.
  t, log_q = grid(-40.0, 6.0, 20000)
  noise, log_q = np.exp(t), log_q - t[:, 0]
  return model, params, [[mean - spread], [mean + spread]], noise, log_q


def _laplace_case(case):
  def model(params, x):
    return -params['b'] * jnp.abs(x[:, 0])

  # x = exp(t), for the kink at zero; each point stands for its mirror image.
  t, log_q = grid(-40.0, 6.0, 20000)
  data, log_q = [[case['data_mean_absx']]], log_q - t[:, 0] - math.log(2)
  return model, {'b': case['b']}, data, np.exp(t), log_q


def _categorical_case(case):
  def model(params, x):
    return params[x[:, 0].astype(int)]

  counts = np.round(10 * np.asarray(case['data_p'])).astype(int)
  data = np.repeat(np.arange(4.0), counts)[:, None]
  noise, log_q = np.arange(4.0)[:, None], np.full(4, -math.log(4))
  return model, np.asarray(case['logits']), data, noise, log_q


def _quartic_case(case):
  # The data enters by its moments: a row is a pair (x^2, x^4).
  def model(params, row):
    return row[:, 0] - params['a4'] * row[:, 1]

  data = [[case['data_mean_x2'], case['data_mean_x4']]]
  points, log_q = grid(-9.0, 9.0, 4096)
  noise = np.concatenate([points**2, points**4], 1)
  return model, {'a4': case['a4']}, data, noise, log_q


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  'family, make',
  [
    ('gamma', _gamma_case),
    ('laplace', _laplace_case),
    ('categorical', _categorical_case),
    ('quartic', _quartic_case),
  ],
)
def test_other_exponential_families(family, make):
  cases = [c for c in golden('expfam')['cases'] if c['family'] == family]
  evaluate = population(make(cases[0])[0])
  for case in cases:
    _, params, data, noise, log_q = make(case)
    params = jax.tree.map(np.asarray, params)
    estimate, state = evaluate(params, np.asarray(data), noise, log_q)
    close = {'rtol': 1e-6, 'atol': 1e-7}
    np.testing.assert_allclose(state.log_normalizer, case['log_z'], **close)
    np.testing.assert_allclose(estimate.value, case['L'], **close)
    want, got = (
      np.hstack(jax.tree.leaves(tree))
      for tree in (case['grad'], estimate.grads)
    )
    np.testing.assert_allclose(got, want, **close)


# Recorded traces.


@functools.cache
def sgd_step(ratio_correction):
  """A compiled step that takes gamma as an argument."""

  def step(gamma, state, batch):
    estimator = optlab.meco(natural, gamma, ratio_correction=ratio_correction)
    return optlab.train_step(estimator, optax.sgd(0.1))(state, batch)

  return jax.jit(step)


def meco_trace(gamma, ratio_correction, dtype):
  recorded = golden('sgd_traces')
  estimator = optlab.meco(natural, gamma, ratio_correction=ratio_correction)
  state = optlab.init(jnp.zeros((), dtype), estimator, optax.sgd(0.1))
  step = functools.partial(
    sgd_step(ratio_correction), jnp.asarray(gamma, dtype)
  )
  thetas, values, log_us = [], [], []
  for data, noise in zip(recorded['X'], recorded['Z'], strict=True):
    data, noise = (jnp.asarray(rows, dtype)[:, None] for rows in (data, noise))
    thetas.append(float(state.params))
    batch = optlab.NoiseBatch(data, noise, standard_log_prob(noise))
    state, value = step(state, batch)
    values.append(float(value))
    log_us.append(float(state.estimator_state.log_normalizer))
  return thetas + [float(state.params)], values, log_us


def recorded_meco(correction):
  for case in golden('sgd_traces')['cases']:
    if case['method'] == 'meco' and case['correction'] == correction:
      steps = case['steps']
      return (
        [row['theta'] for row in steps] + [case['final_theta']],
        [row['value'] for row in steps],
        [row['log_u'] for row in steps],
      )
  raise AssertionError(correction)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('correction', ['none', 'storm'])
def test_sgd_trace(correction):
  want = recorded_meco(correction)
  for dtype, tolerance in ((jnp.float64, 1e-10), (jnp.float32, 1e-5)):
    got = meco_trace(0.2, correction == 'storm', dtype)
    for actual, expected in zip(got, want, strict=True):
      np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance
      )


def test_trace_tells_meco_from_its_parent():
  # gamma = 1 is self-normalized importance sampling.
  want = recorded_meco('none')[0]
  got = meco_trace(1.0, False, jnp.float32)[0]
  assert abs(got[-1] - want[-1]) > 1e-2


@pytest.mark.usefixtures('x64')
def test_tracker_trace():
  # The gradient of the identity model is the coefficient of each row.
  def model(params, x):
    return params[x[:, 0].astype(int)]

  @functools.partial(jax.jit, static_argnums=0)
  def update(debias, gamma, params, state, batch):
    estimator = optlab.meco(model, gamma, debias=debias)
    return estimator.estimate(params, state, batch)

  for case in golden('tracker_trace')['cases']:
    log_w = jnp.asarray(case['log_w'])
    m = log_w.shape[1]
    noise = jnp.arange(1.0, m + 1)[:, None]
    estimator = optlab.meco(model, case['gamma'], debias=case['debias'])
    state = estimator.init(jnp.zeros(m + 1))
    estimate = functools.partial(
      update, case['debias'], jnp.asarray(case['gamma'])
    )
    for row, want in zip(log_w, case['steps'], strict=True):
      params = jnp.concatenate([jnp.zeros(1), row])
      batch = optlab.NoiseBatch(jnp.zeros((1, 1)), noise, jnp.zeros(m))
      result, state = estimate(params, state, batch)
      close = {'rtol': 1e-9, 'atol': 1e-12}
      np.testing.assert_allclose(state.log_normalizer, want['log_u'], **close)
      np.testing.assert_allclose(result.grads[1:], want['coef'], **close)
      np.testing.assert_allclose(result.grads[0], -1.0)
      np.testing.assert_allclose(state.info.ess, want['ess'], **close)
      assert np.sum(result.grads[1:]) <= (1 + 1e-12) / want['gamma_t']


# What makes the method itself.


def random_problem(seed, n=6, m=5):
  """Parameters of a small nonlinear model, and one batch."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {'w': jnp.asarray(normal(2, 4)), 'v': jnp.asarray(normal(4))}
  data, noise = normal(n, 2), 1.5 * normal(m, 2)
  log_q = np.sum(-(noise**2) / 4.5 - math.log(1.5) - HALF_LOG_2PI, -1)
  return params, optlab.NoiseBatch(data, noise, log_q)


def network(params, x):
  x = x.astype(params['w'].dtype)
  base = -0.5 * jnp.sum(x**2, -1)
  return jnp.tanh(x @ params['w']) @ params['v'] + base


def test_gamma_one_is_self_normalized_importance_sampling():
  params, batch = random_problem(0)
  estimator = optlab.meco(network, gamma=1.0)
  state = estimator.init(params)._replace(
    log_normalizer=jnp.float32(123.0), weight=jnp.float32(1.0)
  )  # The past must not matter.
  estimate, state = jax.jit(estimator.estimate)(params, state, batch)

  def loss(params):
    log_w = network(params, batch.noise) - batch.noise_log_prob
    mean = jax.nn.logsumexp(log_w) - math.log(len(log_w))
    return mean - jnp.mean(network(params, batch.data))

  value, grads = jax.value_and_grad(loss)(params)
  np.testing.assert_allclose(estimate.value, value, rtol=1e-6)
  for name in params:
    np.testing.assert_allclose(estimate.grads[name], grads[name], atol=1e-6)


@pytest.mark.parametrize('ratio_correction', [False, True])
def test_a_constant_in_the_model_changes_nothing(ratio_correction):
  params, _ = random_problem(0)
  estimator = optlab.meco(
    lambda params, x: network(params['net'], x) + params['shift'],
    0.3,
    ratio_correction=ratio_correction,
  )
  estimate = jax.jit(estimator.estimate)
  runs = []
  for shift in (0.0, 300.0, -300.0):
    state = estimator.init({'net': params, 'shift': jnp.float32(shift)})
    run = []
    for seed in range(4):
      _, batch = random_problem(seed)
      net = jax.tree.map(lambda leaf, seed=seed: leaf * 1.1**seed, params)
      moved = {'net': net, 'shift': jnp.float32(shift)}
      result, state = estimate(moved, state, batch)
      run.append((result.grads['net'], state.log_normalizer - shift))
    runs.append(run)
  for run in runs[1:]:
    for (grads, log_u), (want, want_log_u) in zip(run, runs[0], strict=True):
      for name in params:
        np.testing.assert_allclose(
          grads[name], want[name], rtol=1e-4, atol=1e-4
        )
      np.testing.assert_allclose(log_u, want_log_u, atol=1e-4)


@pytest.mark.usefixtures('x64')
def test_lag_follows_its_law_and_ratio_correction_removes_it():
  # The model's only parameter is log Z itself, so the noise coefficients sum
  # to g / u.
  def model(log_z, x):
    return log_z + standard_log_prob(x)

  noise = jnp.linspace(-1.0, 1.0, 4)[:, None]
  batch = optlab.NoiseBatch(noise, noise, standard_log_prob(noise))

  def ratio(r, gamma, ratio_correction):
    estimator = optlab.meco(model, gamma, ratio_correction=ratio_correction)

    def body(state, t):
      estimate, state = estimator.estimate(r * t, state, batch)
      return state, estimate.grads + 1.0  # The data's share is -1.

    steps = jnp.arange(4000.0)
    return jax.lax.scan(body, estimator.init(jnp.zeros(())), steps)[1][-1]

  cases = golden('theory')['tracker_lag']
  r = jnp.asarray([case['r'] for case in cases])
  gamma = jnp.asarray([case['gamma'] for case in cases])
  want = [case['ratio'] for case in cases]
  plain, corrected = (
    jax.jit(jax.vmap(lambda r, gamma, c=c: ratio(r, gamma, c)))(r, gamma)
    for c in (False, True)
  )
  np.testing.assert_allclose(plain, want, rtol=1e-6)
  np.testing.assert_allclose(corrected, 1.0, rtol=1e-9)


def test_gamma_may_be_a_schedule():
  params, batch = random_problem(0)
  runs = []
  for gamma in (0.25, optax.constant_schedule(0.25), jnp.float32(0.25)):
    estimator = optlab.meco(network, gamma)
    state = estimator.init(params)
    update = jax.jit(estimator.estimate)
    for _ in range(2):
      estimate, state = update(params, state, batch)
    runs.append(estimate)
  for run in runs[1:]:
    np.testing.assert_array_equal(run.grads['w'], runs[0].grads['w'])


def test_one_joint_forward_pass():
  params, batch = random_problem(0)
  calls = []

  def counted(params, x):
    calls.append(x.shape)
    return network(params, x)

  estimator = optlab.meco(counted)
  jax.make_jaxpr(estimator.estimate)(params, estimator.init(params), batch)
  # The second trace is the repetition for bad rows, a loop that rarely turns.
  assert calls == [(11, 2), (11, 2)]


# Bad rows.

METHODS = {
  'meco': lambda model: optlab.meco(model, 0.3),
  'ratio_corrected': lambda model: optlab.meco(
    model, 0.3, ratio_correction=True
  ),
  # nu is fixed: by default it is m / n of the batch as it was given.
  'nce': lambda model: optlab.nce(model, nu=0.8),
  'ence': optlab.unnormalized.ence,
}
TRACKING = ('meco', 'ratio_corrected')
over_methods = pytest.mark.parametrize('method', METHODS)
over_dtypes = pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])


def marked(params, x):
  """`network`, spoiled where the last column says so, and in its gradient."""
  mark = x[:, -1].astype(params['w'].dtype)
  # log 0, log of a negative number and 1 / 0 differentiate to NaN.
  spoiled = jnp.select(
    [mark == 1, mark == 2, mark == 3],
    [jnp.log(mark - 2), jnp.log(mark - 2), 1 / (mark - 3)],
    jnp.zeros((), mark.dtype),
  )
  return network(params, x[:, :2]) + spoiled * (1 + 0 * params['v'][0])


NAN, MINUS_INF, PLUS_INF = 1.0, 2.0, 3.0


def spoil(batch, data_marks, noise_marks, dtype=np.float32):
  """The batch with a column of marks, and scores for NCE."""

  def mark(rows, marks):
    marks = np.asarray(marks, rows.dtype)[:, None]
    return np.concatenate([rows, marks], 1).astype(dtype)

  return optlab.NoiseBatch(
    mark(batch.data, data_marks),
    mark(batch.noise, noise_marks),
    batch.noise_log_prob,
    np.asarray(-np.sum(batch.data**2, -1) / 4.5, np.float32),
  )


def without(batch, data, noise):
  """The batch without some rows."""
  drop = lambda rows, which: np.delete(rows, list(which), axis=0)
  return optlab.NoiseBatch(
    drop(batch.data, data),
    drop(batch.noise, noise),
    drop(batch.noise_log_prob, noise),
    drop(batch.data_log_prob, data),
  )


@functools.cache
def jitted(method):
  """The estimator and its compiled function, once for all tests."""
  estimator = METHODS[method](marked)
  return estimator, jax.jit(estimator.estimate)


def run(method, params, *batches, state=None):
  """Estimates on one batch after the other."""
  estimator, estimate = jitted(method)
  state = estimator.init(params) if state is None else state
  for batch in batches:
    result, state = estimate(params, state, batch)
  return result, state


def problem(seed, dtype=jnp.float32):
  params, batch = random_problem(seed)
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  return params, batch, spoil(batch, [0] * 6, [0] * 5, dtype)


def assert_same(actual, expected, tolerance):
  """Equal up to the order of summation."""
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.all(np.isfinite(a))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@over_methods
@over_dtypes
def test_a_bad_row_is_as_if_it_were_not_there(method, dtype):
  tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
  params, batch, good = problem(1, dtype)
  bad = spoil(
    batch, [0, NAN, 0, PLUS_INF, 0, 0], [PLUS_INF, 0, 0, NAN, 0], dtype
  )
  log_q = bad.noise_log_prob.copy()
  log_q[4] = -np.inf
  bad = bad._replace(noise_log_prob=log_q)
  estimate, state = run(method, params, good, bad)
  fewer = without(good, data=(1, 3), noise=(0, 3, 4))
  expected, expected_state = run(method, params, good, fewer)
  assert_same(estimate.value, expected.value, tolerance)
  assert_same(estimate.grads, expected.grads, tolerance)
  assert state.info.rejected == 5
  assert expected_state.info.rejected == 0
  if method in TRACKING:
    assert state.log_normalizer.dtype == jnp.float32
    assert_same(state.log_normalizer, expected_state.log_normalizer, tolerance)
    assert_same(state.info.ess, expected_state.info.ess, 10 * tolerance)


@over_methods
@over_dtypes
def test_noise_outside_the_support_has_weight_zero(method, dtype):
  tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
  params, batch, good = problem(2, dtype)
  outside = spoil(batch, [0] * 6, [0, MINUS_INF, 0, 0, 0], dtype)
  estimate, state = run(method, params, good, outside)
  # A good row of so high a noise density has no weight either.
  log_q = good.noise_log_prob.copy()
  log_q[1] = 1e30
  weightless = good._replace(noise_log_prob=log_q)
  expected, _ = run(method, params, good, weightless)
  assert state.info.rejected == 0
  assert_same(estimate.value, expected.value, tolerance)
  assert_same(estimate.grads, expected.grads, tolerance)


@over_dtypes
@pytest.mark.parametrize('method', TRACKING)
def test_noise_all_outside_the_support_holds_the_tracker(method, dtype):
  params, batch, good = problem(3, dtype)
  outside = spoil(batch, [0] * 6, [MINUS_INF] * 5, dtype)
  data_term = jax.jit(
    jax.grad(lambda params: -jnp.mean(marked(params, outside.data)))
  )(params)
  _, after_a_step = run(method, params, good)
  for state in (after_a_step, jitted(method)[0].init(params)):
    estimate, held = run(method, params, outside, state=state)
    assert held.log_normalizer == state.log_normalizer
    assert held.weight == state.weight
    assert held.info.total_held == state.info.total_held + 1
    assert held.info.rejected == 0
    assert held.info.ess == 0
    assert np.isfinite(estimate.value)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    assert_same(estimate.grads, data_term, tolerance)
    after, _ = run(method, params, good, state=held)
    expected, _ = run(method, params, good, state=state)
    assert_same(after.grads, expected.grads, 1e-6)


@over_methods
@over_dtypes
@pytest.mark.parametrize('spoiled', ['noise', 'data', 'both'])
def test_without_a_good_row_the_parameters_stay(method, dtype, spoiled):
  params, batch, good = problem(4, dtype)
  bad = spoil(
    batch,
    [0 if spoiled == 'noise' else NAN] * 6,
    [0 if spoiled == 'data' else NAN] * 5,
    dtype,
  )
  estimate, state = run(method, params, good, bad)
  assert np.isfinite(estimate.value)
  for leaf in jax.tree.leaves(estimate.grads):
    np.testing.assert_array_equal(np.asarray(leaf, np.float32), 0.0)
  assert state.info.rejected == {'noise': 5, 'data': 6, 'both': 11}[spoiled]
  if spoiled != 'data' or method not in TRACKING:
    assert state.info.total_held == 1


def test_recorded_bad_rows():
  def model(params, x):
    return params[0] + x[:, 0]

  numbers = lambda entries: np.asarray(
    [float(entry) for entry in entries], np.float32
  )
  estimator = optlab.meco(model, 0.3)
  update = jax.jit(estimator.estimate)
  for case in golden('bad_rows')['cases']:
    log_p, log_q = numbers(case['logp']), numbers(case['logq'])
    state = estimator.init(jnp.zeros(1))
    rows = np.zeros((1, 1), np.float32)
    batch = optlab.NoiseBatch(rows, log_p[:, None], log_q)
    estimate, state = update(jnp.zeros(1), state, batch)
    assert state.info.rejected == case['n_bad']
    if case['log_g'] == '-inf':
      assert state.info.total_held == 1
      assert state.log_normalizer == 0
      # Without a good row nothing moves; without weight the noise does not.
      expected = 0.0 if case['n_bad'] else -1.0
      assert estimate.grads == expected
    else:
      np.testing.assert_allclose(state.log_normalizer, case['log_g'], rtol=1e-6)
      assert state.info.total_held == 0
    if 'ess' in case:
      np.testing.assert_allclose(state.info.ess, case['ess'], rtol=1e-6)


def test_a_bad_row_in_one_lane_of_a_vmap_leaves_the_others_alone():
  params, batch, good = problem(5)
  bad = spoil(batch, [0] * 6, [0, 0, NAN, 0, 0])
  estimator, _ = jitted('meco')
  both = jax.tree.map(lambda *leaves: np.stack(leaves), good, bad)
  together, states = jax.jit(
    jax.vmap(
      lambda batch: estimator.estimate(params, estimator.init(params), batch)
    )
  )(both)
  for i, batch in enumerate((good, bad)):
    alone, _ = run('meco', params, batch)
    lane = jax.tree.map(lambda leaf, i=i: leaf[i], together.grads)
    assert_same(lane, alone.grads, 1e-6)
  np.testing.assert_array_equal(states.info.rejected, [0, 1])


def test_bfloat16_model_keeps_a_float32_tracker():
  # With steps of 1e-3 in log Z a bfloat16 tracker near 8 would stand still.
  def model(log_z, x):
    return jnp.broadcast_to(log_z, x.shape[:1])

  noise = jnp.ones((4, 1), jnp.bfloat16)
  batch = optlab.NoiseBatch(noise, noise, jnp.full(4, -1e-3))
  estimator = optlab.meco(model, 0.5)
  params = jnp.bfloat16(8.0)
  state = estimator.init(params)
  estimate, state = jax.jit(estimator.estimate)(params, state, batch)
  assert estimate.grads.dtype == jnp.bfloat16
  assert state.log_normalizer.dtype == jnp.float32
  np.testing.assert_allclose(state.log_normalizer, 8.001, rtol=1e-6)


# What is refused.


@pytest.mark.parametrize('gamma', [0.0, -0.1, 1.5, math.nan])
def test_gamma_outside_its_interval(gamma):
  with pytest.raises(ValueError, match='gamma must be in'):
    optlab.meco(network, gamma)


def test_gamma_that_is_no_number():
  with pytest.raises(TypeError, match='gamma'):
    optlab.meco(network, '0.1')


@over_methods
def test_batches_that_do_not_match(method):
  params, _, batch = problem(0)
  estimator, _ = jitted(method)
  state = estimator.init(params)
  cases = {
    'takes a NoiseBatch': tuple(batch),
    'at least one row': without(batch, (), range(5)),
    'noise_log_prob must have shape': batch._replace(
      noise_log_prob=np.zeros(6)
    ),
    'data_log_prob must have shape': batch._replace(data_log_prob=np.zeros(5)),
    'rows of data and noise': batch._replace(noise=batch.noise[:, :1]),
    'one structure': batch._replace(noise={'x': batch.noise}),
  }
  if method not in TRACKING:
    cases['score_data=True'] = batch._replace(data_log_prob=None)
  for match, wrong in cases.items():
    with pytest.raises((TypeError, ValueError), match=match):
      jax.eval_shape(estimator.estimate, params, state, wrong)


def test_a_model_of_the_wrong_shape():
  params, batch = random_problem(0)
  estimator = optlab.meco(lambda params, x: network(params, x)[:, None])
  with pytest.raises(ValueError, match='one number a row'):
    estimator.estimate(params, estimator.init(params), batch)
  with pytest.raises(TypeError, match='log_density must be a function'):
    optlab.meco(None)


def test_diagnostics_are_found_in_the_state():
  params, batch = random_problem(0)
  estimator, tx = optlab.meco(network), optax.adam(1e-3)
  state = optlab.init(params, estimator, tx)
  state, _ = jax.jit(optlab.train_step(estimator, tx))(state, batch)
  for name in ('log_normalizer', 'ess', 'rejected', 'held'):
    assert optax.tree.get(state, name) is not None
