"""Rows of the contract table: first-order optimizers."""

import jax.numpy as jnp

import optlab
from tests.contract import Row
from tests.contract import plain

ROWS = [
  Row('diffgrad', plain(optlab.diffgrad), 0.1, True),
  Row(
    'diffgrad_coupled',
    plain(
      lambda hyper: optlab.diffgrad(
        hyper,
        weight_decay=1e-3,
        decoupled=False,
        eps_uncorrected=True,
        mu_dtype=jnp.bfloat16,
      )
    ),
    0.1,
    True,
  ),
  Row('adagrad_norm', plain(optlab.adagrad_norm), 1.0, True),
  Row(
    'normalized_momentum',
    plain(optlab.normalized_momentum),
    0.1,
    is_transformation=True,
  ),
  Row(
    'normalized_descent',
    plain(lambda rate: optlab.normalized_momentum(rate, beta=0.0)),
    0.05,
    is_transformation=True,
  ),
]
