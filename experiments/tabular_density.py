"""Densities of tables: MECO and its peers, paired by split.

python -m experiments.tabular_density --sets=digits:8,digits:16,digits:32
python -m experiments.tabular_density --sets=wine,mine.csv,mine.csv:10
python -m experiments.tabular_density --quick

A seed is a split into rows for training, validation and test. Rates are picked
on validation rows of splits that are used for nothing else; in the loop every
method keeps the parameters that were best on the validation rows so far. The
score of an unnormalized model is that of `optlab.log_partition`; where it is
refused the split counts as infinitely bad, and there is no interval.
"""

from collections.abc import Sequence
import dataclasses
import math

import matplotlib.pyplot as plt
import numpy as np

from .lab import flags
from .lab import launch
from .lab import plots
from .lab import study
from .lab import verdicts
from .lab.session import Session
from .methods import tabular


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  """Flags of the program."""

  QUICK = {
    'sets': ('wine',),
    'methods': ('meco', 'nce', 'kernel'),
    'steps': 60,
    'seeds': 2,
    'tuning_seeds': 0,
  }
  MINUTES = (1, 20)

  sets: tuple[str, ...] = flags.flag(
    ('digits:8', 'digits:16', 'digits:32', 'breast_cancer', 'wine'),
    'Tables: digits, breast_cancer, wine or a CSV file; after a colon how many'
    ' principal components are kept.',
  )
  methods: tuple[str, ...] = flags.flag(
    tabular.METHODS,
    f'Of {", ".join((*tabular.UNNORMALIZED, *tabular.NORMALIZED))}; snis is'
    ' meco with gamma=1, dsm denoising score matching with a scale that is'
    ' tuned too. The first is what others are compared with.',
  )
  steps: int = flags.flag(1200, 'Steps of a run.', low=1)
  learning_rates: tuple[float, ...] = flags.flag(
    (0.001, 0.003, 0.01), 'Where the grid of rates begins.', low=0.0
  )
  score: str = flags.flag(
    'importance', 'How log Z is found.', choices=('importance', 'smc')
  )
  seeds: int = flags.flag(10, 'Number of splits.', low=1, grows=True)
  tuning_seeds: int = flags.flag(
    2, 'Splits that pick rates; 0 takes the first rate.', low=0
  )
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )


def plans(config: Config) -> list[study.Plan]:
  """A plan for each set."""
  found = []
  for name in config.sets:
    problem = tabular.problem(name, config.steps, config.score == 'smc')
    study.check_methods(problem, config.methods)
    found.append(
      study.Plan(
        name, problem, config.steps, config.learning_rates, config.seeds,
        config.tuning_seeds, None,
      )
    )  # fmt: skip
  return found


@launch.program
def main(config: Config) -> None:
  """Tunes and trains every method on every set; tables and a picture."""
  todo = plans(config)
  with Session('tabular_density', config) as session:
    rows = {
      plan.name: study.study(session, plan, config.methods) for plan in todo
    }
  for plan in todo:
    verdicts.show(
      f'{plan.name}, {plan.budget:,.0f} steps, {plan.seeds} splits',
      plan.problem.value, rows[plan.name],
    )  # fmt: skip
  picture = session.folder / 'tabular_density.png'
  draw(
    [row for plan in todo for row in rows[plan.name]], config.methods, picture
  )
  print(f'picture: {picture}')
  print(f'record:  {session.folder / "record.jsonl"}')


def draw(rows: Sequence[dict], methods: Sequence[str], path) -> None:
  """The gap to the first method, with its interval, set by set."""
  names = list(dict.fromkeys(row['problem'] for row in rows))
  figure, axes = plt.subplots(
    figsize=(3.4 + 1.1 * len(names), 3.6), layout='constrained'
  )
  shown = [method for method in methods[1:]]
  for i, method in enumerate(shown):
    mine = {
      row['problem']: row
      for row in rows
      if row['method'] == method and row['verdict'] != '-'
    }
    at = [names.index(name) for name in mine]
    middle = np.array([row['gap'] for row in mine.values()])
    half = middle - np.array([row['gap_low'] for row in mine.values()])
    shift = 0.5 * ((i + 0.5) / len(shown) - 0.5)
    if at:
      axes.errorbar(
        np.asarray(at) + shift, middle, half, fmt='o', ms=4, capsize=2,
        color=f'C{i}', label=method,
      )  # fmt: skip
  axes.axhline(0.0, color='black', lw=0.8)
  gaps = [row['gap'] for row in rows if math.isfinite(row['gap'])]
  if max(map(abs, gaps), default=0.0) > 3.0:
    axes.set_yscale('symlog', linthresh=1.0)
  axes.set_xticks(range(len(names)), [n.rsplit('/')[-1] for n in names])
  axes.set_xlim(-0.5, len(names) - 0.5)
  axes.set_ylabel(f'test nats more than {methods[0]}')
  axes.grid(alpha=0.3)
  if axes.get_legend_handles_labels()[0]:
    plots.legend_right(figure, axes, fontsize=8)
  else:
    axes.text(
      0.5, 0.6, 'one split: no interval', ha='center', transform=axes.transAxes
    )
  plots.save(figure, path, title='held-out likelihood, 95 % of the gap')


if __name__ == '__main__':
  launch.run(main, Config)
