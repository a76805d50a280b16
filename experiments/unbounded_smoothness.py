"""An upper level whose smoothness grows with its gradient: who survives it.

python -m experiments.unbounded_smoothness [--problem=cosh] [--start=12] ...

Every method meets every upper step, schedule and rate, at equal oracle calls,
from a start where the value is in the hundred thousands. The picture shows the
value at the end against the upper rate.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from .lab import flags
from .lab import launch
from .lab import plots
from .lab import record
from .lab import study
from .lab import tables
from .lab import tuning
from .lab.session import Session
from .methods import bilevel

WINDOW = 200  # The value at the end is the median over the last steps.
NEAR = 0.05  # What counts as solved; the least value is zero.


@dataclasses.dataclass(frozen=True)
class Config(tuning.Levels):
  """Flags."""

  QUICK = {
    'methods': ('bo_rep', 'soba', 'ttsa'),
    'upper_steps': ('plain', 'normalized'),
    'learning_rates': (0.03, 0.1, 0.3),
    'steps': 1000,
    'seeds': 2,
  }
  MINUTES = (1, 6)

  problem: str = flags.flag(
    'cosh', 'The upper level.', choices=('cosh', 'quartic')
  )
  start: float = flags.flag(
    12.0, 'Distance of y - t in each coordinate.', low=0.0
  )
  noise: float = flags.flag(
    0.5, 'Standard deviation of the gradients.', low=0.0
  )
  learning_rates: tuple[float, ...] = flags.flag(
    tuple(float(f'{m}e{e}') for e in range(-7, 0) for m in (1, 3)) + (1.0,),
    'Upper rates.',
    low=0.0,
  )
  steps: int = flags.flag(
    3000, 'Steps of bo_rep; the others have as many calls.', low=WINDOW
  )
  inner_lr: float = flags.flag(0.05, 'Rate of y.', low=0.0)
  dual_lr: float = flags.flag(
    0.05, 'Rate of the linear system and the Neumann series.', low=0.0
  )
  refine_epochs: int = flags.flag(
    0, 'Epochs of initialization refinement of bo_rep; 0 is none.', low=0
  )
  methods: tuple[str, ...] = flags.flag(
    bilevel.METHODS, 'Estimators.', choices=bilevel.METHODS
  )
  upper_steps: tuple[str, ...] = flags.flag(
    ('plain', 'momentum', 'clipped', 'normalized'), 'Upper steps.',
    choices=bilevel.UPPER_STEPS,
  )  # fmt: skip
  schedules: tuple[str, ...] = flags.flag(
    bilevel.SCHEDULES, 'Schedules of the upper rate.', choices=bilevel.SCHEDULES
  )


class State(NamedTuple):
  """One lane."""

  train: Any
  values: jax.Array  # shape (WINDOW,), the last values


def make_problem(config: Config, dimension: int = 10) -> study.Problem:
  """``y* = B x``; the upper level is a sum over the coordinates of ``y - t``.

  Args:
    config: The flags.
    dimension: Of x and y.

  Returns:
    The problem; its samples are additive noise on the gradients in y, and its
    value is the median over the last steps.
  """
  random = np.random.RandomState(0)
  basis, _ = np.linalg.qr(random.normal(size=(dimension, dimension)))
  hessian = basis @ np.diag(np.linspace(1.0, 5.0, dimension)) @ basis.T
  noise = random.normal(size=(dimension, dimension))
  mix = np.eye(dimension) + 0.3 * noise / np.sqrt(dimension)
  target = random.normal(size=dimension)
  y = target + config.start * np.sign(random.normal(size=dimension))
  first = np.linalg.solve(mix, y), y

  def f(y):
    gap = y - target
    if config.problem == 'cosh':
      return jnp.mean(jnp.exp(gap) + jnp.exp(-gap)) - 2.0
    return jnp.sum(gap**4) / 4.0

  def upper(x, y, noise):
    del x
    return f(y) + noise @ y

  def lower(x, y, noise):
    return 0.5 * y @ hessian @ y - (hessian @ mix @ x + noise) @ y

  def sample(key, data):
    del data
    noise = config.noise * jax.random.normal(
      key, (dimension,), config.precision
    )
    return noise, noise

  def value(state):
    return f(mix @ state.params)

  def measure(state, data):
    del data
    return {
      'value': jnp.median(state.values),
      'total_rejected': optax.tree.get(state.train, 'total_rejected'),
      'total_not_ok': optax.tree.get(state.train, 'total_not_ok'),
    }

  def entry(name):
    own = made.entry(name)

    def start(*args):
      train = own.start(*args)
      return State(train, jnp.full((WINDOW,), value(train)))

    def step(state, *args):
      train = own.step(state.train, *args)
      place = state.train.step % WINDOW
      return State(train, state.values.at[place].set(value(train)))

    return own._replace(start=start, step=step)

  start = lambda key, data: tuple(
    jnp.asarray(each, config.precision) for each in first
  )
  made = tuning.of_bilevel(
    config,
    tuning.Problem(upper, lower, None, sample, start, measure, ('value',)),
  )
  return made._replace(entry=entry, measure=measure, finish=None)


def fields_of(label: str) -> dict[str, Any]:
  """What a label of the study says."""
  names = 'estimator', 'upper_step', 'schedule'
  return dict(zip(names, label.split(', '), strict=True))


def run(session: Session, config: Config) -> None:
  """Every method over all rates and seeds, by the lanes of the study."""
  problem = make_problem(config)
  plan = study.Plan(
    '', problem, problem.budget, config.learning_rates, config.seeds, 0,
    pieces=3,
  )  # fmt: skip
  lanes = list(itertools.product(range(config.seeds), config.learning_rates))
  for label in problem.methods:
    program = study.program(plan, problem.entry(label))
    study.run(
      session, plan, program, label, lanes, reported=True, **fields_of(label)
    )


def finals(rows: list[dict], **fields: Any) -> dict[float, list[float]]:
  """The last values by rate, one a seed; NaN counts as infinite."""
  found: dict[tuple[float, int], tuple[int, float]] = {}
  for row in record.select(rows, 'eval', **fields):
    value = np.inf if np.isnan(row['value']) else row['value']
    place = (row['learning_rate'], row['seed'])
    if place not in found or row['step'] >= found[place][0]:
      found[place] = (row['step'], value)
  by_rate: dict[float, list[float]] = {}
  for (rate, _), (_, value) in sorted(found.items()):
    by_rate.setdefault(rate, []).append(value)
  return by_rate


def span(by_rate: dict[float, list[float]], pick: Any) -> tuple[int, str]:
  """How many rates solve it, by ``pick`` of the seeds, and their interval."""
  good = [rate for rate, values in by_rate.items() if pick(values) < NEAR]
  return len(good), f'{good[0]:g} to {good[-1]:g}' if good else '-'


def summarize(session: Session, config: Config) -> None:
  """Writes a summary row a method, upper step and schedule; shows them."""
  shown = []
  for label in tuning.choices(config):
    fields = dict(
      zip(
        ('estimator', 'upper_step', 'schedule'), label.split(', '), strict=True
      )
    )
    by_rate = finals(session.rows, **fields)
    medians = {rate: float(np.median(v)) for rate, v in by_rate.items()}
    best = min(medians, key=lambda rate: medians[rate])
    wide = [rate for rate in by_rate if 0.03 <= rate <= 1]
    count, interval = span(by_rate, np.median)
    row = {
      'solved_rates': count,
      'solved_span': interval,
      'solved_rates_every_seed': span(by_rate, max)[0],
      'best_rate': best if np.isfinite(medians[best]) else None,
      'best_value': medians[best],
      'wide_median': max((medians[rate] for rate in wide), default=None),
      'wide_worst': max((max(by_rate[rate]) for rate in wide), default=None),
    }
    session.write('summary', **fields, **row)
    shown.append((label, *row.values()))
  tables.show(
    f'{config.problem}: of {len(config.learning_rates)} rates, those that end'
    f' below {NEAR} in the median of {config.seeds} seeds; highest value over'
    ' the rates from 0.03 to 1',
    (
      'method, upper step, schedule', 'rates', 'from, to', 'every seed',
      'best rate', 'value there', 'highest median', 'highest',
    ),
    shown,
  )  # fmt: skip


def draw(session: Session, config: Config) -> None:
  """Final value against upper rate, a panel each schedule and upper step."""
  rows = session.rows
  start = max(r['value'] for r in record.select(rows, 'eval', step=0))
  floor, ceiling = 1e-4, 1e3 * start
  columns, lines = config.upper_steps, config.schedules
  figure, panels = plt.subplots(
    len(lines), len(columns), figsize=(3.6 * len(columns), 3.2 * len(lines)),
    sharex=True, sharey=True, squeeze=False, layout='constrained',
  )  # fmt: skip
  for axes, (schedule, upper_step) in zip(
    panels.flat, itertools.product(lines, columns), strict=True
  ):
    for k, name in enumerate(config.methods):
      by_rate = finals(
        rows, estimator=name, upper_step=upper_step, schedule=schedule
      )
      rates = list(by_rate)
      values = np.clip(np.array(list(by_rate.values())), floor, ceiling)
      style = '-' if name.startswith('bo_rep') else '--'
      plots.band(
        axes, rates, np.median(values, 1), values.min(1), values.max(1),
        style=style, color=f'C{k % 10}', label=name, bold=name == 'bo_rep',
      )  # fmt: skip
    axes.axhline(start, color='gray', lw=0.8, ls=':')
    axes.axhline(NEAR, color='black', lw=0.8, ls=':')
    axes.set(
      xscale='log', yscale='log', ylim=(floor / 2, ceiling * 2),
      title=f'{upper_step}, {schedule} rate',
    )  # fmt: skip
    axes.grid(alpha=0.3)
  for axes in panels[-1]:
    axes.set_xlabel('upper rate')
  for axes in panels[:, 0]:
    axes.set_ylabel('f(x, y*(x)) at the end')
  low = min(config.learning_rates)
  panels[0][0].annotate('start', (low, start * 1.3), fontsize=8, color='gray')
  panels[0][0].annotate('solved', (low, NEAR / 2.5), fontsize=8)
  plots.legend_right(figure, panels[0][0])
  title = f'{config.problem}, noise {config.noise:g}, {config.seeds} seeds'
  plots.save(figure, session.folder / 'unbounded_smoothness.png', title=title)


@launch.program
def main(config: Config) -> None:
  """Runs the study."""
  with Session('unbounded_smoothness', config, show='value') as session:
    run(session, config)
    summarize(session, config)
    draw(session, config)
    print(session.folder)


if __name__ == '__main__':
  launch.run(main, Config)
