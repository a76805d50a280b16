"""Estimators that any method can use: plain gradients, with extras on top."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import losses
from optlab import trees
from optlab._storm import WithStormState
from optlab._storm import with_storm

__all__ = [
  'EstimateIfFiniteState',
  'FiniteInfo',
  'WithStormState',
  'estimate_if_finite',
  'stateless',
  'value_and_grad',
  'with_curvature',
  'with_storm',
]


@checks.domains(estimate=checks.Function('(params, batch) -> Estimate'))
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
  checks.enforce(stateless, locals())
  return base.GradientEstimator(
    init=lambda params: optax.EmptyState(),
    estimate=lambda params, state, batch: (estimate(params, batch), state),
  )


@checks.domains(fun=checks.Function('(params, batch) -> scalar'))
def value_and_grad(
  fun: Callable[..., Any],
  *,
  has_aux: bool = False,
  has_state: bool = False,
  has_key: bool = False,
) -> base.GradientEstimator:
  r"""`jax.value_and_grad` as an estimator, for models with state and keys too.

  It also hands ``value_fn``, the objective bound to the batch (and to the model
  state and key of the step), to line searches and to `gns_newton`. Cost: one
  gradient.

  ======================== ============================= =====================
  declared                 ``fun`` takes                 and returns
  ======================== ============================= =====================
  nothing                  ``params, batch``             the loss
  ``has_aux``              the same                      ``loss, aux``
  ``has_state``            ``params, model_state,        ``loss, model_state``
                           batch``
  ``has_state, has_aux``   the same                      ``loss, (model_state,
                                                         aux)``
  ``has_key``              one argument more, a key      the same
  ======================== ============================= =====================

  Args:
    fun: The loss, ``(params, batch) -> scalar``, or as in the table.
    has_aux: Whether it returns auxiliary output: that is `Estimate.aux`, and
      `train_step` returns ``(value, aux)`` for the value.
    has_state: Whether the model has state beside its parameters (running
      statistics, caches). It is given to ``init`` after the parameters and
      lives in the estimator's state.
    has_key: Whether the loss is random. ``init`` takes the key of the run last;
      the loss gets it folded with the number of the step.

  Returns:
    A `GradientEstimator`; ``init(params)``, ``init(params, model_state)``,
    ``init(params, key)`` or ``init(params, model_state, key)``. Its state is
    empty, or a `losses.LossState`.

  Raises:
    TypeError: ``fun`` is not a function, its loss no real scalar, or a leaf of
      ``params`` not a floating array.
    ValueError: ``init`` gets too few or too many arguments, or ``fun`` returns
      something else than declared.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> estimator = optlab.value_and_grad(lambda x, batch: jnp.sum(x * batch))
    >>> x = jnp.ones(2)
    >>> estimate, _ = estimator.estimate(x, estimator.init(x), 2.0 * x)
    >>> print(estimate.value, estimate.grads)
    4.0 [2. 2.]

  Notes:
    For complex parameters the gradient is the conjugate of what `jax.grad`
    returns: the direction of steepest ascent, which optax's updates descend.
    A changed model state must keep shapes and dtypes, as that of a scan.
  """
  checks.enforce(value_and_grad, locals())
  loss = losses.Loss(fun, has_aux, has_state, has_key)

  def estimate(params, state, batch):
    checks.check_params('params', params)
    model_state, key, state = loss.begin(state)
    batch = base.rows_of(batch)
    (value, (new, aux)), grads = jax.value_and_grad(loss.scalar, has_aux=True)(
      params, model_state, batch, key
    )
    bound = jax.tree_util.Partial(loss.value, model_state, batch, key)
    result = base.Estimate(
      value, trees.conjugate(grads), {'value_fn': bound}, aux
    )
    return result, loss.end(state, new)

  return base.GradientEstimator(loss.init, estimate)


@checks.domains(
  estimator=checks.ESTIMATOR,
  curvature=checks.Function('(params, batch) -> operator'),
)
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
  checks.enforce(with_curvature, locals())

  def estimate(params, state, batch):
    result, state = estimator.estimate(params, state, batch)
    operator = curvature(params, base.rows_of(batch))
    extras = result.extras | {'curvature': operator}
    return result._replace(extras=extras), state

  return base.GradientEstimator(estimator.init, estimate)


class FiniteInfo(NamedTuple):
  """Diagnostics of `estimate_if_finite`."""

  rejected: jax.Array  # shape (), bool, whether the last estimate was
  total_rejected: jax.Array  # shape (), int32


class EstimateIfFiniteState(NamedTuple):
  """State of `estimate_if_finite`."""

  estimator_state: Any
  info: FiniteInfo


def accept(
  ok: jax.Array, estimate: base.Estimate, new: Any, old: Any
) -> tuple[base.Estimate, Any]:
  """The estimate and the new state, or a zero gradient and the old state.

  A zero gradient, so that the optimizer stands still too; the value is reported
  as it is.

  Args:
    ok: bool scalar, whether the step is accepted.
    estimate: The estimate.
    new: The state after the step.
    old: The state before it.

  Returns:
    What to return from ``estimate``.
  """
  grads = jax.tree.map(lambda leaf: jnp.where(ok, leaf, 0), estimate.grads)
  return estimate._replace(grads=grads), trees.where(ok, new, old)


@checks.domains(estimator=checks.ESTIMATOR)
def estimate_if_finite(
  estimator: base.GradientEstimator,
) -> base.GradientEstimator:
  """Holds the state where an estimate is not finite; counts how often.

  The twin of `optax.apply_if_finite`: one bad batch leaves no trace. The
  gradient of a rejected estimate is zero, its value is reported as it is.

  Args:
    estimator: Any estimator; those of optlab's wings hold by themselves.

  Returns:
    A `GradientEstimator` with an `EstimateIfFiniteState`.

  Raises:
    TypeError: ``estimator`` is not a `GradientEstimator`.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> plain = optlab.value_and_grad(lambda x, batch: jnp.sum(x * batch))
    >>> estimator = optlab.estimators.estimate_if_finite(plain)
    >>> x = jnp.ones(2)
    >>> estimate, state = estimator.estimate(x, estimator.init(x), jnp.inf)
    >>> print(estimate.grads, state.info.total_rejected)
    [0. 0.] 1

  Notes:
    Cost: one pass over gradient and state.
  """
  checks.enforce(estimate_if_finite, locals())

  def init(params, *inner):
    return EstimateIfFiniteState(
      estimator.init(params, *inner),
      FiniteInfo(jnp.zeros((), bool), jnp.zeros((), jnp.int32)),
    )

  def estimate(params, state, batch):
    result, new = estimator.estimate(params, state.estimator_state, batch)
    ok = trees.is_finite(result.grads, new)
    result, new = accept(ok, result, new, state.estimator_state)
    total = state.info.total_rejected + (~ok).astype(jnp.int32)
    return result, EstimateIfFiniteState(new, FiniteInfo(~ok, total))

  return base.GradientEstimator(init, estimate)
