"""The hypergradient estimators against closed forms and dense algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from tests.bilevel import bilevel_problems

NOTHING = optlab.BilevelBatch(None, None)
RATE = 0.3


def repeat(estimator, x, *inner, steps, batch=NOTHING):
  """The last of so many estimates at one x, and the state."""

  @jax.jit
  def run(x, *inner):
    def body(state, _):
      estimate, state = estimator.estimate(x, state, batch)
      return state, estimate

    return jax.lax.scan(body, estimator.init(x, *inner), length=steps)

  state, estimates = run(x, *inner)
  return jax.tree.map(lambda leaf: np.asarray(leaf)[-1], estimates), state


def saba(upper, lower, optimizer, dual_lr):
  """SABA on a sum of one block."""
  estimator = optlab.saba(
    upper, lower, optimizer, dual_lr, upper_blocks=1, lower_blocks=1
  )

  def estimate(params, state, batch):
    del batch
    block = optlab.bilevel.IndexedBatch(jnp.int32(0), None)
    return estimator.estimate(params, state, optlab.BilevelBatch(block, block))

  return optlab.GradientEstimator(estimator.init, estimate)


EXACT = {
  'bo_rep': functools.partial(optlab.bo_rep, dual_lr=RATE),
  'bo_rep_last': functools.partial(
    optlab.bo_rep, dual_lr=RATE, average=False, fresh_dual=True, period=3,
    radius=10.0, dual_radius=100.0,
  ),
  'soba': functools.partial(optlab.soba, dual_lr=RATE),
  'saba': functools.partial(saba, dual_lr=RATE),
  'implicit': functools.partial(optlab.implicit, rtol=1e-14),
}  # fmt: skip


@pytest.mark.parametrize(
  ('name', 'method'),
  [
    (name, method)
    for name in bilevel_problems.NAMES
    for method in EXACT
    if method != 'bo_rep_last' or name == 'quadratic_single'
  ],
)
def test_converges_to_the_golden_hypergradient(x64, name, method):
  problem = bilevel_problems.load(name)
  estimator = EXACT[method](problem.upper, problem.lower, optax.sgd(RATE))
  start = np.zeros_like(problem.inner)
  estimate, state = repeat(estimator, problem.x, start, steps=1500)
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)
  close(state.inner, problem.inner)
  close(state.dual, problem.dual)
  close(estimate.value, problem.value)
  close(estimate.grads, problem.hypergradient)
  assert state.info.lower_grad_norm < 1e-10
  assert state.info.dual_residual < 1e-10
  assert state.info.total_rejected == 0


def truncated(problem, rate, terms):
  """The hypergradient with ``terms`` of the Neumann series, densely."""
  x, y = problem.x, problem.inner

  @jax.jit
  def derivatives(x, y):
    lower_gradient = jax.grad(problem.lower, argnums=1)
    cross, hessian = jax.jacobian(lower_gradient, argnums=(0, 1))(x, y, None)
    return hessian, cross, jax.grad(problem.upper, argnums=(0, 1))(x, y, None)

  hessian, cross, (grad_x, grad_y) = jax.device_get(derivatives(x, y))
  contraction = np.eye(len(y)) - rate * hessian
  powers = [np.linalg.matrix_power(contraction, q) for q in range(terms)]
  z = rate * sum(powers) @ grad_y
  return grad_x - cross.T @ z, (grad_x, grad_y, cross, powers)


@pytest.mark.parametrize(
  ('name', 'terms'),
  [('quadratic_single', 1), *((name, 4) for name in bilevel_problems.NAMES)],
)
def test_stocbio_and_unrolled_have_their_stated_bias(x64, name, terms):
  problem = bilevel_problems.load(name)
  expected = truncated(problem, RATE, terms)[0]
  assert np.max(np.abs(expected - problem.hypergradient)) > 1e-4
  stocbio = optlab.stocbio(
    problem.upper, problem.lower, optax.sgd(RATE), RATE, neumann_steps=terms
  )
  unrolled = optlab.unrolled(
    problem.upper, problem.lower, optax.sgd(RATE), lower_steps=terms
  )
  for estimator in (stocbio, unrolled):
    estimate, state = repeat(estimator, problem.x, problem.inner, steps=500)
    np.testing.assert_allclose(estimate.grads, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(state.inner, problem.inner, rtol=0, atol=1e-10)


def test_bias_vanishes_with_the_number_of_terms(x64):
  problem = bilevel_problems.load('quadratic_single')
  errors = []
  for terms in (10, 200):
    estimator = optlab.stocbio(
      problem.upper, problem.lower, optax.sgd(RATE), RATE, neumann_steps=terms
    )
    estimate, state = repeat(estimator, problem.x, problem.inner, steps=1)
    errors.append(np.max(np.abs(estimate.grads - problem.hypergradient)))
  assert errors[1] < 1e-10 < errors[0]
  assert state.info.dual_residual < 1e-10


def test_ttsa_draws_each_power_and_is_stocbio_in_expectation(x64):
  problem = bilevel_problems.load('quadratic_single')
  terms = 4
  expected, (grad_x, grad_y, cross, powers) = truncated(problem, RATE, terms)
  estimator = optlab.bilevel.ttsa(
    problem.upper, problem.lower, optax.sgd(RATE), RATE, neumann_steps=terms
  )

  @jax.jit
  def run(key):
    state = estimator.init(problem.x, problem.inner, key)

    def body(state, _):
      estimate, state = estimator.estimate(problem.x, state, NOTHING)
      return state, (estimate.grads, state.memory.power)

    return jax.lax.scan(body, state, length=200)[1]

  grads, drawn = jax.device_get(run(jax.random.key(1)))
  by_power = {int(p): g for p, g in zip(drawn, grads, strict=True)}
  assert sorted(by_power) == list(range(terms))
  assert np.all(np.bincount(drawn) > 25)  # Uniform: 50 each, 4 sigma.
  for power, grad in by_power.items():
    term = grad_x - cross.T @ (terms * RATE * powers[power] @ grad_y)
    np.testing.assert_allclose(grad, term, rtol=0, atol=1e-10)
  mean = sum(by_power.values()) / terms
  np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-10)


def test_implicit_is_exact_on_trees_and_a_nonquadratic_lower_level(x64):
  key = jax.random.key(0)
  weights = jax.random.normal(key, (5, 6))

  def lower(x, y, batch):
    scores = weights @ (y['a'] + jnp.outer(x['s'], batch).ravel())
    curve = jnp.sum(jax.nn.softplus(scores)) + 0.2 * jnp.sum(y['a'] ** 2)
    return curve + jnp.cosh(y['b'] - x['t'] * jnp.sum(x['s']))

  def upper(x, y, batch):
    return jnp.sum(jnp.sin(y['a']) * batch) + y['b'] ** 3 + x['t'] ** 2

  x = {'s': jnp.array([0.3, -0.7]), 't': jnp.asarray(0.5)}
  y = {'a': jnp.zeros(6), 'b': jnp.asarray(0.0)}
  zeta, xi = jnp.array([1.0, 2.0, -1.0]), jnp.linspace(-1.0, 1.0, 6)
  batch = optlab.BilevelBatch(xi, zeta, jnp.stack([zeta] * 5))
  estimator = optlab.implicit(upper, lower, optax.sgd(0.1), rtol=1e-14)
  estimate, state = repeat(estimator, x, y, steps=400, batch=batch)

  # The same by dense algebra on flat vectors, at the solution that it found.
  @jax.jit
  def dense(x, y):
    flat_x, to_x = jax.flatten_util.ravel_pytree(x)
    flat_y, to_y = jax.flatten_util.ravel_pytree(y)
    g = lambda x, y: lower(to_x(x), to_y(y), zeta)
    f = lambda x, y: upper(to_x(x), to_y(y), xi)
    gradient = jax.grad(g, 1)
    cross, hessian = jax.jacobian(gradient, (0, 1))(flat_x, flat_y)
    grad_x, grad_y = jax.grad(f, (0, 1))(flat_x, flat_y)
    dual = jnp.linalg.solve(hessian, grad_y)
    return gradient(flat_x, flat_y), to_x(grad_x - cross.T @ dual)

  gradient, expected = dense(x, state.inner)
  assert np.max(np.abs(gradient)) < 1e-12
  for name in x:
    np.testing.assert_allclose(
      estimate.grads[name], expected[name], rtol=0, atol=1e-10
    )


def test_unrolled_is_the_gradient_of_a_plain_loop(x64):
  problem = bilevel_problems.load('weighted_least_squares_cleaning')
  optimizer = optax.adam(0.1)
  samples = jnp.linspace(0.5, 1.5, 3)
  batch = optlab.BilevelBatch(None, None, samples)
  lower = lambda x, y, scale: scale * problem.lower(x, y, None)

  def loop(x, y, opt_state):
    for scale in samples:
      grads = jax.grad(lower, argnums=1)(x, y, scale)
      updates, opt_state = optimizer.update(grads, opt_state)
      y = optax.apply_updates(y, updates)
    return problem.upper(x, y, None), (y, opt_state)

  y = jnp.ones(4)
  reference = jax.jit(jax.value_and_grad(loop, has_aux=True))
  first, grads = reference(problem.x, y, optimizer.init(y))
  second, warm_grads = reference(problem.x, *first[1])
  for warm, expected in ((True, warm_grads), (False, grads)):
    estimator = optlab.unrolled(
      problem.upper, lower, optimizer, lower_steps=3, warm=warm,
      checkpoint=warm,
    )  # fmt: skip
    estimate, state = repeat(estimator, problem.x, y, steps=2, batch=batch)
    np.testing.assert_allclose(estimate.grads, expected, rtol=0, atol=1e-12)
    end = (second if warm else first)[1][0]
    np.testing.assert_allclose(state.inner, end, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(state.memory, () if warm else y)


def test_unrolled_from_the_upper_variable_is_maml(x64):
  problem = bilevel_problems.load('quadratic_single')
  target = jnp.arange(4.0)
  lower = lambda x, y, batch: jnp.sum((y - target) ** 2 * jnp.arange(1, 5))
  upper = lambda x, y, batch: problem.upper(jnp.zeros(3), y, None)
  estimator = optlab.unrolled(
    upper, lower, optax.sgd(0.1), lower_steps=2, warm=False,
    start=lambda x, y: x,
  )  # fmt: skip
  x = jnp.ones(4)
  estimate, state = estimator.estimate(x, estimator.init(x, x), NOTHING)
  shrink = (1 - 0.2 * np.arange(1, 5)) ** 2
  end = target + shrink * (x - target)
  np.testing.assert_allclose(state.inner, end, rtol=0, atol=1e-14)
  expected = shrink * jax.grad(upper, argnums=1)(x, end, None)
  np.testing.assert_allclose(estimate.grads, expected, rtol=0, atol=1e-13)


def test_checkpoint_keeps_the_memory_of_a_long_unroll_down():
  weights = jnp.ones((64, 64))

  def lower(x, y, batch):
    hidden = x
    for _ in range(8):
      hidden = jnp.tanh(weights * (hidden + batch))
    return jnp.mean(hidden * y) + jnp.sum(y**2)

  upper = lambda x, y, batch: jnp.sum(y**2)
  x, y = jnp.ones((64, 64)), jnp.zeros(())
  batch = optlab.BilevelBatch(None, None, jnp.ones(32))

  def temporary(checkpoint):
    estimator = optlab.unrolled(
      upper, lower, optax.sgd(0.1), lower_steps=32, checkpoint=checkpoint
    )
    state = estimator.init(x, y)
    compiled = jax.jit(estimator.estimate).lower(x, state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(True) < temporary(False) / 4


def finite_sum(blocks, key, dimension=4):
  """Quadratics that differ by block; data of shape ``(blocks, ...)``."""
  keys = jax.random.split(key, 3)
  shifts = jax.random.normal(keys[0], (blocks, dimension))
  targets = jax.random.normal(keys[1], (blocks, dimension))
  scales = jax.random.uniform(keys[2], (blocks, dimension), minval=0.5)

  def lower(x, y, data):
    shift, _, scale = data
    return 0.5 * jnp.sum(scale * (y - x - shift) ** 2)

  def upper(x, y, data):
    _, target, _ = data
    return 0.5 * jnp.sum((y - target) ** 2) + 0.1 * x @ x

  return upper, lower, (shifts, targets, scales)


def indexed(data, index):
  block = optlab.bilevel.IndexedBatch(
    index, jax.tree.map(lambda a: a[index], data)
  )
  return optlab.BilevelBatch(block, block)


def test_saba_is_unbiased_from_any_memory(x64):
  blocks = 5
  upper, lower, data = finite_sum(blocks, jax.random.key(0))
  estimator = optlab.saba(
    upper, lower, optax.sgd(0.1), 0.1, upper_blocks=blocks, lower_blocks=blocks
  )
  estimate = jax.jit(estimator.estimate)
  x = jnp.ones(4)
  state = estimator.init(x, jnp.zeros(4))
  for index in (3, 1, 1, 4):
    _, state = estimate(x, state, indexed(data, jnp.int32(index)))
    x = x - 0.1
  memory = state.memory.lower
  for table, mean in zip(memory.table, memory.mean, strict=True):
    np.testing.assert_allclose(table.mean(0), mean, rtol=0, atol=1e-14)
    assert np.all(table[0] == 0) and np.any(table[1] != 0)

  estimates, nexts = zip(
    *(estimate(x, state, indexed(data, jnp.int32(i))) for i in range(blocks)),
    strict=True,
  )
  whole = optlab.soba(
    lambda x, y, data: jnp.mean(jax.vmap(upper, (None, None, 0))(x, y, data)),
    lambda x, y, data: jnp.mean(jax.vmap(lower, (None, None, 0))(x, y, data)),
    optax.sgd(0.1),
    0.1,
  )
  whole_state = whole.init(x, state.inner)._replace(
    dual=state.dual, dual_state=state.dual_state
  )
  batch = optlab.BilevelBatch(data, data)
  expected, expected_next = jax.jit(whole.estimate)(x, whole_state, batch)
  for actual, exact in (
    ([e.grads for e in estimates], expected.grads),
    ([s.inner for s in nexts], expected_next.inner),
    ([s.dual for s in nexts], expected_next.dual),
  ):
    np.testing.assert_allclose(sum(actual) / blocks, exact, rtol=0, atol=1e-13)


def test_saba_converges_at_a_constant_rate_where_soba_stays_noisy(x64):
  blocks = 5
  upper, lower, data = finite_sum(blocks, jax.random.key(0))
  tx = optax.sgd(0.03)

  def final(estimator, indices):
    state = optlab.init(jnp.ones(4), estimator, tx, jnp.zeros(4))
    step = optlab.train_step(estimator, tx)

    def body(state, index):
      batch = indexed(data, index)
      if not saga:
        batch = optlab.BilevelBatch(batch.upper.data, batch.lower.data)
      return step(state, batch)

    return jax.jit(lambda s: jax.lax.scan(body, s, indices)[0])(state).params

  # Weighted means in closed form.
  shifts, targets, scales = data
  shift = jnp.sum(scales * shifts, 0) / jnp.sum(scales, 0)
  solution = (targets.mean(0) - shift) / 1.2
  indices = jax.random.randint(jax.random.key(1), (6000,), 0, blocks)
  errors = []
  for saga in (True, False):
    make = (
      functools.partial(optlab.saba, upper_blocks=blocks, lower_blocks=blocks)
      if saga
      else optlab.soba
    )
    estimator = make(upper, lower, optax.sgd(0.1), 0.1)
    errors.append(jnp.max(jnp.abs(final(estimator, indices) - solution)))
  assert errors[0] < 1e-9
  assert errors[1] > 1e-3


def test_srba_follows_its_recursion_and_converges_at_a_constant_rate(x64):
  blocks, rate = 5, 0.1
  upper, lower, data = finite_sum(blocks, jax.random.key(0))
  mean = lambda f: (
    lambda x, y, data: jnp.mean(jax.vmap(f, (None, None, 0))(x, y, data))
  )
  full = optlab.BilevelBatch(data, data)
  estimator = optlab.bilevel.srba(
    mean(upper), mean(lower), optax.sgd(rate), rate, full, period=4
  )
  tx = optax.sgd(0.03)

  def sampled(index):
    one = jax.tree.map(lambda leaf: leaf[index][None], data)
    return optlab.BilevelBatch(one, one)

  # By its equations, with dense derivatives.
  def directions(x, y, z, data):
    f, g = mean(upper), mean(lower)
    grad_x, grad_y = jax.grad(f, (0, 1))(x, y, data)
    cross, hessian = jax.jacobian(jax.grad(g, 1), (0, 1))(x, y, data)
    return (
      grad_x - cross.T @ z, jax.grad(g, 1)(x, y, data), hessian @ z - grad_y,
    )  # fmt: skip

  step = jax.jit(optlab.train_step(estimator, tx))
  state = optlab.init(jnp.ones(4), estimator, tx, jnp.zeros(4))
  before = point = (jnp.ones(4), jnp.zeros(4), jnp.zeros(4))
  v = None
  for t, index in enumerate((0, 3, 1, 4, 2, 2, 0, 1, 3)):
    state, _ = step(state, sampled(index))
    if t % 4 == 0:
      v = directions(*point, data)
    else:
      fresh = directions(*point, sampled(index).upper)
      old = directions(*before, sampled(index).upper)
      v = jax.tree.map(lambda v, a, b: v + a - b, v, fresh, old)
    before = point
    rates = 0.03, rate, rate
    point = tuple(u - r * d for u, r, d in zip(point, rates, v, strict=True))
    np.testing.assert_allclose(state.params, point[0], atol=1e-13)
    np.testing.assert_allclose(state.estimator_state.dual, point[2], atol=1e-13)

  shifts, targets, scales = data
  shift = jnp.sum(scales * shifts, 0) / jnp.sum(scales, 0)
  indices = jax.random.randint(jax.random.key(1), (4000,), 0, blocks)
  end = jax.jit(
    lambda s: jax.lax.scan(lambda s, i: step(s, sampled(i)), s, indices)[0]
  )(state)
  solution = (targets.mean(0) - shift) / 1.2
  np.testing.assert_allclose(end.params, solution, atol=1e-9)
  assert end.estimator_state.info.total_not_ok == 0


def test_saba_holds_its_memory_where_a_block_is_not_finite(x64):
  upper, lower, data = finite_sum(3, jax.random.key(0))
  estimator = optlab.saba(
    upper, lower, optax.sgd(0.1), 0.1, upper_blocks=3, lower_blocks=3
  )
  estimate = jax.jit(estimator.estimate)
  x = jnp.ones(4)
  _, state = estimate(
    x, estimator.init(x, jnp.zeros(4)), indexed(data, jnp.int32(1))
  )
  poisoned = jax.tree.map(lambda leaf: leaf.at[1, 0].set(jnp.nan), data)
  result, after = estimate(x, state, indexed(poisoned, jnp.int32(1)))
  assert after.info.rejected and after.info.total_rejected == 1
  assert np.all(result.grads == 0)
  expected = state._replace(info=after.info)
  for a, b in zip(
    jax.tree.leaves(after), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'make',
  [
    optlab.soba,
    optlab.stocbio,
    optlab.implicit,
    optlab.unrolled,
    optlab.bilevel.ttsa,
  ],
)
def test_a_step_that_is_not_finite_is_held_and_counted(make):
  lower = lambda x, y, batch: jnp.sum((y - x - batch) ** 2)
  upper = lambda x, y, batch: jnp.sum(y**2)
  rate = () if make in (optlab.implicit, optlab.unrolled) else (0.1,)
  steps = (
    {} if make in (optlab.soba, optlab.bilevel.ttsa) else {'lower_steps': 1}
  )
  estimator = make(upper, lower, optax.adam(0.1), *rate, **steps)
  key = (jax.random.key(0),) if make is optlab.bilevel.ttsa else ()
  x = jnp.ones(2)
  estimate = jax.jit(estimator.estimate)
  state = estimator.init(x, jnp.zeros(2), *key)
  good, bad = jnp.ones(2), jnp.array([1.0, jnp.nan])
  _, state = estimate(x, state, optlab.BilevelBatch(good, good, good[None]))
  result, held = estimate(x, state, optlab.BilevelBatch(bad, bad, bad[None]))
  assert held.info.total_rejected == 1 and held.step == 1
  np.testing.assert_array_equal(result.grads, jnp.zeros(2))
  for a, b in zip(
    jax.tree.leaves(held._replace(info=state.info)),
    jax.tree.leaves(state),
    strict=True,
  ):
    assert jnp.all(a == b)


def test_storm_without_noise_is_the_estimator_and_follows_its_recursion(x64):
  problem = bilevel_problems.load('quadratic_single')
  lower = lambda x, y, noise: problem.lower(x, y, None) + noise @ y
  plain = optlab.soba(problem.upper, lower, optax.sgd(RATE), RATE)
  tx = optax.sgd(0.01)

  def run(estimator, noises):
    state = optlab.init(problem.x, estimator, tx, problem.inner)
    step = optlab.train_step(estimator, tx)

    def body(state, noise):
      new, _ = step(state, optlab.BilevelBatch(None, noise))
      return new, state.params

    return jax.lax.scan(body, state, noises)[1]

  silent = jnp.zeros((6, 4))
  noisy = jax.random.normal(jax.random.key(0), (6, 4))
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
  storm = jax.jit(
    lambda beta, noises: run(optlab.with_storm(plain, beta), noises)
  )
  soba = jax.jit(functools.partial(run, plain))
  close(storm(0.2, silent), soba(silent))
  close(storm(1.0, noisy), soba(noisy))

  # By hand: the estimator is called at two points with one sample.
  estimate = jax.jit(plain.estimate)
  x, state = problem.x, plain.init(problem.x, problem.inner)
  before, tracker, path = None, None, []
  for noise in noisy:
    batch = optlab.BilevelBatch(None, noise)
    now, new = estimate(x, state, batch)
    if before is None:
      tracker = now.grads
    else:
      tracker = now.grads + 0.8 * (tracker - estimate(*before, batch)[0].grads)
    before = (x, state)
    path.append(x)
    x, state = x - 0.01 * tracker, new
  close(storm(0.2, noisy), jnp.stack(path))
