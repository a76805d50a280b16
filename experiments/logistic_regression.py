"""Logistic regression: GNS-Newton beside first-order and Newton solvers.

python -m experiments.logistic_regression [--dataset=mushrooms] [--l2=...]
"""

from .lab import launch
from .lab import newton
from .problems import regressions

Config = newton.RegressionConfig


@launch.program
def main(config: newton.RegressionConfig) -> None:
  """Runs the comparison; the data set has two classes."""
  newton.regress('logistic_regression', regressions.logistic, config)


if __name__ == '__main__':
  launch.run(main, Config)
