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

The seeds of a constant batch run under one vmap; those of a growing one in one
program after the other, because a vmap of loops is as slow as its largest
batch.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optlab

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

_WATCHED = 1024  # Images on which the signal-to-noise ratio is measured.


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
    'Batch sizes, and tests with their constants.',
  )
  first_size: int = flags.flag(8, 'First size of a growing batch.', low=2)
  microbatch: int = flags.flag(64, 'Images in a round of the loop.', low=1)
  epochs: int = flags.flag(
    10, 'Passes over the training images.', low=1, grows=True
  )
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


class Lanes(NamedTuple):
  """All seeds or rates of one method."""

  state: optlab.batches.GrowingState  # leading axis: lanes
  rate: jax.Array  # shape (lanes,)


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


class Task(NamedTuple):
  """What is trained and measured; the same for every choice.

  Attributes:
    data: The images, split.
    model: The model.
    measure: ``(params, resident data) -> dict`` of scalars, jitted.
  """

  data: image_classifiers.Images
  model: image_classifiers.Model
  measure: Callable[..., dict[str, jax.Array]]


def task(config: Config, data: image_classifiers.Images) -> Task:
  """Makes a `Task`."""
  dtype = jnp.dtype(config.precision)
  side = data.train[0].shape[1]
  model = image_classifiers.model(config.model, side, data.classes, dtype)
  watch = optlab.per_example(model.losses, optlab.ghost_norms)

  @jax.jit
  def measure(params, resident):
    (x, y), (held_x, held_y) = resident
    estimate, _ = watch.estimate(params, (), (x[:_WATCHED], y[:_WATCHED]))
    count = estimate.extras['sample_size'] - 1
    variance = estimate.extras['sum_sq_diff_norm'] / count
    right = jnp.argmax(model.logits(params, held_x), -1) == held_y
    return {
      'train_loss': jnp.mean(model.losses(params, (x, y))),
      f'{data.name}_loss': jnp.mean(model.losses(params, (held_x, held_y))),
      f'{data.name}_accuracy': jnp.mean(right.astype(dtype)),
      'signal_to_noise': optax.tree.norm(estimate.grads) ** 2 / variance,
    }

  return Task(data, model, measure)


def run(
  session: Session,
  config: Config,
  task: Task,
  choice: Choice,
  label: str,
  lanes: Sequence[tuple[int, float]],
) -> None:
  """Trains one lane for each pair of a seed and a rate, and records them."""
  dtype = jnp.dtype(config.precision)
  data, model = task.data, task.model
  length = len(data.train[1])
  name = choice.batches
  if name.isdigit():  # The average of a growing batch, while rates are tuned.
    name = str(min(int(name), length))
  rule = images.batches(name, config.first_size, length)
  microbatch = config.microbatch
  if rule.moments is optlab.batches.microbatch_means:
    microbatch = min(microbatch, rule.size // 2)
  route = rule.moments
  if route is not optlab.batches.microbatch_means:
    route = lambda losses, params, *rows: rule.moments(
      losses, params, *devices.split(rows)
    )
  estimator = optlab.per_example(
    model.losses,
    route,
    inner_products=rule.inner_products,
    microbatch_size=min(microbatch, rule.limit),
  )
  if not rule.grows:
    # It would only watch: a constant batch pays for no moments.
    grow = optax.identity
  else:
    grow = lambda: optlab.grow_batch(rule.test, rule.size, rule.limit)

  def make(rate):
    return optax.chain(grow(), images.OPTIMIZERS[choice.optimizer](rate))

  resident = jax.tree.map(jnp.asarray, (data.train, data.held))
  seeds = tuple(seed for seed, _ in lanes)
  rates = np.array([rate for _, rate in lanes])

  def start(seed):
    return optlab.growing_init(
      jax.tree.map(jnp.asarray, model.start(seed)),
      estimator,
      make(0.1),
      resident[0],
      jax.random.key(seed),
    )

  def lane(state, rate, train):
    step = optlab.growing_step(
      estimator,
      make(rate),
      batch_size=None if rule.grows else rule.size,
      rest=optlab.batches.keep,  # Equally many samples in every epoch.
    )
    last = state.epochs.epoch + 1
    return jax.lax.while_loop(
      lambda state: state.epochs.epoch < last,
      lambda state: step(state, train)[0],
      state,
    )

  def advance(lanes, resident):
    run = lambda state, rate: lane(state, rate, resident[0])
    if rule.grows:
      state = jax.lax.map(lambda args: run(*args), (lanes.state, lanes.rate))
    else:
      state = jax.vmap(run)(lanes.state, lanes.rate)
    return lanes._replace(state=state)

  def evaluate(lanes):
    params = lanes.state.train.params
    rows = [
      task.measure(jax.tree.map(lambda leaf, i=i: leaf[i], params), resident)
      for i in range(len(seeds))
    ]
    values = {
      name: np.array([row[name] for row in rows], float) for name in rows[0]
    }
    state = jax.device_get(lanes.state._replace(epochs=None))
    epochs = lanes.state.epochs
    samples = np.asarray(epochs.epoch, np.int64) * length + epochs.position
    updates = state.train.step
    sizes = np.full(len(seeds), rule.size)
    if rule.grows:
      sizes = optax.tree.get(state.train.opt_state, 'batch_size')
    return {
      **values,
      # Of the mean gradient of the batch that comes next.
      'batch_signal_to_noise': values['signal_to_noise'] * sizes,
      'samples': samples,
      'updates': updates,
      'batch_size': sizes,
      'average_batch': samples / np.maximum(updates, 1),
      'learning_rate': rates,
    }

  by_seed = {seed: start(seed) for seed in dict.fromkeys(seeds)}
  state = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(by_seed[seed] for seed in seeds)
  )
  session.run(
    label,
    Lanes(state, jnp.asarray(rates, dtype)),
    advance,
    evaluate,
    steps=config.epochs,
    seeds=seeds,
    data=resident,
    show=f'{data.name}_accuracy',
    prefix=True,
    **choice._asdict(),
  )


