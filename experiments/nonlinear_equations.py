"""Nonlinear equations and log-sum-exp: GNS-Newton with approximate Hessians.

python -m experiments.nonlinear_equations [--problem=chebyshev] [--power=4]
"""

import dataclasses

from experiments import app
from experiments import newton
from experiments import problems

PROBLEMS = ('log_sum_exp', 'rosenbrock', 'chebyshev', 'linear')
OPTIMIZERS = ('gns', 'gns_paper', 'lbfgs', 'gradient_descent')


@dataclasses.dataclass(frozen=True)
class Config(newton.Config):
  """Flags."""

  problem: str = app.flag('chebyshev', 'Which equations.', choices=PROBLEMS)
  power: int = app.flag(4, 'p of |u(x)|^p / p; log_sum_exp has none.', low=2)
  dimension: int = app.flag(
    100, 'Unknowns; even for rosenbrock. log_sum_exp has as many rows.', low=2
  )
  optimizers: tuple[str, ...] = app.flag(
    OPTIMIZERS, 'Solvers.', choices=OPTIMIZERS
  )


def main(config: Config) -> None:
  """Runs the comparison."""
  if config.problem == 'log_sum_exp':
    problem = problems.log_sum_exp(config.dimension, config.dimension)
  else:
    if config.problem == 'rosenbrock' and config.dimension % 2:
      raise app.UserError(
        f'--dimension={config.dimension}: rosenbrock has an even number'
      )
    problem = problems.equations(config.problem, config.power, config.dimension)
  newton.compare('nonlinear_equations', problem, config, config.optimizers)


if __name__ == '__main__':
  app.run(main, Config)
