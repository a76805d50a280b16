"""Six distributions in the plane with exact densities, and their model.

Four are mixtures of Gaussians with equal weights and one width; the
checkerboard is uniform on eight squares; the pinwheel is five Gaussians twisted
by a rotation that depends on the radius alone, so that its density stays exact.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optlab

NAMES = (
  '8gaussians',
  'pinwheel',
  'rings',
  'moons',
  'checkerboard',
  'swissroll',
)
HALF_WIDTH = 6.0  # Of the box that log Z is integrated on.


class Checkerboard(NamedTuple):
  """Uniform on the unit squares of [-2, 2]^2 whose indices sum to an even."""

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    which, where = jax.random.split(key)
    square = jax.random.randint(which, (num,), 0, 8)
    row = square // 2
    corner = jnp.stack([row, 2 * (square % 2) + row % 2], 1) - 2.0
    return corner + jax.random.uniform(where, (num, 2))

  def log_prob(self, rows: jax.Array) -> jax.Array:
    index = jnp.floor(rows)
    even = jnp.mod(jnp.sum(index, -1), 2) == 0
    inside = jnp.all(jnp.abs(rows) <= 2, -1)
    return jnp.where(even & inside, -jnp.log(8.0), -jnp.inf)


class Pinwheel(NamedTuple):
  """Five blades, bent by a rotation that grows with the radius."""

  blades: int = 5
  rate: float = 0.35
  scale: float = 1.4

  def _rotate(self, rows, angle):
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = rows[..., 0], rows[..., 1]
    return jnp.stack([cos * x - sin * y, sin * x + cos * y], -1)

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    which, where = jax.random.split(key)
    blade = jax.random.randint(which, (num,), 0, self.blades)
    straight = jax.random.normal(where, (num, 2)) * jnp.array([0.3, 0.1])
    straight += jnp.array([1.0, 0.0])
    radius = jnp.linalg.norm(straight, axis=-1)
    angle = 2 * jnp.pi * blade / self.blades + self.rate * jnp.exp(radius)
    return self.scale * self._rotate(straight, angle)

  def log_prob(self, rows: jax.Array) -> jax.Array:
    rows = rows / self.scale
    twist = self.rate * jnp.exp(jnp.linalg.norm(rows, axis=-1))
    angles = 2 * jnp.pi * jnp.arange(self.blades) / self.blades
    straight = self._rotate(rows[:, None], -(angles + twist[:, None]))
    blade = optlab.unnormalized.gaussian(
      np.array([1.0, 0.0]), np.diag(np.square([0.3, 0.1]))
    )
    parts = blade.log_prob(straight.reshape(-1, 2)).reshape(-1, self.blades)
    shrink = jnp.log(self.blades) + 2 * jnp.log(self.scale)
    return jax.nn.logsumexp(parts, -1) - shrink


def _mixture(
  centres: np.ndarray, width: float
) -> optlab.unnormalized.GaussianMixture:
  covariance = width**2 * np.eye(2)
  return optlab.unnormalized.gaussian_mixture(
    np.ones(len(centres)),
    centres,
    np.broadcast_to(covariance, (len(centres), 2, 2)),
  )


def _circle(angles: np.ndarray) -> np.ndarray:
  return np.stack([np.cos(angles), np.sin(angles)], -1)


def distribution(name: str) -> Any:
  """One of `NAMES`, with ``sample`` and the exact ``log_prob``."""
  if name == '8gaussians':
    return _mixture(1.6 * _circle(2 * np.pi * np.arange(8) / 8), 0.15)
  if name == 'rings':
    ring = _circle(2 * np.pi * np.arange(200) / 200)
    return _mixture(np.concatenate([0.9 * ring, 1.9 * ring]), 0.1)
  if name == 'moons':
    upper = _circle(np.linspace(0, np.pi, 200))
    lower = np.array([1.0, 0.5]) - upper
    centres = np.concatenate([upper, lower]) - np.array([0.5, 0.25])
    return _mixture(1.5 * centres, 0.12)
  if name == 'swissroll':
    turn = 1.5 * np.pi * (1 + 2 * np.linspace(0, 1, 600))
    centres = turn[:, None] * _circle(turn) / 7
    return _mixture(centres - centres.mean(0), 0.1)
  return {'checkerboard': Checkerboard, 'pinwheel': Pinwheel}[name]()


def init_mlp(
  key: jax.Array, sizes: tuple[int, ...] = (2, 64, 64, 64, 1)
) -> list[tuple[jax.Array, jax.Array]]:
  """Weights of variance 2 / fan_in; the last layer a tenth of that in scale."""
  layers = []
  pairs = list(itertools.pairwise(sizes))
  for layer_key, (fan_in, fan_out) in zip(
    jax.random.split(key, len(pairs)), pairs, strict=True
  ):
    weight = jax.random.normal(layer_key, (fan_in, fan_out))
    weight *= jnp.sqrt(2.0 / fan_in)
    layers.append((weight, jnp.zeros(fan_out)))
  weight, bias = layers[-1]
  layers[-1] = (0.1 * weight, bias)
  return layers


def log_density(
  params: list[tuple[jax.Array, jax.Array]], rows: jax.Array
) -> jax.Array:
  """An MLP on top of N(0, 4 I), up to its normalizer."""
  hidden = rows
  for weight, bias in params[:-1]:
    hidden = jax.nn.silu(hidden @ weight + bias)
  weight, bias = params[-1]
  return (hidden @ weight + bias)[..., 0] - jnp.sum(rows**2, -1) / 8
