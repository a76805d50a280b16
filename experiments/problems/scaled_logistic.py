r"""A weight for each training row, tuned for a hundred scaled logistic losses.

.. math::
  g_i(p, w) &= \text{mean}_j\, \sigma(p_j)\, \ell(z_j^\top w / \tau_i)
    + \tfrac{\lambda}{2} |w|^2 \\
  f_i(w) &= \text{mean}_{\text{validation}}\, \ell(z^\top w / \tau_i)

with :math:`\ell(a) = \log(1 + e^{-a})`, rows :math:`z` that carry their label
as a sign, and one scale :math:`\tau_i` for each block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets as sklearn_datasets

from ..lab import flags
from . import data as data_lib


class Split(NamedTuple):
  """Signed rows, with a constant feature in front."""

  train: np.ndarray  # shape (rows, features + 1)
  validation: np.ndarray
  test: np.ndarray


@jax.custom_jvp
def log_loss(margin: jax.Array) -> jax.Array:
  """``log(1 + exp(-margin))`` whose derivatives take one exponential."""
  return jax.nn.softplus(-margin)


@log_loss.defjvp
def _log_loss_jvp(primals, tangents):
  (margin,), (tangent,) = primals, tangents
  return log_loss(margin), -jax.nn.sigmoid(-margin) * tangent


def pick(array: jax.Array, index: jax.Array) -> jax.Array:
  """``array[index]`` for indices known to be in range, which is faster."""
  return array.at[index].get(
    mode='promise_in_bounds', wrap_negative_indices=False
  )


class Levels(NamedTuple):
  """The two objectives, for batches ``(rows, scale)``, lower with indices."""

  l2: float

  def lower(self, p, w, batch):
    rows, index, scale = batch
    losses = jax.nn.sigmoid(pick(p, index)) * log_loss(rows @ w / scale)
    return jnp.mean(losses) + 0.5 * self.l2 * jnp.sum(w**2)

  def upper(self, p, w, batch):
    del p
    rows, scale = batch
    return jnp.mean(log_loss(rows @ w / scale))


def scales(num_blocks: int, random: np.random.Generator) -> np.ndarray:
  """The scale of each block's loss, log-uniform from 1/2 to 5."""
  return np.exp(random.uniform(np.log(0.5), np.log(5.0), num_blocks))


def resolve(name: str, data_dir: str) -> str:
  """The data set that ``auto`` stands for; another name as it is."""
  return ('a8a' if data_dir else 'mushrooms') if name == 'auto' else name


def load(
  name: str,
  data_dir: str,
  *,
  keep_positive: float = 1.0,
  flip: float = 0.0,
  random: np.random.Generator,
) -> Split:
  """A data set of two classes, split 64 / 16 / 20 or by its test file.

  Args:
    name: A name that `data.load` takes; ``auto`` is a8a if there is a
      ``data_dir``, else mushrooms.
    data_dir: The folder with it.
    keep_positive: Fraction of the positive training rows to keep.
    flip: Fraction of the training labels to turn over after that.
    random: Draws the split, what is kept, and what is flipped.

  Returns:
    A `Split`; validation and test rows are clean, and apart from the training
    rows.

  Raises:
    UserError: The data are missing or have not two classes.
  """
  name = resolve(name, data_dir)
  full = data_lib.load(name, data_dir)
  rows = _signed(data_lib.dense(full), data_lib.signs(full))
  test = _test_file(name, data_dir, rows.shape[1] - 1)
  order = random.permutation(len(rows))
  if test is None:
    held = len(rows) // 5
    test, order = rows[order[:held]], order[held:]
  held = len(order) // 5
  validation, train = rows[order[:held]], rows[order[held:]]
  positive = train[:, 0] > 0  # The constant feature carries the label.
  keep = ~positive | (random.uniform(size=len(train)) < keep_positive)
  train = train[keep]
  flipped = random.uniform(size=len(train)) < flip
  train = np.where(flipped[:, None], -train, train)
  if not min(len(train), len(validation), len(test)):
    raise flags.UserError(
      f'{full.name}: {len(train)} rows to train on, {len(validation)} to'
      f' validate and {len(test)} to test are too few'
    )
  return Split(train, validation, test)


def _signed(features, signs) -> np.ndarray:
  ones = np.ones((len(features), 1))
  return np.hstack([ones, features]) * np.asarray(signs)[:, None]


def _test_file(name, data_dir, num_features) -> np.ndarray | None:
  file = f'{name}_testing.libsvm.gz'
  try:
    data_lib.find(file, data_dir)
  except flags.UserError:
    return None
  test = data_lib.load(file, data_dir, num_features)
  return _signed(data_lib.dense(test), data_lib.signs(test))


def synthetic(rows: int, features: int, random: np.random.Generator) -> Split:
  """Rows of a8a's shape, for where its file is absent."""
  x, y = sklearn_datasets.make_classification(
    rows, features, n_informative=20, random_state=0
  )
  order = random.permutation(rows)
  signed = _signed((x > 0).astype(float), 2.0 * y - 1.0)[order]
  held = rows // 5
  return Split(signed[2 * held :], signed[:held], signed[held : 2 * held])
