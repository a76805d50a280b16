"""Coupled compositions: exact with all data, closer than a mini-batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab.multi_block import FCCOBatch
from optlab.multi_block import fcco
from optlab.multi_block import track_average
from optlab.multi_block import track_log_average
from optlab.multi_block import track_mirror
from optlab.multi_block import track_msvr

BLOCKS, CHOICES, DIM = 12, 40, 3
TRACKERS = {
  'average': track_average, 'msvr': track_msvr, 'log': track_log_average,
  'mirror': track_mirror,
}  # fmt: skip
over_trackers = pytest.mark.parametrize('name', TRACKERS)


def problem(name):
  """mean_i log mean_k exp(a_ik w), with or without logarithms inside."""
  logs = name in ('log', 'mirror')

  def inner(w, rows):
    scores = jax.nn.logsumexp(rows @ w, axis=-1) - np.log(rows.shape[-2])
    return scores if logs else jnp.exp(scores)

  outer = (lambda u, batch: u) if logs else (lambda u, batch: jnp.log(u))
  return inner, outer


def data():
  key = jax.random.key(0)
  return 1.5 * jax.random.normal(key, (BLOCKS, CHOICES, DIM)) + jnp.arange(DIM)


def objective(w):
  scores = jax.nn.logsumexp(data() @ w, axis=-1) - jnp.log(CHOICES)
  return jnp.mean(scores)


@over_trackers
def test_all_blocks_and_all_data_give_the_exact_gradient(x64, name):
  w = jnp.linspace(-0.3, 0.4, DIM)
  inner, outer = problem(name)
  estimator = fcco(inner, outer, BLOCKS, tracker=TRACKERS[name](0.3))
  state = estimator.init(w, jnp.zeros(BLOCKS))
  batch = FCCOBatch(jnp.arange(BLOCKS), data())
  for _ in range(3):
    estimate, state = jax.jit(estimator.estimate)(w, state, batch)
  value, grads = jax.value_and_grad(objective)(w)
  np.testing.assert_allclose(estimate.value, value, rtol=1e-12)
  np.testing.assert_allclose(estimate.grads, grads, rtol=1e-12)


def run(estimator, w, steps, rate, drawn=2, sampled=3):
  """Steps with few blocks, and few choices of each; gradients and points."""
  rows = data()
  state = estimator.init(w, jnp.zeros(BLOCKS))

  def step(carry, key):
    w, state = carry
    keys = jax.random.split(key)
    blocks = optlab.sample_blocks(keys[0], BLOCKS, sampled)
    chosen = jax.random.randint(keys[1], (sampled, drawn), 0, CHOICES)
    batch = FCCOBatch(blocks, rows[blocks[:, None], chosen])
    estimate, state = estimator.estimate(w, state, batch)
    return (w - rate * estimate.grads, state), (estimate.grads, w)

  keys = jax.random.split(jax.random.key(1), steps)
  return jax.jit(lambda c: jax.lax.scan(step, c, keys))((w, state))


@pytest.mark.parametrize('name', ['average', 'log'])
def test_the_bias_is_a_fraction_of_that_of_the_mini_batch(x64, name):
  """At a fixed point; with a rate of one it is the mini-batch itself."""
  w = jnp.linspace(-0.3, 0.4, DIM)
  exact = jax.grad(objective)(w)
  inner, outer = problem(name)

  def bias(rate):
    tracker = TRACKERS[name](rate)
    _, (grads, _) = run(
      fcco(inner, outer, BLOCKS, tracker=tracker), w, 8000, 0.0
    )
    return jnp.linalg.norm(jnp.mean(grads[500:], axis=0) - exact)

  assert bias(0.05) < 0.3 * bias(1.0)


@pytest.mark.parametrize('name', ['average', 'log', 'mirror'])
def test_it_minimizes_what_the_mini_batch_does_not(x64, name):
  w = jnp.linspace(-0.3, 0.4, DIM)
  best = jax.jit(
    lambda w: jax.lax.fori_loop(
      0, 2000, lambda _, w: w - 0.1 * jax.grad(objective)(w), w
    )
  )(w)
  inner, outer = problem(name)

  def excess(tracker):
    estimator = fcco(inner, outer, BLOCKS, tracker=tracker)
    _, (_, path) = run(estimator, w, 6000, 0.01)
    return objective(jnp.mean(path[3000:], axis=0)) - objective(best)

  assert excess(TRACKERS[name](0.1 if name == 'mirror' else 0.03)) < 0.05
  if name in ('average', 'log'):  # A rate of one is the mini-batch.
    assert excess(TRACKERS[name](1.0)) > 10.0


def test_msvr_follows_where_a_moving_average_lags(x64):
  """Inner values without noise, while w goes its way."""
  rows = data()
  inner, outer = problem('msvr')

  def lag(tracker):
    estimator = fcco(inner, outer, BLOCKS, tracker=tracker)
    state = estimator.init(jnp.zeros(DIM), inner(jnp.zeros(DIM), rows))

    def step(state, item):
      t, key = item
      w = 0.3 * jnp.sin(0.02 * t) * jnp.ones(DIM)
      blocks = optlab.sample_blocks(key, BLOCKS, 3)
      _, state = estimator.estimate(w, state, FCCOBatch(blocks, rows[blocks]))
      return state, jnp.linalg.norm(state.tracked - inner(w, rows))

    keys = jax.random.split(jax.random.key(0), 600)
    errors = jax.lax.scan(step, state, (jnp.arange(600.0), keys))[1]
    return jnp.mean(errors[200:])

  assert lag(track_msvr(0.1)) < 0.5 * lag(track_average(0.1))


def test_mirror_steps_are_their_closed_form(x64):
  u, g, alpha = jnp.array([0.5, 3.0]), jnp.array([2.0, 0.1]), 0.7
  moved = track_mirror(alpha).update(jnp.log(u), jnp.log(g), None, None)
  expected = u * (1 + alpha * g) / (1 + alpha * u)
  np.testing.assert_allclose(jnp.exp(moved), expected, rtol=1e-13)
  # The stationary point of the proximal step, in nu = log u.
  slope = 1 - g * jnp.exp(-moved) + (1 / u - jnp.exp(-moved)) / alpha
  np.testing.assert_allclose(slope, 0.0, atol=1e-13)


def test_logarithms_do_not_overflow():
  estimator = fcco(
    lambda w, batch: batch * w, lambda u, batch: u, 4,
    tracker=track_log_average(0.1),
  )  # fmt: skip
  batch = FCCOBatch(jnp.array([0, 2]), jnp.array([1e4, -1e4]))
  state = estimator.init(jnp.ones(()), jnp.zeros(4))
  for _ in range(3):
    estimate, state = estimator.estimate(jnp.ones(()), state, batch)
  np.testing.assert_allclose(state.tracked, [1e4, 0.0, -1e4, 0.0], rtol=1e-5)
  assert jnp.isfinite(estimate.grads)


def test_padding_repeats_and_bad_values():
  inner, outer = problem('log')
  estimator = fcco(inner, outer, BLOCKS, tracker=track_log_average())
  w, rows = jnp.ones(DIM), data()
  start = estimator.init(w, jnp.zeros(BLOCKS))
  step = jax.jit(estimator.estimate)
  plain, after = step(w, start, FCCOBatch(jnp.array([1, 5]), rows[:2]))
  padded = FCCOBatch(
    jnp.array([1, BLOCKS, 5, 5]), rows[jnp.array([0, 7, 1, 9])]
  )
  other, also = step(w, start, padded)
  np.testing.assert_allclose(plain.grads, other.grads, rtol=1e-6)
  for a, b in zip(*map(jax.tree.leaves, (after, also)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  # A block whose value is not finite, and a step that has no other.
  bad = rows[:2].at[1].set(jnp.nan)
  estimate, state = step(w, after, FCCOBatch(jnp.array([1, 5]), bad))
  for leaf in jax.tree.leaves((estimate.grads, state)):
    assert jnp.all(jnp.isfinite(leaf))
  assert state.info.total_rejected > 0
  estimate, still = step(w, state, FCCOBatch(jnp.array([1, 5]), jnp.nan * bad))
  np.testing.assert_array_equal(estimate.grads, 0.0)
  np.testing.assert_array_equal(still.tracked, state.tracked)
  assert still.info.rejected == 2


def test_weights_of_blocks_and_unequal_rows_are_part_of_the_functions(x64):
  """Weights go into the outer function; the inner one masks what is missing."""
  keys = jax.random.split(jax.random.key(0), 3)
  rows = jax.random.normal(keys[0], (4, 5, 2))
  mask = jnp.arange(5) < jnp.array([5, 1, 3, 2])[:, None]
  weights, w = jnp.array([0.5, 2.0, 0.0, 1.0]), jnp.array([0.3, -0.2])

  def inner(w, batch):
    rows, mask = batch
    return jax.nn.logsumexp(rows @ w, axis=1, where=mask)

  estimator = fcco(
    inner, lambda log_u, weight: weight * log_u, 4, tracker=track_log_average()
  )
  order = jnp.array([2, 0, 3, 1])
  batch = FCCOBatch(order, (rows[order], mask[order]), weights[order])
  result, _ = estimator.estimate(w, estimator.init(w, jnp.zeros(4)), batch)

  def whole(w):
    own = [jnp.exp(r[m] @ w).sum() for r, m in zip(rows, mask, strict=True)]
    return jnp.mean(weights * jnp.log(jnp.stack(own)))

  value, grads = jax.value_and_grad(whole)(w)
  np.testing.assert_allclose(result.value, value, rtol=1e-12)
  np.testing.assert_allclose(result.grads, grads, rtol=1e-12)


def test_time_does_not_grow_with_the_blocks():
  """Tables are written in place."""

  def temporary_bytes(m):
    estimator = fcco(
      lambda w, batch: batch * w, lambda u, batch: u**2, m,
      tracker=track_msvr(0.1),
    )  # fmt: skip
    state = estimator.init(jnp.ones(()), jnp.zeros(m))
    step = jax.jit(estimator.estimate, donate_argnums=1)
    batch = FCCOBatch(jnp.arange(4), jnp.ones(4))
    compiled = step.lower(jnp.ones(()), state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary_bytes(1_000) == temporary_bytes(100_000)


def test_any_optimizer_takes_it():
  inner, outer = problem('log')
  estimator = fcco(inner, outer, BLOCKS, tracker=track_log_average(0.2))
  tx = optax.adam(0.05)
  state = optlab.init(jnp.ones(DIM), estimator, tx, jnp.zeros(BLOCKS))
  step = jax.jit(optlab.train_step(estimator, tx))
  batch = FCCOBatch(jnp.arange(BLOCKS), data())
  values = [step(state, batch)[1]]
  for _ in range(50):
    state, value = step(state, batch)
    values.append(value)
  assert values[-1] < values[0] - 0.5
