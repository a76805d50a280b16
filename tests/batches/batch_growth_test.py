"""Batch tests and the growth rule against recorded and exact numbers."""

import fractions
import json
import pathlib

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'batch_growth'
CASES = json.loads((GOLDEN / 'batch_tests.json').read_text())['cases']
TESTS = {
  'norm': lambda h: optlab.norm_test(h['eta']),
  'coordinate': lambda h: optlab.batches.coordinate_norm_test(h['eta']),
  'inner_product': lambda h: optlab.inner_product_test(h['theta']),
  'augmented': lambda h: optlab.augmented_inner_product_test(
    h['theta'], h['nu']
  ),
}
ROUTES = {
  'vmap': (optlab.batches.vmap_grads, optlab.batches.vmap_inner_products),
  'ghost': (optlab.ghost_norms, optlab.batches.jvp_inner_products),
}
CANCELLATION = 'large_mean_tiny_variance_cancellation'


def linear(params, rows):
  """Losses whose per-example gradients are the rows."""
  return rows @ params


def estimate_of(rows, route='vmap'):
  moments, inner_products = ROUTES[route]
  estimator = optlab.per_example(linear, moments, inner_products=inner_products)
  params = jnp.zeros(rows.shape[1])
  return jax.jit(lambda rows: estimator.estimate(params, (), rows)[0])(rows)


def after_one(test, estimate, batch_size=4, max_batch_size=100, **kwargs):
  rule = optlab.grow_batch(test, batch_size, max_batch_size, **kwargs)

  @jax.jit
  def update(grads, extras):
    updates, state = rule.update(grads, rule.init(grads), **extras)
    assert updates is grads
    return state

  return update(estimate.grads, estimate.extras)


def exact_requests(case):
  """The requests in rational arithmetic."""
  rows = [[fractions.Fraction(x) for x in r] for r in case['per_example_grads']]
  n, columns = len(rows), range(len(rows[0]))
  mean = [sum(row[j] for row in rows) / n for j in columns]
  rest = [[row[j] - mean[j] for j in columns] for row in rows]
  eta, theta, nu = (
    fractions.Fraction(case['hyper'][name]) ** 2
    for name in ('eta', 'theta', 'nu')
  )
  square = sum(m**2 for m in mean)
  variances = [sum(r[j] ** 2 for r in rest) / (n - 1) for j in columns]
  inner = sum(sum(r[j] * mean[j] for j in columns) ** 2 for r in rest) / (n - 1)
  across = (sum(variances) - inner / square) / (nu * square)
  requests = {
    'norm': sum(variances) / (eta * square),
    'coordinate': max(
      v / (eta * m**2) for v, m in zip(variances, mean, strict=True)
    ),
    'inner_product': inner / (theta * square**2),
  }
  requests['augmented'] = max(requests['inner_product'], across)
  return {name: float(value) for name, value in requests.items()}


@pytest.mark.parametrize('case', CASES, ids=lambda case: case['name'])
def test_golden_requests_and_sizes(x64, case):
  expected = case['requested']
  if case['name'] == CANCELLATION:
    expected = exact_requests(case)
  rows = jnp.asarray(case['per_example_grads'])
  for route in ROUTES:
    estimate = estimate_of(rows, route)
    for name, make in TESTS.items():
      if name == 'coordinate' and route == 'ghost':
        continue
      state = after_one(
        make(case['hyper']),
        estimate,
        case['batch_size'],
        case['max_batch_size'],
      )
      assert state.batch_size == case['next_batch'][name], (route, name)
      if case['name'] == CANCELLATION and route == 'ghost':
        # ||g||^2 is 1e20 times V there: a difference of squares has no digit.
        assert state.info.requested_size < 1e-8
        continue
      np.testing.assert_allclose(
        state.info.requested_size, float(expected[name]), 1e-12, err_msg=name
      )


@pytest.mark.parametrize(
  'case',
  [case for case in CASES if case['name'] != CANCELLATION],
  ids=lambda case: case['name'],
)
def test_golden_in_float32(case):
  rows = jnp.asarray(case['per_example_grads'], jnp.float32)
  estimate = estimate_of(rows)
  for name, make in TESTS.items():
    state = after_one(
      make(case['hyper']), estimate, case['batch_size'], case['max_batch_size']
    )
    assert state.batch_size == case['next_batch'][name], name
    np.testing.assert_allclose(
      state.info.requested_size,
      float(case['requested'][name]),
      1e-5,
      err_msg=name,
    )


def test_the_golden_cases_are_exact_in_rational_arithmetic():
  """The fractions above are the recorded formulas, where both are sharp."""
  for case in CASES[:2]:
    for name, value in exact_requests(case).items():
      np.testing.assert_allclose(value, case['requested'][name], 1e-12)


