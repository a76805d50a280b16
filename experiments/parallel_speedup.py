"""Steps to a target against sampled blocks and data: a parallel speedup.

python -m experiments.parallel_speedup [--blocks=10,100] [--rows=1,8] ...

BSVRB on a multi-block quadratic with gradient noise. Every cell of sampled
blocks (I) and rows per block (B) has its own rates, the best of one grid for
all. A cell has reached the target where the median over seeds of F - F*, and
the median of that and the next nine looks, are no more than it. The picture
shows steps and seconds against I, with the slopes of the theory.
"""

import dataclasses
import time
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
from .lab import record
from .lab import tables
from .lab.session import Session
from .methods import multi_block
from .problems import quadratic

LOOK = 10  # Steps from one look to the next.
WINDOW = 10  # Looks over which the gap must stay below the target.


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags."""

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
  steps: int = flags.flag(
    4000, 'The most steps of a cell.', low=LOOK, grows=True
  )
  alpha: float = flags.flag(0.1, 'Rate of the trackers of a block.', low=0.0)
  beta: float = flags.flag(0.1, 'Rate of the hypergradient.', low=0.0)
  method: str = flags.flag(
    'bsvrb_v2', 'The method.', choices=('bsvrb_v1', 'bsvrb_v2')
  )
  seeds: int = flags.flag(5, 'Number of seeds.', low=1, grows=True)


class Cell(NamedTuple):
  """One size of a step."""

  blocks: int
  rows: int

  @property
  def name(self) -> str:
    return f'I={self.blocks} B={self.rows}'


class Run(NamedTuple):
  """State of one lane."""

  train: optlab.TrainState
  key: jax.Array


def problem(config: Config):
  """The blocks, and F* by Newton's method."""
  data = quadratic.make(config.num_blocks)
  best = jax.jit(quadratic.objective)(jax.jit(quadratic.minimizer)(data), data)
  return data, best


def lane(config: Config, data: quadratic.Block, cell: Cell, upper, lower):
  """The first state and the step of one lane, with its rates."""
  method = multi_block.methods(alpha=config.alpha, beta=config.beta)[
    config.method
  ]
  estimator = method.make(
    quadratic.upper, quadratic.lower, config.num_blocks, lower
  )
  tx = optax.sgd(upper)
  train_step = optlab.train_step(estimator, tx)
  shape = cell.blocks, data.c.shape[-1]

  def start(seed):
    x = jnp.full(data.b.shape[-1], 3.0)
    train = optlab.init(x, estimator, tx, jnp.zeros_like(data.c))
    return Run(train, jax.random.key(seed))

  def step(run):
    keys = jax.random.split(jax.random.fold_in(run.key, run.train.step))
    blocks = optlab.sample_blocks(keys[0], config.num_blocks, cell.blocks)
    # The objectives are linear in the noise: B rows are one with less of it.
    scale = config.noise / np.sqrt(cell.rows)
    noise = scale * jax.random.normal(keys[1], (2, *shape))
    rows = jax.tree.map(lambda leaf: leaf[blocks], data)
    batch = optlab.BlockBatch(blocks, (rows, noise[0]), (rows, noise[1]))
    return run._replace(train=train_step(run.train, batch)[0])

  return start, step


def smooth(gaps: np.ndarray) -> np.ndarray:
  """Median of each look and those after it; shape (looks, upper, lower)."""
  windows = np.lib.stride_tricks.sliding_window_view(gaps, WINDOW, axis=0)
  return np.median(windows, axis=-1)


def reached(rows: list[dict], config: Config) -> dict[str, Any] | None:
  """The first look of the best rates at which a cell is at the target."""
  if len(rows) < WINDOW:
    return None
  gaps = np.array([np.asarray(row['gaps'], float) for row in rows])
  gaps = np.nan_to_num(gaps, nan=np.inf)
  middle = np.median(gaps, axis=-1)
  # The look itself, too: the window alone could run ahead of it by half.
  now = middle[: len(middle) - WINDOW + 1]
  below = np.maximum(smooth(middle), now) <= config.target
  if not below.any():
    return None
  look = int(np.argmax(below.any(axis=(1, 2))))
  final = np.where(below[look], smooth(middle)[look], np.inf)
  upper, lower = np.unravel_index(np.argmin(final), final.shape)
  return {
    'steps': int(rows[look]['step']),
    'learning_rate': config.learning_rates[upper],
    'inner_lr': config.inner_lrs[lower],
  }


