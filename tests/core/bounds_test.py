"""`minimize` in a box; by the clock; and where users of scipy lean on it."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import training

CENTRE = jnp.array([2.0, -3.0, 0.3, 0.7])
LOWER, UPPER = -1.0, jnp.array([1.0, 1.0, 1.0, jnp.inf])


def bowl(x, centre=CENTRE):
  return jnp.sum(jnp.cosh(x - centre)) + 0.3 * x[0] * x[2] - 0.2 * x[1] * x[3]


def factored(x):
  """A low-rank curvature."""
  return optlab.empirical_fisher(bowl)(x)


METHODS = {
  'gns_newton': (optlab.gns_newton(), None),
  'dense': (optlab.gns_newton(), optlab.dense(optlab.hessian(bowl))),
  'cg': (optlab.gns_newton(optlab.cg(), metric=jnp.arange(1.0, 5.0)), None),
  'low rank': (optlab.gns_newton(), factored),
  'lbfgs': (optax.lbfgs(), None),
  'backtracking': (
    optax.chain(optax.sgd(0.5), optax.scale_by_backtracking_linesearch(20)),
    None,
  ),
  'adam': (optax.adam(optax.exponential_decay(0.1, 20, 0.8)), None),
}


@pytest.mark.parametrize('name', METHODS)
def test_stops_where_no_free_coordinate_would_move(x64, name):
  tx, curvature = METHODS[name]
  run = jax.jit(
    lambda start: optlab.minimize(
      bowl, start, tx, max_steps=500, grad_tol=1e-5, curvature=curvature,
      bounds=(LOWER, UPPER),
    )
  )(jnp.array([-5.0, 0.5, 7.0, 0.0]))  # fmt: skip
  assert run.status == training.GRAD_TOL, run.message
  np.testing.assert_array_equal(run.active, [1, -1, 0, 0])
  assert run.active.dtype == jnp.int8
  np.testing.assert_array_equal(run.params[:2], [1.0, -1.0])
  grad = np.asarray(jax.grad(bowl)(run.params))
  assert grad[0] < 0 < grad[1]
  np.testing.assert_allclose(np.linalg.norm(grad[2:]), run.grad_norm, rtol=1e-6)
  assert run.grad_norm <= 1e-5
  np.testing.assert_allclose(run.value, bowl(run.params), rtol=1e-12)


def test_a_step_that_the_box_turns_uphill_is_not_the_end(x64):
  # Newton's step points out of the box, the gradient along its edge.
  matrix = jnp.array([[1.0, -3.0], [-3.0, 10.0]])
  fun = lambda x: x @ matrix @ x / 2 - jnp.array([1.0, -2.9]) @ x
  run = optlab.minimize(
    fun, jnp.array([0.0, 0.0]), optlab.gns_newton(gamma_init=1e6),
    max_steps=50, grad_tol=1e-8, bounds=(0.0, jnp.array([jnp.inf, 9.0])),
    curvature=lambda x: optlab.Dense(matrix),
  )  # fmt: skip
  assert run.success, run.message
  grad = jax.grad(fun)(run.params)
  assert jnp.all((grad > -1e-8) & ((run.params <= 0) | (grad < 1e-8)))


def test_lanes_of_a_vmap_turns_of_a_scan_and_donated_starts_agree():
  def solve(start, upper):
    run = optlab.minimize(
      lambda p: jnp.sum((p['a'] - 2.0) ** 4) + (p['a'][0] - p['b']) ** 2,
      start, optlab.gns_newton(), max_steps=60, grad_tol=1e-3,
      bounds=(-1.0, {'a': upper, 'b': 1.5}),
    )  # fmt: skip
    return run.params, run.active, run.steps, run.status

  starts = {
    'a': jnp.array([[0.0, 5.0], [-3.0, 1.0], [2.0, 2.0]]), 'b': jnp.arange(3.0)
  }  # fmt: skip
  uppers = jnp.array([[1.0, 9.0], [9.0, 0.5], [0.0, 0.0]])
  lanes = jax.jit(jax.vmap(solve))(starts, uppers)
  turns = jax.jit(
    lambda *all: jax.lax.scan(lambda _, at: (None, solve(*at)), None, all)[1]
  )(starts, uppers)
  single = jax.jit(solve, donate_argnums=0)
  for k in range(3):
    at = lambda tree, k=k: jax.tree.map(lambda leaf: leaf[k], tree)
    alone = single(at(starts), uppers[k])
    for found in (at(lanes), at(turns)):
      for a, b in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert alone[3] == training.GRAD_TOL
  assert single._cache_size() == 1
  np.testing.assert_array_equal(lanes[1]['a'], [[1, 0], [0, 1], [1, 1]])


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32, jnp.float64])
def test_the_dtypes_of_the_parameters_stay(x64, dtype):
  start = {'a': jnp.ones(2, dtype), 'b': jnp.ones((), jnp.float32)}
  run = jax.eval_shape(
    lambda p: optlab.minimize(
      lambda p: jnp.sum(p['a'] ** 2).astype(jnp.float32) + p['b'] ** 2, p,
      optlab.gns_newton(), max_steps=3, bounds=(0.5, jnp.full((), 2.0)),
    ),
    start,
  )  # fmt: skip
  assert run.params['a'].dtype == dtype and run.params['b'].dtype == jnp.float32
  assert not any(leaf.weak_type for leaf in jax.tree.leaves(run.params))
  assert {leaf.dtype for leaf in jax.tree.leaves(run.active)} == {
    np.dtype('int8')
  }


def test_trees_with_ends_left_out_fixed_leaves_and_narrow_dtypes():
  fun = lambda p: (
    jnp.sum((p['a'] - 2.0) ** 2) + (p['b'] + 1.0) ** 2
    + jnp.sum((p['c'].astype(jnp.float32) - 3.0) ** 2) + p['a'][0] * p['b']
  )  # fmt: skip
  start = {
    'a': jnp.zeros(2), 'b': jnp.zeros(()), 'c': jnp.zeros(1, jnp.bfloat16)
  }  # fmt: skip
  lower = {'a': None, 'b': 0, 'c': None}
  upper = {'a': np.array([1.0, np.inf]), 'b': None, 'c': 0.0}
  run = optlab.minimize(
    fun, start, optlab.gns_newton(), max_steps=30, grad_tol=1e-3,
    bounds=(lower, upper),
  )  # fmt: skip
  assert run.success
  np.testing.assert_allclose(run.params['a'], [1.0, 2.0], atol=1e-3)
  assert (run.params['b'], run.params['c'][0]) == (0, 0)
  assert run.params['c'].dtype == jnp.bfloat16
  active = jax.tree.map(np.asarray, run.active)
  np.testing.assert_array_equal(active['a'], [1, 0])
  assert (active['b'], active['c'][0]) == (-1, 1)
  fixed = optlab.minimize(
    bowl, jnp.zeros(4), optlab.gns_newton(), max_steps=5, bounds=(0.5, 0.5),
    grad_tol=0.0,
  )  # fmt: skip
  assert fixed.success and fixed.steps == 0
  np.testing.assert_array_equal(fixed.params, 0.5)


def solve(centre, lower, upper):
  return optlab.minimize(
    bowl, jnp.zeros(4), optlab.gns_newton(), max_steps=100, grad_tol=1e-10,
    args=(centre,), bounds=(lower, upper),
  )  # fmt: skip


def test_derivatives_are_of_what_is_free_and_of_the_bounds(x64):
  def of(*at):
    run = solve(*at)
    return jnp.sin(run.params).sum() + run.value

  at = CENTRE.astype(float), jnp.full(4, -1.0), jnp.full(4, 1.0)
  ways = jnp.stack([*1e-5 * jnp.eye(12), *-1e-5 * jnp.eye(12)])
  ends = [a + way for a, way in zip(at, jnp.split(ways, 3, 1), strict=True)]
  values = jax.jit(jax.vmap(of))(*ends)
  expected = jnp.split((values[:12] - values[12:]) / 2e-5, 3)
  actual = jax.jit(jax.grad(of, argnums=(0, 1, 2)))(*at)
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  assert jnp.all(actual[2][:1] != 0) and jnp.all(actual[1][2:] == 0)
  # On the edge between active and not, there is no derivative.
  edge = jax.grad(lambda c: optlab.minimize(
    lambda x: jnp.sum((x - c) ** 2), jnp.ones(2), optax.sgd(0.5), max_steps=9,
    grad_tol=1e-9, bounds=(0.0, None)).params.sum())(jnp.zeros(2))  # fmt: skip
  assert jnp.all(jnp.isnan(edge))


def test_an_empty_box_of_tracers_is_not_finite():
  run = jax.jit(lambda low: optlab.minimize(
    bowl, jnp.zeros(4), optax.sgd(0.1), max_steps=3, bounds=(low, 0.0)
  ))(1.0)  # fmt: skip
  assert run.status == training.NON_FINITE


def test_least_squares_take_bounds(x64):
  data = jnp.linspace(0.0, 3.0, 20)
  fit = optlab.newton.least_squares(
    lambda p: p['a'] * jnp.exp(-p['k'] * data) - 2 * jnp.exp(-0.5 * data),
    {'a': jnp.zeros(()), 'k': jnp.ones(())},
    bounds=(None, {'a': 1.5, 'k': None}), grad_tol=1e-8,
  )  # fmt: skip
  assert fit.success and fit.params['a'] == 1.5 and fit.active['a'] == 1


@pytest.mark.parametrize('bounds', [None, (0.0, 9.0)])
def test_a_line_search_does_not_mind_a_curvature(bounds):
  run = optlab.newton.least_squares(
    lambda x: x - 1.0, jnp.zeros(2), tx=optax.lbfgs(), bounds=bounds
  )
  assert run.success and run.opt_state[0].count > 0


def test_the_clock_stops_it_between_steps():
  slow = lambda progress: time.sleep(0.02)

  @jax.jit
  def run(start, seconds):
    return optlab.minimize(
      bowl, start, optax.sgd(1e-3), max_steps=10_000, callback=slow,
      max_seconds=seconds,
    )  # fmt: skip

  for _ in range(2):  # Each run has a clock of its own.
    result = run(jnp.zeros(4), 0.1)
    assert result.status == training.MAX_SECONDS and not result.success
    assert 1 <= result.steps <= 6
    assert result.message == 'max_seconds have passed.'
  alone = optlab.minimize(
    bowl, jnp.zeros(4), optax.sgd(0.0), max_steps=10**9, max_seconds=0.01
  )
  assert alone.status == training.MAX_SECONDS


def test_a_callback_that_raises_is_heard():
  def callback(progress):
    raise RuntimeError('enough of this')

  with pytest.raises(Exception, match='enough of this'):
    jax.block_until_ready(
      optlab.minimize(
        bowl, jnp.zeros(4), optax.sgd(0.1), max_steps=3, callback=callback
      )
    )


def test_watched_and_timed_runs_have_derivatives(x64):
  seen = []

  def of(centre):
    return optlab.minimize(
      bowl, jnp.zeros(4), optlab.gns_newton(), max_steps=50, grad_tol=1e-9,
      args=(centre,), callback=lambda now: seen.append(now.value),
      max_seconds=60.0,
    ).params[2]  # fmt: skip

  slope = jax.jit(jax.grad(of))(CENTRE.astype(float))
  jax.effects_barrier()
  assert seen and jnp.all(jnp.isfinite(slope)) and slope[2] > 0.5


def test_scalars_and_empty_trees():
  run = optlab.minimize(
    lambda x: jnp.cosh(x - 1), 0.0, optlab.gns_newton(), max_steps=20,
    grad_tol=1e-4, bounds=(None, 0.5),
  )  # fmt: skip
  assert run.success and run.params == 0.5 and run.active == 1
  empty = optlab.minimize(
    lambda x: jnp.float32(2.0), {}, optax.sgd(0.1), max_steps=3, bounds=(0, 1)
  )
  assert empty.success and empty.value == 2.0 and empty.params == {}


def test_an_earlier_run_without_bounds_goes_on_within_them():
  tx = optlab.gns_newton()
  fun = lambda x: jnp.sum((x - 2.0) ** 4 + (x - 2.0) ** 2)
  free = optlab.minimize(fun, jnp.zeros(2), tx, max_steps=2)
  run = optlab.minimize(
    fun, free.params, tx, max_steps=30, opt_state=free.opt_state,
    bounds=(None, 0.5), grad_tol=1e-4,
  )  # fmt: skip
  assert run.success and run.value == fun(jnp.full(2, 0.5))
  np.testing.assert_array_equal(run.params, 0.5)
