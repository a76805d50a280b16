"""The report on rates, and the recipes of the guide."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab
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
