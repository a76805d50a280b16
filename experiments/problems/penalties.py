"""Regressions whose penalty is learned, and whose best penalty is known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from sklearn import datasets

from ..lab import flags
from ..lab import tuning

# Log penalty before learning.
START = {'ridge': -7.0, 'logistic': 0.0}
# Few rows to train on, so that a penalty helps.
TRAIN_ROWS, VALID_ROWS = 40, 200


def split(features, targets):
  """Rows to train on, to validate and to test."""
  order = np.random.RandomState(0).permutation(len(targets))
  rows = np.split(order, [TRAIN_ROWS, TRAIN_ROWS + VALID_ROWS])
  features = (features - features.mean(0)) / features.std(0)
  return [(features[part], targets[part]) for part in rows]


def tables(kind: str, precision: str) -> dict[str, tuple[np.ndarray, ...]]:
  """The rows to train on, to validate and to test."""
  bunch: Any = (
    datasets.load_diabetes() if kind == 'ridge'
    else datasets.load_breast_cancer()
  )  # fmt: skip
  targets = 2.0 * bunch.target - 1.0
  if kind == 'ridge':
    targets = (bunch.target - bunch.target.mean()) / bunch.target.std()
  parts = [
    tuple(np.asarray(leaf, precision) for leaf in part)
    for part in split(bunch.data, targets)
  ]
  return dict(zip(('train', 'valid', 'test'), parts, strict=True))


def newton(g: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
  """The minimizer of a convex function: exact of a quadratic one."""

  def body(y, _):
    step = jnp.linalg.solve(jax.hessian(g)(y), jax.grad(g)(y))
    # Damped far away, where a full step may overshoot.
    return y - step / (1.0 + 0.1 * jnp.linalg.norm(step)), None

  return jax.lax.scan(body, y, length=40)[0]


def linear(
  kind: str, batch: int, precision: str
) -> tuple[tuning.Problem, float, float]:
  """A regression with its log penalty as the upper variable.

  Args:
    kind: ``ridge`` (diabetes data) or ``logistic`` (breast cancer data).
    batch: Rows of a sample.
    precision: Floating point type.

  Returns:
    The problem, the best log penalty and its validation loss, which a line
    search finds.

  Raises:
    UserError: The rows are not a multiple of the batch.
  """
  if TRAIN_ROWS % batch or VALID_ROWS % batch:
    raise flags.UserError(
      f'--batch={batch}: must divide {TRAIN_ROWS} and {VALID_ROWS} rows'
    )
  ridge, data = kind == 'ridge', tables(kind, precision)

  def loss(y, part):
    features, targets = part
    scores = features @ y
    if ridge:
      return jnp.mean((scores - targets) ** 2) / 2
    return jnp.mean(jax.nn.softplus(-targets * scores))

  def upper(x, y, batch):
    del x
    return loss(y, batch)

  def lower(x, y, batch):
    return loss(y, batch) + 0.5 * jnp.exp(x) * jnp.sum(y**2)

  blocks = (VALID_ROWS // batch, TRAIN_ROWS // batch)

  def sample(key, data):
    keys = jax.random.split(key)
    return tuple(
      tuning.draw_block(key, data[part], count)
      for key, part, count in zip(keys, ('valid', 'train'), blocks, strict=True)
    )

  def start(key, data):
    del key
    size = data['train'][0].shape[1]
    return jnp.asarray(START[kind], precision), jnp.zeros(size, precision)

  def solve(x, data):
    zeros = jnp.zeros(data['train'][0].shape[1], precision)
    return newton(lambda y: lower(x, y, data['train']), zeros)

  @jax.jit
  def value(x):
    return loss(solve(x, data), data['valid'])

  found = scipy.optimize.minimize_scalar(
    lambda x: float(value(jnp.asarray(x, precision))),
    bounds=(-12.0, 5.0),
    method='bounded',
    options={'xatol': 1e-6},
  )

  def measure(x, y, data):
    del y
    exact = solve(x, data)
    valid_loss = loss(exact, data['valid'])
    return {
      'valid_loss': valid_loss,
      'regret': jnp.maximum(valid_loss - found.fun, 0.0),
      'test_loss': loss(exact, data['test']),
      'log_penalty': x,
    }

  problem = tuning.Problem(
    upper, lower, data, sample, start, measure,
    ('regret', 'test_loss', 'log_penalty'), blocks=blocks,
  )  # fmt: skip
  return problem, float(found.x), float(found.fun)
