"""GNS-Newton beside its peers on one smooth problem: the shared main.

Every solver minimizes the identical objective from the same start until f - f*
is at most the tolerance. Optimizers that are optax transformations run twice:
step by step, for the record's trajectories, and in one compiled loop, whose
wall time the table shows.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import statistics
import time
from typing import Any, NamedTuple
from unittest import mock
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import exceptions as sklearn_exceptions
from sklearn import linear_model
from sklearn.linear_model import _linear_loss

import optlab

from ..methods import newton as methods
from ..problems import data as data_lib
from ..problems import smooth
from . import devices
from . import flags
from . import plots
from . import tables
from .session import Session

_TIMED_RUNS = 3
_MAX_TIMED_RUNS = 21  # Of a compiled loop, a median that other work spares.
_LONG = 1.0  # Seconds after which no further run is timed.


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags of the three programs."""

  curvature: tuple[str, ...] = flags.flag(
    methods.CURVATURES,
    'Curvatures of gns and gns_paper.',
    choices=methods.CURVATURES,
  )
  f_tol: float = flags.flag(1e-8, 'Stop at f - f* <= f_tol.', low=0.0)
  max_steps: int = flags.flag(
    1000, 'The most steps of a solver.', low=1, grows=True
  )


@dataclasses.dataclass(frozen=True)
class RegressionConfig(Config):
  """Flags of logistic and softmax regression."""

  dataset: str = flags.flag(
    'mushrooms',
    'mushrooms, breast_cancer, digits, mnist in data_dir, a LIBSVM or IDX file'
    ' by path or by name in data_dir, or openml:NAME.',
  )
  data_dir: str = flags.flag('', 'Folder with data files.')
  l2: float | None = flags.flag(
    None, 'Weight of |x|^2 / 2; 1 / rows if not given.', low=1e-12
  )
  optimizers: tuple[str, ...] = flags.flag(
    tuple(name for name in methods.OPTIMIZERS if name != 'gns_paper'),
    'Solvers.',
    choices=methods.OPTIMIZERS,
  )


class Progress(NamedTuple):
  """State of a trajectory, with the oracle calls so far (int32 scalars)."""

  params: Any
  opt_state: Any
  trials: jax.Array
  gradients: jax.Array
  products: jax.Array
  solves: jax.Array


def _minimize(
  problem: smooth.Problem, method: methods.Method, params, data, **kwargs
) -> optlab.MinimizeResult:
  curvature = None
  if method.curvature is not None:
    factory = method.curvature.factory
    curvature = lambda params: factory(params, data)
  return optlab.minimize(
    lambda params: problem.fun(params, data), params, method.tx,
    curvature=curvature, **kwargs,
  )  # fmt: skip


def _begin(method: methods.Method, params) -> Progress:
  zero = jnp.zeros((), jnp.int32)
  return Progress(params, method.tx.init(params), zero, zero + 1, zero, zero)


def _advance(problem, method, state: Progress, data) -> Progress:
  """One step, with what it cost."""
  result = _minimize(
    problem, method, state.params, data,
    max_steps=1, opt_state=state.opt_state,
  )  # fmt: skip
  trials, gradients = method.evaluations(result.opt_state)
  products, solves = jnp.int32(0), jnp.int32(0)
  if method.curvature is not None:
    total = lambda opt_state: optax.tree.get(opt_state, 'total_products')
    counted = total(result.opt_state) - total(state.opt_state)
    products = counted + method.curvature.columns
    solves = optax.tree.get(result.opt_state, 'solves')
  return Progress(
    result.params, result.opt_state,
    state.trials + trials, state.gradients + gradients,
    state.products + products, state.solves + solves,
  )  # fmt: skip


def _suboptimality(problem: smooth.Problem, least: float):
  """``params -> value and f - f*``, in float64 whatever the run's precision."""
  with jax.enable_x64(True):
    wide = smooth.cast(problem, jnp.float64)

  value_and_grad = jax.jit(jax.value_and_grad(problem.fun))

  def evaluate(params) -> dict[str, float]:
    with jax.enable_x64(True):
      value, grad = value_and_grad(
        jnp.asarray(np.asarray(params, np.float64)), wide.data
      )
      return {
        'value': float(value),
        'suboptimality': float(value) - least,
        'grad_norm': float(jnp.linalg.norm(grad)),
      }

  return evaluate


def _time_loop(problem, method, params, target, max_steps):
  """Median seconds of the compiled loop, and seconds to compile it."""

  def loop(params, data, target):
    return _minimize(
      problem, method, params, data, max_steps=max_steps, target_value=target
    )

  began = time.perf_counter()
  compiled = jax.jit(loop).lower(params, problem.data, target).compile()
  compile_seconds = time.perf_counter() - began
  seconds = []
  while len(seconds) < _MAX_TIMED_RUNS and sum(seconds) < _LONG:
    began = time.perf_counter()
    jax.block_until_ready(compiled(params, problem.data, target))
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds), compile_seconds


