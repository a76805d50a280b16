"""Steps of the lower level at a fixed upper variable."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import trees
from optlab.bilevel import _bilevel


def check_step_samples(batches: base.Batch, count: int, name: str) -> None:
  """Raises unless every leaf has a leading axis of ``count``."""
  for path, leaf in jax.tree.leaves_with_path(batches):
    shape = jnp.shape(leaf)
    if not shape or shape[0] != count:
      raise ValueError(
        f'batch.step_samples{jax.tree_util.keystr(path)} must have a leading'
        f' axis of {name} = {count}, got shape {shape}: stack one fresh sample'
        ' for each lower step.'
      )


def descend(
  lower: _bilevel.Objective,
  optimizer: optax.GradientTransformationExtraArgs,
  params: base.Params,
  inner: base.Params,
  opt_state: base.OptState,
  batches: base.Batch,
  *,
  steps: int,
  radius: Any = None,
  average: bool = False,
  checkpoint: bool = False,
) -> tuple[base.Params, base.OptState]:
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
  check_step_samples(batches, steps, 'lower_steps')

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
  lower: _bilevel.Objective,
  lower_steps: int,
  optimizer: optax.GradientTransformationExtraArgs,
  params: base.Params,
  state: Any,
  batch: _bilevel.BilevelBatch,
) -> tuple[base.Params, base.OptState]:
  """`descend` from the state's lower variable on the batch's step samples."""
  return descend(
    lower,
    optimizer,
    params,
    state.inner,
    state.lower_opt_state,
    batch.step_samples,
    steps=lower_steps,
  )
