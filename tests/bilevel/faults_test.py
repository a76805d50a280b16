"""Bilevel problems outside the textbook: right, refused, or told by ``ok``."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import bilevel
from tests.bilevel import bilevel_problems

SGD = optax.sgd(0.1)
X, Y = np.ones(3, np.float32), np.zeros(3, np.float32)
NOTHING = optlab.BilevelBatch(None, None)


def saba(upper, lower, optimizer, dual_lr=None, **options):
  """SABA on a sum of one block, which eats any batch."""
  estimator = optlab.saba(
    upper, lower, optimizer, dual_lr, upper_blocks=1, lower_blocks=1, **options
  )

  def estimate(params, state, batch):
    up, low = (bilevel.IndexedBatch(0, b) for b in (batch.upper, batch.lower))
    return estimator.estimate(params, state, optlab.BilevelBatch(up, low))

  return optlab.GradientEstimator(estimator.init, estimate)


def ttsa(*args, neumann_steps=10, **options):
  estimator = bilevel.ttsa(*args, neumann_steps=neumann_steps, **options)
  init = lambda x, y: estimator.init(x, y, jax.random.key(0))
  return optlab.GradientEstimator(init, estimator.estimate)


RATED = {
  'soba': optlab.soba,
  'bo_rep': optlab.bo_rep,
  'saba': saba,
  'stocbio': functools.partial(optlab.stocbio, neumann_steps=40),
  'ttsa': ttsa,
}


def implicit(upper, lower, optimizer, dual_lr=None, **options):
  del dual_lr
  return optlab.implicit(upper, lower, optimizer, **options)


def srba(upper, lower, optimizer, dual_lr, **options):
  """SRBA that looks at all data every third step."""
  return bilevel.srba(
    upper, lower, optimizer, dual_lr, NOTHING, period=3, **options
  )


FORMULA = {**RATED, 'implicit': implicit}  # Those that use g_yy.


def run(estimator, x, y, steps, batch=NOTHING):
  """The state after some estimates at one x, and all estimates."""

  @jax.jit
  def scanned(state):
    body = lambda state, _: estimator.estimate(x, state, batch)[::-1]
    return jax.lax.scan(body, state, length=steps)

  return scanned(estimator.init(x, y))


def quadratic(matrix):
  matrix = jnp.asarray(matrix, jnp.float32)
  # Bounded in y, so that only z can run away: the steps of y are tiny.
  lower = lambda x, y, batch: 0.5 * y @ matrix @ y - x @ y
  upper = lambda x, y, batch: jnp.sum(y) + 0.5 * jnp.sum(y**2)
  return upper, lower


INDEFINITE = np.diag([2.0, 1.0, -0.5])


@pytest.mark.parametrize('name', FORMULA)
def test_an_indefinite_lower_hessian_is_bounded_and_told(name):
  upper, lower = quadratic(INDEFINITE)
  estimator = FORMULA[name](upper, lower, optax.sgd(1e-6), 0.3)
  state, estimates = run(estimator, X, Y, 1000)
  assert np.all(np.abs(estimates.grads) < 2000)  # Unbounded: 1.15 ** 1000.
  assert state.info.total_rejected == 0
  assert state.info.total_not_ok > 100
  report = optlab.report(state)
  assert report['info/total_not_ok'] == state.info.total_not_ok


@pytest.mark.parametrize('central', [False, True])
def test_first_order_differences_tell_an_indefinite_or_runaway_level(central):
  upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
  for matrix, rate, fine in (
    ([[1.0, 2.0], [2.0, 1.0]], 0.1, False),
    ([[1.0, 0.0], [0.0, -0.01]], 0.1, False),
    ([[30.0, 0.0], [0.0, 1.0]], 0.1, False),  # Beyond two over the curvature.
    ([[30.0, 0.0], [0.0, 1.0]], 0.03, True),
    ([[1.0, 0.0], [0.0, 0.0]], 0.1, False),  # Its minimum is at infinity.
  ):
    _, lower = quadratic(matrix)
    estimator = bilevel.f2sa(
      upper, lower, optax.sgd(rate), 50.0, central=central
    )
    state, _ = run(estimator, np.float32([1.0, -0.5]), Y[:2], 60)
    assert (state.info.total_not_ok == 0) == fine, (matrix, rate)
    assert state.info.ok == fine


@pytest.mark.parametrize('name', ['saba', 'srba'])
def test_differences_and_memories_tell_negative_curvature_at_once(name):
  upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
  lower = lambda x, y, batch: 0.5 * (y[0] ** 2 - 0.01 * y[1] ** 2) - x @ y
  make = {'saba': saba, 'srba': srba}[name]
  state, _ = run(make(upper, lower, SGD, 0.1), X[:2], Y[:2], 60)
  assert not state.info.ok and state.info.total_rejected == 0
  good = lambda x, y, batch: lower(x, y, batch) + y[1] ** 2
  state, _ = run(make(upper, good, SGD, 0.1), X[:2], Y[:2], 60)
  assert state.info.total_not_ok == 0


def test_one_level_that_is_not_finite_is_held_by_every_estimator():
  """At the first step and later: no trace but a count, in x and in y."""
  upper = lambda x, y, scale: scale * jnp.sum((y - 1.0) ** 2)
  lower = lambda x, y, scale: scale * 0.5 * jnp.sum((y - x) ** 2)
  reuse = lambda make: functools.partial(make, reuse_sample=True)
  makes = {
    **{key: reuse(FORMULA[key]) for key in ('bo_rep', 'stocbio', 'ttsa')},
    'soba': optlab.soba, 'saba': saba, 'implicit': reuse(implicit),
    'unrolled': lambda f, g, o, r: reuse(optlab.unrolled)(f, g, o),
    'f2sa': lambda f, g, o, r: reuse(bilevel.f2sa)(f, g, o, 50.0),
  }  # fmt: skip
  good = optlab.BilevelBatch(1.0, 1.0)
  kept = lambda s: (s.inner, s.dual, s.lower_opt_state, s.dual_state)
  for key, make in makes.items():
    estimator = make(upper, lower, SGD, 0.1)
    estimate = jax.jit(estimator.estimate)
    state, rejections = estimator.init(X, Y), 0
    for fields in (
      {'upper': np.nan}, {}, {'lower': np.nan}, {'upper': np.inf}, {},
      {'lower': np.inf},
    ):  # fmt: skip
      result, new = estimate(X, state, good._replace(**fields))
      assert new.info.rejected == bool(fields), (key, fields)
      if fields:
        rejections += 1
        assert not np.any(result.grads), (key, fields)
        jax.tree.map(np.testing.assert_array_equal, kept(new), kept(state))
      state = new
    assert state.info.total_rejected == rejections == 4


@pytest.mark.parametrize('name', [*FORMULA, 'mrbo', 'f2sa', 'unrolled'])
def test_levels_that_do_not_meet_leave_the_direct_part(name):
  """f without y, or g without x: nothing to solve, and no fault."""
  alone = lambda x, y, batch: jnp.sum(jnp.sin(x))
  both = lambda x, y, batch: alone(x, y, batch) + jnp.sum((y - 1.0) ** 2)
  fixed = lambda x, y, batch: 0.5 * jnp.sum(y**2)
  tied = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)
  second = {'f2sa': (50.0,), 'unrolled': ()}.get(name, (0.3,))
  others = {
    'mrbo': bilevel.mrbo, 'f2sa': bilevel.f2sa, 'unrolled': optlab.unrolled
  }  # fmt: skip
  make = {**FORMULA, **others}[name]
  for upper, lower in ((alone, tied), (both, fixed)):
    state, estimates = run(make(upper, lower, SGD, *second), X, Y, 2)
    np.testing.assert_allclose(estimates.grads[-1], np.cos(X), rtol=1e-6)
    assert state.info.total_not_ok == 0


def test_samples_without_rows_are_named():
  """Their mean is NaN and its gradient zero: a step that looks done."""
  upper = lambda x, y, rows: jnp.mean((y - 1.0) ** 2) * jnp.mean(1 + 0 * rows)
  full, empty = optlab.BilevelBatch(X, X, np.ones((5, 3))), np.zeros((0, 3))
  makes = {**FORMULA, 'unrolled': lambda f, g, o, r: optlab.unrolled(f, g, o)}
  for key in ('soba', 'bo_rep', 'implicit', 'unrolled'):
    estimator = makes[key](upper, upper, SGD, 0.1)
    state = estimator.init(X, Y)
    for name in ('upper', 'lower'):
      with pytest.raises(ValueError, match=f'batch.{name} must have rows, got'):
        estimator.estimate(X, state, full._replace(**{name: empty}))
  with pytest.raises(ValueError, match='batch.step_samples must have rows'):
    estimator.estimate(X, state, full._replace(step_samples=empty[None]))


@pytest.mark.parametrize('name', RATED)
def test_a_rate_beyond_two_over_the_curvature_is_bounded_and_told(name):
  upper, lower = quadratic(np.diag([1.0, 2.0, 30.0]))
  estimator = RATED[name](upper, lower, optax.sgd(1e-6), 0.1)
  state, estimates = run(estimator, X, Y, 300)
  assert np.all(np.abs(estimates.grads) < 300)
  assert state.info.total_not_ok > 30
  series = {'neumann_steps': 80} if name in ('stocbio', 'ttsa') else {}
  fine = RATED[name](upper, lower, optax.sgd(1e-6), 0.05, **series)
  state, _ = run(fine, X, np.float32([1.0, 0.5, 1 / 30]), 300)  # At y*.
  assert state.info.total_not_ok == 0


@pytest.mark.parametrize('name', [*FORMULA, 'mrbo', 'f2sa', 'unrolled'])
def test_a_level_without_a_value_is_held(name):
  """A logarithm of a negative number has a slope, but no value."""
  fine = lambda x, y, batch: jnp.sum((y - x) ** 2)
  domain = lambda x, y, batch: jnp.sum(jnp.log(y - 5.0)) + fine(x, y, batch)
  second = {'f2sa': (100.0,), 'unrolled': ()}.get(name, (0.1,))
  others = {
    'mrbo': bilevel.mrbo, 'f2sa': bilevel.f2sa, 'unrolled': optlab.unrolled
  }  # fmt: skip
  make = {**FORMULA, **others}[name]
  levels = [(domain, fine), (fine, domain)]
  # Those two don't look at the value of the lower level.
  for upper, lower in levels[: 1 if name in ('f2sa', 'unrolled') else 2]:
    state, estimates = run(make(upper, lower, SGD, *second), X, Y, 3)
    assert state.info.total_rejected == 3
    np.testing.assert_array_equal(estimates.grads, 0.0)


def test_the_size_of_the_upper_level_scales_the_hypergradient():
  """By 1e20 and 1e-20, whose squares float32 does not hold."""
  upper, lower = quadratic(np.diag([2.0, 1.0, 3.0]))
  scaled = lambda x, y, size: size * upper(x, y, None)
  for name in ('implicit', 'soba', 'bo_rep', 'stocbio'):
    estimator = FORMULA[name](scaled, lower, optax.sgd(0.3), 0.3)

    @jax.jit
    def last(size, estimator=estimator):
      batch = optlab.BilevelBatch(size, None)
      state, estimates = run(estimator, X, Y, 250, batch)
      return estimates.grads[-1] / size, state.info.total_not_ok

    grads, counts = zip(*map(last, (1.0, 1e20, 1e-20)), strict=True)
    assert not any(counts), name
    np.testing.assert_allclose(grads[1:], [grads[0]] * 2, rtol=1e-4)


@pytest.mark.parametrize('name', [*FORMULA, 'mrbo', 'unrolled'])
def test_several_lower_minimizers_are_no_fault_where_f_is_alike(name):
  """Along a flat direction of g; where f is not, its slope would be endless."""
  second = () if name == 'unrolled' else (0.5,)
  others = {'mrbo': bilevel.mrbo, 'unrolled': optlab.unrolled}
  optimizer = optax.sgd(0.5 if name == 'unrolled' else 1e-6)
  x, y = np.float32([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]])  # One of them.

  @jax.jit
  def last(weights):
    upper, lower = quadratic(np.diag([1.0, 2.0, 0.0]))
    seen = lambda x, y, batch: upper(x, weights * y, batch)
    make = {**FORMULA, **others}[name]
    return run(make(seen, lower, optimizer, *second), x, y, 300)

  state, estimates = last(jnp.array([1.0, 1.0, 0.0]))
  assert state.info.total_not_ok == 0
  mean = np.mean(estimates.grads[-200:], 0)  # One of random terms.
  np.testing.assert_allclose(mean, [2.0, 0.75, 0.0], rtol=0.2)
  state, _ = last(jnp.array([1.0, 1.0, 0.5]))
  assert state.info.total_not_ok >= 100


@pytest.mark.parametrize('name', [*FORMULA, 'mrbo'])
def test_a_lower_level_without_curvature_is_told(name):
  """Linear, linear along one axis, with its minimum at infinity."""

  def lower(x, y, kind):
    along = (y[0] - x[0]) ** 2 - 0.3 * x[1] * y[1]
    fine = (y[0] - x[0]) ** 2 + 0.5 * jnp.sum((y - x) ** 2)
    levels = fine, -x @ y, along, jnp.sum(jax.nn.softplus(-x * y))
    return jnp.asarray(levels)[kind]

  upper = lambda x, y, kind: 0.5 * jnp.sum((y - 1.0) ** 2)
  options = {'reuse_sample': True} if name in ROUNDS else {}
  make = {**FORMULA, 'mrbo': bilevel.mrbo}[name]
  estimator = make(upper, lower, optax.sgd(0.2), 0.2, **options)
  tx = optax.sgd(0.05)
  step = optlab.train_step(estimator, tx)
  state = optlab.init(
    jnp.array([0.5, -0.5]), estimator, tx, jnp.array([5.0, -4.0])
  )

  @jax.jit
  def last(kind):
    batch = optlab.BilevelBatch(kind, kind)
    return jax.lax.scan(lambda s, _: step(s, batch), state, length=600)[0]

  for kind in range(4):
    end = last(kind)
    info = end.estimator_state.info
    assert info.ok == (kind == 0), kind
    if kind == 0:
      np.testing.assert_allclose(end.params, 1.0, atol=1e-3)
      assert info.total_not_ok == 0
    else:
      assert info.total_not_ok > 100


def test_implicit_tells_lower_steps_that_cannot_follow():
  """Its linear system is solved all the same. Noise and Adam are fine."""
  upper = lambda x, y, noise: jnp.sum((y - 1.0) ** 2)

  def train(optimizer, curvature, noise=0.0, steps=260):
    def lower(x, y, noise):
      return curvature * (0.5 * jnp.sum((y - x) ** 2) + noise @ y)

    tx = optax.sgd(0.05)
    estimator = optlab.implicit(upper, lower, optimizer, reuse_sample=True)
    step = optlab.train_step(estimator, tx)
    body = lambda state, n: step(state, optlab.BilevelBatch(n, n))
    samples = noise * jax.random.normal(jax.random.key(0), (steps, 2))
    state = optlab.init(jnp.full(2, 0.3), estimator, tx, jnp.full(2, 0.5))
    state, _ = jax.lax.scan(body, state, samples)
    return state.params, state.estimator_state.info

  both = jax.jit(jax.vmap(lambda c: train(optax.sgd(0.1), c)))
  params, info = both(np.float32([1e-4, 1.0]))
  assert not info.ok[0] and info.total_not_ok[0] > 50
  np.testing.assert_allclose(params[1], 1.0, atol=1e-4)
  assert info.total_not_ok[1] == 0
  decayed = optax.sgd(optax.cosine_decay_schedule(0.2, 260 * 5))
  assert train(decayed, 1.0, 0.5)[1].total_not_ok == 0
  assert train(optax.adam(0.05), 1.0, 0.5)[1].total_not_ok == 0
  frozen = optax.piecewise_constant_schedule(0.1, {50: 1e-6})
  assert not train(optax.sgd(frozen), 1.0)[1].ok


@pytest.mark.parametrize('name', [*FORMULA, 'mrbo', 'f2sa', 'unrolled'])
def test_a_lower_level_that_cannot_follow_is_told(name):
  """Steps too short by far, with noise and without; where they do, nothing."""

  def lower(x, y, batch):
    curvature, noise = batch
    return curvature * (0.5 * jnp.sum((y - x) ** 2) + noise @ y)

  # With a part of its own: a y that stands still leads to another x.
  upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2) + 0.5 * jnp.sum(x**2)
  make, second = {
    'mrbo': (bilevel.mrbo, (0.3,)),
    'f2sa': (bilevel.f2sa, (50.0,)),
    'unrolled': (optlab.unrolled, ()),
  }.get(name) or (FORMULA[name], (0.3,))
  reuse = name in ROUNDS or name == 'f2sa'
  steps, tx = 400, optax.sgd(optax.cosine_decay_schedule(0.05, 400))
  last = steps * (1 if name in ('soba', 'saba', 'mrbo', 'ttsa') else 5)

  @jax.jit
  @jax.vmap
  def train(rate, noise):
    decayed = lambda t: rate * (1 - t / last)
    estimator = make(
      upper, lower, optax.sgd(decayed), *second,
      **({'reuse_sample': True} if reuse else {}),
    )  # fmt: skip
    step = optlab.train_step(estimator, tx)
    samples = noise * jax.random.normal(jax.random.key(0), (steps, 2))

    def body(state, sample):
      return step(state, optlab.BilevelBatch(None, (1.0, sample)))

    state = optlab.init(jnp.full(2, 0.3), estimator, tx, jnp.full(2, 0.5))
    state, _ = jax.lax.scan(body, state, samples)
    return state.params, state.estimator_state.info

  params, info = train(*np.float32([[1e-5, 1e-5, 0.5, 0.5], [0, 1, 0, 0.3]]))
  assert not np.any(info.ok[:2]) and np.all(info.total_not_ok[:2] > 100)
  if name == 'unrolled':  # With a decay, its steps are too short too.
    assert np.all(info.total_not_ok[2:] > 100)
    return
  assert not np.any(info.total_not_ok[2:])
  if name in ('f2sa', 'ttsa'):  # Biased, as they say, or noisy.
    return
  np.testing.assert_allclose(params[2], 2 / 3, atol=2e-3)
  if name != 'f2sa':
    assert np.all(info.lower_lag[:2] > 30 * info.lower_lag[2])
    report = optlab.report(jax.tree.map(lambda leaf: leaf[0], info))
    assert report['lower_lag'] == info.lower_lag[0]


def test_variables_that_swing_or_run_away_together_are_told():
  """A lower level of a rate that would do, were x slower."""
  upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
  lower = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)

  @jax.jit
  @jax.vmap
  def train(x_lr, drift):
    estimator = optlab.soba(upper, lower, optax.sgd(0.02), 0.3)
    # The momentum of x makes the two run away.
    tx = optax.sgd(x_lr, drift)
    step = optlab.train_step(estimator, tx)
    state = optlab.init(jnp.zeros(2), estimator, tx, jnp.array([0.5, 0.2]))
    state, _ = jax.lax.scan(lambda s, _: step(s, NOTHING), state, length=400)
    return state.params, state.estimator_state.info

  params, info = train(*np.float32([[0.5, 0.1, 0.002], [0.0, 0.9, 0.0]]))
  assert np.max(np.abs(params[1])) > 100  # And finite.
  assert np.all(info.total_not_ok[:2] > 50) and not np.any(info.ok[:2])
  assert info.total_not_ok[2] == 0


@pytest.mark.parametrize('name', ['soba', 'mrbo'])
def test_a_solution_at_zero_is_no_lag(name):
  """Beside y all that moves is then large, and z passes through zero."""
  upper = lambda x, y, noise: jnp.sum((y + noise) ** 2)
  lower = lambda x, y, noise: 0.5 * jnp.sum((y - x) ** 2) + noise @ y
  make = {'soba': optlab.soba, 'mrbo': bilevel.mrbo}[name]
  estimator = make(upper, lower, optax.sgd(0.1), 0.1)
  tx = optax.sgd(optax.cosine_decay_schedule(0.03, 600))
  step = optlab.train_step(estimator, tx)
  noise = 0.1 * jax.random.normal(jax.random.key(0), (600, 2, 1))
  state = optlab.init(jnp.full(1, 0.3), estimator, tx, jnp.full(1, 0.5))
  body = lambda state, n: step(state, optlab.BilevelBatch(*n))
  state, _ = jax.lax.scan(body, state, noise)
  assert jnp.abs(state.params[0]) < 0.05
  assert state.estimator_state.info.total_not_ok == 0


def test_a_cycle_of_small_lag_is_told():
  """Adam below and above, one too slow for the other."""
  upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
  lower = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)
  tx = optax.adam(0.02)

  def train(optimizer):
    estimator = optlab.soba(upper, lower, optimizer, 0.3)
    step = optlab.train_step(estimator, tx)
    state = optlab.init(jnp.zeros(2), estimator, tx, jnp.array([0.5, 0.2]))
    state, _ = jax.lax.scan(lambda s, _: step(s, NOTHING), state, length=700)
    return state.params, state.estimator_state.info

  for rate, fine in (0.01, False), (0.03, True):
    params, info = train(optax.adam(rate))
    assert (jnp.max(jnp.abs(params - 1.0)) < 1e-2) == fine
    assert info.ok == fine and (info.total_not_ok == 0) == fine


@pytest.mark.parametrize('name', ['soba', 'mrbo', 'bo_rep', 'f2sa'])
def test_a_cycle_of_long_steps_is_told_until_it_ends(name):
  """Adam above swings for ever, so far that nothing of it is noise."""
  curvature = jnp.array([1.0, 0.3])
  upper = lambda x, y, batch: 0.5 * jnp.sum((y - 2.0) ** 2)
  lower = lambda x, y, batch: 0.5 * jnp.sum(curvature * (y - x) ** 2)
  below = optax.sgd(0.1)
  estimator = {
    'soba': lambda: optlab.soba(upper, lower, below, 0.1),
    'mrbo': lambda: bilevel.mrbo(upper, lower, below, 0.1),
    'bo_rep': lambda: bilevel.bo_rep(upper, lower, below, 0.1, lower_steps=1),
    'f2sa': lambda: bilevel.f2sa(upper, lower, below, 30.0, lower_steps=1),
  }[name]()

  def train(rate, end):
    schedule = lambda step: jnp.where(step < end, rate, rate / 20)
    tx = optax.adam(schedule)
    step = optlab.train_step(estimator, tx)

    def body(state, _):
      batch = optlab.BilevelBatch(None, None)
      state, _ = step(state, batch)
      return state, (state.params, state.estimator_state.info.ok)

    state = optlab.init(jnp.zeros(2), estimator, tx, jnp.zeros(2))
    _, (path, ok) = jax.lax.scan(body, state, length=3000)
    return jnp.max(jnp.abs(path[-500:] - 2.0)), ok

  errors, ok = jax.jit(jax.vmap(train))(
    jnp.array([0.1, 0.1, 0.002]), jnp.array([3000, 1000, 3000])
  )
  assert errors[0] > 2.0 and jnp.mean(ok[0, 700:]) < 0.2
  assert jnp.all(errors[1:] < 0.3)
  assert jnp.mean(ok[1, 700:1000]) < 0.3 and jnp.mean(ok[1, -500:]) > 0.9
  assert jnp.mean(ok[2]) > 0.95


@pytest.mark.parametrize('warm', [True, False])
def test_implicit_recovers_from_an_indefinite_sample(x64, warm):
  """A poisoned z is left behind by the next good sample."""
  upper = lambda x, y, batch: jnp.sum(y)
  lower = lambda x, y, matrix: 0.5 * y @ matrix @ y - x @ y
  estimator = optlab.implicit(
    upper, lower, optax.sgd(1e-9), rtol=1e-12, warm=warm, reuse_sample=True
  )
  good, bad = jnp.diag(jnp.array([2.0, 1.0, 3.0])), jnp.asarray(INDEFINITE)
  x = jnp.ones(3)
  estimate = jax.jit(estimator.estimate)
  state = estimator.init(x, jnp.zeros(3))
  for matrix in (bad, bad, bad, good):
    result, state = estimate(x, state, optlab.BilevelBatch(None, matrix))
    assert state.info.ok == (matrix is good)
    assert state.info.dual_residual <= np.sqrt(3.0) * 3
  np.testing.assert_allclose(result.grads, [0.5, 1.0, 1 / 3], atol=1e-11)


def test_implicit_with_a_network_below_stays_sane():
  key = jax.random.split(jax.random.key(0), 4)
  data = jax.random.normal(key[0], (64, 5))
  labels = jnp.sign(data[:, 0] * data[:, 1] + 0.1)
  sizes = {'a': (5, 8), 'b': (8,)}
  y = {
    name: jax.random.normal(k, shape)
    for k, (name, shape) in zip(key[1:], sizes.items(), strict=False)
  }

  def losses(y):
    return jax.nn.softplus(-labels * (jnp.tanh(data @ y['a']) @ y['b']))

  lower = lambda x, y, batch: jnp.mean(jax.nn.sigmoid(x) * losses(y))
  upper = lambda x, y, batch: jnp.mean(losses(y)[:16])
  x = jnp.zeros(64)
  for options in ({}, {'warm': False}, {'damping': 1.0}):
    estimator = optlab.implicit(upper, lower, SGD, **options)
    state, estimates = run(estimator, x, y, 100)
    assert state.info.total_rejected == 0
    assert np.all(np.abs(estimates.grads) < 50.0)
    if 'damping' in options:
      assert state.info.total_not_ok < 5
    else:
      assert state.info.total_not_ok > 50  # Indefinite at most points.


def test_damping_and_curvature_solve_their_own_system(x64):
  problem = bilevel_problems.load('quadratic_single')
  data = bilevel_problems.read('quadratic_single')
  matrix, cross = data['A'], data['B']
  curvature = lambda x, y, batch: lambda v: 2 * (matrix @ v) + v
  f_y = problem.inner - data['t']
  for options, system in (
    ({'damping': 0.7}, matrix + 0.7 * np.eye(4)),
    ({'damping': optax.constant_schedule(0.7)}, matrix + 0.7 * np.eye(4)),
    ({'curvature': curvature}, 2 * matrix + np.eye(4)),
  ):
    expected = data['rho'] * problem.x + cross.T @ np.linalg.solve(system, f_y)
    for make in (
      functools.partial(optlab.soba, dual_lr=0.2),
      functools.partial(optlab.bo_rep, dual_lr=0.2),
      functools.partial(saba, dual_lr=0.2),
      functools.partial(optlab.stocbio, neumann_lr=0.2, neumann_steps=300),
      functools.partial(optlab.implicit, rtol=1e-14),
    ):
      estimator = make(problem.upper, problem.lower, optax.sgd(0.2), **options)
      _, estimates = run(estimator, problem.x, problem.inner, 600)
      np.testing.assert_allclose(estimates.grads[-1], expected, atol=1e-10)


def test_the_linear_system_takes_optimizers_and_steps(x64):
  problem = bilevel_problems.load('quadratic_single')
  for options in (
    {'dual_lr': 0.3, 'dual_steps': 4},
    {'dual_optimizer': optax.sgd(0.1, momentum=0.8)},
    {'dual_optimizer': optax.adam(optax.exponential_decay(0.3, 30, 0.8))},
    {'dual_optimizer': optax.lbfgs(), 'dual_steps': 3},
  ):
    for make in (optlab.soba, optlab.bo_rep):
      estimator = make(problem.upper, problem.lower, optax.sgd(0.3), **options)
      state, estimates = run(estimator, problem.x, problem.inner, 600)
      np.testing.assert_allclose(
        estimates.grads[-1], problem.hypergradient, atol=1e-9
      )
      assert state.info.total_not_ok == 0
  one = optlab.soba(problem.upper, problem.lower, SGD, 0.1)
  four = optlab.soba(problem.upper, problem.lower, SGD, 0.1, dual_steps=4)
  state, _ = run(one, problem.x, problem.inner, 8)
  other, _ = run(four, problem.x, problem.inner, 2)
  np.testing.assert_allclose(other.dual, state.dual, atol=1e-12)


NONNEGATIVE = optax.chain(SGD, optax.keep_params_nonnegative())


@pytest.mark.parametrize('name', FORMULA)
@pytest.mark.parametrize(
  'optimizer',
  [
    NONNEGATIVE,
    optax.chain(optax.adam(0.1), optax.keep_params_nonnegative()),
    optax.masked(NONNEGATIVE, True),
    optax.inject_hyperparams(
      lambda rate: optax.chain(optax.sgd(rate), optax.keep_params_nonnegative())
    )(rate=0.1),
    optax.partition({'a': NONNEGATIVE}, 'a'),
  ],
)
def test_a_lower_optimizer_that_keeps_a_half_space_is_refused(name, optimizer):
  upper, lower = quadratic(np.eye(3))
  estimator = FORMULA[name](upper, lower, optimizer, 0.1)
  for init in (estimator.init, jax.jit(estimator.init)):
    with pytest.raises(ValueError, match='lower_optimizer must leave y free'):
      init(X, Y)


def test_a_lower_optimizer_that_moves_nothing_is_refused():
  """And below `unrolled` one that takes signs alone; a warm-up moves later."""
  upper, lower = quadratic(np.eye(3))
  makes = {
    **FORMULA,
    'f2sa': lambda f, g, o, r: bilevel.f2sa(f, g, o, 50.0),
    'unrolled': lambda f, g, o, r: optlab.unrolled(f, g, o),
  }
  for name in ('soba', 'implicit', 'f2sa', 'unrolled'):
    make = lambda o, name=name: makes[name](upper, lower, o, 0.1).init(X, Y)
    for still in (optax.set_to_zero(), optax.sgd(0.0)):
      with pytest.raises(ValueError, match='lower_optimizer must move y'):
        make(still)
    make(optax.sgd(optax.linear_schedule(0.0, 0.1, 50)))
  for optimizer in (optax.sign_sgd(0.1), optax.lion(0.1), optax.rprop(0.1)):
    with pytest.raises(ValueError, match='follow the size of the gradient'):
      make(optimizer)
  for optimizer in (optax.adam(0.1), optax.contrib.prodigy(), optax.lbfgs()):
    make(optimizer)
  jax.vmap(lambda rate: make(optax.sgd(rate)).step)(np.zeros(2))


def test_other_constraints_are_told_by_ok():
  target = jnp.array([2.0, 0.3, -0.4])
  lower = lambda x, y, batch: 0.5 * jnp.sum((y - x * target) ** 2)
  upper = lambda x, y, batch: jnp.sum(y**2)
  frozen = optax.partition(
    {'go': SGD, 'stop': optax.set_to_zero()}, {'a': 'go', 'b': 'stop'}
  )
  tree = {'a': jnp.zeros(3), 'b': jnp.zeros(3)}
  apart = lambda f: lambda x, y, batch: f(x, y['a'] + y['b'], batch)
  for name, make in FORMULA.items():
    held = make(apart(upper), apart(lower), frozen, 0.1)
    assert not run(held, X, tree, 5)[0].info.ok, name


def projected(project, optimizer=SGD):
  """An optimizer whose steps end where ``project`` puts them."""

  def update(updates, state, params):
    moved = project(optax.apply_updates(params, updates))
    return jax.tree.map(jnp.subtract, moved, params), state

  last = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
  return optax.chain(optimizer, last)


PLANE = np.float32([1.0, -1.0, 0.0, 0.5, 2.0])
KEPT = {
  'ball': lambda y: optax.projections.projection_l2_ball(y, 0.5),
  'sphere': optax.projections.projection_l2_sphere,
  'sum': lambda y: y - jnp.mean(y),
  'simplex': optax.projections.projection_simplex,
  'box of arrays': lambda y: jnp.clip(y, -np.arange(5.0), 2.0),
  'plane': lambda y: y - PLANE * (PLANE @ y) / 6.25,
  'half-space': lambda y: y - PLANE * jnp.maximum(PLANE @ y - 1, 0) / 6.25,
  'order': jnp.sort,
  'integers': jnp.round,
  'threshold': lambda y: jnp.sign(y) * jnp.maximum(jnp.abs(y) - 1e-3, 0),
}


@pytest.mark.parametrize('name', KEPT)
def test_projections_that_move_all_numbers_are_refused(name):
  """Under jit and vmap too, with rates that are tracers, and with Adam."""
  upper, lower = quadratic(np.eye(5))
  x, y = jnp.ones(5), jnp.zeros(5)
  refused = pytest.raises(ValueError, match='must (leave y free|not decay y), ')

  def init(rate, make=optlab.soba, steps=optax.sgd):
    kept = projected(KEPT[name], steps(rate))
    return make(upper, lower, kept, 0.1).init(x, y).step

  for make in (*FORMULA.values(), srba):
    with refused:
      init(0.1, make)
  for look in (
    lambda: init(0.1, steps=optax.adam),
    lambda: jax.jit(init)(0.1),
    lambda: jax.vmap(init)(jnp.array([0.1, 0.2])),
  ):
    with refused:
      look()
  kept = projected(KEPT[name])
  told = contextlib.nullcontext()
  if name == 'integers':  # No derivative passes through those.
    told = pytest.raises(ValueError, match='must have steps that follow the')
  with told:
    optlab.unrolled(upper, lower, kept).init(x, y)
  bilevel.f2sa(upper, lower, kept, 10.0).init(x, y)


def test_an_optimizer_that_cannot_be_tried_is_refused():
  """What a probe does not know is not free."""

  def update(updates, state, params):
    del params
    return jax.tree.map(lambda u: u[:2], updates), state

  cut = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
  upper, lower = quadratic(np.eye(3))
  with pytest.raises(ValueError, match='must have steps that can be tried'):
    optlab.soba(upper, lower, cut, 0.1).init(X, Y)
  # A rate that begins at zero is no reason to look no further.
  late = optax.join_schedules(
    [optax.constant_schedule(0.0), optax.constant_schedule(0.1)], [100]
  )
  decay = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(late))
  with pytest.raises(ValueError, match='must not decay y'):
    optlab.soba(upper, lower, decay, 0.1).init(X, Y)
  optlab.soba(upper, lower, optax.sgd(late), 0.1).init(X, Y)
  several = optax.MultiSteps(projected(KEPT['ball']), 3)
  with pytest.raises(ValueError, match='leave y free, got one that brings'):
    optlab.soba(upper, lower, several, 0.1).init(X, Y)


def test_a_lower_optimizer_that_decays_weights_is_refused():
  """Its y* is not that of lower: here 1 / 1.5, while the formula says 1."""
  upper, lower = quadratic(np.eye(3))
  decay = optax.add_decayed_weights(0.5)
  for optimizer in (
    optax.chain(decay, SGD),
    optax.MultiSteps(optax.chain(optax.add_decayed_weights(1e-4), SGD), 3),
    optax.adamw(0.1, weight_decay=0.01),
    optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=0.01),
  ):
    with pytest.raises(ValueError, match='must not decay y, got one that move'):
      optlab.soba(upper, lower, optimizer, 0.1).init(X, Y)
  optlab.unrolled(upper, lower, optax.chain(decay, SGD)).init(X, Y)
  # Noise is no decay.
  optlab.soba(upper, lower, optax.noisy_sgd(0.1, key=0), 0.1).init(X, Y)


def test_free_optimizers_are_not_refused_and_ok():
  upper, lower = quadratic(np.diag([1.0, 2.0, 3.0]))
  warmup = optax.linear_schedule(0.0, 0.1, 10)
  for optimizer in (
    optax.adamw(0.1),
    optax.contrib.prodigy(0.1),
    optax.sgd(warmup, momentum=0.9, nesterov=True),
    optax.chain(optax.clip(0.1), optax.sgd(0.1)),
    optax.MultiSteps(optax.sgd(0.1), 3),
    optax.apply_if_finite(optax.lion(0.01), 3),
    optax.lbfgs(),
  ):
    estimator = optlab.soba(upper, lower, optimizer, 0.1)
    state, _ = run(estimator, X, Y, 40)
    assert state.info.total_not_ok == 0


def test_unrolled_is_right_through_a_projection(x64):
  problem = bilevel_problems.load('quadratic_single')
  optimizer = optax.chain(optax.sgd(0.2), optax.keep_params_nonnegative())
  estimator = optlab.unrolled(
    problem.upper, problem.lower, optimizer, lower_steps=400
  )
  value = lambda x: estimator.estimate(
    x, estimator.init(x, jnp.zeros(4)), NOTHING
  )[0]
  estimate = jax.jit(value)(problem.x)
  for i in range(3):
    e = 1e-6 * np.eye(3)[i]
    slope = (value(problem.x + e).value - value(problem.x - e).value) / 2e-6
    np.testing.assert_allclose(estimate.grads[i], slope, atol=1e-7)


@pytest.mark.parametrize(
  'optimizer',
  [
    optax.lbfgs(),
    optax.polyak_sgd(),
    optax.chain(SGD, optax.contrib.reduce_on_plateau(patience=3)),
  ],
)
@pytest.mark.parametrize('name', ['soba', 'saba', 'bo_rep', 'implicit'])
def test_every_lower_optimizer_gets_its_extras(name, optimizer):
  target = jnp.arange(3.0)
  lower = lambda x, y, batch: 0.5 * jnp.sum((y - x * target) ** 2)
  upper = lambda x, y, batch: jnp.sum(y**2)
  estimator = FORMULA[name](upper, lower, optimizer, 0.5)
  state, estimates = run(estimator, X, Y, 100)
  np.testing.assert_allclose(state.inner, target, atol=1e-3)
  np.testing.assert_allclose(estimates.grads[-1], 2 * target**2, atol=1e-2)


ROUNDS = {
  'bo_rep': (optlab.bo_rep, (0.1,)),
  'implicit': (optlab.implicit, ()),
  'stocbio': (optlab.stocbio, (0.1,)),
  'ttsa': (ttsa, (0.1,)),
  'unrolled': (optlab.unrolled, ()),
}


@pytest.mark.parametrize('name', ROUNDS)
@pytest.mark.parametrize(
  'empty',
  [(), *(pytest.param(e, marks=pytest.mark.slow) for e in (None, {}))],
)
def test_forgotten_step_samples_are_an_error_or_the_lower_sample(name, empty):
  make, rate = ROUNDS[name]
  lower = lambda x, y, batch: jnp.sum((y - x * batch) ** 2)
  upper = lambda x, y, batch: jnp.sum(y**2)
  forgotten = optlab.BilevelBatch(X, X, empty)
  estimator = make(upper, lower, SGD, *rate)
  with pytest.raises(ValueError, match=r'batch\.step_samples has no data, but'):
    estimator.estimate(X, estimator.init(X, Y), forgotten)
  steps = 1 if name == 'ttsa' else 5
  stacked = optlab.BilevelBatch(X, X, np.stack([X] * steps))
  asked = make(upper, lower, SGD, *rate, reuse_sample=True)
  _, got = run(asked, X, Y, 4, forgotten)
  _, expected = run(estimator, X, Y, 4, stacked)
  np.testing.assert_allclose(got.grads, expected.grads, rtol=1e-6)
  # Fresh samples, where there are some, are taken all the same.
  _, again = run(asked, X, Y, 4, stacked)
  np.testing.assert_array_equal(again.grads, expected.grads)


@pytest.mark.parametrize('index', [0, np.int32(0), np.array(0), jnp.int32(0)])
def test_saba_takes_a_constant_index_under_jit(index):
  lower = lambda x, y, batch: jnp.sum((y - x) ** 2)
  estimator = optlab.saba(
    lower, lower, SGD, 0.1, upper_blocks=2, lower_blocks=2
  )
  step = lambda index: jax.jit(
    lambda state: estimator.estimate(
      X,
      state,
      optlab.BilevelBatch(*[bilevel.IndexedBatch(index, None)] * 2),
    )
  )(estimator.init(X, Y))
  assert np.all(np.isfinite(step(index)[0].grads))
  with pytest.raises(ValueError, match='must be below upper_blocks=2, got 2'):
    step(index + 2)


def test_saba_rejects_a_block_that_is_none():
  level = lambda x, y, batch: jnp.sum((y - x) ** 2)
  estimator = optlab.saba(
    level, level, SGD, 0.1, upper_blocks=2, lower_blocks=2
  )

  @jax.jit
  def step(upper, lower):
    batch = map(bilevel.IndexedBatch, (upper, lower), (None, None))
    return estimator.estimate(
      X, estimator.init(X, Y), optlab.BilevelBatch(*batch)
    )

  for upper, lower, good in ((1, 0, True), (2, 0, False), (1, -1, False)):
    estimate, state = step(upper, lower)
    assert state.info.ok == good
    assert state.info.rejected == (not good)
    assert good or not np.any(estimate.grads)
  with pytest.raises(TypeError, match='batch.upper.index must be an integer'):
    step(1.0, 0)


@pytest.mark.parametrize('name', [*FORMULA, 'unrolled'])
def test_leaves_that_have_no_hypergradient_are_named(name):
  upper, lower = quadratic(np.eye(3))
  make = FORMULA.get(name, lambda *args: optlab.unrolled(*args[:3]))
  estimator = make(upper, lower, SGD, 0.1)
  integers, wave = np.arange(3), np.ones(3, np.complex64)
  for x, y, match in (
    (integers, Y, r'^params must be floating, got dtype int'),
    (X, integers, r'^inner must be floating, got dtype int'),
    ({'n': integers, 'x': X}, Y, r"^params\['n'\] must be floating"),
    (X, {'f': jnp.sin}, r"^inner\['f'\] must be an array"),
    (wave, Y, r'^params must be real, got dtype complex64'),
    (X, wave, r'^inner must be real, got dtype complex64'),
  ):
    with pytest.raises(TypeError, match=match):
      estimator.init(x, y)


def test_what_an_objective_returns_is_checked():
  good = lambda x, y, batch: jnp.sum(y - x)
  for bad, match in (
    (lambda x, y, batch: (jnp.sum(y), {}), 'a tuple of 2: declare has_aux'),
    (
      lambda x, y, batch: y,
      r'a real scalar of floats, got shape \(3,\).*Sum or',
    ),
    (lambda x, y, batch: 1j * jnp.sum(y), 'a real scalar of floats.*complex64'),
    (
      lambda x, y, batch: jnp.sum(y).astype(int),
      'a real scalar of floats.*int32',
    ),
    (lambda x, y, batch: None, 'a scalar, got None'),
  ):
    for name, levels in (('upper', (bad, good)), ('lower', (good, bad))):
      for method, make in FORMULA.items():
        estimator = make(*levels, SGD, 0.1)
        with pytest.raises(TypeError, match=f'{name} must return .*{match}'):
          jax.eval_shape(
            lambda e=estimator: e.estimate(X, e.init(X, Y), NOTHING)
          )
        assert method
  estimator = optlab.soba(good, good, SGD, 0.1, has_aux=True)
  with pytest.raises(TypeError, match=r'upper must return \(scalar, aux\)'):
    estimator.estimate(X, estimator.init(X, Y), NOTHING)


@pytest.mark.parametrize('name', [*FORMULA, 'unrolled'])
def test_auxiliary_output_of_both_levels_comes_out(name):
  make = FORMULA.get(
    name, lambda *args, **options: optlab.unrolled(*args[:3], **options)
  )
  lower = lambda x, y, batch: jnp.sum((y - x) ** 2)
  upper = lambda x, y, batch: jnp.sum(y**3) + jnp.sum(y)
  with_y = lambda f: lambda x, y, batch: (f(x, y, batch), {'y': y, 'x': x})
  plain = make(upper, lower, SGD, 0.1)
  rich = make(with_y(upper), with_y(lower), SGD, 0.1, has_aux=True)
  expected_state, expected = run(plain, X, Y, 3)
  state, got = run(rich, X, Y, 3)
  np.testing.assert_array_equal(got.grads, expected.grads)
  np.testing.assert_array_equal(state.inner, expected_state.inner)
  np.testing.assert_array_equal(got.aux.upper['x'], np.stack([X] * 3))
  np.testing.assert_array_equal(got.aux.upper['y'], got.aux.lower['y'])
  step = jax.jit(optlab.train_step(rich, SGD))
  _, (value, out) = step(optlab.init(X, rich, SGD, Y), NOTHING)
  assert isinstance(out, bilevel.BilevelAux) and value.shape == ()


def test_a_kink_below_is_for_a_map():
  """y* = 0 wherever x is; by the derivatives of abs the slope is half."""
  smooth = lambda x, y, batch: 0.5 * (y - 0.5) ** 2
  kink = lambda x, y, batch: smooth(x, y, batch) + jnp.exp(x) * jnp.abs(y)
  shrink = lambda x, y, rate: (
    jnp.sign(y) * jnp.maximum(jnp.abs(y) - rate * jnp.exp(x), 0)
  )
  upper = lambda x, y, batch: 0.5 * (y - 1.0) ** 2
  mapped = bilevel.proximal_map(smooth, shrink, 0.5)
  one = jnp.ones(())
  for estimator, mean in (
    (optlab.soba(upper, kink, optax.sgd(0.05), 0.05), 0.46),
    (optlab.soba(upper, smooth, None, 0.05, lower_map=mapped), 0.0),
  ):
    state, estimates = run(estimator, 0.0 * one, one, 800)
    np.testing.assert_allclose(estimates.grads[400:].mean(), mean, atol=0.01)
    assert state.info.ok


def test_an_objective_without_a_forward_derivative_gives_the_same_numbers():
  @jax.custom_vjp
  def square(y):
    return y**2

  square.defvjp(lambda y: (y**2, y), lambda y, g: (2 * y * g,))
  lower = lambda sq: lambda x, y, batch: jnp.sum(sq(y - jnp.sin(x)))
  upper = lambda x, y, batch: jnp.sum(jnp.cos(y))
  for name, make in FORMULA.items():
    with pytest.raises(TypeError, match='custom_vjp'):
      jax.jvp(square, (1.0,), (1.0,))
    _, plain = run(make(upper, lower(jnp.square), SGD, 0.1), X, Y, 5)
    _, custom = run(make(upper, lower(square), SGD, 0.1), X, Y, 5)
    np.testing.assert_allclose(
      custom.grads, plain.grads, rtol=5e-7, atol=1e-7, err_msg=name
    )


def test_forward_over_reverse_takes_less_memory():
  """Deep and wide: a scan of layers below."""
  width, depth = 64, 24

  def lower(x, y, batch):
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    out, _ = jax.lax.scan(layer, batch * x, y)
    return jnp.mean(out**2) + 1e-3 * jnp.sum(y**2)

  upper = lambda x, y, batch: jnp.mean(y**2) + 0 * jnp.sum(x)
  x, y = jnp.ones(width), jnp.zeros((depth, width, width))
  data = jnp.ones((256, width))

  def soba(state):
    batch = optlab.BilevelBatch(None, data)
    return estimator.estimate(x, state, batch)

  def reverse(z):
    grad, vjp = jax.vjp(lambda x, y: jax.grad(lower, 1)(x, y, data), x, y)
    return grad, vjp(z)

  def temporary(function, argument):
    compiled = jax.jit(function).lower(argument).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  estimator = optlab.soba(upper, lower, SGD, 0.1)
  state = estimator.init(x, y)
  assert temporary(soba, state) < 0.75 * temporary(reverse, state.dual)
