"""F2SA against closed forms, and what makes it first-order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import bilevel
from tests.bilevel import bilevel_problems
from tests.bilevel.faults_test import run


@pytest.mark.parametrize('central', [False, True])
def test_its_bias_is_that_of_the_difference(x64, central):
  """On a quadratic the shifted solutions are known."""
  problem = bilevel_problems.load('quadratic_single')
  data = bilevel_problems.read('quadratic_single')
  x = problem.x
  right = data['B'] @ x + data['c']

  def envelope(weight):
    matrix = data['A'] + weight * np.eye(4)
    y = np.linalg.solve(matrix, right + weight * data['t'])
    return weight * data['rho'] * x - data['B'].T @ y

  errors = []
  for penalty in (10.0, 100.0):
    w = 1 / penalty
    expected = (
      (envelope(w) - envelope(-w)) / (2 * w)
      if central
      else (envelope(w) - envelope(0.0)) / w
    )
    estimator = bilevel.f2sa(
      problem.upper, problem.lower, optax.sgd(0.3), penalty, central=central
    )
    state, estimates = run(estimator, x, np.zeros(4), 400)
    np.testing.assert_allclose(estimates.grads[-1], expected, atol=1e-10)
    assert state.info.lower_grad_norm < 1e-11
    errors.append(np.max(np.abs(expected - problem.hypergradient)))
  order = np.log10(errors[0] / errors[1])
  assert abs(order - (2 if central else 1)) < 0.2


@pytest.mark.parametrize('name', bilevel_problems.NAMES)
def test_central_differences_near_every_golden_hypergradient(x64, name):
  problem = bilevel_problems.load(name)
  estimator = bilevel.f2sa(
    problem.upper, problem.lower, optax.sgd(0.3), 1e4, central=True
  )
  _, estimates = run(estimator, problem.x, problem.inner, 1500)
  np.testing.assert_allclose(
    estimates.grads[-1], problem.hypergradient, atol=1e-6
  )


def test_takes_kernels_without_second_derivatives():
  @jax.custom_vjp
  def kernel(y):
    return jnp.sum(y**2)

  def backward(y, g):
    # As a kernel that is not differentiable again.
    return (2 * g * jax.lax.stop_gradient(y),)

  kernel.defvjp(lambda y: (jnp.sum(y**2), y), backward)
  lower = lambda x, y, batch: kernel(y - jnp.sin(x))
  upper = lambda x, y, batch: jnp.sum(jnp.exp(y))
  x = jnp.array([0.3, -0.4])
  estimator = bilevel.f2sa(upper, lower, optax.sgd(0.4), 100.0, central=True)
  _, estimates = run(estimator, x, jnp.zeros(2), 50)
  expected = jax.grad(lambda x: jnp.sum(jnp.exp(jnp.sin(x))))(x)
  np.testing.assert_allclose(estimates.grads[-1], expected, rtol=2e-3)


def test_a_projecting_optimizer_is_right(x64):
  problem = bilevel_problems.load('quadratic_single')
  optimizer = optax.chain(optax.sgd(0.3), optax.keep_params_nonnegative())

  @jax.jit
  def value(x):
    def step(_, carry):
      y, state = carry
      grad = jax.grad(problem.lower, 1)(x, y, None)
      updates, state = optimizer.update(grad, state, y)
      return optax.apply_updates(y, updates), state

    start = jnp.zeros(4), optimizer.init(jnp.zeros(4))
    return problem.upper(x, jax.lax.fori_loop(0, 2000, step, start)[0], None)

  expected = [
    (value(problem.x + e) - value(problem.x - e)) / 2e-6
    for e in 1e-6 * np.eye(3)
  ]
  for central, atol in ((False, 1e-3), (True, 1e-6)):
    estimator = bilevel.f2sa(
      problem.upper, problem.lower, optimizer, 1e4, central=central
    )
    _, estimates = run(estimator, problem.x, np.zeros(4), 500)
    np.testing.assert_allclose(estimates.grads[-1], expected, atol=atol)


def test_takes_less_memory_than_soba():
  """A network of three layers with 10^6 parameters below."""
  width = 512
  data = jnp.ones((32, width))

  def lower(x, y, batch):
    h = data * x
    for w in y:
      h = jnp.tanh(h @ w)
    return jnp.mean(h**2)

  upper = lambda x, y, batch: jnp.mean(lower(jnp.ones(width), y, batch))
  x, y = jnp.ones(width), [jnp.ones((width, width))] * 4
  batch = optlab.BilevelBatch(None, None)

  def temporary(estimator):
    state = jax.eval_shape(estimator.init, x, y)
    compiled = (
      jax.jit(estimator.estimate, donate_argnums=1)
      .lower(x, state, batch)
      .compile()
    )
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes

  first = bilevel.f2sa(upper, lower, optax.sgd(0.1), 10.0, lower_steps=1)
  assert temporary(first) < temporary(optlab.soba(
    upper, lower, optax.sgd(0.1), 0.1
  ))  # fmt: skip


def test_a_step_takes_three_gradients_a_lower_step():
  calls = {'upper': 0, 'lower': 0}

  def counted(name, f):
    def called(x, y, batch):
      def count(_):
        calls[name] += 1

      jax.debug.callback(count, jnp.sum(y))
      return f(x, y, batch)

    return called

  f = lambda x, y, batch: jnp.sum((y - x) ** 2)
  for central in (False, True):
    estimator = bilevel.f2sa(
      counted('upper', f), counted('lower', f), optax.sgd(0.1), 10.0,
      lower_steps=7, central=central,
    )  # fmt: skip
    x = jnp.ones(2)
    state = estimator.init(x, x)
    calls.update(upper=0, lower=0)
    batch = optlab.BilevelBatch(None, None)
    jax.block_until_ready(jax.jit(estimator.estimate)(x, state, batch))
    jax.effects_barrier()
    assert calls['lower'] == 2 * 7 + 2
    # Without central differences, the last is a value alone.
    assert calls['upper'] == (2 * 7 + 2 if central else 7 + 2)


def test_a_step_that_is_not_finite_is_held():
  lower = lambda x, y, batch: jnp.sum((y - x - batch) ** 2)
  estimator = bilevel.f2sa(lower, lower, optax.adam(0.1), 10.0, lower_steps=1)
  x = jnp.ones(2)
  estimate = jax.jit(estimator.estimate)
  good, bad = jnp.ones(2), jnp.array([1.0, jnp.nan])
  batch = functools.partial(optlab.BilevelBatch, good)
  _, state = estimate(x, estimator.init(x, x), batch(good, good[None]))
  for spoiled in (batch(bad, good[None]), batch(good, bad[None])):
    result, after = estimate(x, state, spoiled)
    assert after.info.rejected and not np.any(result.grads)
    for a, b in zip(
      jax.tree.leaves(after._replace(info=state.info)),
      jax.tree.leaves(state),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)


def test_a_penalty_too_small_or_a_level_that_lags_is_told():
  """The shift runs away, f bends it by half, or y hardly moves."""
  upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
  lower = lambda x, y, batch: jnp.sum((y - 2.0 * x) ** 2)
  tx, x, y = optax.sgd(0.05), jnp.array([0.1]), jnp.array([0.5])

  def train(central, rate, penalty):
    estimator = bilevel.f2sa(
      upper, lower, optax.sgd(rate), penalty, central=central
    )
    step = optlab.train_step(estimator, tx)
    body = lambda state, _: step(state, optlab.BilevelBatch(None, None))
    state = optlab.init(x, estimator, tx, y)
    state, _ = jax.lax.scan(body, state, length=300)
    return state.params, state.estimator_state.info

  rates = np.float32([0.1, 0.1, 0.1, 1e-5, 0.1])
  penalties = np.float32([1e-4, 1e-2, 1.0, 30.0, 30.0])
  for central in (False, True):
    run_all = jax.jit(jax.vmap(functools.partial(train, central)))
    params, info = run_all(rates, penalties)
    bad = info.total_not_ok + info.total_rejected
    assert np.all(bad[:4] >= 90) and np.all(info.total_not_ok[:4] > 0)
    # Of 300; where f_y passes through zero nothing is known of its change.
    assert info.ok[4] and bad[4] <= 2
    np.testing.assert_allclose(params[4], 0.5, atol=1e-5)


def test_x_that_moves_too_fast_is_told():
  """The two swing ever farther; noise alone is no fault."""
  curvature = jnp.array([1.0, 0.3])
  upper = lambda x, y, noise: 0.5 * jnp.sum((y - 2.0 - noise) ** 2)
  lower = lambda x, y, noise: 0.5 * jnp.sum(curvature * (y - x - noise) ** 2)
  estimator = bilevel.f2sa(upper, lower, optax.sgd(0.05), 10.0)

  def train(rate, size):
    tx = optax.sgd(rate)
    step = optlab.train_step(estimator, tx)

    def body(state, key):
      noise = size * jax.random.normal(key, (7, 2))
      return step(state, optlab.BilevelBatch(noise[0], noise[1], noise[2:]))

    state = optlab.init(jnp.zeros(2), estimator, tx, jnp.zeros(2))
    keys = jax.random.split(jax.random.key(0), 1500)
    state, _ = jax.lax.scan(body, state, keys)
    return state.params, state.estimator_state.info

  rates, sizes = jnp.array([0.3, 0.03, 0.03]), jnp.array([0.0, 0.0, 0.3])
  params, info = jax.jit(jax.vmap(train))(rates, sizes)
  assert not info.ok[0] and info.total_not_ok[0] > 700
  assert info.lower_lag[0] > 10.0
  np.testing.assert_array_equal(info.total_not_ok[1:], 0)
  np.testing.assert_allclose(params[1:], 2.0, atol=0.2)


def test_a_shift_lost_in_the_rounding_of_a_large_y_is_told():
  """In float32 too; a shift that is short at the end is no fault."""
  upper = lambda x, y, size: jnp.sum((y / size - 1.0) ** 2)
  lower = lambda x, y, size: 0.5 * jnp.sum((y - size * x) ** 2)
  estimator = bilevel.f2sa(
    upper, lower, optax.sgd(0.3), 50.0, reuse_sample=True
  )
  tx = optax.sgd(0.1)
  step = optlab.train_step(estimator, tx)

  @jax.jit
  @jax.vmap
  def last(size):
    state = optlab.init(jnp.full(2, 0.3), estimator, tx, size * jnp.ones(2))
    advance = lambda s, _: step(s, optlab.BilevelBatch(size, size))
    return jax.lax.scan(advance, state, length=300)[0]

  end = last(np.float32([1e8, 1.0]))
  assert not end.estimator_state.info.ok[0]
  assert end.estimator_state.info.total_not_ok[1] == 0
  np.testing.assert_allclose(end.params[1], 1.0, atol=1e-3)


def test_a_shift_lost_in_rounding_is_told():
  """In bfloat16 both lower variables end alike, and the gradient is zero."""
  upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
  lower = lambda x, y, batch: jnp.sum((y - x) ** 2)
  x = jnp.full(2, 3.0)
  for dtype, penalty, fine in (
    (jnp.bfloat16, 300.0, False),
    (jnp.float16, 300.0, False),
    (jnp.float16, 10.0, True),
    (jnp.float32, 300.0, True),
  ):
    estimator = bilevel.f2sa(upper, lower, optax.sgd(0.2), penalty)
    start = jnp.zeros(2, dtype)
    state, estimates = run(estimator, x.astype(dtype), start, 20)
    assert state.info.ok == fine, dtype
    if fine:
      np.testing.assert_allclose(estimates.grads[-1], 4.0, rtol=0.1)
