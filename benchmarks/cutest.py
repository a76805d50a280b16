"""Evaluations to a solution on CUTEst problems, beside scipy's and optax's.

The problems come from `sif2jax`, at their standard starts, in float64. Solved
is where ``|g| <= 1e-6 max(1, |g_0|)`` at a point evaluated within 2,000
evaluations of value and gradient; Hessians are not counted. The table's last
lines are a performance profile: the part of all problems that a method solves
within a factor of the evaluations of the best one.

A second table fits residuals, two variables each, by Gauss-Newton and by
scipy's Levenberg-Marquardt (``lm``) and trust region (``trf``), under the same
test on the gradient of half the sum of squares.
"""

from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from experiments.problems import cutest
import optlab

LIST = """
AKIVA BENNETT5LS BIGGS6 BOX3 BROWNDEN CHWIRUT1LS CHWIRUT2LS CLIFF CLUSTERLS
DANIWOODLS DENSCHNA DENSCHNC DENSCHNE DJTL EG1 EGGCRATE ELATVIDU EXP2 EXPFIT
GAUSS1LS GAUSS2LS GAUSS3LS HATFLDD HATFLDE HATFLDFL HATFLDFLS HELIX HILBERTB
HIMMELBH JENSMP KOWOSB LOGHAIRY LSC1LS LUKSAN11LS MARATOSB MEXHAT MGH17LS
MISRA1ALS MISRA1BLS MISRA1DLS NELSONLS PALMER4C PALMER5C PALMER5D PALMER6C
PALMER7C PALMER8C PRICE3 ROSENBR S308 SISSER TRIGON1 VANDANMSLS WAYSEA2
"""
NAMES = tuple(LIST.split())
MODULES = {'EXP2': 'exp_scipy'}
# Least squares in two variables: those of the list that sif2jax has as
# residuals, and Rosenbrock, Powell badly scaled, Freudenstein-Roth and Brown.
FITTED = """
CLUSTER DANIWOOD DENSCHNCNE EGGCRATENE ELATVIDUNE EXP2NE EXPFITNE JENSMPNE
MISRA1A MISRA1B MISRA1D S308NE HS1NE POWELLBS FREURONE BROWNBSNE
"""
EQUATIONS = tuple(FITTED.split())
LIMIT = 2000
FACTORS = (1.0, 1.5, 2.0, 4.0, 8.0)


class Problem(NamedTuple):
  """A problem on a vector.

  Attributes:
    name: Its name in CUTEst.
    fun: The objective, traceable.
    start: The standard start.
    tol: The norm of the gradient at a solution.
  """

  name: str
  fun: Any
  start: np.ndarray
  tol: float


def load(name: str) -> Problem:
  """A problem by its name in CUTEst; needs float64."""
  module = MODULES.get(name, name.lower())
  problem = getattr(cutest.module(module), name)()
  flat, unravel = jax.flatten_util.ravel_pytree(problem.y0)
  fun = lambda x: problem.objective(unravel(x), problem.args)
  grad = jax.jit(jax.grad(fun))(flat)
  tol = 1e-6 * max(1.0, float(jnp.linalg.norm(grad)))
  return Problem(name, fun, np.asarray(flat), tol)


class Residuals(NamedTuple):
  """Residuals of a vector, to be made small; the fields as of `Problem`."""

  name: str
  fun: Any
  start: np.ndarray
  tol: float


def load_residuals(name: str) -> Residuals:
  """A system of equations by its name in CUTEst; needs float64."""
  problem = getattr(
    cutest.module(name.lower(), 'cutest._nonlinear_equations'), name
  )()
  fun = lambda x: problem.constraint(x)[0]
  start = jnp.asarray(problem.y0, jnp.float64)
  residual, jacobian = fun(start), jax.jacobian(fun)(start)
  tol = 1e-6 * max(1.0, float(jnp.linalg.norm(residual @ jacobian)))
  return Residuals(name, fun, np.asarray(start), tol)


def our_fit(problem: Residuals) -> int | None:
  """Evaluations that `optlab.newton.least_squares` takes, or None."""
  run = jax.jit(
    lambda start: optlab.newton.least_squares(
      problem.fun, start, max_steps=LIMIT, grad_tol=problem.tol
    )
  )(problem.start)
  count = 1 + int(run.opt_state.info.total_trials)
  good = run.status == optlab.training.GRAD_TOL and count <= LIMIT
  return count if good else None


def scipys_fit(problem: Residuals, method: str) -> int | None:
  """Evaluations of the residuals that scipy's method takes, or None."""
  both = jax.jit(lambda x: (problem.fun(x), jax.jacobian(problem.fun)(x)))
  count = 0

  def fun(x):
    nonlocal count
    count += 1
    residual, jacobian = map(np.asarray, both(x))
    if np.linalg.norm(residual @ jacobian) <= problem.tol:
      raise _Enough
    if count >= LIMIT:
      raise StopIteration
    return residual

  try:
    scipy.optimize.least_squares(
      fun, problem.start, lambda x: np.asarray(both(x)[1]), method=method,
      ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=LIMIT,
    )  # fmt: skip
  except _Enough:
    return count
  except (StopIteration, ValueError, np.linalg.LinAlgError):
    pass
  return None


FITS = {
  'gns': our_fit,
  'lm': lambda p: scipys_fit(p, 'lm'),
  'trf': lambda p: scipys_fit(p, 'trf'),
}


