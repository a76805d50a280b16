"""Tells unseen classes by their density: energies beside simple baselines.

Trains on eight of ten classes of small images, and scores test images of those
against the two that were left out; seed s leaves out classes 2 s and 2 s + 1
(modulo ten). Nearest neighbours and the fitted mixture stand beside the
energies, and may win.

  python -m experiments.ood_detection
  python -m experiments.ood_detection --dataset=mnist --data_dir=DIR
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn import metrics
from sklearn import neighbors

import optlab

from .lab import flags
from .lab import launch
from .lab import plots
from .lab import study
from .lab import tables
from .lab import tilted
from .lab import verdicts
from .lab.session import Session
from .problems import small_images


@dataclasses.dataclass(frozen=True)
class Config(tilted.Config):
  """Flags of the program."""

  QUICK = {
    'steps': 300,
    'seeds': 2,
    'tuning_seeds': 0,
    'learning_rates': (2e-3,),
  }
  MINUTES = (1, 2)

  seeds: int = flags.flag(
    5, 'Number of seeds, 0 to seeds - 1.', low=1, grows=True
  )


def split(data: small_images.Images, seed: int) -> tuple[np.ndarray, ...]:
  """Training rows, test rows of the same classes, and rows of the others."""
  left_out = [(2 * seed) % 10, (2 * seed + 1) % 10]
  outside = np.isin(data.labels, left_out)
  order = np.random.default_rng(seed).permutation(np.flatnonzero(~outside))
  # One number of rows for all seeds, so that they share a program.
  train = int(0.75 * 0.77 * len(data.labels))
  return (
    data.rows[order[:train]],
    data.rows[order[train:]],
    data.rows[outside],
  )


def score_baselines(session, seed, train, inside, outside, noise) -> None:
  """AUROC of what needs no training of an energy."""
  near = neighbors.NearestNeighbors(n_neighbors=1).fit(train)
  covariance = np.cov(train.T) + 1e-3 * np.eye(train.shape[1])
  gaussian = optlab.unnormalized.gaussian(train.mean(0), covariance)
  scores = {
    'nearest neighbour': lambda rows: -near.kneighbors(rows)[0][:, 0],
    'Gaussian': lambda rows: gaussian.log_prob(jnp.asarray(rows)),
    'mixture q': lambda rows: noise.fitted.log_prob(jnp.asarray(rows)),
  }
  for name, score in scores.items():
    session.write(
      'auroc',
      method=name,
      seed=seed,
      auroc=auroc(score(inside), score(outside)),
    )


def auroc(inside: Any, outside: Any) -> float:
  """How well a score puts known classes above unknown ones."""
  scores = np.concatenate([np.asarray(inside), np.asarray(outside)])
  truth = np.repeat([1, 0], [len(inside), len(outside)])
  return float(metrics.roc_auc_score(truth, scores))


@launch.program
def main(config: Config) -> None:
  """Trains, scores, and reports."""
  data = small_images.load(config.dataset, config.data_dir, seed=0)
  with Session('ood_detection', config, show='ess') as session:
    summary = run(session, config, data)
  verdicts.show(
    f'{config.dataset}, {config.steps} steps, {config.seeds} splits',
    'held-out nats, log Z by the noise', summary,
  )  # fmt: skip
  show(session.rows, config)
  path = session.folder / 'auroc.png'
  draw(session.rows, config, path)
  print(f'record:  {session.folder / "record.jsonl"}\npicture: {path}')


def run(
  session: Session, config: Config, data: small_images.Images
) -> list[dict]:
  """Fits the noise of every split; tunes, trains and scores each method."""
  parts, outsides = [], []
  for seed in tilted.seeds(config):
    train, inside, outside = split(data, seed)
    noise = small_images.fit_noise(train, config.components, seed)
    if seed < config.seeds:
      score_baselines(session, seed, train, inside, outside, noise)
    parts.append((train, inside, noise))
    outsides.append(outside)

  def score(method, choice, states):
    del choice
    for seed in range(config.seeds):
      mine = jax.tree.map(lambda leaf, seed=seed: leaf[seed], states)
      mine = tilted.model_of(mine.train.params)
      _, inside, noise = parts[seed]
      found = [
        tilted.log_density(mine, small_images.with_base(noise.fitted, rows))
        for rows in (inside, outsides[seed])
      ]
      own = {'method': method, 'seed': seed}
      session.write('auroc', **own, auroc=auroc(*found))
      if not session.select('score', **own):
        nll = tilted.held_out_nll(
          mine, noise, jnp.asarray(inside), seed, tilted.particles(config)
        )
        session.write('score', **own, **nll)

  plan = tilted.problem(config, parts)
  return study.study(session, plan, config.methods, score)


def show(rows: Sequence[dict], config: Config) -> None:
  """AUROC of every method, and the likelihoods with their error bars."""
  found = [row for row in rows if row['kind'] == 'auroc']
  names = list(dict.fromkeys(row['method'] for row in found))
  table: list[list[Any]] = []
  nearest = {
    row['seed']: row['auroc']
    for row in found
    if row['method'] == 'nearest neighbour'
  }
  for name in names:
    mine = {row['seed']: row['auroc'] for row in found if row['method'] == name}
    wins = sum(mine[seed] > nearest[seed] for seed in mine)
    values = list(mine.values())
    table.append([
      name, float(np.median(values)), min(values), max(values),
      '-' if name == 'nearest neighbour' else f'{wins} of {len(mine)}',
    ])  # fmt: skip
  tables.show(
    f'{config.dataset}: AUROC of left-out classes, {config.seeds} seeds',
    ['score', 'median', 'low', 'high', 'beats nearest neighbour'],
    sorted(table, key=lambda row: row[1], reverse=True),
  )
  scores = [row for row in rows if row['kind'] == 'score']
  tilted.show_likelihoods(scores)


def draw(rows: Sequence[dict], config: Config, path: Any) -> None:
  """A dot for every seed, a bar at the median."""
  found = [row for row in rows if row['kind'] == 'auroc']
  names = sorted(
    dict.fromkeys(row['method'] for row in found),
    key=lambda name: np.median(
      [row['auroc'] for row in found if row['method'] == name]
    ),
  )
  figure, axes = plt.subplots(figsize=(6, 0.5 * len(names) + 1.2))
  for height, name in enumerate(names):
    values = [row['auroc'] for row in found if row['method'] == name]
    axes.plot(values, [height] * len(values), 'o', ms=4, alpha=0.6)
    axes.plot(np.median(values), height, 'k|', ms=16)
  axes.set(
    yticks=range(len(names)),
    yticklabels=names,
    xlabel='AUROC, known against left-out classes',
  )
  axes.locator_params(axis='x', nbins=6)
  axes.grid(alpha=0.3)
  plots.save(figure, path, title=f'{config.dataset}, {config.seeds} seeds')


if __name__ == '__main__':
  launch.run(main, Config)
