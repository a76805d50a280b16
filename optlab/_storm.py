"""Recursive momentum around any estimator."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import tracking
from optlab import trees


class WithStormState(NamedTuple):
  """State of `with_storm`."""

  estimator_state: Any
  tracker: base.Updates  # the tracked gradient d, float32 or wider
  previous_params: base.Params  # where the tracker was last updated
  previous_state: Any  # the estimator's state there, before its step
  started: jax.Array  # shape (), bool


@checks.domains(estimator=checks.ESTIMATOR, beta=checks.FRACTION)
def with_storm(
  estimator: base.GradientEstimator, beta: float | jax.Array
) -> base.GradientEstimator:
  r"""Recursive momentum on the gradients of an estimator.

  Choose it where the noise of single samples limits an estimator and a sample's
  gradient moves smoothly with the point. It replaces the optimizer's momentum.

  .. math:: d_t = G(x_t, s_t; \xi_t) + (1 - \beta)\,
    (d_{t-1} - G(x_{t-1}, s_{t-1}; \xi_t))

  where :math:`s` is the estimator's state (the lower variable and the
  linear-system variable of a bilevel one).

  Args:
    estimator: Makes the gradients G.
    beta: Weight of the fresh gradient, in (0, 1]; 1 is the estimator itself.

  Returns:
    A `GradientEstimator`; ``init`` takes what that of ``estimator`` takes.

  Raises:
    TypeError: ``estimator`` is not a `GradientEstimator`, or ``beta`` not a
      real number.
    ValueError: ``beta`` is outside (0, 1].

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> loss = lambda x, batch: jnp.sum((x - 1.0) ** 2 + batch * x)
    >>> plain = optlab.value_and_grad(loss)
    >>> estimator, tx = optlab.with_storm(plain, 0.1), optax.sgd(0.02)
    >>> state = optlab.init(jnp.zeros(1), estimator, tx)
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for noise in jax.random.normal(jax.random.key(0), (300,)):
    ...   state, _ = step(state, noise)
    >>> print(jnp.abs(state.params - 1.0) < 0.2)
    [ True]

  References:
    Cutkosky, Orabona, `Momentum-Based Variance Reduction in Non-Convex SGD
    <https://arxiv.org/abs/1905.10018>`_, NeurIPS 2019.

  Notes:
    Cost: twice that of ``estimator``; memory of one gradient, one more x and
    one more estimator state. An estimate that is zero or not finite (a
    rejected one) gives a zero gradient and leaves tracker and previous point
    alone.
  """
  checks.enforce(with_storm, locals())

  def init(params, *inner):
    checks.check_params('params', params)
    return WithStormState(
      estimator_state=estimator.init(params, *inner),
      tracker=trees.zeros_accumulator(params),
      previous_params=trees.own(params),
      previous_state=estimator.init(params, *inner),
      started=jnp.asarray(False),
    )

  def estimate(params, state, batch):
    now, estimator_state = estimator.estimate(
      params, state.estimator_state, batch
    )
    before, _ = estimator.estimate(
      state.previous_params, state.previous_state, batch
    )
    informative = (
      trees.is_finite(now.grads, before.grads)
      & (trees.largest(now.grads) > 0)
      & (~state.started | (trees.largest(before.grads) > 0))
    )

    moved = tracking.storm(state.tracker, now.grads, before.grads, beta)
    fresh = trees.cast_like(now.grads, moved)
    tracker = trees.where(
      informative, trees.where(state.started, moved, fresh), state.tracker
    )
    grads = jax.tree.map(
      lambda d, new: jnp.where(informative, d, 0).astype(new.dtype),
      tracker,
      now.grads,
    )
    previous_params, previous_state = jax.tree.map(
      lambda new, old: jnp.where(informative, new, old),
      (params, state.estimator_state),
      (state.previous_params, state.previous_state),
    )
    return now._replace(grads=grads), WithStormState(
      estimator_state=estimator_state,
      tracker=tracker,
      previous_params=previous_params,
      previous_state=previous_state,
      started=state.started | informative,
    )

  return base.GradientEstimator(init, estimate)
