"""Bilevel methods on one problem: tuned on one grid, compared over seeds.

Every method, upper step and schedule gets the same oracle calls and the same
grid of upper rates. The rate is picked by the validation loss on one seed that
is used for nothing else; what is reported are other seeds, paired: the same
start and the same samples for every method.
"""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments import app
from experiments import bilevel
from experiments import plot
from experiments import record
from experiments import report
from experiments import runner
import optlab

TUNING_SEED = 10_000
PIECES = 5
METHODS = (
  'bo_rep',
  'bo_rep_period1',
  'bo_rep_period4',
  'soba',
  'stocbio',
  'ttsa',
  'unrolled',
)


@dataclasses.dataclass(frozen=True)
class Config(app.Config):
  """Flags of every program that compares tuned methods."""

  data_dir: str = app.flag('', 'Folder with data files.')
  steps: int = app.flag(
    1000, 'Steps of bo_rep; the others have as many calls.', low=1
  )
  rates: tuple[float, ...] = app.flag((), 'Grid of upper rates.', low=0.0)
  lower_rate: float = app.flag(1.0, 'Rate of the lower variable.', low=0.0)
  linear_rate: float = app.flag(
    1.0, 'Rate of the linear system and the Neumann series.', low=0.0
  )
  lower_steps: int = app.flag(5, 'Lower steps of a round.', low=1)
  refine_epochs: int = app.flag(
    3, 'Epochs of initialization refinement of bo_rep; 0 is none.', low=0
  )
  terms: int = app.flag(5, 'Terms of the Neumann series.', low=1)
  beta: float = app.flag(0.9, 'Momentum of the upper step.', low=0.0)
  methods: tuple[str, ...] = app.flag(
    METHODS, 'Estimators.', choices=bilevel.METHODS
  )
  upper_steps: tuple[str, ...] = app.flag(
    ('plain', 'normalized'), 'Upper steps.', choices=bilevel.UPPER_STEPS
  )
  schedules: tuple[str, ...] = app.flag(
    ('cosine',), 'Schedules of the upper rate.', choices=bilevel.SCHEDULES
  )
  seeds: int = app.flag(5, 'Number of seeds.', low=1)
  precision: str = app.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )


class Problem(NamedTuple):
  """A bilevel problem with data.

  Attributes:
    upper: ``(x, y, batch) -> scalar``.
    lower: ``(x, y, batch) -> scalar``.
    data: Pytree of arrays that the next three take.
    sample: ``(key, data) -> (upper batch, lower batch)``.
    start: ``(key, data) -> (x, y)``.
    measure: ``(x, y, data) -> dict`` of scalars, with ``valid_loss``.
    reported: Fields of the table; the first is drawn and compared in pairs,
      and less is better unless its name ends in ``accuracy`` or ``auroc``.
    lower_optimizer: ``rate -> optimizer``.
    finish: ``(x, y) -> dict`` of numbers, in NumPy, once at the end.
  """

  upper: Callable[..., Any]
  lower: Callable[..., Any]
  data: Any
  sample: Callable[..., Any]
  start: Callable[..., Any]
  measure: Callable[..., Any]
  reported: tuple[str, ...]
  lower_optimizer: Callable[..., Any] = optax.sgd
  finish: Callable[..., dict[str, float]] = lambda x, y: {}


class RunState(NamedTuple):
  """All lanes of one method.

  The rates are in it, and the data an argument, so that tuning, the runs that
  are reported and other variants of a problem are one compiled program.
  """

  train: Any
  key: jax.Array
  rate: jax.Array


class Choice(NamedTuple):
  """What is compared."""

  group: str  # the variant of the problem
  estimator: str
  upper_step: str
  schedule: str

  @property
  def label(self) -> str:
    return ', '.join(part for part in self if part)


def choices(config: Config, group: str) -> list[Choice]:
  """All that a configuration compares on one variant of the problem."""
  grid = itertools.product(
    [group], config.methods, config.upper_steps, config.schedules
  )
  return [Choice(*entry) for entry in grid]


