"""Logistic regression: GNS-Newton beside first-order and Newton solvers.

python -m experiments.logistic_regression [--dataset=mushrooms] [--l2=...]
"""

import dataclasses

from experiments import app
from experiments import data
from experiments import newton
from experiments import problems

OPTIMIZERS = tuple(name for name in newton.OPTIMIZERS if name != 'gns_paper')


@dataclasses.dataclass(frozen=True)
class Config(newton.Config):
  """Flags."""

  dataset: str = app.flag(
    'mushrooms',
    'mushrooms, breast_cancer, a LIBSVM file by path or by name in data_dir, or'
    ' openml:NAME; two classes.',
  )
  data_dir: str = app.flag('', 'Folder with data files.')
  l2: float | None = app.flag(
    None, 'Weight of |x|^2 / 2; 1 / rows if not given.', low=1e-12
  )
  optimizers: tuple[str, ...] = app.flag(
    OPTIMIZERS, 'Solvers.', choices=newton.OPTIMIZERS
  )


def main(config: Config) -> None:
  """Runs the comparison."""
  dataset = data.load(config.dataset, config.data_dir)
  l2 = 1.0 / len(dataset.labels) if config.l2 is None else config.l2
  problem = problems.logistic(dataset, l2)
  newton.compare('logistic_regression', problem, config, config.optimizers)


if __name__ == '__main__':
  app.run(main, Config)
