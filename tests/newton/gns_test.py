"""GNS-Newton: recorded trajectories, the behaviour table, composition."""

import functools
import json
import pathlib
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets

import optlab
from optlab import training
from optlab.newton import _search as smoothness

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'gns'
MUSHROOMS = 'logistic_mushrooms_l2_1overn_g1'


def minimize(fun, start, tx, **arguments):
  """`optlab.minimize` in one compilation."""
  return jax.jit(lambda start: optlab.minimize(fun, start, tx, **arguments))(
    start
  )


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def step(tx, state, params, fun, factory=None):
  """One update, with what a training loop would pass on."""
  value, grad = jax.value_and_grad(fun)(params)
  extras = {} if factory is None else {'curvature': factory(params)}
  return tx.update(
    grad, state, params, value=value, grad=grad, value_fn=fun, **extras
  )


def outcome(state):
  """Trials of the last step, and whether it was accepted or stalled."""
  info = state.info
  return int(info.trials), bool(info.accepted), bool(info.stalled)


def exact(fun):
  return optlab.dense(optlab.hessian(fun))


# The problems of the recorded trajectories: (objective, curvature, metric).


def chebyshev(x):
  return jnp.concatenate([(1 - x[:1]) / 2, x[1:] - (2 * x[:-1] ** 2 - 1)])


def rosenbrock_equations(x):
  return jnp.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)])


def rosenbrock(x):
  return jnp.sum(rosenbrock_equations(x) ** 2)


def equations(u, p):
  loss = lambda u: jnp.sum(u**2) ** (p / 2) / p
  fun = lambda x: loss(u(x))
  return fun, optlab.dense(optlab.gauss_newton(u, loss)), None


def linear_fisher():
  i, j = np.arange(20)[:, None], np.arange(40)[None]
  a = np.sin(0.9 * (i + 1) * (j + 1) + 0.2 * j)
  b = np.cos(0.8 * np.arange(20))
  fun = lambda x: jnp.sum((a @ x - b) ** 2) ** 2 / 4
  metric = optlab.Dense(jnp.asarray(a.T @ a + 1e-3 * np.eye(40)))
  return fun, optlab.empirical_fisher(fun, lambda f: 2 / (4 * f)), metric


def log_sum_exp():
  i, j = np.arange(80)[:, None], np.arange(30)[None]
  a, b, mu = (
    np.sin(1.1 * (i + 1) * (j + 1) + 0.5 * i),
    np.cos(1.7 * i[:, 0]),
    0.5,
  )
  a = jnp.asarray(a - jax.nn.softmax(-b / mu) @ a)
  fun = lambda x: mu * jax.nn.logsumexp((a @ x - b) / mu)
  factory = optlab.empirical_fisher(
    lambda x, a, b: a @ x - b, lambda s: jax.nn.softmax(s / mu) / mu
  )
  curvature = optlab.dense(lambda x: factory(x, a, jnp.asarray(b)))
  return fun, curvature, optlab.Dense(a.T @ a)


def logistic(features, labels, l2):
  loss = lambda u: jnp.mean(jnp.logaddexp(0.0, -labels * u))
  fun = lambda x: loss(features @ x) + l2 / 2 * x @ x
  curvature = optlab.linear_gauss_newton(lambda: features, loss, l2)
  return fun, curvature, None


def logistic_closed():
  i, j = np.arange(60)[:, None], np.arange(12)[None]
  a = np.sin(0.7 * (i + 1) + 1.3 * (j + 1) * (i + 2)) * 10 / (1 + j)
  score = a @ np.cos(np.arange(12)) + 2 * np.cos(2.1 * np.arange(60))
  return logistic(jnp.asarray(a), jnp.where(score > 0, 1.0, -1.0), 1e-4)


def mushrooms(data_dir, l2):
  from sklearn.datasets import load_svmlight_file

  path = data_dir / 'libsvm' / 'mushrooms.libsvm.gz'
  features, labels = load_svmlight_file(str(path))
  signs = jnp.where(labels == labels.max(), 1.0, -1.0)
  return logistic(jnp.asarray(features.toarray()), signs, l2)


