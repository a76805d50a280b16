"""Tests with a memory: the noise scale, averages, schedules of the size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

D, TRUTH = 1e7, 10_000.0  # Of a network of ten million parameters.


def chi_squared(key, degrees):
  return degrees + np.sqrt(2 * degrees) * jax.random.normal(key)


def run(test, batch, steps):
  """Requests on gradients with a known mean of norm 1 and trace `TRUTH`.

  Isotropic noise in D dimensions, of which the part along the mean and the
  length across it are drawn by their own distributions.
  """
  rule = optlab.grow_batch(test, 2, 2**30)
  variance = TRUTH / D

  def step(state, key):
    along, across, spread = jax.random.split(key, 3)
    along = 1 + np.sqrt(variance / batch) * jax.random.normal(along)
    across = jnp.sqrt(variance / batch * chi_squared(across, D - 1))
    _, state = rule.update(
      jnp.stack([along, across]),
      state,
      sum_sq_diff_norm=variance * chi_squared(spread, (batch - 1) * D),
      sample_size=batch,
    )
    return state, state.info.requested_size

  keys = jax.random.split(jax.random.key(0), steps)
  start = rule.init(jnp.zeros(2))
  return jax.jit(lambda s: jax.lax.scan(step, s, keys))(start)


@pytest.mark.parametrize('batch', [8, 64])
def test_averages_do_not_saturate(batch):
  """A single batch of b requests about b; averages request the noise scale."""
  _, requests = run(optlab.norm_test(1.0), batch, 20)
  np.testing.assert_allclose(requests, batch, rtol=0.1)
  for make in (optlab.batches.noise_scale, optlab.norm_test):
    test = make(1.0, decay=0.995)
    state, requests = run(test, batch, 200)
    np.testing.assert_allclose(requests[-1], TRUTH, rtol=0.2)
  np.testing.assert_allclose(
    run(optlab.batches.noise_scale(0.5, decay=0.995), batch, 200)[1][-1],
    4 * TRUTH, rtol=0.2,
  )  # fmt: skip
  assert np.all(np.isfinite(jax.tree.leaves(state)[0]))


def test_layers_and_masks_have_scales_of_their_own():
  rng = np.random.default_rng(0)
  rows = jnp.asarray(rng.normal(size=(64, 5)) + 1.0, jnp.float32)
  params = {'a': jnp.zeros(3), 'b': jnp.zeros(2)}
  losses = lambda p, r: (r @ jnp.concatenate([p['a'], p['b']]) - 1.0) ** 2
  estimate, _ = optlab.per_example(
    losses, optlab.ghost_norms, layers=True
  ).estimate(params, (), rows)
  alone = {}
  for name, part in params.items():
    only = lambda q, r, name=name: losses(params | {name: q}, r)
    found, _ = optlab.per_example(only).estimate(part, (), rows)
    v = found.extras['sum_sq_diff_norm'] / 63
    alone[name] = v / (jnp.sum(found.grads**2) - v / 64)
  test = optlab.batches.noise_scale(layers=True)
  _, state = test.update(estimate.grads, test.init(params), **estimate.extras)
  for name, expected in alone.items():
    np.testing.assert_allclose(state.info.layers[name], expected, 1e-4)
  masked = optlab.batches.noise_scale(mask={'a': False, 'b': True})
  request, _ = masked.update(
    estimate.grads, masked.init(params), **estimate.extras
  )
  np.testing.assert_allclose(request, alone['b'], 1e-4)
  with pytest.raises(ValueError, match=r'sum_sq_diff_norms.*layers=True'):
    masked.update(estimate.grads, masked.init(params), sample_size=64)


def test_a_nan_leaves_no_trace_in_the_averages():
  rule = optlab.grow_batch(optlab.batches.noise_scale(), 2, 100)
  grads = jnp.ones(4)
  extras = {'sum_sq_diff_norm': jnp.float32(140.0), 'sample_size': 8}
  _, before = rule.update(grads, rule.init(grads), **extras)
  _, after = rule.update(grads * jnp.nan, before, **extras)
  for a, b in zip(
    *map(jax.tree.leaves, (after.test, before.test)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert after.batch_size == before.batch_size


def test_schedules_follow_the_samples():
  ramp = optlab.batches.size_schedule(
    optax.exponential_decay(4, 100, 2.0, staircase=True), unit=10
  )
  rule = optlab.grow_batch(ramp, 4, 32)
  state, sizes = rule.init(jnp.ones(2)), []
  for _ in range(9):
    _, state = rule.update(jnp.ones(2), state)
    sizes.append(int(state.batch_size))
  assert sizes == sorted(sizes)
  assert sizes[:4] == [4, 4, 8, 16]
  # Seesaw's first size: what rounding adds to a whole number is no example.
  for rate, size in ((0.03, 10), (0.3, 12), (6e-4, 48)):
    halved = optax.exponential_decay(rate, 1000, 0.5, staircase=True)
    sizes = optlab.batches.size_schedule(
      lambda n, size=size, rate=rate, halved=halved: size * rate / halved(n)
    )
    rule = optlab.grow_batch(sizes, 2, 64)
    _, state = rule.update(jnp.ones(2), rule.init(jnp.ones(2)))
    assert state.batch_size == size
  falling = optlab.batches.size_schedule(optax.linear_schedule(32, 2, 10))
  rule = optlab.grow_batch(falling, 32, 32)
  _, state = rule.update(jnp.ones(2), rule.init(jnp.ones(2)))
  _, state = rule.update(jnp.ones(2), state)
  assert state.batch_size == 32
  for wrong in (-5.0, jnp.nan):
    rule = optlab.grow_batch(
      optlab.batches.size_schedule(lambda n, w=wrong: w), 4, 8
    )
    _, state = rule.update(jnp.ones(2), rule.init(jnp.ones(2)))
    assert state.batch_size == 4
  for wrong in (None, 2j, 'eight'):
    rule = optlab.grow_batch(
      optlab.batches.size_schedule(lambda n, w=wrong: w), 4, 8
    )
    with pytest.raises(TypeError, match='schedule must return a size, a num'):
      rule.update(jnp.ones(2), rule.init(jnp.ones(2)))
    with pytest.raises(TypeError, match='test must request a size, a number'):
      optlab.grow_batch(lambda grads, w=wrong: w, 4, 8).update(
        jnp.ones(2), rule.init(jnp.ones(2))
      )
  several = optlab.batches.size_schedule(lambda n: jnp.ones(2) * n)
  rule = optlab.grow_batch(several, 4, 8)
  with pytest.raises(
    ValueError, match=r'one size, a scalar, got.*\(2,\): take'
  ):
    rule.update(jnp.ones(2), rule.init(jnp.ones(2)))


def rates(rate, rule, steps, optimizer=optax.sgd):
  """Sizes, rates and samples before each step of a run in one program."""
  x = jnp.zeros(2)
  tx = optax.chain(rule, optax.inject_hyperparams(optimizer)(rate))

  def step(carry, _):
    state, samples = carry
    size = optlab.batches.next_size(state)
    moved, new = tx.update(jnp.ones(2), state, x, sample_size=size)
    rate = new[1].hyperparams['learning_rate']
    return (new, samples + size), (size, rate, samples, moved[0])

  start = (tx.init(x), jnp.int32(0))
  return jax.jit(lambda: jax.lax.scan(step, start, length=steps)[1])()


@pytest.mark.parametrize('power', [0.5, 1.0, -0.5])
def test_the_rate_follows_the_batch(power):
  ramp = optlab.batches.size_schedule(optax.linear_schedule(8, 64, 400))
  size, rate, samples, moved = rates(
    optlab.batches.batch_learning_rate(0.1, 8, power=power),
    optlab.grow_batch(ramp, 8, 48),
    20,
  )
  np.testing.assert_array_equal(
    size, np.minimum(np.ceil(8 + 56 * samples / 400), 48)
  )
  assert (size[0], size[-1]) == (8, 48)
  np.testing.assert_allclose(rate, 0.1 * (size / 8.0) ** power, 1e-6)
  np.testing.assert_allclose(moved, -rate, 1e-6)


def test_seesaw_and_schedules_by_samples():
  """Halvings become doublings at a rate over sqrt 2, up to the largest size."""
  halved = optax.exponential_decay(0.4, 160, 0.5, staircase=True)
  sizes = optlab.batches.size_schedule(lambda n: 8 * 0.4 / halved(n))
  size, rate, samples, _ = rates(
    optlab.batches.batch_learning_rate(halved, 8),
    optlab.grow_batch(sizes, 8, 32),
    60,
  )
  cuts = samples // 160
  assert cuts[-1] > 3
  np.testing.assert_array_equal(size, 8 * 2 ** np.minimum(cuts, 2))
  np.testing.assert_allclose(
    rate, 0.4 * 2.0 ** np.where(cuts < 2, -cuts / 2, 1 - cuts), 1e-6
  )
  cosine = optax.cosine_decay_schedule(0.1, 1000 * 16)
  _, rate, samples, _ = rates(
    optlab.batches.batch_learning_rate(cosine, unit=16),
    optlab.grow_batch(sizes, 8, 32),
    60,
    optax.scale_by_learning_rate,
  )
  np.testing.assert_allclose(
    rate, 0.05 * (1 + np.cos(np.pi * np.minimum(samples / 1000, 1))), 1e-5
  )


def test_a_rate_in_bfloat16_keeps_the_state_and_needs_the_size():
  rate = optlab.batches.batch_learning_rate(0.1, 8)
  tx = optax.inject_hyperparams(optax.sgd)(rate)
  x = jnp.zeros(2, jnp.bfloat16)
  state = tx.init(x)
  updates, after = tx.update(jnp.ones_like(x), state, x, sample_size=32)
  assert updates.dtype == x.dtype
  np.testing.assert_allclose(updates.astype(float), -0.2, 1e-2)
  assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
  with pytest.raises(ValueError, match='batch_learning_rate needs.*sample_siz'):
    tx.update(jnp.ones_like(x), state, x)


def test_a_rate_that_is_no_state_of_the_optimizer_is_refused():
  """It would be the rate of the first batch for all."""
  rate = optlab.batches.batch_learning_rate(0.1, 8)
  for make in (optax.sgd, optlab.diffgrad):
    tx = make(rate)
    with pytest.raises(
      TypeError, match='optax.inject_hyperparams, which keeps'
    ):
      tx.update(jnp.ones(2), tx.init(jnp.ones(2)), sample_size=32)
