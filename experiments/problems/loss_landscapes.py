"""Population losses of a Gaussian's mean, and how flat they are.

The problem ``landscape`` of ``experiments.density_estimation``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..lab import plots
from ..lab import tables
from ..lab.session import Session
from ..methods import unnormalized


def run(session: Session, config: unnormalized.Config) -> None:
  """The three losses along theta, with the normalizer at its optimum."""
  for distance in config.distances:
    # Wide enough for both distributions and the overlap between them.
    x = jnp.linspace(-12.0, distance + 12.0, 6001)
    width = x[1] - x[0]
    log_data = -((x - distance) ** 2) / 2 - unnormalized.HALF_LOG_2PI
    log_noise = -(x**2) / 2 - unnormalized.HALF_LOG_2PI
    log_q = log_noise + jnp.log(width)
    p, q = jnp.exp(log_data) * width, jnp.exp(log_q)

    def log_ratio(vector, x=x, log_noise=log_noise):
      theta, log_z = vector
      return theta * x - x**2 / 2 - log_z - log_noise

    def likelihood(vector, p=p, x=x):
      theta, _ = vector
      return (
        theta**2 / 2 + unnormalized.HALF_LOG_2PI - p @ (theta * x - x**2 / 2)
      )

    def nce(vector, p=p, q=q, log_ratio=log_ratio):
      h = log_ratio(vector)
      return p @ jax.nn.softplus(-h) + q @ jax.nn.softplus(h)

    def ence(vector, p=p, log_q=log_q, log_ratio=log_ratio):
      # exp(+-h/2) overflows where the other factor underflows.
      h = log_ratio(vector)
      log_p = jnp.log(jnp.maximum(p, 1e-300))
      noise_term = jnp.sum(jnp.exp(log_q + h / 2))
      return 0.5 * (jnp.sum(jnp.exp(log_p - h / 2)) + noise_term)

    optimum = jnp.asarray(
      [distance, distance**2 / 2 + unnormalized.HALF_LOG_2PI]
    )
    thetas = jnp.linspace(0.0, 1.5 * distance, 121)
    vectors = jnp.stack([thetas, thetas**2 / 2 + unnormalized.HALF_LOG_2PI], 1)
    for name, loss in (
      ('likelihood', likelihood),
      ('nce', nce),
      ('ence', ence),
    ):
      hessian = np.asarray(jax.hessian(loss)(optimum))
      curvature = hessian[0, 0]
      if name != 'likelihood':
        curvature -= hessian[0, 1] ** 2 / hessian[1, 1]
      session.write(
        'landscape',
        distance=distance,
        loss=name,
        curvature=float(curvature),
        theta=thetas,
        value=jax.jit(jax.vmap(loss))(vectors),
      )


def show(rows: Sequence[dict], config: unnormalized.Config) -> None:
  """The curvature in theta at the optimum, normalizer profiled out."""
  tables.show(
    'Curvature of the population loss in theta at its optimum, q = N(0, 1)',
    ['distance', 'likelihood', 'nce', 'ence'],
    [
      [f'{distance:g}']
      + [
        f'{row["curvature"]:.3g}'
        for row in rows
        if row['kind'] == 'landscape' and row['distance'] == distance
      ]
      for distance in config.distances
    ],
  )


def draw(
  rows: Sequence[dict], config: unnormalized.Config, folder: Any
) -> list[str]:
  """The losses above their minimum, a panel a distance."""
  figure, panels = unnormalized.panels(config)
  for axes, distance in zip(panels, config.distances, strict=True):
    for row in rows:
      if row['kind'] == 'landscape' and row['distance'] == distance:
        value = np.asarray(row['value']) - np.min(row['value'])
        axes.plot(row['theta'], np.maximum(value, 1e-16), label=row['loss'])
    axes.set(
      yscale='log',
      xlabel='theta',
      ylabel='loss - least loss',
      title=f'mean {distance:g}, noise N(0, 1)',
    )
    axes.axvline(distance, color='k', lw=0.5)
    axes.legend()
  title = 'population losses along the mean of a Gaussian'
  plots.save(figure, folder / 'landscape.png', title=title)
  return ['landscape.png']