PROBLEMS = {
  'chebyshev_n20_p2_gn_fisher': lambda: equations(chebyshev, 2),
  'chebyshev_n20_p4_gn_fisher': lambda: equations(chebyshev, 4),
  'linear_p4_fisher_rank1': linear_fisher,
  'logistic_closed_60x12_g1': logistic_closed,
  'lse_80x30_wgn': log_sum_exp,
  'nle_rosenbrock_p3_gn_fisher': lambda: equations(rosenbrock_equations, 3),
  'rosenbrock_exact': lambda: (
    rosenbrock,
    optlab.dense(optlab.hessian(rosenbrock)),
    None,
  ),
}


def assert_golden(name, problem):
  golden = json.loads((GOLDEN / f'{name}.json').read_text())
  fun, curvature, metric = problem
  run = minimize(
    fun,
    jnp.asarray(golden['x0']),
    optlab.newton.gns_newton_paper(metric=metric),
    max_steps=len(golden['trials']),
    curvature=curvature,
    trace=lambda run: (
      run.value,
      run.opt_state.gamma,
      run.opt_state.info.trials,
    ),
  )
  value, gamma, trials = run.trace
  np.testing.assert_array_equal(gamma, golden['gamma'])
  np.testing.assert_array_equal(trials[1:], golden['trials'])
  np.testing.assert_allclose(value, golden['f'], rtol=1e-8)
  assert run.opt_state.info.total_trials == sum(golden['trials'])


@pytest.mark.parametrize('name', PROBLEMS)
def test_the_papers_trajectory(x64, name):
  assert_golden(name, PROBLEMS[name]())


def test_the_papers_trajectory_on_mushrooms(x64, data_dir):
  assert_golden(MUSHROOMS, mushrooms(data_dir, 1 / 8124))


def test_every_golden_file_is_run():
  names = {path.stem for path in GOLDEN.glob('*.json')}
  assert names == {MUSHROOMS, *PROBLEMS}


# Trials and iterations.


@pytest.mark.parametrize(
  'l2, optimum, steps, trials',
  [
    (1 / 8124, 0.014485866128334236, 9, 10),
    (1e-6, 0.00044118876902965275, 13, 15),
  ],
)
def test_few_trials_on_mushrooms(x64, data_dir, l2, optimum, steps, trials):
  fun, curvature, _ = mushrooms(data_dir, l2)
  run = minimize(
    fun,
    jnp.zeros(112),
    optlab.gns_newton(),
    max_steps=30,
    target_value=optimum + 1e-8,
    curvature=curvature,
  )
  assert run.status == training.TARGET_VALUE
  assert run.steps <= steps
  assert run.opt_state.info.total_trials <= trials


@pytest.mark.parametrize('paper', [True, False])
def test_chebyshev_with_the_exact_indefinite_hessian(x64, paper):
  # The authors' code fails to factorize, repeats its last step and stays.
  start = jnp.asarray(np.random.default_rng(3124).random(100))
  tx = optlab.newton.gns_newton_paper() if paper else optlab.gns_newton()

  def solve(p):
    fun = lambda x: jnp.sum(chebyshev(x) ** 2) ** (p / 2) / p
    run = optlab.minimize(
      fun,
      start,
      tx,
      max_steps=300,
      target_value=1e-8,
      curvature=exact(fun),
    )
    return run.status, jnp.linalg.eigvalsh(jax.hessian(fun)(start))[0]

  status, lowest = jax.jit(jax.vmap(solve))(jnp.array([2.0, 3.0, 4.0]))
  np.testing.assert_array_equal(status, training.TARGET_VALUE)
  assert np.all(lowest < 0)


@pytest.mark.parametrize(
  'rule, solver, dense',
  [
    (smoothness.double(), None, True),
    (smoothness.hold(), None, True),
    (smoothness.measured(), None, True),
    (smoothness.hold(), optlab.newton.eigh(), True),
    (smoothness.hold(), optlab.lanczos(), False),
    (smoothness.double(), optlab.cg(), False),
  ],
)
def test_every_rule_and_solver_reaches_the_optimum(x64, rule, solver, dense):
  fun, curvature, _ = logistic_closed()
  run = minimize(
    fun,
    jnp.zeros(12),
    optlab.gns_newton(solver=solver, rule=rule),
    max_steps=100,
    grad_tol=1e-8,
    curvature=curvature if dense else optlab.hessian(fun),
  )
  assert run.status == training.GRAD_TOL
  np.testing.assert_allclose(run.value, 0.0044375460737241, rtol=1e-10)
  assert (run.opt_state.info.total_products > 1) != dense


# What makes the method.


