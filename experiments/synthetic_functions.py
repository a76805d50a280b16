"""The three one-dimensional functions of the diffGrad paper.

python -m experiments.synthetic_functions [--gradient=authors]

Each has a local minimum between the start and, or beside, its global one. All
optimizers take the paper's learning rate and decays; the seeds are starts
around the paper's, under one vmap, and seed 0 is the paper's own.
"""

from collections.abc import Callable
import dataclasses
import itertools

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


def f1(x: jax.Array) -> jax.Array:
  """Two parabolas; the global minimum is at -0.3."""
  return jnp.where(x <= 0.0, (x + 0.3) ** 2, (x - 0.2) ** 2 + 0.05)


def f2(x: jax.Array) -> jax.Array:
  """A steep line into a wavy cubic."""
  wave = x**3 + x * jnp.sin(8.0 * x) + 0.85
  return jnp.where(x <= -0.9, -40.0 * x - 35.15, wave)


def f3(x: jax.Array) -> jax.Array:
  """A narrow wedge between two ridges; the global minimum is at 0."""
  size = jnp.abs(x)
  return jnp.select(
    [size <= 0.4, size <= 0.5], [7.0 / 8.0 * size, 0.75 - size], x**2
  )


def _authors_f2_gradient(x):
  """The authors have x cos(8 x) where the derivative has 8 x cos(8 x)."""
  wave = x * jnp.cos(8.0 * x) + jnp.sin(8.0 * x) + 3.0 * x**2
  return jnp.where(x <= -0.9, -40.0, wave)


FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'F1': f1, 'F2': f2, 'F3': f3,
}  # fmt: skip
_EVERY = 5  # Steps from one row of the record to the next.
OPTIMIZERS = {
  'diffgrad': optlab.diffgrad,
  'adam': optax.adam,
  # The friction of diffGrad is near 1/2 where the gradient stands still.
  'adam_half': lambda rate, b1, b2: optax.adam(0.5 * rate, b1, b2),
  'amsgrad': optax.amsgrad,
  'adabelief': optax.adabelief,
  'sgd': lambda rate, b1, b2: optax.sgd(rate, momentum=b1),
}


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  """Flags."""

  QUICK = {
    'seeds': 5,
  }
  MINUTES = (1, 1)

  functions: tuple[str, ...] = flags.flag(
    tuple(FUNCTIONS), 'Functions.', choices=tuple(FUNCTIONS)
  )
  optimizers: tuple[str, ...] = flags.flag(
    tuple(OPTIMIZERS), 'Optimizers.', choices=tuple(OPTIMIZERS)
  )
  gradient: str = flags.flag(
    'exact',
    "Derivative of F2, or what the authors' notebook has in its place.",
    choices=('exact', 'authors'),
  )
  start: float = flags.flag(-1.0, 'Start of seed 0.')
  spread: float = flags.flag(0.05, 'Starts are up to so far away.', low=0.0)
  learning_rate: float = flags.flag(0.1, 'Learning rate.', low=0.0)
  b1: float = flags.flag(0.95, 'Decay of the first moment.', low=0.0)
  b2: float = flags.flag(0.999, 'Decay of the second moment.', low=0.0)
  steps: int = flags.flag(300, 'Steps, a multiple of 5.', low=_EVERY)
  seeds: int = flags.flag(21, 'Number of starts.', low=1, grows=True)


def problem(config: Config, function: str) -> study.Problem:
  """A function; a seed is a start around the paper's, seed 0 its own."""
  value = FUNCTIONS[function]
  grad = jax.grad(value)
  if function == 'F2' and config.gradient == 'authors':
    grad = _authors_f2_gradient
  offsets = np.random.default_rng(0).uniform(-1.0, 1.0, config.seeds)
  offsets[0] = 0.0
  starts = jnp.asarray(config.start + config.spread * offsets, float)

  def entry(name):
    make = lambda rate: OPTIMIZERS[name](rate, config.b1, config.b2)

    def start(key, rate, seed, data):
      del key, data
      return starts[seed], make(rate).init(starts[seed])

    def step(state, key, rate, data):
      del key, data
      x, opt_state = state
      updates, opt_state = make(rate).update(grad(x), opt_state, x)
      return optax.apply_updates(x, updates), opt_state

    return study.Entry(start, step, 1)

  return study.Problem(
    entry, config.optimizers, (config.learning_rate,), config.steps, 'steps',
    lambda state, _: {'x': state[0], 'value': value(state[0])}, 'value',
    batched=True,
  )  # fmt: skip


