"""MECO beside NCE and eNCE on densities whose answers are known.

Three problems. ``plane``: an MLP energy on six distributions in two dimensions,
scored by the held-out Kullback-Leibler divergence with log Z integrated on a
checked grid. ``mean``: a Gaussian's natural parameter at a distance from where
the noise starts, with noise that follows data and model. ``landscape``: the
population losses of the three methods along the parameter, and their curvature.

  python -m experiments.density_estimation
  python -m experiments.density_estimation --problem=mean --learning_rates=0.05
  python -m experiments.density_estimation --problem=landscape
"""

from collections.abc import Sequence
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from .lab import flags
from .lab import launch
from .lab import plots
from .lab import study
from .lab import verdicts
from .lab.session import Session
from .methods import unnormalized
from .problems import densities
from .problems import distant_mean
from .problems import loss_landscapes
from .problems import plane

PICTURE_CELLS, PICTURE_HALF_WIDTH = 72, 3.2

Config = unnormalized.Config


def _grid_points(half_width: float, cells: int) -> jax.Array:
  side = (np.arange(cells) + 0.5) / cells * 2 * half_width - half_width
  points = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
  return jnp.asarray(points, float)


def planes(config: Config) -> dict[str, tuple[str, str, str]]:
  """Set, noise and sampling of each problem, by its name."""
  found = {}
  for each in itertools.product(config.sets, config.noises, config.sampling):
    several = len(config.noises) * len(config.sampling) > 1
    found['/'.join(each) if several else each[0]] = each
  return found


def plan(config: Config, name: str, problem: study.Problem) -> study.Plan:
  """The flags."""
  return study.Plan(
    name, problem, problem.budget, config.learning_rates, config.seeds,
    config.tuning_seeds,
  )  # fmt: skip


def run_plane(session: Session, config: Config) -> list[dict]:
  """Tunes and runs every method on every set."""
  rows = []
  for name, where in planes(config).items():

    def surface(method, choice, states, name=name, where=where):
      params = unnormalized.model_params(states.train.params)
      params = jax.tree.map(lambda leaf: leaf[0], params)
      points = _grid_points(PICTURE_HALF_WIDTH, PICTURE_CELLS)
      session.write(
        'surface', method=f'{name}: {method}', set=where[0], algorithm=method,
        learning_rate=choice.found.rate,
        log_density=np.round(densities.log_density(params, points), 2),
      )  # fmt: skip

    own = plan(config, name, plane.problem(config, *where))
    rows += study.study(session, own, config.methods, surface)
  return rows


def run_mean(session: Session, config: Config) -> list[dict]:
  """Tunes and runs every method at every distance."""
  rows = []
  for distance in config.distances:
    problem = distant_mean.problem(config, distance)
    own = plan(config, f'distance {distance:g}', problem)
    rows += study.study(session, own, config.methods)
  return rows


def draw_plane(rows: Sequence[dict], config: Config, folder: Any) -> list[str]:
  """Densities beside data, energy surfaces, and ESS over training."""
  surfaces = [row for row in rows if row['kind'] == 'surface']
  draw_surfaces(
    surfaces, folder / 'densities.png', 'density', np.exp,
    cmap='magma',
  )  # fmt: skip
  draw_surfaces(
    surfaces, folder / 'energies.png', 'energy, clipped at 12 nats',
    lambda log: -log, cmap='viridis', vmax=12,
  )  # fmt: skip
  pictures = ['densities.png', 'energies.png']
  if draw_ess(rows, config, folder / 'ess.png'):
    pictures.append('ess.png')
  return pictures


def draw_surfaces(surfaces, path, what: str, shown, **style: Any) -> None:
  """A column a set: its data, and below them each method's model."""
  methods = list(dict.fromkeys(row['algorithm'] for row in surfaces))
  sets = list(dict.fromkeys(row['set'] for row in surfaces))
  extent = (-PICTURE_HALF_WIDTH, PICTURE_HALF_WIDTH) * 2
  figure, panels = plt.subplots(
    len(methods) + 1, len(sets), squeeze=False, layout='constrained',
    figsize=(2.2 * len(sets), 2.2 * (len(methods) + 1)),
  )  # fmt: skip
  for axes in panels.flat:
    axes.set(xticks=[], yticks=[])
  for axes, name in zip(panels[0], sets, strict=True):
    points = densities.distribution(name).sample(jax.random.key(0), 4000)
    axes.scatter(*np.asarray(points).T, s=0.4, lw=0, color='k')
    axes.set(xlim=extent[:2], ylim=extent[:2], title=name, aspect='equal')
  # The last of several noises.
  for row in surfaces:
    surface = np.reshape(row['log_density'], (PICTURE_CELLS, PICTURE_CELLS))
    place = methods.index(row['algorithm']) + 1, sets.index(row['set'])
    panels[place].imshow(
      shown(surface - surface.max()), origin='lower', extent=extent, vmin=0,
      **style,
    )  # fmt: skip
  for axes, text in zip(panels[:, 0], ['data', *methods], strict=True):
    axes.set_ylabel(text)
  plots.save(figure, path, title=f'model {what}, seed 0, best learning rate')


def draw_ess(rows: Sequence[dict], config: Config, path: Any) -> bool:
  """Effective sample sizes over training; whether there are some."""
  names = planes(config)
  figure, panels = plt.subplots(
    1, len(names), figsize=(2.6 * len(names), 3.2), squeeze=False,
    sharey=True, layout='constrained',
  )  # fmt: skip
  for axes, name in zip(panels[0], names, strict=True):
    for method in config.methods:
      curves = plots.curves(rows, f'{name}: {method}', 'updates', 'ess')
      shown = np.isfinite(curves[1])
      if np.any(shown):
        ranges = (end[shown] / config.noise_rows for end in curves[1:])
        plots.band(axes, curves[0][shown], *ranges, label=method)
    axes.set(title=name, xlabel='steps', ylim=(0, 1))
  panels[0, 0].set_ylabel('effective sample size / noise rows')
  handles, labels = panels[0, 0].get_legend_handles_labels()
  if not handles:
    plt.close(figure)
    return False
  figure.legend(handles, labels, loc='outside lower center', ncols=4)
  plots.save(figure, path, title='median and range over seeds')
  return True


@launch.program
def main(config: Config) -> None:
  """Runs one problem, prints its tables and draws its pictures."""
  if config.problem == 'landscape' and config.precision != 'float64':
    raise flags.UserError(
      '--problem=landscape needs --precision=float64: the curvature falls to'
      ' 1e-17'
    )
  with Session('density_estimation', config, show='ess') as session:
    if config.problem == 'landscape':
      loss_landscapes.run(session, config)
      loss_landscapes.show(session.rows, config)
    else:
      run, value = run_mean, '|theta - mean|'
      if config.problem == 'plane':
        run, value = run_plane, 'held-out divergence in nats'
      verdicts.show(
        f'{config.seeds} seeds, {config.steps} steps, rates by'
        f' {config.tuning_seeds} others',
        value,
        run(session, config),
      )
  draw = {
    'plane': draw_plane,
    'mean': distant_mean.draw,
    'landscape': loss_landscapes.draw,
  }[config.problem]
  pictures = draw(session.rows, config, session.folder)
  print(f'record:  {session.folder / "record.jsonl"}')
  for picture in pictures:
    print(f'picture: {session.folder / picture}')


if __name__ == '__main__':
  launch.run(main, Config)
