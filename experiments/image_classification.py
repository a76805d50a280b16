"""Image classification: optimizers, and batches that grow by a test.

python -m experiments.image_classification [--dataset=digits] [--model=mlp]
[--optimizers=adagrad] [--batches=8,32,128,512,full,norm:1,inner:0.5]

Every optimizer and batch rule passes over the training images equally often.
Learning rates are tuned for each on one grid that goes on past its edge, by the
loss on validation images that are taken out of the training images, with seeds
that are used for nothing else; so is the best of the constant batches picked.
Other seeds then train on all training images, and only these see the test
images. A growing batch stands beside the smallest constant batch, the best one,
and the one of its own average size, which takes as many steps for as many
samples.
"""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from .lab import devices
from .lab import flags
from .lab import launch
from .lab import plots
from .lab import study
from .lab import tables
from .lab import verdicts
from .lab.session import Session
from .methods import images
from .problems import image_classifiers


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags."""

  QUICK = {
    'batches': ('32', 'norm:1'),
    'learning_rates': (0.03, 0.1, 0.3),
    'epochs': 4,
    'seeds': 2,
    'tuning_seeds': 1,
  }
  MINUTES = (1, 5)

  dataset: str = flags.flag(
    'digits', 'digits, mnist in data_dir, or an IDX file by path.'
  )
  data_dir: str = flags.flag('', 'Folder with data files.')
  model: str = flags.flag(
    'mlp', 'Model.', choices=tuple(image_classifiers.MODELS)
  )
  optimizers: tuple[str, ...] = flags.flag(
    ('adagrad',), 'Optimizers.', choices=tuple(images.OPTIMIZERS)
  )
  batches: tuple[str, ...] = flags.flag(
    ('8', '32', '128', '512', 'full')
    + ('norm:0.5', 'norm:1', 'means:1', 'inner:0.5', 'augmented:1'),
    'Batch sizes, and tests with their constants; +memory averages over steps,'
    ' +root or +linear lets the learning rate follow the batch.',
  )
  first_size: int = flags.flag(8, 'First size of a growing batch.', low=2)
  decay: float = flags.flag(0.95, "Of a memory's averages.", low=1e-6)
  shift: int = flags.flag(
    0, 'Pixels by which a training image is moved at most.', low=0
  )
  microbatch: int = flags.flag(64, 'Images in a round of the loop.', low=1)
  epochs: int = flags.flag(10, 'Passes over the training images.', low=1)
  learning_rates: tuple[float, ...] = flags.flag(
    (0.003, 0.01, 0.03, 0.1, 0.3), 'Grid of learning rates.', low=0.0
  )
  test_size: int = flags.flag(360, 'Images held out for the report.', low=1)
  valid_size: int = flags.flag(
    287, 'Of the others, held out while rates are tuned.', low=1
  )
  tuning_seeds: int = flags.flag(2, 'Seeds of the tuning.', low=1, grows=True)
  seeds: int = flags.flag(5, 'Number of seeds.', low=1, grows=True)
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )


class Choice(NamedTuple):
  """What is compared."""

  optimizer: str
  batches: str

  @property
  def label(self) -> str:
    return f'{self.optimizer}, {self.batches}'

  @property
  def grows(self) -> bool:
    return ':' in self.batches


def same_average(row: dict) -> str:
  """The constant batch that takes as many steps as a growing one's row."""
  return str(round(row['average_batch']))


def references(
  config: Config, summary: Sequence[dict]
) -> list[tuple[Choice, str, Choice]]:
  """What is compared with what: choices, with a word for the second."""
  pairs, champions = [], {}
  grid = [name for name in config.batches if ':' not in name]
  for optimizer in config.optimizers:
    rows = {
      row['batches']: row for row in summary if row['optimizer'] == optimizer
    }
    words = {}
    if grid:
      smallest = max(grid, key=lambda name: rows[name]['updates'])
      best = min(grid, key=lambda name: rows[name]['tuning'])
      champions[optimizer] = Choice(optimizer, best)
      words = {f'smallest, {smallest}': smallest, f'best, {best}': best}
    for name, row in rows.items():
      if ':' in name:
        same = same_average(row)
        for word, other in (words | {f'same average, {same}': same}).items():
          pairs.append(
            (Choice(optimizer, name), word, Choice(optimizer, other))
          )
  for optimizer in config.optimizers[1:]:
    if grid:
      ours, theirs = champions[config.optimizers[0]], champions[optimizer]
      pairs.append((ours, theirs.label, theirs))
  return pairs


def compare(
  session: Session, pairs: Sequence[tuple[Choice, str, Choice]]
) -> list[dict]:
  """Differences within the seeds, which share start and first permutation."""
  rows = []
  for choice, word, other in pairs:
    ours, theirs = (
      verdicts.last(session.rows, each.label) for each in (choice, other)
    )
    gaps = verdicts.summary(ours, theirs, 'test_accuracy', more=True)
    mean = lambda ends, name: float(np.mean([end[name] for end in ends]))
    row = {
      **choice._asdict(),
      'against': word,
      'accuracy_gap': -gaps['gap'],
      'accuracy_gap_low': -gaps['gap_high'],
      'accuracy_gap_high': -gaps['gap_low'],
      'verdict': gaps['verdict'],
      'won': gaps['wins'],
      'lost': gaps['losses'],
      'loss_gap': mean(ours, 'test_loss') - mean(theirs, 'test_loss'),
      'steps_ratio': mean(theirs, 'updates') / mean(ours, 'updates'),
    }
    rows.append(row)
    session.write('comparison', **row)
  return rows


