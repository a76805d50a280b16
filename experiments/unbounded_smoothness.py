"""An upper level whose smoothness grows with its gradient: who survives it.

python -m experiments.unbounded_smoothness [--problem=cosh] [--start=12] ...

Every method meets every upper step, schedule and rate, at equal oracle calls,
from a start where the value is in the hundred thousands. The picture shows the
value at the end against the upper rate.
"""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax

import optlab

from .lab import flags
from .lab import launch
from .lab import plots
from .lab import record
from .lab import tables
from .lab.session import Session
from .methods import bilevel

WINDOW = 200  # The value at the end is the median over the last steps.
NEAR = 0.05  # What counts as solved; the least value is zero.


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  """Flags."""

  QUICK = {
    'methods': ('bo_rep', 'soba', 'ttsa'),
    'upper_steps': ('plain', 'normalized'),
    'learning_rates': (0.03, 0.1, 0.3),
    'steps': 1000,
    'seeds': 2,
  }
  MINUTES = (1, None)

  problem: str = flags.flag(
    'cosh', 'The upper level.', choices=('cosh', 'quartic')
  )
  start: float = flags.flag(
    12.0, 'Distance of y - t in each coordinate.', low=0.0
  )
  learning_rates: tuple[float, ...] = flags.flag(
    tuple(float(f'{m}e{e}') for e in range(-7, 0) for m in (1, 3)) + (1.0,),
    'Upper rates.',
    low=0.0,
  )
  steps: int = flags.flag(
    3000,
    'Steps of bo_rep; the others have as many calls.',
    low=WINDOW,
    grows=True,
  )
  equal: str = flags.flag(
    'calls',
    'What the methods have equally much of.',
    choices=('calls', 'steps'),
  )
  inner_lr: float = flags.flag(0.05, 'Rate of y and of the linear system.')
  lower_steps: int = flags.flag(5, 'Lower steps of a round.', low=1)
  neumann_steps: int = flags.flag(5, 'Terms of the Neumann series.', low=1)
  beta: float = flags.flag(0.9, 'Momentum of the upper step.', low=0.0)
  noise: float = flags.flag(
    0.5, 'Standard deviation of the gradients.', low=0.0
  )
  methods: tuple[str, ...] = flags.flag(
    bilevel.METHODS, 'Estimators.', choices=bilevel.METHODS
  )
  upper_steps: tuple[str, ...] = flags.flag(
    ('plain', 'momentum', 'clipped', 'normalized'),
    'Upper steps.',
    choices=bilevel.UPPER_STEPS,
  )
  seeds: int = flags.flag(5, 'Number of noise seeds.', low=1, grows=True)


class Problem(NamedTuple):
  """The two levels, the start, and the exact value."""

  upper: Callable
  lower: Callable
  x: np.ndarray
  y: np.ndarray
  value: Callable


def make_problem(name: str, start: float, dimension: int = 10) -> Problem:
  """``y* = B x``; the upper level is a sum over the coordinates of ``y - t``.

  Args:
    name: ``cosh`` or ``quartic``.
    start: ``|y - t|`` in each coordinate.
    dimension: Of x and y.

  Returns:
    A `Problem` whose samples are additive noise on the gradients in y.
  """
  random = np.random.RandomState(0)
  basis, _ = np.linalg.qr(random.normal(size=(dimension, dimension)))
  hessian = basis @ np.diag(np.linspace(1.0, 5.0, dimension)) @ basis.T
  noise = random.normal(size=(dimension, dimension))
  mix = np.eye(dimension) + 0.3 * noise / np.sqrt(dimension)
  target = random.normal(size=dimension)
  y = target + start * np.sign(random.normal(size=dimension))

  def f(y):
    gap = y - target
    if name == 'cosh':
      return jnp.mean(jnp.exp(gap) + jnp.exp(-gap)) - 2.0
    return jnp.sum(gap**4) / 4.0

  def upper(x, y, noise):
    del x
    return f(y) + noise @ y

  def lower(x, y, noise):
    return 0.5 * y @ hessian @ y - (hessian @ mix @ x + noise) @ y

  x = np.linalg.solve(mix, y)
  return Problem(upper, lower, x, y, lambda x: f(mix @ x))