def run_cell(session, config: Config, data, best, cell: Cell) -> None:
  """All rates and seeds of a cell at once, until the best are at the target."""
  grid = np.meshgrid(
    np.asarray(config.learning_rates), np.asarray(config.inner_lrs),
    np.arange(config.seeds), indexing='ij',
  )  # fmt: skip
  upper, lower, seeds = (jnp.asarray(axis.ravel()) for axis in grid)

  def start(upper, lower, seed):
    return lane(config, data, cell, upper, lower)[0](seed)

  def advance(upper, lower, run):
    step = lane(config, data, cell, upper, lower)[1]
    return jax.lax.fori_loop(0, LOOK, lambda _, run: step(run), run)

  @jax.jit
  def gap(run):
    value = jax.vmap(lambda x: quadratic.objective(x, data))(run.train.params)
    return (value - best).reshape(grid[0].shape)

  def evaluate(run):
    step = int(run.train.step[0])
    gaps: Any = np.asarray(gap(run))
    return {
      'gaps': gaps[None],
      'best': float(np.min(np.nan_to_num(np.median(gaps, -1), nan=np.inf))),
      'samples': 2 * step * cell.blocks * cell.rows,
    }

  def stop(latest):
    rows = session.select('eval', method=cell.name)
    if rows and rows[-1]['step'] != latest[0]['step']:
      rows = [*rows, *latest]
    return reached(rows, config) is not None

  state = jax.jit(jax.vmap(start))(upper, lower, seeds)
  session.run(
    cell.name, state,
    lambda state: jax.vmap(advance)(upper, lower, state),
    evaluate,
    steps=config.steps // LOOK * LOOK, every=LOOK, stop=stop, show='best',
    prefix=True,
    tables=config.num_blocks, blocks=cell.blocks, batch_rows=cell.rows,
  )  # fmt: skip


def seconds_per_step(config: Config, data, cell: Cell, rates) -> float:
  """Median time of a step of one run, compiled, over blocks of 100 steps."""
  start, step = lane(config, data, cell, *rates)

  @jax.jit
  def hundred(run):
    return jax.lax.fori_loop(0, 100, lambda _, run: step(run), run)

  run = jax.block_until_ready(hundred(start(0)))
  times = []
  for _ in range(5):
    began = time.perf_counter()
    run = jax.block_until_ready(hundred(run))
    times.append((time.perf_counter() - began) / 100)
  return float(np.median(times))


def summarize(session, config: Config, data, cell: Cell) -> None:
  """Writes when a cell was at the target, once."""
  if session.select('summary', method=cell.name):
    return
  found = reached(session.select('eval', method=cell.name), config)
  fields = {'steps': None, 'seconds': None}
  if found:
    rates = found['learning_rate'], found['inner_lr']
    each = seconds_per_step(config, data, cell, rates)
    fields = found | {'seconds': each * found['steps']}
  session.write(
    'summary',
    method=cell.name,
    blocks=cell.blocks,
    batch_rows=cell.rows,
    **fields,
  )


def draw(rows: list[dict], path) -> None:
  """Steps and seconds to the target against I, a line for each B."""
  summaries = record.select(rows, 'summary')
  figure, panels = plt.subplots(1, 2, figsize=(10.0, 4.0), layout='constrained')
  for axes, field in zip(panels, ('steps', 'seconds'), strict=True):
    for i, b in enumerate(sorted({row['batch_rows'] for row in summaries})):
      points = sorted(
        (row['blocks'], row[field])
        for row in record.select(summaries, 'summary', batch_rows=b)
        if row[field] is not None
      )
      if not points:
        continue
      x, y = np.array(points).T
      axes.plot(x, y, 'o-', color=f'C{i}', label=f'B = {b}')
      if field == 'steps' and i == 0:
        # The bound is a sum of both: I^-3/2 from the choice of blocks, I^-1
        # from the noise of the rows.
        for power, style in ((1.0, ':'), (1.5, '--')):
          axes.plot(
            x, y[0] * (x / x[0]) ** -power, style, color='grey',
            label=f'slope -{power:g} (theory)',
          )  # fmt: skip
    axes.set_xscale('log')
    axes.set_yscale('log')
    axes.set_xlabel('sampled blocks I')
    axes.set_ylabel(f'{field} to the target')
    axes.grid(alpha=0.3, which='both')
  panels[0].legend()
  plots.save(figure, path)


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
  data, best = problem(config)
  cells = [Cell(i, b) for b in config.rows for i in config.blocks]
  with Session('parallel_speedup', config, show='best') as session:
    for cell in cells:
      run_cell(session, config, data, best, cell)
      summarize(session, config, data, cell)
    rows = session.rows
    summaries = record.select(rows, 'summary')
    tables.show(
      f'steps to F - F* <= {config.target:g}, best rates of the grid,'
      f' median of {config.seeds} seeds',
      ('cell', 'steps', 'seconds', 'rate of x', 'rate of y', 'speedup'),
      [
        (
          row['method'], row['steps'], row['seconds'],
          row.get('learning_rate'), row.get('inner_lr'),
          speedup(summaries, row),
        )
        for row in summaries
      ],
    )  # fmt: skip
    path = session.folder / 'parallel_speedup.png'
    draw(rows, path)
    print(path)


def speedup(summaries: list[dict], row: dict) -> float | None:
  """Steps of the fewest blocks with as many rows, over those of a row."""
  base = record.select(summaries, 'summary', batch_rows=row['batch_rows'])[0]
  if base['steps'] is None or row['steps'] is None:
    return None
  return base['steps'] / row['steps']


if __name__ == '__main__':
  launch.run(main, Config)
