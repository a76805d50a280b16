"""The multi-block estimator against exact solutions and a plain reading."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.problems import quadratic
import optlab
from optlab import tables
from optlab import tracking

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'bsvrb'
DUALS = {
  'v1': functools.partial(optlab.multi_block.track_hessians, 0.1),
  'v2': optlab.multi_block.track_products,
}
over_duals = pytest.mark.parametrize('dual', DUALS)
# Where both share what is tested.
over_one_and_more = pytest.mark.parametrize(
  'dual', ['v2', pytest.param('v1', marks=pytest.mark.slow)]
)


def golden_problem():
  recorded = json.loads((GOLDEN / 'multiblock_quadratic_m20.json').read_text())
  blocks = quadratic.Block(
    a=jax.vmap(jnp.diag)(jnp.asarray(recorded['a'])),
    b=jnp.asarray(recorded['B']),
    c=jnp.asarray(recorded['c']),
    t=jnp.asarray(recorded['t']),
    rho=jnp.full(recorded['m'], recorded['rho']),
  )
  return recorded, blocks


def batch_of(data, blocks, noise=0.0, noise_upper=0.0):
  """A batch of the quadratic; out of range, the last block counts."""
  rows = tables.gather_rows(data, blocks)
  upper = rows, jnp.broadcast_to(noise_upper, rows.t.shape)
  lower = rows, jnp.broadcast_to(noise, rows.c.shape)
  return optlab.BlockBatch(blocks, upper, lower)


def estimator_of(num_blocks, **kwargs):
  return optlab.bsvrb(quadratic.upper, quadratic.lower, num_blocks, **kwargs)


def run_fixed_point(estimator, state, x, data, sampled, steps):
  """Steps with x fixed; the estimates of all steps and the last state."""
  m = data.c.shape[0]

  def step(state, key):
    blocks = optlab.sample_blocks(key, m, sampled)
    estimate, state = estimator.estimate(x, state, batch_of(data, blocks))
    return state, (estimate.grads, estimate.value, blocks)

  keys = jax.random.split(jax.random.key(0), steps)
  return jax.jit(lambda state: jax.lax.scan(step, state, keys))(state)


def exact_dual(x, y, data):
  hessian = data.a + 0.5 * jnp.exp(0.2 * x[0]) * jnp.eye(data.a.shape[-1])
  return jax.vmap(jnp.linalg.solve)(hessian, y - data.t)


@over_duals
def test_all_blocks_give_the_recorded_hypergradient(x64, dual):
  recorded, data = golden_problem()
  m, x = recorded['m'], jnp.asarray(recorded['x'])
  np.testing.assert_allclose(
    jax.grad(quadratic.objective)(x, data), recorded['hypergrad'], atol=1e-14
  )
  estimator = estimator_of(m, inner_lr=0.3, dual=DUALS[dual]())
  state = estimator.init(x, jnp.zeros_like(data.c))
  state, (grads, values, _) = run_fixed_point(estimator, state, x, data, m, 300)
  assert np.abs(grads[-1] - np.asarray(recorded['hypergrad'])).max() < 1e-12
  assert abs(values[-1] - recorded['value']) < 1e-12
  np.testing.assert_allclose(
    optlab.multi_block.inner_variables(state), recorded['y_star'], atol=1e-12
  )


def test_single_blocks_give_the_recorded_parts(x64):
  recorded, data = golden_problem()
  x = jnp.asarray(recorded['x'])
  estimator = estimator_of(1, inner_lr=0.3)

  @jax.jit
  def last(block):
    state = estimator.init(x, jnp.zeros_like(block.c))
    return run_fixed_point(estimator, state, x, block, 1, 300)[1][0][-1]

  for i, expected in enumerate(recorded['hypergrad_first4_blocks']):
    block = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], data)
    np.testing.assert_allclose(last(block), expected, atol=1e-12)


@over_one_and_more
def test_sampled_blocks_converge_at_a_fixed_point(x64, dual):
  """y and v converge; z keeps the error of a moving average, and no more."""
  recorded, data = golden_problem()
  m, x = recorded['m'], jnp.asarray(recorded['x'])
  sampled, beta = 4, 0.1
  estimator = estimator_of(m, inner_lr=0.25, beta=beta, dual=DUALS[dual]())
  state = estimator.init(x, jnp.zeros_like(data.c))
  state, (grads, _, _) = run_fixed_point(
    estimator, state, x, data, sampled, 6000
  )
  y = optlab.multi_block.inner_variables(state)
  y_star = jax.jit(jax.vmap(quadratic.solution, (None, 0)))(x, data)
  assert np.abs(y - y_star).max() < 1e-10
  if dual == 'v2':
    v_star = exact_dual(x, y_star, data)
    assert (
      np.abs(optlab.multi_block.dual_variables(state) - v_star).max() < 1e-10
    )

  def part(block):
    return jax.grad(quadratic.objective)(
      x, jax.tree.map(lambda leaf: leaf[None], block)
    )

  parts = jax.jit(jax.vmap(part))(data)
  spread = jnp.sqrt(jnp.sum(jnp.var(parts, axis=0)))
  one_mean = spread * np.sqrt((m - sampled) / (sampled * (m - 1)))
  error = grads[2000:] - jnp.mean(parts, axis=0)
  measured = jnp.sqrt(jnp.mean(jnp.sum(error**2, axis=1)))
  theory = np.sqrt(beta / (2 - beta)) * one_mean
  np.testing.assert_allclose(measured, theory, rtol=0.1)


@over_one_and_more
def test_minimizes_to_a_gradient_norm_of_1e_12(x64, dual):
  recorded, data = golden_problem()
  m = recorded['m']
  estimator = estimator_of(m, inner_lr=0.3, dual=DUALS[dual]())
  tx = optax.sgd(0.3)
  step = optlab.train_step(estimator, tx)
  batch = batch_of(data, jnp.arange(m))
  x = jnp.asarray(recorded['x'])
  state = optlab.init(x, estimator, tx, jnp.zeros_like(data.c))
  run = jax.jit(
    lambda state: jax.lax.scan(lambda s, _: step(s, batch), state, length=800)
  )
  x = run(state)[0].params
  assert jnp.linalg.norm(jax.grad(quadratic.objective)(x, data)) < 1e-12
  np.testing.assert_allclose(x, recorded['x_star'], atol=1e-12)


# A plain reading of the paper, with all blocks moving in each step.


class Plain:
  """BSVRB on the quadratic, in numpy, with tables of all old values."""

  def __init__(self, data, x, step_size, alpha, beta, hessian_floor):
    self.data = jax.tree.map(np.asarray, data)
    self.step_size, self.alpha, self.beta = step_size, alpha, beta
    self.floor = hessian_floor
    m, d = data.c.shape
    self.x = self.x_old = np.asarray(x)
    zeros = np.zeros((m, d))
    self.y = self.y_old = self.v = self.v_old = zeros
    self.s, self.u = zeros.copy(), zeros.copy()
    self.h = self.h_old = np.zeros((m, d, d))
    self.seen = np.zeros(m, bool)
    self.z = None

  def samples(self, x, y, v, h, i, noise, noise_upper):
    data = jax.tree.map(lambda leaf: leaf[i], self.data)
    bend = 0.5 * np.exp(0.2 * x[0])
    hessian = data.a + bend * np.eye(len(y))
    lower_y = hessian @ y - data.b @ x - data.c - noise
    upper_y = y - data.t - noise_upper
    if self.floor is not None:
      known = np.any(h)
      v = np.linalg.solve(h, upper_y) if known else np.zeros_like(v)
    cross = -data.b.T @ v
    cross[0] += 0.2 * bend * (y @ v)
    g = data.rho * x - cross
    return lower_y, hessian, hessian @ v - upper_y, g

  def step(self, blocks, noise, noise_upper, lr):
    m, count = len(self.y), len(blocks)
    tau, alpha = self.step_size * count / m, self.alpha
    gamma = (m - count) / (count * (1 - alpha)) + 1 - alpha
    s, u, h = self.s.copy(), self.u.copy(), self.h.copy()
    now = before = 0.0
    for k, i in enumerate(blocks):
      new = self.samples(
        self.x, self.y[i], self.v[i], self.h[i], i, noise[k], noise_upper[k]
      )
      old = self.samples(
        self.x_old, self.y_old[i], self.v_old[i], self.h_old[i], i,
        noise[k], noise_upper[k],
      )  # fmt: skip
      now, before = now + new[3] / count, before + old[3] / count
      for table, column in ((s, 0), (h, 1), (u, 2)):
        moved = gamma * (new[column] - old[column])
        table[i] = (1 - alpha) * table[i] + alpha * new[column] + moved
        if not self.seen[i]:
          table[i] = new[column]
      if self.floor is not None:
        values, vectors = np.linalg.eigh(h[i])
        h[i] = vectors * np.maximum(values, self.floor) @ vectors.T
      self.seen[i] = True
    if self.z is None:
      self.z = now
    else:
      self.z = (1 - self.beta) * (self.z - before) + now
    self.s, self.u = s, u
    self.h_old, self.h = self.h, h
    self.y_old, self.y = self.y, self.y - tau * s
    self.v_old, self.v = self.v, self.v - tau * u
    self.x_old, self.x = self.x, self.x - lr * self.z


@over_one_and_more
def test_lazy_steps_are_those_of_the_paper(x64, dual):
  """Blocks that are looked at seldom take every stale step that they missed."""
  m, sampled, steps, lr = 12, 3, 60, 0.02
  data = quadratic.make(m)
  random = np.random.default_rng(0)
  blocks = np.stack([random.permutation(m)[:sampled] for _ in range(steps)])
  noise = random.normal(size=(2, steps, sampled, 6))
  x = jnp.ones(5)
  # A floor that is active: some eigenvalues are below it.
  floor = 1.8 if dual == 'v1' else None
  plain = Plain(data, x, 0.2, 0.3, 0.2, floor)
  chosen = optlab.multi_block.track_hessians(floor) if dual == 'v1' else None
  estimator = estimator_of(m, inner_lr=0.2, alpha=0.3, beta=0.2, dual=chosen)
  tx = optax.sgd(lr)
  state = optlab.init(x, estimator, tx, jnp.zeros((m, 6)))
  step = jax.jit(optlab.train_step(estimator, tx))
  for chosen, lower, upper in zip(blocks, *noise, strict=True):
    plain.step(chosen, lower, upper, lr)
    state, _ = step(state, batch_of(data, jnp.asarray(chosen), lower, upper))
    np.testing.assert_allclose(state.params, plain.x, rtol=0, atol=1e-12)
  inner = optlab.multi_block.inner_variables(state.estimator_state)
  np.testing.assert_allclose(inner, plain.y, rtol=0, atol=1e-12)
  np.testing.assert_allclose(
    state.estimator_state.hypergrad, plain.z, rtol=0, atol=1e-12
  )
  if dual == 'v2':
    duals = optlab.multi_block.dual_variables(state.estimator_state)
    np.testing.assert_allclose(duals, plain.v, rtol=0, atol=1e-12)


# What makes the method: each of these fails for its parent.


def errors_on_a_path(path, sampled, *, alpha=0.1, gamma=None, beta=0.1):
  """Mean errors of s and of z while x goes its way, without noise."""
  m, steps = 20, 800
  data = quadratic.make(m)
  estimator = estimator_of(
    m, inner_lr=0.25, alpha=alpha, gamma=gamma, beta=beta
  )
  state = estimator.init(path(0), jnp.zeros((m, 6)))

  def step(state, item):
    t, key = item
    x = path(t)
    blocks = optlab.sample_blocks(key, m, sampled)
    y = optlab.multi_block.inner_variables(state)
    batch = batch_of(data, blocks)
    estimate, state = estimator.estimate(x, state, batch)
    slope = jax.vmap(jax.grad(quadratic.lower, 1), (None, 0, 0))
    s_error = state.inner_grad - slope(x, y, (data, jnp.zeros((m, 6))))
    z_error = estimate.grads - jax.grad(quadratic.objective)(x, data)
    return state, (jnp.linalg.norm(s_error), jnp.linalg.norm(z_error))

  items = jnp.arange(steps), jax.random.split(jax.random.key(0), steps)
  errors = jax.jit(lambda s: jax.lax.scan(step, s, items)[1])(state)
  return [jnp.mean(error[steps // 2 :]) for error in errors]


def test_msvr_follows_where_a_moving_average_lags(x64):
  def path(t):
    return jnp.ones(5) * jnp.sin(0.02 * t)

  both = jnp.array([tracking.msvr_gamma(20, 4, 0.1), 0.0])
  msvr, average = jax.vmap(lambda g: errors_on_a_path(path, 4, gamma=g)[0])(
    both
  )
  assert msvr < 0.4 * average


def test_storm_follows_where_a_moving_average_lags(x64, monkeypatch):
  def path(t):
    return jnp.ones(5) * 0.005 * t

  _, recursive = errors_on_a_path(path, 20, beta=0.01)
  monkeypatch.setattr(
    tracking, 'storm', lambda z, now, before, beta: tracking.ema(z, now, beta)
  )
  _, average = errors_on_a_path(path, 20, beta=0.01)
  assert recursive < 0.2 * average


@pytest.mark.parametrize(
  ('alpha', 'fraction'),
  [(0.5, 0.2), pytest.param(0.1, 0.2, marks=pytest.mark.slow)],
)
def test_stability_boundary_is_that_of_the_second_moment(x64, alpha, fraction):
  """The mean square of (y - y*, s) contracts below, and grows above, a bound.

  With curvature 1 and the step tau, a visit maps (error, tau s) by `visit` and
  the absence of one by `stale`. The bound on tau is where the spectral radius
  of the second moments passes one.
  """
  gamma = (1 - fraction) / (fraction * (1 - alpha)) + 1 - alpha

  def radius(tau):
    k = 1 - alpha - gamma * tau
    visit = np.array([[1 - alpha * tau, -k], [alpha * tau, k]])
    stale = np.array([[1.0, -1.0], [0.0, 1.0]])
    moments = fraction * np.kron(visit, visit)
    moments = moments + (1 - fraction) * np.kron(stale, stale)
    return np.abs(np.linalg.eigvals(moments)).max()

  low, high = 1e-3, 2.0
  while high / low > 1 + 1e-6:
    middle = np.sqrt(low * high)
    low, high = (middle, high) if radius(middle) < 1 else (low, middle)
  bound = low / fraction  # As inner_lr.
  few, all_blocks = 2 * (1 - alpha) / (1 + alpha), 2.0
  assert few < bound < all_blocks

  m = 2000
  sampled = int(fraction * m)

  def mean_square(step_size):
    estimator = optlab.bsvrb(
      lambda x, y, batch: 0.0 * x * y,
      lambda x, y, batch: 0.5 * y**2,
      m,
      inner_lr=step_size,
      alpha=alpha,
      guarded=False,  # Above the bound it would not grow.
    )
    state = estimator.init(jnp.zeros(()), jnp.ones(m))

    def step(state, key):
      blocks = optlab.sample_blocks(key, m, sampled)
      batch = optlab.BlockBatch(blocks)
      state = estimator.estimate(jnp.zeros(()), state, batch)[1]
      return state, jnp.mean(optlab.multi_block.inner_variables(state) ** 2)

    keys = jax.random.split(jax.random.key(0), 300)
    return jax.lax.scan(step, state, keys)[1]

  sizes = bound * jnp.array([0.8, 1.25])
  below, above = jax.jit(jax.vmap(mean_square))(sizes)
  assert below[-1] < 1e-3 * below.max()
  assert above[-1] > 1e3 * above[0]


# Bad input.


def small(**kwargs):
  data = quadratic.make(8)
  estimator = estimator_of(8, inner_lr=0.3, **kwargs)
  state = estimator.init(jnp.ones(5), jnp.zeros((8, 6)))
  return data, jax.jit(estimator.estimate), state


@over_one_and_more
def test_padding_and_repeats_are_as_if_absent(x64, dual):
  data, estimate, state = small(dual=DUALS[dual]())
  x = jnp.ones(5)
  for step in range(3):
    plain = batch_of(data, jnp.array([step, 5]))
    padded = batch_of(data, jnp.array([step, 8, 5, 5, 2**31 - 1]))
    # What the padding and the repeat bring is never looked at.
    junk = jnp.array([0.0, jnp.nan, 0.0, 1e3, jnp.inf])[:, None]
    padded = padded._replace(lower=(padded.lower[0], padded.lower[1] + junk))
    expected, expected_state = estimate(x, state, plain)
    actual, state = estimate(x, state, padded)
    x = x - 0.1 * actual.grads
    for a, b in zip(
      jax.tree.leaves((actual, state)),
      jax.tree.leaves((expected, expected_state)),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)
  assert state.info.total_rejected == 0


@over_one_and_more
def test_a_block_with_nan_is_rejected_and_the_others_go_on(x64, dual):
  data, estimate, state = small(dual=DUALS[dual]())
  x = jnp.ones(5)
  for step in range(3):
    good = batch_of(data, jnp.array([step, 5, 6]))
    noise = jnp.zeros((3, 6)).at[1, 2].set(jnp.nan)
    for field in ('lower', 'upper'):
      rows, zero = getattr(good, field)
      bad = good._replace(**{field: (rows, zero + noise)})
      without = batch_of(data, jnp.array([step, 6]))
      actual, after = estimate(x, state, bad)
      expected, _ = estimate(x, state, without)
      assert after.info.rejected == 1
      total = state.info.total_rejected + 1
      assert after.info.total_rejected == total
      np.testing.assert_allclose(actual.value, expected.value, rtol=1e-14)
      np.testing.assert_allclose(actual.grads, expected.grads, rtol=1e-12)
      assert after.visited[5] == state.visited[5]
      for leaf in jax.tree.leaves(after):
        assert np.all(np.isfinite(leaf))
    state = after
    x = x - 0.1 * actual.grads


def test_a_step_without_a_good_block_changes_nothing(x64):
  data, estimate, state = small()
  x = jnp.ones(5)
  _, state = estimate(x, state, batch_of(data, jnp.array([1, 2])))
  for batch, rejected in (
    (batch_of(data, jnp.array([1, 2]), jnp.nan), 2),
    (batch_of(data, jnp.array([8, 9])), 0),
  ):
    estimate_, after = estimate(2.0 * x, state, batch)
    assert np.isnan(estimate_.value)
    np.testing.assert_array_equal(estimate_.grads, 0.0)
    assert after.info.rejected == rejected
    assert after.info.total_rejected == state.info.total_rejected + rejected
    for a, b in zip(
      jax.tree.leaves(after._replace(info=())),
      jax.tree.leaves(state._replace(info=())),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)


def test_indefinite_hessians_are_projected_and_the_others_kept(x64):
  """Two blocks, one of them concave in one direction."""
  curvatures = jnp.array([[2.0, 3.0], [-1.0, 3.0]])
  floor = 0.5
  estimator = optlab.bsvrb(
    lambda x, y, batch: jnp.sum(y),
    lambda x, y, a: 0.5 * jnp.sum(a * y**2) - x * jnp.sum(y),
    2,
    inner_lr=optax.constant_schedule(0.0),
    dual=optlab.multi_block.track_hessians(floor),
  )
  x = jnp.ones(())
  state = estimator.init(x, jnp.zeros((2, 2)))
  batch = optlab.BlockBatch(jnp.arange(2), lower=curvatures)
  step = jax.jit(estimator.estimate)
  for _ in range(3):
    estimate, state = step(x, state, batch)
  np.testing.assert_allclose(
    state.dual.hessian,
    [np.diag([2.0, 3.0]), np.diag([floor, 3.0])],
    atol=1e-15,
  )
  # d_x f - d_xy g H^-1 d_y f, with d_xy g = -1.
  expected = 0.5 * (1 / 2 + 1 / 3) + 0.5 * (1 / floor + 1 / 3)
  np.testing.assert_allclose(estimate.grads, expected, rtol=1e-14)


def test_projection_of_the_dual_biases_only_where_it_is_active(x64):
  """One block with v* = 1: a ball of radius 2 leaves it, 1/2 halves it."""

  def final(radius):
    estimator = optlab.bsvrb(
      lambda x, y, batch: y,
      lambda x, y, batch: 0.5 * y**2 - x * y,
      1,
      inner_lr=0.5,
      dual=optlab.multi_block.track_products(radius=radius),
    )
    x = jnp.ones(())
    state = estimator.init(x, jnp.zeros(1))
    batch = optlab.BlockBatch(jnp.arange(1))
    step = jax.jit(estimator.estimate)
    for _ in range(60):
      estimate, state = step(x, state, batch)
    return float(estimate.grads)

  np.testing.assert_allclose(final(2.0), 1.0, rtol=1e-8)
  np.testing.assert_allclose(final(0.5), 0.5, rtol=1e-8)


@pytest.mark.parametrize(
  ('kwargs', 'error', 'message'),
  [
    ({'num_blocks': 0}, ValueError, 'num_blocks must be at least 1'),
    ({'num_blocks': 2.0}, TypeError, 'num_blocks must be an integer'),
    ({'alpha': 0.0}, ValueError, r'alpha must be in \(0'),
    ({'alpha': 1.0}, ValueError, r'alpha must be in \(0'),
    ({'beta': 0.0}, ValueError, r'beta must be in \(0'),
    ({'inner_lr': -0.1}, ValueError, 'inner_lr'),
    ({'inner_lr': 0.0}, ValueError, 'inner_lr must be in'),
    ({'gamma': float('nan')}, ValueError, 'gamma'),
    ({'upper': 1.0}, TypeError, 'upper must be a function'),
    ({'lower': None}, TypeError, 'lower must be a function'),
  ],
)
def test_bad_arguments_are_refused(kwargs, error, message):
  arguments = {
    'upper': quadratic.upper, 'lower': quadratic.lower, 'num_blocks': 4,
  }  # fmt: skip
  with pytest.raises(error, match=message):
    optlab.bsvrb(**(arguments | kwargs))


def test_bad_duals_and_batches_are_refused():
  for floor in (0.0, -1.0, float('nan')):
    with pytest.raises(ValueError, match='floor'):
      optlab.multi_block.track_hessians(floor)
  with pytest.raises(ValueError, match='radius'):
    optlab.multi_block.track_products(radius=0.0)
  with pytest.raises(ValueError, match='dual_lr_ratio'):
    optlab.multi_block.track_products(dual_lr_ratio=0.0)
  data = quadratic.make(4)
  estimator = estimator_of(4)
  x = jnp.ones(5, data.c.dtype)
  state = estimator.init(x, jnp.zeros((4, 6)))
  with pytest.raises(ValueError, match='inner must have a leading axis of 4'):
    estimator.init(x, jnp.zeros((3, 6)))
  with pytest.raises(ValueError, match='first must have each of the'):
    estimator.init(x, jnp.zeros((4, 6)), batch_of(data, jnp.arange(3)))
  good = batch_of(data, jnp.arange(2))
  for batch, error, message in [
    (good._replace(blocks=jnp.array([0, -1])), ValueError, 'negative'),
    (good._replace(blocks=jnp.array([0.0, 1.0])), TypeError, 'integer'),
    (batch_of(data, jnp.arange(5)), ValueError, 'more than num_blocks=4'),
    (good._replace(blocks=jnp.arange(3)), ValueError, 'leading axis of 3'),
    (good._replace(lower=1.0), ValueError, 'batch.lower must have a leading'),
  ]:
    with pytest.raises(error, match=message):
      estimator.estimate(x, state, batch)


# Memory, time and devices.


def test_first_pass_sets_every_tracker(x64):
  recorded, data = golden_problem()
  x = jnp.asarray(recorded['x'])
  y = jax.vmap(quadratic.solution, (None, 0))(x, data)
  order = jnp.asarray(np.random.default_rng(0).permutation(20))
  for dual in DUALS.values():
    estimator = estimator_of(20, dual=dual())
    state = jax.jit(estimator.init)(x, y, batch_of(data, order))
    assert np.all(state.visited == 0)
    np.testing.assert_allclose(state.inner_grad, 0.0, atol=1e-14)
    if isinstance(state.dual, tuple) and hasattr(state.dual, 'hessian'):
      # With exact y and H, one step gives the exact hypergradient.
      batch = batch_of(data, jnp.arange(20))
      estimate, _ = jax.jit(estimator.estimate)(x, state, batch)
      np.testing.assert_allclose(
        estimate.grads, recorded['hypergrad'], atol=1e-12
      )


def test_clock_keeps_small_steps_late_in_a_run():
  """After 2^17 units of 1e-4 a float32 sum alone would be off by percents."""
  from optlab.multi_block import _clock

  length = jnp.float32(1e-4)

  @jax.jit
  def run(clock):
    def step(clock, _):
      return _clock.add(clock, length), clock

    return jax.lax.scan(step, clock, length=20_000)

  start = jnp.array([2.0**17, 0.0], jnp.float32)
  clock, past = run(start)
  elapsed = _clock.elapsed(clock[None], past[-100:-99])
  np.testing.assert_allclose(elapsed[0, 0], 100e-4, rtol=1e-4)
  assert start[0] + length == start[0]  # What it would be alone.


@over_one_and_more
def test_pytree_variables_and_schedules(dual):
  def lower(x, y, batch):
    return 0.5 * jnp.sum((y['a'] - x['w']) ** 2) + 0.5 * (y['b'] - x['c']) ** 2

  def upper(x, y, batch):
    return 0.5 * jnp.sum((y['a'] - 1.0) ** 2) + 0.5 * (y['b'] + 2.0) ** 2

  params = {'w': jnp.zeros(2), 'c': jnp.zeros(()), 'none': ()}
  inner = {'a': jnp.zeros((6, 2)), 'b': jnp.zeros(6)}
  estimator = optlab.bsvrb(
    upper,
    lower,
    6,
    inner_lr=optax.constant_schedule(0.8),
    beta=optax.linear_schedule(0.5, 0.1, 50),
    alpha=lambda step: 0.2,
    dual=DUALS[dual](),
  )
  tx = optax.sgd(0.1)
  state = optlab.init(params, estimator, tx, inner)
  step = optlab.train_step(estimator, tx)

  @jax.jit
  def run(state):
    def body(state, key):
      blocks = optlab.sample_blocks(key, 6, 3)
      return step(state, optlab.BlockBatch(blocks))

    return jax.lax.scan(body, state, jax.random.split(jax.random.key(0), 300))

  state, _ = run(state)
  np.testing.assert_allclose(state.params['w'], 1.0, atol=1e-4)
  np.testing.assert_allclose(state.params['c'], -2.0, atol=1e-4)


def test_a_donated_step_copies_no_table():
  """Tables are written in place: what the program allocates has no m in it."""

  def temporary_bytes(m):
    estimator = optlab.bsvrb(
      lambda x, y, batch: 0.5 * jnp.sum((y - 1.0) ** 2),
      lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2),
      m,
    )
    state = estimator.init(jnp.zeros(16), jnp.zeros((m, 16)))
    batch = optlab.BlockBatch(jnp.arange(4))
    step = jax.jit(estimator.estimate, donate_argnums=1)
    compiled = step.lower(jnp.zeros(16), state, batch).compile()
    memory = compiled.memory_analysis()
    tables = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= 0.99 * tables
    return memory.temp_size_in_bytes

  assert temporary_bytes(1_000) == temporary_bytes(20_000)


SHARDED = """
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_enable_x64', True)
import jax.numpy as jnp, numpy as np, optax, re
import optlab
from experiments.problems import quadratic

