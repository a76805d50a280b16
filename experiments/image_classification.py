"""Image classification: optimizers, and batches that grow by a test.

python -m experiments.image_classification [--dataset=digits] [--model=mlp]
[--optimizers=adagrad] [--batches=8,32,128,512,full,norm:1,inner:0.5]

Every optimizer and batch rule passes over the training images equally often.
Learning rates are tuned for each on one grid, by the training loss at the end
of a run with a seed that is used for nothing else; what is reported are other
seeds. The seeds of a constant batch run under one vmap; those of a growing one
in one program after the other, because a vmap of loops is as slow as its
largest batch.
"""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments import app
from experiments import image_classifiers
from experiments import plot
from experiments import record
from experiments import report
from experiments import runner
import optlab

TUNING_SEED = 10_000
_WATCHED = 1024  # Images on which the signal-to-noise ratio is measured.


@dataclasses.dataclass(frozen=True)
class Config(app.Config):
  """Flags."""

  dataset: str = app.flag(
    'digits', 'digits, mnist in data_dir, or an IDX file by path.'
  )
  data_dir: str = app.flag('', 'Folder with data files.')
  model: str = app.flag(
    'mlp', 'Model.', choices=tuple(image_classifiers.MODELS)
  )
  optimizers: tuple[str, ...] = app.flag(
    ('adagrad',), 'Optimizers.', choices=tuple(image_classifiers.OPTIMIZERS)
  )
  batches: tuple[str, ...] = app.flag(
    ('8', '32', '128', '512', 'full')
    + ('norm:0.5', 'norm:1', 'means:1', 'inner:0.5', 'augmented:1'),
    'Batch sizes, and tests with their constants.',
  )
  first_size: int = app.flag(8, 'First size of a growing batch.', low=2)
  microbatch: int = app.flag(64, 'Images in a round of the loop.', low=1)
  epochs: int = app.flag(10, 'Passes over the training images.', low=1)
  rates: tuple[float, ...] = app.flag(
    (0.003, 0.01, 0.03, 0.1, 0.3), 'Grid of learning rates.', low=0.0
  )
  test_size: int = app.flag(360, 'Images held out.', low=1)
  seeds: int = app.flag(5, 'Number of seeds.', low=1)
  precision: str = app.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )


class Lanes(NamedTuple):
  """All seeds or rates of one method."""

  state: optlab.GrowingState  # leading axis: lanes
  rate: jax.Array  # shape (lanes,)


class Choice(NamedTuple):
  """What is compared."""

  optimizer: str
  batches: str

  @property
  def label(self) -> str:
    return f'{self.optimizer}, {self.batches}'


def run(
  session: runner.Session,
  config: Config,
  data: image_classifiers.Images,
  choice: Choice,
  label: str,
  lanes: Sequence[tuple[int, float]],
) -> None:
  """Trains one lane for each pair of a seed and a rate, and records them."""
  dtype = jnp.dtype(config.precision)
  length, side = data.train[0].shape[:2]
  model = image_classifiers.model(config.model, side, data.classes, dtype)
  rule = image_classifiers.batches(choice.batches, config.first_size, length)
  microbatch = config.microbatch
  if rule.moments is optlab.microbatch_means:
    microbatch = min(microbatch, rule.size // 2)
  estimator = optlab.per_example(
    model.losses,
    rule.moments,
    inner_products=rule.inner_products,
    microbatch_size=min(microbatch, rule.limit),
  )
  if not rule.grows:
    # It would only watch: a constant batch pays for no moments.
    grow = optax.identity
  else:
    grow = lambda: optlab.grow_batch(rule.test, rule.size, rule.limit)

  def make(rate):
    return optax.chain(
      grow(), image_classifiers.OPTIMIZERS[choice.optimizer](rate)
    )

  resident = jax.tree.map(jnp.asarray, (data.train, data.test))
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
      estimator, make(rate), batch_size=None if rule.grows else rule.size
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

  watch = optlab.per_example(model.losses, optlab.ghost_norms)

  @jax.jit
  def measure(params, resident):
    def one(params):
      (x, y), (test_x, test_y) = resident
      some = (x[:_WATCHED], y[:_WATCHED])
      estimate, _ = watch.estimate(params, (), some)
      variance = estimate.extras['sum_sq_diff_norm'] / (len(some[1]) - 1)
      right = jnp.argmax(model.logits(params, test_x), -1) == test_y
      return {
        'train_loss': jnp.mean(model.losses(params, (x, y))),
        'test_loss': jnp.mean(model.losses(params, (test_x, test_y))),
        'test_accuracy': jnp.mean(right.astype(dtype)),
        'signal_to_noise': optax.tree.norm(estimate.grads) ** 2 / variance,
      }

    return jax.lax.map(one, params)

  def evaluate(lanes):
    state = jax.device_get(lanes.state._replace(epochs=None))
    epochs = lanes.state.epochs
    samples = np.asarray(epochs.epoch, np.int64) * length + epochs.position
    updates = state.train.step
    sizes = np.full(len(seeds), rule.size)
    if rule.grows:
      sizes = optax.tree.get(state.train.opt_state, 'batch_size')
    values = jax.device_get(measure(lanes.state.train.params, resident))
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

  states = [start(seed) for seed in dict.fromkeys(seeds)]
  by_seed = dict(zip(dict.fromkeys(seeds), states, strict=True))
  state = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(by_seed[seed] for seed in seeds)
  )
  tuning = len(set(seeds)) < len(seeds)
  session.run(
    label,
    Lanes(state, jnp.asarray(rates, dtype)),
    advance,
    evaluate,
    steps=config.epochs,
    # While tuning, the lanes are rates: their numbers stand for the seeds.
    seeds=tuple(range(len(lanes))) if tuning else seeds,
    data=resident,
    show='test_accuracy',
    **choice._asdict(),
  )