def run(
  session: runner.Session,
  config: Config,
  problem: Problem,
  choice: Choice,
  label: str,
  lanes: list[tuple[int, float]],
  *,
  finish: bool,
) -> None:
  """Trains one lane for each seed and rate, and records them.

  Args:
    session: The open session.
    config: The flags.
    problem: The problem.
    choice: What to run.
    label: Its name in the record.
    lanes: Pairs of a seed and an upper rate, trained together.
    finish: Whether to measure what is measured once, at the end.
  """
  table = bilevel.methods(config.lower_steps, config.terms)
  method = table[choice.estimator]
  refined = choice.estimator.startswith('bo_rep') and config.refine_epochs
  refinement = config.lower_steps * (2**config.refine_epochs - 1)
  spent = refinement if refined else 0
  budget = table['bo_rep'].calls * config.steps + refinement
  steps = method.steps(budget - spent, PIECES)
  seeds = tuple(seed for seed, _ in lanes)
  rates = np.array([rate for _, rate in lanes])
  rate = jnp.asarray(rates, config.precision)

  def parts(rate):
    estimator = method.make(
      problem.upper,
      problem.lower,
      problem.lower_optimizer(config.lower_rate),
      config.linear_rate,
    )
    schedule = bilevel.schedule(rate, choice.schedule == 'cosine', steps)
    tx = bilevel.upper_step(choice.upper_step, schedule, config.beta)
    return estimator, tx

  def start(seed, rate, data):
    key, start_key, refine_key = jax.random.split(jax.random.key(seed), 3)
    x, y = problem.start(start_key, data)
    if refined:
      keys = jax.random.split(refine_key, refinement)
      y = optlab.refine(
        problem.lower,
        x,
        y,
        jax.vmap(lambda key: problem.sample(key, data)[1])(keys),
        learning_rate=config.lower_rate,
        first_steps=config.lower_steps,
        epochs=config.refine_epochs,
      )
    train = method.init(*parts(rate), x, y, start_key)
    return RunState(train, key, rate)

  def advance_lane(state, data):
    step = optlab.train_step(*parts(state.rate))

    def body(train, _):
      key = jax.random.fold_in(state.key, train.step)
      sample = lambda key: problem.sample(key, data)
      return step(train, bilevel.draw(key, sample, method.inner))[0], None

    train, _ = jax.lax.scan(body, state.train, length=steps // PIECES)
    return state._replace(train=train)

  @jax.jit
  def measure(train, data):
    lane = lambda train: problem.measure(
      train.params, train.estimator_state.inner, data
    )
    return jax.lax.map(lane, train)

  def evaluate(state):
    step = int(state.train.step[0])
    values = jax.device_get(measure(state.train, problem.data))
    if step == steps and finish:
      ends = jax.device_get(
        (state.train.params, state.train.estimator_state.inner)
      )
      finished = [
        problem.finish(*jax.tree.map(lambda leaf, i=i: leaf[i], ends))
        for i in range(len(lanes))
      ]
      values |= {
        name: np.array([end[name] for end in finished]) for name in finished[0]
      }
    return {
      **values,
      'rate': rates,
      'gradients': spent + step * method.gradients,
      'products': step * method.products,
      'rejected': optax.tree.get(state.train.estimator_state, 'rejected'),
    }

  session.run(
    label,
    jax.jit(jax.vmap(start, (0, 0, None)))(
      jnp.asarray(seeds), rate, problem.data
    ),
    jax.vmap(advance_lane, (0, None)),
    evaluate,
    steps=steps,
    every=steps // PIECES,
    seeds=seeds,
    data=problem.data,
    show='valid_loss',
    **choice._asdict(),
  )


def last(rows: list[dict], method: str) -> list[dict]:
  """The rows of a method's last evaluation."""
  found = record.select(rows, 'eval', method=method)
  step = max(row['step'] for row in found)
  return [row for row in found if row['step'] == step]


def compare(
  session: runner.Session, config: Config, problem: Problem, group: str = ''
) -> list[dict]:
  """Tunes and runs every choice on one variant of a problem.

  Args:
    session: The open session.
    config: The flags.
    problem: The problem.
    group: Name of the variant.

  Returns:
    The summary rows, which are in the record too.

  Raises:
    UserError: There are no rates.
  """
  if not config.rates:
    raise app.UserError('--rates is empty: give at least one upper rate')
  for choice in choices(config, group):
    tuning = f'{choice.label}: tuning'
    lanes = [(TUNING_SEED, rate) for rate in config.rates]
    run(session, config, problem, choice, tuning, lanes, finish=False)
    losses = {
      row['rate']: np.nan_to_num(row['valid_loss'], nan=np.inf)
      for row in last(session.rows, tuning)
    }
    best = min(losses, key=lambda rate: losses[rate])
    lanes = [(seed, best) for seed in range(config.seeds)]
    run(session, config, problem, choice, choice.label, lanes, finish=True)
  return summarize(session, config, problem, group)


def summarize(
  session: runner.Session, config: Config, problem: Problem, group: str
) -> list[dict]:
  """One summary row a choice: means over seeds, and pairs with the first."""
  first, rows = problem.reported[0], []
  sign = -1 if first.endswith(('accuracy', 'auroc')) else 1
  reference = [
    sign * row[first]
    for row in last(session.rows, choices(config, group)[0].label)
  ]
  for choice in choices(config, group):
    ends = last(session.rows, choice.label)
    # Positive where the first choice of the table is better.
    gaps = np.array([sign * row[first] for row in ends]) - reference
    row: dict[str, Any] = {
      **choice._asdict(),
      'rate': ends[0]['rate'],
      'steps': ends[0]['step'],
      'calls': ends[0]['gradients'] + ends[0]['products'],
      'gap': float(np.mean(gaps)),
      'gap_error': float(np.std(gaps, ddof=1) / np.sqrt(len(gaps)))
      if len(gaps) > 1
      else None,
      'wins': int(np.sum(gaps < 0)),
      'losses': int(np.sum(gaps > 0)),
    }
    for name in problem.reported:
      values = [end[name] for end in ends]
      row[name] = float(np.mean(values))
      row[f'{name}_std'] = float(np.std(values))
    session.write('summary', **row)
    rows.append(row)
  return rows


def show(title: str, problem: Problem, rows: list[dict]) -> None:
  """Prints the summary."""

  def spread(row, name):
    return f'{row[name]:.4f} ± {row[f"{name}_std"]:.4f}'

  def gap(row):
    error = row['gap_error']
    text = f'{row["gap"]:+.4f}'
    return text if error is None else f'{text} ± {error:.4f}'

  report.show(
    f'{title}; gap: how much worse than the first line in'
    f' {problem.reported[0]}, by seed, with its standard error',
    (
      'method, upper step, schedule',
      'rate',
      'steps',
      *problem.reported,
      'gap',
      'better, worse',
    ),
    [
      (
        ', '.join(row[name] for name in Choice._fields[1:]),
        f'{row["rate"]:g}',
        row['steps'],
        *(spread(row, name) for name in problem.reported),
        gap(row),
        f'{row["wins"]}, {row["losses"]}',
      )
      for row in rows
    ],
  )


def draw(
  session: runner.Session, config: Config, field: str, program: str
) -> None:
  """Draws a field against calls: a row a group, a column an upper step."""
  rows = session.select('eval')
  groups = list(dict.fromkeys(row['group'] for row in rows))
  pairs = list(itertools.product(config.upper_steps, config.schedules))
  figure, panels = plt.subplots(
    len(groups),
    len(pairs),
    figsize=(4.6 * len(pairs), 1.0 + 3.0 * len(groups)),
    squeeze=False,
    sharex=True,
    sharey='row',
  )
  for line, group in zip(panels, groups, strict=True):
    for axes, (upper_step, schedule) in zip(line, pairs, strict=True):
      for i, method in enumerate(config.methods):
        label = Choice(group, method, upper_step, schedule).label
        x, middle, low, high = plot.curves(rows, label, 'calls', field)
        axes.plot(
          x,
          middle,
          '-' if method.startswith('bo_rep') else '--',
          color=f'C{i % 10}',
          label=method,
          lw=2.2 if method == 'bo_rep' else 1.2,
        )
        axes.fill_between(x, low, high, color=f'C{i % 10}', alpha=0.12, lw=0)
      title = ', '.join(p for p in (group, upper_step, schedule) if p)
      axes.set_title(title, fontsize=10)
      axes.grid(alpha=0.3)
    line[0].set_ylabel(field.replace('_', ' '))
  for axes in panels[-1]:
    axes.set_xlabel('gradients + products')
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='center left', bbox_to_anchor=(0.92, 0.5))
  plot.save(figure, session.folder / f'{program}.png')
