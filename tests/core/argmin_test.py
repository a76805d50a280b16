"""The lower solution inside the user's own derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import bilevel
from tests.bilevel import bilevel_problems
from tests.bilevel import maps_test


@pytest.mark.parametrize('name', bilevel_problems.NAMES)
def test_the_golden_hypergradients(x64, name):
  problem = bilevel_problems.load(name)
  solve = optlab.argmin(problem.lower, grad_tol=1e-12, rtol=1e-13)

  def value(x):
    result = solve(x, np.zeros_like(problem.inner))
    return problem.upper(x, result.inner, None), result

  # One operation at a time too, once.
  plain = [lambda f: f] if name == 'quadratic_single' else []
  for transform in (*plain, jax.jit):
    (found, result), grads = transform(jax.value_and_grad(value, has_aux=True))(
      problem.x
    )
    np.testing.assert_allclose(grads, problem.hypergradient, atol=1e-9)
    np.testing.assert_allclose(found, problem.value, atol=1e-9)
    assert result.ok and result.steps > 0


def test_forward_reverse_second_order_and_vmap_agree(x64):
  problem = bilevel_problems.load('ridge_log_penalty')
  solve = optlab.argmin(problem.lower, grad_tol=1e-12, rtol=1e-14)
  f = lambda x: problem.upper(
    x, solve(x, jnp.zeros_like(problem.inner)).inner, None
  )
  x = jnp.asarray(problem.x)
  grad = jax.jit(jax.grad(f))
  forward, reverse = jax.jit(jax.jacfwd(f))(x), grad(x)
  np.testing.assert_allclose(forward, reverse, atol=1e-11)
  hessian = jax.jit(jax.hessian(f))(x)
  step = 1e-5 * np.eye(len(x))
  differences = [(grad(x + e) - grad(x - e)) / 2e-5 for e in step]
  np.testing.assert_allclose(hessian, differences, atol=1e-7)
  lanes = jax.jit(jax.vmap(jax.grad(f)))(jnp.stack([x, x + 0.1]))
  np.testing.assert_allclose(lanes[0], reverse, atol=1e-10)


@pytest.mark.parametrize('name', maps_test.PROX)
def test_through_constraints(x64, name):
  expected, _ = maps_test.slopes(name)
  step = bilevel.proximal_map(
    maps_test.lower, maps_test.PROX[name], maps_test.RATE
  )
  solve = optlab.argmin(
    maps_test.lower, lower_map=step, grad_tol=1e-12, max_steps=9000
  )

  def value(x):
    return maps_test.upper(x, solve(x, maps_test.Y).inner, None)

  np.testing.assert_allclose(
    jax.jit(jax.grad(value))(maps_test.X), expected, atol=1e-6
  )


def test_derivatives_by_data_and_in_trees(x64):
  lower = lambda x, y, batch: (
    jnp.sum(jnp.cosh(y['a'] - x['s'] * batch))
    + jnp.sum((y['b'] - y['a'][0]) ** 2)
  )
  solve = optlab.argmin(lower, grad_tol=1e-13, rtol=1e-14)
  start = {'a': jnp.zeros(3), 'b': jnp.zeros(())}
  f = lambda x, batch: jnp.sum(solve(x, start, batch).inner['b'] ** 2)
  x, batch = {'s': jnp.asarray(2.0)}, jnp.array([1.0, 2.0, 3.0])
  by_x, by_data = jax.jit(jax.grad(f, (0, 1)))(x, batch)  # b = a_0 = s d_0.
  np.testing.assert_allclose(by_x['s'], 4.0, atol=1e-9)
  np.testing.assert_allclose(by_data, [8.0, 0.0, 0.0], atol=1e-9)


def test_any_optimizer_and_precision():
  lower = lambda x, y, batch: jnp.sum((y - x) ** 2).astype(y.dtype)
  x = jnp.array([1.0, -2.0])
  for tx in (None, optax.sgd(0.3), optax.adam(0.1)):
    solve = optlab.argmin(lower, tx, grad_tol=1e-4)
    value = lambda x, solve=solve: jnp.sum(solve(x, 0 * x).inner ** 2)
    grad = jax.jit(jax.grad(value))
    np.testing.assert_allclose(grad(x), 2 * x, rtol=1e-3)
    assert grad(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_no_derivative_where_there_is_none():
  x = jnp.ones(2)
  flat = lambda x, y, batch: (y[0] - x[0]) ** 2 - 0.5 * (y[1] * x[1]) ** 2
  solve = optlab.argmin(flat, optax.sgd(0.0), max_steps=3)
  result = solve(x, jnp.zeros(2))
  assert not result.ok and result.residual > 1
  grads = jax.grad(lambda x: jnp.sum(solve(x, jnp.ones(2)).inner))(x)
  assert np.all(np.isnan(grads))


def test_bad_input_is_named():
  lower = lambda x, y, batch: jnp.sum((y - x) ** 2)
  solve = optlab.argmin(lower)
  for x, y, match in (
    (np.arange(2), np.ones(2), r'^x must be floating'),
    (np.ones(2), np.arange(2), r'^y must be floating'),
  ):
    with pytest.raises(TypeError, match=match):
      solve(x, y)
  with pytest.raises(TypeError, match='^tx must be an optax transformation'):
    optlab.argmin(lower, 0.1)
  wrong = functools.partial(optlab.argmin, lower)
  with pytest.raises(ValueError, match=r'lower_map\(x, y, batch\)'):
    wrong(lower_map=lambda x, y, batch: y[:1])(np.ones(2), np.ones(2))


@pytest.mark.parametrize('smooth', [0.0, 1.0])
def test_a_kink_has_no_derivative(smooth):
  """The slope of a distance is constant: no linear system would be met."""
  curved = jnp.array([0.0, smooth])

  def lower(x, y, _):
    return jnp.sum(jnp.where(curved > 0, (y - x) ** 2, jnp.abs(y - x)))

  solve = optlab.argmin(lower)
  found = lambda x: jnp.sum(solve(x, jnp.zeros(2)).inner)
  x = jnp.array([0.3, 0.2])
  assert jnp.all(jnp.isnan(jax.jit(jax.grad(found))(x)))
  assert jnp.isnan(jax.jvp(found, (x,), (x,))[1])


def test_a_lower_level_that_is_no_real_scalar_is_named():
  x = jnp.ones(2)
  square = lambda x, y, batch: (y - x) ** 2
  for lower in (square, lambda *args: (jnp.sum(square(*args)), 0)):
    with pytest.raises(TypeError, match='lower must return a'):
      optlab.argmin(lower)(x, x)
  with pytest.raises(TypeError, match='y must be real, got dtype complex'):
    optlab.argmin(square)(x, x + 0j)


@pytest.mark.parametrize('mapped', [False, True])
def test_no_derivative_where_the_residual_is_not_finite(mapped):
  lower = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)
  lower_map = (lambda x, y, batch: 0.5 * (x + y)) if mapped else None
  solve = optlab.argmin(lower, lower_map=lower_map)
  found = lambda x, y: jnp.sum(solve(x, y).inner)
  bad, y = jnp.array([jnp.nan, 0.3]), jnp.zeros(2)
  assert jnp.all(jnp.isnan(jax.jit(jax.grad(found))(bad, y)))
  np.testing.assert_allclose(jax.grad(found)(y, y), 1.0, rtol=1e-5)
