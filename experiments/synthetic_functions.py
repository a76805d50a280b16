"""The three one-dimensional functions of the diffGrad paper.

python -m experiments.synthetic_functions [--gradient=authors]

Each has a local minimum between the start and, or beside, its global one. All
optimizers take the paper's learning rate and decays; the seeds are starts
around the paper's, under one vmap, and seed 0 is the paper's own.
"""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
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
OPTIMIZERS = ('diffgrad', 'adam', 'adam_half', 'amsgrad', 'adabelief', 'sgd')


def optimizer(name: str, config: Any) -> optax.GradientTransformation:
  """An optimizer with the paper's constants."""
  rate, b1, b2 = config.learning_rate, config.b1, config.b2
  return {
    'diffgrad': lambda: optlab.diffgrad(rate, b1, b2),
    'adam': lambda: optax.adam(rate, b1, b2),
    # The friction of diffGrad is near 1/2 where the gradient stands still.
    'adam_half': lambda: optax.adam(0.5 * rate, b1, b2),
    'amsgrad': lambda: optax.amsgrad(rate, b1, b2),
    'adabelief': lambda: optax.adabelief(rate, b1, b2),
    'sgd': lambda: optax.sgd(rate, momentum=b1),
  }[name]()


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  """Flags."""

  QUICK = {
    'seeds': 5,
  }

  functions: tuple[str, ...] = flags.flag(
    tuple(FUNCTIONS), 'Functions.', choices=tuple(FUNCTIONS)
  )
  optimizers: tuple[str, ...] = flags.flag(
    OPTIMIZERS, 'Optimizers.', choices=OPTIMIZERS
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
  steps: int = flags.flag(300, 'Steps, a multiple of 5.', low=1, grows=True)
  seeds: int = flags.flag(21, 'Number of starts.', low=1, grows=True)


def run(session: Session, config: Config, function: str, name: str) -> None:
  """One optimizer on one function, from all starts."""
  dtype = jnp.dtype(config.precision)
  value = FUNCTIONS[function]
  grad = jax.grad(value)
  if function == 'F2' and config.gradient == 'authors':
    grad = _authors_f2_gradient
  tx = optimizer(name, config)
  offsets = np.random.default_rng(0).uniform(-1.0, 1.0, config.seeds)
  offsets[0] = 0.0
  starts = jnp.asarray(config.start + config.spread * offsets, dtype)

  def advance(state):
    def one(x, opt_state):
      updates, opt_state = tx.update(grad(x), opt_state, x)
      return optax.apply_updates(x, updates), opt_state

    step = lambda state, _: (jax.vmap(one)(*state), None)
    return jax.lax.scan(step, state, length=_EVERY)[0]

  session.run(
    f'{function}, {name}',
    (starts, jax.vmap(tx.init)(starts)),
    advance,
    lambda state: {'x': state[0], 'value': jax.vmap(value)(state[0])},
    steps=config.steps,
    every=_EVERY,
    seeds=tuple(range(config.seeds)),
    prefix=True,
    function=function,
    optimizer=name,
  )


def _minimum(function):
  """The global minimum on a grid; F3 and the right end of F2 fall no lower."""
  grid = np.linspace(-1.0, 1.0, 200_001)
  values = np.asarray(jax.jit(FUNCTIONS[function])(grid))
  return grid[np.argmin(values)], values.min()


def summarize(session: Session, config: Config) -> list[dict]:
  """Where each optimizer ends, and how often at the global minimum."""
  summary = []
  for function, name in itertools.product(config.functions, config.optimizers):
    rows = record.select(
      session.rows, 'eval', method=f'{function}, {name}', step=config.steps
    )
    place, lowest = _minimum(function)
    values = np.array([row['value'] for row in rows])
    row = {
      'function': function,
      'optimizer': name,
      'minimum': float(place),
      'x': rows[0]['x'],
      'value': rows[0]['value'],
      'gap': float(values[0] - lowest),
      'median_gap': float(np.median(values) - lowest),
      'at_minimum': float(np.mean(values - lowest < 0.01)),
    }
    session.write('summary', **row)
    summary.append(row)
  return summary


def draw(session: Session, config: Config) -> None:
  """The functions, and x over the steps from the paper's start."""
  figure, panels = plt.subplots(
    2, len(config.functions), figsize=(4.5 * len(config.functions), 7.0),
    squeeze=False,
  )  # fmt: skip
  grid = np.linspace(-1.1, 1.1, 1001)
  for (top, bottom), function in zip(panels.T, config.functions, strict=True):
    top.plot(grid, jax.jit(FUNCTIONS[function])(grid), 'k', lw=1)
    top.set_title(function)
    top.set_xlabel('x')
    top.set(xlim=(-1.1, 1.1), xticks=(-1.0, -0.5, 0.0, 0.5, 1.0))
    top.set_ylim(-1.0 if function == 'F2' else -0.1, 1.6)
    for i, name in enumerate(config.optimizers):
      rows = session.select('eval', method=f'{function}, {name}', seed=0)
      bottom.plot([row['step'] for row in rows], [row['x'] for row in rows],
                  color=f'C{i}', label=name)  # fmt: skip
      last = rows[-1]
      top.plot(last['x'], last['value'], 'o', color=f'C{i}', ms=9 - i)
    bottom.set_ylim(-1.1, 1.1)
    bottom.set_xlabel('steps')
    bottom.grid(alpha=0.3)
  panels[0][0].set_ylabel('value; dots: where seed 0 ends')
  panels[1][0].set_ylabel('x')
  handles, labels = panels[1][0].get_legend_handles_labels()
  figure.tight_layout()
  figure.legend(handles, labels, loc='center left', bbox_to_anchor=(1.0, 0.5))
  plots.save(figure, session.folder / 'synthetic_functions.png')


@launch.program
def main(config: Config) -> None:
  """Runs all optimizers on all functions."""
  pairs = list(itertools.product(config.functions, config.optimizers))
  with Session('synthetic_functions', config) as session:
    for function, name in pairs:
      run(session, config, function, name)
    summary = summarize(session, config)
    tables.show(
      f'From x = {config.start:g}, {config.steps} steps, rate'
      f' {config.learning_rate:g}, b1 {config.b1:g}; and {config.seeds} starts'
      f' within {config.spread:g}',
      (
        'function, minimum', 'optimizer', 'x', 'value', 'above minimum',
        'median over starts', 'starts at the minimum %',
      ),
      [
        (
          f'{row["function"]}, {row["minimum"]:.3f}', row['optimizer'],
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
