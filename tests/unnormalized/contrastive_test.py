"""Langevin chains and contrastive divergence where the answer is known."""

import functools
from typing import NamedTuple

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


def train(persistent, num_steps=10, restart=0.05, sampler=None):
  rng = np.random.default_rng(0)
  data = (2.0 + rng.normal(size=(256, 1))).astype(np.float32)
  noise = optlab.unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
  batch = optlab.noise_batch(noise, jax.random.key(0), data, 256)
  estimator = optlab.contrastive_divergence(
    natural,
    0.3,
    num_steps,
    sampler=sampler,
    persistent=persistent,
    restart=restart,
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
  short = optlab.unnormalized.langevin_sampler(0.3, 1, target_acceptance=None)
  state, _ = train(True, restart=1.0, sampler=short)
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


GRID = jnp.linspace(-5.0, 5.0, 2001)[:, None]
TOYS = {
  # The log density, the truth, and starts from which it must be found.
  'quartic': (
    lambda p, x: -jnp.exp(p[0]) * x[:, 0] ** 4,
    [0.0],
    [[1.0], [-2.0]],
  ),
  'Gaussian': (
    lambda p, x: -jnp.exp(p[0]) * x[:, 0] ** 2 / 2,
    [0.0],
    [[2.0], [-2.0]],
  ),
  'two wells': (
    lambda p, x: -jnp.exp(p[0]) * (x[:, 0] ** 2 - 1) ** 2 + p[1] * x[:, 0],
    [0.7, 0.3],
    [[0.0, 0.0], [1.5, -1.0]],
  ),
}


@functools.cache
def toy_problem(toy):
  """Rows drawn from the truth, noise, and the maximum of likelihood."""
  model, truth, _ = TOYS[toy]

  @jax.jit
  def solve(truth):
    weights = jax.nn.softmax(model(truth, GRID))
    data = jax.random.choice(jax.random.key(0), GRID, (4000,), p=weights)

    def likelihood(params):
      log_z = jax.nn.logsumexp(model(params, GRID))
      return log_z - jnp.mean(model(params, data))

    exact = optlab.minimize(
      likelihood, truth, optax.lbfgs(), max_steps=100, grad_tol=1e-4
    ).params
    return data, optlab.fit_gaussian(data, inflate=2.0), exact

  return solve(np.float32(truth))


SLOW = pytest.mark.slow  # Another of a kind that is tried.


@pytest.mark.parametrize(
  ('toy', 'step_size'),
  [
    *[(toy, None) for toy in TOYS if toy != 'Gaussian'],
    ('quartic', 100.0),
    pytest.param('Gaussian', None, marks=SLOW),
    *(
      pytest.param(toy, 100.0, marks=SLOW) for toy in ('Gaussian', 'two wells')
    ),
  ],
)
def test_toys_are_right_within_five_percent_whatever_the_step(toy, step_size):
  model, _, starts = TOYS[toy]
  data, noise, exact = toy_problem(toy)
  steps = {} if step_size is None else {'step_size': step_size}
  if toy == 'two wells':  # With ten, the slope is 7 % off: see the docstring.
    steps |= {'num_steps': 40}
  estimator = optlab.contrastive_divergence(model, **steps)
  tx = optax.adam(optax.cosine_decay_schedule(0.05, 1500))
  step = optlab.train_step(estimator, tx)

  def advance(state, key):
    rows = jax.random.choice(key, data, (256,))
    key = jax.random.fold_in(key, 1)
    return step(state, optlab.noise_batch(noise, key, rows, 256))

  def fit(start):
    chains = noise.sample(jax.random.key(1), 256)
    state = optlab.init(start, estimator, tx, jax.random.key(2), chains)
    keys = jax.random.split(jax.random.key(3), 1500)
    return jax.lax.scan(advance, state, keys)[0]

  state = jax.jit(jax.vmap(fit))(jnp.asarray(starts))
  # Of the precision, and of the slope up to the noise of the rows.
  for params in state.params:
    np.testing.assert_allclose(params[0], exact[0], atol=0.05)
    np.testing.assert_allclose(params[1:], exact[1:], atol=0.02)
  info = state.estimator_state.info
  assert np.all(abs(info.acceptance - 0.57) < 0.1)
  assert np.all(info.total_held == 0)


def test_exploded_chains_start_anew():
  model = lambda theta, x: -jnp.exp(theta) * x[:, 0] ** 4
  data = jax.random.normal(jax.random.key(0), (64, 1))
  batch = optlab.NoiseBatch(data, data[::-1], jnp.zeros(64))
  estimator = optlab.contrastive_divergence(model, restart=0.0)
  theta = jnp.zeros(())
  bad = jnp.asarray([1e9, -1e30, jnp.inf, jnp.nan])[:, None]
  chains = data.at[:4].set(bad)
  state = estimator.init(theta, jax.random.key(1), chains)
  estimate, state = jax.jit(estimator.estimate)(theta, state, batch)
  assert state.info.restarted == 4
  assert np.all(np.abs(state.chains) < 10)
  assert np.abs(estimate.value) < 10
  assert np.isfinite(estimate.grads)


def test_an_unstable_chain_walks_where_it_would_explode():
  quartic = lambda x: -(x[:, 0] ** 4)
  for adjust in (True, False):
    result = optlab.unnormalized.langevin(
      quartic,
      jax.random.key(0),
      jnp.linspace(-10.0, 10.0, 64)[:, None],
      0.1,
      300,
      adjust=adjust,
    )
    assert np.all(np.abs(result.rows) < 3)


def test_a_step_size_for_each_column():
  scales = jnp.asarray([1.0, 100.0])
  model = lambda x: -0.5 * jnp.sum((x / scales) ** 2, -1)
  run = lambda step_size: optlab.unnormalized.langevin(
    model, jax.random.key(0), jnp.zeros((2000, 2)), step_size, 60
  )
  result = jax.jit(run)(scales**2)
  np.testing.assert_allclose(np.std(result.rows, 0), scales, rtol=0.06)
  assert result.acceptance > 0.5
  for wrong in (jnp.ones(3), jnp.ones((2, 2, 2))):
    with pytest.raises(ValueError, match='step_size must be a number, or an'):
      run(wrong)


# Zeros and ones.


def every_row(size):
  return jnp.asarray(
    [[i >> j & 1 for j in range(size)] for i in range(2**size)], jnp.float32
  )


def ising(params, x):
  """Ten spins in a ring with fields."""
  spins = 2 * x - 1
  bonds = jnp.sum(params['bonds'] * spins * jnp.roll(spins, 1, -1), -1)
  return bonds + spins @ params['fields']


def rbm(params, x):
  """Four hidden units, summed out."""
  hidden = jax.nn.softplus(x @ params['w'] + params['c'])
  return x @ params['b'] + jnp.sum(hidden, -1)


@functools.cache
def discrete_problem(name):
  """A model, a start, rows drawn from a truth, and the least value."""
  key = jax.random.key(7)
  if name == 'ising':
    model, size = ising, 10
    truth = {
      'bonds': 0.5 * jax.random.normal(key, (10,)),
      'fields': jnp.linspace(-0.3, 0.3, 10),
    }
  else:
    model, size = rbm, 6
    truth = {
      'w': 1.5 * jax.random.normal(key, (6, 4)),
      'b': jnp.linspace(-0.5, 0.5, 6),
      'c': jnp.zeros(4),
    }
  rows = every_row(size)
  weights = jax.nn.softmax(model(truth, rows))
  data = jax.random.choice(jax.random.key(8), rows, (2000,), p=weights)
  start = jax.tree.map(lambda leaf: 0.1 * leaf, truth)

  def likelihood(params):
    log_z = jax.nn.logsumexp(model(params, rows))
    return log_z - jnp.mean(model(params, data))

  @jax.jit
  def least():
    return optlab.minimize(
      likelihood, start, optax.lbfgs(), max_steps=300
    ).value

  return model, start, data, jax.jit(likelihood), least()


@pytest.mark.parametrize(
  ('method', 'name'),
  [
    *[('meco', 'ising'), ('meco', 'rbm'), ('gibbs', 'ising'), ('gibbs', 'rbm')],
    *[
      pytest.param('discrete_langevin', name, marks=SLOW)
      for name in ('ising', 'rbm')
    ],
  ],
)
def test_discrete_models_come_near_the_maximum_of_likelihood(name, method):
  model, start, data, likelihood, best = discrete_problem(name)
  noise = optlab.unnormalized.bernoulli(0.9 * data.mean(0) + 0.05)
  inner = ()
  if method == 'meco':
    estimator = optlab.meco(model)
  else:
    sampler = {
      'gibbs': optlab.unnormalized.gibbs_sampler,
      'discrete_langevin': optlab.unnormalized.discrete_langevin_sampler,
    }[method]()
    estimator = optlab.contrastive_divergence(model, sampler=sampler)
    inner = (
      jax.random.key(0),
      jax.jit(noise.sample, static_argnums=1)(jax.random.key(1), 256),
    )
  tx = optax.adam(optax.cosine_decay_schedule(0.05, 1000))
  step = optlab.train_step(estimator, tx)

  def advance(state, key):
    rows = jax.random.choice(key, data, (256,))
    key = jax.random.fold_in(key, 1)
    return step(state, optlab.noise_batch(noise, key, rows, 256))

  state = optlab.init(start, estimator, tx, *inner)
  keys = jax.random.split(jax.random.key(3), 1000)
  state, _ = jax.jit(lambda s: jax.lax.scan(advance, s, keys))(state)
  assert best - 1e-3 < likelihood(state.params) < best + 0.05
  if inner:
    chains = state.estimator_state.chains
    assert np.all((chains == 0) | (chains == 1))


@pytest.mark.parametrize('sampler', ['gibbs', 'discrete_langevin', 'kernel'])
def test_discrete_samplers_keep_the_model(sampler):
  params = {
    'bonds': jnp.linspace(-0.6, 0.6, 4),
    'fields': jnp.linspace(-0.3, 0.4, 4),
  }
  rows = every_row(4)
  model = lambda x: ising(params, x)
  truth = jax.nn.softmax(model(rows))

  class Flip:  # A kernel in the form of blackjax's.
    class State(NamedTuple):
      position: jax.Array
      logdensity: jax.Array

    def __init__(self, log_density):
      self.log_density = log_density

    def init(self, position):
      return self.State(position, self.log_density(position))

    def step(self, key, state):
      place, test = jax.random.split(key)
      i = jax.random.randint(place, (), 0, 4)
      moved = self.init(state.position.at[i].set(1 - state.position[i]))
      accept = jnp.log(jax.random.uniform(test)) < (
        moved.logdensity - state.logdensity
      )
      state = jax.tree.map(
        lambda new, old: jnp.where(accept, new, old), moved, state
      )
      return state, ()

  moves = {
    'gibbs': lambda: optlab.unnormalized.gibbs_sampler(40),
    'discrete_langevin': lambda: optlab.unnormalized.discrete_langevin_sampler(
      0.5, 60
    ),
    'kernel': lambda: optlab.unnormalized.kernel_sampler(
      Flip, 100, discrete=True
    ),
  }[sampler]()
  start = jnp.zeros((20_000, 4))
  moved = jax.jit(lambda key: moves.step(model, key, start, moves.init(start)))(
    jax.random.key(0)
  )
  index = np.asarray(moved.rows @ 2 ** jnp.arange(4)).astype(int)
  counts = np.bincount(index, minlength=16) / len(index)
  np.testing.assert_allclose(counts, truth, atol=0.012)
  assert 0 < moved.acceptance <= 1


def test_zeros_and_ones_need_a_discrete_sampler():
  data = (jax.random.uniform(jax.random.key(0), (16, 3)) < 0.5) * 1.0
  batch = optlab.NoiseBatch(data, data[::-1], jnp.zeros(16))
  model = lambda theta, x: x @ theta
  estimator = optlab.contrastive_divergence(model)
  theta = jnp.zeros(3)
  state = estimator.init(theta, jax.random.key(0), data)
  with pytest.raises(ValueError, match='zeros and ones; pass a sampler.*gibbs'):
    estimator.estimate(theta, state, batch)
  estimate, state = jax.jit(estimator.estimate)(theta, state, batch)
  assert np.isnan(estimate.value)
  np.testing.assert_array_equal(estimate.grads, 0)
  assert state.info.held
  whole = jax.tree.map(lambda leaf: leaf.astype(int), batch)
  with pytest.raises(ValueError, match='data of dtype int32; pass a sampler'):
    jax.eval_shape(estimator.estimate, theta, state, whole)


BITS = jax.random.bernoulli(jax.random.key(0), 0.4, (40, 2)) * 1.0
NORMAL = jax.random.normal(jax.random.key(1), (40, 2))
COUNTS = jnp.round(jnp.abs(4 * NORMAL))


def test_spins_levels_and_counts_in_floats_are_not_left_by_chains():
  """Langevin chains on the reals trained, and no figure told."""
  model = lambda theta, x: theta * jnp.sum(x, 1) - jnp.sum(x**2, 1)
  theta = jnp.zeros(())

  def first(estimator, data):
    batch = optlab.NoiseBatch(data, data[::-1], jnp.zeros(40))
    state = estimator.init(theta, jax.random.key(0), data)
    return estimator.estimate(theta, state, batch)

  langevin = optlab.contrastive_divergence(model, num_steps=1)
  jitted = jax.jit(lambda data: first(langevin, data))
  lattices = [
    2 * BITS - 1, (2 * BITS - 1).at[3, 1].set(jnp.nan), 1e-20 * (BITS - 0.5),
    (BITS - BITS.mean(0)) / BITS.std(0), COUNTS, jnp.minimum(COUNTS, 5) / 3,
  ]  # fmt: skip
  for data in lattices:
    with pytest.raises(ValueError, match='leave data of few or whole numbers'):
      first(langevin, data)
    estimate, state = jitted(data)
    assert np.isnan(estimate.value)
    assert estimate.grads == 0
    assert state.info.held
  for data in (
    NORMAL, jax.random.cauchy(jax.random.key(2), (40, 2)), 1e8 * NORMAL,
    NORMAL.at[5].set(jnp.nan), jax.nn.relu(NORMAL), jnp.ones((40, 2)),
    jnp.round(255 * jax.nn.sigmoid(NORMAL)) / 255,
  ):  # fmt: skip
    assert not jitted(data)[1].info.held
  # A function that stays on spins may move them, and one that leaves may not.
  stay = optlab.contrastive_divergence(model, sampler=lambda f, key, x: -x)
  leave = optlab.contrastive_divergence(
    model, sampler=lambda f, key, x: x + 0.1
  )
  assert not first(stay, lattices[0])[1].info.held
  with pytest.raises(ValueError, match='leave data of few or whole numbers'):
    first(leave, lattices[0])


@pytest.mark.parametrize('kernel', ['hmc', 'mala', 'nuts'])
def test_a_kernel_of_blackjax(kernel):
  blackjax = pytest.importorskip('blackjax')
  make = {
    'hmc': lambda log_p: blackjax.hmc(log_p, 0.5, jnp.ones(2), 5),
    'mala': lambda log_p: blackjax.mala(log_p, 0.5),
    'nuts': lambda log_p: blackjax.nuts(log_p, 0.5, jnp.ones(2)),
  }[kernel]
  moves = optlab.unnormalized.kernel_sampler(make, 30)
  start = jnp.full((1000, 2), 2.0)
  moved = jax.jit(lambda key: moves.step(quadratic, key, start, ()))(
    jax.random.key(0)
  )
  np.testing.assert_allclose(np.mean(moved.rows), 0.0, atol=0.1)
  np.testing.assert_allclose(np.var(moved.rows), 1.0, atol=0.1)


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


def test_one_bad_row_of_data_does_not_hold_the_others():
  """Every chain and row was far from NaN, and each step held."""
  model = lambda mean, x: mean * x[:, 0] - x[:, 0] ** 2 / 2
  estimator = optlab.contrastive_divergence(model, 0.2, 1)
  rows = jnp.linspace(-1.0, 2.0, 8)[:, None]
  noise = optlab.unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))

  @jax.jit
  def grads(rows):
    batch = optlab.noise_batch(noise, jax.random.key(0), rows, 4)
    state = estimator.init(jnp.zeros(()), jax.random.key(1), batch.noise)
    estimate, state = estimator.estimate(jnp.zeros(()), state, batch)
    return estimate.grads, state.info

  for bad in (jnp.nan, jnp.inf):
    found, info = grads(rows.at[3].set(bad))
    assert info.rejected == 1
    assert not info.held
    good = jnp.mean(jnp.delete(rows, 3))
    whole, _ = grads(rows)
    np.testing.assert_allclose(found + good, whole + jnp.mean(rows), rtol=1e-5)


def test_samplers_and_chains_that_are_none_are_named():
  model = lambda mean, x: mean * x[:, 0] - x[:, 0] ** 2 / 2
  rows = jnp.linspace(-1.0, 2.0, 8)[:, None]
  batch = optlab.NoiseBatch(rows, rows, jnp.zeros(8))

  def step(sampler, chains):
    estimator = optlab.contrastive_divergence(model, sampler=sampler)
    state = estimator.init(jnp.zeros(()), jax.random.key(1), chains)
    return estimator.estimate(jnp.zeros(()), state, batch)[1]

  with pytest.raises(TypeError, match='must be floating rows, got dtype int32'):
    step(lambda log_p, key, rows: rows.astype(jnp.int32), rows)
  with pytest.raises(ValueError, match='at least one chain'):
    step(None, rows[:0])
  half = step(lambda log_p, key, rows: rows.astype(jnp.float16), rows)
  assert half.chains.dtype == jnp.float32
