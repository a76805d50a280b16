"""Smooth problems of the Newton experiments, with the curvatures they have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import optlab

from ..lab import flags
from . import cutest as cutest_modules
from . import data as data_lib


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


def _start(shape: tuple[int, ...]) -> Callable[[int], np.ndarray]:
  """Zero for seed 0, normal with standard deviation 0.1 for the others."""

  def start(seed):
    if seed == 0:
      return np.zeros(shape)
    return 0.1 * np.random.default_rng(seed).normal(size=shape)

  return start


# Above this many unknowns a formed Hessian costs more than products with it.
DENSE_LIMIT = 2000


def _regression_curvatures(
  row_loss: Callable[[jax.Array, jax.Array], jax.Array],
  labels: Any,
  l2: float,
  size: int,
) -> dict[str, Curvature]:
  """Curvatures of the mean of ``row_loss(a @ params, y)`` plus the penalty.

  The loss is minus the log-probability of a label, one of ``labels``.
  """

  def outputs_loss(outputs, data):
    return jnp.mean(jax.vmap(row_loss)(outputs, data[1]))

  def example_loss(params, features, label):
    return row_loss(features @ params, label)

  def log_probs(params, features):
    outputs = features @ params
    return -jax.vmap(lambda label: row_loss(outputs, label))(
      jnp.asarray(labels)
    )

  def ridge(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the penalty's curvature to a factory's operators."""

    def curvature(params, data):
      return jax.tree_util.Partial(
        lambda operator, v: jax.tree.map(
          lambda product, leaf: product + l2 * leaf, operator(v), v
        ),
        factory(params, data),
      )

    return curvature

  model = lambda params, data: data[0] @ params
  matrix_free = ridge(optlab.gauss_newton(model, outputs_loss))
  inputs = lambda data: data[0]
  # Rows are those of a dense matrix, which comes last.
  rows = lambda data: data[2] if len(data) > 2 else data[0]
  own = optlab.fisher(log_probs)
  fisher = ridge(lambda params, data: own(params, rows(data)))
  labelled = optlab.empirical_fisher(example_loss)
  empirical = ridge(lambda params, data: labelled(params, rows(data), data[1]))
  curvatures = {'gauss_newton': Curvature(matrix_free)}
  if size <= DENSE_LIMIT:
    exact = optlab.linear_gauss_newton(inputs, outputs_loss, l2)
    curvatures['exact'] = Curvature(exact, columns=size)
    curvatures['fisher'] = Curvature(optlab.dense(fisher), columns=size)
    curvatures['empirical_fisher'] = Curvature(
      optlab.dense(empirical), columns=size
    )
  else:
    # The Fisher matrix is the Gauss-Newton one, with a factor that is too big.
    curvatures['exact'] = curvatures['gauss_newton']
    curvatures['empirical_fisher'] = Curvature(empirical)
  return curvatures


def logistic(dataset: data_lib.Dataset, l2: float) -> Problem:
  """Mean of ``log(1 + exp(-y a.x))`` plus ``l2 / 2 |x|^2``, no intercept.

  Args:
    dataset: A data set with two classes.
    l2: Weight of the penalty.

  Returns:
    The problem; parameters have shape ``[columns]``.
  """
  features, labels = data_lib.dense(dataset), data_lib.signs(dataset)
  data: tuple[Any, ...] = (features, labels)
  if not isinstance(dataset.features, np.ndarray):
    with jax.enable_x64(True):  # Runs in float64 use the values as well.
      products = optlab.sparse_matrix(dataset.features, gram=True)
    data = (products, labels, features)
  row_loss = lambda output, label: jax.nn.softplus(-label * output)

  def fun(params, data):
    margins = data[0] @ params
    losses = jax.nn.softplus(-data[1] * margins)
    return jnp.mean(losses) + 0.5 * l2 * jnp.vdot(params, params)

  size = features.shape[1]
  return Problem(
    name=f'logistic regression, {dataset.name}',
    fun=fun,
    data=data,
    start=_start((size,)),
    curvatures=_regression_curvatures(row_loss, (-1.0, 1.0), l2, size),
    regression=(dataset.features, labels, l2),
  )


def softmax(dataset: data_lib.Dataset, l2: float) -> Problem:
  """Mean cross-entropy of linear logits plus ``l2 / 2 |x|^2``, no intercept.

  Args:
    dataset: A data set.
    l2: Weight of the penalty.

  Returns:
    The problem; parameters have shape ``[columns, classes]``.
  """
  features, labels = data_lib.dense(dataset), dataset.labels
  row_loss = lambda outputs, label: jax.nn.logsumexp(outputs) - outputs[label]

  def fun(params, data):
    losses = jax.vmap(row_loss)(data[0] @ params, data[1])
    return jnp.mean(losses) + 0.5 * l2 * jnp.vdot(params, params)

  shape = (features.shape[1], len(dataset.classes))
  return Problem(
    name=f'softmax regression, {dataset.name}',
    fun=fun,
    data=(features, labels),
    start=_start(shape),
    curvatures=_regression_curvatures(
      row_loss, np.arange(shape[1]), l2, shape[0] * shape[1]
    ),
    regression=(dataset.features, labels, l2),
  )


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
  start = _start((columns,))

  def fun(x, data):
    return mu * jax.nn.logsumexp((data[0] @ x - data[1]) / mu)

  def terms(x, data):
    return (data[0] @ x - data[1]) / mu

  def weighted(outputs, data):
    del data
    weight = jax.lax.stop_gradient(jax.nn.softmax(outputs))
    return 0.5 * mu * jnp.vdot(weight, outputs**2)

  gauss_newton = optlab.gauss_newton(terms, weighted)
  columns_formed = columns if columns <= DENSE_LIMIT else 0
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
  columns = dimension if dimension <= DENSE_LIMIT else 0
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
    The problem, from its standard start.

  Raises:
    UserError: sif2jax is not installed, or has no such problem.
  """
  module = cutest_modules.module(name.lower())
  if not hasattr(module, name):
    raise flags.UserError(f'cutest_{name.lower()}: sif2jax has no {name}')
  own = getattr(module, name)()
  first = np.asarray(own.y0, np.float64)
  fun = lambda x, data: own.objective(x, own.args)
  value = own.expected_objective_value
  return Problem(
    name=name,
    fun=fun,
    data=(),
    start=lambda seed: first,
    curvatures={
      'exact': Curvature(optlab.dense(optlab.hessian(fun)), first.size)
    },
    least=None if value is None else float(value),
  )
