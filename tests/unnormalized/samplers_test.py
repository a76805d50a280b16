"""What moves chains: kernels that adapt, functions of one's own, boxes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optlab

WING = optlab.unnormalized
KEY = jax.random.key(0)


def wide_and_narrow(x):
  return -0.5 * jnp.sum((x / jnp.asarray([1.0, 20.0])) ** 2, -1)


@pytest.mark.parametrize('step_size', [1e-2, 1e2])
def test_hmc_finds_its_step_size(step_size):
  pytest.importorskip('blackjax')
  sampler = WING.hmc_sampler(step_size, 60, 5, scale=jnp.asarray([1.0, 20.0]))
  rows = jnp.full((500, 2), 3.0)
  moved = jax.jit(
    lambda: sampler.step(wide_and_narrow, KEY, rows, sampler.init(rows))
  )()
  np.testing.assert_allclose(np.std(moved.rows, 0), [1.0, 20.0], rtol=0.1)
  assert 0.1 < jnp.exp(moved.state) < 3.0
  assert moved.rejected == 0


def estimate_once(sampler, data, model=None, jitted=True, **arguments):
  """One estimate from chains that start at the data."""
  model = model or (lambda theta, x: theta * jnp.sum(x * 1.0, -1))
  noise = jnp.zeros(len(data))
  batch = optlab.NoiseBatch(data, data[::-1], noise)
  estimator = optlab.contrastive_divergence(
    model, sampler=sampler, restart=0.0, **arguments
  )
  theta = jnp.zeros(())
  state = estimator.init(theta, KEY, data)
  run = jax.jit(estimator.estimate) if jitted else estimator.estimate
  return run(theta, state, batch)


def test_a_function_moves_chains_and_what_is_not_finite_stays():
  def move(log_density, key, rows):
    del log_density, key
    return (rows + 1).at[0].set(jnp.nan)

  data = jnp.arange(6.0).reshape(3, 2)
  _, state = estimate_once(move, data)
  np.testing.assert_array_equal(state.chains[1:], data[1:] + 1)
  np.testing.assert_array_equal(state.chains[0], data[0])
  assert state.info.rejected == 1
  with pytest.raises(ValueError, match='what sampler returns'):
    estimate_once(lambda log_density, key, rows: rows[:1], data)


def test_a_kernel_is_no_sampler():
  blackjax = pytest.importorskip('blackjax')
  kernel = blackjax.mala(lambda row: -jnp.sum(row**2), 0.1)
  for bad in (kernel, 1.0, 'hmc'):
    with pytest.raises(TypeError, match='blackjax by .*kernel_sampler'):
      estimate_once(bad, jnp.ones((3, 2)))
    with pytest.raises(TypeError, match='sampler must be a Sampler such as'):
      WING.tempered_smc(sampler=bad)


def test_a_box_cuts_the_model_off():
  # A density that is improper outside: its slope is that of the box alone.
  model = lambda theta, x: theta * x[:, 0] + 0.0 * x[:, 1]
  low, high = jnp.asarray([0.0, -1.0]), jnp.asarray([1.0, 1.0])
  data = jax.random.uniform(KEY, (400, 2), minval=low, maxval=high)
  data = data.at[0].set(5.0)
  sampler = WING.langevin_sampler(0.05, 60)
  estimate, state = estimate_once(sampler, data, model, box=(low, high))
  assert np.all((state.chains >= low) & (state.chains <= high))
  assert state.info.restarted == 1  # The chain that began at the bad row.
  assert state.info.rejected == 1
  # E x under the uniform density is a half.
  assert abs(estimate.grads - (0.5 - data[1:, 0].mean())) < 0.06
  for bad, error in (
    ((1.0, 0.0), ValueError),
    ((0.0, np.nan), ValueError),
    (3.0, TypeError),
    (('low', 1.0), TypeError),
  ):
    with pytest.raises(error, match='box'):
      estimate_once(sampler, data, model, box=bad)
  with pytest.raises(ValueError, match=r"row's shape, \(2,\), got .*\(3,\)"):
    estimate_once(sampler, data, model, box=(jnp.zeros(3), jnp.ones(3)))


@pytest.mark.parametrize(
  ('values', 'dtype'),
  [((-1, 1), np.float32), ((0, 1), bool), (range(3), np.int32)],
)
def test_gibbs_draws_spins_bools_and_categories(values, dtype):
  rows = np.asarray(list(itertools.product(values, repeat=3)), dtype)

  def model(x):
    x = x * jnp.float32(1.0)
    return 0.5 * x[:, 0] * x[:, 1] - 0.3 * x[:, 2] ** 2 + 0.2 * x[:, 1]

  sampler = WING.gibbs_sampler(25, values)
  start = jnp.broadcast_to(rows[0], (8000, 3))
  moved = jax.jit(lambda: sampler.step(model, KEY, start, ()))()
  assert moved.rows.dtype == dtype
  counts = np.all(np.asarray(moved.rows)[:, None] == rows, -1).mean(0)
  np.testing.assert_allclose(counts, jax.nn.softmax(model(rows)), atol=0.02)


def test_a_chain_outside_the_support_starts_anew():
  model = lambda theta, x: jnp.where(x[:, 0] > 0, theta * x[:, 0], -jnp.inf)
  move = lambda log_density, key, rows: rows
  data = jnp.asarray([[1.0], [2.0], [-3.0], [4.0]])
  batch = optlab.NoiseBatch(data, jnp.ones((4, 1)), jnp.zeros(4))
  estimator = optlab.contrastive_divergence(model, sampler=move, restart=0.0)
  theta = jnp.zeros(())
  state = estimator.init(theta, KEY, data)
  estimate = jax.jit(estimator.estimate)
  _, state = estimate(theta, state, batch)
  assert state.info.rejected == 2  # A row of data, and a chain.
  assert state.info.restarted == 0
  _, state = estimate(theta, state, batch)
  assert state.info.restarted == 1
  np.testing.assert_array_equal(state.chains[2], [1.0])


@pytest.mark.parametrize(
  ('data', 'match', 'values'),
  [
    (2.0 * jax.random.bernoulli(KEY, 0.5, (30, 3)) - 1, 'other values', (0, 1)),
    (jax.nn.one_hot(jnp.arange(30) % 3, 3), 'have one sum.*one-hot', (0, 1)),
    ((jnp.arange(30)[:, None] + jnp.arange(3)) % 3 * 1.0, 'swaps', range(3)),
  ],
)
def test_rows_that_bits_do_not_fit(data, match, values):
  sampler = WING.gibbs_sampler(values=values)
  with pytest.raises(ValueError, match=match):
    estimate_once(sampler, data, jitted=False)
  estimate, state = estimate_once(sampler, data)
  assert np.isnan(estimate.value)
  assert estimate.grads == 0
  assert state.info.held


def test_bools_and_integers_train():
  for dtype in (bool, int):
    data = jax.random.bernoulli(KEY, 0.8, (64, 3)).astype(dtype)
    estimate, state = estimate_once(WING.gibbs_sampler(), data)
    assert state.chains.dtype == data.dtype
    want = 1.5 - jnp.sum(data, -1).mean()
    assert abs(estimate.grads - want) < 0.5
    assert not state.info.held


def test_rows_that_are_no_array_are_refused():
  rows = {'x': jnp.ones((4, 2))}
  estimator = optlab.contrastive_divergence(lambda theta, x: x['x'][:, 0])
  state = estimator.init(jnp.zeros(()), KEY, jnp.ones((4, 2)))
  batch = optlab.NoiseBatch(rows, rows, jnp.zeros(4))
  with pytest.raises(ValueError, match='one array, got a dict'):
    estimator.estimate(jnp.zeros(()), state, batch)


def test_bad_arguments():
  for bad, error in (
    ((0, 0), ValueError),
    ((0,), ValueError),
    ('ab', TypeError),
    (2, TypeError),
  ):
    with pytest.raises(error, match='values must be'):
      WING.gibbs_sampler(1, bad)