@settings(max_examples=60, deadline=None)
@given(
  n=st.integers(2, 6),
  width=st.integers(1, 5),
  seed=st.integers(0, 1000),
  scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_the_trace_splits_along_and_across_the_mean(n, width, seed, scale):
  """V = V_ip / ||g||^2 + V_orth, with the orthogonal parts formed."""
  rng = np.random.default_rng(seed)
  rows = rng.normal(size=width) + scale * rng.normal(size=(n, width))
  mean = rows.mean(0)
  rest = rows - mean
  unit = mean / np.linalg.norm(mean)
  orthogonal = rest - np.outer(rest @ unit, unit)
  v_orth = np.sum(orthogonal**2) / (n - 1)
  grad_sq = float(mean @ mean)
  with jax.enable_x64(True):
    extras = {
      'sum_sq_diff_norm': jnp.asarray(np.sum(rest**2)),
      'sum_sq_diff_inner': jnp.asarray(np.sum((rest @ mean) ** 2)),
      'sample_size': jnp.int32(n),
    }
    # theta so large that the orthogonal part decides.
    test = optlab.augmented_inner_product_test(1e9, 1.0)
    ask = lambda test: float(test.update(jnp.asarray(mean), (), **extras)[0])
    request = ask(test)
    along = ask(optlab.inner_product_test(1.0))
  v_ip = along * grad_sq**2
  trace = np.sum(rest**2) / (n - 1)
  np.testing.assert_allclose(v_ip / grad_sq + v_orth, trace, rtol=1e-10)
  np.testing.assert_allclose(
    request * grad_sq, v_orth, rtol=1e-10, atol=1e-12 * trace
  )


ROWS = np.random.default_rng(0).normal(size=(8, 3)) + 0.3


def test_the_batch_never_shrinks():
  rule = optlab.grow_batch(optlab.norm_test(0.5), 4, 1000)
  extras = {'sample_size': jnp.int32(8)}
  grads = jnp.ones(4)
  state = rule.init(grads)
  sizes = []
  for total in (7.0, 700.0, 0.0, 70.0, 1e9):
    _, state = rule.update(
      grads, state, sum_sq_diff_norm=jnp.float32(total), **extras
    )
    sizes.append(int(state.batch_size))
  # total / 7 / (0.25 * 4)
  assert sizes == [4, 100, 100, 100, 1000]


def test_interval_cap_and_multiples():
  extras = {
    'sample_size': jnp.int32(8), 'sum_sq_diff_norm': jnp.float32(7.0 * 90.0),
  }  # fmt: skip
  grads = jnp.ones(4)

  def sizes(steps, **kwargs):
    rule = optlab.grow_batch(optlab.norm_test(0.5), 4, 96, **kwargs)
    state = rule.init(grads)
    found = []
    for _ in range(steps):
      _, state = rule.update(grads, state, **extras)
      found.append(int(state.batch_size))
    return found

  assert sizes(1) == [90]
  assert sizes(4, growth_cap=2.0) == [8, 16, 32, 64]
  assert sizes(3, growth_cap=1.5, test_interval=2) == [6, 6, 9]
  assert sizes(1, multiple_of=4) == [92]
  assert sizes(2, multiple_of=4, growth_cap=2.5) == [12, 32]
  # A cap of less than one example.
  assert sizes(2, growth_cap=1.01) == [5, 6]
  assert sizes(2, multiple_of=4, growth_cap=1.01) == [8, 12]


def test_the_largest_int32_and_narrow_floats_do_not_overflow():
  top = np.iinfo(np.int32).max
  grads = jnp.ones(4)
  for request in (1e30, float(top), 3e9):
    rule = optlab.grow_batch(lambda grads, request=request: request, 2, top)
    _, state = rule.update(grads, rule.init(grads))
    assert state.batch_size == top
  rule = optlab.grow_batch(lambda grads: 2147483500.0, 2, top)
  _, state = rule.update(grads, rule.init(grads))
  # float32 has a spacing of 128 there.
  assert 2147483392 <= int(state.batch_size) <= 2147483520


def test_zero_gradient_with_variance_asks_for_the_maximum(x64):
  rows = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])
  estimate = estimate_of(rows)
  hyper = {'eta': 0.5, 'theta': 0.5, 'nu': 0.5}
  found = {
    name: int(after_one(make(hyper), estimate).batch_size)
    for name, make in TESTS.items()
  }
  assert found == {
    'norm': 100, 'coordinate': 100, 'inner_product': 4, 'augmented': 100,
  }  # fmt: skip


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('name', TESTS)
def test_a_gradient_that_is_not_finite_keeps_the_size(name, bad):
  rows = jnp.asarray(ROWS).at[2, 1].set(bad)
  test = TESTS[name]({'eta': 0.1, 'theta': 0.1, 'nu': 0.1})
  for route in ROUTES if name != 'coordinate' else ['vmap']:
    assert after_one(test, estimate_of(rows, route)).batch_size == 4
  # It would have grown.
  assert after_one(test, estimate_of(jnp.asarray(ROWS))).batch_size > 4