def show(config: Config, summary: list[dict], compared: list[dict]) -> None:
  """Prints the study's table, and then differences within the seeds."""
  verdicts.show(
    f'{config.dataset}, {config.model}, {config.epochs} epochs,'
    f' {config.seeds} seeds', 'test accuracy', summary,
    reported=images.REPORTED,
  )  # fmt: skip
  if not compared:
    return
  points = lambda row, end: f'{100.0 * row[f"accuracy_gap{end}"]:+.2f}'
  tables.show(
    'Differences within the seeds, for as many samples: points of accuracy and'
    ' the 95 % interval of their mean',
    (
      'optimizer, batch, against', 'points', 'low', 'high', 'verdict',
      'won, lost', 'test loss', 'steps saved, times',
    ),
    [
      (
        f'{row["optimizer"]}, {row["batches"]}, {row["against"]}',
        *(points(row, end) for end in ('', '_low', '_high')), row['verdict'],
        f'{row["won"]}, {row["lost"]}', f'{row["loss_gap"]:+.4f}',
        f'{row["steps_ratio"]:.2f}',
      )
      for row in compared
    ],
  )  # fmt: skip


PANELS = (
  ('calls', 'batch_size', 'samples', 'size of the next batch'),
  ('calls', 'batch_signal_to_noise', 'samples',
   "signal to noise of the next batch's gradient"),
  ('calls', 'test_accuracy', 'samples', 'test accuracy'),
  ('updates', 'test_accuracy', 'steps', 'test accuracy'),
)  # fmt: skip


def draw(session: Session, config: Config, choices: Sequence[Choice]) -> None:
  """Batch size and signal-to-noise over samples; accuracy over both."""
  rows = session.select('eval')
  figure, panels = plt.subplots(2, 2, figsize=(11.5, 8.0), layout='constrained')
  colors = plt.get_cmap('tab10' if len(choices) <= 10 else 'tab20')
  for axes, (x, y, across, up) in zip(panels.flat, PANELS, strict=True):
    for i, choice in enumerate(choices):
      # The start has no place on a logarithmic axis.
      xs, middle, low, high = (
        values[int(x == 'updates') :]
        for values in plots.curves(rows, choice.label, x, y)
      )
      listed = choice.batches in config.batches
      style = '-' if choice.grows else '--' if listed else ':'
      if not listed:
        low = high = middle
      plots.band(
        axes, xs, middle, low, high, style=style, marker='.',
        color=colors(i % colors.N), label=choice.label, bold=choice.grows,
      )  # fmt: skip
    axes.set(
      xscale='log' if x == 'updates' else 'linear', xlabel=across, ylabel=up,
      yscale='linear' if y == 'test_accuracy' else 'log',
    )  # fmt: skip
    axes.grid(alpha=0.3)
  ends = [
    row['test_accuracy']
    for row in rows
    if row['step'] == config.epochs and 'test_accuracy' in row
  ]
  for axes in panels[1]:
    low = np.quantile(ends, 0.1) - 0.05
    axes.set_ylim(max(0.0, low), min(1.0, max(ends) + 0.01))
  plots.legend_right(figure, panels[0][0])
  plots.save(
    figure, session.folder / 'image_classification.png',
    title=f'{config.dataset}, {config.model}',
  )  # fmt: skip


@launch.program
def main(config: Config) -> None:
  """Tunes and runs every choice."""
  data = image_classifiers.load(
    config.dataset, config.data_dir, config.test_size,
    np.dtype(config.precision),
  )  # fmt: skip
  fit = image_classifiers.hold_out(
    *data.train, config.valid_size, 'valid', data.classes
  )
  for name in config.batches:  # Errors before hours of work.
    images.batches(name, config.first_size, len(fit.train[1]), config.decay)
  choices = [
    Choice(*pair)
    for pair in itertools.product(config.optimizers, config.batches)
  ]
  with Session('image_classification', config) as session:
    summary = run(session, config, data, fit, choices)
    averages = dict.fromkeys(
      Choice(row['optimizer'], same_average(row))
      for row in summary
      if ':' in row['batches']
    )
    more = [choice for choice in averages if choice not in choices]
    summary += run(session, config, data, fit, more)
    compared = compare(session, references(config, summary))
    show(config, summary, compared)
    draw(session, config, [*choices, *more])
    print(f'\n{session.folder}/record.jsonl, image_classification.png')


def run(
  session, config: Config, data, fit, choices: list[Choice]
) -> list[dict]:
  """Tunes choices on the images for validation, and runs them on all."""
  named = {choice.label: choice for choice in choices}
  whole, held = (
    images.problem(config, part, tuple(named)) for part in (data, fit)
  )
  plan = study.Plan(
    '', whole, whole.budget, config.learning_rates, config.seeds,
    config.tuning_seeds, pieces=config.epochs, held=held,
  )  # fmt: skip
  rows = study.study(session, plan, tuple(named))
  return [row | named[row['method']]._asdict() for row in rows]


if __name__ == '__main__':
  launch.run(main, Config)
