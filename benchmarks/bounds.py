"""Evaluations under bounds: `minimize` beside scipy's L-BFGS-B, on CUTEst.

Problems of `sif2jax` at their standard starts, in float64. Solved is where the
projected gradient, ``P(x - g) - x`` with ``P`` onto the box, is at most
``1e-6 max(1, its norm at the start)`` within 2,000 evaluations of value and
gradient; `minimize` stops later, at the norm of what no active bound holds.
"""

import contextlib
import warnings

import jax
from jax.flatten_util import ravel_pytree
import numpy as np
import optax
import scipy.optimize

from benchmarks import cutest as unbounded
from experiments.problems import cutest
import optlab

LIST = """
BIGGS5 CAMEL6 HATFLDA HATFLDB HATFLDC HIMMELP1 HS1 HS2 HS3 HS38 HS4 HS45 HS5
LOGROS
"""
NAMES = tuple(LIST.split())
LIMIT = unbounded.LIMIT


class Problem(unbounded.Problem):
  """One with bounds: ``box`` is set beside the fields."""

  box: tuple[np.ndarray, np.ndarray]


def load(name: str) -> Problem:
  """A problem by its name in CUTEst; needs float64."""
  module = cutest.module(name.lower(), 'cutest._bounded_minimisation')
  problem = getattr(module, name)()
  start, unravel = ravel_pytree(problem.y0)
  fun = lambda x: problem.objective(unravel(x), problem.args)
  box = tuple(
    np.broadcast_to(ravel_pytree(end)[0], start.shape) for end in problem.bounds
  )
  inside = np.clip(start, *box)
  norm = _projected(inside, jax.jit(jax.grad(fun))(inside), box)
  found = Problem(name, fun, np.asarray(start), 1e-6 * max(1.0, norm))
  found.box = box
  return found


def _projected(x, grad, box):
  return float(np.linalg.norm(np.clip(x - np.asarray(grad), *box) - x))


def ours(problem: Problem, tx, curvature=None) -> int | None:
  """Evaluations that an optax transformation takes, or None."""
  dense = optlab.dense(optlab.hessian(problem.fun)) if curvature else None
  run = jax.jit(
    lambda start: optlab.minimize(
      problem.fun, start, tx, max_steps=LIMIT, grad_tol=problem.tol,
      curvature=dense, bounds=problem.box,
    )
  )(problem.start)  # fmt: skip
  count = int(run.counts.values)
  return count if run.success and count <= LIMIT else None


def scipys(problem: Problem) -> int | None:
  """Evaluations that L-BFGS-B takes, or None."""
  value_and_grad = jax.jit(jax.value_and_grad(problem.fun))
  seen = []

  def fun(x):
    value, grad = value_and_grad(x)
    seen.append(_projected(x, grad, problem.box))
    if seen[-1] <= problem.tol or len(seen) > LIMIT:
      raise StopIteration
    return float(value), np.asarray(grad)

  with contextlib.suppress(StopIteration):
    scipy.optimize.minimize(
      fun, np.clip(problem.start, *problem.box), jac=True, method='L-BFGS-B',
      bounds=np.transpose(problem.box),
      options={'gtol': 0.0, 'ftol': 0.0, 'maxfun': LIMIT, 'maxiter': LIMIT},
    )  # fmt: skip
  return len(seen) if seen[-1] <= problem.tol and len(seen) <= LIMIT else None


METHODS = {
  'gns': lambda p: ours(p, optlab.gns_newton(), True),
  'gns lanczos': lambda p: ours(p, optlab.gns_newton()),
  'optax.lbfgs': lambda p: ours(p, optax.lbfgs()),
  'L-BFGS-B': scipys,
}


def table(names=NAMES, methods=METHODS) -> dict[str, dict[str, int | None]]:
  """Evaluations by problem and method, ``None`` where it is not solved."""
  return unbounded.table(names, methods, load)


def main() -> None:
  """Prints the table."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    rows = table()
  print(f'{"":14}' + ''.join(f'{method:>12}' for method in METHODS))
  for name, row in rows.items():
    print(f'{name:14}' + ''.join(f'{n or "-":>12}' for n in row.values()))
  print(*unbounded.summary(rows), sep='\n')


if __name__ == '__main__':
  main()