def tune(
  session: Session, config: Config, task: Task, choice: Choice
) -> study.Found:
  """The rate of the least validation loss, a median over the tuning seeds.

  Args:
    session: The run.
    config: Its flags.
    task: With validation images in the place of test images.
    choice: What is tuned.

  Returns:
    What the search found.
  """
  seeds = range(study.TUNING_SEED, study.TUNING_SEED + config.tuning_seeds)

  def measure(new, grid):
    label = f'{choice.label}: tuning, grid {grid}'
    lanes = list(itertools.product(seeds, new))
    run(session, config, task, choice, label, lanes)
    return [
      (row['learning_rate'], row['valid_loss'])
      for row in verdicts.last(session.rows, label)
    ]

  return study.search(config.learning_rates, measure)


def same_average(row: dict) -> str:
  """The constant batch that takes as many steps as a growing one's row."""
  return str(round(row['average_batch']))


REPORTED = (
  'test_accuracy', 'test_loss', 'train_loss', 'updates', 'average_batch',
  'batch_size',
)  # fmt: skip


def summarize(session: Session, choice: Choice, found: study.Found) -> dict:
  """The summary row of a choice: medians and ranges over the seeds."""
  ends = verdicts.last(session.rows, choice.label)
  row: dict[str, Any] = {
    **choice._asdict(),
    'learning_rate': found.rate,
    'inner_lr': None,
    'edge': found.edge,
    'valid_loss': found.values[found.rate],
    'seconds': float(np.median([end['seconds'] for end in ends])),
  }
  for name in REPORTED:
    row |= verdicts.spread(ends, name)
  session.write('summary', **row)
  return row


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
      best = min(grid, key=lambda name: rows[name]['valid_loss'])
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
  """Prints the papers' columns, and then differences within the seeds."""

  def spread(row, name, scale=1.0, digits=4):
    low, high = scale * row[f'{name}_low'], scale * row[f'{name}_high']
    middle = f'{scale * row[name]:.{digits}f}'
    return f'{middle} ({low:.{digits}f} to {high:.{digits}f})'

  label = lambda row: f'{row["optimizer"]}, {row["batches"]}'
  tables.show(
    f'{config.dataset}, {config.model}: {config.epochs} epochs, medians and'
    f' ranges of {config.seeds} seeds; rates of the lowest validation loss over'
    f' {config.tuning_seeds} others (* at an end of the grid)',
    (
      'optimizer, batch', 'rate', 'valid loss', 'test accuracy %', 'steps',
      'average batch', 'final batch', 'test loss', 'train loss',
    ),
    [
      (
        label(row), verdicts.rate(row), f'{row["valid_loss"]:.4f}',
        spread(row, 'test_accuracy', 100.0, 2), round(row['updates']),
        round(row['average_batch']), round(row['batch_size']),
        spread(row, 'test_loss'), spread(row, 'train_loss'),
      )
      for row in summary
    ],
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
        f'{label(row)}, {row["against"]}',
        *(points(row, end) for end in ('', '_low', '_high')), row['verdict'],
        f'{row["won"]}, {row["lost"]}', f'{row["loss_gap"]:+.4f}',
        f'{row["steps_ratio"]:.2f}',
      )
      for row in compared
    ],
  )  # fmt: skip


