"""Steps to a target against sampled blocks and data: a parallel speedup.

python -m experiments.parallel_speedup [--blocks=10,100] [--rows=1,8] ...

BSVRB on a multi-block quadratic with gradient noise. Every cell of sampled
blocks (I) and rows per block (B) has its own rates, those of the fewest steps
on seeds that are used for nothing else, out of one grid for all that goes on
past its edge. A run has reached the target where F - F*, and the median of that
and the next nine looks, are no more than it. The picture shows steps and
seconds against I, with the slopes of the theory.
"""

import dataclasses
import time
from typing import NamedTuple

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
from .methods import multi_block
from .problems import quadratic

LOOK = 10  # Steps from one look to the next.
WINDOW = 10  # Looks over which the gap must stay below the target.


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags."""

  QUICK = {
    'blocks': (10, 100),
    'rows': (8,),
    'learning_rates': (0.04, 0.16, 0.64),
    'inner_lrs': (0.03, 0.3),
    'steps': 2000,
    'seeds': 6,  # As many as pairs of rates: one program for both.
    'tuning_seeds': 2,
  }
  MINUTES = (1, 10)

  num_blocks: int = flags.flag(100, 'Blocks of the problem, m.', low=1)
  blocks: tuple[int, ...] = flags.flag(
    (5, 10, 25, 50, 100), 'Blocks sampled in a step, I.', low=1
  )
  rows: tuple[int, ...] = flags.flag(
    (1, 8), 'Rows per sampled block, B.', low=1
  )
  learning_rates: tuple[float, ...] = flags.flag(
    (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64), 'Rates of x.', low=0.0
  )
  inner_lrs: tuple[float, ...] = flags.flag(
    (0.01, 0.03, 0.1, 0.3), 'Steps of a block between two visits.', low=0.0
  )
  noise: float = flags.flag(3.0, 'Standard deviation of a row.', low=0.0)
  target: float = flags.flag(3e-3, 'F - F* to reach.', low=0.0)
  steps: int = flags.flag(4000, 'The most steps of a cell.', low=LOOK)
  alpha: float = flags.flag(0.1, 'Rate of the trackers of a block.', low=0.0)
  beta: float = flags.flag(0.1, 'Rate of the hypergradient.', low=0.0)
  method: str = flags.flag(
    'bsvrb_v2', 'The method.', choices=('bsvrb_v1', 'bsvrb_v2')
  )
  seeds: int = flags.flag(5, 'Number of seeds.', low=1, grows=True)
  tuning_seeds: int = flags.flag(4, 'Seeds that pick rates.', low=1, grows=True)


class Cell(NamedTuple):
  """One size of a step."""

  blocks: int
  rows: int

  @property
  def name(self) -> str:
    return f'I={self.blocks} B={self.rows}'


class State(NamedTuple):
  """One lane; a step of the study is `LOOK` of these."""

  train: optlab.TrainState
  gaps: jax.Array  # shape (WINDOW,), at the last looks
  reached: jax.Array  # Steps to the target, or inf.


def entry(config: Config, data: quadratic.Block, best, cell: Cell):
  """A cell: BSVRB at its size of a step."""
  method = multi_block.methods(alpha=config.alpha, beta=config.beta)[
    config.method
  ]
  shape = cell.blocks, data.c.shape[-1]

  def parts(rates):
    upper, lower = rates
    levels = quadratic.upper, quadratic.lower, config.num_blocks
    return method.make(*levels, lower), optax.sgd(upper)

  def gap(x):
    return jnp.asarray(quadratic.objective(x, data) - best, float)

  def start(key, rates, *_):
    del key
    x = jnp.full(data.b.shape[-1], 3.0)
    train = optlab.init(x, *parts(rates), jnp.zeros_like(data.c))
    gaps = jnp.full(WINDOW, jnp.inf).at[-1].set(gap(x))
    return State(train, gaps, jnp.full((), jnp.inf))

  def step(state, key, rates, *_):
    train_step = optlab.train_step(*parts(rates))

    def one(i, train):
      keys = jax.random.split(jax.random.fold_in(key, i))
      blocks = optlab.sample_blocks(keys[0], config.num_blocks, cell.blocks)
      # The objectives are linear in the noise: B rows are one with less of it.
      scale = config.noise / np.sqrt(cell.rows)
      noise = scale * jax.random.normal(keys[1], (2, *shape))
      rows = jax.tree.map(lambda leaf: leaf[blocks], data)
      batch = optlab.BlockBatch(blocks, (rows, noise[0]), (rows, noise[1]))
      return train_step(train, batch)[0]

    train = jax.lax.fori_loop(0, LOOK, one, state.train)
    gaps = jnp.append(state.gaps[1:], gap(train.params))
    # The look itself, too: the window alone could run ahead of it by half.
    below = jnp.maximum(gaps[0], jnp.median(gaps)) <= config.target
    now = jnp.asarray(train.step - LOOK * (WINDOW - 1), float)
    first = below & jnp.isinf(state.reached)
    return State(train, gaps, jnp.where(first, now, state.reached))

  return study.Entry(start, step, LOOK)


def problem(config: Config, cells: dict[str, Cell]) -> study.Problem:
  """The blocks; a method is a cell, tuned by its steps to the target."""
  data = quadratic.make(config.num_blocks)
  best = jax.jit(quadratic.objective)(jax.jit(quadratic.minimizer)(data), data)

  def measure(state, _):
    # Of those that are not there the one that is nearest.
    far = config.steps * (1.0 + state.gaps[-1])
    there = jnp.isfinite(state.reached)
    return {
      'value': state.gaps[-1],
      'steps_to_target': state.reached,
      'tuning': jnp.where(there, state.reached, far),
    }

  return study.Problem(
    lambda name: entry(config, data, best, cells[name]), tuple(cells),
    config.learning_rates, config.steps, 'steps', measure, 'F - F*',
    reported=('steps_to_target',), batched=True, tables=config.num_blocks,
    inner_lrs=config.inner_lrs,
  )  # fmt: skip


def seconds_per_step(choice: study.Choice, state: State) -> float:
  """Median time of a step of one run, compiled, over ten looks."""
  rates = jnp.asarray(choice.rates, float)
  step = lambda i, state: choice.entry.step(state, jax.random.key(i), rates)
  looks = jax.jit(lambda state: jax.lax.fori_loop(0, 10, step, state))
  state = jax.block_until_ready(looks(state))
  times = []
  for _ in range(5):
    began = time.perf_counter()
    state = jax.block_until_ready(looks(state))
    times.append((time.perf_counter() - began) / (10 * LOOK))
  return float(np.median(times))


def draw(found: list[dict], path, title: str) -> None:
  """Steps and seconds to the target against I, a line for each B."""
  figure, panels = plt.subplots(1, 2, figsize=(10.0, 4.0), layout='constrained')
  for axes, unit in zip(panels, ('steps', 'seconds'), strict=True):
    for i, b in enumerate(sorted({row['batch_rows'] for row in found})):
      points = sorted(
        (row['blocks'], *(factor(row, unit) * row[name] for name in STEPS))
        for row in found
        if row['batch_rows'] == b and np.isfinite(row[STEPS[0]])
      )
      if not points:
        continue
      x, y, low, high = np.array(points).T
      axes.plot(x, y, 'o-', color=f'C{i}', label=f'B = {b}')
      high = np.where(np.isfinite(high), high, y)
      axes.fill_between(x, low, high, color=f'C{i}', alpha=0.15, lw=0)
      if unit == 'steps' and i == 0:
        # The bound is a sum of both: I^-3/2 from the choice of blocks, I^-1
        # from the noise of the rows.
        for power, style in ((1.0, ':'), (1.5, '--')):
          axes.plot(
            x, y[0] * (x / x[0]) ** -power, style, color='grey',
            label=f'slope -{power:g} (theory)',
          )  # fmt: skip
    if not axes.lines:
      axes.text(
        0.5, 0.5, 'nothing reached the target', ha='center',
        transform=axes.transAxes,
      )  # fmt: skip
    axes.set_xscale('log')
    axes.set_yscale('log')
    axes.set_xlabel('sampled blocks I')
    axes.set_ylabel(f'{unit} to the target')
    axes.grid(alpha=0.3, which='both')
  if panels[0].lines:
    panels[0].legend()
  plots.save(figure, path, title=title)


@launch.program
def main(config: Config) -> None:
  """Runs every cell, prints the table and draws the picture."""
  if max(config.blocks) > config.num_blocks:
    raise flags.UserError(
      f'--blocks={max(config.blocks)}: more than --num_blocks='
      f'{config.num_blocks}'
    )
  for name in ('alpha', 'beta'):
    if not 0.0 < getattr(config, name) < 1.0:
      raise flags.UserError(f'--{name}={getattr(config, name)}: not in (0, 1)')
  cells = [Cell(i, b) for b in config.rows for i in config.blocks]
  named = {cell.name: cell for cell in cells}
  made = problem(config, named)
  plan = study.Plan(
    '', made, config.steps, config.learning_rates, config.seeds,
    config.tuning_seeds,
  )  # fmt: skip
  with Session('parallel_speedup', config) as session:

    def time_step(name, choice, states):
      if not session.select('speed', method=name):
        state = jax.tree.map(lambda leaf: leaf[0], states)
        seconds = seconds_per_step(choice, state)
        session.write('speed', method=name, step_seconds=seconds)

    found = [
      row
      | {'blocks': named[row['method']].blocks}
      | {'batch_rows': named[row['method']].rows}
      | session.select('speed', method=row['method'])[-1]
      for row in study.study(session, plan, made.methods, time_step)
    ]
    tables.show(
      f'steps to F - F* <= {config.target:g}: median and range of'
      f' {config.seeds} seeds; rates of x and y by {config.tuning_seeds} more',
      ('cell', 'rates', 'steps', 'low', 'high', 'seconds', 'speedup'),
      [
        (
          row['method'], verdicts.rate(row), *(row[name] for name in STEPS),
          factor(row, 'seconds') * row[STEPS[0]], speedup(found, row),
        )
        for row in found
      ],
    )  # fmt: skip
    path = session.folder / 'parallel_speedup.png'
    title = f'parallel_speedup, m = {config.num_blocks}, {config.seeds} seeds'
    draw(found, path, title)
    print(path)


STEPS = ('steps_to_target', 'steps_to_target_low', 'steps_to_target_high')


def factor(row: dict, unit: str) -> float:
  """What turns steps into the unit."""
  return row['step_seconds'] if unit == 'seconds' else 1.0


def speedup(found: list[dict], row: dict) -> float | None:
  """Steps of the fewest blocks with as many rows, over those of a row."""
  base = next(r for r in found if r['batch_rows'] == row['batch_rows'])
  steps = base[STEPS[0]], row[STEPS[0]]
  return steps[0] / steps[1] if np.all(np.isfinite(steps)) else None


if __name__ == '__main__':
  launch.run(main, Config)
