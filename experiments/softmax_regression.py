"""Softmax regression: GNS-Newton beside first-order and Newton solvers.

python -m experiments.softmax_regression [--dataset=digits] [--l2=...]
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
    'digits',
    'digits, mushrooms, breast_cancer, mnist in data_dir, a LIBSVM or IDX file'
    ' by path, or openml:NAME.',
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
  problem = problems.softmax(dataset, l2)
  newton.compare('softmax_regression', problem, config, config.optimizers)


if __name__ == '__main__':
  app.run(main, Config)
