"""Checks that skip tracers, and the tree helpers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optlab import base
from optlab import checks
from optlab import trees


@pytest.mark.parametrize(
  'value', [0.0, -1.0, np.nan, np.inf, np.array([1.0, 0.0])]
)
def test_check_positive_names_argument_value_and_remedy(value):
  with pytest.raises(
    ValueError, match=r'rate must be in \(0.0, inf\), got .* Try'
  ):
    checks.check_positive('rate', value, remedy='Try 0.1.')


@pytest.mark.parametrize(
  'value',
  [
    'a',
    None,
    True,
    [1.0],
    1j,
    np.array('a'),
    jnp.ones(2) * 1j,
    jnp.ones(2) > 0,
  ],
)
def test_check_positive_refuses_what_is_not_a_number(value):
  with pytest.raises(TypeError, match='rate must be a real number, got'):
    checks.check_positive('rate', value)


def test_checks_pass_good_values_schedules_and_tracers():
  for value in (
    1,
    0.5,
    np.float32(2.0),
    jnp.ones(()),
    jnp.ones((), jnp.bfloat16),
  ):
    checks.check_positive('rate', value)
  schedule = optax.constant_schedule(1.0)
  checks.check_positive('rate', schedule, schedule=True)
  with pytest.raises(TypeError, match=r'got <function .*inject_hyperparams'):
    checks.check_positive('rate', schedule)
  checks.check_non_negative('rate', 0.0)
  checks.check_real('b1', 0.0, low=0.0, high=1.0, high_open=True)
  with pytest.raises(ValueError, match=r'b1 must be in \[0.0, 1.0\), got 1.0'):
    checks.check_real('b1', 1.0, low=0.0, high=1.0, high_open=True)

  @jax.jit
  def traced(rate):
    checks.check_positive('rate', rate)
    return rate

  assert traced(-1.0) == -1.0


def test_check_int():
  checks.check_int('period', np.int64(3), 1)
  for value in (1.0, True, '1', None):
    with pytest.raises(TypeError, match='period must be an integer'):
      checks.check_int('period', value, 1)
  with pytest.raises(
    ValueError, match='period must be at least 1, got 0. Use 1.'
  ):
    checks.check_int('period', 0, 1, 'Use 1.')


def test_check_int_of_what_gives_no_shape():
  for value in (3, np.int64(3), jnp.int32(3), np.array(3)):
    checks.check_int('size', value, 2, traced=True)
  jax.jit(lambda n: checks.check_int('size', n, 2, traced=True))(1)
  with pytest.raises(ValueError, match='size must be at least 2, got 1'):
    checks.check_int('size', jnp.int32(1), 2, traced=True)
  for value in (jnp.ones(()), jnp.ones(2, int)):
    with pytest.raises(TypeError, match='size must be an integer'):
      checks.check_int('size', value, 2, traced=True)
  with pytest.raises(TypeError, match='pass a Python integer'):
    checks.check_int('size', jnp.int32(3), 2)


def test_check_fields_says_what_it_needs():
  checks.ESTIMATOR.check(
    'estimator', base.GradientEstimator(lambda p: (), lambda p, s, b: 1)
  )
  with pytest.raises(TypeError, match='estimate; got EmptyState'):
    checks.ESTIMATOR.check('estimator', optax.EmptyState())
  with pytest.raises(TypeError, match='tx must be an optax .*got NoneType'):
    checks.check_transformation('tx', None)


def test_check_same_tree_names_the_leaf():
  like = {'a': jnp.zeros(3), 'b': {'c': jnp.zeros((2, 2))}}
  checks.check_same_tree('y', like, 'x', like)
  with pytest.raises(ValueError, match=r"y\['b'\]\['c'\] has shape \(2,\)"):
    checks.check_same_tree(
      'y', {'a': like['a'], 'b': {'c': jnp.zeros(2)}}, 'x', like
    )
  with pytest.raises(ValueError, match='y must have the tree structure of x'):
    checks.check_same_tree('y', {'a': like['a']}, 'x', like)


def test_require_extra_names_what_is_missing_and_its_maker():
  checks.require_extra('gns_newton', 'value_and_grad', value=1.0)
  with pytest.raises(
    ValueError, match=r'extra arguments value, grad: .*optlab.vg'
  ):
    checks.require_extra('gns_newton', 'optlab.vg', value=None, grad=None, ok=1)


def test_all_finite():
  assert trees.all_finite({})
  assert trees.all_finite({'a': jnp.ones(3), 'b': jnp.zeros((), jnp.int32)})
  assert not trees.all_finite(
    {'a': jnp.ones(3), 'b': jnp.array([1.0, jnp.nan])}
  )
  assert not trees.all_finite(jnp.array([jnp.inf]))


def test_accumulator_dtype(x64):
  assert trees.accumulator_dtype({}) == jnp.float32
  assert trees.accumulator_dtype(jnp.zeros(2, jnp.bfloat16)) == jnp.float32
  assert trees.accumulator_dtype(jnp.zeros(2, jnp.float64)) == jnp.float64
