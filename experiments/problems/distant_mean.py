"""A Gaussian's mean far away, learned with noise that follows it.

The problem ``mean`` of ``experiments.density_estimation``.
"""

from collections.abc import Sequence
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optlab

from ..lab import plots
from ..lab import record
from ..lab import tables
from ..lab.session import Session
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


def run(session: Session, config: unnormalized.Config) -> None:
  """Trains every method at every distance, with adaptive noise."""
  rates = jnp.repeat(jnp.asarray(config.learning_rates), config.seeds)
  seeds = tuple(range(config.seeds)) * len(config.learning_rates)
  every = math.gcd(config.steps, 50)
  for distance, method in itertools.product(config.distances, config.methods):

    def parts(learning_rate, method=method):
      estimator, params, model_of = unnormalized.estimator_and_start(
        method, natural, jnp.zeros(()), unnormalized.HALF_LOG_2PI, config.gamma
      )
      tx = unnormalized.optimizer(method, learning_rate, config)
      return estimator, tx, params, model_of

    def begin(seed, learning_rate, parts=parts):
      estimator, tx, params, _ = parts(learning_rate)
      standard = optlab.unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
      return unnormalized.Lane(
        optlab.init(params, estimator, tx),
        jax.random.key(seed),
        learning_rate,
        Bridge(standard, standard, standard),
        jnp.zeros(()),
      )

    def advance_lane(lane, parts=parts, distance=distance):
      estimator, tx, _, model_of = parts(lane.learning_rate)
      step = optlab.train_step(estimator, tx)

      def body(carry, _):
        state, key, bridge, _ = carry
        key, row_key, noise_key = jax.random.split(key, 3)
        data = distance + jax.random.normal(row_key, (config.data_rows, 1))
        noise = bridge.mixture()
        lattice = config.sampling[0] == 'lattice'
        draw = noise.sample_lattice if lattice else noise.sample
        drawn = draw(noise_key, config.noise_rows)
        batch = optlab.NoiseBatch(
          data, drawn, noise.log_prob(drawn), noise.log_prob(data)
        )
        bridge = bridge.adapt(model_of(state.params), batch)
        state, _ = step(state, batch)
        ess = jnp.asarray(unnormalized.ess_of(state.estimator_state), float)
        return (state, key, bridge, ess), None

      carry = (lane.train, lane.key, lane.noise, lane.ess)
      (state, key, bridge, ess), _ = jax.lax.scan(body, carry, length=every)
      return unnormalized.Lane(state, key, lane.learning_rate, bridge, ess)

    def evaluate(lanes, parts=parts, distance=distance):
      model_of = parts(0.0)[-1]
      theta = model_of(lanes.train.params)
      step = int(lanes.train.step[0])
      return {
        'learning_rate': lanes.learning_rate,
        'theta': theta,
        'error': jnp.abs(theta - distance),
        'ess': lanes.ess,
        'gradients': step,
        'samples': step * (config.data_rows + config.noise_rows),
      }

    session.run(
      f'distance {distance:g}: {method}',
      jax.jit(jax.vmap(begin))(jnp.asarray(seeds), rates),
      jax.vmap(advance_lane),
      evaluate,
      steps=config.steps,
      every=every,
      seeds=seeds,
      show='error',
      distance=distance,
      algorithm=method,
    )


def best_errors(
  rows: Sequence[dict], distance: float, method: str
) -> tuple[float, list[float]]:
  """The learning rate of the least median error at the end, and its errors."""
  found = record.select(rows, 'eval', distance=distance, algorithm=method)
  by_rate: dict[float, list[float]] = {}
  for row in found:
    if row['step'] == found[-1]['step']:
      rate = float(f'{row["learning_rate"]:.6g}')
      by_rate.setdefault(rate, []).append(
        row['error'] if np.isfinite(row['error']) else math.inf
      )
  best = min(by_rate, key=lambda rate: np.median(by_rate[rate]))
  return best, by_rate[best]


def show(rows: Sequence[dict], config: unnormalized.Config) -> None:
  """Error of the last parameter, at the learning rate that did best."""
  table = []
  for distance, method in itertools.product(config.distances, config.methods):
    best, errors = best_errors(rows, distance, method)
    table.append([
      f'{distance:g}', method, best,
      float(np.median(errors)), min(errors), max(errors),
    ])  # fmt: skip
  tables.show(
    f'|theta - mean| after {config.steps} steps, {config.seeds} seeds, natural'
    ' parametrization, adaptive noise from N(0, 1)',
    ['distance', 'method', 'rate', 'median', 'low', 'high'],
    table,
  )


def draw(
  rows: Sequence[dict], config: unnormalized.Config, folder: Any
) -> list[str]:
  """The error over training, a panel a distance."""
  figure, panels = unnormalized.panels(config, sharey=True)
  for axes, distance in zip(panels, config.distances, strict=True):
    mine = [row for row in rows if row.get('distance') == distance]
    plots.draw_lines(
      axes, [('', mine)], 'step', 'error', log_x=False, floor=1e-4
    )
    axes.set(title=f'distance {distance:g}', ylabel='|theta - mean|')
    axes.legend(fontsize=6)
    axes.label_outer()
  plots.save(figure, folder / 'mean.png')
  return ['mean.png']