class RunState(NamedTuple):
  """All lanes of one method; each has a rate, a schedule and a seed."""

  train: Any
  key: jax.Array
  values: jax.Array  # shape (lanes, WINDOW), the last values


class Lanes(NamedTuple):
  """What the lanes differ in."""

  seed: np.ndarray
  rate: np.ndarray
  cosine: np.ndarray


def make_lanes(config: Config) -> Lanes:
  """Every rate, schedule and seed."""
  grid = np.meshgrid(
    np.arange(config.seeds), np.asarray(config.learning_rates), [False, True],
    indexing='ij',
  )  # fmt: skip
  return Lanes(*(axis.ravel() for axis in grid))


def prepare(
  config: Config, problem: Problem, method: bilevel.Method, upper_step: str,
  steps: int, every: int,
):  # fmt: skip
  """The first state of all lanes, and the function that advances them."""
  lanes = make_lanes(config)
  dtype = jnp.dtype(config.precision)

  def parts(rate, cosine):
    estimator = method.make(
      problem.upper, problem.lower, optax.sgd(config.inner_lr),
      config.inner_lr,
    )  # fmt: skip
    rates = bilevel.schedule(rate, cosine, steps)
    tx = bilevel.upper_step(upper_step, rates, config.beta)
    return estimator, tx

  def sample(key):
    noise = config.noise * jax.random.normal(key, problem.y.shape, dtype)
    return noise, noise

  def start(rate, cosine, seed):
    estimator, tx = parts(rate, cosine)
    key = jax.random.key(seed)
    x = jnp.asarray(problem.x, dtype)
    train = method.init(estimator, tx, x, jnp.asarray(problem.y, dtype), key)
    values = jnp.full((WINDOW,), problem.value(x), dtype)
    return RunState(train, key, values)

  def advance_lane(rate, cosine, state):
    estimator, tx = parts(rate, cosine)
    train_step = optlab.train_step(estimator, tx)

    def body(carry, _):
      train, values = carry
      key = jax.random.fold_in(state.key, train.step)
      train, _ = train_step(
        train, bilevel.draw(key, sample, method.step_samples)
      )
      value = problem.value(train.params)
      values = values.at[train.step % WINDOW].set(value)
      return (train, values), None

    (train, values), _ = jax.lax.scan(
      body, (state.train, state.values), length=every
    )
    return RunState(train, state.key, values)

  rate, cosine = jnp.asarray(lanes.rate, dtype), jnp.asarray(lanes.cosine)
  state = jax.jit(jax.vmap(start))(rate, cosine, jnp.asarray(lanes.seed))
  return state, lambda state: jax.vmap(advance_lane)(rate, cosine, state), lanes


def run_one(session, config, problem, name, upper_step) -> None:
  """One method and upper step over all rates, schedules and seeds."""
  table = bilevel.methods(config.lower_steps, config.neumann_steps)
  method, pieces = table[name], 3
  steps = config.steps // pieces * pieces
  if config.equal == 'calls':
    steps = method.steps(table['bo_rep'].calls * steps, pieces)
  state, advance, lanes = prepare(
    config, problem, method, upper_step, steps, steps // pieces
  )

  def evaluate(state):
    step = np.asarray(state.train.step[0])
    return {
      'value': np.median(state.values, axis=1),
      'learning_rate': lanes.rate,
      'schedule': np.where(lanes.cosine, 'cosine', 'constant'),
      'gradients': step * method.gradients,
      'products': step * method.products,
      'total_rejected': optax.tree.get(
        state.train.estimator_state, 'total_rejected'
      ),
    }

  session.run(
    f'{name}, {upper_step}', state, advance, evaluate,
    steps=steps, every=steps // pieces,
    seeds=tuple(int(seed) for seed in lanes.seed),
    estimator=name, upper_step=upper_step,
  )  # fmt: skip


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
  choices = itertools.product(
    config.methods, config.upper_steps, bilevel.SCHEDULES
  )
  for name, upper_step, schedule in choices:
    fields = {
      'estimator': name,
      'upper_step': upper_step,
      'schedule': schedule,
    }
    by_rate = finals(session.rows, **fields)
    medians = {rate: float(np.median(v)) for rate, v in by_rate.items()}
    best = min(medians, key=lambda rate: medians[rate])
    wide = [rate for rate in by_rate if 0.03 <= rate <= 1]
    count, interval = span(by_rate, np.median)
    row = {
      'solved_rates': count,
      'solved_span': interval,
      'solved_rates_every_seed': span(by_rate, max)[0],
      'best_rate': best,
      'best_value': medians[best],
      'wide_median': max((medians[rate] for rate in wide), default=None),
      'wide_worst': max((max(by_rate[rate]) for rate in wide), default=None),
    }
    session.write('summary', **fields, **row)
    label = f'{name}, {upper_step}, {schedule}'
    shown.append((label, *row.values()))
  tables.show(
    f'{config.problem}: of {len(config.learning_rates)} rates, those that end'
    f' below {NEAR} in the median of {config.seeds} seeds; highest value over'
    ' the rates from 0.03 to 1',
    (
      'method, upper step, schedule',
      'rates',
      'from, to',
      'every seed',
      'best rate',
      'value there',
      'highest median',
      'highest',
    ),
    shown,
  )


