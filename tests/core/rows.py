"""Rows of the contract table: estimators for any method."""

import optax

import optlab
from tests.contract import Row
from tests.contract import loss
from tests.contract import plain

ROWS = [
  Row('value_and_grad', plain(optax.sgd), 0.1),
  Row(
    'estimate_if_finite',
    lambda rate: (
      optlab.estimators.estimate_if_finite(optlab.value_and_grad(loss)),
      optax.sgd(rate),
    ),
    0.1,
  ),
]
