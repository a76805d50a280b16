"""The training step, the compiled loop and the plain estimators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import training


def quadratic(x):
  return 0.5 * jnp.sum(jnp.arange(1.0, 4.0) * (x - 1.0) ** 2)


minimize = functools.partial(
  optlab.minimize, quadratic, tx=optax.sgd(0.3), max_steps=200
)


def test_train_step_is_optax_written_out():
  loss = lambda x, batch: jnp.sum((x - batch) ** 2)
  estimator, tx = optlab.value_and_grad(loss), optax.adam(0.1)
  state = optlab.init(jnp.zeros(3), estimator, tx)
  step = jax.jit(optlab.train_step(estimator, tx))
  params, opt_state = jnp.zeros(3), tx.init(jnp.zeros(3))
  for i in range(5):
    batch = jnp.full(3, float(i))
    state, value = step(state, batch)
    expected, grads = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(state.params, params, rtol=1e-6)
  assert int(state.step) == 5


def test_train_step_serves_a_line_search():
  loss = lambda x, batch: jnp.sum(batch * (x - 1.0) ** 4)
  estimator, tx = optlab.value_and_grad(loss), optax.lbfgs()
  state = optlab.init(jnp.zeros(3), estimator, tx)
  step = jax.jit(optlab.train_step(estimator, tx))
  for _ in range(30):
    state, value = step(state, jnp.arange(1.0, 4.0))
  assert value < 1e-6


def test_with_curvature_adds_the_operator_at_the_point():
  loss = lambda x, batch: jnp.sum(batch * x**3)

  def curvature(x, batch):
    return jax.tree_util.Partial(lambda h, v: h * v, 6.0 * batch * x)

  estimator = optlab.with_curvature(optlab.value_and_grad(loss), curvature)
  x = jnp.array([1.0, 2.0])
  estimate, _ = jax.jit(estimator.estimate)(x, estimator.init(x), 2.0)
  np.testing.assert_allclose(estimate.extras['curvature'](x), [12.0, 48.0])
  np.testing.assert_allclose(estimate.extras['value_fn'](x), estimate.value)


def test_each_stopping_test_holds_alone():
  start = jnp.zeros(3)
  by_grad = minimize(start, grad_tol=1e-3)
  assert by_grad.status == training.GRAD_TOL
  assert by_grad.grad_norm <= 1e-3 < minimize(start).grad_norm + 1e-2
  by_value = minimize(start, target_value=0.1)
  assert by_value.status == training.TARGET_VALUE
  assert by_value.value <= 0.1
  by_steps = minimize(start, max_steps=7)
  assert (by_steps.status, by_steps.steps) == (training.MAX_STEPS, 7)
  stalled = minimize(start, stall_steps=3)
  assert stalled.status == training.STALLED
  assert stalled.steps < 200
  already = minimize(jnp.ones(3), grad_tol=0.0)
  assert (already.status, already.steps) == (training.GRAD_TOL, 0)


def test_stops_at_a_value_that_is_not_finite():
  result = optlab.minimize(
    lambda x: jnp.sum(x**2), jnp.ones(2), optax.sgd(1e30), max_steps=50
  )
  assert result.status == training.NON_FINITE
  assert result.steps < 50


def test_traces_every_step_and_leaves_the_rest_zero():
  result = minimize(
    jnp.zeros(3),
    max_steps=10,
    target_value=0.1,
    trace=lambda result: {'value': result.value, 'x': result.params},
  )
  steps = int(result.steps)
  assert result.trace['value'].shape == (11,)
  assert result.trace['value'][steps] == result.value
  values = np.asarray(result.trace['value'][: steps + 1])
  expected = [quadratic(x) for x in result.trace['x'][: steps + 1]]
  np.testing.assert_allclose(values, expected, rtol=1e-6)
  np.testing.assert_array_equal(result.trace['value'][steps + 1 :], 0.0)


def test_lanes_of_a_vmap_stop_on_their_own():
  starts = jnp.stack([jnp.zeros(3), jnp.full(3, 100.0), jnp.ones(3)])
  run = jax.jit(
    jax.vmap(lambda x: optlab.minimize(
      quadratic, x, optax.sgd(0.3), max_steps=200, grad_tol=1e-3))
  )  # fmt: skip
  result = run(starts)
  alone = [minimize(x, grad_tol=1e-3).steps for x in starts]
  np.testing.assert_array_equal(result.steps, alone)
  assert len(set(np.asarray(result.steps).tolist())) == 3


def test_goes_on_where_an_earlier_result_stopped():
  tx = optax.lbfgs()
  whole = minimize(jnp.zeros(3), tx=tx, max_steps=6)
  part = minimize(jnp.zeros(3), tx=tx, max_steps=4)
  rest = minimize(part.params, tx=tx, max_steps=2, opt_state=part.opt_state)
  np.testing.assert_allclose(rest.params, whole.params, rtol=1e-6)


@pytest.mark.parametrize('make', [optax.lbfgs, optlab.gns_newton])
def test_a_state_of_another_point_or_objective_is_not_believed(make):
  tx = make()
  run = jax.jit(
    lambda x, centre, state: optlab.minimize(
      lambda x: jnp.sum(jnp.cosh(x - centre)), x, tx, max_steps=50,
      grad_tol=1e-3, opt_state=state,
    )
  )  # fmt: skip
  first = run(jnp.full(2, 1.0), 0.0, tx.init(jnp.zeros(2)))
  assert first.success
  for x, centre in [(first.params + 3.0, 0.0), (first.params, 2.0)]:
    then = run(x, centre, first.opt_state)
    assert then.success and then.steps > 0
    np.testing.assert_allclose(then.params, centre, atol=1e-3)


def test_tolerances_may_be_traced():
  run = jax.jit(lambda tol: minimize(jnp.zeros(3), grad_tol=tol).steps)
  assert run(1e-4) > run(1e-1)
  assert run._cache_size() == 1


def test_a_line_search_is_not_made_to_evaluate_twice():
  calls = []

  def fun(x):
    jax.debug.callback(lambda: calls.append(1))
    return quadratic(x)

  result = optlab.minimize(
    fun, jnp.zeros(3), optax.lbfgs(), max_steps=20, grad_tol=1e-5
  )
  jax.effects_barrier()
  searched = int(result.steps)
  # One at the start, then only those inside the line search.
  plain = []

  def counted(x):
    jax.debug.callback(lambda: plain.append(1))
    return quadratic(x)

  params, tx = jnp.zeros(3), optax.lbfgs()
  state = tx.init(params)
  reuse = optax.value_and_grad_from_state(counted)
  for _ in range(searched):
    value, grad = reuse(params, state=state)
    updates, state = tx.update(
      grad, state, params, value=value, grad=grad, value_fn=counted
    )
    params = optax.apply_updates(params, updates)
  jax.effects_barrier()
  assert len(calls) == len(plain)


@pytest.mark.parametrize(
  ('arguments', 'error', 'words'),
  [
    ({'max_steps': -1}, ValueError, 'max_steps must be at least 0, got -1'),
    ({'max_steps': 1.5}, TypeError, 'max_steps must be an integer, got 1.5'),
    ({'grad_tol': -1.0}, ValueError, 'grad_tol must be in'),
    ({'grad_tol': float('nan')}, ValueError, 'grad_tol must be in'),
    ({'stall_steps': 0}, ValueError, 'stall_steps must be at least 1'),
    ({'stall_tol': 'tiny'}, TypeError, 'stall_tol must be a real number'),
  ],
)
def test_bad_arguments_name_themselves(arguments, error, words):
  with pytest.raises(error, match=words):
    minimize(jnp.zeros(3), **arguments)


def test_things_that_are_not_functions_are_refused():
  for make in (optlab.value_and_grad, optlab.stateless):
    with pytest.raises(TypeError, match='must be a function'):
      make(3.0)
  with pytest.raises(TypeError, match='curvature must be a function'):
    optlab.with_curvature(optlab.value_and_grad(quadratic), None)
  with pytest.raises(TypeError, match='fun must be a function'):
    optlab.minimize(None, jnp.zeros(3), optax.sgd(0.1), max_steps=1)
