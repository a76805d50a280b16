"""Derivatives of what `minimize` finds; its arguments and its words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import training

THETA = {'a': jnp.array([0.3, -0.2]), 'b': jnp.array(0.7)}


def fun(params, theta):
  u, v = params['u'], params['v']
  return (
    jnp.sum(jnp.cosh(u - theta['a'])) + jnp.sum((v - theta['b'] * u[0]) ** 4)
    + jnp.sum((v - theta['b']) ** 2) + 0.3 * u[0] * v[1]
  )  # fmt: skip


def start():
  return {'u': jnp.zeros(2), 'v': jnp.zeros((3,))}


TX = {'gns_newton': optlab.gns_newton(), 'lbfgs': optax.lbfgs()}
over_tx = pytest.mark.parametrize('tx', TX.values(), ids=TX.keys())


def argmin(theta, tx, **arguments):
  arguments = {'max_steps': 200, 'grad_tol': 1e-9, 'args': (theta,)} | arguments
  return optlab.minimize(fun, start(), tx, **arguments)


def numeric(of, theta, eps=1e-5):
  flat, unravel = jax.flatten_util.ravel_pytree(theta)
  ends = flat + eps * jnp.stack([jnp.eye(flat.size), -jnp.eye(flat.size)])
  above, below = jax.jit(jax.vmap(jax.vmap(lambda x: of(unravel(x)))))(ends)
  return unravel((above - below) / (2 * eps))


def score(run):
  return jnp.sin(run.params['u']).sum() + jnp.vdot(
    run.params['v'], run.params['v']
  )


def theta64():
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), THETA)


def assert_trees_close(actual, expected, atol):
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=atol)


@over_tx
def test_the_gradient_is_that_of_finite_differences(x64, tx):
  of = lambda theta: score(argmin(theta, tx))
  assert_trees_close(
    jax.jit(jax.grad(of))(theta64()), numeric(of, theta64()), 1e-6
  )


@pytest.mark.slow  # `argmin_test` has the modes of differentiation too.
def test_forward_vmap_value_and_closures(x64):
  tx, theta = optlab.gns_newton(), theta64()
  of = lambda theta: score(argmin(theta, tx))
  grad = jax.jit(jax.grad(of))(theta)
  forward = jax.jit(jax.jacfwd(of))(theta)
  assert_trees_close(forward, grad, 1e-9)
  many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), theta)
  lanes = jax.jit(jax.vmap(jax.grad(of)))(many)
  assert_trees_close(jax.tree.map(lambda leaf: leaf[0], lanes), grad, 1e-9)
  value = lambda theta: argmin(theta, tx).value
  assert_trees_close(
    jax.jit(jax.grad(value))(theta), numeric(value, theta), 1e-6
  )
  closed = lambda theta: score(
    optlab.minimize(
      lambda x: fun(x, theta), start(), tx, max_steps=200, grad_tol=1e-9,
      curvature=optlab.hessian(lambda x: fun(x, theta)),
    )
  )  # fmt: skip
  assert_trees_close(jax.jit(jax.grad(closed))(theta), grad, 1e-9)


def test_second_derivatives(x64):
  tx, theta = optlab.gns_newton(), theta64()
  of = lambda theta: score(argmin(theta, tx))
  slope = lambda theta: jax.grad(of)(theta)['b']
  assert_trees_close(
    jax.jit(jax.grad(slope))(theta), numeric(slope, theta), 1e-5
  )


@pytest.mark.slow
def test_many_parameters_by_conjugate_gradients(x64):
  scales = jnp.geomspace(1e-3, 1.0, 400)

  def of(theta):
    loss = lambda x: x @ (scales * x) / 2 - theta * x.sum() + jnp.sum(x**4) / 40
    return optlab.minimize(
      loss, jnp.zeros(400), optlab.gns_newton(optlab.lanczos(400)),
      max_steps=100, grad_tol=1e-9,
    ).params.sum()  # fmt: skip

  theta = jnp.asarray(0.5, jnp.float64)
  np.testing.assert_allclose(
    jax.jit(jax.grad(of))(theta), numeric(of, theta), rtol=1e-6
  )


@pytest.mark.parametrize('n', [2, 300])
def test_no_minimizer_no_derivative(x64, n):
  saddle = lambda x, theta: (x[0] - theta) ** 2 - jnp.sum(x[1:] ** 2)
  stays = lambda theta: optlab.minimize(
    saddle, jnp.zeros(n), optax.sgd(0.1), max_steps=300, args=(theta,),
    grad_tol=1e-8,
  ).params[1]  # fmt: skip
  assert jnp.isnan(jax.jit(jax.grad(stays))(1.0))
  early = lambda theta: optlab.minimize(
    lambda x: jnp.sum((x - theta) ** 2), jnp.zeros(n), optax.sgd(1e-3),
    max_steps=3,
  ).params[0]  # fmt: skip
  assert jnp.isnan(jax.jit(jax.grad(early))(1.0))


def linear(n, rows):
  """Half of ``|A x - b|^2``, with less rows than unknowns in A."""
  rng = np.random.default_rng(1)
  matrix = jnp.asarray(rng.normal(size=(rows, n)) / n**0.5)
  return lambda x, b: jnp.sum((matrix @ x - b) ** 2)


@pytest.mark.parametrize('n, rows', [(5, 4), (300, 299)])
def test_one_minimizer_of_many_has_no_derivative(x64, n, rows):
  # The last pivot of this 5 x 5 matrix is 200 times its rounding error.
  found = lambda b: optlab.minimize(
    linear(n, rows), jnp.zeros(n), optax.lbfgs(), max_steps=400, args=(b,),
    grad_tol=1e-7,
  ).params[0]  # fmt: skip
  assert jnp.all(jnp.isnan(jax.jit(jax.grad(found))(jnp.ones(rows))))


@pytest.mark.parametrize('n', [2, 300])
def test_a_leaf_that_does_not_depend_on_it_and_one_that_is_narrow(n):
  def loss(p, c):
    narrow = p['a'].astype(jnp.float32) - c
    return jnp.sum(narrow**2) + jnp.sum((p['b'] - 1) ** 2) + jnp.sum(p['none'])

  start = {
    'a': jnp.zeros(n, jnp.bfloat16), 'b': jnp.zeros(2), 'none': jnp.zeros(0)
  }  # fmt: skip
  for bounds in (None, (-9.0, 9.0)):
    of = lambda c, bounds=bounds: optlab.minimize(
      loss, start, optax.sgd(0.5), max_steps=9, args=(c,), grad_tol=0.1,
      bounds=bounds,
    ).params  # fmt: skip
    total = lambda c, of=of: sum(
      jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(of(c))
    )
    np.testing.assert_allclose(jax.jit(jax.grad(total))(2.0), n)


@pytest.mark.parametrize('bounds', [None, (-9.0, 9.0)])
def test_a_kink_has_no_derivative_in_either_mode(bounds):
  # Its slope is a sign, which does not depend on c: it was 0, for 1.
  of = lambda c: optlab.minimize(
    lambda x: jnp.sum(jnp.abs(x - c)), jnp.zeros(2), optax.sgd(0.5),
    max_steps=9, bounds=bounds, grad_tol=0.1,
  ).params.sum()  # fmt: skip
  assert jnp.isnan(jax.jit(jax.grad(of))(1.0))
  assert jnp.isnan(jax.jit(jax.jvp, static_argnums=0)(of, (1.0,), (1.0,))[1])


def test_a_badly_scaled_minimizer_is_not_singular(x64):
  scales = jnp.array([1e-9, 1.0, 1e9])
  of = lambda c: jnp.vdot(
    scales,
    optlab.minimize(
      lambda x: jnp.sum((scales * x - c) ** 2), 2.0 / scales, optax.sgd(0.1),
      max_steps=1, grad_tol=1e-3,
    ).params,
  )  # fmt: skip
  np.testing.assert_allclose(jax.grad(of)(2.0), 3.0, rtol=1e-6)


def test_the_start_is_a_constant(x64):
  run = lambda x: optlab.minimize(
    lambda y: jnp.sum((y - 1.0) ** 2), x, optax.lbfgs(), max_steps=20,
    grad_tol=1e-9,
  )  # fmt: skip
  of = lambda x: run(x).params.sum()
  np.testing.assert_array_equal(jax.grad(of)(jnp.zeros(2)), 0.0)


def test_forward_mode_takes_numbers_of_python(x64):
  centre = lambda c: (
    optlab.minimize(
      lambda x: (x - c) ** 2,
      0.0,
      optlab.gns_newton(),
      max_steps=9,
      grad_tol=1e-9,
    ).params
  )
  value, change = jax.jvp(centre, (1.3,), (2.0,))
  np.testing.assert_allclose((value, change), (1.3, 2.0), atol=1e-8)
  solve = optlab.argmin(lambda x, y, batch: (y - x) ** 2)
  change = jax.jvp(lambda x: solve(x, 0.0).inner, (1.3,), (2.0,))[1]
  np.testing.assert_allclose(change, 2.0, atol=1e-8)


def test_args_aux_success_and_words():
  data = jnp.arange(3.0)

  def loss(x, data):
    residual = x - data
    return jnp.sum(residual**2), {'residual': residual}

  run = optlab.minimize(
    loss, jnp.zeros(3), optlab.gns_newton(), max_steps=20, args=(data,),
    has_aux=True, grad_tol=1e-5,
    curvature=optlab.hessian(lambda x, data: loss(x, data)[0]),
  )  # fmt: skip
  assert run.success and run.status == training.GRAD_TOL
  assert 'grad_tol' in run.message
  np.testing.assert_allclose(run.aux['residual'], 0.0, atol=1e-5)
  short = optlab.minimize(
    lambda x: jnp.sum(x**2), jnp.ones(3), optax.sgd(1e-3), max_steps=2
  )
  assert not short.success and short.message == 'max_steps were taken.'


def test_a_run_that_ended_early_has_no_derivatives(x64):
  # The gradient fell a thousandfold, far from the minimizer: 18 for 0.04.
  fun = lambda x, c: c * (x - 1) ** 4 + (c * (x - 2)) ** 2 + c * x

  @jax.jit
  def slope(c, start):
    found = lambda c, tol: optlab.minimize(
      fun, start, optlab.gns_newton(), args=(c,), max_steps=8, grad_tol=tol
    )
    of = lambda tol: jax.grad(lambda c: found(c, tol).params)(c)
    return of(0.0), of(1e-9)

  assert all(map(np.isnan, slope(1.3, 1000.0)))
  near = slope(1.3, 1.0)
  np.testing.assert_allclose(near[0], near[1], rtol=1e-6)


def test_a_free_coordinate_at_its_bound_has_no_derivative(x64):
  # One to the left, zero to the right.
  slope = jax.jit(jax.grad(lambda c: optlab.minimize(
    lambda x: (x - c) ** 2, jnp.zeros(()), optlab.gns_newton(),
    max_steps=20, grad_tol=1e-9, bounds=(None, 1.0),
  ).params))  # fmt: skip
  np.testing.assert_allclose([slope(c) for c in (0.5, 1.5)], [1, 0], rtol=1e-9)
  assert np.isnan(slope(1.0))
