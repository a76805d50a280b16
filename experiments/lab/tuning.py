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
import matplotlib.pyplot as plt
import numpy as np
import optax

import optlab

from ..methods import bilevel
from . import devices
from . import flags
from . import plots
from . import study
from . import verdicts
from .session import Session


@dataclasses.dataclass(frozen=True)
class Levels(devices.Config):
  """Flags of every program that compares bilevel methods."""

  steps: int = flags.flag(
    1000, 'Steps of bo_rep; the others have as many calls.', low=1
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


@dataclasses.dataclass(frozen=True)
class Config(Levels):
  """Flags of those that tune them."""

  data_dir: str = flags.flag('', 'Folder with data files.')
  tuning_seeds: int = flags.flag(
    2, 'Number of seeds that pick rates.', low=1, grows=True
  )
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )


NOT_OK = 'total_not_ok'  # Steps outside of a method's assumptions, of its info.


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

  @property
  def beside(self) -> tuple[str, ...]:
    """Fields of the table beside the first."""
    return (*self.reported[1:], NOT_OK)


def draw_block(
  key: jax.Array, rows: Any, blocks: int
) -> optlab.bilevel.IndexedBatch:
  """One of so many blocks of consecutive rows."""
  index = jax.random.randint(key, (), 0, blocks)
  size = jax.tree.leaves(rows)[0].shape[0] // blocks
  cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index * size, size)
  return optlab.bilevel.IndexedBatch(index, jax.tree.map(cut, rows))


DEFAULT = ('', 'plain', 'constant')


def choices(config: Levels) -> list[str]:
  """All that a configuration compares, as `of_bilevel` knows them."""
  grid = itertools.product(config.methods, config.upper_steps, config.schedules)
  return [', '.join(entry) for entry in grid]


def of_bilevel(config: Levels, problem: Problem) -> study.Problem:
  """A bilevel problem as one of the study.

  Args:
    config: The flags.
    problem: The problem.

  Returns:
    What has an entry for ``estimator, upper step, schedule``, with commas or
    colons; without the last ones plain steps at a constant rate.
  """
  first = problem.reported[0]

  def measure(state, data):
    values = problem.measure(state.params, state.estimator_state.inner, data)
    own = {'tuning': values['valid_loss'], 'value': values[first]}
    counts = {
      name: optax.tree.get(state.estimator_state, name)
      for name in ('total_rejected', NOT_OK)
    }
    return values | own | counts

  def finish(state, seed):
    del seed
    ends = state.params, state.estimator_state.inner
    return problem.finish(*jax.device_get(ends))

  methods = bilevel.methods(
    config.lower_steps, config.neumann_steps, blocks=problem.blocks
  )
  budget = methods['bo_rep'].calls * config.steps + refinement(config)
  return study.Problem(
    lambda name: _entry(config, problem, methods, budget, name),
    tuple(choices(config)), config.learning_rates, budget,
    'gradients and products of a sample', measure, first.replace('_', ' '),
    more=first.endswith(('accuracy', 'auroc')),
    reported=problem.beside,
    finish=finish, data=problem.data, batched=True,
  )  # fmt: skip


def refinement(config: Levels) -> int:
  """Lower steps of the initialization refinement."""
  return config.lower_steps * (2**config.refine_epochs - 1)


def _parse(name: str, problem: Problem, methods: Any) -> tuple[str, str, str]:
  """Estimator, upper step and schedule."""
  parts = [part.strip() for part in name.replace(':', ',').split(',')]
  estimator, upper_step, schedule, *_ = *parts, *DEFAULT[len(parts) :], ''
  if estimator == 'saba' and problem.blocks is None:
    raise flags.UserError('--methods=saba: this problem is not a finite sum')
  if estimator not in methods or upper_step not in bilevel.UPPER_STEPS:
    raise flags.UserError(
      f'--methods={name}: estimators are {", ".join(methods)}; upper steps, put'
      f' behind a colon, {", ".join(bilevel.UPPER_STEPS)}'
    )
  return estimator, upper_step, schedule


