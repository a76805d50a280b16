"""What the bilevel estimators share: batches, one linearization, lower steps.

The problem is ``min_x f(x, y*(x))`` with ``y*(x) = argmin_y g(x, y)`` and ``g``
strongly convex in ``y``. The user writes ``upper(x, y, batch)`` for ``f`` and
``lower(x, y, batch)`` for ``g``; ``x`` and ``y`` are any pytrees. With the
*linear-system variable* ``z``, where ``g_yy z = f_y``, the hypergradient is
``f_x - g_xy z``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import estimators
from optlab import trees

Objective = Callable[[base.Params, base.Params, base.Batch], jax.Array]


class BilevelBatch(NamedTuple):
  """The samples of one bilevel step.

  Attributes:
    upper: Sample of the upper objective.
    lower: Sample of the lower objective for Hessian-vector and cross products
      (and for the lower step of `soba` and `saba`).
    step_samples: Fresh samples for the lower steps, stacked on a leading axis
      of ``lower_steps``; unused by `soba` and `saba`.
  """

  upper: base.Batch
  lower: base.Batch
  step_samples: base.Batch = ()


class BilevelInfo(NamedTuple):
  """Diagnostics of a hypergradient estimator; ``()`` is what it has not."""

  lower_grad_norm: Any  # shape (), norm of g_y at the last accepted estimate
  dual_residual: Any  # shape (), norm of g_yy z - f_y there
  rejected: jax.Array  # shape (), bool, whether the last was not finite
  total_rejected: jax.Array  # shape (), int32


class BilevelState(NamedTuple):
  """State of a hypergradient estimator."""

  step: jax.Array  # shape (), int32, accepted estimates
  inner: base.Params  # the lower variable y
  dual: base.Params  # the linear-system variable z, float32 or wider
  lower_opt_state: base.OptState
  memory: Any  # what the method alone keeps; () for most
  info: BilevelInfo


LEVELS = {
  'upper': checks.Function('(x, y, batch) -> scalar'),
  'lower': checks.Function('(x, y, batch) -> scalar'),
  'lower_optimizer': checks.TRANSFORMATION,
}
RATE = checks.POSITIVE._replace(schedule=True)
RADIUS = checks.POSITIVE._replace(
  optional=True, remedy='Pass None for no projection.'
)


def linearize(
  lower: Objective,
  params: base.Params,
  inner: base.Params,
  batch: base.Batch,
) -> tuple[base.Params, Callable[[base.Params], tuple[Any, Any]]]:
  """The lower gradient and, from one vjp of it, both second-order products.

  Args:
    lower: The lower objective.
    params: The upper variable x.
    inner: The lower variable y.
    batch: A sample of the lower objective.

  Returns:
    ``g_y`` and a function ``z -> (g_xy z, g_yy z)``.
  """
  gradient, vjp = jax.vjp(
    lambda x, y: jax.grad(lower, argnums=1)(x, y, batch), params, inner
  )
  return gradient, lambda dual: vjp(
    trees.cast_like(dual, trees.dtypes(gradient))
  )


def upper_value_and_grads(
  upper: Objective,
  params: base.Params,
  inner: base.Params,
  batch: base.Batch,
) -> tuple[jax.Array, base.Updates, base.Params]:
  """Returns ``f``, ``f_x`` and ``f_y``."""
  value, (grad_x, grad_y) = jax.value_and_grad(upper, argnums=(0, 1))(
    params, inner, batch
  )
  return value, grad_x, grad_y


def hypergradient(grad_x: base.Updates, cross: base.Updates) -> base.Updates:
  """Returns ``f_x - g_xy z``."""
  return trees.combine(jnp.subtract, grad_x, cross)


def dual_step(
  dual: base.Params,
  hessian_dual: base.Params,
  grad_y: base.Params,
  rate: Any,
) -> tuple[base.Params, jax.Array]:
  """One step on ``z' g_yy z / 2 - f_y' z``, and the norm of its gradient."""
  residual = jax.tree.map(
    lambda z, hz, fy: hz.astype(z.dtype) - fy.astype(z.dtype),
    dual,
    hessian_dual,
    grad_y,
  )
  dual = jax.tree.map(
    lambda z, r: (z - rate * r).astype(z.dtype), dual, residual
  )
  return dual, trees.norm(residual)


def check_batch(batch: Any) -> None:
  """Raises a ``TypeError`` unless ``batch`` is a `BilevelBatch`."""
  checks.check_fields('batch', batch, BilevelBatch._fields, 'a BilevelBatch')


def init_state(
  optimizer: optax.GradientTransformation,
  inner: base.Params,
  *,
  dual: bool = True,
  memory: Any = (),
) -> BilevelState:
  """The state before the first estimate, with ``z = 0`` if it has one."""
  inner = trees.own(inner)
  # Not one zero twice: a buffer can be donated once.
  zero = lambda: jnp.zeros((), trees.accumulator_dtype(inner))
  return BilevelState(
    step=jnp.zeros((), jnp.int32),
    inner=inner,
    dual=trees.zeros_accumulator(inner) if dual else (),
    lower_opt_state=optimizer.init(inner),
    memory=memory,
    info=BilevelInfo(
      lower_grad_norm=zero(),
      dual_residual=zero() if dual else (),
      rejected=jnp.zeros((), bool),
      total_rejected=jnp.zeros((), jnp.int32),
    ),
  )


def accept(
  value: jax.Array,
  grads: base.Updates,
  old: BilevelState,
  *others: base.Params,
  lower_grad_norm: Any = (),
  dual_residual: Any = (),
  **fields: Any,
) -> tuple[base.Estimate, BilevelState]:
  """Commits a step, or holds the state where it is not finite.

  A rejected step keeps the old state but for its count; its gradient is zero
  and its value is reported as it is.

  Args:
    value: The upper objective.
    grads: The hypergradient.
    old: The state before the step, to hold.
    *others: What must be finite too, beside the hypergradient, y and z.
    lower_grad_norm: For `BilevelInfo`.
    dual_residual: For `BilevelInfo`.
    **fields: What the step changes in the state, beside its count.

  Returns:
    The estimate and the state.
  """
  info = old.info._replace(
    lower_grad_norm=lower_grad_norm, dual_residual=dual_residual
  )
  new = old._replace(step=old.step + 1, info=info, **fields)
  ok = trees.is_finite(grads, new.inner, new.dual, others)
  estimate, state = estimators.accept(ok, base.Estimate(value, grads), new, old)
  info = state.info._replace(
    rejected=~ok,
    total_rejected=old.info.total_rejected + (~ok).astype(jnp.int32),
  )
  return estimate, state._replace(info=info)


def estimator(
  upper: Objective,
  lower: Objective,
  lower_optimizer: optax.GradientTransformation,
  solve: Callable[..., tuple[base.Params, base.Params, jax.Array]],
  move: Callable[..., tuple[base.Params, base.OptState]] | None = None,
) -> base.GradientEstimator:
  """An estimator of ``f_x - g_xy z``.

  Args:
    upper: The upper objective.
    lower: The lower objective.
    lower_optimizer: Of the lower variable.
    solve: ``(state, products, f_y) -> (z, g_xy z, residual)``: the next z, the
      cross product that the estimate takes, and the norm of ``g_yy z - f_y``.
    move: ``(optimizer, params, state, batch) -> (y, lower_opt_state)``, before
      the derivatives are taken; without it, y takes one step after them.

  Returns:
    A `GradientEstimator`; ``init(x, y)`` starts at ``z = 0``.
  """
  optimizer = optax.with_extra_args_support(lower_optimizer)

  def init(params, inner):
    del params
    return init_state(optimizer, inner)

  def estimate(params, state, batch):
    check_batch(batch)
    inner, lower_opt_state = state.inner, state.lower_opt_state
    if move is not None:
      inner, lower_opt_state = move(optimizer, params, state, batch)
    value, grad_x, grad_y = upper_value_and_grads(
      upper, params, inner, batch.upper
    )
    grad_lower, products = linearize(lower, params, inner, batch.lower)
    dual, cross, residual = solve(state, products, grad_y)
    if move is None:
      updates, lower_opt_state = optimizer.update(
        grad_lower, lower_opt_state, inner
      )
      inner = optax.apply_updates(inner, updates)
    return accept(
      value,
      hypergradient(grad_x, cross),
      state,
      grad_lower,
      inner=inner,
      dual=dual,
      lower_opt_state=lower_opt_state,
      lower_grad_norm=trees.norm(grad_lower),
      dual_residual=residual,
    )

  return base.GradientEstimator(init, estimate)