def draw(session: Session) -> None:
  """Final value against upper rate, a panel each schedule and upper step."""
  rows = session.rows
  names = list(
    dict.fromkeys(r['estimator'] for r in record.select(rows, 'eval'))
  )
  uppers = list(
    dict.fromkeys(r['upper_step'] for r in record.select(rows, 'eval'))
  )
  start = max(r['value'] for r in record.select(rows, 'eval', step=0))
  floor, ceiling = 1e-4, 1e3 * start
  figure, panels = plt.subplots(
    2, len(uppers), figsize=(3.6 * len(uppers), 6.4), sharex=True, sharey=True,
    squeeze=False,
  )  # fmt: skip
  colors = mpl.colormaps['tab10']
  for i, schedule in enumerate(bilevel.SCHEDULES):
    for j, upper_step in enumerate(uppers):
      axes = panels[i][j]
      for k, name in enumerate(names):
        by_rate = finals(
          rows, estimator=name, upper_step=upper_step, schedule=schedule
        )
        rates = list(by_rate)
        values = np.clip(np.array(list(by_rate.values())), floor, ceiling)
        ours = name.startswith('bo_rep')
        axes.plot(
          rates, np.median(values, axis=1), '-' if ours else '--',
          color=colors(k % 10), label=name, lw=2.2 if name == 'bo_rep' else 1.2,
        )  # fmt: skip
        axes.fill_between(
          rates, values.min(1), values.max(1), color=colors(k % 10),
          alpha=0.12, lw=0,
        )  # fmt: skip
      axes.axhline(start, color='gray', lw=0.8, ls=':')
      axes.axhline(NEAR, color='black', lw=0.8, ls=':')
      axes.set_xscale('log')
      axes.set_yscale('log')
      axes.set_ylim(floor / 2, ceiling * 2)
      axes.set_title(f'{upper_step}, {schedule} rate', fontsize=10)
      axes.grid(alpha=0.3)
      if i == 1:
        axes.set_xlabel('upper rate')
      if j == 0:
        axes.set_ylabel('f(x, y*(x)) at the end')
  panels[0][0].annotate('start', (1e-7, start * 1.3), fontsize=8, color='gray')
  panels[0][0].annotate('solved', (1e-7, NEAR / 2.5), fontsize=8)
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='center left', bbox_to_anchor=(0.91, 0.5))
  plots.save(figure, session.folder / 'unbounded_smoothness.png')


@launch.program
def main(config: Config) -> None:
  """Runs the study."""
  problem = make_problem(config.problem, config.start)
  with Session('unbounded_smoothness', config, show='value') as session:
    for name in config.methods:
      for upper_step in config.upper_steps:
        run_one(session, config, problem, name, upper_step)
    summarize(session, config)
    draw(session)
    print(session.folder)


if __name__ == '__main__':
  launch.run(main, Config)