@pytest.mark.parametrize('gain', [None, 0.1, 0.9])
@pytest.mark.parametrize('metric', [None, 'diagonal', 'matrix'])
def test_accepts_exactly_where_the_decrease_test_holds(x64, metric, gain):
  b = np.diag([3.0, 0.5]) + (0.2 if metric == 'matrix' else 0.0)
  b = np.eye(2) if metric is None else b
  option = {
    None: None,
    'diagonal': jnp.diagonal(jnp.asarray(b)),
    'matrix': optlab.Dense(jnp.asarray(b)),
  }[metric]
  tx = optlab.gns_newton(
    metric=option, gamma_init=64.0, rule=smoothness.double(), gain=gain
  )
  x = jnp.array([-2.0, 2.0])
  factory = exact(rosenbrock)
  state = tx.init(x)
  value_and_grad = jax.jit(jax.value_and_grad(rosenbrock))
  hessian = jax.jit(jax.hessian(rosenbrock))
  dual = lambda g: np.sqrt(g @ np.linalg.solve(b, g))
  trials = []
  for _ in range(6):
    value, grad = value_and_grad(x)
    gamma, taken = float(state.gamma), 0
    while True:  # The search, by hand.
      taken += 1
      shift = dual(grad) / gamma
      matrix = hessian(x) + shift * b
      definite = np.linalg.eigvalsh(matrix)[0] > 0
      new = x - np.linalg.solve(matrix, grad)
      new_value, new_grad = value_and_grad(new)
      decrease, d = value - new_value, new - x
      model = -grad @ d - d @ hessian(x) @ d / 2
      good = decrease >= dual(new_grad) ** 2 / (8 * shift)
      good |= gain is not None and decrease >= gain * model
      if definite and good:
        break
      gamma /= 2
    updates, state = step(tx, state, x, rosenbrock, factory)
    x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(x, new, rtol=1e-6)
    assert (
      state.info.trials == taken
      and state.info.accepted
      and not state.info.stalled
    )
    np.testing.assert_allclose(state.gamma, 2 * gamma)
    np.testing.assert_allclose(state.info.shift, shift, rtol=1e-6)
    np.testing.assert_allclose(state.value, new_value, rtol=1e-6)
    np.testing.assert_allclose(state.grad, new_grad, rtol=1e-4, atol=1e-9)
    trials.append(taken)
  assert max(trials) > 1 and state.info.total_solves == sum(trials)


def test_hold_lowers_lambda_only_after_a_clean_step(x64):
  tx = optlab.gns_newton(gamma_init=64.0, rule=smoothness.hold(), gain=None)
  x = jnp.array([-2.0, 2.0])
  state = tx.init(x)
  factory = exact(rosenbrock)
  seen = set()
  for _ in range(12):
    before = state.info.shift
    clean = state.info.solves == 1
    updates, state = step(tx, state, x, rosenbrock, factory)
    x = optax.apply_updates(x, updates)
    if before > 0:
      expected = (
        before * (0.25 if clean else 1.0) * 4.0 ** (state.info.trials - 1)
      )
      np.testing.assert_allclose(state.info.shift, expected, rtol=1e-9)
      seen.add((bool(clean), int(state.info.trials) > 1))
  assert len(seen) >= 3


def test_measured_takes_lambda_from_the_error_of_the_model(x64):
  fun = lambda x: jnp.sum(jnp.cosh(x)) + x[0]
  tx = optlab.gns_newton(rule=smoothness.measured())
  x = jnp.array([1.0, -2.0])
  updates, state = step(tx, tx.init(x), x, fun, exact(fun))
  grad = jax.grad(fun)(x + updates)
  model = jax.grad(fun)(x) + jax.hessian(fun)(x) @ updates
  error = jnp.linalg.norm(grad - model) / jnp.linalg.norm(updates)
  shift = jnp.linalg.norm(grad) / state.gamma
  assert state.info.accepted
  np.testing.assert_allclose(shift, error, rtol=1e-8)


def test_adaptive_goes_down_as_far_as_the_model_allows(x64):
  fun = lambda x: jnp.sum(jnp.cosh(x)) + x[0]
  for start in ([1.0, -2.0], [1e-3, 1e-3]):
    tx = optlab.gns_newton(gamma_init=1.0)
    x = jnp.array(start)
    updates, state = step(tx, tx.init(x), x, fun, exact(fun))
    assert outcome(state) == (1, True, False)
    grad = jax.grad(fun)(x + updates)
    error = grad + state.info.shift * updates
    measured = jnp.linalg.norm(error) / jnp.linalg.norm(updates)
    expected = jnp.clip(measured, state.info.shift / 1000, state.info.shift / 4)
    shift = jnp.linalg.norm(grad) / state.gamma
    np.testing.assert_allclose(shift, expected, rtol=1e-8)


