"""Smooth problems of the Newton experiments, with the curvatures they have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import optlab

from ..lab import flags
from . import cutest as cutest_modules


class Curvature(NamedTuple):
  """What `gns_newton` is given: the operator's factory, and its solver.

  Attributes:
    factory: ``(params, data) -> operator``.
    columns: Hessian-vector products that forming the matrix stands for; 0 for a
      matrix-free operator, whose products the method counts itself.
    solver: The solver, ``None`` for the default.
  """

  factory: Callable[..., Any]
  columns: int = 0
  solver: Any = None


class Problem(NamedTuple):
  """A function to minimize.

  Attributes:
    name: Shown in tables.
    fun: ``(params, data) -> scalar``.
    data: Pytree of arrays.
    start: ``seed -> params``, numpy float64.
    curvatures: The curvatures that it has, by name.
    metric: The norm of `gns_newton`, see there.
    least: The least value where it is known.
    regression: ``(features, labels, l2)`` for scikit-learn, or ``None``.
  """

  name: str
  fun: Callable[..., jax.Array]
  data: Any
  start: Callable[[int], np.ndarray]
  curvatures: dict[str, Curvature]
  metric: chex.ArrayTree | None = None
  least: float | None = None
  regression: tuple[Any, np.ndarray, float] | None = None


FEW = 20
REFERENCES = {
  'BFGS': ('jac',), 'trust-exact': ('jac', 'hess'), 'Nelder-Mead': (),
}  # fmt: skip


def cast(problem: Problem, dtype: Any) -> Problem:
  """The problem with its data and metric in the dtype of the run."""
  tree = jax.tree.map(
    lambda leaf: jnp.asarray(
      leaf, dtype if np.issubdtype(leaf.dtype, np.floating) else None
    ),
    (problem.data, problem.metric),
  )
  return problem._replace(data=tree[0], metric=tree[1])


def least_value(problem: Problem) -> float:
  """The least value: known, or found in float64.

  Of a problem of many unknowns by the exact Newton method; of few also by
  scipy's BFGS, trust region and simplex, and it is the least of all.
  """
  if problem.least is not None:
    return problem.least
  first = problem.start(0)
  with jax.enable_x64(True):
    wide = cast(problem, jnp.float64)
    curvature = wide.curvatures['exact']
    run = jax.jit(
      lambda params, data: optlab.minimize(
        lambda params: wide.fun(params, data), params,
        optlab.gns_newton(solver=curvature.solver, metric=wide.metric),
        curvature=lambda params: curvature.factory(params, data),
        max_steps=200, stall_steps=3,
      ).value
    )  # fmt: skip
    found = [float(run(jnp.asarray(first), wide.data))]
    if first.size <= FEW:
      # scipy's methods take vectors.
      fun = jax.jit(lambda x: wide.fun(x.reshape(first.shape), wide.data))
      slope, unit = jax.jit(jax.grad(fun)), jnp.eye(first.size)
      # One column after the other: sparse products have no rule for batches.
      column = lambda x, v: jax.jvp(slope, (x,), (v,))[1]
      hess = jax.jit(lambda x: jax.lax.map(lambda v: column(x, v), unit))
      parts = {'jac': slope, 'hess': hess}
      for solver, needs in REFERENCES.items():
        result = scipy.optimize.minimize(
          fun,
          first.ravel(),
          method=solver,
          **{name: parts[name] for name in needs},
        )
        found.append(float(result.fun))
  return float(np.nanmin(found))


def start_near_zero(shape: tuple[int, ...]) -> Callable[[int], np.ndarray]:
  """Zero for seed 0, normal with standard deviation 0.1 for the others."""

  def start(seed):
    if seed == 0:
      return np.zeros(shape)
    return 0.1 * np.random.default_rng(seed).normal(size=shape)

  return start


# Above this many unknowns a Hessian costs more than products with it: one that
# is a Gram matrix, and one that as many products form.
DENSE_LIMIT = 2000
FORMED_LIMIT = 200


def _metric(matrix: np.ndarray, shift: float) -> optlab.Dense:
  """``A' A + shift I``."""
  gram = matrix.T @ matrix + shift * np.eye(matrix.shape[1])
  return optlab.Dense(jnp.asarray(gram))


