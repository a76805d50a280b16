"""Langevin chains and contrastive divergence where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab


def quadratic(x):
  return -0.5 * jnp.sum(x**2, -1)


def natural(theta, x):
  return theta * x[:, 0] - x[:, 0] ** 2 / 2


def chains(adjust, step_size=1.0):
  return jax.jit(
    lambda key: optlab.unnormalized.langevin(
      quadratic, key, jnp.zeros((4000, 2)), step_size, 60, adjust=adjust
    )
  )(jax.random.key(0))


def test_metropolis_test_makes_the_chains_exact():
  result = chains(adjust=True)
  np.testing.assert_allclose(np.var(result.rows), 1.0, atol=0.05)
  assert 0.5 < result.acceptance < 1
  assert result.rejected == 0


def test_without_it_the_variance_is_that_of_the_discretization():
  # x' = (1 - e/2) x + sqrt(e) xi has variance 1 / (1 - e/4).
  result = chains(adjust=False)
  np.testing.assert_allclose(np.var(result.rows), 4 / 3, atol=0.06)
  assert result.acceptance == 1


def test_a_chain_that_meets_nan_stays_where_it_was():
  def walled(x):
    return jnp.where(x[:, 0] > 1, jnp.nan, quadratic(x))

  for adjust in (True, False):
    result = optlab.unnormalized.langevin(
      walled, jax.random.key(0), jnp.zeros((200, 2)), 0.5, 20, adjust=adjust
    )
    assert np.all(np.isfinite(result.rows))
    assert np.all(result.rows[:, 0] <= 1)
    assert result.rejected > 0


def train(persistent, num_steps=10, restart=0.05):
  rng = np.random.default_rng(0)
  data = (2.0 + rng.normal(size=(256, 1))).astype(np.float32)
  noise = optlab.unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
  batch = optlab.noise_batch(noise, jax.random.key(0), data, 256)
  estimator = optlab.contrastive_divergence(
    natural, 0.3, num_steps, persistent=persistent, restart=restart
  )
  tx = optax.sgd(0.2)
  state = optlab.init(
    jnp.zeros(()), estimator, tx, jax.random.key(1), batch.noise
  )
  step = optlab.train_step(estimator, tx)
  run = jax.jit(
    lambda state: jax.lax.scan(
      lambda state, _: step(state, batch), state, length=300
    )
  )
  state, _ = run(state)
  return state, data


@pytest.mark.parametrize('persistent', [True, False])
def test_contrastive_divergence_finds_the_mean(persistent):
  state, data = train(persistent, restart=0.0)
  np.testing.assert_allclose(state.params, data.mean(), atol=0.1)


def test_persistent_chains_move_and_restart():
  state, _ = train(True, num_steps=1, restart=0.0)
  chains = state.estimator_state.chains
  np.testing.assert_allclose(np.mean(chains), state.params, atol=0.3)
  # Always restarted and moved one short step, chains stand near the noise.
  state, _ = train(True, num_steps=1, restart=1.0)
  assert np.mean(state.estimator_state.chains) < state.params - 0.5


def test_a_bad_data_row_is_left_out():
  def model(theta, x):
    return jnp.log(x[:, 1]) * theta + natural(theta, x)

  rows = np.ones((8, 2), np.float32)
  bad = rows.copy()
  bad[2, 1] = -1.0
  estimator = optlab.contrastive_divergence(model, 1e-6, 1)
  theta = jnp.float32(0.5)
  state = estimator.init(theta, jax.random.key(0), rows)
  estimate = jax.jit(estimator.estimate)
  batch = optlab.NoiseBatch(rows, rows, np.zeros(8, np.float32))
  want, _ = estimate(theta, state, batch)
  got, after = estimate(theta, state, batch._replace(data=bad))
  np.testing.assert_allclose(got.grads, want.grads, atol=1e-5)
  assert after.info.rejected == 1


def test_bad_arguments():
  with pytest.raises(ValueError, match='step_size'):
    optlab.unnormalized.langevin(
      quadratic, jax.random.key(0), jnp.zeros((2, 1)), 0.0, 1
    )
  with pytest.raises(ValueError, match='num_steps'):
    optlab.contrastive_divergence(natural, 0.1, 0)
  with pytest.raises(ValueError, match='restart'):
    optlab.contrastive_divergence(natural, 0.1, 1, restart=2.0)
  estimator = optlab.contrastive_divergence(natural, 0.1, 1, persistent=False)
  rows = np.zeros((4, 1), np.float32)
  state = estimator.init(jnp.zeros(()), jax.random.key(0), rows[:2])
  with pytest.raises(ValueError, match='as many as a batch'):
    estimator.estimate(
      jnp.zeros(()), state, optlab.NoiseBatch(rows, rows, rows[:, 0])
    )