assert len(jax.devices()) == 8
auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((4, 2), ('blocks', 'data'), axis_types=auto)
m, sampled, rows = 64, 6, 8
data = quadratic.make(m)
mean_lower = lambda x, y, batch: jnp.mean(
    jax.vmap(lambda e: quadratic.lower(x, y, (batch[0], e)))(batch[1]))
mean_upper = lambda x, y, batch: jnp.mean(
    jax.vmap(lambda e: quadratic.upper(x, y, (batch[0], e)))(batch[1]))
duals = {'v1': optlab.multi_block.track_hessians(0.1),
         'v2': optlab.multi_block.track_products()}
for name, dual in duals.items():
  estimator = optlab.bsvrb(mean_upper, mean_lower, m, inner_lr=0.2, dual=dual)
  tx = optax.sgd(0.02)
  step = optlab.train_step(estimator, tx)
  state = optlab.init(jnp.ones(5), estimator, tx, jnp.zeros((m, 6)))
  def placed(leaf):
    table = leaf.ndim and leaf.shape[0] == m
    return jax.NamedSharding(mesh, jax.P('blocks') if table else jax.P())
  layout = jax.tree.map(placed, state)
  def batch(key):
    keys = jax.random.split(key, 3)
    blocks = optlab.sample_blocks(keys[0], m, sampled)
    e, f = jax.random.normal(keys[1], (2, sampled, rows, 6))
    block_data = jax.tree.map(lambda leaf: leaf[blocks], data)
    return optlab.BlockBatch(blocks, (block_data, e), (block_data, f))
  everywhere = jax.NamedSharding(mesh, jax.P())
  over_rows = jax.NamedSharding(mesh, jax.P(None, 'data'))
  def spread(batch, where):
    (block_data, e), (_, f) = batch.upper, batch.lower
    batch = jax.device_put(batch, everywhere)
    e, f = jax.device_put((e, f), where)
    return optlab.BlockBatch(
        batch.blocks, (batch.upper[0], e), (batch.lower[0], f))
  for where in (everywhere, over_rows):
    alone, sharded = state, jax.device_put(state, layout)
    first = spread(batch(jax.random.key(0)), where)
    compiled = jax.jit(step, out_shardings=(layout, None)).lower(
        sharded, first).compile()
    assert not re.search(r'all-gather|all-to-all', compiled.as_text()), name
    single = jax.jit(step)
    for k in range(30):
      one = batch(jax.random.key(k))
      alone, _ = single(alone, one)
      sharded, _ = compiled(sharded, spread(one, where))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(sharded)):
      np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
    table = sharded.estimator_state.inner
    assert table.addressable_shards[0].data.shape == (m // 4, 6)
    # The rows of all tables come in one all-reduce for each dtype.
    reduces = re.findall(r'= .* all-reduce\\(', compiled.as_text())
    assert where is over_rows or len(reduces) == 2, (name, reduces)
print('same numbers')
"""


@pytest.mark.slow
def test_sharded_over_blocks_and_data_gives_the_same_numbers():
  """Eight virtual devices need a process of their own."""
  root = pathlib.Path(__file__).parents[2]
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'PYTHONPATH': str(root),
  }
  done = subprocess.run(
    [sys.executable, '-c', SHARDED],
    env=environment, cwd=root, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'same numbers' in done.stdout


@pytest.mark.parametrize(
  'method',
  ['v2', *(pytest.param(m, marks=pytest.mark.slow) for m in ('v1', 'rsvrb'))],
)
def test_damping_and_curvature_take_the_place_of_the_lower_hessian(x64, method):
  """Two blocks, one concave: v solves the system that the user asks for."""
  curvatures = jnp.array([[2.0, 3.0], [-1.0, 3.0]])
  x, rate = jnp.ones(()), 0.25

  def hypergradient(**system):
    arguments = (
      lambda x, y, batch: jnp.sum(y),
      lambda x, y, a: 0.5 * jnp.sum(a * y**2) - x * jnp.sum(y),
      2,
    )
    if method == 'rsvrb':
      make = optlab.multi_block.rsvrb
      kind = optlab.multi_block.PairedBlockBatch
      rest = (jnp.arange(2),)
      system |= {'inner_lr': optax.constant_schedule(0.0), 'floor': 0.1}
    else:
      make, kind, rest = optlab.bsvrb, optlab.BlockBatch, ()
      chosen = optlab.multi_block.track_hessians(0.1)
      system |= {'dual': chosen if method == 'v1' else None, 'inner_lr': rate}
    estimator = make(*arguments, **system)
    batch = kind(jnp.arange(2), None, curvatures, *rest)
    step = jax.jit(
      lambda s: jax.lax.scan(
        lambda s, _: estimator.estimate(x, s, batch)[::-1], s, length=200
      )
    )
    _, estimates = step(estimator.init(x, jnp.zeros((2, 2))))
    return estimates.grads[-1]

  # d_x f - d_xy g v with d_xy g = -1 and d_y f = 1, a mean over two blocks.
  damped = hypergradient(damping=3.0)
  expected = 0.5 * (1 / 5 + 1 / 6 + 1 / 2 + 1 / 6)
  np.testing.assert_allclose(damped, expected, rtol=1e-9)
  positive = lambda x, y, a: lambda v: jnp.abs(a) * v
  curved = hypergradient(curvature=positive)
  expected = 0.5 * (1 / 2 + 1 / 3 + 1 / 1 + 1 / 3)
  np.testing.assert_allclose(curved, expected, rtol=1e-9)
