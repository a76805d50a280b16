"""Nonlinear equations and log-sum-exp: GNS-Newton with approximate Hessians.

python -m experiments.nonlinear_equations [--problem=chebyshev] [--power=4]
"""

import dataclasses

from .lab import flags
from .lab import launch
from .lab import newton
from .problems import smooth

PROBLEMS = ('log_sum_exp', 'rosenbrock', 'chebyshev', 'linear')
OPTIMIZERS = ('gns', 'gns_paper', 'lbfgs', 'gradient_descent')


@dataclasses.dataclass(frozen=True)
class Config(newton.Config):
  """Flags."""

  problem: str = flags.flag('chebyshev', 'Which equations.', choices=PROBLEMS)
  power: int = flags.flag(4, 'p of |u(x)|^p / p; log_sum_exp has none.', low=2)
  dimension: int = flags.flag(
    100, 'Unknowns; even for rosenbrock. log_sum_exp has as many rows.', low=2
  )
  optimizers: tuple[str, ...] = flags.flag(
    OPTIMIZERS, 'Solvers.', choices=OPTIMIZERS
  )


@launch.program
def main(config: Config) -> None:
  """Runs the comparison."""
  if config.problem == 'log_sum_exp':
    problem = smooth.log_sum_exp(config.dimension, config.dimension)
  else:
    if config.problem == 'rosenbrock' and config.dimension % 2:
      raise flags.UserError(
        f'--dimension={config.dimension}: rosenbrock has an even number'
      )
    problem = smooth.equations(config.problem, config.power, config.dimension)
  newton.compare('nonlinear_equations', problem, config, config.optimizers)


if __name__ == '__main__':
  launch.run(main, Config)