def test_a_quadratic_takes_few_steps_however_ill_conditioned(x64):
  scales = jnp.geomspace(1e-6, 1.0, 10)
  fun = lambda x: x @ (scales * x) / 2 + x[0]
  run = minimize(
    fun, jnp.ones(10), optlab.gns_newton(), max_steps=20, grad_tol=1e-10,
    curvature=exact(fun),
  )  # fmt: skip
  assert run.status == training.GRAD_TOL and run.steps <= 5
  plain = minimize(
    fun, jnp.ones(10), optlab.gns_newton(rule=smoothness.hold()),
    max_steps=20, grad_tol=1e-10, curvature=exact(fun),
  )  # fmt: skip
  assert plain.steps > run.steps + 3


def test_a_matrix_of_some_hundred_unknowns_is_tried_by_products(x64):
  scales = jnp.geomspace(1e-2, 1.0, 200)
  fun = lambda x: x @ (scales * x) / 2 + jnp.sum(x)
  run = lambda tx: minimize(
    fun, jnp.zeros(200), tx, max_steps=9, grad_tol=1e-9,
    curvature=lambda x: optlab.Dense(jnp.diag(scales)),
  )  # fmt: skip
  default, exact = (
    run(optlab.gns_newton()),
    run(optlab.gns_newton(optlab.cholesky())),
  )
  assert default.success and default.counts.values <= exact.counts.values + 2
  assert exact.counts.products == 1 < default.counts.products
  paper = optlab.newton.gns_newton_paper
  published, same = run(paper()), run(paper(solver=optlab.cholesky()))
  assert published.counts.products == 0
  np.testing.assert_array_equal(published.params, same.params)


def test_the_gain_ratio_saves_most_of_the_evaluations_on_rosenbrock(x64):
  start = jnp.array([-1.2, 1.0])
  run = lambda gain: minimize(
    rosenbrock, start, optlab.gns_newton(gain=gain), max_steps=200,
    grad_tol=1e-4, curvature=exact(rosenbrock),
  )  # fmt: skip
  with_, without = run(0.1), run(None)
  assert with_.status == without.status == training.GRAD_TOL
  assert with_.opt_state.info.total_trials <= 32
  assert without.opt_state.info.total_trials > 60


@pytest.mark.parametrize('metric', [1.0, 1e3])
def test_least_squares_fits_a_curve(x64, metric):
  times = jnp.linspace(0.0, 2.0, 20)
  truth = {'rate': jnp.array(1.3 / metric), 'height': jnp.array(0.7)}
  curve = lambda p, times: p['height'] * jnp.exp(-metric * p['rate'] * times)
  data = curve(truth, times)
  run = optlab.newton.least_squares(
    lambda p, times, data: {'fit': curve(p, times) - data},
    {'rate': jnp.array(0.1 / metric), 'height': jnp.array(2.0)},
    args=(times, data),
    grad_tol=1e-9,
  )
  assert run.success and run.steps < 20
  for name, value in truth.items():
    np.testing.assert_allclose(run.params[name], value, rtol=1e-6)


def test_no_point_is_evaluated_where_no_system_was_solved(x64):
  calls = []

  def fun(x):
    jax.debug.callback(lambda: calls.append(1))
    return jnp.sum(x**4 - x**2)

  run = minimize(fun, jnp.full(2, 0.1), optlab.gns_newton(), max_steps=30,
                 grad_tol=1e-6)  # fmt: skip
  jax.effects_barrier()
  info = run.opt_state.info
  assert info.total_solves > info.total_trials
  # Linearizing for the curvature evaluates once a step more.
  assert len(calls) == 1 + info.total_trials + run.steps


def test_the_first_lambda_does_not_depend_on_scale(x64):
  x = jnp.array([-2.0, 2.0])

  def path(scale):
    fun = lambda x: scale * rosenbrock(x / scale)
    return (
      optlab.minimize(
        fun, scale * x, optlab.gns_newton(), max_steps=5, curvature=exact(fun)
      ).params
      / scale
    )

  paths = jax.jit(jax.vmap(path))(jnp.array([1.0, 1e6, 1e-6]))
  np.testing.assert_allclose(paths[1], paths[0], rtol=1e-6)
  np.testing.assert_allclose(paths[2], paths[0], rtol=1e-6)


