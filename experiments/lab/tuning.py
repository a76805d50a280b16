"""Bilevel methods on one problem: tuned on one grid, compared over seeds.

Every method, upper step and schedule gets the same oracle calls and the same
grid of upper rates, which goes on while the best rate is at its edge. The rate
is picked by the validation loss on seeds that are used for nothing else; what
is reported are other seeds, paired: the same start and the same samples for
every method.
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

import optlab

from ..methods import bilevel
from . import devices
from . import flags
from . import plots
from . import study
from . import tables
from . import verdicts
from .session import Session

PIECES = 5


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags of every program that compares tuned methods."""

  data_dir: str = flags.flag('', 'Folder with data files.')
  steps: int = flags.flag(
    1000, 'Steps of bo_rep; the others have as many calls.', low=1, grows=True
  )
  learning_rates: tuple[float, ...] = flags.flag(
    (), 'Grid of upper rates.', low=0.0
  )
  inner_lr: float = flags.flag(1.0, 'Rate of the lower variable.', low=0.0)
  dual_lr: float = flags.flag(
    1.0, 'Rate of the linear system and the Neumann series.', low=0.0
  )
  lower_steps: int = flags.flag(5, 'Lower steps of a round.', low=1)
  refine_epochs: int = flags.flag(
    3, 'Epochs of initialization refinement of bo_rep; 0 is none.', low=0
  )
  neumann_steps: int = flags.flag(5, 'Terms of the Neumann series.', low=1)
  beta: float = flags.flag(0.9, 'Momentum of the upper step.', low=0.0)
  methods: tuple[str, ...] = flags.flag(
    bilevel.COMPARED, 'Estimators.', choices=('saba', *bilevel.METHODS)
  )
  upper_steps: tuple[str, ...] = flags.flag(
    ('normalized', 'plain'), 'Upper steps.', choices=bilevel.UPPER_STEPS
  )
  schedules: tuple[str, ...] = flags.flag(
    ('cosine',), 'Schedules of the upper rate.', choices=bilevel.SCHEDULES
  )
  seeds: int = flags.flag(5, 'Number of seeds.', low=1, grows=True)
  tuning_seeds: int = flags.flag(
    2, 'Number of seeds that pick rates.', low=1, grows=True
  )
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )


