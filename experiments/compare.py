"""Any methods on any problem: rates tuned alike, equal oracle calls, in pairs.

python -m experiments.compare --problem=logistic
python -m experiments.compare --problem=images --methods=diffgrad,adam,lion
python -m experiments.compare --problem=ridge --methods=bo_rep:normalized,saba

Every method gets the same grid of rates on seeds that are used for nothing
else, and then runs on the reported seeds until it has used up the same budget
of oracle calls. What a call is depends on the problem, and is printed.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from .lab import contests
from .lab import flags
from .lab import launch
from .lab import plots
from .lab import tables
from .lab import tuning
from .lab.session import Session

PIECES = 20


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  """Flags."""

  problem: str = flags.flag(
    'logistic', 'What is solved.', choices=tuple(contests.PROBLEMS)
  )
  methods: tuple[str, ...] = flags.flag(
    ('default',),
    'Methods; default is those of the problem. The first is the one that the'
    ' others are compared with.',
  )
  budget: float = flags.flag(
    0.0, "Oracle calls of a run; 0 is the problem's default.", low=0.0
  )
  learning_rates: tuple[float, ...] = flags.flag(
    (0.0,), "Grid of rates; 0 is the problem's default.", low=0.0
  )
  seeds: int = flags.flag(5, 'Number of seeds.', low=1, grows=True)
  tuning_seeds: int = flags.flag(2, 'Seeds that pick rates.', low=1, grows=True)


class Lane(NamedTuple):
  """One seed at one rate."""

  state: Any
  key: jax.Array
  rate: jax.Array
  steps: jax.Array
  calls: jax.Array


def run(
  session: Session,
  problem: contests.Problem,
  method: str,
  label: str,
  budget: float,
  lanes: list[tuple[int, float]],
) -> list[dict]:
  """Runs lanes of (seed, rate) to the budget; their last rows.

  Args:
    session: The open session.
    problem: The problem.
    method: A method of it.
    label: Its name in the record.
    budget: Oracle calls of a lane.
    lanes: Pairs of a seed and a rate.

  Returns:
    The last row of each lane.
  """
  entry = problem.entry(method)
  seeds = tuple(seed for seed, _ in lanes)
  rates = np.array([rate for _, rate in lanes])

  def start(seed, rate):
    start_key, key = jax.random.split(jax.random.key(seed))
    state = entry.start(start_key, rate)
    zero = jnp.zeros(())
    return Lane(state, key, rate, jnp.zeros((), jnp.int32), zero)

  def advance_lane(lane, due):
    def step(lane):
      key = jax.random.fold_in(lane.key, lane.steps)
      state = entry.step(lane.state, key, lane.rate)
      calls = lane.calls + entry.calls(lane.state, state)
      calls = jnp.asarray(calls, lane.calls.dtype)
      return Lane(state, lane.key, lane.rate, lane.steps + 1, calls)

    return jax.lax.while_loop(lambda lane: lane.calls < due, step, lane)

  def advance(carry):
    piece, lanes = carry
    due = (piece + 1) * (budget / PIECES)
    # One lane after the other: each takes as many steps as it needs.
    return piece + 1, jax.lax.map(lambda lane: advance_lane(lane, due), lanes)

  measure = jax.jit(lambda states: jax.lax.map(problem.measure, states))

  def evaluate(carry):
    lanes = carry[1]
    values = jax.device_get(measure(lanes.state))
    counts = {
      'updates': lanes.steps,
      'calls': lanes.calls,
      'learning_rate': rates,
    }
    return {**values, **jax.device_get(counts)}

  begin = jax.jit(jax.vmap(start))(
    jnp.asarray(seeds), jnp.asarray(rates, float)
  )
  session.run(
    label,
    (jnp.zeros(()), begin),
    advance,
    evaluate,
    steps=PIECES,
    seeds=seeds,
    algorithm=method,
  )
  return tuning.last(session.rows, label)


def tune(session, config, problem, method, budget, rates) -> float:
  """The rate of the lowest median on the tuning seeds, or one for none."""
  if not problem.entry(method).tuned:
    return 1.0
  values: dict[float, list[float]] = {}
  for seed in range(config.tuning_seeds):
    seed += tuning.TUNING_SEED
    lanes = [(seed, rate) for rate in rates]
    label = f'{method}: tuning {seed}'
    for row in run(session, problem, method, label, budget, lanes):
      value = row['tuning']
      values.setdefault(row['learning_rate'], []).append(
        np.inf if np.isnan(value) else value
      )
  return min(values, key=lambda rate: np.median(values[rate]))


@launch.program
def main(config: Config) -> None:
  """Tunes and runs every method, prints the table, and draws the picture."""
  problem = contests.PROBLEMS[config.problem]()
  methods = problem.methods
  if config.methods != ('default',):
    methods = config.methods
  for method in methods:
    problem.entry(method)  # An unknown name is an error before work begins.
  budget = config.budget or problem.budget
  rates = (
    problem.learning_rates
    if config.learning_rates == (0.0,)
    else config.learning_rates
  )
  with Session('compare', config) as session:
    for method in methods:
      best = tune(session, config, problem, method, budget, rates)
      lanes = [(seed, best) for seed in range(config.seeds)]
      run(session, problem, method, method, budget, lanes)
    rows = summarize(session, methods, rates)
  tables.show(
    f'{config.problem}: {problem.value} after {budget:,.0f} {problem.unit},'
    f' {config.seeds} seeds; an asterisk is a rate at the edge of the grid',
    (
      'method',
      'rate',
      'median',
      'low',
      'high',
      'updates',
      f'{methods[0]} wins',
    ),
    [list(row.values())[1:] for row in rows],
  )
  path = session.folder / 'compare.png'
  draw(session.rows, methods, problem, path)
  print(f'record:  {session.folder / "record.jsonl"}\npicture: {path}')


def summarize(session, methods, rates) -> list[dict]:
  """A summary row a method, in the record too."""
  rows = []
  reference: list[float] = []
  for method in methods:
    ends = tuning.last(session.rows, method)
    values = [np.inf if np.isnan(r['value']) else r['value'] for r in ends]
    reference = reference or values
    better = sum(a < b for a, b in zip(reference, values, strict=True))
    wins = '-' if method == methods[0] else f'{better} of {len(values)}'
    rate = ends[0]['learning_rate']
    if len(rates) > 1 and rate in (min(rates), max(rates)):
      rate = f'{rate:g} *'
    row = {
      'method': method,
      'learning_rate': rate,
      'median': float(np.median(values)),
      'low': min(values),
      'high': max(values),
      'updates': int(np.median([row['updates'] for row in ends])),
      'wins': wins,
    }
    session.write('summary', **row)
    rows.append({'kind': 'summary', **row})
  return rows


def draw(rows, methods, problem, path) -> None:
  """The value against the calls; medians, and the range over seeds."""
  figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
  plots.draw_lines(
    axes, [('', rows)], 'calls', 'value', keep=lambda name: name in methods
  )
  axes.set(xlabel=problem.unit, ylabel=problem.value)
  axes.legend(fontsize=8)
  plots.save(figure, path)


if __name__ == '__main__':
  launch.run(main, Config)
