"""Newton's method and its peers on a smooth function, and what they cost."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optlab

from ..problems import smooth

SKLEARN = ('lbfgs', 'newton-cg', 'newton-cholesky')
OPTIMIZERS = (
  'gns',
  'gns_paper',
  'lbfgs',
  'gradient_descent',
  *(f'sklearn_{solver.replace("-", "_")}' for solver in SKLEARN),
)
CURVATURES = ('exact', 'gauss_newton', 'fisher', 'empirical_fisher')


class Method(NamedTuple):
  """An optax transformation with what it is given and what it costs.

  Attributes:
    name: Shown in tables.
    tx: The transformation.
    curvature: Its curvature, or ``None``.
    evaluations: ``opt_state -> (trials, gradients)`` of the last step: how
      often it evaluated the objective, and how often the gradient.
  """

  name: str
  tx: optax.GradientTransformation
  curvature: smooth.Curvature | None
  evaluations: Callable[[Any], tuple[jax.Array, jax.Array]]


def _gns_evaluations(state):
  return state.info.trials, state.info.trials


def _line_search_evaluations(state):
  count = optax.tree.get(state, 'num_linesearch_steps').astype(jnp.int32)
  return count, count


def _backtracking_evaluations(state):
  count = optax.tree.get(state, 'num_linesearch_steps').astype(jnp.int32)
  return count, jnp.int32(1)


def methods(
  names: Sequence[str], curvatures: Sequence[str], problem: smooth.Problem
) -> list[Method]:
  """The optax transformations among the optimizers.

  Args:
    names: Names from `OPTIMIZERS`.
    curvatures: Names from `CURVATURES`; those that the problem lacks are left
      out.
    problem: The problem.

  Returns:
    One entry for each optimizer and curvature.
  """
  found = []
  for name in names:
    if name in ('gns', 'gns_paper'):
      make = (
        optlab.gns_newton if name == 'gns' else optlab.newton.gns_newton_paper
      )
      for key in curvatures:
        if key in problem.curvatures:
          curvature = problem.curvatures[key]
          tx = make(solver=curvature.solver, metric=problem.metric)
          found.append(
            Method(f'{name}, {key}', tx, curvature, _gns_evaluations)
          )
    elif name == 'lbfgs':
      tx = optax.lbfgs()
      found.append(Method('optax.lbfgs', tx, None, _line_search_evaluations))
    elif name == 'gradient_descent':
      search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=30, increase_factor=2.0, store_grad=True
      )
      tx = optax.chain(optax.sgd(1.0), search)
      found.append(
        Method('gradient descent', tx, None, _backtracking_evaluations)
      )
  return found
