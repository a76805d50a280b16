"""A small transformer on characters or subwords, with batches that grow.

python -m experiments.language_modeling [--quick] [--data_dir=FILE]
    [--subwords=1024]
    [--optimizers=adamw,diffgrad] [--batches=16,64,ramp,noise,norm]

Every optimizer and batch rule sees equally many tokens. A constant batch is a
number of windows; ``ramp`` grows from the first to the largest size over the
first half of the tokens; ``noise`` asks for the gradient noise scale, averaged
over steps, ``norm`` for what the norm test asks for, averaged too, and
``norm-now`` for what it asks for by the batch at hand, as its paper does, and
``means`` by the means of its microbatches (DDP-Norm, Lau et al. 2025). Where
the batch grows the learning rate follows it, by ``--power``. Rates are picked
on the validation part by seeds that are used for nothing else; the loss shown
is that of the test part. ``tokens`` and ``steps`` are those to the loss at
which the first method ends, plus half a percent.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optlab

from .lab import flags
from .lab import launch
from .lab import plots
from .lab import study
from .lab import tables
from .lab import verdicts
from .lab.session import Session
from .problems import characters

OPTIMIZERS = {
  'adamw': lambda rate: optax.adamw(rate, b2=0.99, weight_decay=0.01),
  'diffgrad': lambda rate: optlab.diffgrad(rate, b2=0.99, weight_decay=0.01),
  'adagrad': optax.adagrad,
  'adagrad_norm': optlab.adagrad_norm,
}
# How the batch grows; the rest are numbers.
RULES = ('ramp', 'noise', 'norm', 'norm-now', 'means')
MARGIN = 1.005


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  """Flags."""

  QUICK = {
    'optimizers': ('adamw',),
    'batches': ('16', 'ramp', 'noise'),
    'tokens': 60_000,
    'length': 32,
    'width': 32,
    'layers': 2,
    'held': 32,
    'learning_rates': (0.003, 0.01, 0.03),
    'seeds': 2,
    'tuning_seeds': 1,
  }
  MINUTES = (1, 90)

  data_dir: str = flags.flag(
    '', "A text file, or a folder of them; Python's reference if empty."
  )
  optimizers: tuple[str, ...] = flags.flag(
    tuple(OPTIMIZERS), 'Optimizers.', choices=tuple(OPTIMIZERS)
  )
  batches: tuple[str, ...] = flags.flag(
    ('16', '64', 'ramp', 'noise', 'norm'),
    f'Windows of a batch, or a rule: {", ".join(RULES)}.',
  )
  subwords: int = flags.flag(
    0, 'Subwords, by pairs joined as often as they occur; 0: characters.', low=0
  )
  tokens: int = flags.flag(1_000_000, 'Tokens that a run trains on.', low=1)
  length: int = flags.flag(64, 'Characters or subwords of a window.', low=1)
  width: int = flags.flag(64, 'Width of the model.', low=1)
  layers: int = flags.flag(3, 'Layers.', low=1)
  heads: int = flags.flag(2, 'Heads; divides the width.', low=1)
  dropout: float = flags.flag(0.1, 'Share that is dropped.', low=0.0)
  first_size: int = flags.flag(8, 'First size of a growing batch.', low=2)
  largest_size: int = flags.flag(128, 'Its largest size.', low=2)
  microbatch: int = flags.flag(8, 'Windows in a round of the loop.', low=1)
  eta: float = flags.flag(1.0, 'Constant of the tests.', low=1e-6)
  decay: float = flags.flag(0.95, 'Of their averages.', low=1e-6)
  power: float = flags.flag(
    0.5, 'The rate follows a growing batch by this power of it; 0: not.'
  )
  held: int = flags.flag(
    64, 'Windows held out for validation, and as many for the test.', low=1
  )
  learning_rates: tuple[float, ...] = flags.flag(
    (0.001, 0.003, 0.01), 'Grid of learning rates.', low=0.0
  )
  seeds: int = flags.flag(3, 'Number of seeds.', low=1, grows=True)
  tuning_seeds: int = flags.flag(
    1, 'Seeds that pick rates; 0 takes the first rate.', low=0, grows=True
  )
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )


def check(config: Config, text: characters.Text) -> None:
  """Raises a `UserError` before work begins."""
  if config.width % config.heads:
    raise flags.UserError(
      f'--heads={config.heads}: must divide --width={config.width}'
    )
  if config.decay >= 1.0 or config.dropout >= 1.0:
    raise flags.UserError('--decay and --dropout: must be below 1')
  for name in config.batches:
    size = int(name) if name.isdigit() else None
    if name not in RULES and not (size and size <= len(text.train)):
      raise flags.UserError(
        f'--batches={name}: not a size of 1 to {len(text.train)}, and not one'
        f' of {", ".join(RULES)}'
      )
  if not config.first_size <= config.largest_size <= len(text.train):
    raise flags.UserError(
      f'--largest_size={config.largest_size}: must be --first_size='
      f'{config.first_size} to the {len(text.train)} windows of the text'
    )


def rule(config: Config, name: str) -> optlab.batches.Test | None:
  """What asks for a size; ``None`` for a constant one."""
  first, largest = config.first_size, config.largest_size
  if name == 'ramp':
    ramp = optax.linear_schedule(first, largest, config.tokens // 2)
    return optlab.batches.size_schedule(ramp, unit=config.length)
  if name == 'noise':
    return optlab.batches.noise_scale(config.eta, decay=config.decay)
  if name == 'norm':
    return optlab.norm_test(config.eta, decay=config.decay)
  return optlab.norm_test(config.eta) if name in RULES else None


def make_problem(config: Config, text: characters.Text) -> study.Problem:
  """The text as a problem of the study; a call is a token."""
  model = characters.model(
    len(text.alphabet), config.length, config.width, config.layers,
    config.heads, config.dropout,
  )  # fmt: skip

  def entry(name):
    optimizer, _, batch = name.partition(':')
    make, test_ = OPTIMIZERS[optimizer], rule(config, batch)
    size = None if test_ else int(batch)
    # A round is no larger than the batch: what is beyond it is thrown away.
    microbatch = min(config.microbatch, size or config.largest_size)
    route = optlab.ghost_norms
    if test_ is None or batch == 'ramp':
      route = optlab.batches.plain_grads
    elif batch == 'means':  # Two of them, at least.
      route = optlab.batches.microbatch_means
      microbatch = min(microbatch, config.first_size // 2)
    estimator = optlab.per_example(
      model.losses, route, microbatch_size=microbatch, has_key=True
    )

    def tx(rate):
      if test_ is None:
        return make(rate)
      first, largest = config.first_size, config.largest_size
      coupled = optlab.batches.batch_learning_rate(
        rate, first, power=config.power
      )
      return optax.chain(
        optlab.grow_batch(test_, first, largest, growth_cap=2.0),
        optax.inject_hyperparams(make)(coupled),
      )

    def start(key, rate, seed, data):
      del seed
      keys = jax.random.split(key, 3)
      return optlab.growing_init(
        model.start(keys[0]), estimator, tx(rate), data[0], keys[1], keys[2]
      )

    def step(state, key, rate, data):
      del key
      run = optlab.growing_step(estimator, tx(rate), batch_size=size)
      return run(state, data[0])[0]

    def calls(before, after):
      epochs = after.epochs.epoch - before.epochs.epoch
      moved = after.epochs.position - before.epochs.position
      return config.length * (len(text.train) * epochs + moved)

    return study.Entry(start, step, calls)

  def measure(state, data):
    loss = lambda rows: jnp.mean(model.losses(state.train.params, rows))
    return {'tuning': loss(data[1]), 'value': loss(data[2])}

  names = tuple(
    ':'.join(pair)
    for pair in itertools.product(config.optimizers, config.batches)
  )
  return study.Problem(
    entry, names, config.learning_rates, config.tokens, 'tokens', measure,
    'test loss', data=tuple(map(jnp.asarray, text[1:4])),
  )  # fmt: skip


def to_target(
  session: Session, method: str, targets: dict[int, float]
) -> dict[str, float]:
  """Medians of the tokens and steps to a loss by seed, between the looks."""
  found: dict[str, list[float]] = {'tokens': [], 'steps': []}
  for seed, target in targets.items():
    own = [
      row
      for row in session.select('eval')
      if (row['method'], row['seed']) == (method, seed)
    ]
    # Of the least loss so far, which falls.
    losses = np.fmin.accumulate([row['value'] for row in own])
    for name, field in (('tokens', 'calls'), ('steps', 'updates')):
      taken = [row[field] for row in own]
      there = np.interp(-target, -losses, taken, right=math.inf)
      found[name].append(float(there))
  return {name: float(np.median(values)) for name, values in found.items()}


@launch.program
def main(config: Config) -> None:
  """Tunes and runs every choice, prints the table and draws the picture."""
  text = characters.load(
    config.data_dir, config.length, config.held, config.subwords
  )
  check(config, text)
  problem = make_problem(config, text)
  study.check_methods(problem, problem.methods)
  with Session('language_modeling', config) as session:
    plan = study.Plan(
      '', problem, config.tokens, config.learning_rates, config.seeds,
      config.tuning_seeds,
    )  # fmt: skip
    rows = study.study(session, plan, problem.methods)
    ends = verdicts.last(session.rows, problem.methods[0])
    targets = {row['seed']: MARGIN * row['value'] for row in ends}
    for row in rows:
      reached = to_target(session, row['method'], targets)
      session.write('target', method=row['method'], **reached)
      row |= reached
    show(config, text, rows)
    picture = session.folder / 'language_modeling.png'
    title = f'{text.name}, {config.tokens:,} tokens, {config.seeds} seeds'
    draw(session, problem.methods, picture, title)
  print(f'picture: {picture}')
  print(f'record:  {session.folder / "record.jsonl"}')


def show(config: Config, text: characters.Text, rows: Sequence[dict]) -> None:
  """Prints the table."""
  there = lambda value: value if math.isfinite(value) else '-'

  def gap(row):
    if row['verdict'] == '-':
      return '-'
    return f'{row["gap_low"]:+.3f} to {row["gap_high"]:+.3f}'

  tables.show(
    f'{text.name}: test loss after {config.tokens:,} tokens, {config.seeds}'
    f' seeds (median); gap: from {rows[0]["method"]} by seed, 95 %; tokens and'
    ' steps to where that one ends, plus half a percent, by seed (* a rate at'
    ' an end of the grid)',
    ('method', 'rate', 'loss', 'gap', 'batch', 'steps', 'to it: tokens',
     'steps'),
    [
      (
        row['method'], verdicts.rate(row),
        f'{row["median"]:.3f}', gap(row),
        round(row['calls'] / config.length / max(row['updates'], 1)),
        row['updates'], there(row['tokens']), there(row['steps']),
      )
      for row in rows
    ],
  )  # fmt: skip


def draw(session: Session, methods: Sequence[str], path, title: str) -> None:
  """The loss against tokens, and against steps."""
  rows = [row for row in session.select('eval') if row['method'] in methods]
  figure, panels = plt.subplots(
    1, 2, figsize=(10.5, 4.4), sharey=True, layout='constrained'
  )
  for axes, x, name in zip(
    panels, ('calls', 'updates'), ('tokens', 'steps'), strict=True
  ):
    plots.draw_lines(axes, [('', rows)], x, 'value', log_y=False)
    axes.set(xlabel=name, ylabel='test loss' if x == 'calls' else '')
  panels[1].legend(fontsize=7, loc='center left', bbox_to_anchor=(1.0, 0.5))
  plots.save(figure, path, title=title)


if __name__ == '__main__':
  launch.run(main, Config)
