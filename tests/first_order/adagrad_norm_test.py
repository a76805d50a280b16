"""AdaGrad-Norm: one scalar for the whole model."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'batch_growth'
CASES = json.loads((GOLDEN / 'adagrad_norm.json').read_text())['cases']


def arrays(tree, dtype):
  return [jnp.asarray(np.asarray(leaf), dtype) for leaf in tree]


@pytest.mark.parametrize('case', CASES, ids=lambda case: case['name'])
@pytest.mark.parametrize(
  ('dtype', 'rtol'), [(jnp.float64, 1e-12), (jnp.float32, 1e-5)]
)
def test_golden_trajectory(x64, case, dtype, rtol):
  tx = optlab.adagrad_norm(**case['hyper'])
  params = arrays(case['params0'], dtype)
  state = tx.init(params)
  for grads, expected, total in zip(
    case['grads'], case['params'], case['sum_of_squares'], strict=True
  ):
    updates, state = tx.update(arrays(grads, dtype), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
      optax.tree.get(state, 'sum_of_squares'), total, rtol=rtol
    )
    for leaf, want in zip(params, expected, strict=True):
      assert leaf.dtype == dtype
      np.testing.assert_allclose(leaf, want, rtol=rtol, atol=1e-6 * rtol)


def test_all_rows_and_leaves_share_one_sum():
  """Fails for one sum a row, a leaf, or a coordinate (AdaGrad)."""
  tx = optlab.first_order.scale_by_adagrad_norm(0.0)
  grads = {'w': jnp.asarray([[3.0, 0.0], [0.0, 4.0]]), 'b': jnp.asarray([12.0])}
  updates, state = tx.update(grads, tx.init(grads))
  np.testing.assert_allclose(state.sum_of_squares, 169.0)
  # The direction is the gradient's; its length 1.
  for name, grad in grads.items():
    np.testing.assert_allclose(updates[name], grad / 13.0, rtol=1e-6)
  # The sum and its unit.
  assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(), ()]


def test_accumulator_and_gradient_zero_give_zero():
  tx = optlab.adagrad_norm(1.0, initial_accumulator_value=0.0)
  zero = jnp.zeros(3)
  updates, _ = tx.update(zero, tx.init(zero))
  np.testing.assert_array_equal(updates, 0.0)


def test_bfloat16_is_summed_in_float32():
  tx = optlab.first_order.scale_by_adagrad_norm(0.0)
  grads = jnp.ones(1000, jnp.bfloat16)
  updates, state = tx.update(grads, tx.init(grads))
  assert updates.dtype == jnp.bfloat16
  # In bfloat16 the sum of 1000 ones would stop at 256.
  assert state.sum_of_squares.dtype == jnp.float32
  assert state.sum_of_squares == 1000.0


def test_nan_is_told_and_skipped_by_apply_if_finite():
  bad = jnp.asarray([jnp.nan, 1.0])
  plain = optlab.adagrad_norm(1.0)
  updates, _ = plain.update(bad, plain.init(bad))
  assert np.all(np.isnan(updates))
  tx = optax.apply_if_finite(optlab.adagrad_norm(1.0), 3)
  updates, state = tx.update(bad, tx.init(bad))
  np.testing.assert_array_equal(updates, 0.0)
  updates, _ = tx.update(jnp.ones(2), state)
  assert np.all(np.isfinite(updates))


@pytest.mark.parametrize('name', ['initial_accumulator_value', 'eps'])
@pytest.mark.parametrize('value', [-1.0, float('nan'), float('inf')])
def test_bad_numbers_are_named(name, value):
  with pytest.raises(ValueError, match=f'{name} must be in'):
    optlab.adagrad_norm(1.0, **{name: value})
