"""Softmax regression: GNS-Newton beside first-order and Newton solvers.

python -m experiments.softmax_regression [--dataset=digits] [--l2=...]
"""

import dataclasses

from .lab import flags
from .lab import launch
from .lab import newton
from .problems import regressions


@dataclasses.dataclass(frozen=True)
class Config(newton.RegressionConfig):
  """Flags."""

  QUICK = {
    'curvature': ('exact', 'gauss_newton'),
    'optimizers': ('gns', 'lbfgs', 'gradient_descent'),
  }
  MINUTES = (1, 2)

  dataset: str = flags.flag(
    'digits',
    'digits, mushrooms, breast_cancer, mnist in data_dir, a LIBSVM or IDX file'
    ' by path or by name in data_dir, or openml:NAME.',
  )


@launch.program
def main(config: Config) -> None:
  """Runs the comparison."""
  newton.regress('softmax_regression', regressions.softmax, config)


if __name__ == '__main__':
  launch.run(main, Config)
