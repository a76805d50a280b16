"""SPSA: a whole method and its tests, the example of `docs/adding_a_method.md`.

Spall, *Multivariate Stochastic Approximation Using a Simultaneous Perturbation
Gradient Approximation*, IEEE TAC 1992, https://doi.org/10.1109/9.119632.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import base
from optlab import checks
from tests import contract
from tests import contract_test


class SpsaState(NamedTuple):
  """State of `spsa`."""

  key: jax.Array  # shape (), typed PRNG key


def spsa(fun, scale=0.01):
  r"""The gradient along one random direction, from two losses alone.

  Choose it where the loss can be evaluated but not differentiated.

  .. math:: \hat g = \frac{f(x + c \Delta) - f(x - c \Delta)}{2 c}\, \Delta,
    \quad \Delta_j = \pm 1

  Args:
    fun: The loss, ``(params, batch) -> scalar``.
    scale: The length c of the perturbation of a coordinate, positive.

  Returns:
    A `GradientEstimator`; ``init(params, key)`` takes a PRNG key.

  Raises:
    TypeError: ``fun`` is not a function.
    ValueError: ``scale`` is not positive.

  Notes:
    Cost: two losses. The variance grows with the number of parameters.
  """
  checks.check_callable('fun', fun, '(params, batch) -> scalar')
  checks.check_positive('scale', scale)

  def init(params, key):
    del params
    return SpsaState(jax.random.clone(key))  # A copy: both may be donated.

  def estimate(params, state, batch):
    key, subkey = jax.random.split(state.key)
    signs = optax.tree.random_like(subkey, params, jax.random.rademacher)
    above = fun(optax.tree.add_scale(params, scale, signs), batch)
    below = fun(optax.tree.add_scale(params, -scale, signs), batch)
    slope = (above - below) / (2 * scale)
    grads = jax.tree.map(lambda sign: (slope * sign).astype(sign.dtype), signs)
    return base.Estimate((above + below) / 2, grads), SpsaState(key)

  return base.GradientEstimator(init, estimate)


ROW = contract.Row(
  'spsa',
  lambda scale: (spsa(contract.loss, scale), optax.sgd(0.05)),
  hyper=0.1,
  inner=lambda dtype: (jax.random.key(7),),
)


@pytest.mark.parametrize(
  'contract',
  [
    contract_test.test_float64_is_kept_and_float32_not_promoted,
    contract_test.test_jit_scan_and_donation_agree_and_the_loss_falls,
    contract_test.test_vmap_over_seeds_and_hyperparameters,
    contract_test.test_sharded_batch_gives_the_same_numbers,
  ],
)
def test_contract(contract, monkeypatch):
  monkeypatch.setattr(contract_test, 'ROWS', [ROW])
  contract(ROW)


def test_state_and_checkpoint(monkeypatch, tmp_path):
  monkeypatch.setattr(contract_test, 'ROWS', [ROW])
  make_params = contract_test.tree_params
  contract_test.test_state_in_equals_state_out(ROW, make_params)
  contract_test.test_resumes_bit_for_bit_from_orbax(ROW, tmp_path)


def test_mean_over_keys_is_the_gradient_of_a_quadratic(x64):
  weights, x = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, -1.0, 0.5])
  estimator = spsa(lambda x, batch: weights @ x**2, 0.1)

  def grads(key):
    estimate, _ = estimator.estimate(x, estimator.init(x, key), None)
    return estimate.grads

  mean = jax.vmap(grads)(jax.random.split(jax.random.key(0), 20_000)).mean(0)
  np.testing.assert_allclose(mean, 2 * weights * x, atol=0.1)


def test_descends_a_staircase_where_every_gradient_is_zero():
  def stairs(x, batch):
    return jnp.sum(jnp.abs(jnp.round(20 * x))) / 20

  x = jnp.array([2.0, -3.0])
  assert not jnp.any(jax.grad(stairs)(x, None))
  estimator, tx = spsa(stairs, 0.2), optax.sgd(0.05)
  state = optlab.init(x, estimator, tx, jax.random.key(0))
  step = optlab.train_step(estimator, tx)
  state, _ = jax.jit(
    lambda state: jax.lax.scan(lambda s, _: step(s, None), state, length=300)
  )(state)
  assert stairs(state.params, None) < 0.5


@pytest.mark.parametrize('scale', [0.0, -1.0, float('nan')])
def test_bad_scale(scale):
  with pytest.raises(ValueError, match='scale must be'):
    spsa(lambda x, batch: x, scale)
