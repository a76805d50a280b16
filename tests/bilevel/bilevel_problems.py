"""Bilevel problems with known solutions, for the tests of the estimators."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'bilevel'


class Problem(NamedTuple):
  """Objectives without samples, and what is known at ``x``."""

  upper: Any
  lower: Any
  x: np.ndarray
  inner: np.ndarray  # y*(x)
  dual: np.ndarray  # z at (x, y*)
  value: np.ndarray
  hypergradient: np.ndarray


def _problem(upper, lower, data, inner='y_star'):
  return Problem(
    upper,
    lower,
    data['l'] if 'l' in data else data['x'],
    data[inner],
    data['v_star'],
    data['value'],
    data['hypergrad'],
  )


def read(name: str) -> dict[str, np.ndarray]:
  """The numbers of a golden file, in float64."""
  data = json.loads((GOLDEN / f'{name}.json').read_text())
  del data['doc']
  return {key: np.asarray(value, float) for key, value in data.items()}


def load(name: str) -> Problem:
  """The problem of a golden file, in float64."""
  return _MAKERS[name](read(name))


def _quadratic(data):
  def lower(x, y, batch):
    del batch
    return 0.5 * y @ data['A'] @ y - (data['B'] @ x + data['c']) @ y

  def upper(x, y, batch):
    del batch
    return 0.5 * jnp.sum((y - data['t']) ** 2) + 0.5 * data['rho'] * x @ x

  return _problem(upper, lower, data)


def _validation(data):
  def upper(x, y, batch):
    del x, batch
    return jnp.mean((data['Xv'] @ y - data['bv']) ** 2) / 2

  return upper


def _ridge(data):
  def lower(x, y, batch):
    del batch
    fit = jnp.mean((data['X'] @ y - data['b']) ** 2) / 2
    return fit + 0.5 * jnp.sum(jnp.exp(x) * y**2)

  return _problem(_validation(data), lower, data, 'w_star')


def _cleaning(data):
  def lower(x, y, batch):
    del batch
    losses = (data['X'] @ y - data['b']) ** 2 / 2
    return jnp.mean(jax.nn.sigmoid(x) * losses) + 0.05 * y @ y

  return _problem(_validation(data), lower, data, 'w_star')


def _cosh(data):
  def lower(x, y, batch):
    del batch
    return 0.5 * y @ data['A'] @ y - (data['A'] @ data['B'] @ x) @ y

  def upper(x, y, batch):
    del x, batch
    return 2 * jnp.mean(jnp.cosh(y - data['t'])) - 2

  # The file gives no dual: the hypergradient is B' A z, so it follows.
  dual = np.linalg.solve((data['A'] @ data['B']).T, data['hypergrad'])
  return _problem(upper, lower, {**data, 'v_star': dual})


_MAKERS = {
  'quadratic_single': _quadratic,
  'ridge_log_penalty': _ridge,
  'weighted_least_squares_cleaning': _cleaning,
  'unbounded_cosh': _cosh,
}
NAMES = tuple(_MAKERS)