def _run_optax(session, problem, method, seed, config, least, evaluate):
  """Trajectory and time of one optax transformation."""
  params = jnp.asarray(problem.start(seed), jnp.dtype(config.precision))

  def measure(state):
    counts = {
      name: getattr(state, name)
      for name in ('trials', 'gradients', 'products', 'solves')
    }
    return evaluate(state.params) | counts

  def stop(rows):
    ended = rows[0]['suboptimality'] <= config.f_tol
    return ended or not np.isfinite(rows[0]['value'])

  session.run(
    method.name,
    _begin(method, params),
    functools.partial(_advance, problem, method),
    measure,
    steps=config.max_steps,
    seeds=(seed,),
    data=problem.data,
    stop=stop,
    show='suboptimality',
    prefix=True,
  )
  last = session.select('eval', method=method.name, seed=seed)[-1]
  if session.select('summary', method=method.name, seed=seed):
    return
  target = jnp.asarray(least + config.f_tol, params.dtype)
  seconds, compile_seconds = _time_loop(
    problem, method, params, target, max(last['step'], 1)
  )
  session.write(
    'summary',
    **{k: v for k, v in last.items() if k not in ('kind', 'seconds')},
    reached=last['suboptimality'] <= config.f_tol,
    seconds=seconds,
    seconds_with_compilation=seconds + compile_seconds,
  )


@contextlib.contextmanager
def _counting(columns: int):
  """Counts the oracle calls of scikit-learn's linear models.

  A formed Hessian counts as ``columns`` products, as it does for ours.
  """
  counts = {'trials': 0, 'gradients': 0, 'products': 0, 'solves': 0}
  loss = _linear_loss.LinearModelLoss

  def counted(name, **per_call):
    original = getattr(loss, name)

    def call(self, *args, **kwargs):
      for count, calls in per_call.items():
        counts[count] += calls
      return original(self, *args, **kwargs)

    return mock.patch.object(loss, name, call)

  def counted_products():
    original = loss.gradient_hessian_product

    def call(self, *args, **kwargs):
      counts['gradients'] += 1
      grad, product = original(self, *args, **kwargs)

      def counted_product(vector):
        counts['products'] += 1
        return product(vector)

      return grad, counted_product

    return mock.patch.object(loss, 'gradient_hessian_product', call)

  with (
    counted('loss', trials=1),
    counted('loss_gradient', trials=1, gradients=1),
    counted('gradient', gradients=1),
    counted('gradient_hessian', gradients=1, solves=1, products=columns),
    counted_products(),
  ):
    yield counts


def fit_sklearn(
  regression, solver: Any, start: np.ndarray, max_iter: int, dtype
) -> tuple[np.ndarray, float]:
  """Fits scikit-learn's logistic regression to the problem's objective.

  Args:
    regression: ``(features, labels, l2)``.
    solver: Name of scikit-learn's solver.
    start: The start, in the shape of the problem's parameters.
    max_iter: Iterations; the solver's own test is off.
    dtype: Floating point type of the features.

  Returns:
    The parameters in the shape of ``start``, and the seconds of ``fit``.
  """
  features, labels, l2 = regression
  features = features.astype(dtype)
  shape = start.shape
  # Of two classes it fits the difference of their columns, whose penalty is
  # half that of both.
  two = start.ndim == 2 and shape[1] == 2
  if two:
    start, l2 = start[:, 1] - start[:, 0], l2 / 2
  model = linear_model.LogisticRegression(
    C=1.0 / (l2 * len(labels)), fit_intercept=False, solver=solver,
    tol=1e-300, max_iter=max_iter, warm_start=True,
  )  # fmt: skip
  model.coef_ = np.atleast_2d(start.T).astype(dtype)
  model.intercept_ = np.zeros(len(model.coef_), dtype)
  with warnings.catch_warnings():
    # Stopping at max_iter is what is asked for; at the optimum line searches
    # fail, which is the end of the road and not an error either.
    warnings.simplefilter('ignore', sklearn_exceptions.ConvergenceWarning)
    warnings.simplefilter('ignore', UserWarning)
    warnings.simplefilter('ignore', RuntimeWarning)
    began = time.perf_counter()
    model.fit(features, labels)
    seconds = time.perf_counter() - began
  params = model.coef_.T.astype(np.float64)
  if two:
    params = np.hstack([-params / 2, params / 2])
  return params.reshape(shape), seconds


