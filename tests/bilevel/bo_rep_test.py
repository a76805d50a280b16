"""BO-REP against its equations in NumPy, and what makes it BO-REP."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from tests.bilevel import bilevel_problems

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-11)
BETA, RATE, LINEAR, LOWER = 0.8, 0.05, 0.2, 0.3
PERIOD, LOWER_STEPS, STEPS = 3, 4, 8
RADIUS, Z_RADIUS = 0.5, 1.5
FIRST_STEPS, EPOCHS = 2, 3


def noisy_quadratic():
  """The golden quadratic with additive noise in both lower derivatives."""
  problem = bilevel_problems.load('quadratic_single')

  def lower(x, y, noise):
    return problem.lower(x, y, None) + noise @ y + (x @ y[:3]) * noise[0]

  def upper(x, y, noise):
    return problem.upper(x, y, None) + noise @ y

  return problem.x, upper, lower


def samples(seed=0):
  random = np.random.RandomState(seed)
  return (
    optlab.BilevelBatch(
      upper=random.randn(STEPS, 4),
      lower=random.randn(STEPS, 4),
      step_samples=random.randn(STEPS, LOWER_STEPS, 4),
    ),
    random.randn(FIRST_STEPS * (2**EPOCHS - 1), 4),
  )


def ball(point, centre, radius):
  distance = np.linalg.norm(point - centre)
  if radius is None or distance <= radius:
    return point
  return centre + radius / distance * (point - centre)


def numpy_refine(grad, y, noises, radius=RADIUS):
  """Epoch-SGD from its definition."""
  start = 0
  for k in range(EPOCHS):
    centre, total = y, np.zeros_like(y)
    for noise in noises[start : start + FIRST_STEPS * 2**k]:
      y = ball(y - LOWER / 2**k * grad(y, noise), centre, radius / 2 ** (k / 2))
      total += y
    y = total / (FIRST_STEPS * 2**k)
    start += FIRST_STEPS * 2**k
  return y


def numpy_bo_rep(*, period=PERIOD, refined=True, normalized=True):
  """The algorithm from its equations, with derivatives by hand.

  Returns:
    The path of x.
  """
  data = bilevel_problems.read('quadratic_single')
  matrix, cross, rho = data['A'], data['B'], data['rho']
  batch, first = samples()
  x, y = data['x'], np.zeros(4)
  embed = np.eye(4, 3)

  def g_y(x, y, noise):
    return matrix @ y - cross @ x - data['c'] + noise + noise[0] * embed @ x

  if refined:
    y = numpy_refine(lambda y, noise: g_y(x, y, noise), y, first)
  z, m, path = np.zeros(4), np.zeros(3), []
  for t in range(STEPS):
    if t > 0 and t % period == 0:
      centre, total = y, 0
      for noise in batch.step_samples[t]:
        y = ball(y - LOWER * g_y(x, y, noise), centre, RADIUS)
        total = total + y
      y = total / LOWER_STEPS
    zeta = batch.lower[t]
    f_y = y - data['t'] + batch.upper[t]
    g_xy = (-cross + zeta[0] * embed).T
    estimate = rho * x - g_xy @ z
    z = ball(z - LINEAR * (matrix @ z - f_y), 0, Z_RADIUS)
    m = BETA * m + (1 - BETA) * estimate
    x = x - RATE * (m / np.linalg.norm(m) if normalized else m)
    path.append(x)
  return np.stack(path)


def ours(period=PERIOD):
  """The path of x by the library, refined and normalized."""
  x, upper, lower = noisy_quadratic()
  batch, first = samples()
  estimator = optlab.bo_rep(
    upper, lower, optax.sgd(LOWER), LINEAR, period=period,
    lower_steps=LOWER_STEPS, radius=RADIUS, dual_radius=Z_RADIUS,
  )  # fmt: skip
  tx = optlab.normalized_momentum(RATE, BETA)

  @jax.jit
  def run(x, batch, first):
    y = optlab.bilevel.refine(
      lower, x, jnp.zeros(4), first, learning_rate=LOWER,
      first_steps=FIRST_STEPS, epochs=EPOCHS, radius=RADIUS,
    )  # fmt: skip
    state = optlab.init(x, estimator, tx, y)
    step = optlab.train_step(estimator, tx)

    def body(state, batch):
      state, _ = step(state, batch)
      return state, (state.params, state.estimator_state)

    return y, jax.lax.scan(body, state, batch)[1]

  return run(x, batch, first)


def test_follows_its_equations_and_needs_all_three_parts(x64):
  _, (path, states) = ours()
  close(path, numpy_bo_rep())
  assert np.all(states.info.total_rejected == 0)
  for without in (
    {'period': 1},
    {'period': PERIOD + 1},
    {'refined': False},
    {'normalized': False},
  ):
    assert np.max(np.abs(path - numpy_bo_rep(**without))) > 1e-3, without


def test_refinement_follows_its_equations_and_nears_the_solution(x64):
  x, _, _ = noisy_quadratic()
  problem = bilevel_problems.load('quadratic_single')
  data = bilevel_problems.read('quadratic_single')
  _, first = samples()
  options = {
    'learning_rate': LOWER, 'first_steps': FIRST_STEPS, 'epochs': EPOCHS,
  }  # fmt: skip
  lower = lambda x, y, noise: problem.lower(x, y, None) + noise @ y
  refined = jax.jit(
    lambda y, noise: optlab.bilevel.refine(
      lower, x, y, noise, radius=2.0, **options
    )
  )
  start = problem.inner + 1.0
  grad = lambda y, noise: data['A'] @ y - data['B'] @ x - data['c'] + noise
  close(refined(start, first), numpy_refine(grad, start, first, 2.0))
  quiet = np.linalg.norm(refined(start, 0 * first) - problem.inner)
  assert quiet < 0.25 * np.linalg.norm(start - problem.inner)
  poisoned = first.copy()
  poisoned[-1] = np.nan  # Only the last epoch sees it.
  two = optlab.bilevel.refine(
    lower, x, start, first[: FIRST_STEPS * 3], radius=2.0,
    **options | {'epochs': 2},
  )  # fmt: skip
  close(refined(start, poisoned), two)
  with pytest.raises(ValueError, match=r'leading axis of first_steps'):
    optlab.bilevel.refine(lower, x, start, first[1:], **options)


def test_leaves_the_lower_variable_alone_between_rounds(x64):
  y, (_, states) = ours()
  inner = np.concatenate([np.asarray(y)[None], states.inner])
  moved = np.any(inner[1:] != inner[:-1], axis=1)
  assert moved.tolist() == [t > 0 and t % PERIOD == 0 for t in range(STEPS)]
  lengths = np.linalg.norm(inner[1:] - inner[:-1], axis=1)
  assert np.max(lengths) <= RADIUS
  assert np.max(np.linalg.norm(states.dual, axis=1)) <= Z_RADIUS * (1 + 1e-14)
  assert np.all(np.asarray(states.info.lower_grad_norm) > 0)


def test_uses_the_linear_variable_before_its_update_unless_told(x64):
  x, upper, lower = noisy_quadratic()
  noise = np.ones(4)
  batch = optlab.BilevelBatch(noise, noise, np.ones((5, 4)))
  y = np.zeros(4)
  results = {}
  for fresh in (False, True):
    estimator = optlab.bo_rep(
      upper, lower, optax.sgd(LOWER), LINEAR, fresh_dual=fresh
    )
    results[fresh] = jax.jit(estimator.estimate)(x, estimator.init(x, y), batch)
  data = bilevel_problems.read('quadratic_single')
  f_y = y - data['t'] + noise
  g_xy = (-data['B'] + np.eye(4, 3)).T
  close(results[False][0].grads, data['rho'] * x)
  close(results[True][0].grads, data['rho'] * x - g_xy @ (LINEAR * f_y))
  close(results[True][1].info.dual_residual, np.linalg.norm(f_y))


def far_cosh(tx, steps=400):
  """Noise-free cosh problem, eight away in each coordinate: f is 1.5e3."""
  data = bilevel_problems.load('unbounded_cosh')
  estimator = optlab.bo_rep(data.upper, data.lower, optax.sgd(0.3), 0.3)
  x = np.linalg.solve(
    bilevel_problems.read('unbounded_cosh')['B'],
    np.array([8.0, -8.0, 8.0, 8.0]),
  )
  y = np.array([8.0, -8.0, 8.0, 8.0])

  @jax.jit
  def run():
    state = optlab.init(jnp.asarray(x), estimator, tx, jnp.asarray(y))
    step = optlab.train_step(estimator, tx)
    nothing = optlab.BilevelBatch(None, None)
    return jax.lax.scan(
      lambda state, _: step(state, nothing), state, length=steps
    )

  state, values = run()
  return values[0], values[-1], state


def test_normalization_carries_it_over_unbounded_smoothness(x64):
  decay = optax.cosine_decay_schedule(1.0, 400)
  scaled = lambda rate: lambda count: rate * decay(count)
  first, last, _ = far_cosh(optlab.normalized_momentum(scaled(0.3)))
  assert first > 1e3
  assert last < 1e-3
  momentum = optax.chain(
    optax.ema(0.9, debias=False), optax.scale_by_learning_rate(scaled(0.3))
  )
  _, last, _ = far_cosh(momentum)
  assert not last < first  # Diverges: at the same rate, NaN or larger.


def test_a_step_that_is_not_finite_is_held_and_counted(x64):
  x, upper, lower = noisy_quadratic()
  estimator = optlab.bo_rep(
    upper, lower, optax.adam(LOWER), LINEAR, period=1, lower_steps=2
  )
  tx = optlab.normalized_momentum(RATE)
  step = jax.jit(optlab.train_step(estimator, tx))
  state = optlab.init(x, estimator, tx, np.zeros(4))
  good = optlab.BilevelBatch(np.ones(4), np.ones(4), np.ones((2, 4)))
  for _ in range(2):
    state, _ = step(state, good)
  for count, field in enumerate(('upper', 'lower', 'step_samples'), 1):
    poisoned = getattr(good, field).copy()
    poisoned.flat[1 if field != 'step_samples' else 5] = np.inf
    state_before = state
    state, _ = step(state, good._replace(**{field: poisoned}))
    report = optlab.report(state)
    assert report['estimator_state/info/rejected']
    assert report['estimator_state/info/total_rejected'] == count
    inner = state.estimator_state._replace(
      info=state_before.estimator_state.info
    )
    held = state._replace(step=state_before.step, estimator_state=inner)
    for a, b in zip(
      jax.tree.leaves(held), jax.tree.leaves(state_before), strict=True
    ):
      np.testing.assert_array_equal(a, b, err_msg=field)
  state, value = step(state, good)
  assert np.isfinite(value) and not np.array_equal(state.params, held.params)


def test_projection_bounds_the_linear_variable_of_a_singular_problem(x64):
  lower = lambda x, y, batch: 0.5 * (y[0] - x[0]) ** 2  # Flat along y[1].
  upper = lambda x, y, batch: jnp.sum(y)
  norms, residuals = [], []
  for dual_radius in (None, 3.0):
    estimator = optlab.bo_rep(
      upper, lower, optax.sgd(0.1), 0.5, dual_radius=dual_radius
    )
    x, state = np.ones(1), estimator.init(np.ones(1), np.ones(2))

    def body(state, _, estimator=estimator, x=x):
      batch = optlab.BilevelBatch(None, None)
      return estimator.estimate(x, state, batch)[::-1]

    state, _ = jax.jit(lambda s, body=body: jax.lax.scan(body, s, length=100))(
      state
    )
    norms.append(np.linalg.norm(state.dual))
    residuals.append(float(state.info.dual_residual))
  assert norms[0] > 49  # 100 steps of 0.5 along the flat direction.
  close(norms[1], 3.0)
  assert min(residuals) >= 1.0


def test_takes_any_lower_optimizer_and_schedules(x64):
  problem = bilevel_problems.load('quadratic_single')
  for optimizer in (
    optax.adam(optax.exponential_decay(0.3, 50, 0.5)),
    optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(10)),
  ):
    estimator = optlab.bo_rep(
      problem.upper, problem.lower, optimizer,
      optax.constant_schedule(LINEAR), period=1, average=False,
    )  # fmt: skip

    @jax.jit
    def run(y, estimator=estimator):
      def body(now, _):
        batch = optlab.BilevelBatch(None, None)
        return estimator.estimate(problem.x, now, batch)[::-1]

      start = estimator.init(problem.x, y)
      return jax.lax.scan(body, start, length=150)[0]

    state = run(np.zeros(4))
    np.testing.assert_allclose(state.inner, problem.inner, rtol=0, atol=1e-6)
    np.testing.assert_allclose(state.dual, problem.dual, rtol=0, atol=1e-6)


def test_normalized_momentum_has_the_length_of_the_rate(x64):
  tx = optlab.normalized_momentum(lambda count: 0.5 - 0.1 * count, 0.9)
  update = jax.jit(tx.update)
  grads = [np.array([3.0, -4.0]), np.array([1e-3, 0.0]), np.array([0.0, 9.0])]
  for scale in (1.0, 1e-200, 1e200):
    state, mean = tx.init(np.zeros(2)), np.zeros(2)
    for i, grad in enumerate(grads):
      updates, state = update(scale * grad, state)
      mean = 0.9 * mean + 0.1 * grad
      close(updates, -(0.5 - 0.1 * i) * mean / np.linalg.norm(mean))
  tree = {'a': np.full(3, 2.0), 'b': {}, 'c': np.full((2, 3), -2.0)}
  updates, _ = optlab.normalized_momentum(0.6).update(
    tree, optlab.normalized_momentum(0.6).init(tree)
  )
  close(updates['a'], -0.2)  # Nine entries: each 1/3 of the length.
  close(updates['c'], 0.2)


@pytest.mark.parametrize('bad', [0.0, np.nan, np.inf])
def test_normalized_momentum_skips_what_tells_nothing(bad):
  tx = optlab.normalized_momentum(0.1)
  update = jax.jit(tx.update)
  state = tx.init(jnp.zeros(2))
  zero, first = update(jnp.array([bad, 0.0]), state)
  np.testing.assert_array_equal(zero, jnp.zeros(2))
  np.testing.assert_array_equal(first[0].mu, state[0].mu)
  _, state = update(jnp.ones(2), state)
  zero, after = update(jnp.array([bad, 0.0]), state)
  np.testing.assert_array_equal(zero, jnp.zeros(2))
  np.testing.assert_array_equal(after[0].mu, state[0].mu)