def test_a_nan_in_the_middle_of_a_run():
  """The size stays, and the run goes on behind apply_if_finite."""
  rows = jnp.asarray(ROWS, jnp.float32)
  estimator = optlab.per_example(
    lambda p, b: (b @ p - 1.0) ** 2, optlab.ghost_norms
  )
  tx = optax.apply_if_finite(
    optlab.adadagrad(0.1, optlab.norm_test(1.0), 4, 1000), 5
  )
  step = jax.jit(optlab.train_step(estimator, tx))
  state = optlab.init(jnp.zeros(3), estimator, tx)
  state, _ = step(state, rows)
  before = state
  state, _ = step(state, rows.at[0, 0].set(jnp.nan))
  assert optlab.batches.next_size(state) == optlab.batches.next_size(before)
  np.testing.assert_array_equal(state.params, before.params)
  state, value = step(state, rows)
  assert np.isfinite(value)
  assert not np.array_equal(state.params, before.params)


def test_one_example_keeps_the_size():
  estimate = estimate_of(jnp.asarray(ROWS[:1]))
  for make in TESTS.values():
    test = make({'eta': 0.1, 'theta': 0.1, 'nu': 0.1})
    assert after_one(test, estimate).batch_size == 4


def test_behind_a_clipping_the_rule_sees_the_raw_gradient():
  estimate = estimate_of(jnp.asarray(ROWS))
  rule = optlab.grow_batch(optlab.norm_test(0.5), 4, 1000)
  tx = optax.chain(optax.clip_by_global_norm(1e-3), rule)
  _, state = tx.update(
    estimate.grads, tx.init(estimate.grads), grad=estimate.grads,
    **estimate.extras,
  )  # fmt: skip
  expected = after_one(optlab.norm_test(0.5), estimate, 4, 1000)
  assert optlab.batches.next_size(state) == expected.batch_size


@pytest.mark.parametrize('name', TESTS)
def test_missing_moments_name_their_maker(name):
  rule = optlab.grow_batch(
    TESTS[name]({'eta': 1.0, 'theta': 1.0, 'nu': 1.0}), 4, 100
  )
  grads = jnp.ones(3)
  with pytest.raises(ValueError, match=r'needs the extra.*per_example\('):
    rule.update(grads, rule.init(grads))


def test_adadagrad_is_adagrad_behind_the_rule():
  estimate = estimate_of(jnp.asarray(ROWS, jnp.float32))
  for ours, theirs in (
    (optlab.adadagrad, optax.adagrad),
    (optlab.adadagrad_norm, optlab.adagrad_norm),
  ):
    tx = ours(0.1, optlab.norm_test(0.5), 4, 1000)
    state, plain = tx.init(estimate.grads), theirs(0.1)
    updates, state = tx.update(estimate.grads, state, **estimate.extras)
    expected, _ = plain.update(estimate.grads, plain.init(estimate.grads))
    np.testing.assert_array_equal(updates, expected)
    assert optlab.batches.next_size(state) > 4


@pytest.mark.parametrize(
  ('make', 'name'),
  [
    (optlab.norm_test, 'eta'),
    (optlab.batches.coordinate_norm_test, 'eta'),
    (optlab.inner_product_test, 'theta'),
    (lambda value: optlab.augmented_inner_product_test(value, 1.0), 'theta'),
    (lambda value: optlab.augmented_inner_product_test(1.0, value), 'nu'),
  ],
)
@pytest.mark.parametrize('value', [0.0, -1.0, float('nan')])
def test_bad_constants_of_the_tests(make, name, value):
  with pytest.raises(ValueError, match=f'{name} must be in'):
    make(value)


@pytest.mark.parametrize(
  ('kwargs', 'error', 'message'),
  [
    ({'batch_size': 1}, ValueError, 'batch_size must be at least 2'),
    ({'batch_size': 8.0}, TypeError, 'batch_size must be an integer'),
    ({'batch_size': 101}, ValueError, 'at most max_batch_size=100, got 101'),
    ({'max_batch_size': 1}, ValueError, 'max_batch_size must be at least 2'),
    ({'max_batch_size': 2**31}, ValueError, 'must be an int32'),
    ({'test_interval': 0}, ValueError, 'test_interval must be at least 1'),
    ({'growth_cap': 1.0}, ValueError, 'growth_cap must be in'),
    ({'growth_cap': float('nan')}, ValueError, 'growth_cap must be in'),
    ({'multiple_of': 0}, ValueError, 'multiple_of must be at least 1'),
    ({'multiple_of': 3}, ValueError, 'batch_size must be a multiple.*take 9'),
    ({'test': 'norm'}, TypeError, 'test must be a function'),
  ],
)
def test_bad_arguments_of_the_rule(kwargs, error, message):
  arguments = {
    'test': optlab.norm_test(0.5), 'batch_size': 8, 'max_batch_size': 100,
  }  # fmt: skip
  with pytest.raises(error, match=message):
    optlab.grow_batch(**(arguments | kwargs))


def test_sizes_may_be_traced():
  """Constant and growing batches side by side, under one vmap."""
  estimate = estimate_of(jnp.asarray(ROWS, jnp.float32))

  def next_size(size, limit):
    return after_one(optlab.norm_test(0.1), estimate, size, limit).batch_size

  sizes = jax.jit(jax.vmap(next_size))(jnp.asarray([4, 8]), jnp.asarray([8, 8]))
  np.testing.assert_array_equal(sizes, [8, 8])
