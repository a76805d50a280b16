"""Any methods on any problem: tuned alike, equal oracle calls, in pairs.

python -m experiments.compare --problem=logistic
python -m experiments.compare --problem=images --methods=diffgrad,adam,lion
python -m experiments.compare --problem=mine.py \
    --methods='adam(b1=[0.8,0.9]),optax.contrib.muon,package.tx:make(b1=.8)'
python -m experiments.compare --problems=classic

A problem is a name or a Python file; a set of problems gives a performance
profile too. A method is a name of optlab or optax, or a dotted name, with
arguments; a list in them is a search space. Every method gets the same grid of
learning rates on seeds that are used for nothing else, and then runs on the
reported seeds until it has used up the same budget of oracle calls. What a call
is depends on the problem, and is printed.
"""

from collections.abc import Sequence
import dataclasses
import math
import pathlib
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from .lab import contests
from .lab import flags
from .lab import launch
from .lab import plots
from .lab import study
from .lab import tables
from .lab.session import Session

PIECES = study.PIECES
# For sets of problems: what runs on all of them.
SET_METHODS = (
  'gns_newton', 'lbfgs', 'sgd', 'optax.sgd(momentum=0.9)', 'adam', 'diffgrad',
  'adagrad_norm', 'normalized_momentum', 'rmsprop', 'lion',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  """Flags."""

  QUICK = {
    'seeds': 2,
    'tuning_seeds': 1,
  }

  problem: str = flags.flag(
    'logistic',
    f'What is solved: {", ".join(contests.PROBLEMS)}, one of the set classic,'
    ' or a Python file.',
  )
  problems: str = flags.flag(
    '', 'A set of problems in its place.', choices=('', *contests.SETS)
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
  target: float | None = flags.flag(
    None, "The value that counts as solved; the problem's if not given."
  )
  seeds: int = flags.flag(5, 'Number of seeds.', low=1, grows=True)
  tuning_seeds: int = flags.flag(
    2, 'Seeds that pick rates; 0 takes the first rate.', low=0, grows=True
  )


def problems(config: Config) -> dict[str, study.Problem]:
  """The problems of the flags, by name."""
  if config.problems:
    return {
      name: make() for name, make in contests.SETS[config.problems].items()
    }
  named = contests.PROBLEMS | contests.CLASSIC
  name = config.problem
  if name in named:
    return {name: named[name]()}
  if name.endswith('.py') and pathlib.Path(name).is_file():
    return {pathlib.Path(name).stem: contests.of_file(name)}
  raise flags.UserError(
    f'--problem={name}: not a Python file, and not one of {", ".join(named)}'
  )


def plan(config: Config, name: str, problem: study.Problem) -> study.Plan:
  """The flags, and else the problem's defaults."""
  given = config.learning_rates
  return study.Plan(
    name,
    problem,
    config.budget or problem.budget,
    problem.learning_rates if given == (0.0,) else given,
    config.seeds,
    config.tuning_seeds,
    problem.target if config.target is None else config.target,
  )


@launch.program
def main(config: Config) -> None:
  """Tunes and runs every method, prints the tables, and draws the picture."""
  chosen = problems(config)
  methods: dict[str, tuple[str, ...]] = {}
  for name, problem in chosen.items():
    default = SET_METHODS if config.problems else problem.methods
    given = config.methods != ('default',)
    methods[name] = config.methods if given else default
    study.check_methods(problem, methods[name])
  with Session('compare', config) as session:
    for name, problem in chosen.items():
      own = plan(config, name, problem)
      rows = study.study(session, own, methods[name])
      show(own, rows)
  print()
  for name, problem in chosen.items():
    picture = session.folder / f'{name if len(chosen) > 1 else "compare"}.png'
    draw(session.rows, name, methods[name], problem, picture)
    print(f'picture: {picture}')
  if len(chosen) > 1:
    summaries = session.select('summary')
    show_profile(summaries, methods[name])
    draw_profile(summaries, methods[name], session.folder / 'profile.png')
    print(f'picture: {session.folder / "profile.png"}')
  print(f'record:  {session.folder / "record.jsonl"}')


def show(plan: study.Plan, rows: Sequence[dict]) -> None:
  """Prints the table of a problem."""
  first = rows[0]['method']

  def rate(row):
    if row['learning_rate'] is None:
      return '-'
    return f'{row["learning_rate"]:g}{" *" if row["edge"] else ""}'

  def gap(row):
    if row['verdict'] == '-':
      return '-'
    return f'{row["gap_low"]:+.1e} to {row["gap_high"]:+.1e}'

  columns = ['method', 'rate', 'median', 'low', 'high', 'updates']
  columns += ['95 % of the gap', 'verdict']
  lines = [
    [
      row['variant'], rate(row), row['median'], row['low'], row['high'],
      row['updates'], gap(row), row['verdict'],
    ]
    for row in rows
  ]  # fmt: skip
  target = ''
  if plan.target is not None:
    columns.append('to target')
    target = f'; calls to a value of {plan.target:g} or less'
    for row, line in zip(rows, lines, strict=True):
      there = math.isfinite(row['reached'])
      line.append(row['reached'] if there else 'not reached')
  tables.show(
    f'{plan.name}: {plan.problem.value} after {plan.budget:,.0f}'
    f' {plan.problem.unit}, {plan.seeds} seeds; an asterisk is a rate at the'
    f' edge of the grid; gap: the mean of the differences from {first} by seed,'
    f' with its 95 % interval{target}',
    columns,
    lines,
  )


def show_profile(rows: Sequence[dict], methods: Sequence[str]) -> None:
  """Prints the aggregate over the problems."""
  ratios = study.profile(rows, methods)
  share = lambda method, most: float(np.mean(ratios[method] <= most))
  tables.show(
    f'{len(next(iter(ratios.values())))} problems: the share on which a method'
    ' reaches the target within so many times the calls of the best one',
    ['method', 'best', '2 times', '10 times', 'at all'],
    [
      [method, *(f'{share(method, m):.2f}' for m in (1.0, 2.0, 10.0, 1e300))]
      for method in sorted(methods, key=lambda name: -share(name, 2.0))
    ],
  )


def draw(rows, name, methods, problem, path) -> None:
  """The value against the calls; medians, and the range over seeds."""
  labels = {f'{name}: {method}': method for method in methods}
  shown = [
    row | {'method': labels[row['method']]}
    for row in rows
    if row['kind'] == 'eval' and row['method'] in labels
  ]
  figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
  plots.draw_lines(axes, [('', shown)], 'calls', 'value')
  axes.set(xlabel=problem.unit, ylabel=problem.value)
  axes.legend(fontsize=8)
  plots.save(figure, path, title=name)


def draw_profile(rows, methods, path: Any) -> None:
  """The performance profile."""
  ratios = study.profile(rows, methods)
  finite = [r for v in ratios.values() for r in v if math.isfinite(r)]
  end = 1.1 * max(finite, default=2.0)
  figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
  for method, values in ratios.items():
    x = np.append(values[np.isfinite(values)], end)
    y = np.minimum(np.arange(1, len(x) + 1), len(x) - 1) / len(values)
    axes.step(np.append(1.0, x), np.append(0.0, y), where='post', label=method)
  axes.set(
    xscale='log', ylim=(0, 1.05), ylabel='share of the problems',
    xlabel='calls to the target, times those of the best method',
  )  # fmt: skip
  axes.legend(fontsize=8)
  axes.grid(alpha=0.3)
  plots.save(figure, path)


if __name__ == '__main__':
  launch.run(main, Config)
