"""Estimators that any method can use: plain gradients, with extras on top."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from optlab import base


def stateless(
  estimate: Callable[[base.Params, base.Batch], base.Estimate],
) -> base.GradientEstimator:
  """Makes an estimator without memory from a function.

  Args:
    estimate: ``(params, batch) -> Estimate``.

  Returns:
    A `GradientEstimator` whose state is empty.

  Raises:
    TypeError: ``estimate`` is not a function.
  """
  base.check_callable('estimate', estimate, '(params, batch) -> Estimate')
  return base.GradientEstimator(
    init=lambda params: optax.EmptyState(),
    estimate=lambda params, state, batch: (estimate(params, batch), state),
  )


def value_and_grad(
  fun: Callable[[base.Params, base.Batch], jax.Array],
) -> base.GradientEstimator:
  """`jax.value_and_grad` as an estimator.

  It also hands ``value_fn``, the objective bound to the batch, to line searches
  and to `gns_newton`. Cost: one gradient.

  Args:
    fun: The loss, ``(params, batch) -> scalar``.

  Returns:
    A `GradientEstimator` without memory.

  Raises:
    TypeError: ``fun`` is not a function.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> estimator = optlab.value_and_grad(lambda x, batch: jnp.sum(x * batch))
    >>> x = jnp.ones(2)
    >>> estimate, _ = estimator.estimate(x, estimator.init(x), 2.0 * x)
    >>> print(estimate.value, estimate.grads)
    4.0 [2. 2.]
  """
  base.check_callable('fun', fun, '(params, batch) -> scalar')

  def value_fn(batch, params):
    return fun(params, batch)

  def estimate(params, batch):
    value, grads = jax.value_and_grad(fun)(params, batch)
    bound = jax.tree_util.Partial(value_fn, batch)
    return base.Estimate(value, grads, {'value_fn': bound})

  return stateless(estimate)


def with_curvature(
  estimator: base.GradientEstimator,
  curvature: Callable[[base.Params, Any], base.Operator],
) -> base.GradientEstimator:
  """Adds the extra argument ``curvature``, an operator at the current point.

  Args:
    estimator: The estimator to add it to, for example `value_and_grad`.
    curvature: ``(params, batch) -> operator``, for example ``hessian(loss)`` or
      ``gauss_newton(model, loss)``.

  Returns:
    A `GradientEstimator` with the state of ``estimator``.

  Raises:
    TypeError: ``curvature`` is not a function.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> loss = lambda x, batch: jnp.sum(batch * x ** 2)
    >>> estimator = optlab.with_curvature(
    ...     optlab.value_and_grad(loss), optlab.hessian(loss))
    >>> x = jnp.ones(2)
    >>> estimate, _ = estimator.estimate(x, estimator.init(x), 3.0)
    >>> print(estimate.extras['curvature'](x))
    [6. 6.]
  """
  base.check_estimator(estimator)
  base.check_callable('curvature', curvature, '(params, batch) -> operator')

  def estimate(params, state, batch):
    result, state = estimator.estimate(params, state, batch)
    extras = result.extras | {'curvature': curvature(params, batch)}
    return result._replace(extras=extras), state

  return base.GradientEstimator(estimator.init, estimate)