def test_a_metric_is_a_change_of_variables(x64):
  weights = jnp.array([4.0, 0.25])
  x = jnp.array([-2.0, 2.0])
  scaled = lambda z: rosenbrock(z / jnp.sqrt(weights))
  start = x * jnp.sqrt(weights)
  for make in (exact, optlab.hessian, optlab.empirical_fisher):

    @jax.jit
    def solve(make=make):
      return optlab.minimize(
        scaled, start, optlab.gns_newton(), max_steps=6, curvature=make(scaled)
      ), optlab.minimize(
        rosenbrock,
        x,
        optlab.gns_newton(
          metric=optlab.Dense(jnp.diag(weights)) if make is exact else weights
        ),
        max_steps=6,
        curvature=make(rosenbrock),
      )

    plain, run = solve()
    assert run.opt_state.info.total_trials == plain.opt_state.info.total_trials
    np.testing.assert_allclose(
      run.params, plain.params / jnp.sqrt(weights), rtol=1e-5
    )


# The behaviour table.


def square(x):
  return jnp.sum(x**2)


def test_float32_converges_without_stalls_before_the_optimum():
  fun, curvature, _ = logistic_closed()
  run = minimize(
    fun,
    jnp.zeros(12, jnp.float32),
    optlab.gns_newton(),
    max_steps=40,
    grad_tol=1e-5,
    curvature=curvature,
    trace=lambda run: run.opt_state.info.trials,
  )
  assert run.value.dtype == jnp.float32
  assert run.status == training.GRAD_TOL
  assert jnp.max(run.trace) <= 6
  np.testing.assert_allclose(run.value, 0.0044375460737241, rtol=1e-4)


def test_rounding_accepts_on_the_gradient():
  fun = lambda x: 1.0 + jnp.sum(jnp.cosh(x))  # Flat to float32 near zero.
  tx, x = optlab.gns_newton(gamma_init=1.0), jnp.array([2e-4, -1e-4])
  assert fun(x) == fun(jnp.zeros(2))  # No decrease to be seen.
  updates, state = step(tx, tx.init(x), x, fun, exact(fun))
  assert (
    state.info.accepted and not state.info.stalled and state.info.trials == 1
  )
  assert jnp.linalg.norm(x + updates) < 0.5 * jnp.linalg.norm(x)
  without = optlab.gns_newton(gamma_init=1.0, safeguard=False)
  _, state = step(without, without.init(x), x, fun, exact(fun))
  assert not state.info.accepted and state.info.trials == 40


def test_a_stall_is_reported_after_few_trials():
  # Noise below the rounding of the value, of a size that the gradient sees.
  fun = lambda x: 1.0 + 1e-9 * jnp.sum(jnp.sin(1e6 * x))
  tx, x = optlab.gns_newton(), jnp.array([1e-4, 3e-4])
  state, stalls, factory = tx.init(x), 0, optlab.empirical_fisher(fun)
  for _ in range(20):
    updates, state = step(tx, state, x, fun, factory)
    x, stalls = x + updates, stalls + int(state.info.stalled)
    assert not (state.info.stalled and state.info.accepted)
    assert state.info.accepted or not np.any(updates)
    assert np.isfinite(state.gamma) and state.gamma > 0
  assert stalls >= 1
  assert state.info.total_trials <= 60


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
def test_a_non_finite_trial_is_rejected(bad):
  fun = lambda x: jnp.where(x[0] < 1.4, bad, jnp.sum((x - 0.6) ** 4))
  tx, x = optlab.gns_newton(gamma_init=1e6), jnp.array([1.6, 1.6])
  updates, state = step(tx, tx.init(x), x, fun, exact(fun))
  assert state.info.accepted and state.info.trials > 1
  assert jnp.any(updates != 0) and jnp.isfinite(state.value)
  assert (x + updates)[0] >= 1.4


