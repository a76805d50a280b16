"""The report on rates, and the recipes of the guide."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import _growth
from optlab import bilevel
from tests.bilevel import bilevel_problems
from tests.bilevel.faults_test import NOTHING
from tests.bilevel.faults_test import run


def test_the_report_knows_curvatures_lag_and_residual(x64):
  problem = bilevel_problems.load('quadratic_single')
  data = bilevel_problems.read('quadratic_single')
  start = problem.inner + 1.0
  estimator = optlab.soba(problem.upper, problem.lower, optax.sgd(1e-9), 0.1)
  state, _ = run(estimator, problem.x, start, 3)
  report = jax.jit(
    lambda state: bilevel.suggest_rates(
      problem.upper,
      problem.lower,
      problem.x,
      state,
      NOTHING,
      jax.random.key(0),
    )
  )(state)
  values = np.linalg.eigvalsh(data['A'])
  np.testing.assert_allclose(report.largest, values[-1], rtol=1e-8)
  np.testing.assert_allclose(report.smallest, values[0], rtol=1e-6)
  np.testing.assert_allclose(report.dual_lr, 1 / values[-1], rtol=1e-8)
  np.testing.assert_allclose(report.settled_value, problem.value, rtol=1e-2)
  assert report.value > 1.5 * report.settled_value
  np.testing.assert_allclose(
    report.lag, 2 / np.linalg.norm(problem.inner), rtol=1e-2
  )
  f_y = np.asarray(state.inner) - data['t']
  residual = np.linalg.norm(data['A'] @ state.dual - f_y)
  np.testing.assert_allclose(
    report.residual, residual / np.linalg.norm(f_y), rtol=1e-6
  )
  assert report.ok


def test_the_suggested_rates_converge_and_twice_them_do_not():
  key = jax.random.key(1)
  basis, _ = jnp.linalg.qr(jax.random.normal(key, (40, 40)))
  matrix = (basis * jnp.geomspace(0.5, 300.0, 40)) @ basis.T
  lower = lambda x, y, batch: 0.5 * y @ matrix @ y - x @ y
  upper = lambda x, y, batch: jnp.sum(y)
  x, y = jnp.ones(40), jnp.zeros(40)
  state = optlab.soba(upper, lower, optax.sgd(0.1), 0.1).init(x, y)
  report = bilevel.suggest_rates(upper, lower, x, state, NOTHING, key)
  assert 0.9 * 300 < report.largest < 1.001 * 300
  for factor, fine in ((1.0, True), (2.5, False)):
    rate = factor * report.dual_lr
    estimator = optlab.soba(upper, lower, optax.sgd(rate), rate)
    state, _ = run(estimator, x, y, 2000)
    assert (state.info.total_not_ok == 0) == fine
  indefinite = lambda x, y, batch: lower(x, y, batch) - 5.0 * jnp.sum(y**2)
  state = optlab.soba(upper, lower, optax.sgd(0.1), 0.1).init(x, y)
  assert not bilevel.suggest_rates(upper, indefinite, x, state, NOTHING, key).ok


def noisy():
  problem = bilevel_problems.load('quadratic_single')
  data = bilevel_problems.read('quadratic_single')
  lower = lambda x, y, noise: problem.lower(x, y, None) + noise @ y
  upper = lambda x, y, noise: problem.upper(x, y, None) + noise @ y
  return problem, data, upper, lower


def path(estimator, tx, x, y, batches):
  def advance(state, batch):
    state, _ = optlab.train_step(estimator, tx)(state, batch)
    return state, state.params

  start = optlab.init(jnp.asarray(x), estimator, tx, jnp.asarray(y))
  return jax.jit(lambda s: jax.lax.scan(advance, s, batches)[1])(start)


def test_recipes_follow_their_papers(x64):
  """MA-SOBA, SLIP, AdamBO and AmIGO from their equations in NumPy."""
  problem, data, upper, lower = noisy()
  steps, n, m = 6, 3, 2
  random = np.random.RandomState(0)
  xi, zeta = random.randn(2, steps, 4)
  fresh = random.randn(steps, n, 4)
  batches = optlab.BilevelBatch(xi, zeta, fresh)
  rate, nu, rho, theta = 0.05, 0.2, 0.3, 0.4
  adam = optax.adam(rate)

  def reference(kind):
    x, y, z, h = problem.x, problem.inner + 1.0, np.zeros(4), np.zeros(3)
    adam_state, out = adam.init(x), []
    for t in range(steps):
      if kind == 'amigo' and t > 0:  # The first round is `refine`'s.
        for noise in fresh[t]:
          y = y - rho * (data['A'] @ y - data['B'] @ x - data['c'] + noise)
      f_y = y - data['t'] + xi[t]
      g_y = data['A'] @ y - data['B'] @ x - data['c'] + zeta[t]
      old = z
      for _ in range(m if kind == 'amigo' else 1):
        z = z - nu * (data['A'] @ z - f_y)
      used = z if kind == 'amigo' else old
      d = data['rho'] * x + data['B'].T @ used
      if kind != 'amigo':
        y = y - rho * g_y
      h = (1 - theta) * h + theta * d
      if kind == 'adambo':
        update, adam_state = adam.update(d, adam_state, x)
        x = x + np.asarray(update)
      else:
        x = x - rate * {
          'ma_soba': h, 'slip': h / np.linalg.norm(h), 'amigo': d,
        }[kind]  # fmt: skip
      out.append(x)
    return np.stack(out)

  sgd = optax.sgd(rho)
  soba = optlab.soba(upper, lower, sgd, nu)
  amigo = optlab.bo_rep(
    upper, lower, sgd, nu, period=1, lower_steps=n, average=False,
    dual_steps=m, fresh_dual=True,
  )  # fmt: skip
  recipes = {
    'ma_soba': (
      soba, optax.chain(optax.ema(1 - theta, debias=False),
                        optax.sgd(rate))),
    'slip': (soba, optlab.normalized_momentum(rate, 1 - theta)),
    'adambo': (soba, adam),
    'amigo': (amigo, optax.sgd(rate)),
  }  # fmt: skip
  for name, (estimator, tx) in recipes.items():
    got = path(estimator, tx, problem.x, problem.inner + 1.0, batches)
    np.testing.assert_allclose(got, reference(name), atol=1e-12, err_msg=name)


def test_recursive_recipes_follow_their_papers(x64):
  """MRBO and AccBO: STORM of x, y and z, or of x beside Nesterov's y."""
  tau = 0.25
  problem, data, upper, lower = noisy()
  steps, rate, nu, rho, beta = 6, 0.05, 0.2, 0.3, 0.3
  xi, zeta = np.random.RandomState(0).randn(2, steps, 4)
  batches = optlab.BilevelBatch(xi, zeta)

  def reference(kind):
    betas = (beta, 0.2, 0.2) if kind == 'mrbo' else (beta, 1.0, 1.0)
    point = (problem.x, problem.inner + 1.0, np.zeros(4))
    old, v, momentum, out = point, None, np.zeros(4), []
    y = problem.inner + 1.0  # Beside its average, which is in the point.
    for t in range(steps):

      def directions(x, y, z, t=t):
        f_y = y - data['t'] + xi[t]
        return (
          data['rho'] * x + data['B'].T @ z,
          data['A'] @ y - data['B'] @ x - data['c'] + zeta[t],
          data['A'] @ z - f_y,
        )

      fresh = directions(*point)
      if v is None:
        v = fresh
      else:
        parts = zip(v, fresh, directions(*old), betas, strict=True)
        v = [d + (1 - b) * (u - o) for u, d, o, b in parts]
      old, (x, seen, z) = point, point
      if kind == 'mrbo':
        y = y - rho * v[1]
        point = (x - rate * v[0], y, z - nu * v[2])
      else:
        g_y = v[1]
        if kind == 'accbo':
          g_y = directions(x, y, z)[1]
        momentum = g_y + 0.9 * momentum
        x = x - rate * v[0] / np.linalg.norm(v[0])
        y = y - rho * (g_y + 0.9 * momentum)
        weight = tau if kind == 'accbo' else 1.0
        point = (x, (1 - weight) * seen + weight * y, z - nu * v[2])
      out.append(point[0])
    return np.stack(out)

  nesterov = optax.sgd(rho, 0.9, nesterov=True)
  make = bilevel.mrbo
  for name, estimator, tx in (
    (
      'mrbo',
      make(upper, lower, optax.sgd(rho), nu, beta=beta, lower_beta=0.2),
      optax.sgd(rate),
    ),
    (
      'accbo',
      make(
        upper,
        lower,
        nesterov,
        nu,
        beta=beta,
        lower_beta=1.0,
        lower_average=tau,
      ),
      optlab.normalized_momentum(rate, 0.0),
    ),
    (
      'accbo without an average',
      make(upper, lower, nesterov, nu, beta=beta, lower_beta=1.0),
      optlab.normalized_momentum(rate, 0.0),
    ),
  ):
    got = path(estimator, tx, problem.x, problem.inner + 1.0, batches)
    np.testing.assert_allclose(got, reference(name), atol=1e-12, err_msg=name)