def _run_sklearn(session, problem, solver, seed, config, evaluate):
  """Trajectory of a scikit-learn solver: fits with more and more iterations."""
  name = f'sklearn {solver}'
  if session.select('summary', method=name, seed=seed):
    return
  start = problem.start(seed)
  fit = functools.partial(
    fit_sklearn, problem.regression, solver, start, dtype=config.precision
  )

  def measure(iterations):
    with _counting(start.size) as counts:
      params, _ = fit(max_iter=iterations)
    times = [fit(max_iter=iterations)[1] for _ in range(_TIMED_RUNS)]
    row = {
      'method': name, 'seed': seed, 'step': iterations,
      'seconds': statistics.median(times), **evaluate(params), **counts,
    }  # fmt: skip
    session.write('eval', **row)
    return row

  low, high, row = 0, 1, measure(1)
  previous = np.inf
  while row['suboptimality'] > config.f_tol and high < config.max_steps:
    if row['suboptimality'] >= previous and high - low > 8:
      break  # More iterations no longer help.
    previous = row['suboptimality']
    low, high = high, min(high + max(1, high // 3), config.max_steps)
    row = measure(high)
  reached = row['suboptimality'] <= config.f_tol
  while reached and high - low > 1:  # The fewest iterations that do.
    middle = (low + high) // 2
    candidate = measure(middle)
    if candidate['suboptimality'] <= config.f_tol:
      high, row = middle, candidate
    else:
      low = middle
  session.write(
    'summary', **row, reached=reached, seconds_with_compilation=row['seconds']
  )


def compare(
  program: str,
  problem: smooth.Problem,
  config: Config,
  optimizers: Sequence[str],
) -> Session:
  """Runs the optimizers on a problem; writes the record, table and picture.

  Args:
    program: The program's name.
    problem: The problem, in float64.
    config: The program's configuration.
    optimizers: Names from `methods.OPTIMIZERS`.

  Returns:
    The session, for its rows.
  """
  cast = smooth.cast(problem, jnp.dtype(config.precision))
  least = smooth.least_value(problem)
  evaluate = _suboptimality(problem, least)
  header = {'problem': problem.name, 'least': least, 'show': 'suboptimality'}
  with Session(program, config, **header) as session:
    for seed in range(config.seeds):
      for method in methods.methods(optimizers, config.curvature, cast):
        _run_optax(session, cast, method, seed, config, least, evaluate)
      for solver in methods.SKLEARN:
        named = f'sklearn_{solver.replace("-", "_")}' in optimizers
        if named and problem.regression is not None:
          _run_sklearn(session, problem, solver, seed, config, evaluate)
  _report(problem, config, session, least)
  picture = session.folder / 'suboptimality.png'
  plots.draw(
    [('', {'program': problem.name, 'config': {}}, session.rows)],
    picture, x=('calls', 'seconds'), y='suboptimality',
  )  # fmt: skip
  print(f'record:  {session.folder / "record.jsonl"}\npicture: {picture}')
  return session


def _report(problem, config, session, least) -> None:
  columns = (
    'method', 'steps', 'trials', 'grads', 'Hv', 'solves', 'f - f*', 'ms',
    'ms+compile',
  )  # fmt: skip
  summaries = session.select('summary')
  rows = []
  for name in dict.fromkeys(row['method'] for row in summaries):
    chosen = [row for row in summaries if row['method'] == name]
    middle = lambda key, chosen=chosen: float(
      np.median([row[key] for row in chosen])
    )
    reached = all(row['reached'] for row in chosen)
    rows.append([
      name if reached else f'{name} (not reached)',
      *(middle(key) for key in (
        'step', 'trials', 'gradients', 'products', 'solves', 'suboptimality')),
      1e3 * middle('seconds'), 1e3 * middle('seconds_with_compilation'),
    ])  # fmt: skip
  seeds = f', median of {config.seeds} starts' if config.seeds > 1 else ''
  tables.show(
    f'{problem.name}, {config.precision}{seeds}:\nuntil f - f* <='
    f' {config.f_tol:g}, where f* = {least:.10g}',
    columns, rows,
  )  # fmt: skip


def regress(
  program: str,
  make: Callable[[data_lib.Dataset, float], smooth.Problem],
  config: RegressionConfig,
) -> None:
  """Loads the data, and compares the solvers on it.

  Args:
    program: The program's name.
    make: ``(dataset, l2) -> problem``.
    config: The program's configuration.
  """
  dataset = data_lib.load(config.dataset, config.data_dir)
  l2 = 1.0 / len(dataset.labels) if config.l2 is None else config.l2
  compare(program, make(dataset, l2), config, config.optimizers)