def test_zero_gradient_takes_no_trial():
  tx, x = optlab.gns_newton(), jnp.zeros(3)
  updates, state = step(tx, tx.init(x), x, square)
  np.testing.assert_array_equal(updates, 0.0)
  assert (
    state.info.trials == 0
    and not state.info.accepted
    and not state.info.stalled
  )
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_the_search_limit_keeps_the_point_and_the_shrunken_gamma():
  # The given value is too low to be beaten.
  tx, x = optlab.gns_newton(gamma_init=1.0, max_trials=3), jnp.ones(2)
  fun = square
  updates, state = tx.update(
    jax.grad(fun)(x), tx.init(x), x,
    value=-1.0, grad=jax.grad(fun)(x), value_fn=fun,
  )  # fmt: skip
  np.testing.assert_array_equal(updates, 0.0)
  assert (
    state.info.trials == 3
    and not state.info.accepted
    and not state.info.stalled
  )
  np.testing.assert_allclose(state.gamma, 4.0**-3)
  np.testing.assert_allclose(state.value, -1.0)


@pytest.mark.parametrize('where', ['value', 'grad'])
def test_a_non_finite_point_leaves_the_state_sound(where):
  tx, x = optlab.gns_newton(), jnp.ones(2)
  fun = square
  grad, nan = jax.grad(fun)(x), jnp.nan
  value = nan if where == 'value' else fun(x)
  grad = nan * grad if where == 'grad' else grad
  updates, state = tx.update(
    grad, tx.init(x), x, value=value, grad=grad, value_fn=fun
  )
  np.testing.assert_array_equal(updates, 0.0)
  assert state.info.trials == 0 and jnp.isinf(state.value)
  # The next call finds no value to reuse, and goes on.
  value, grad = optax.value_and_grad_from_state(fun)(x, state=state)
  assert value == 2.0
  updates, state = tx.update(
    grad, state, x, value=value, grad=grad, value_fn=fun
  )
  assert state.info.accepted and fun(x + updates) < fun(x)


def test_a_start_on_the_axis_of_a_saddle_ends_in_the_saddle(x64):
  fun = lambda x: x[0] ** 2 / 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4
  on, off = jnp.array([1.0, 0.0]), jnp.array([1.0, 1e-3])
  solve = lambda x: (
    optlab.minimize(
      fun,
      x,
      optlab.gns_newton(),
      max_steps=60,
      grad_tol=1e-8,
      curvature=exact(fun),
    ).params
  )
  ends = jax.jit(jax.vmap(solve))(jnp.stack([on, off]))
  np.testing.assert_allclose(ends[0], [0.0, 0.0], atol=1e-7)
  np.testing.assert_allclose(jnp.abs(ends[1]), [0.0, 1.0], atol=1e-7)


@pytest.mark.parametrize('missing', ['params', 'value', 'grad', 'value_fn'])
def test_missing_extras_are_named(missing):
  tx, x = optlab.gns_newton(), jnp.ones(2)
  given = {'params': x, 'value': 1.0, 'grad': x, 'value_fn': jnp.sum}
  del given[missing]
  with pytest.raises(ValueError, match=f'gns_newton needs .*{missing}=') as e:
    tx.update(x, tx.init(x), **given)
  assert 'value_and_grad' in str(e.value)


@pytest.mark.parametrize(
  'arguments, error, message',
  [
    ({'gamma_init': 0.0}, ValueError, 'gamma_init must be in'),
    ({'gamma_init': 'big'}, TypeError, 'gamma_init must be a real number'),
    ({'max_trials': 0}, ValueError, 'max_trials must be at least 1'),
    ({'solver': 'cholesky'}, TypeError, 'solver must be a function'),
    ({'rule': 'hold'}, TypeError, 'rule must be a SearchRule'),
    ({'gamma_offset': -1.0}, ValueError, 'gamma_offset must be in'),
  ],
)
def test_bad_arguments(arguments, error, message):
  with pytest.raises(error, match=message):
    optlab.gns_newton(**arguments)
  with pytest.raises(ValueError, match='factor must be in'):
    smoothness.hold(factor=1.0)


def test_a_metric_of_another_structure_is_refused():
  tx, x = optlab.gns_newton(metric=jnp.ones(3)), jnp.ones(2)
  with pytest.raises(ValueError, match='metric has shape'):
    step(tx, tx.init(x), x, jnp.sum)


# Composition.


def test_value_and_grad_from_state_saves_every_second_evaluation(x64):
  calls = []

  def fun(x):
    jax.debug.callback(lambda: calls.append(1))
    return rosenbrock(x)

  x, factory = jnp.array([-2.0, 2.0]), exact(rosenbrock)
  run, plain = (
    minimize(f, x, optlab.gns_newton(), max_steps=10, curvature=factory)
    for f in (fun, rosenbrock)
  )
  jax.effects_barrier()
  assert len(calls) == 1 + run.opt_state.info.total_trials
  np.testing.assert_array_equal(run.params, plain.params)