def draw(session: Session, config: Config, choices: Sequence[Choice]) -> None:
  """Batch size and signal-to-noise over samples; accuracy over both."""
  rows = session.select('eval')
  figure, panels = plt.subplots(2, 2, figsize=(10.5, 8.0))
  for axes, (x, y, log_x, log_y) in zip(
    panels.flat,
    (
      ('samples', 'batch_size', False, True),
      ('samples', 'batch_signal_to_noise', False, True),
      ('samples', 'test_accuracy', False, False),
      ('updates', 'test_accuracy', True, False),
    ),
    strict=True,
  ):
    for i, choice in enumerate(choices):
      xs, middle, low, high = plots.curves(rows, choice.label, x, y)
      if log_x:  # The start has no place on the axis.
        xs, middle, low, high = xs[1:], middle[1:], low[1:], high[1:]
      color = plt.get_cmap('tab20')(i % 20)
      listed = choice.batches in config.batches
      style = '-' if choice.grows else '--' if listed else ':'
      axes.plot(xs, middle, style, color=color, label=choice.label, marker='.')
      if listed:
        axes.fill_between(xs, low, high, color=color, alpha=0.12, lw=0)
    axes.set_xscale('log' if log_x else 'linear')
    axes.set_yscale('log' if log_y else 'linear')
    axes.set_xlabel({'samples': 'samples', 'updates': 'steps'}[x])
    axes.set_ylabel(
      {
        'batch_size': 'size of the next batch',
        'batch_signal_to_noise': "signal to noise of the next batch's gradient",
        'test_accuracy': 'test accuracy',
      }[y]
    )
    axes.grid(alpha=0.3)
  ends = [
    row['test_accuracy']
    for row in rows
    if row['step'] == config.epochs and 'test_accuracy' in row
  ]
  for axes in panels[1]:
    low = np.quantile(ends, 0.1) - 0.05
    axes.set_ylim(max(0.0, low), min(1.0, max(ends) + 0.01))
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.tight_layout(rect=(0.0, 0.0, 1.0, 0.97))
  figure.legend(handles, labels, loc='center left', bbox_to_anchor=(1.0, 0.5))
  plots.save(
    figure,
    session.folder / 'image_classification.png',
    title=f'{config.dataset}, {config.model}',
  )


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
    images.batches(name, config.first_size, len(fit.train[1]))
  tuning, final = task(config, fit), task(config, data)
  summary: list[dict] = []
  choices: list[Choice] = []

  with Session('image_classification', config) as session:

    def add(choice):
      if choice in choices:
        return
      choices.append(choice)
      found = tune(session, config, tuning, choice)
      lanes = [(seed, found.rate) for seed in range(config.seeds)]
      run(session, config, final, choice, choice.label, lanes)
      summary.append(summarize(session, choice, found))

    for pair in itertools.product(config.optimizers, config.batches):
      add(Choice(*pair))
    for row in list(summary):
      if ':' in row['batches']:
        add(Choice(row['optimizer'], same_average(row)))
    compared = compare(session, references(config, summary))
    show(config, summary, compared)
    draw(session, config, choices)
    print(f'\n{session.folder}/record.jsonl, image_classification.png')


if __name__ == '__main__':
  launch.run(main, Config)