def last(rows: list[dict], method: str) -> list[dict]:
  """The rows of a method's last evaluation."""
  found = record.select(rows, 'eval', method=method)
  step = max(row['step'] for row in found)
  return [row for row in found if row['step'] == step]


def summarize(session: runner.Session, choices: Sequence[Choice]) -> list[dict]:
  """One summary row a choice: means and deviations over the seeds."""
  summary = []
  for choice in choices:
    ends = last(session.rows, choice.label)
    row: dict[str, Any] = {
      **choice._asdict(), 'learning_rate': ends[0]['learning_rate'],
    }  # fmt: skip
    for name in (
      'test_accuracy', 'test_loss', 'train_loss', 'updates', 'samples',
      'average_batch', 'batch_size',
    ):  # fmt: skip
      values = np.array([end[name] for end in ends], float)
      row[name] = float(np.mean(values))
      row[f'{name}_std'] = float(np.std(values))
    seconds = [end['seconds'] for end in ends]
    row['seconds'] = float(np.mean(seconds))
    session.write('summary', **row)
    summary.append(row)
  return summary


def show(config: Config, summary: list[dict]) -> None:
  """Prints the table, and each growing batch beside the constant ones."""

  def spread(row, name, scale=1.0, digits=2):
    mean, deviation = scale * row[name], scale * row[f'{name}_std']
    return f'{mean:.{digits}f} ± {deviation:.{digits}f}'

  report.show(
    f'{config.dataset}, {config.model}: {config.epochs} epochs, mean ±'
    f' deviation over {config.seeds} seeds; learning rates from'
    f' {", ".join(f"{rate:g}" for rate in config.rates)}',
    (
      'optimizer', 'batch', 'rate', 'test accuracy %', 'test loss',
      'train loss', 'steps', 'average batch', 'final batch',
    ),
    [
      (
        row['optimizer'], row['batches'], f'{row["learning_rate"]:g}',
        spread(row, 'test_accuracy', 100.0), spread(row, 'test_loss', 1.0, 4),
        spread(row, 'train_loss', 1.0, 4), round(row['updates']),
        round(row['average_batch']), round(row['batch_size']),
      )
      for row in summary
    ],
  )  # fmt: skip
  for optimizer in config.optimizers:
    rows = [row for row in summary if row['optimizer'] == optimizer]
    constant = [row for row in rows if ':' not in row['batches']]
    if not constant:
      continue
    smallest = max(constant, key=lambda row: row['updates'])
    best = max(constant, key=lambda row: row['test_accuracy'])
    for row in rows:
      if ':' not in row['batches']:
        continue
      words = []
      for name, other in (('smallest', smallest), ('best', best)):
        gap = 100.0 * (row['test_accuracy'] - other['test_accuracy'])
        ratio = other['updates'] / row['updates']
        steps = f'{ratio:.1f} times fewer steps'
        if ratio < 1.0:
          steps = f'{1.0 / ratio:.1f} times more steps'
        words.append(
          f'against the {name} constant batch {other["batches"]} {gap:+.2f}'
          f' points in {steps}'
        )
      print(f'{optimizer}, {row["batches"]}: {"; ".join(words)}')


def draw(session: runner.Session, config: Config) -> None:
  """Batch size and signal-to-noise over samples; accuracy over both."""
  rows = session.select('eval')
  figure, panels = plt.subplots(2, 2, figsize=(10.5, 8.0))
  choices = list(itertools.product(config.optimizers, config.batches))
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
    for i, pair in enumerate(choices):
      choice = Choice(*pair)
      xs, middle, low, high = plot.curves(rows, choice.label, x, y)
      style = '-' if ':' in choice.batches else '--'
      color = plt.get_cmap('tab20')(i % 20)
      axes.plot(xs, middle, style, color=color, label=choice.label, marker='.')
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
  ends = [row['test_accuracy'] for row in rows if row['step'] == config.epochs]
  for axes in panels[1]:
    low = np.quantile(ends, 0.1) - 0.05
    axes.set_ylim(max(0.0, low), min(1.0, max(ends) + 0.01))
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.tight_layout(rect=(0.0, 0.0, 1.0, 0.97))
  figure.legend(handles, labels, loc='center left', bbox_to_anchor=(1.0, 0.5))
  plot.save(
    figure,
    session.folder / 'image_classification.png',
    title=f'{config.dataset}, {config.model}',
  )


def main(config: Config) -> None:
  """Tunes and runs every choice."""
  dtype = np.dtype(config.precision)
  data = image_classifiers.load(
    config.dataset, config.data_dir, config.test_size, dtype
  )
  choices = [
    Choice(*pair)
    for pair in itertools.product(config.optimizers, config.batches)
  ]
  for choice in choices:  # Errors before hours of work.
    image_classifiers.batches(
      choice.batches, config.first_size, len(data.train[1])
    )
  with runner.Session('image_classification', config) as session:
    for choice in choices:
      tuning = f'{choice.label}: tuning'
      lanes = [(TUNING_SEED, rate) for rate in config.rates]
      run(session, config, data, choice, tuning, lanes)
      losses = {
        row['learning_rate']: np.nan_to_num(row['train_loss'], nan=np.inf)
        for row in last(session.rows, tuning)
      }
      best = min(losses, key=lambda rate: losses[rate])
      lanes = [(seed, best) for seed in range(config.seeds)]
      run(session, config, data, choice, choice.label, lanes)
    summary = summarize(session, choices)
    show(config, summary)
    draw(session, config)
    print(f'\n{session.folder}/record.jsonl, image_classification.png')


if __name__ == '__main__':
  app.run(main, Config)
