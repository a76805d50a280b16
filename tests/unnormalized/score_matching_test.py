"""Denoising score matching where its minimizer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab


def model(params, x):
  """A Gaussian in natural parameters."""
  linear, precision = params
  return linear * x[:, 0] - precision * x[:, 0] ** 2 / 2


@pytest.mark.usefixtures('x64')
def test_its_gradient_is_that_of_the_loss():
  scale, key = 0.4, jax.random.key(3)
  params = jnp.asarray([0.3, 1.2])
  data = jnp.linspace(-1.0, 2.0, 7)[:, None]
  estimator = optlab.unnormalized.denoising_score_matching(model, scale)
  state = estimator.init(params, key)
  got, state = estimator.estimate(params, state, data)
  epsilon = jax.random.normal(jax.random.split(key)[1], data.shape)

  def loss(params):
    score = params[0] - params[1] * (data + scale * epsilon)
    return jnp.mean((scale * score + epsilon) ** 2) / 2

  value, grads = jax.value_and_grad(loss)(params)
  np.testing.assert_allclose(got.value, value, rtol=1e-12)
  np.testing.assert_allclose(got.grads, grads, rtol=1e-12)
  _, later = estimator.estimate(params, state, data)
  keys = jax.random.key_data(jnp.stack([key, state.key, later.key]))
  assert len(np.unique(keys, axis=0)) == 3


def test_finds_the_data_with_its_noise():
  data = 1.0 + 0.7 * jax.random.normal(jax.random.key(0), (512, 1))
  scale, tx = 0.5, optax.adam(optax.cosine_decay_schedule(0.05, 800))
  estimator = optlab.unnormalized.denoising_score_matching(model, scale)
  step = optlab.train_step(estimator, tx)
  state = optlab.init(jnp.asarray([0.0, 1.0]), estimator, tx, jax.random.key(1))
  state, _ = jax.jit(
    lambda s: jax.lax.scan(lambda s, _: step(s, data), s, length=800)
  )(state)
  precision = 1 / (jnp.var(data) + scale**2)
  want = jnp.stack([precision * jnp.mean(data), precision])
  np.testing.assert_allclose(state.params, want, rtol=0.03)


def test_a_bad_row_is_as_if_it_were_not_there():
  params = jnp.asarray([0.3, 1.2])
  data = jnp.linspace(-1.0, 2.0, 6)[:, None]
  walled = lambda p, x: jnp.where(x[:, 0] > 1e3, jnp.sqrt(-p[1]), model(p, x))
  estimator = optlab.unnormalized.denoising_score_matching(walled, 0.4)
  step = jax.jit(estimator.estimate)
  state = estimator.init(params, jax.random.key(0))
  grads = []
  for place in (jnp.nan, jnp.inf, 1e6):
    got, new = step(params, state, data.at[2].set(place))
    grads.append(got.grads)
    assert new.info.rejected == 1
  assert np.all(np.isfinite(grads))
  np.testing.assert_array_equal(grads[0], grads[1])
  # There the first pass is finite, and is not repeated without the row.
  np.testing.assert_allclose(grads[0], grads[2], rtol=1e-5, atol=1e-6)
  got, new = step(params, state, jnp.full_like(data, jnp.nan))
  assert np.all(got.grads == 0)
  assert new.info.held


def test_a_traced_scale_that_is_none_holds_the_step():
  rows = jax.random.normal(jax.random.key(0), (8, 1))

  @jax.jit
  def found(noise_scale):
    estimator = optlab.unnormalized.denoising_score_matching(
      lambda mean, x: mean * x[:, 0] - x[:, 0] ** 2 / 2, noise_scale
    )
    mean = jnp.zeros(())
    return estimator.estimate(
      mean, estimator.init(mean, jax.random.key(1)), rows
    )

  for noise_scale in (0.0, -1.0, jnp.nan):
    estimate, state = found(noise_scale)
    assert state.info.held
    assert estimate.grads == 0
  assert not found(0.3)[1].info.held
