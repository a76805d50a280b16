"""scikit-learn's solvers of the same objective, with their calls counted."""

import contextlib
import functools
import statistics
import time
from typing import Any
from unittest import mock
import warnings

import numpy as np
from sklearn import exceptions as sklearn_exceptions
from sklearn import linear_model
from sklearn.linear_model import _linear_loss

_TIMED_RUNS = 3


@contextlib.contextmanager
def counting(columns: int):
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


def run(session, problem, solver, seed, config, evaluate):
  """Trajectory of a scikit-learn solver: fits with more and more iterations."""
  name = f'sklearn {solver}'
  if session.select('summary', method=name, seed=seed):
    return
  start = problem.start(seed)
  fit = functools.partial(
    fit_sklearn, problem.regression, solver, start, dtype=config.precision
  )

  def measure(iterations):
    with counting(start.size) as counts:
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