class Problem(NamedTuple):
  """A bilevel problem with data.

  Attributes:
    upper: ``(x, y, batch) -> scalar``.
    lower: ``(x, y, batch) -> scalar``.
    data: Pytree of arrays that the next three take.
    sample: ``(key, data) -> (upper batch, lower batch)``; of a finite sum,
      `optlab.bilevel.IndexedBatch` both.
    start: ``(key, data) -> (x, y)``.
    measure: ``(x, y, data) -> dict`` of scalars, with ``valid_loss``.
    reported: Fields of the table; the first is drawn and compared in pairs,
      and less is better unless its name ends in ``accuracy`` or ``auroc``.
    lower_optimizer: ``rate -> optimizer``.
    finish: ``(x, y) -> dict`` of numbers, in NumPy, once at the end.
    blocks: Of a finite sum, the numbers of upper and of lower blocks: what
      saba needs.
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
  blocks: tuple[int, int] | None = None


def draw_block(
  key: jax.Array, rows: Any, blocks: int
) -> optlab.bilevel.IndexedBatch:
  """One of so many blocks of consecutive rows."""
  index = jax.random.randint(key, (), 0, blocks)
  size = jax.tree.leaves(rows)[0].shape[0] // blocks
  cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index * size, size)
  return optlab.bilevel.IndexedBatch(index, jax.tree.map(cut, rows))


class UpperStep(NamedTuple):
  """The upper step of a lane."""

  rate: jax.Array
  cosine: jax.Array
  which: jax.Array  # int32, its place in the configuration's upper steps


class RunState(NamedTuple):
  """All lanes of one method.

  What the lanes differ in is in it, and the data an argument, so that tuning,
  the runs that are reported, all upper steps and schedules and other variants
  of a problem are one compiled program.
  """

  train: Any
  key: jax.Array
  upper: UpperStep


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


class Program(NamedTuple):
  """One estimator on one problem; `UpperStep` and seed make a lane."""

  method: bilevel.Method
  steps: int
  refinement: int  # gradients before the first step
  start: Callable[..., RunState]  # (seeds, upper, data)
  advance: Callable[..., RunState]  # (state, data), all lanes
  measure: Callable[..., dict]  # (train, data), all lanes


def make_program(config: Config, problem: Problem, estimator: str) -> Program:
  """The functions that train and measure lanes of an estimator."""
  table = bilevel.methods(
    config.lower_steps, config.neumann_steps, blocks=problem.blocks
  )
  method = table[estimator]
  refinement = config.lower_steps * (2**config.refine_epochs - 1)
  budget = table['bo_rep'].calls * config.steps + refinement
  refined = estimator.startswith('bo_rep') and config.refine_epochs > 0
  spent = refinement if refined else 0
  steps = method.steps(budget - spent, PIECES)

  def parts(upper):
    estimator = method.make(
      problem.upper,
      problem.lower,
      problem.lower_optimizer(config.inner_lr),
      config.dual_lr,
    )
    schedule = bilevel.schedule(upper.rate, upper.cosine, steps)
    tx = bilevel.one_of(
      [
        bilevel.upper_step(name, schedule, config.beta)
        for name in config.upper_steps
      ],
      upper.which,
    )
    return estimator, tx

  def sample(key, data):
    batches = devices.split(problem.sample(key, data))
    if problem.blocks is None or method.indexed:
      return batches
    return tuple(batch.data for batch in batches)

  def start(seed, upper, data):
    key, start_key, refine_key = jax.random.split(jax.random.key(seed), 3)
    x, y = problem.start(start_key, data)
    if refined:
      keys = jax.random.split(refine_key, refinement)
      y = optlab.bilevel.refine(
        problem.lower,
        x,
        y,
        jax.vmap(lambda key: sample(key, data)[1])(keys),
        learning_rate=config.inner_lr,
        first_steps=config.lower_steps,
        epochs=config.refine_epochs,
      )
    train = method.init(*parts(upper), x, y, start_key)
    return RunState(train, key, upper)

  def advance_lane(state, data):
    step = optlab.train_step(*parts(state.upper))

    def body(train, _):
      key = jax.random.fold_in(state.key, train.step)
      batch = bilevel.draw(
        key, lambda key: sample(key, data), method.step_samples
      )
      return step(train, batch)[0], None

    train, _ = jax.lax.scan(body, state.train, length=steps // PIECES)
    return state._replace(train=train)

  def measure(train, data):
    lane = lambda train: problem.measure(
      train.params, train.estimator_state.inner, data
    )
    return jax.lax.map(lane, train)

  return Program(
    method,
    steps,
    spent,
    jax.jit(jax.vmap(start, (0, 0, None))),
    jax.vmap(advance_lane, (0, None)),
    jax.jit(measure),
  )


def run(
  session: Session,
  config: Config,
  problem: Problem,
  program: Program,
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
    program: Of the choice's estimator.
    choice: What to run.
    label: Its name in the record.
    lanes: Pairs of a seed and an upper rate, trained together.
    finish: Whether to measure what is measured once, at the end.
  """
  method, steps = program.method, program.steps
  seeds = tuple(seed for seed, _ in lanes)
  rates = np.array([rate for _, rate in lanes])
  which = config.upper_steps.index(choice.upper_step)
  upper = UpperStep(
    jnp.asarray(rates, config.precision),
    jnp.full(len(lanes), choice.schedule == 'cosine'),
    jnp.full(len(lanes), which, jnp.int32),
  )

  def evaluate(state):
    step = int(state.train.step[0])
    values = jax.device_get(program.measure(state.train, problem.data))
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
      'learning_rate': rates,
      'gradients': program.refinement + step * method.gradients,
      'products': step * method.products,
      'total_rejected': optax.tree.get(
        state.train.estimator_state, 'total_rejected'
      ),
    }

  session.run(
    label,
    program.start(jnp.asarray(seeds), upper, problem.data),
    program.advance,
    evaluate,
    steps=steps,
    every=steps // PIECES,
    seeds=seeds,
    data=problem.data,
    show='valid_loss',
    **choice._asdict(),
  )


def tune(
  session: Session,
  config: Config,
  problem: Problem,
  program: Program,
  choice: Choice,
) -> study.Found:
  """The upper rate of the least validation loss, a median over tuning seeds."""

  def measure(new, grid):
    label = f'{choice.label}: tuning, grid {grid}'
    # A run for each seed: with as many rates as seeds in the runs that are
    # reported, nothing is compiled for them again.
    for seed in range(
      study.TUNING_SEED, study.TUNING_SEED + config.tuning_seeds
    ):
      lanes = [(seed, rate) for rate in new]
      run(session, config, problem, program, choice, label, lanes, finish=False)
    rows = verdicts.last(session.rows, label)
    return [(row['learning_rate'], row['valid_loss']) for row in rows]

  return study.search(config.learning_rates, measure)