def test_stochastic_batches_never_see_a_stale_value(x64):
  weights = jnp.array([1.0, -2.0, 0.5])
  fun = lambda x, batch: jnp.mean((jnp.tanh(batch @ (x - weights))) ** 2)
  data = jax.random.normal(jax.random.key(0), (12, 16, 3), jnp.float64)
  estimator = optlab.with_curvature(
    optlab.value_and_grad(fun),
    optlab.dense(
      optlab.gauss_newton(
        lambda x, batch: jnp.tanh(batch @ (x - weights)),
        lambda u, batch: jnp.mean(u**2),
      )
    ),
  )
  tx = optlab.gns_newton()
  state = optlab.init(jnp.zeros(3), estimator, tx)
  take, evaluate = jax.jit(optlab.train_step(estimator, tx)), jax.jit(fun)
  for batch in data:
    before = evaluate(state.params, batch)
    state, value = take(state, batch)
    np.testing.assert_allclose(value, before, rtol=1e-12)
    after = evaluate(state.params, batch)
    assert state.opt_state.info.accepted == (before > 0)
    assert after < before or before == 0
    np.testing.assert_allclose(state.opt_state.value, after, rtol=1e-12)
  np.testing.assert_allclose(state.params, weights, atol=1e-2)


def test_a_solver_finds_the_structure_of_the_users_operator(x64):
  class Diagonal(NamedTuple):
    diagonal: jax.Array

    def __call__(self, v):
      return self.diagonal * v

  def solver(operator, b, shift):
    del shift
    return optlab.newton.Prepared(
      lambda shift: (b / (operator.diagonal + shift), jnp.asarray(True), 0)
    )

  fun = lambda x: jnp.sum(jnp.cosh(x))
  run = minimize(
    fun,
    jnp.array([3.0, -1.0]),
    optlab.gns_newton(solver),
    max_steps=30,
    grad_tol=1e-9,
    curvature=lambda x: Diagonal(jnp.cosh(x)),
  )
  assert run.status == training.GRAD_TOL


@pytest.mark.parametrize(
  'curvature',
  ['gauss_newton', pytest.param('empirical_fisher', marks=pytest.mark.slow)],
)
def test_a_small_network_on_batches_of_digits(curvature):
  data = sklearn.datasets.load_digits()
  images = jnp.asarray(data.data / 16, jnp.float32)
  labels = jnp.asarray(data.target)
  keys = jax.random.split(jax.random.key(0))
  params = (
    jax.random.normal(keys[0], (64, 16)) / 8,
    jax.random.normal(keys[1], (16, 10)) / 4,
  )
  model = lambda params, batch: jnp.tanh(batch[0] @ params[0]) @ params[1]
  losses = optax.softmax_cross_entropy_with_integer_labels
  loss = lambda outputs, batch: losses(outputs, batch[1]).mean()
  fun = lambda params, batch: loss(model(params, batch), batch)
  factory = {
    'gauss_newton': optlab.gauss_newton(model, loss),
    'empirical_fisher': optlab.empirical_fisher(fun),
  }[curvature]
  estimator = optlab.with_curvature(optlab.value_and_grad(fun), factory)
  # The network's curvature is crude, and each batch is another function.
  tx = optlab.gns_newton(rule=smoothness.measured())
  take = optlab.train_step(estimator, tx)

  def some(state, start):
    rows = jax.lax.dynamic_slice_in_dim(order, start, 128)
    return take(state, (images[rows], labels[rows]))[0], None

  order = jax.random.permutation(jax.random.key(1), len(labels))
  starts = jnp.tile(jnp.arange(0, 1500, 128), 3)
  state = optlab.init(params, estimator, tx)
  state, _ = jax.jit(lambda state: jax.lax.scan(some, state, starts))(state)
  after = fun(state.params, (images, labels))
  assert after < 0.3, after


