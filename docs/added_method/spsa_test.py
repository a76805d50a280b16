"""Tests that make SPSA itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab


def test_mean_over_keys_is_the_gradient_of_a_quadratic(x64):
  weights, x = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, -1.0, 0.5])
  estimator = optlab.first_order.spsa(lambda x, batch: weights @ x**2, 0.1)

  def grads(key):
    estimate, _ = estimator.estimate(x, estimator.init(x, key), None)
    return estimate.grads

  mean = jax.vmap(grads)(jax.random.split(jax.random.key(0), 20_000)).mean(0)
  np.testing.assert_allclose(mean, 2 * weights * x, atol=0.1)


def test_descends_a_staircase_where_every_gradient_is_zero():
  def stairs(x, batch):
    return jnp.sum(jnp.abs(jnp.round(20 * x))) / 20

  x = jnp.array([2.0, -3.0])
  assert not jnp.any(jax.grad(stairs)(x, None))
  estimator, tx = optlab.first_order.spsa(stairs, 0.2), optax.sgd(0.05)
  state = optlab.init(x, estimator, tx, jax.random.key(0))
  step = optlab.train_step(estimator, tx)
  state, _ = jax.jit(
    lambda state: jax.lax.scan(lambda s, _: step(s, None), state, length=300)
  )(state)
  assert stairs(state.params, None) < 0.5