def ours(problem: Problem, tx, curvature=None) -> int | None:
  """Evaluations that an optax transformation takes, or None."""
  dense = optlab.dense(optlab.hessian(problem.fun)) if curvature else None

  def evaluations(result):
    count = optax.tree.get(result.opt_state, 'total_trials', None)
    if count is None:
      count = optax.tree.get(result.opt_state, 'num_linesearch_steps')
    return jnp.asarray(count, jnp.int32)

  @jax.jit
  def solve(start):
    return optlab.minimize(
      problem.fun, start, tx, max_steps=LIMIT, grad_tol=problem.tol,
      curvature=dense, trace=evaluations,
    )  # fmt: skip

  run = solve(problem.start)
  counts = np.asarray(run.trace)
  # Totals of a run, or figures of a step.
  is_total = 'total_trials' in str(jax.tree.leaves_with_path(run.opt_state))
  count = 1 + int(counts[int(run.steps)] if is_total else counts.sum())
  good = run.status == optlab.training.GRAD_TOL and count <= LIMIT
  return count if good else None


class _Enough(Exception):
  pass


def scipys(problem: Problem, method: str) -> int | None:
  """Evaluations that a method of scipy takes, or None."""
  value_and_grad = jax.jit(jax.value_and_grad(problem.fun))
  hessian = jax.jit(jax.hessian(problem.fun))
  count = 0

  def fun(x):
    nonlocal count
    count += 1
    value, grad = value_and_grad(x)
    grad = np.asarray(grad)
    if np.isfinite(value) and np.linalg.norm(grad) <= problem.tol:
      raise _Enough
    if count >= LIMIT:
      raise StopIteration
    return float(value), grad

  tight = {
    'L-BFGS-B': {'gtol': 0.0, 'ftol': 0.0, 'maxfun': LIMIT, 'maxiter': LIMIT},
    'Newton-CG': {'xtol': 0.0, 'maxiter': LIMIT},
  }.get(method, {'gtol': 0.0, 'maxiter': LIMIT})
  hess = (
    {} if method == 'L-BFGS-B' else {'hess': lambda x: np.asarray(hessian(x))}
  )
  try:
    scipy.optimize.minimize(
      fun, problem.start, jac=True, method=method, options=tight, **hess
    )
  except _Enough:
    return count
  except (StopIteration, RuntimeError, ValueError, np.linalg.LinAlgError):
    pass  # Not solved; some raise where a number is not finite.
  return None


METHODS = {
  'gns': lambda p: ours(p, optlab.gns_newton(), True),
  'gns lanczos': lambda p: ours(p, optlab.gns_newton(optlab.lanczos())),
  'multishift': lambda p: ours(
    p, optlab.gns_newton(optlab.newton.multishift_cg())
  ),
  'gns cg': lambda p: ours(p, optlab.gns_newton(optlab.cg())),
  'trust-exact': lambda p: scipys(p, 'trust-exact'),
  'trust-krylov': lambda p: scipys(p, 'trust-krylov'),
  'Newton-CG': lambda p: scipys(p, 'Newton-CG'),
  'L-BFGS-B': lambda p: scipys(p, 'L-BFGS-B'),
  'optax.lbfgs': lambda p: ours(p, optax.lbfgs()),
}


def table(
  names=NAMES, methods=METHODS, load=load
) -> dict[str, dict[str, int | None]]:
  """Evaluations by problem and method, ``None`` where it is not solved."""
  rows = {}
  with jax.enable_x64(True), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    for name in names:
      problem = load(name)
      rows[name] = {key: solve(problem) for key, solve in methods.items()}
      # A problem's programs are of no use to the next.
      jax.clear_caches()
  return rows


def ratios(rows, method: str, peer: str) -> list[float]:
  """Evaluations over the peer's, infinite where the peer alone solves."""
  return [
    (row[method] or np.inf) / row[peer] for row in rows.values() if row[peer]
  ]


def summary(rows) -> list[str]:
  """The lines under the table."""
  methods = list(next(iter(rows.values())))
  found = {m: [row[m] for row in rows.values()] for m in methods}
  number = lambda x: f'{x:12g}'
  lines = {
    'solved': [sum(map(bool, found[m])) for m in methods],
    'median': [np.median([n or np.inf for n in found[m]]) for m in methods],
    'sum of solved': [sum(n or 0 for n in found[m]) for m in methods],
  }
  for peer in {'trust-exact', 'trf'}.intersection(methods):
    lines[f'/ {peer}'] = [
      round(np.median(ratios(rows, m, peer)), 2) for m in methods
    ]
  best = [min(n or np.inf for n in row.values()) for row in rows.values()]
  for factor in FACTORS:
    lines[f'within {factor:g}'] = [
      round(
        np.mean([
          (n or np.inf) <= factor * b < np.inf
          for n, b in zip(found[m], best, strict=True)
        ]),
        2,
      )
      for m in methods
    ]  # fmt: skip
  return [
    f'{label:14}' + ''.join(map(number, values))
    for label, values in lines.items()
  ]


def main() -> None:
  """Prints the tables."""
  for methods, rows in (
    (METHODS, table()),
    (FITS, table(EQUATIONS, FITS, load_residuals)),
  ):
    print(f'{"":14}' + ''.join(f'{method:>12}' for method in methods))
    for name, row in rows.items():
      print(f'{name:14}' + ''.join(f'{n or "-":>12}' for n in row.values()))
    print(*summary(rows), '', sep='\n')


if __name__ == '__main__':
  main()