def test_vmap_over_problems_and_over_gamma(x64):
  starts = jnp.array([[-2.0, 2.0], [2.0, -1.0]])
  gammas = jnp.array([1.0, 1024.0])

  def solve(start, gamma):
    run = minimize(
      rosenbrock,
      start,
      optlab.gns_newton(gamma_init=gamma),
      max_steps=15,
      curvature=exact(rosenbrock),
    )
    return run.params, run.opt_state.info.total_trials

  together, trials = jax.jit(jax.vmap(solve))(starts, gammas)
  for i in range(2):
    alone, count = jax.jit(solve)(starts[i], gammas[i])
    assert trials[i] == count
    np.testing.assert_allclose(together[i], alone, rtol=1e-6)
  assert trials[0] != trials[1]


def test_inject_hyperparams_and_chain():
  fun, x = lambda x: jnp.sum(jnp.cosh(x)), jnp.array([1.0, -2.0])
  tx = optlab.gns_newton(gamma_init=3.0, rule=smoothness.double())
  injected = optax.inject_hyperparams(optlab.gns_newton)(
    gamma_init=3.0, rule=smoothness.double()
  )
  chained = optax.chain(optax.identity(), tx)
  expected, _ = step(tx, tx.init(x), x, fun)
  for other in (injected, chained):
    updates, state = step(other, other.init(x), x, fun)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    assert optax.tree.get(state, 'total_trials') >= 1
  assert 'gamma_init' in injected.init(x).hyperparams
  optax.inject_hyperparams(optlab.gns_newton)().init(x)


def test_flax_optimizer():
  model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
  inputs = jax.random.normal(jax.random.key(0), (20, 3))
  targets = inputs @ jnp.array([[1.0], [-2.0], [0.5]]) + 3.0
  optimizer = nnx.Optimizer(model, optlab.gns_newton(), wrt=nnx.Param)

  @nnx.jit
  def train(model, optimizer):
    graph, params = nnx.split(model, nnx.Param)

    def fun(params):
      return jnp.mean((nnx.merge(graph, params)(inputs) - targets) ** 2)

    value, grad = jax.value_and_grad(fun)(params)
    optimizer.update(model, grad, value=value, grad=grad, value_fn=fun)
    return value

  values = [float(train(model, optimizer)) for _ in range(8)]
  assert values[-1] < 1e-6 * values[0]
  np.testing.assert_allclose(model.bias[...], 3.0, rtol=1e-3)


def types(tree):
  return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_narrow_params_keep_their_dtype(dtype):
  params = {'w': jnp.ones((2, 2), dtype), 'b': jnp.ones((), dtype)}
  fun = lambda params: sum(
    jnp.sum(jnp.cosh(leaf.astype(jnp.float32)))
    for leaf in jax.tree.leaves(params)
  )
  tx = optlab.gns_newton()
  state = tx.init(params)
  for _ in range(3):
    updates, new_state = step(tx, state, params, fun)
    params = optax.apply_updates(params, updates)
    assert types(new_state) == types(state)
    state = new_state
  for leaf in jax.tree.leaves((updates, params)):
    assert leaf.dtype == dtype
  assert state.gamma.dtype == jnp.float32
  assert jnp.abs(params['b']) < 0.1


# optax's own common test of an optimizer, on its four targets.


def parabola():
  end = jnp.array([1.0, -1.0, 1.0])
  return jnp.array([-1.0, 10.0, 1.0]), end, lambda x: jnp.sum((x - end) ** 2)


def optax_rosenbrock():
  return jnp.zeros(2), jnp.ones(2), rosenbrock


def matrix_parabola():
  end = jnp.array([[3.0, -2.0], [1.0, 4.0]])
  return jnp.zeros((2, 2)), end, lambda x: jnp.sum((x - end) ** 2)


def mixed_tensors():
  end = jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]])
  start = jnp.zeros(3), jnp.zeros((2, 2))
  fun = lambda x: sum(
    jnp.sum((a - b) ** 2) for a, b in zip(x, end, strict=True)
  )
  return start, end, fun


@pytest.mark.parametrize(
  'target', [parabola, optax_rosenbrock, matrix_parabola, mixed_tensors]
)
def test_optax_common(target):
  params, end, fun = target()
  tx = optlab.gns_newton()

  def body(carry, _):
    params, state = carry
    updates, state = step(tx, state, params, fun)
    return (optax.apply_updates(params, updates), state), None

  carry = params, optax.tree.map_params(tx, lambda v: v, tx.init(params))
  run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=30_000)[0])
  for leaf, expected in zip(
    jax.tree.leaves(run(carry)[0]), jax.tree.leaves(end), strict=True
  ):
    np.testing.assert_allclose(leaf, expected, rtol=3e-2, atol=3e-2)
