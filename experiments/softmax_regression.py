"""Softmax regression: GNS-Newton beside first-order and Newton solvers.

python -m experiments.softmax_regression [--dataset=digits] [--l2=...]
"""

import dataclasses

from experiments import app
from experiments import newton
from experiments import problems


@dataclasses.dataclass(frozen=True)
class Config(newton.RegressionConfig):
  """Flags."""

  dataset: str = app.flag(
    'digits',
    'digits, mushrooms, breast_cancer, mnist in data_dir, a LIBSVM or IDX file'
    ' by path or by name in data_dir, or openml:NAME.',
  )


def main(config: Config) -> None:
  """Runs the comparison."""
  newton.regress('softmax_regression', problems.softmax, config)


if __name__ == '__main__':
  app.run(main, Config)
