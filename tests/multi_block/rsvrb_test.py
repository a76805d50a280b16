"""The baseline against exact solutions and its own recursion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.problems import quadratic
import optlab
from optlab import tables


def batch_of(data, blocks, outer, noise=0.0):
  rows = tables.gather_rows(data, blocks)
  spread = jnp.broadcast_to(noise, rows.c.shape)
  return optlab.multi_block.PairedBlockBatch(
    blocks, (rows, spread), (rows, spread), outer
  )


def test_all_blocks_give_the_exact_hypergradient(x64):
  """Where every block is sampled each tracker is STORM, and exact."""
  m = 6
  data, x = quadratic.make(m), jnp.linspace(0.0, 1.0, 5)
  estimator = optlab.multi_block.rsvrb(
    quadratic.upper, quadratic.lower, m, inner_lr=0.3, floor=0.5
  )
  state = estimator.init(x, jnp.zeros((m, 6)))
  batch = batch_of(data, jnp.arange(m), jnp.arange(m))

  def step(state, _):
    estimate, state = estimator.estimate(x, state, batch)
    return state, estimate

  state, estimates = jax.jit(
    lambda state: jax.lax.scan(step, state, length=300)
  )(state)
  exact, grads = jax.value_and_grad(quadratic.objective)(x, data)
  np.testing.assert_allclose(estimates.grads[-1], grads, atol=1e-12)
  np.testing.assert_allclose(estimates.value[-1], exact, rtol=1e-12)
  y = jax.vmap(quadratic.solution, (None, 0))(x, data)
  np.testing.assert_allclose(state.inner, y, atol=1e-12)


def test_trackers_follow_their_recursion(x64):
  """Two steps by hand, with some of the blocks, and blocks apart for G."""
  m, beta, x = 5, 0.3, jnp.ones(5)
  data = quadratic.make(m)
  estimator = optlab.multi_block.rsvrb(
    quadratic.upper, quadratic.lower, m, beta=beta, inner_lr=0.2, floor=0.5
  )
  first = batch_of(data, jnp.arange(m), jnp.arange(m))
  state = jax.jit(estimator.init)(x, jnp.zeros((m, 6)), first)
  slope = jax.vmap(jax.grad(quadratic.lower, 1), (None, 0, 0))
  zeros = jnp.zeros((m, 6))
  s, y, y_old, x_old = slope(x, zeros, (data, zeros)), zeros, zeros, x
  np.testing.assert_allclose(state.tracked.inner_grad, s, atol=1e-14)
  # In closed form: d_yx g = -B, plus the bend by x_1.
  cross = -data.b.at[:, :, 0].add(-0.1 * jnp.exp(0.2) * y)
  np.testing.assert_allclose(state.tracked.cross, cross, atol=1e-14)
  hessian = data.a + 0.5 * jnp.exp(0.2) * jnp.eye(6)
  np.testing.assert_allclose(state.tracked.hessian, hessian, atol=1e-14)
  step = jax.jit(estimator.estimate)
  for blocks in ([3, 0], [3, 1]):
    index = jnp.array(blocks)
    _, state = step(x, state, batch_of(data, index, jnp.array([2, 4])))
    now = slope(x, y, (data, zeros))
    before = slope(x_old, y_old, (data, zeros))
    new = (1 - beta) * s
    new = new.at[index].add(m / 2 * (now[index] - (1 - beta) * before[index]))
    s, y_old, x_old = new, y, x
    y = y - 0.2 * 2 / m * s
    np.testing.assert_allclose(state.tracked.inner_grad, s, atol=1e-13)
    np.testing.assert_allclose(state.inner, y, atol=1e-13)
    x = x + 0.1


@pytest.mark.slow
def test_padding_repeats_and_nan(x64):
  m, x = 5, jnp.ones(5)
  data = quadratic.make(m)
  estimator = optlab.multi_block.rsvrb(quadratic.upper, quadratic.lower, m)
  state = estimator.init(x, jnp.zeros((m, 6)))
  step = jax.jit(estimator.estimate)
  outer = jnp.arange(m)
  expected, expected_state = step(
    x, state, batch_of(data, jnp.array([1, 3]), outer)
  )
  padded = batch_of(data, jnp.array([1, 5, 3, 3]), outer)
  actual, actual_state = step(x, state, padded)
  np.testing.assert_allclose(actual.grads, expected.grads, rtol=1e-13)
  np.testing.assert_allclose(
    actual_state.tracked.hessian, expected_state.tracked.hessian, rtol=1e-13
  )
  noise = jnp.zeros((2, 1)).at[0].set(jnp.nan)
  estimate, after = step(
    x, state, batch_of(data, jnp.array([1, 3]), outer, noise)
  )
  assert after.info.rejected == 1
  assert np.all(np.isfinite(estimate.grads))
  for leaf in jax.tree.leaves(after):
    assert np.all(np.isfinite(leaf))
  _, unchanged = step(
    2.0 * x, after, batch_of(data, jnp.array([1, 3]), outer, jnp.nan)
  )
  assert unchanged.info.total_rejected == 3
  for a, b in zip(
    jax.tree.leaves(unchanged._replace(info=())),
    jax.tree.leaves(after._replace(info=())),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_bad_input_is_refused():
  for kwargs, message in [
    ({'num_blocks': 0}, 'num_blocks'),
    ({'num_blocks': 3, 'beta': 1.0}, 'beta'),
    ({'num_blocks': 3, 'floor': 0.0}, 'floor'),
    ({'num_blocks': 3, 'inner_lr': -1.0}, 'inner_lr'),
  ]:
    with pytest.raises(ValueError, match=message):
      optlab.multi_block.rsvrb(quadratic.upper, quadratic.lower, **kwargs)
  data = quadratic.make(3)
  estimator = optlab.multi_block.rsvrb(quadratic.upper, quadratic.lower, 3)
  x = jnp.ones(5)
  state = estimator.init(x, jnp.zeros((3, 6)))
  index = jnp.arange(2)
  for blocks, outer in ((index - 1, index), (index, index - 1)):
    batch = batch_of(data, index, outer)._replace(blocks=blocks)
    with pytest.raises(ValueError, match='negative'):
      estimator.estimate(x, state, batch)
