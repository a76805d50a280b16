"""Small images, and the noise fitted to them.

The noise is a mixture of Gaussians with a wide component mixed in; both are
fixed, so their log densities of data and of a pool of draws are computed once,
and a training row carries its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import mixture as sklearn_mixture

import optlab

from ..lab import flags
from . import data as data_lib

POOL = 20_000
WIDE_SHARE, WIDE_INFLATION = 0.05, 2.0


class Images(NamedTuple):
  """Pixels around [0, 1], with noise where they were quantized; classes."""

  rows: np.ndarray  # float32 [rows, side * side]
  labels: np.ndarray
  side: int
  levels: int  # Of a pixel's values.


def load(name: str, data_dir: str, seed: int) -> Images:
  """Digits 8x8, MNIST averaged to 14x14, or as it is; dequantized.

  Args:
    name: ``digits``, ``mnist`` or ``mnist28``.
    data_dir: Folder of MNIST's files.
    seed: Of the added noise.

  Returns:
    `Images`.
  """
  dataset = data_lib.load(name.removesuffix('28'), data_dir)
  pixels = data_lib.dense(dataset)
  side, levels = 8, 16
  if name == 'mnist':
    side, levels = 14, 255
    blocks = pixels.reshape(-1, side, 2, side, 2)
    pixels = blocks.mean((2, 4)).reshape(-1, side * side)
  elif name == 'mnist28':
    side, levels = 28, 255
  rng = np.random.default_rng(seed)
  # A twentieth of the range at least: flat pixels have no density to learn.
  width = max(1 / levels, 0.05)
  rows = pixels + width * (rng.uniform(size=pixels.shape) - 0.5)
  return Images(rows.astype(np.float32), dataset.labels, side, levels)


class Noise(NamedTuple):
  """The fitted mixture, the noise made of it, and a pool of its draws."""

  fitted: optlab.unnormalized.GaussianMixture
  noise: optlab.unnormalized.GaussianMixture
  pool: jax.Array  # [POOL, columns + 1], the last the fitted log density
  pool_log_prob: jax.Array  # [POOL]


def fit_noise(rows: np.ndarray, components: int, seed: int) -> Noise:
  """Fits the mixture to ``rows`` and fills the pool."""
  if components > len(rows):
    raise flags.UserError(
      f'--components={components}: more than the {len(rows)} training images'
    )
  # A step costs the cube of the columns, and from k-means few do.
  fit = sklearn_mixture.GaussianMixture(
    components,
    reg_covar=1e-3,
    random_state=seed,
    max_iter=50 if rows.shape[1] < 500 else 5,
  ).fit(rows)
  mean = rows.mean(0)[None]
  wide = WIDE_INFLATION * np.cov(rows.T)[None]
  wide += 1e-3 * np.eye(rows.shape[1])
  weights, means = np.asarray(fit.weights_), np.asarray(fit.means_)
  covariances = 1.1 * np.asarray(fit.covariances_)
  fitted = optlab.unnormalized.gaussian_mixture(weights, means, covariances)
  noise = optlab.unnormalized.gaussian_mixture(
    np.append((1 - WIDE_SHARE) * weights, WIDE_SHARE),
    np.concatenate([means, mean]),
    np.concatenate([covariances, wide]),
  )
  fitted, noise = jax.tree.map(
    lambda leaf: jnp.asarray(leaf, jnp.float32), (fitted, noise)
  )
  draws = noise.sample(jax.random.key(seed), POOL)
  pool = with_base(fitted, draws)
  return Noise(fitted, noise, pool, in_chunks(noise.log_prob, draws))


def in_chunks(function: Any, rows: jax.Array, chunk: int = 1000) -> jax.Array:
  """A function of rows, on so many at once."""
  parts = [
    jax.jit(function)(rows[i : i + chunk]) for i in range(0, len(rows), chunk)
  ]
  return jnp.concatenate(parts)


def with_base(fitted: Any, rows: jax.typing.ArrayLike) -> jax.Array:
  """Rows with a last column that holds the fitted log density."""
  pixels = jnp.asarray(rows)
  base = in_chunks(fitted.log_prob, pixels)
  return jnp.concatenate([pixels, base[:, None]], 1)