def run(session: Session, config: Config) -> None:
  """All optimizers on all functions, at the paper's rate."""
  for function in config.functions:
    made = problem(config, function)
    plan = study.Plan(
      function, made, config.steps, made.learning_rates, config.seeds, 0,
      pieces=config.steps // _EVERY,
    )  # fmt: skip
    study.study(session, plan, config.optimizers)


def _minimum(function):
  """The global minimum on a grid; F3 and the right end of F2 fall no lower."""
  grid = np.linspace(-1.0, 1.0, 200_001)
  values = np.asarray(jax.jit(FUNCTIONS[function])(grid))
  return grid[np.argmin(values)], values.min()


def summarize(session: Session, config: Config) -> list[dict]:
  """Where each optimizer ends, and how often at the global minimum."""
  summary = []
  for function, name in itertools.product(config.functions, config.optimizers):
    rows = verdicts.last(session.rows, f'{function}: {name}')
    place, lowest = _minimum(function)
    values = np.array([row['value'] for row in rows])
    row = {
      'function': function,
      'optimizer': name,
      'place': float(place),
      'x': rows[0]['x'],
      'value': rows[0]['value'],
      'gap': float(values[0] - lowest),
      'median_gap': float(np.median(values) - lowest),
      'at_minimum': float(np.mean(values - lowest < 0.01)),
    }
    session.write('minimum', **row)
    summary.append(row)
  return summary


def draw(session: Session, config: Config) -> None:
  """The functions, and x over the steps from the paper's start."""
  figure, panels = plt.subplots(
    2, len(config.functions), figsize=(4.5 * len(config.functions), 7.0),
    squeeze=False, layout='constrained',
  )  # fmt: skip
  grid = np.linspace(-1.1, 1.1, 1001)
  for (top, bottom), function in zip(panels.T, config.functions, strict=True):
    top.plot(grid, jax.jit(FUNCTIONS[function])(grid), 'k', lw=1)
    top.set_title(function)
    top.set_xlabel('x')
    top.set(xlim=(-1.1, 1.1), xticks=(-1.0, -0.5, 0.0, 0.5, 1.0))
    top.set_ylim(-1.0 if function == 'F2' else -0.1, 1.6)
    for i, name in enumerate(config.optimizers):
      rows = session.select('eval', method=f'{function}: {name}', seed=0)
      bottom.plot([row['updates'] for row in rows], [row['x'] for row in rows],
                  color=f'C{i}', label=name, lw=1.2 if i else 2.5,
                  zorder=2 if i else 3)  # fmt: skip
      last = rows[-1]
      top.plot(last['x'], last['value'], 'o', color=f'C{i}', ms=9 - i)
    bottom.set_ylim(-1.1, 1.1)
    bottom.set_xlabel('steps')
    bottom.grid(alpha=0.3)
  panels[0][0].set_ylabel('value; dots: where seed 0 ends')
  panels[1][0].set_ylabel('x')
  plots.legend_right(figure, panels[1][0])
  title = (
    f'the functions of the diffGrad paper, rate {config.learning_rate:g},'
    f' b1 {config.b1:g}'
  )
  plots.save(figure, session.folder / 'synthetic_functions.png', title=title)


@launch.program
def main(config: Config) -> None:
  """Runs all optimizers on all functions."""
  if config.steps % _EVERY:
    raise flags.UserError(f'--steps={config.steps}: not a multiple of {_EVERY}')
  with Session('synthetic_functions', config) as session:
    run(session, config)
    summary = summarize(session, config)
    tables.show(
      f'From x = {config.start:g}, {config.steps} steps, rate'
      f' {config.learning_rate:g}, b1 {config.b1:g}; and {config.seeds} starts'
      f' within {config.spread:g}',
      (
        'function, optimizer', 'minimum', 'x', 'value', 'above',
        'median above', 'starts there %',
      ),
      [
        (
          f'{row["function"]}, {row["optimizer"]}', f'{row["place"]:.3f}',
          f'{row["x"]:+.3f}', f'{row["value"]:.4f}', f'{row["gap"]:.4f}',
          f'{row["median_gap"]:.4f}', f'{100.0 * row["at_minimum"]:.0f}',
        )
        for row in summary
      ],
    )  # fmt: skip
    draw(session, config)
    print(f'\n{session.folder}/record.jsonl, synthetic_functions.png')


if __name__ == '__main__':
  launch.run(main, Config)
