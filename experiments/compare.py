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

import dataclasses
import functools
import pathlib

import matplotlib.pyplot as plt

from .lab import contests
from .lab import flags
from .lab import functions
from .lab import launch
from .lab import plots
from .lab import study
from .lab import verdicts
from .lab.session import Session
from .problems import classic

PIECES = study.PIECES
# For sets of problems: what runs on all of them.
SET_METHODS = (
  'gns_newton', 'diffgrad', 'adagrad_norm', 'normalized_momentum', 'lbfgs',
  'sgd', 'optax.sgd(momentum=0.9)', 'adam', 'optax.contrib.muon',
  'optax.contrib.prodigy',
)  # fmt: skip


SET_MINUTES = {'classic': (6, 7)}


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  """Flags."""

  QUICK = {
    'seeds': 2,
    'tuning_seeds': 1,
  }
  MINUTES = (1, 1)

  problem: str = flags.flag(
    'logistic',
    f'What is solved: {", ".join(contests.PROBLEMS)}, one of the set classic,'
    ' or a Python file.',
  )
  problems: str = flags.flag(
    '', 'A set of problems in its place.', choices=('', *classic.SETS)
  )
  data_dir: str = flags.flag(
    '', 'Folder with MNIST, which a set has if it is given.'
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

  def minutes(self) -> tuple[float, float] | None:
    """Those of a set of problems, if it is one."""
    if self.problems and self.is_default('problems'):
      return SET_MINUTES[self.problems]
    return super().minutes()


def problems(config: Config) -> dict[str, study.Problem]:
  """The problems of the flags, by name."""
  if config.problems:
    makers = dict(classic.SETS[config.problems])
    if config.data_dir:
      makers['mnist'] = functools.partial(classic.mnist, config.data_dir)
    return {name: make() for name, make in makers.items()}
  named = contests.PROBLEMS | classic.CLASSIC
  name = config.problem
  if name in named:
    return {name: named[name]()}
  if name.endswith('.py') and pathlib.Path(name).is_file():
    return {pathlib.Path(name).stem: functions.of_file(name)}
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
    if name == next(iter(chosen)):  # Those of a set take the same ones.
      study.check_methods(problem, methods[name], skip=len(chosen) > 1)
  with Session('compare', config) as session:
    for name, problem in chosen.items():
      own = plan(config, name, problem)
      rows = study.study(session, own, methods[name], skip=len(chosen) > 1)
      verdicts.show(
        f'{name}, {own.budget:,.0f} {problem.unit},'
        f' {own.seeds} seed{"s" * (own.seeds > 1)}',
        problem.value, rows, target=own.target,
      )  # fmt: skip
  print()
  for name, problem in chosen.items():
    picture = session.folder / f'{name if len(chosen) > 1 else "compare"}.png'
    draw(session.rows, name, methods[name], problem, picture)
    print(f'picture: {picture}')
  if len(chosen) > 1:
    summaries = session.select('summary')
    verdicts.show_profile(summaries, methods[name])
    picture = session.folder / 'profile.png'
    verdicts.draw_profile(summaries, methods[name], picture, config.problems)
    print(f'picture: {picture}')
  print(f'record:  {session.folder / "record.jsonl"}')


def draw(rows, name, methods, problem, path) -> None:
  """The value against the calls; medians, and the range over seeds."""
  labels = {f'{name}: {method}': method for method in methods}
  shown = [
    row | {'method': labels[row['method']]}
    for row in rows
    if row['kind'] == 'eval' and row['method'] in labels
  ]
  figure, axes = plt.subplots(figsize=(8.4, 4.2), layout='constrained')
  plots.draw_lines(axes, [('', shown)], 'calls', 'value')
  axes.set(xlabel=problem.unit, ylabel=problem.value)
  if axes.get_legend_handles_labels()[0]:
    plots.legend_right(figure, axes, fontsize=8)
  plots.save(figure, path, title=f'{name}: median and range of the seeds')


if __name__ == '__main__':
  launch.run(main, Config)
