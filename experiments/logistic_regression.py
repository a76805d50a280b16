"""Logistic regression: GNS-Newton beside first-order and Newton solvers.

python -m experiments.logistic_regression [--dataset=mushrooms] [--l2=...]
"""

from experiments import app
from experiments import newton
from experiments import problems

Config = newton.RegressionConfig


def main(config: newton.RegressionConfig) -> None:
  """Runs the comparison; the data set has two classes."""
  newton.regress('logistic_regression', problems.logistic, config)


if __name__ == '__main__':
  app.run(main, Config)