@pytest.mark.parametrize('name', ['soba', 'f2sa', 'unrolled'])
def test_what_runs_away_is_told_before_its_numbers_are_absurd(name):
  """Steps of x that are too long; and at the end, where all is rejected."""
  matrix = jnp.array([[1.0, 0.3], [0.3, 0.5]])
  lower = lambda x, y, batch: 0.5 * y @ matrix @ y - (x + jnp.sin(x)) @ y
  upper = lambda x, y, batch: 0.5 * jnp.sum((y - 1.0) ** 2)
  make = {
    'soba': optlab.soba,
    'f2sa': bilevel.f2sa,
    'unrolled': optlab.unrolled,
  }
  second = {'soba': (0.9,), 'f2sa': (50.0,), 'unrolled': ()}
  rest = {'lower_steps': 10} if name == 'unrolled' else {}
  estimator = make[name](upper, lower, optax.sgd(0.9), *second[name], **rest)

  def look(rate):
    tx, x = optax.sgd(rate), jnp.array([2.0, -1.0])
    step = optlab.train_step(estimator, tx)

    def body(state, _):
      state, value = step(state, NOTHING)
      seen = state.estimator_state
      return state, (jnp.max(jnp.abs(seen.inner)), seen.info.ok, value)

    state = optlab.init(x, estimator, tx, jnp.zeros(2))
    return jax.lax.scan(body, state, length=150)[1]

  size, ok, _ = jax.jit(look)(5.0)
  absurd = np.argmax(size > 1e8)
  assert absurd and not np.any(ok[absurd:])
  assert np.all(jax.jit(look)(0.01)[1])


