"""A Gaussian's mean far away, learned with noise that follows it.

The problem ``mean`` of ``experiments.density_estimation``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import optlab

from ..lab import plots
from ..lab import study
from ..methods import unnormalized


def natural(theta: jax.Array, rows: jax.Array) -> jax.Array:
  """N(theta, 1) by its natural parameter: its log Z is theta^2 / 2."""
  return theta * rows[:, 0] - rows[:, 0] ** 2 / 2


class Bridge(NamedTuple):
  """Noise that starts as N(0, 1): a part follows the model, one the data."""

  of_model: optlab.unnormalized.Gaussian
  of_data: optlab.unnormalized.Gaussian
  start: optlab.unnormalized.Gaussian

  def mixture(self) -> optlab.unnormalized.GaussianMixture:
    parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *self)
    weights = jnp.log(jnp.asarray([0.45, 0.45, 0.1], float))
    return optlab.unnormalized.GaussianMixture(weights, *parts)

  def adapt(self, theta: jax.Array, batch: optlab.NoiseBatch) -> 'Bridge':
    log_w = natural(theta, batch.noise) - batch.noise_log_prob
    return self._replace(
      of_model=optlab.unnormalized.follow(
        self.of_model, batch.noise, 0.5, log_w, floor=0.3
      ),
      of_data=optlab.unnormalized.follow(self.of_data, batch.data, 0.1),
    )


class State(NamedTuple):
  """One lane."""

  train: optlab.TrainState
  bridge: Bridge
  ess: jax.Array  # Of the last step.


def problem(config: unnormalized.Config, distance: float) -> study.Problem:
  """The error of the mean at a distance, by the flags of the program."""
  rows = config.data_rows + config.noise_rows

  def entry(method):

    def parts(rate):
      estimator, params = unnormalized.estimator_and_start(
        method, natural, jnp.zeros(()), unnormalized.HALF_LOG_2PI, config.gamma
      )
      return estimator, unnormalized.optimizer(method, rate, config), params

    def start(key, rate, *_):
      del key
      estimator, tx, params = parts(rate)
      standard = optlab.unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
      bridge = Bridge(standard, standard, standard)
      return State(optlab.init(params, estimator, tx), bridge, jnp.zeros(()))

    def step(state, key, rate, *_):
      estimator, tx, _ = parts(rate)
      row_key, noise_key = jax.random.split(key)
      data = distance + jax.random.normal(row_key, (config.data_rows, 1))
      noise = state.bridge.mixture()
      lattice = config.sampling[0] == 'lattice'
      draw = noise.sample_lattice if lattice else noise.sample
      drawn = draw(noise_key, config.noise_rows)
      batch = optlab.NoiseBatch(
        data, drawn, noise.log_prob(drawn), noise.log_prob(data)
      )
      theta = unnormalized.model_params(state.train.params)
      train, _ = optlab.train_step(estimator, tx)(state.train, batch)
      ess = jnp.asarray(unnormalized.ess_of(train.estimator_state), float)
      return State(train, state.bridge.adapt(theta, batch), ess)

    return study.Entry(start, step, rows)

  def measure(state, _):
    theta = unnormalized.model_params(state.train.params)
    error = jnp.abs(theta - distance)
    return {'theta': theta, 'tuning': error, 'value': error, 'ess': state.ess}

  return study.Problem(
    entry, config.methods, config.learning_rates, rows * config.steps,
    'rows of data and noise', measure, '|theta - mean|', batched=True,
  )  # fmt: skip


def draw(
  rows: Sequence[dict], config: unnormalized.Config, folder: Any
) -> list[str]:
  """The error over training, a panel a distance."""
  figure, panels = unnormalized.panels(config, sharey=True)
  for axes, distance in zip(panels, config.distances, strict=True):
    mine = [
      row | {'method': row['algorithm']}
      for row in rows
      if row.get('problem') == f'distance {distance:g}'
      and row['kind'] == 'eval'
      and plots.reported(row['method'])
    ]
    plots.draw_lines(
      axes, [('', mine)], 'updates', 'value', log_x=False, floor=1e-4
    )
    axes.set(
      title=f'distance {distance:g}', ylabel='|theta - mean|', xlabel='steps'
    )
    axes.label_outer()
  panels[0].legend(fontsize=8)
  plots.save(figure, folder / 'mean.png', title='the mean of a Gaussian')
  return ['mean.png']
