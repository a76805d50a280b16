"""Steps of the lower level at a fixed upper variable."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import trees
from optlab.bilevel import _problem


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


def sampler(problem: _problem.Problem, batch: Any, steps: int) -> Any:
  """Samples to scan over, and what makes a lower step's sample of one.

  Raises:
    ValueError: There are none, though the lower level has data.
  """
  samples = batch.step_samples
  if jax.tree.leaves(samples):
    check_step_samples(samples, steps, 'lower_steps')
    return samples, lambda sample: sample
  if jax.tree.leaves(batch.lower) and not problem.reuse_sample:
    raise ValueError(
      f'batch.step_samples has no data, but batch.lower has: stack {steps}'
      ' fresh samples for the lower steps, or declare reuse_sample=True to'
      ' take batch.lower for each.'
    )
  return None, lambda _: batch.lower


class Step(NamedTuple):
  """What a lower step leads to."""

  inner: base.Params
  opt_state: base.OptState
  found: Any = ()  # trees of bools: what is held, what moves; if it looks


def step(
  problem: _problem.Problem,
  params: base.Params,
  inner: base.Params,
  opt_state: base.OptState,
  batch: base.Batch,
  seen: tuple[jax.Array, base.Params] | None = None,
) -> Step:
  """One lower step.

  Args:
    problem: The levels, and the optimizer of the lower one.
    params: The upper variable x.
    inner: The lower variable y.
    opt_state: The optimizer's state.
    batch: A sample of the lower objective.
    seen: The lower value and gradient on it, where they are known.
  """
  if problem.optimizer is None:
    return Step(problem.lower_map(params, inner, batch), opt_state)
  bound = jax.tree_util.Partial(
    lambda x, batch, y: problem.lower(x, y, batch)[0], params, batch
  )
  value, grad = jax.value_and_grad(bound)(inner) if seen is None else seen
  grad = trees.cast_like(grad, inner)
  updates, opt_state = problem.optimizer.update(
    grad, opt_state, inner, value=value, grad=grad, value_fn=bound
  )
  found: Any = ()
  if problem.lower_map is None:
    nonzero = lambda tree: jax.tree.map(lambda leaf: leaf != 0, tree)
    moves = nonzero(updates)
    held = jax.tree.map(lambda u, g: ~u & g, moves, nonzero(grad))
    found = held, moves
  return Step(optax.apply_updates(inner, updates), opt_state, found)


def holds_some(found: Any, before: Any) -> jax.Array:
  """Whether the optimizer holds numbers that the gradient would move.

  While it moves others: then y is constrained, and the formulas for a free one
  are wrong.

  Args:
    found: How many numbers it holds, and how many it moves; or nothing.
    before: What the last step told.
  """
  if not found:
    return jnp.asarray(False)
  held, moved = found
  # Where nothing moves (a warm-up, steps that are gathered, the end) none of it
  # is news.
  return (held > 0) & (before | (moved > 0))


def _any(found):
  """One for each tree that is true somewhere, zero for others."""
  if not found:
    return ()
  met = [
    jnp.any(jnp.stack(leaves), tuple(range(1, 1 + leaves[0].ndim)))
    for leaves in zip(*map(jax.tree.leaves, found), strict=True)
  ]
  return tuple(jnp.any(jnp.stack(met), 0) * 1) if met else ()


def descend(
  problem: _problem.Problem,
  params: base.Params,
  inner: base.Params,
  opt_state: base.OptState,
  samples: base.Batch,
  *,
  steps: int,
  held: Any = False,
  of: Any = lambda sample: sample,
  radius: Any = None,
  average: bool = False,
  checkpoint: bool = False,
) -> tuple[base.Params, base.OptState, jax.Array]:
  """Lower steps at a fixed upper variable, one for each sample.

  Args:
    problem: The levels, and the optimizer of the lower one.
    params: The upper variable x.
    inner: Where the lower variable y starts.
    opt_state: The optimizer's state.
    samples: Samples on a leading axis of ``steps``, or a tree without leaves.
    steps: How many steps.
    held: What the step before told about constraints.
    of: Makes a step's sample of one of ``samples``.
    radius: Keeps each iterate in a ball around the start; ``None`` is none.
    average: Whether to return the mean of the iterates instead of the last.
    checkpoint: Whether a backward pass recomputes each step, so that it stores
      the lower variable and not the activations.

  Returns:
    The lower variable, the optimizer's state, and what the last step told
    about constraints.
  """

  def body(carry, sample):
    y, opt_state, held, mean, count = carry
    y, opt_state, found = step(problem, params, y, opt_state, of(sample))
    held = holds_some(_any(found), held)
    if radius is not None:
      y = trees.project(y, inner, radius)
    if average:
      mean = jax.tree.map(
        lambda m, leaf: m + (leaf.astype(m.dtype) - m) / (count + 1),
        mean,
        y,
      )
    return (y, opt_state, held, mean, count + 1), None

  mean = trees.zeros_accumulator(inner) if average else ()
  start = inner, opt_state, jnp.asarray(held), mean, jnp.zeros((), jnp.float32)
  body = jax.checkpoint(body, prevent_cse=False) if checkpoint else body
  (last, opt_state, held, mean, _), _ = jax.lax.scan(
    body, start, samples, length=steps
  )
  if average:
    last = trees.cast_like(mean, trees.dtypes(inner))
  return last, opt_state, held


def lower_round(
  problem: _problem.Problem,
  lower_steps: int,
  params: base.Params,
  state: Any,
  batch: Any,
  **options: Any,
) -> tuple[base.Params, base.OptState, jax.Array]:
  """`descend` from the state's lower variable on the batch's step samples."""
  samples, of = sampler(problem, batch, lower_steps)
  return descend(
    problem,
    params,
    state.inner,
    state.lower_opt_state,
    samples,
    steps=lower_steps,
    held=state.info.constrained,
    of=of,
    **options,
  )