def compare(
  session: Session, config: Config, problem: Problem, group: str = ''
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
    UserError: A method is not for this problem.
  """
  if 'saba' in config.methods and problem.blocks is None:
    raise flags.UserError('--methods=saba: this problem is not a finite sum')
  programs = {
    name: make_program(config, problem, name) for name in config.methods
  }
  found: dict[Choice, study.Found] = {}
  for choice in choices(config, group):
    context = (session, config, problem, programs[choice.estimator], choice)
    found[choice] = tune(*context)
    lanes = [(seed, found[choice].rate) for seed in range(config.seeds)]
    run(*context, choice.label, lanes, finish=True)
  return summarize(session, problem, found)


def summarize(
  session: Session, problem: Problem, found: dict[Choice, study.Found]
) -> list[dict]:
  """One summary row a choice: medians over seeds, and pairs with the first."""
  first, rows = problem.reported[0], []
  sign = -1 if first.endswith(('accuracy', 'auroc')) else 1
  reference = None
  for choice, tuned in found.items():
    ends = verdicts.last(session.rows, choice.label)
    worse = np.array([sign * row[first] for row in ends])
    worse[np.isnan(worse)] = np.inf
    reference = worse if reference is None else reference
    # Positive where the first choice of the table is better.
    with np.errstate(invalid='ignore'):
      gaps = verdicts.paired(worse - reference)
    row: dict[str, Any] = {
      **choice._asdict(),
      'learning_rate': tuned.rate,
      'edge': tuned.edge,
      'steps': ends[0]['step'],
      'calls': ends[0]['gradients'] + ends[0]['products'],
      'gap': gaps.mean,
      'gap_low': gaps.low,
      'gap_high': gaps.high,
      'wins': int(np.sum(worse < reference)),
      'losses': int(np.sum(worse > reference)),
    }
    for name in problem.reported:
      values = [end[name] for end in ends]
      row[name] = float(np.median(values))
      row[f'{name}_low'] = float(np.min(values))
      row[f'{name}_high'] = float(np.max(values))
    session.write('summary', **row)
    rows.append(row)
  return rows


def show(title: str, problem: Problem, rows: list[dict]) -> None:
  """Prints the summary."""

  def spread(row, name):
    low, high = row[f'{name}_low'], row[f'{name}_high']
    return f'{row[name]:.4g} ({low:.4g} to {high:.4g})'

  def gap(row):
    text = f'{row["gap"]:+.4f}'
    if np.isnan(row['gap_low']):
      return text
    return f'{text} ({row["gap_low"]:+.4f} to {row["gap_high"]:+.4f})'

  tables.show(
    f'{title}; medians (and ranges) over seeds; gap: how much worse than the'
    f' first line in {problem.reported[0]}, by seed, with its 95 % interval',
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
        f'{row["learning_rate"]:g}' + (' (edge)' if row['edge'] else ''),
        row['steps'],
        *(spread(row, name) for name in problem.reported),
        gap(row),
        f'{row["wins"]}, {row["losses"]}',
      )
      for row in rows
    ],
  )


def draw(session: Session, config: Config, field: str, program: str) -> None:
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
        x, middle, low, high = plots.curves(rows, label, 'calls', field)
        axes.plot(
          x,
          middle,
          '-' if method.startswith('bo_rep') else '--',
          color=f'C{i % 10}',
          label=method,
          lw=2.2 if method == 'bo_rep' else 1.2,
        )
        # A seed that diverged would leave no room for the others.
        high = np.minimum(high, 2 * np.nanmax(middle, initial=0.0))
        axes.fill_between(x, low, high, color=f'C{i % 10}', alpha=0.12, lw=0)
      title = ', '.join(p for p in (group, upper_step, schedule) if p)
      axes.set_title(title, fontsize=10)
      axes.grid(alpha=0.3)
    line[0].set_ylabel(field.replace('_', ' '))
  for axes in panels[-1]:
    axes.set_xlabel('gradients + products')
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='center left', bbox_to_anchor=(0.92, 0.5))
  plots.save(figure, session.folder / f'{program}.png')