def test_a_lower_variable_that_is_half_of_itself_away_is_told_soon():
  """Where it has more steps to go than it took; not once it has half."""
  lower = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)
  upper = lambda x, y, batch: 0.5 * jnp.sum((y - 3.0) ** 2)
  x = jnp.ones(2)

  def told(rate):
    estimator = optlab.soba(upper, lower, optax.sgd(rate), 0.5)
    body = lambda state, _: estimator.estimate(x, state, NOTHING)[::-1]

    def step(state, _):
      state, _ = body(state, None)
      return state, ~state.info.ok

    return jax.lax.scan(step, estimator.init(x, 0 * x), length=190)[1]

  slow, soon, fast = jax.jit(jax.vmap(told))(jnp.array([1e-3, 0.02, 0.2]))
  assert jnp.all(slow[60:]) and not jnp.any(soon) and not jnp.any(fast)


def test_what_grows_otherwise_does_not_run_away():
  t = jnp.arange(300.0)
  ones = jnp.ones(300)

  def told(slope, size):
    body = lambda rise, at: _growth.follow(rise, at[0].astype(int), at[1:])
    return jax.lax.scan(body, jnp.zeros(3), (t, slope, size))[1]

  assert jnp.argmax(told(1.1**t, 1.1**t)) == 147  # Grown by 1.2e6.
  assert not jnp.any(told(1.0 + t**3, t**3))
  # From nothing, late, from a start of 1e-6, and to and fro.
  for late in (0, 1, 20, 200):
    assert not jnp.any(told(ones, 1.0 * (t > late)))
    assert not jnp.any(told(1e-9 + (t > late), 1e-9 + (t > late)))
  assert not jnp.any(told(ones, jnp.minimum(1.0, 1e-6 * 2.0**t)))
  noise = jnp.exp(jax.random.normal(jax.random.key(0), (2, 300)))
  assert not jnp.any(told(*noise))


