"""Tables of numbers, split, scaled and whitened; and noise fitted to them."""

import csv
import io
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

import optlab

from ..lab import flags
from . import data

NAMES = ('digits', 'breast_cancer', 'wine')
MIN_ROWS = 50
COMPONENTS, EM_STEPS = 4, 60


class Split(NamedTuple):
  """A split, in coordinates where the training rows are white.

  Attributes:
    train: ``[rows, d]``.
    valid: For rates, and for stopping early.
    test: For what is reported.
    log_det: By how much the negative log density is larger before whitening.
  """

  train: jax.Array
  valid: jax.Array
  test: jax.Array
  log_det: jax.Array


def load(name: str) -> tuple[np.ndarray, int | None]:
  """The rows of ``digits``, ``digits:8``, ``wine``, or of a CSV file.

  Args:
    name: A set, and after a colon how many principal components are kept.

  Returns:
    Rows without constant columns, and the number of components or ``None``.

  Raises:
    UserError: There is no such set, or it cannot be used.
  """
  stem, _, number = name.rpartition(':') if ':' in name else (name, '', '')
  if number and not (number.isdigit() and int(number) > 0):
    raise flags.UserError(f'--sets={name}: after the colon stands a dimension')
  if stem in NAMES:
    loaded: Any = getattr(datasets, f'load_{stem}')()
    rows = np.asarray(loaded.data, float)
  elif pathlib.Path(stem).is_file():
    rows = read(pathlib.Path(stem))
  else:
    raise flags.UserError(
      f'--sets={name}: not one of {", ".join(NAMES)}, and no file'
    )
  rows = rows[:, np.ptp(rows, axis=0) > 0]
  keep = int(number) if number else None
  if len(rows) < MIN_ROWS or rows.shape[1] < 2:
    raise flags.UserError(
      f'--sets={name}: has {rows.shape[0]} rows of {rows.shape[1]} columns that'
      f' vary, at least {MIN_ROWS} of 2 are needed'
    )
  if keep is not None and not 2 <= keep <= rows.shape[1]:
    raise flags.UserError(
      f'--sets={name}: keep 2 to {rows.shape[1]} components'
    )
  return rows, keep


def _is_number(word: str) -> bool:
  try:
    float(word)
  except ValueError:
    return False
  return True


def read(path: pathlib.Path) -> np.ndarray:
  """Reads a file of comma-separated numbers, plain or packed.

  Args:
    path: The file. A first line of words alone is its head.

  Returns:
    float64 [rows, columns].

  Raises:
    UserError: It can't be read, or is of anything else; the message says where.
  """
  rows: list[list[float]] = []
  text = io.StringIO(data.read(path).decode(errors='replace'), newline='')
  try:
    lines = list(csv.reader(text))
  except csv.Error as error:
    raise flags.UserError(f'{path}: {error}') from error
  for number, line in enumerate(lines, 1):
    if not line or (number == 1 and not any(map(_is_number, line))):
      continue
    if not all(map(_is_number, line)):
      raise flags.UserError(
        f'{path}: line {number} is not numbers: {",".join(line)[:60]!r}'
      )
    values = [float(word) for word in line]
    if (rows and len(values) != len(rows[0])) or not np.isfinite(values).all():
      raise flags.UserError(
        f'{path}: line {number} has {len(values)} numbers, not'
        f' {len(rows[0]) if rows else 1} finite ones'
      )
    rows.append(values)
  if not rows:
    raise flags.UserError(f'{path}: has no rows of numbers')
  return np.asarray(rows).reshape(len(rows), -1)


def split(key: jax.Array, rows: jax.Array, keep: int | None) -> Split:
  """Three fifths for training, a fifth each for validation and test."""
  fifth = rows.shape[0] // 5
  rows = rows[jax.random.permutation(key, rows.shape[0])]
  train = rows[2 * fifth :]
  mean, scale = jnp.mean(train, 0), jnp.std(train, 0)
  if keep is not None:
    # Components of the raw columns, all in one unit: the first one's length.
    _, size, axes = jnp.linalg.svd(train - mean, full_matrices=False)
    unit = size[0] / train.shape[0] ** 0.5
    rows = (rows - mean) @ axes[:keep].T / unit
  else:
    rows = (rows - mean) / jnp.where(scale > 0, scale, 1)
  train = rows[2 * fifth :]
  covariance = jnp.cov(train.T) + 1e-3 * jnp.eye(rows.shape[1])
  factor = jnp.linalg.cholesky(covariance)
  rows = jax.scipy.linalg.solve_triangular(
    factor, (rows - jnp.mean(train, 0)).T, lower=True
  ).T
  return Split(
    rows[2 * fifth :], rows[:fifth], rows[fifth : 2 * fifth],
    jnp.sum(jnp.log(jnp.diagonal(factor))),
  )  # fmt: skip


def fit_mixture(
  key: jax.Array, rows: jax.Array, components: int, ridge: float = 0.02
) -> optlab.unnormalized.GaussianMixture:
  """Expectation maximization from rows drawn by chance."""
  size, dim = rows.shape
  eye = jnp.eye(dim)

  def maximize(share):
    total = jnp.sum(share, 0) + 1e-6 * size
    means = share.T @ rows / total[:, None]
    gaps = rows[:, None] - means
    covariances = jnp.einsum('nk,nki,nkj->kij', share, gaps, gaps)
    covariances = covariances / total[:, None, None] + ridge * eye
    return optlab.unnormalized.gaussian_mixture(
      total / jnp.sum(total), means, covariances
    )

  first = rows[jax.random.permutation(key, size)[:components]]
  start = optlab.unnormalized.gaussian_mixture(
    jnp.ones(components), first, jnp.broadcast_to(eye, (components, dim, dim))
  )

  def step(_, found):
    return maximize(jax.nn.softmax(found.component_log_prob(rows), -1))

  return jax.lax.fori_loop(0, EM_STEPS, step, step(0, start))


def noise(key: jax.Array, train: jax.Array) -> Any:
  """A mixture of four parts, wider than fitted, and a tenth of a wide one."""
  found = fit_mixture(key, train, COMPONENTS, 0.1)
  dim = train.shape[1]
  wide = jnp.eye(dim)[None]
  covariances = found.scales @ jnp.swapaxes(found.scales, 1, 2)
  return optlab.unnormalized.gaussian_mixture(
    jnp.append(0.9 * jnp.exp(found.log_weights), 0.1),
    jnp.concatenate([found.means, jnp.zeros((1, dim))]),
    jnp.concatenate([1.15 * covariances, 2.25 * wide]),
  )


def kernel_density(split: Split) -> tuple[jax.Array, jax.Array]:
  """Held-out losses of a Gaussian at every training row.

  Args:
    split: The split.

  Returns:
    Mean negative log densities of validation and test rows, at the bandwidth
    that is best on validation rows.
  """
  dim = split.train.shape[1]

  def losses(width):
    def loss(rows):
      gaps = jnp.sum((rows[:, None] - split.train) ** 2, -1)
      log_p = jax.nn.logsumexp(-gaps / (2 * width**2), 1)
      log_p -= jnp.log(split.train.shape[0])
      return -jnp.mean(log_p) + dim * jnp.log(width * jnp.sqrt(2 * jnp.pi))

    return loss(split.valid), loss(split.test)

  valid, test = jax.lax.map(losses, jnp.geomspace(0.1, 2.0, 30))
  best = jnp.argmin(valid)
  return valid[best], test[best]
