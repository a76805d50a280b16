"""Hypergradients through constraints, against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import bilevel
from tests.bilevel.faults_test import run

RATE = 0.1
KEYS = jax.random.split(jax.random.key(3), 3)
DATA = jax.random.normal(KEYS[0], (12, 5))
TARGET = DATA @ jnp.array([1.0, -1.0, 0.5, 0.0, -0.2])
VALID = jax.random.normal(KEYS[1], (9, 5))
WANTED = jax.random.normal(KEYS[2], (9,))


def lower(x, y, batch):
  """Least squares with a shift and a scale that x gives."""
  fit = jnp.mean((DATA @ y - TARGET - x[0]) ** 2)
  return fit + 0.1 * jnp.exp(x[1]) * jnp.sum(y**2)


def upper(x, y, batch):
  return jnp.mean((VALID @ y - WANTED) ** 2) + 0.1 * jnp.sum(x**2)


PROX = {
  'nonnegative': lambda x, y, rate: jnp.maximum(y, 0.0),
  'box': lambda x, y, rate: jnp.clip(y, -0.3 * jnp.exp(x[2]), 0.4 + x[2]),
  'simplex': lambda x, y, rate: optax.projections.projection_simplex(y),
  'l1': lambda x, y, rate: (
    jnp.sign(y) * jnp.maximum(jnp.abs(y) - rate * jnp.exp(x[2]), 0.0)
  ),
}
X, Y = np.array([0.3, -0.5, -1.2]), np.full(5, 0.2)


@functools.cache
def slopes(name):
  """Central differences of F, in float64."""
  step = bilevel.proximal_map(lower, PROX[name], RATE)

  @jax.jit
  def solved(x):
    y = jax.lax.fori_loop(0, 4000, lambda _, y: step(x, y, None), Y)
    return upper(x, y, None), y

  _, y = solved(X)
  differences = [
    (solved(X + e)[0] - solved(X - e)[0]) / 2e-5 for e in 1e-5 * np.eye(3)
  ]
  return np.array(differences), y


METHODS = {
  'soba': lambda **o: optlab.soba(upper, lower, None, 1.0, **o),
  'bo_rep': lambda **o: optlab.bo_rep(
    upper, lower, None, 1.0, period=1, average=False, **o
  ),
  'stocbio': lambda **o: optlab.stocbio(
    upper, lower, None, 1.0, neumann_steps=800, **o
  ),
  'implicit': lambda **o: optlab.implicit(upper, lower, None, **o),
  'unrolled': lambda **o: optlab.unrolled(
    upper, lower, None, lower_steps=800, **o
  ),
}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', PROX)
def test_right_against_finite_differences(x64, name, method):
  expected, y = slopes(name)
  assert np.any(np.abs(expected) > 1e-2)
  step = bilevel.proximal_map(lower, PROX[name], RATE)
  estimator = METHODS[method](lower_map=step)
  steps = 3 if method == 'unrolled' else 1500
  state, estimates = run(estimator, X, Y, steps)
  np.testing.assert_allclose(state.inner, y, atol=1e-8)
  np.testing.assert_allclose(estimates.grads[-1], expected, atol=1e-6)
  assert state.info.total_not_ok == 0


# Another precision of the same maps.
@pytest.mark.slow
@pytest.mark.parametrize('name', PROX)
def test_right_in_single_precision(name):
  with jax.enable_x64(True):
    expected, _ = slopes(name)
  step = bilevel.proximal_map(lower, PROX[name], RATE)
  for method in ('soba', 'implicit'):
    estimator = METHODS[method](lower_map=step)
    x, y = X.astype(np.float32), Y.astype(np.float32)
    _, estimates = run(estimator, x, y, 1000)
    np.testing.assert_allclose(estimates.grads[-1], expected, atol=1e-4)


def test_a_projecting_optimizer_may_move_y_beside_the_map(x64):
  expected, y = slopes('nonnegative')
  step = bilevel.proximal_map(lower, PROX['nonnegative'], RATE)
  optimizer = optax.chain(optax.sgd(0.2), optax.keep_params_nonnegative())
  for make in (
    functools.partial(optlab.soba, dual_lr=1.0),
    functools.partial(optlab.bo_rep, dual_lr=1.0, average=False),
    optlab.implicit,
  ):
    estimator = make(upper, lower, optimizer, lower_map=step)
    state, estimates = run(estimator, X, Y, 1500)
    np.testing.assert_allclose(state.inner, y, atol=1e-8)
    np.testing.assert_allclose(estimates.grads[-1], expected, atol=1e-6)


def test_a_map_of_another_shape_is_named():
  estimator = optlab.soba(
    upper, lower, None, 1.0, lower_map=lambda x, y, batch: y[:2]
  )
  with pytest.raises(ValueError, match=r'lower_map\(x, y, batch\)'):
    estimator.estimate(
      jnp.asarray(X),
      estimator.init(X, Y),
      optlab.BilevelBatch(None, None),
    )
