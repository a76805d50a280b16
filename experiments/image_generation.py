"""Samples of small images from energies, and how far they are from real ones.

Trains energies on all classes, runs Metropolis-adjusted Langevin chains on them
from draws of the noise q, and compares features of the samples with those of
test images by the Frechet distance. Two reference rows say what the numbers
mean: real training images, the best that can be, and q alone, what the chains
start from.

  python -m experiments.image_generation
  python -m experiments.image_generation --dataset=mnist --data_dir=DIR
  python -m experiments.image_generation --dataset=mnist28 --data_dir=DIR \
    --score=smc --components=3 --steps=400 --seeds=1 --chain_steps=50
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn import neural_network

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

SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Config(tilted.Config):
  """Flags of the program."""

  QUICK = {
    'steps': 300,
    'seeds': 1,
    'tuning_seeds': 0,
    'learning_rates': (2e-3,),
  }
  MINUTES = (1, 3)

  chain_steps: int = flags.flag(200, 'Langevin steps of a chain.', low=1)
  step_size: float = flags.flag(0.03, 'Of the chains, in whitened pixels.')
  seeds: int = flags.flag(
    3, 'Number of seeds, 0 to seeds - 1.', low=1, grows=True
  )


class Features:
  """The hidden layer of a classifier trained on the training images."""

  def __init__(self, rows: np.ndarray, labels: np.ndarray):
    self._net = neural_network.MLPClassifier(
      (32,), max_iter=60, early_stopping=True, random_state=0
    )
    self._net.fit(rows, labels)

  def accuracy(self, rows: np.ndarray, labels: np.ndarray) -> float:
    return float(self._net.score(rows, labels))

  def __call__(self, rows: np.ndarray) -> np.ndarray:
    hidden = np.asarray(rows) @ self._net.coefs_[0] + self._net.intercepts_[0]
    return np.maximum(hidden, 0)


def frechet(first: np.ndarray, second: np.ndarray) -> float:
  """Frechet distance of the Gaussians with the moments of two sets of rows."""
  gap = first.mean(0) - second.mean(0)
  a, b = np.cov(first.T), np.cov(second.T)
  # tr (a b)^(1/2) by the symmetric form, whose eigenvalues are real.
  values, vectors = np.linalg.eigh(a)
  root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
  return float(gap @ gap + np.trace(a) + np.trace(b) - 2 * cross)


def sample(
  params: Any,
  noise: small_images.Noise,
  key: jax.Array,
  num: int,
  config: Config,
) -> tuple[jax.Array, jax.Array]:
  """Chains on the model in coordinates that whiten the noise.

  Returns:
    Rows ``[num, columns]``, and the share of accepted proposals.
  """
  start_key, chain_key = jax.random.split(key)
  space = tilted.whitened(noise)

  def log_density(white):
    return tilted.tilt(params, space.rows(white)) + space.log_prob(white)

  result = optlab.unnormalized.langevin(
    log_density, chain_key, space.sample(start_key, num), config.step_size,
    config.chain_steps,
  )  # fmt: skip
  return space.rows(result.rows), result.acceptance


@launch.program
def main(config: Config) -> None:
  """Trains, samples, and reports."""
  if config.step_size <= 0:
    raise flags.UserError(f'--step_size={config.step_size}: must be positive')
  data = small_images.load(config.dataset, config.data_dir, seed=0)
  with Session('image_generation', config, show='ess') as session:
    summary = run(session, config, data)
  verdicts.show(
    f'{config.dataset}, {config.steps} steps, {config.seeds} splits',
    'held-out nats, log Z by the noise', summary,
  )  # fmt: skip
  show(session.rows, config)
  path = session.folder / 'samples.png'
  draw(session.rows, config, data.side, path)
  print(f'record:  {session.folder / "record.jsonl"}\npicture: {path}')


def run(
  session: Session, config: Config, data: small_images.Images
) -> list[dict]:
  """Fits noise and features of every split; tunes, trains and samples."""
  parts, features = [], []
  for seed in tilted.seeds(config):
    order = np.random.default_rng(seed).permutation(len(data.rows))
    cut = int(0.67 * len(order))
    train, test = data.rows[order[:cut]], data.rows[order[cut:]]
    noise = small_images.fit_noise(train, config.components, seed)
    parts.append((train, test, noise))
    if seed >= config.seeds:
      continue
    features.append(Features(train, data.labels[order[:cut]]))
    seen = frechet_row(session, features[seed], test, seed)
    seen('real training images', train[: len(test)])
    seen('mixture q', noise.fitted.sample(jax.random.key(77 + seed), len(test)))
    accuracy = features[seed].accuracy(test, data.labels[order[cut:]])
    session.write('classifier', seed=seed, accuracy=accuracy)

  chains = jax.jit(
    functools.partial(sample, num=len(parts[0][1]), config=config)
  )

  def score(method, choice, states):
    del choice
    for seed in range(config.seeds):
      own = {'method': method, 'seed': seed}
      if session.select('score', **own):
        continue
      mine = jax.tree.map(lambda leaf, seed=seed: leaf[seed], states)
      mine = tilted.model_of(mine.train.params)
      _, test, noise = parts[seed]
      rows, acceptance = chains(mine, noise, jax.random.key(55 + seed))
      frechet_row(session, features[seed], test, seed)(method, rows)
      found = tilted.held_out_nll(
        mine, noise, jnp.asarray(test), seed, tilted.particles(config)
      )
      session.write('score', **own, acceptance=acceptance, **found)

  plan = tilted.problem(config, parts)
  return study.study(session, plan, config.methods, score)


def frechet_row(session, features, test, seed):
  """A function that records how far rows are from the test images."""

  def write(method, rows):
    rows = np.asarray(rows)
    session.write(
      'frechet',
      method=method,
      seed=seed,
      frechet=frechet(features(rows), features(test)),
      images=np.round(rows[:SHOWN], 2) if seed == 0 else None,
    )

  return write


def show(rows: Sequence[dict], config: Config) -> None:
  """Distances beside their references, and likelihoods with error bars."""
  found = [row for row in rows if row['kind'] == 'frechet']
  scores = [row for row in rows if row['kind'] == 'score']
  names = list(dict.fromkeys(row['method'] for row in found))
  from_q = {
    row['seed']: row['frechet'] for row in found if row['method'] == 'mixture q'
  }
  table: list[list[Any]] = []
  for name in names:
    mine = {
      row['seed']: row['frechet'] for row in found if row['method'] == name
    }
    values = list(mine.values())
    wins = sum(mine[seed] < from_q[seed] for seed in mine)
    accepted = [row['acceptance'] for row in scores if row['method'] == name]
    table.append([
      name, float(np.median(values)), min(values), max(values),
      '-' if name == 'mixture q' else f'{wins} of {len(mine)}',
      float(np.median(accepted)) if accepted else '-',
    ])  # fmt: skip
  accuracy = [row['accuracy'] for row in rows if row['kind'] == 'classifier']
  tables.show(
    f'{config.dataset}: Frechet distance to test images in the features of a'
    f' classifier (accuracy {np.median(accuracy):.3f}), {config.seeds} seeds',
    ['samples', 'median', 'low', 'high', 'nearer than q', 'acceptance'],
    table,
  )
  tilted.show_likelihoods(scores)


def draw(rows: Sequence[dict], config: Config, side: int, path: Any) -> None:
  """A grid of images for every method, all of the first seed."""
  shown = [row for row in rows if row['kind'] == 'frechet' and row['seed'] == 0]
  figure, panels = plt.subplots(
    1,
    len(shown),
    figsize=(3.2 * len(shown), 2.2),
    squeeze=False,
    layout='constrained',
  )
  for axes, row in zip(panels[0], shown, strict=True):
    cells = np.asarray(row['images']).reshape(-1, 10, side, side)
    cells = np.pad(cells, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = cells.shape[0] * (side + 2), 10 * (side + 2)
    axes.imshow(
      cells.transpose(0, 2, 1, 3).reshape(height, width),
      cmap='gray_r',
      vmin=0,
      vmax=1,
    )
    axes.set(
      xticks=[], yticks=[], title=f'{row["method"]}: {row["frechet"]:.2f}'
    )
  plots.save(
    figure, path, title=f'{config.dataset}: samples and Frechet distance'
  )


if __name__ == '__main__':
  launch.run(main, Config)