def test_hoag_solves_to_the_tolerance_of_the_step(x64):
  problem = bilevel_problems.load('quadratic_single')
  data = bilevel_problems.read('quadratic_single')
  tolerance = optax.exponential_decay(0.5, 1, 0.1)
  estimator = optlab.implicit(
    problem.upper, problem.lower, optax.lbfgs(), rtol=tolerance, warm=False
  )
  state = estimator.init(problem.x, problem.inner + 1.0)
  estimate, relative = jax.jit(estimator.estimate), []
  for t in range(8):
    result, state = estimate(problem.x, state, NOTHING)
    size = np.linalg.norm(state.inner - data['t'])
    relative.append(state.info.dual_residual / size)
    assert relative[-1] <= tolerance(t)
    np.testing.assert_allclose(
      result.grads, data['rho'] * problem.x + data['B'].T @ state.dual,
      atol=1e-12,
    )  # fmt: skip
  assert relative[0] > 1e-3  # No more products than the step asks for.
  np.testing.assert_allclose(result.grads, problem.hypergradient, atol=1e-6)


@pytest.mark.slow
def test_a_value_that_lags_deceives_and_the_report_says_so():
  """Three points learned for a classifier: the guide's example."""
  keys = jax.random.split(jax.random.key(0), 3)
  truth = jax.random.normal(keys[0], (20, 3))
  images = jax.random.normal(keys[1], (512, 20))
  noise = jax.random.gumbel(keys[2], (512, 3))
  labels = jnp.argmax(images @ truth + noise, axis=1)

  def loss(y, images, labels):
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(images @ y, labels)
    )

  upper = lambda x, y, batch: loss(y, images, labels)
  lower = lambda x, y, batch: loss(y, x, jnp.arange(3)) + 5e-3 * jnp.sum(y**2)
  x = images[jnp.array([jnp.argmax(labels == k) for k in range(3)])]
  y = jnp.zeros((20, 3))
  refit = jax.jit(lambda x: upper(x, optlab.argmin(lower)(x, y).inner, None))

  def train(estimator, rate):
    tx = optax.adam(rate)
    step = optlab.train_step(estimator, tx)
    run = lambda s: jax.lax.scan(lambda s, _: step(s, NOTHING), s, length=600)
    state, values = jax.jit(run)(optlab.init(x, estimator, tx, y))
    return state, values[-1]

  state, value = train(optlab.soba(upper, lower, optax.sgd(0.01), 0.01), 0.03)
  report = bilevel.suggest_rates(
    upper, lower, state.params, state.estimator_state, NOTHING,
    jax.random.key(1),
  )  # fmt: skip
  true = refit(state.params)
  assert value < true - 0.3 and report.lag > 1
  assert abs(report.settled_value - true) < 0.1
  run_ = optlab.unrolled(upper, lower, optax.sgd(0.2), lower_steps=20)
  state, value = train(run_, 0.003)
  assert abs(value - refit(state.params)) < 0.05 and value < 0.5
