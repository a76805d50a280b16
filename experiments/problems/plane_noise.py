"""Noise for the distributions in the plane: fitted once, or adapting."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import mixture as sklearn_mixture

import optlab

from . import densities

TRAIN_ROWS = 20_000
NOISES = ('gaussian', 'mixture', 'flow', 'adaptive')
WITH_LATTICE = ('gaussian', 'mixture', 'adaptive')
COMPONENTS, ADAPTING_RATE = 10, 0.05


class Plane(NamedTuple):
  """A distribution's rows and fitted noise; leading axis: the seed."""

  train: jax.Array
  test: jax.Array
  negative_entropy: jax.Array  # Mean true log density of the test rows.
  noise: Any
  noise_of_train: jax.Array  # Log density, once for all steps.


@functools.cache
def plane(name: str, kind: str, seeds: tuple[int, ...]) -> Plane:
  """Draws the rows of every seed and fits the noise to them."""
  distribution = densities.distribution(name)

  def one(seed):
    key = jax.random.key(100 + seed)
    key = jax.random.fold_in(key, densities.NAMES.index(name))
    train, test = (
      jnp.asarray(distribution.sample(part, TRAIN_ROWS), float)
      for part in jax.random.split(key)
    )
    noise = jax.tree.map(
      lambda leaf: jnp.asarray(leaf, float), fit(kind, np.asarray(train), seed)
    )
    entropy = jnp.mean(distribution.log_prob(test))
    return Plane(train, test, entropy, noise, noise.log_prob(train))

  return jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(one(seed) for seed in seeds)
  )


def fit(kind: str, rows: np.ndarray, seed: int) -> Any:
  """Noise of one of `NOISES` for ``rows``.

  ``gaussian`` is inflated by half. The others hold a tenth of a wide Gaussian:
  ``mixture`` beside ten components of scikit-learn's, ``flow`` beside a flow,
  and ``adaptive`` beside ten that start alike, at rows drawn by chance.
  """
  rows = rows[:5000]
  mean, covariance = rows.mean(0)[None], np.cov(rows.T)[None]
  if kind == 'gaussian':
    return optlab.unnormalized.gaussian_mixture(
      np.ones(1), mean, 1.5 * covariance
    )
  if kind == 'flow':
    keys = jax.random.split(jax.random.key(seed))
    flow, _ = jax.jit(optlab.unnormalized.fit_flow, static_argnums=3)(
      optlab.unnormalized.init_flow(keys[0], jnp.asarray(rows)),
      keys[1],
      jnp.asarray(rows),
      2000,
      jitter=0.05,
    )
    return optlab.unnormalized.defensive(
      flow, optlab.unnormalized.gaussian(mean[0], 2.25 * covariance[0])
    )
  if kind == 'adaptive':
    rng = np.random.default_rng(seed)
    weights = np.full(COMPONENTS, 1 / COMPONENTS)
    means = rng.choice(rows, COMPONENTS, replace=False)
    covariances = np.repeat(0.25 * covariance, COMPONENTS, 0)
  else:
    found = sklearn_mixture.GaussianMixture(
      COMPONENTS, random_state=seed, reg_covar=1e-4
    ).fit(rows)
    weights, means = np.asarray(found.weights_), np.asarray(found.means_)
    covariances = 1.15 * np.asarray(found.covariances_)
  return optlab.unnormalized.gaussian_mixture(
    np.append(0.9 * weights, 0.1),
    np.concatenate([means, mean]),
    np.concatenate([covariances, 2.25 * covariance]),
  )


def adapt(
  noise: optlab.unnormalized.GaussianMixture,
  rows: jax.Array,
  log_weights: jax.Array,
) -> optlab.unnormalized.GaussianMixture:
  """One step of online EM towards weighted rows; the wide component stays.

  With noise rows and their importance weights it follows the model.
  """
  joint = noise.component_log_prob(rows)
  log_share = jax.nn.log_softmax(joint, -1)[:, :-1] + log_weights[:, None]
  share = jax.nn.softmax(log_weights) @ jax.nn.softmax(joint, -1)[:, :-1]
  weights = jnp.exp(noise.log_weights[:-1])
  # A component moves as much as the rows that are its own call for.
  rate = ADAPTING_RATE * jnp.minimum(share / weights, 1)
  parts = optlab.unnormalized.Gaussian(noise.means, noise.scales, noise.whitens)
  moved = jax.vmap(
    lambda part, rate, log_weight: optlab.unnormalized.follow(
      part, rows, rate, log_weight, floor=0.05
    ),
    in_axes=(0, 0, 1),
  )(jax.tree.map(lambda leaf: leaf[:-1], parts), rate, log_share)
  weights += ADAPTING_RATE * (share - weights)
  weights = 0.9 * weights / jnp.sum(weights)
  join = lambda new, old: jnp.concatenate([new, old[-1:]])
  return optlab.unnormalized.GaussianMixture(
    join(jnp.log(weights), noise.log_weights),
    *(join(new, old) for new, old in zip(moved, parts, strict=True)),
  )
