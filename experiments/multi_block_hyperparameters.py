"""Weights of training rows, tuned by a hundred lower problems at once.

python -m experiments.multi_block_hyperparameters
    [--data_dir=DIR --dataset=w8a] [--keep_positive=0.3 --flip=0.2]
    [--train_rows=400] ...

Every method gets the same grid of rates, tuned by the validation loss on seeds
that are used for nothing else, and is then run on the other seeds. `frozen` is
the control: the weights stay as they are and only the lower problems are
solved. RSVRB keeps a cross Jacobian for each block and is left out, with a
word, where that does not fit --max_numbers.
"""

import dataclasses
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
from .lab import study
from .lab import tables
from .lab import verdicts
from .lab.session import Session
from .methods import multi_block
from .problems import scaled_logistic as logistic

METHODS = (*multi_block.METHODS, 'frozen')


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags."""

  QUICK = {
    'methods': ('bsvrb_v2', 'frozen'),
    'num_blocks': 20,
    'blocks': 5,
    'steps': 600,
    'tuning_steps': 200,
    'seeds': 2,
    'tuning_seeds': 1,
    'looks': 10,
  }

  dataset: str = flags.flag(
    'auto', 'A name or a file; auto: a8a in data_dir, or else mushrooms.'
  )
  data_dir: str = flags.flag('', 'Folder with data files.')
  train_rows: int = flags.flag(0, 'Training rows to use; 0 is all.', low=0)
  keep_positive: float = flags.flag(
    1.0, 'Fraction of the positive training rows to keep.', low=0.0
  )
  flip: float = flags.flag(0.0, 'Fraction of training labels to flip.', low=0.0)
  num_blocks: int = flags.flag(100, 'Scaled losses, m.', low=1)
  blocks: int = flags.flag(10, 'Blocks sampled in a step, I.', low=1)
  rows: int = flags.flag(32, 'Rows per sampled block, B.', low=1)
  l2: float = flags.flag(1e-5, 'Penalty of the lower problems.', low=0.0)
  steps: int = flags.flag(2000, 'Steps of the runs.', low=20, grows=True)
  tuning_steps: int = flags.flag(
    1000, 'Steps of the tuning runs.', low=20, grows=True
  )
  looks: int = flags.flag(20, 'Evaluations of a run.', low=1)
  learning_rates: tuple[float, ...] = flags.flag(
    (10.0, 100.0, 1e3, 1e4, 1e5), 'Grid of rates of the weights.', low=0.0
  )
  tuning_seeds: int = flags.flag(2, 'Seeds that pick rates.', low=1, grows=True)
  inner_lrs: tuple[float, ...] = flags.flag(
    (0.3, 1.0, 3.0),
    'Grid of steps of a block between two visits.',
    low=0.0,
  )
  alpha: float = flags.flag(0.1, 'Rate of the trackers of a block.', low=0.0)
  beta: float = flags.flag(0.1, 'Rate of the hypergradient.', low=0.0)
  floor: float = flags.flag(1e-3, 'Least eigenvalue of a tracked Hessian.')
  damping: float = flags.flag(1e-2, 'Added to each Hessian sample.', low=0.0)
  methods: tuple[str, ...] = flags.flag(METHODS, 'Methods.', choices=METHODS)
  max_numbers: float = flags.flag(
    1e8, 'The most numbers in a cross Jacobian table of RSVRB.', low=0.0
  )
  seeds: int = flags.flag(5, 'Number of seeds.', low=1, grows=True)
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )


class Run(NamedTuple):
  """State of one lane."""

  train: optlab.TrainState
  key: jax.Array


class Problem(NamedTuple):
  """Arrays of the data."""

  train: jax.Array
  validation: jax.Array
  test: jax.Array
  scale: jax.Array


def load(config: Config) -> Problem:
  """Reads, splits and spoils the data."""
  if config.keep_positive > 1.0 or config.flip > 1.0:
    raise flags.UserError('--keep_positive and --flip are fractions, at most 1')
  if config.blocks > config.num_blocks:
    raise flags.UserError(
      f'--blocks={config.blocks}: more than --num_blocks={config.num_blocks}'
    )
  for name in ('alpha', 'beta'):
    if not 0.0 < getattr(config, name) < 1.0:
      raise flags.UserError(f'--{name}={getattr(config, name)}: not in (0, 1)')
  random = np.random.default_rng(0)
  split = logistic.load(
    config.dataset, config.data_dir, keep_positive=config.keep_positive,
    flip=config.flip, random=random,
  )  # fmt: skip
  train = split.train[: config.train_rows or None]
  scale = logistic.scales(config.num_blocks, random)
  arrays = train, split.validation, split.test, scale
  return Problem(*(jnp.asarray(array, config.precision) for array in arrays))


def make(config: Config, name: str, upper: Any, lower: Any):
  """The method, its estimator and its optimizer with their rates."""
  levels = logistic.Levels(config.l2)
  table = multi_block.methods(
    alpha=config.alpha, beta=config.beta, floor=config.floor,
    damping=config.damping,
  )  # fmt: skip
  # The control solves the lower problems as v2 does.
  method = table['bsvrb_v2' if name == 'frozen' else name]
  estimator = method.make(levels.upper, levels.lower, config.num_blocks, lower)
  return method, estimator, optax.sgd(upper)


def prepare(config: Config, name: str, problem: Problem, every: int):
  """Functions that start and advance a lane: rates, seed."""

  def start(upper, lower, seed):
    _, estimator, tx = make(config, name, upper, lower)
    p = jnp.zeros(len(problem.train), problem.train.dtype)
    w = jnp.zeros(
      (config.num_blocks, problem.train.shape[1]), problem.train.dtype
    )
    return Run(optlab.init(p, estimator, tx, w), jax.random.key(seed))

  def advance(upper, lower, run, problem):
    method, estimator, tx = make(config, name, upper, lower)
    train_step = optlab.train_step(estimator, tx)
    shape = config.blocks, config.rows

    def step(_, train):
      keys = jax.random.split(jax.random.fold_in(run.key, train.step), 4)
      blocks, outer = (
        optlab.sample_blocks(key, config.num_blocks, config.blocks)
        for key in keys[:2]
      )
      rows = jax.random.randint(keys[2], shape, 0, len(problem.train))
      held = jax.random.randint(keys[3], shape, 0, len(problem.validation))
      scale = problem.scale[blocks]
      upper_batch = logistic.pick(problem.validation, held), scale
      lower_batch = logistic.pick(problem.train, rows), rows, scale
      batch = method.batch(blocks, upper_batch, lower_batch, outer)
      return train_step(train, devices.split(batch, 1))[0]

    return run._replace(train=jax.lax.fori_loop(0, every, step, run.train))

  return start, advance


def weights(name: str, train: optlab.TrainState) -> Any:
  """The lower variables of all blocks."""
  if name == 'rsvrb':
    return train.estimator_state.inner
  return optlab.multi_block.inner_variables(train.estimator_state)


def quality(name: str, train: optlab.TrainState, problem: Problem) -> dict:
  """Losses over all blocks; accuracy of the block that validates best."""
  w = weights(name, train)

  def losses(rows):
    margins = rows @ w.T
    return logistic.log_loss(margins / problem.scale), margins > 0

  validation, right = losses(problem.validation)
  test, test_right = losses(problem.test)
  best = jnp.argmax(jnp.mean(right, 0))
  return {
    'validation': jnp.mean(validation),
    'test': jnp.mean(test),
    'accuracy': jnp.mean(test_right[:, best]),
    'moved': optax.tree.norm(train.params) / np.sqrt(problem.train.shape[0]),
  }


def run_lanes(
  session, config: Config, problem: Problem, label: str, name: str,
  upper, lower, seeds, steps: int,
) -> None:  # fmt: skip
  """Runs lanes with their rates and seeds, one row a lane and look."""
  every = max(steps // config.looks, 1)
  start, advance = prepare(config, name, problem, every)
  dtype = problem.train.dtype
  upper_array, lower_array = (
    jnp.asarray(upper, dtype),
    jnp.asarray(lower, dtype),
  )
  state = jax.jit(jax.vmap(start))(
    upper_array, lower_array, jnp.asarray(seeds, jnp.int32)
  )
  measure = jax.jit(
    jax.vmap(lambda train, data: quality(name, train, data), (0, None))
  )

  def evaluate(state):
    step = int(state.train.step[0])
    return measure(state.train, problem) | {
      'learning_rate': np.asarray(upper),
      'inner_lr': np.asarray(lower),
      'samples': 2 * step * config.blocks * config.rows,
      'rejected': state.train.estimator_state.info.total_rejected,
    }

  session.run(
    label, state,
    lambda state, data: jax.vmap(advance, (0, 0, 0, None))(
      upper_array, lower_array, state, data
    ),
    evaluate,
    steps=every * config.looks, every=every,
    seeds=tuple(int(seed) for seed in range(len(seeds)))
    if label != name else tuple(int(seed) for seed in seeds),
    data=problem, show='validation', tables=config.num_blocks,
  )  # fmt: skip


def tune(session, config: Config, problem: Problem, name: str) -> tuple:
  """The rates with the least validation loss on the tuning seeds."""
  inner: dict[float, float] = {}

  def measure(new, grid):
    label = f'tuning {name}, grid {grid}'
    lanes = [
      (study.TUNING_SEED + i, upper, lower)
      for i in range(config.tuning_seeds)
      for upper in new
      for lower in config.inner_lrs
    ]
    seeds, upper, lower = zip(*lanes, strict=True)
    run_lanes(
      session, config, problem, label, name, upper, lower, seeds,
      config.tuning_steps,
    )  # fmt: skip
    losses: dict[tuple[float, float], list[float]] = {}
    for row in verdicts.last(session.rows, label):
      place = row['learning_rate'], row['inner_lr']
      loss = row['validation']
      losses.setdefault(place, []).append(np.inf if np.isnan(loss) else loss)
    # Each rate of the weights with the rate of the lower problems it likes.
    for rate in new:
      inner[rate] = min(
        config.inner_lrs, key=lambda lower: np.median(losses[rate, lower])
      )
      for loss in losses[rate, inner[rate]]:
        yield rate, loss

  uppers = (0.0,) if name == 'frozen' else config.learning_rates
  best = study.search(uppers, measure).rate
  return best, inner[best]


def compare(session, config: Config, problem: Problem) -> None:
  """Tunes and runs every method."""
  numbers = config.num_blocks * problem.train.size
  for name in config.methods:
    if name == 'rsvrb' and numbers > config.max_numbers:
      print(
        f'rsvrb is left out: its cross Jacobians have {numbers:.2g} numbers,'
        f' more than --max_numbers={config.max_numbers:g}; lower --train_rows'
      )
      continue
    upper, lower = tune(session, config, problem, name)
    seeds = list(range(config.seeds))
    count = len(seeds)
    run_lanes(
      session, config, problem, name, name, [upper] * count, [lower] * count,
      seeds, config.steps,
    )  # fmt: skip


def draw(rows: list[dict], path) -> None:
  """Validation and test loss against samples and seconds."""
  figure, panels = plt.subplots(2, 2, figsize=(10.0, 7.0), sharex='col')
  for line, y in zip(panels, ('validation', 'test'), strict=True):
    for axes, x in zip(line, ('samples', 'seconds'), strict=True):
      plots.draw_lines(
        axes, [('', rows)], x, y, log_x=False, log_y=False,
        keep=lambda method: not method.startswith('tuning'),
      )  # fmt: skip
      axes.set_ylabel(f'{y} loss')
      axes.label_outer()
  panels[0][0].legend(fontsize=8)
  plots.save(figure, path)


@launch.program
def main(config: Config) -> None:
  """Compares the methods, prints the table and draws the picture."""
  problem = load(config)
  with Session(
    'multi_block_hyperparameters', config, show='validation'
  ) as session:
    compare(session, config, problem)
    rows = session.rows
    table = []
    for name in config.methods:
      evals = record.select(rows, 'eval', method=name)
      if not evals:
        continue
      last = [row for row in evals if row['step'] == evals[-1]['step']]
      middle = {
        field: float(np.median([row[field] for row in last]))
        for field in ('validation', 'test', 'accuracy', 'moved', 'seconds')
      }
      spread = np.ptp([row['test'] for row in last])
      table.append((
        name, last[0]['learning_rate'], last[0]['inner_lr'],
        f'{middle["validation"]:.4f}', f'{middle["test"]:.4f}',
        f'{spread:.4f}', f'{middle["accuracy"]:.4f}', middle['moved'],
        middle['seconds'],
      ))  # fmt: skip
    tables.show(
      f'{config.dataset}, m = {config.num_blocks}: median of {config.seeds}'
      f' seeds after {config.steps} steps',
      ('method', 'rate of p', 'rate of w', 'validation', 'test',
       'test spread', 'accuracy', 'rms of p', 'seconds'),
      table,
    )  # fmt: skip
    path = session.folder / 'multi_block_hyperparameters.png'
    draw(rows, path)
    print(path)


if __name__ == '__main__':
  launch.run(main, Config)