def log_sum_exp(rows: int, columns: int, mu: float = 0.5) -> Problem:
  """``mu log sum exp((A x - b) / mu)`` with its minimizer moved to zero.

  ``A`` is uniform on [-1, 1] and ``b`` normal, drawn from seed 0; the mean of
  A's rows under ``softmax(-b / mu)`` is taken off. The norm is
  ``B = A' A + 1e-6 I``, the start is all ones.

  Args:
    rows: Rows of A.
    columns: Columns of A, the unknowns.
    mu: The smoothing.

  Returns:
    The problem.
  """
  rng = np.random.default_rng(0)
  matrix = rng.uniform(-1.0, 1.0, (rows, columns))
  offset = rng.normal(size=rows)
  weights = np.exp(-offset / mu - np.max(-offset / mu))
  matrix -= weights @ matrix / np.sum(weights)
  start = start_near_zero((columns,))

  def fun(x, data):
    return mu * jax.nn.logsumexp((data[0] @ x - data[1]) / mu)

  def terms(x, data):
    return (data[0] @ x - data[1]) / mu

  def weighted(outputs, data):
    del data
    weight = jax.lax.stop_gradient(jax.nn.softmax(outputs))
    return 0.5 * mu * jnp.vdot(weight, outputs**2)

  gauss_newton = optlab.gauss_newton(terms, weighted)
  columns_formed = columns if columns <= FORMED_LIMIT else 0
  form = optlab.dense if columns_formed else lambda factory: factory
  return Problem(
    name=f'log-sum-exp, {rows} x {columns}',
    fun=fun,
    data=(matrix, offset),
    start=lambda seed: 1.0 + start(seed),
    curvatures={
      'exact': Curvature(form(optlab.hessian(fun)), columns_formed),
      'gauss_newton': Curvature(form(gauss_newton), columns_formed),
    },
    metric=_metric(matrix, 1e-6),
    least=float(mu * np.log(np.sum(np.exp(-offset / mu)))),
  )


def _chebyshev(x, data):
  del data
  tail = x[1:] - (2.0 * x[:-1] ** 2 - 1.0)
  return jnp.concatenate([(1.0 - x[:1]) / 2.0, tail])


def _rosenbrock(x, data):
  del data
  pairs = jnp.stack([1.0 - x[::2], 10.0 * (x[1::2] - x[::2] ** 2)])
  return jnp.ravel(pairs)


def _linear(x, data):
  return data[0] @ x - data[1]


def equations(kind: str, power: int, dimension: int) -> Problem:
  """``|u(x)|^p / p`` for a system of nonlinear equations ``u(x) = 0``.

  Args:
    kind: ``chebyshev`` (``u_1 = (1 - x_1) / 2`` and ``u_i = x_i - (2 x_{i-1}^2
      - 1)``), ``rosenbrock`` (pairs ``(1 - x, 10 (y - x^2))``) or ``linear``
      (``A x - b`` with normal A of half as many rows, in the norm
      ``A' A + 1e-3 I``).
    power: p, at least 2.
    dimension: Unknowns.

  Returns:
    The problem; its least value is 0.
  """
  rng = np.random.default_rng(0)
  data: Any = ()
  metric = None
  if kind == 'linear':
    system = _linear
    matrix = rng.normal(size=(dimension // 2, dimension))
    data = (matrix, rng.normal(size=dimension // 2))
    metric = _metric(matrix, 1e-3)
    first = np.ones(dimension)
  elif kind == 'chebyshev':
    system = _chebyshev
    first = 0.5 + 0.4 * np.sin(1.0 + np.arange(dimension))
  else:
    system = _rosenbrock
    first = np.tile([-2.0, 2.0], dimension // 2)

  def outer(u, data):
    del data
    return jnp.vdot(u, u) ** (power / 2) / power

  def fun(x, data):
    return outer(system(x, data), data)

  def rank_one(x, data):
    """(p - 2) |u|^(p - 4) (J' u) (J' u)', from the objective's gradient."""
    value, grad = jax.value_and_grad(fun)(x, data)
    scale = (power - 2) / jnp.maximum(power * value, jnp.finfo(x.dtype).tiny)
    return optlab.newton.LowRank(jnp.sqrt(scale) * grad[None])

  gauss_newton = optlab.gauss_newton(system, outer)
  columns = dimension if dimension <= FORMED_LIMIT else 0
  form = optlab.dense if columns else lambda factory: factory

  def start(seed):
    noise = np.random.default_rng(seed).normal(size=dimension)
    return first + (0.1 * noise if seed else 0.0)

  return Problem(
    name=f'{kind} equations, n = {dimension}, p = {power}',
    fun=fun,
    data=data,
    start=start,
    curvatures={
      'exact': Curvature(form(optlab.hessian(fun)), columns),
      'gauss_newton': Curvature(form(gauss_newton), columns),
      'empirical_fisher': Curvature(rank_one),
    },
    metric=metric,
    least=0.0,
  )


def cutest(name: str) -> Problem:
  """An unconstrained problem of the CUTEst collection, as sif2jax has it.

  Args:
    name: Its name, such as ``BOX3``.

  Returns:
    The problem, from its standard start. Its listed value is not taken: of
    CHWIRUT1LS and EXPFIT it is wrong.

  Raises:
    UserError: sif2jax is not installed, or has no such problem.
  """
  module = cutest_modules.module(name.lower())
  if not hasattr(module, name):
    raise flags.UserError(f'cutest_{name.lower()}: sif2jax has no {name}')
  own = getattr(module, name)()
  first = np.asarray(own.y0, np.float64)
  fun = lambda x, data: own.objective(x, own.args)
  return Problem(
    name=name,
    fun=fun,
    data=(),
    start=lambda seed: first,
    curvatures={
      'exact': Curvature(optlab.dense(optlab.hessian(fun)), first.size)
    },
  )