def _entry(config, problem: Problem, methods, budget, name) -> study.Entry:
  estimator, upper_step, schedule = _parse(name, problem, methods)
  method = methods[estimator]
  refined = estimator.startswith('bo_rep') and config.refine_epochs > 0
  spent = refinement(config) if refined else 0
  steps = study.steps_of(budget, method.calls, spent)

  def make(rate):
    decays = schedule == 'cosine'
    return method.make(
      problem.upper, problem.lower, problem.lower_optimizer(config.inner_lr),
      config.dual_lr,
    ), bilevel.upper_step(
      upper_step, bilevel.schedule(rate, decays, steps), config.beta
    )  # fmt: skip

  def sample(key, data):
    batches = devices.split(problem.sample(key, data))
    if problem.blocks is None or method.indexed:
      return batches
    return tuple(batch.data for batch in batches)

  def start(key, rate, seed, data):
    del seed
    start_key, refine_key = jax.random.split(key)
    x, y = problem.start(start_key, data)
    if refined:
      keys = jax.random.split(refine_key, spent)
      y = optlab.bilevel.refine(
        problem.lower, x, y, jax.vmap(lambda key: sample(key, data)[1])(keys),
        learning_rate=config.inner_lr, first_steps=config.lower_steps,
        epochs=config.refine_epochs,
      )  # fmt: skip
    return method.init(*make(rate), x, y, start_key)

  def step(state, key, rate, data):
    batch = bilevel.draw(
      key, lambda key: sample(key, data), method.step_samples
    )
    return optlab.train_step(*make(rate))(state, batch)[0]

  return study.Entry(start, step, method.calls, spent=spent)


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
  made = of_bilevel(config, problem)
  study.check_methods(made, made.methods)
  plan = study.Plan(
    group, made, made.budget, config.learning_rates, config.seeds,
    config.tuning_seeds,
  )  # fmt: skip
  return study.study(session, plan, made.methods)


def show(title: str, problem: Problem, rows: list[dict]) -> None:
  """Prints the summary."""
  name = problem.reported[0].replace('_', ' ')
  verdicts.show(title, name, rows, reported=problem.beside)


def draw(
  session: Session, config: Config, field: str, program: str, data: str
) -> None:
  """Draws a field against calls: a row a group, a column an upper step."""
  rows = session.select('eval')
  groups = list(dict.fromkeys(row.get('problem', '') for row in rows))
  pairs = list(itertools.product(config.upper_steps, config.schedules))
  figure, panels = plt.subplots(
    len(groups), len(pairs),
    figsize=(4.2 * len(pairs) + 1.6, 1.0 + 3.0 * len(groups)), squeeze=False,
    sharex=True, sharey='row', layout='constrained',
  )  # fmt: skip
  for line, group in zip(panels, groups, strict=True):
    for axes, (upper_step, schedule) in zip(line, pairs, strict=True):
      for i, method in enumerate(config.methods):
        label = f'{group}: ' * bool(group)
        label += ', '.join((method, upper_step, schedule))
        x, middle, low, high = plots.curves(rows, label, 'calls', field)
        # A seed that diverged would leave no room for the others.
        high = np.minimum(high, 2 * np.nanmax(middle, initial=0.0))
        style = '-' if method.startswith('bo_rep') else '--'
        plots.band(
          axes, x, middle, low, high, style=style, color=f'C{i % 10}',
          label=method, bold=method == 'bo_rep',
        )  # fmt: skip
      title = ', '.join(p for p in (group, upper_step, schedule) if p)
      axes.set_title(title, fontsize=10)
      axes.grid(alpha=0.3)
    line[0].set_ylabel(field.replace('_', ' '))
  for axes in panels[-1]:
    axes.set_xlabel('gradients + products')
  plots.legend_right(figure, panels[0][0])
  picture = session.folder / f'{program}.png'
  plots.save(figure, picture, title=f'{program}, {data}')
