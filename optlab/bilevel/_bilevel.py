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
from optlab import trees

Objective = Callable[[base.Params, base.Params, base.Batch], jax.Array]


class BilevelBatch(NamedTuple):
  """The samples of one bilevel step.

  Attributes:
    upper: Sample of the upper objective.
    lower: Sample of the lower objective for Hessian-vector and cross products
      (and for the lower step of `soba` and `saba`).
    inner: Fresh samples for the lower steps, stacked on a leading axis of
      ``lower_steps``; unused by `soba` and `saba`.
  """

  upper: base.Batch
  lower: base.Batch
  inner: base.Batch = ()


class BilevelState(NamedTuple):
  """State of a hypergradient estimator."""

  step: jax.Array  # shape (), int32, accepted estimates
  inner: base.Params  # the lower variable y
  dual: base.Params  # the linear-system variable z, float32 or wider
  lower_opt_state: optax.OptState
  lower_grad_norm: jax.Array  # shape (), norm of g_y at the last estimate
  linear_residual: jax.Array  # shape (), norm of g_yy z - f_y
  rejected: jax.Array  # shape (), int32, estimates that were not finite


def check_objectives(upper: Any, lower: Any) -> None:
  """Raises a ``TypeError`` unless both levels are functions."""
  checks.check_callable('upper', upper, '(x, y, batch) -> scalar')
  checks.check_callable('lower', lower, '(x, y, batch) -> scalar')


def at(value: base.ScalarOrSchedule, step: jax.Array) -> Any:
  """A number, or a schedule's value at a step."""
  return value(step) if callable(value) else value


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


def linear_step(
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


def check_inner(batches: base.Batch, count: int, name: str) -> None:
  """Raises unless every leaf has a leading axis of ``count``."""
  for path, leaf in jax.tree.leaves_with_path(batches):
    shape = jnp.shape(leaf)
    if not shape or shape[0] != count:
      raise ValueError(
        f'batch.inner{jax.tree_util.keystr(path)} must have a leading axis of'
        f' {name} = {count}, got shape {shape}: stack one fresh sample for'
        ' each lower step.'
      )


def descend(
  lower: Objective,
  optimizer: optax.GradientTransformationExtraArgs,
  params: base.Params,
  inner: base.Params,
  opt_state: optax.OptState,
  batches: base.Batch,
  *,
  steps: int,
  radius: Any = None,
  average: bool = False,
  checkpoint: bool = False,
) -> tuple[base.Params, optax.OptState]:
  """Lower steps at a fixed upper variable, one for each sample.

  Args:
    lower: The lower objective.
    optimizer: Of the lower variable; it gets ``value``, ``grad``, ``value_fn``.
    params: The upper variable x.
    inner: Where the lower variable y starts.
    opt_state: The optimizer's state.
    batches: Samples on a leading axis of ``steps``, or a tree without leaves.
    steps: How many steps.
    radius: Keeps each iterate in a ball around the start; ``None`` is none.
    average: Whether to return the mean of the iterates instead of the last.
    checkpoint: Whether a backward pass recomputes each step, so that it stores
      the lower variable and not the activations.

  Returns:
    The lower variable and the optimizer's state.
  """
  check_inner(batches, steps, 'lower_steps')

  def body(carry, batch):
    y, opt_state, mean, count = carry
    bound = jax.tree_util.Partial(
      lambda x, batch, y: lower(x, y, batch), params, batch
    )
    value, grad = jax.value_and_grad(bound)(y)
    updates, opt_state = optimizer.update(
      grad, opt_state, y, value=value, grad=grad, value_fn=bound
    )
    y = optax.apply_updates(y, updates)
    if radius is not None:
      y = trees.project(y, inner, radius)
    if average:
      mean = jax.tree.map(
        lambda m, leaf: m + (leaf.astype(m.dtype) - m) / (count + 1),
        mean,
        y,
      )
    return (y, opt_state, mean, count + 1), None

  mean = trees.zeros_accumulator(inner) if average else ()
  count = jnp.zeros((), jnp.float32)
  body = jax.checkpoint(body, prevent_cse=False) if checkpoint else body
  (last, opt_state, mean, _), _ = jax.lax.scan(
    body, (inner, opt_state, mean, count), batches, length=steps
  )
  if average:
    last = trees.cast_like(mean, trees.dtypes(inner))
  return last, opt_state


def lower_round(
  lower: Objective,
  lower_steps: int,
  optimizer: optax.GradientTransformationExtraArgs,
  params: base.Params,
  state: Any,
  batch: BilevelBatch,
) -> tuple[base.Params, optax.OptState]:
  """`descend` from the state's lower variable on the batch's inner samples."""
  return descend(
    lower,
    optimizer,
    params,
    state.inner,
    state.lower_opt_state,
    batch.inner,
    steps=lower_steps,
  )


def init_state(
  optimizer: optax.GradientTransformation,
  inner: base.Params,
) -> BilevelState:
  """The state before the first estimate, with ``z = 0``."""
  inner = trees.own(inner)
  dtype = trees.accumulator_dtype(inner)
  return BilevelState(
    step=jnp.zeros((), jnp.int32),
    inner=inner,
    dual=trees.zeros_accumulator(inner),
    lower_opt_state=optimizer.init(inner),
    lower_grad_norm=jnp.zeros((), dtype),
    linear_residual=jnp.zeros((), dtype),
    rejected=jnp.zeros((), jnp.int32),
  )


def accept(
  value: jax.Array,
  grads: base.Updates,
  old: Any,
  *others: base.Params,
  **fields: Any,
) -> tuple[base.Estimate, Any]:
  """Commits a step, or holds the state where it is not finite.

  A rejected step keeps the old state but for ``rejected``, which counts it; its
  gradient is zero and its value is reported as it is.

  Args:
    value: The upper objective.
    grads: The hypergradient.
    old: The state before the step, to hold.
    *others: What must be finite too, beside the hypergradient, y and z.
    **fields: What the step changes in the state, beside its count.

  Returns:
    The estimate and the state.
  """
  new = old._replace(step=old.step + 1, **fields)
  ok = trees.is_finite(grads, new.inner, getattr(new, 'dual', ()), others)
  grads = jax.tree.map(lambda leaf: jnp.where(ok, leaf, 0), grads)
  state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
  rejected = old.rejected + (~ok).astype(jnp.int32)
  return base.Estimate(value, grads), state._replace(rejected=rejected)


def linear_system_estimator(
  upper: Objective,
  lower: Objective,
  lower_optimizer: optax.GradientTransformation,
  solve: Callable[..., tuple[base.Params, base.Params, jax.Array]],
  move: Callable[..., tuple[base.Params, optax.OptState]] | None = None,
) -> base.GradientEstimator:
  """An estimator of ``f_x - g_xy z`` with a `BilevelState`.

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
  check_objectives(upper, lower)
  checks.check_transformation('lower_optimizer', lower_optimizer)
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
      linear_residual=residual,
    )

  return base.GradientEstimator(init, estimate)
