"""`gns_newton` and `minimize` where they can't go on, or stand elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import training

START = jnp.array([-2.0, 2.0])


def rosenbrock(x):
  return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def quartic(x):
  return jnp.sum(x**4 - x**2)


def minimize(fun, start, tx, max_steps=300, **arguments):
  run = functools.partial(
    optlab.minimize, fun, tx=tx, max_steps=max_steps, **arguments
  )
  return jax.jit(lambda start: run(params=start))(start)


def logistic():
  rng = np.random.default_rng(0)
  features = jnp.asarray(rng.normal(size=(200, 5)), jnp.float32)
  noise = jnp.asarray(rng.normal(size=200), jnp.float32)
  signs = jnp.sign(features @ jnp.arange(5.0) + noise)
  return lambda w: (
    jnp.mean(jnp.logaddexp(0.0, -signs * (features @ w))) + 1e-3 * w @ w
  )


def overflowing():
  rng = np.random.default_rng(0)
  features = jnp.asarray(30 * rng.normal(size=(500, 3)), jnp.float32)
  noise = jnp.asarray(30 * rng.normal(size=500), jnp.float32)
  labels = (features @ jnp.arange(3.0) + noise > 0).astype(jnp.float32)

  def fun(w):
    p = jax.nn.sigmoid(features @ w)
    return -jnp.mean(labels * jnp.log(p) + (1 - labels) * jnp.log(1 - p))

  return fun


SOLVERS = {
  'cg': optlab.cg(),
  'lanczos': optlab.lanczos(),
  'multishift_cg': optlab.newton.multishift_cg(),
  'cholesky': optlab.cholesky(),
  'eigh': optlab.newton.eigh(),
}


@pytest.mark.parametrize('solver', SOLVERS.values(), ids=SOLVERS.keys())
def test_a_solver_that_is_not_ok_shrinks_gamma(solver):
  run = minimize(
    quartic, jnp.full(2, 0.1), optlab.gns_newton(solver), grad_tol=1e-4
  )
  assert run.status == training.GRAD_TOL
  assert run.opt_state.info.total_trials <= 13
  np.testing.assert_allclose(run.params, 0.5**0.5, rtol=1e-5)


@pytest.mark.parametrize(
  'fun, bound',
  [
    (jnp.sum, -30.0),  # It stalled at -6.9.
    (lambda x: jnp.sum((x - 3.0) ** 4 + (x - 3.0) ** 2), 40.0),  # At 82.
  ],
)
def test_a_shift_that_rounding_hides_beside_a_factor_is_no_stall(fun, bound):
  # Its outer product is no curvature of a line: the shift fades on and on.
  factory = optlab.empirical_fisher(fun)
  run = minimize(
    fun, jnp.zeros(1), optlab.gns_newton(), curvature=factory, max_steps=60,
    grad_tol=1e-3,
  )  # fmt: skip
  assert run.status == training.MAX_STEPS and run.value < bound
  solve = optlab.newton.woodbury()(factory(jnp.zeros(1)), jnp.ones(1), 1.0)
  assert solve(1.0)[1] and not solve(1e-12)[1]


@pytest.mark.parametrize('x', [0.0, jnp.nan])
def test_a_solver_that_is_never_ok_is_rejected(x):
  def solver(operator, b, shift):
    del operator, shift
    return optlab.newton.Prepared(lambda shift: (x * b, jnp.asarray(False), 0))

  run = minimize(quartic, jnp.full(2, 0.1), optlab.gns_newton(solver))
  assert (run.status, run.steps) == (training.REJECTED, 1)
  assert run.opt_state.gamma < 1e-12


@pytest.mark.parametrize(
  'found, message',
  [
    (lambda b: (b, True), r'must return \(x, ok, products\)'),
    (lambda b: (b, b > 0, 0), 'where ok and products are scalars'),
    (lambda b: (b, None, 0), 'where ok and products are scalars'),
    (lambda b: (b[:1], True, 0), r"the solver's x has shape \(1,\)"),
  ],
)
def test_what_a_solver_must_find_is_said(found, message):
  solver = lambda operator, b, shift: optlab.newton.Prepared(
    lambda shift: found(b)
  )
  with pytest.raises((TypeError, ValueError), match=message):
    minimize(quartic, jnp.full(2, 0.1), optlab.gns_newton(solver))


def test_a_value_beyond_the_dtype_of_the_state_is_rejected(x64):
  fun = lambda x: jnp.sum((x.astype(jnp.float64) - 1.0) ** 2) + 1e60
  run = minimize(fun, jnp.zeros(2, jnp.float32), optlab.gns_newton())
  assert (run.status, run.steps) == (training.REJECTED, 1)


@pytest.mark.parametrize(
  'rule',
  [optlab.newton.hold(), optlab.newton.double(), optlab.newton.measured()],
)
@pytest.mark.parametrize('make', [logistic, overflowing])
def test_stops_where_rounding_ends_the_descent(make, rule):
  fun = make()
  size = 5 if make is logistic else 3
  run = minimize(
    fun, jnp.zeros(size), optlab.gns_newton(rule=rule), grad_tol=1e-9
  )
  assert run.status == training.STALLED
  assert run.steps < 40 and run.grad_norm < 1e-6
  assert run.opt_state.info.stalled


def test_a_stall_leaves_gamma_as_it_was():
  fun, tx = logistic(), optlab.gns_newton()
  run = minimize(fun, jnp.zeros(5), tx, grad_tol=1e-9)
  before = run.opt_state.gamma
  value, grad = jax.value_and_grad(fun)(run.params)
  for _ in range(3):
    _, state = tx.update(
      grad, run.opt_state, run.params, value=value, grad=grad, value_fn=fun
    )
    assert state.info.stalled or state.info.accepted
    assert state.gamma == before


@pytest.mark.parametrize('make', [optlab.newton.adaptive, optlab.newton.hold])
def test_a_regularization_falls_no_further_than_rounding(x64, make):
  # LUKSAN11LS had one of 1e-58 when its Hessian turned indefinite.
  one = jnp.ones(())
  trial = optlab.newton.Trial(
    gamma=3 * one, shift=one, attempt=1, accepted=True, start_norm=3 * one,
    grad_norm=3 * one, step_norm=1.5 * one, residual_norm=0 * one,
  )  # fmt: skip
  for _ in range(60):
    gamma, _ = make().update(trial, ())
    trial = trial._replace(gamma=gamma, shift=trial.grad_norm / gamma)
  np.testing.assert_allclose(trial.shift, 2 * jnp.finfo(one.dtype).eps)


def test_a_flat_search_at_its_limit_leaves_gamma_as_it_was():
  tx = optlab.gns_newton(max_trials=7, safeguard=False, gamma_init=2.0)
  fun = lambda x: 1.0 + 1e-12 * jnp.sum(x**2)
  x = jnp.ones(2)
  value, grad = jax.value_and_grad(fun)(x)
  updates, state = tx.update(
    grad, tx.init(x), x, value=value, grad=grad, value_fn=fun,
    curvature=optlab.Dense(jnp.eye(2)),
  )  # fmt: skip
  assert not state.info.accepted and state.info.solves == 7
  assert state.gamma == 2.0 and not jnp.any(updates)


def test_a_step_across_a_symmetric_valley_is_no_stall():
  # Half of the true curvature: the first step ends where the value is the same.
  run = minimize(
    lambda x: jnp.sum(x**2) + 1.0,
    jnp.array([3.0, 1.0]),
    optlab.gns_newton(),
    grad_tol=1e-2,
    curvature=lambda x: optlab.Dense(jnp.eye(2)),
  )
  assert run.status == training.GRAD_TOL
  assert run.opt_state.info.total_solves > run.steps


def test_few_trials_a_step_go_on_after_a_rejection():
  run = minimize(
    rosenbrock, START, optlab.gns_newton(max_trials=1), grad_tol=1e-2
  )
  assert run.status == training.GRAD_TOL


WRAPPED = {
  'scaled': lambda tx: optax.chain(tx, optax.scale(0.5)),
  'followed': lambda tx: optax.chain(tx, optax.identity()),
  'preceded': lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
  'nested': lambda tx: optax.chain(optax.chain(tx), optax.scale(0.5)),
  'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
  'MultiSteps': lambda tx: optax.MultiSteps(tx, 2),
  'its transformation': lambda tx: optax.MultiSteps(
    tx, 2
  ).gradient_transformation(),
  'inject': lambda tx: optax.inject_hyperparams(lambda: tx)(),
  'a whole mask': lambda tx: optax.masked(tx, True),
}


@pytest.mark.parametrize('wrap', WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.parametrize(
  'make',
  [optlab.gns_newton, pytest.param(optax.lbfgs, marks=pytest.mark.slow)],
)
def test_the_value_is_that_of_the_point_returned(x64, wrap, make):
  start = START.astype(jnp.float64)  # In float32 two programs differ by a bit.
  run = minimize(rosenbrock, start, wrap(make()), max_steps=5)
  value, grad = jax.value_and_grad(rosenbrock)(run.params)
  np.testing.assert_allclose(run.value, value, rtol=1e-10)
  np.testing.assert_allclose(run.grad_norm, jnp.linalg.norm(grad), rtol=1e-8)
  assert value < rosenbrock(START)


@pytest.mark.parametrize(
  'wrap', [WRAPPED['scaled'], WRAPPED['MultiSteps'], WRAPPED['followed']]
)
def test_a_stall_is_heard_anywhere_in_a_chain(wrap):
  tx = wrap(optlab.gns_newton())
  run = minimize(logistic(), jnp.zeros(5), tx, grad_tol=1e-9)
  assert run.status == training.STALLED


def test_a_stall_of_an_earlier_run_does_not_stop_the_next():
  tx = optlab.gns_newton()
  run = minimize(logistic(), jnp.zeros(5), tx, grad_tol=1e-9)
  on = minimize(
    lambda x: jnp.sum(jnp.cosh(x)), run.params, tx, opt_state=run.opt_state,
    grad_tol=1e-3,
  )  # fmt: skip
  assert on.status == training.GRAD_TOL and on.steps > 0


def test_train_step_evaluates_what_a_later_link_moved(x64):
  estimator = optlab.value_and_grad(lambda x, batch: rosenbrock(x))
  tx = optax.chain(optlab.gns_newton(), optax.scale(0.5))
  state = optlab.init(START, estimator, tx)
  step = jax.jit(optlab.train_step(estimator, tx))
  for _ in range(5):
    expected = rosenbrock(state.params)
    state, value = step(state, None)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.parametrize('wrapper', ['masked', 'partition'])
def test_a_mask_is_told_to_close_over_what_is_frozen(wrapper):
  labels = {'a': 'ours', 'b': 'none'}
  tx = {
    'masked': optax.masked(optlab.gns_newton(), {'a': True, 'b': False}),
    'partition': optax.partition(
      {'ours': optlab.gns_newton(), 'none': optax.set_to_zero()}, labels
    ),
  }[wrapper]
  with pytest.raises(ValueError, match=r"params\['b'\].*close over the others"):
    tx.init({'a': jnp.ones(2), 'b': jnp.ones(2)})


def test_a_link_that_zeroes_a_part_of_the_gradient_is_refused():
  fun = lambda p: (p['a'] - 1) ** 2 + (p['b'] - 2) ** 2 + p['a'] * p['b']
  start = {'a': jnp.float32(0), 'b': jnp.float32(0)}
  frozen = optax.masked(optax.set_to_zero(), {'a': True, 'b': False})
  before = optax.chain(frozen, optlab.gns_newton())
  run = minimize(fun, start, before)
  assert run.status == training.REJECTED and run.params == start
  # Behind it, what lands is evaluated, and `a` stays.
  behind = optax.chain(optlab.gns_newton(), frozen)
  run = minimize(fun, start, behind)
  assert run.params['a'] == 0
  np.testing.assert_allclose(run.params['b'], 2.0, rtol=1e-5)
  # What is shorter everywhere is no fault.
  shorter = optax.chain(optax.scale(0.5), optlab.gns_newton())
  assert minimize(fun, start, shorter, grad_tol=1e-2).success


@pytest.mark.parametrize(
  'update, message',
  [
    (lambda trial, state: trial.gamma, r'must return \(gamma, state\)'),
    (lambda trial, state: (jnp.ones(2), state), 'gamma is a scalar'),
    (lambda trial, state: (trial.gamma, 3), "rule's state must have the tree"),
  ],
)
def test_what_a_rule_must_find_is_said(update, message):
  rule = optlab.newton.SearchRule(lambda gamma: (), update)
  with pytest.raises((TypeError, ValueError), match=message):
    minimize(quartic, jnp.full(2, 0.1), optlab.gns_newton(rule=rule))


@pytest.mark.parametrize(
  'wrong, message',
  [
    ({'value': jnp.ones(1)}, r'value must be a scalar, got shape \(1,\)'),
    ({'updates': jnp.ones(3)}, r'updates has shape \(3,\), but params'),
    ({'size': 3}, r"the state's grad has shape \(3,\), but params"),
    ({'metric': 3}, r'metric must have a matrix of shape \(2, 2\), got'),
  ],
)
def test_what_an_update_is_given_is_named(wrong, message):
  metric = wrong.get('metric') and optlab.Dense(jnp.eye(wrong['metric']))
  tx, x = optlab.gns_newton(metric=metric), jnp.ones(2)
  with pytest.raises((TypeError, ValueError), match=message):
    tx.update(
      wrong.get('updates', x), tx.init(jnp.ones(wrong.get('size', 2))), x,
      value=wrong.get('value', 1.0), grad=x, value_fn=jnp.sum,
    )  # fmt: skip


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('wide', [True, False])
@pytest.mark.parametrize(
  'make',
  [optlab.gns_newton, pytest.param(optax.lbfgs, marks=pytest.mark.slow)],
)
def test_narrow_parameters(make, wide, dtype):
  def fun(x):
    x = x.astype(jnp.float32) if wide else x
    return jnp.sum(jnp.cosh(x - 1.0))

  run = minimize(fun, jnp.zeros(3, dtype), make(), grad_tol=2e-2)
  assert run.params.dtype == dtype and run.grad_norm.dtype == jnp.float32
  assert run.value.dtype == (jnp.float32 if wide else dtype)
  np.testing.assert_allclose(run.params.astype(float), 1.0, atol=5e-2)
  np.testing.assert_allclose(run.value, fun(run.params), rtol=1e-2)


def test_a_value_is_that_of_the_rounded_point():
  fun = lambda x: jnp.sum((x.astype(jnp.float32) - 1.003) ** 2)
  run = minimize(fun, jnp.zeros(3, jnp.bfloat16), optlab.gns_newton(),
                 max_steps=2)  # fmt: skip
  np.testing.assert_allclose(run.value, fun(run.params), rtol=1e-6)


@pytest.mark.parametrize('make', [lambda: optax.sgd(0.1), optax.lbfgs])
def test_complex_parameters_descend(make):
  fun = lambda p: jnp.sum(jnp.abs(p - 1j) ** 2)
  run = minimize(fun, jnp.ones(2, jnp.complex64), make(), grad_tol=1e-3)
  assert run.status == training.GRAD_TOL
  np.testing.assert_allclose(run.params, 1j, atol=1e-3)


def test_complex_parameters_are_refused_by_name():
  with pytest.raises(TypeError, match=r"real parameters, got params\['z'\]"):
    optlab.gns_newton().init({'z': jnp.ones(2, jnp.complex64)})


@pytest.mark.parametrize('solver', SOLVERS.values(), ids=SOLVERS.keys())
def test_scales_at_the_ends_of_float32(solver):
  @jax.jit
  def solved(scale):
    return training.minimize(
      lambda x: scale * rosenbrock(x), START, optlab.gns_newton(solver),
      grad_tol=1e-3 * scale, max_steps=120,
    )  # fmt: skip

  for scale in (1e-30, 1e-22, 1e22, 1e30):
    run = solved(jnp.float32(scale))
    assert run.status == training.GRAD_TOL
    np.testing.assert_allclose(run.params, 1.0, atol=0.1)


@pytest.mark.parametrize('scale', [1e-30, 1e-22, 1e22, 1e30])
def test_norms_of_gradients_at_the_ends_of_float32(scale):
  fun = lambda x: scale * rosenbrock(x)
  start = minimize(fun, START, optax.sgd(0.0), max_steps=1)
  expected = float(jnp.linalg.norm(jax.grad(rosenbrock)(START)))
  np.testing.assert_allclose(float(start.grad_norm) / scale, expected, 1e-5)


@pytest.mark.parametrize('scale', [1e-36, 1e-25, 1.0, 1e25, 1e37])
def test_norms_neither_over_nor_underflow(scale):
  from optlab import trees

  tree = {'a': scale * jnp.array([3.0, 0.0]), 'b': jnp.float32(4.0 * scale)}
  np.testing.assert_allclose(trees.norm(tree) / scale, 5.0, rtol=1e-5)
  slope = jax.grad(trees.norm)(tree)
  np.testing.assert_allclose(slope['a'], [0.6, 0.0], rtol=1e-5)
  assert jax.grad(trees.norm)(jnp.zeros(2)).tolist() == [0.0, 0.0]
  assert trees.norm({}) == 0.0
  assert jax.jit(lambda: trees.norm(jnp.zeros(2)))() == 0.0  # A constant.
  assert jnp.isnan(trees.norm({'a': jnp.array([jnp.nan, scale])}))
  assert jnp.isinf(trees.norm({'a': jnp.array([jnp.inf, scale])}))
