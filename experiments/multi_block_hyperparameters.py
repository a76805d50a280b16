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
from .lab import study
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
    'seeds': 2,
    'tuning_seeds': 1,
    'looks': 10,
  }
  MINUTES = (1, 3)

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
  steps: int = flags.flag(2000, 'Steps of the runs.', low=20)
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


class Data(NamedTuple):
  """Arrays of the data."""

  train: jax.Array
  validation: jax.Array
  test: jax.Array
  scale: jax.Array


def load(config: Config) -> Data:
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
  return Data(*(jnp.asarray(array, config.precision) for array in arrays))


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
  return method, estimator, optax.sgd(0.0 if name == 'frozen' else upper)


def entry(config: Config, name: str) -> study.Entry:
  """A method; its rates are those of the weights and of the blocks."""

  def start(key, rates, seed, data):
    del key, seed
    _, estimator, tx = make(config, name, *rates)
    p = jnp.zeros(len(data.train), data.train.dtype)
    w = jnp.zeros((config.num_blocks, data.train.shape[1]), p.dtype)
    return optlab.init(p, estimator, tx, w)

  def step(state, key, rates, data):
    method, estimator, tx = make(config, name, *rates)
    shape = config.blocks, config.rows
    keys = jax.random.split(key, 4)
    blocks, outer = (
      optlab.sample_blocks(key, config.num_blocks, config.blocks)
      for key in keys[:2]
    )
    rows = jax.random.randint(keys[2], shape, 0, len(data.train))
    held = jax.random.randint(keys[3], shape, 0, len(data.validation))
    scale = data.scale[blocks]
    upper_batch = logistic.pick(data.validation, held), scale
    lower_batch = logistic.pick(data.train, rows), rows, scale
    batch = method.batch(blocks, upper_batch, lower_batch, outer)
    train_step = optlab.train_step(estimator, tx)
    return train_step(state, devices.split(batch, 1))[0]

  calls = 2 * config.blocks * config.rows
  return study.Entry(start, step, calls, tuned=name != 'frozen')


def quality(train: optlab.TrainState, problem: Data) -> dict:
  """Losses over all blocks; accuracy of the block that validates best."""
  state = train.estimator_state
  tables = optlab.multi_block.inner_variables
  w = state.inner if hasattr(state, 'inner') else tables(state)

  def losses(rows):
    def one(block):
      margins = rows @ block[0]
      return jnp.mean(logistic.log_loss(margins / block[1])), jnp.mean(
        margins > 0
      )

    # All margins at once are rows times blocks.
    return jax.lax.map(one, (w, problem.scale), batch_size=1000)

  validation, right = losses(problem.validation)
  test, test_right = losses(problem.test)
  best = jnp.argmax(right)
  return {
    'tuning': jnp.mean(validation),
    'value': jnp.mean(test),
    'validation': jnp.mean(validation),
    'test': jnp.mean(test),
    'accuracy': test_right[best],
    'total_rejected': state.info.total_rejected,
    'total_not_ok': state.info.total_not_ok,
    'moved': optax.tree.norm(train.params) / np.sqrt(problem.train.shape[0]),
  }


def methods(config: Config, data: Data) -> tuple[str, ...]:
  """Those whose tables fit."""
  numbers = config.num_blocks * data.train.size
  if 'rsvrb' in config.methods and numbers > config.max_numbers:
    print(
      f'rsvrb is left out: its cross Jacobians have {numbers:.2g} numbers,'
      f' more than --max_numbers={config.max_numbers:g}; lower --train_rows'
    )
    return tuple(name for name in config.methods if name != 'rsvrb')
  return config.methods


def draw(rows: list[dict], path, title: str) -> None:
  """Validation and test loss against samples and seconds."""
  figure, panels = plt.subplots(
    2, 2, figsize=(10.0, 7.0), sharex='col', layout='constrained'
  )
  for line, y in zip(panels, ('validation', 'test'), strict=True):
    for axes, x in zip(line, ('calls', 'seconds'), strict=True):
      plots.draw_lines(
        axes, [('', rows)], x, y, log_x=False, log_y=False,
        keep=plots.reported,
      )  # fmt: skip
      if x == 'calls':
        axes.set_xlabel('rows')
      axes.set_ylabel(f'{y} loss')
      axes.label_outer()
  panels[0][0].legend(fontsize=8)
  plots.save(figure, path, title=title)


@launch.program
def main(config: Config) -> None:
  """Compares the methods, prints the table and draws the picture."""
  data = load(config)
  chosen = methods(config, data)
  made = study.Problem(
    lambda name: entry(config, name), chosen, config.learning_rates,
    2 * config.steps * config.blocks * config.rows, 'rows', quality,
    'test loss over all blocks',
    reported=('validation', 'accuracy', 'moved', 'total_not_ok'),
    data=data, batched=True, tables=config.num_blocks,
    inner_lrs=config.inner_lrs,
  )  # fmt: skip
  plan = study.Plan(
    '', made, made.budget, config.learning_rates, config.seeds,
    config.tuning_seeds, pieces=config.looks,
  )  # fmt: skip
  name = logistic.resolve(config.dataset, config.data_dir)
  title = f'{name}, m = {config.num_blocks}'
  with Session('multi_block_hyperparameters', config) as session:
    rows = study.study(session, plan, chosen)
    verdicts.show(
      f'{title}, {config.steps} steps,'
      f' {config.seeds} seeds; rates of the weights and of the blocks; moved is'
      ' the rms of the weights',
      made.value, rows, reported=made.reported,
    )  # fmt: skip
    path = session.folder / 'multi_block_hyperparameters.png'
    draw(session.rows, path, f'multi_block_hyperparameters, {title}')
    print(path)


if __name__ == '__main__':
  launch.run(main, Config)
