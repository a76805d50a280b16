"""What a run has cost, in oracle calls."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base


class Counts(NamedTuple):
  """Oracle calls of a run of `minimize`, int32 scalars.

  Attributes:
    values: Values of the objective, with or without a gradient; what a
      curvature evaluates to be linearized is its own.
    gradients: Gradients.
    products: Operator-vector products that the transformation asked for, as far
      as its state says; those that form a matrix are the curvature's own.
    solves: Linear systems that it solved, as far as its state says.
  """

  values: jax.Array
  gradients: jax.Array
  products: jax.Array
  solves: jax.Array


def evaluated(counts: Counts, whether: jax.Array) -> Counts:
  """The counts with a value and gradient more, where there was one.

  Args:
    counts: Those before it.
    whether: Whether a point was evaluated outside of the transformation.

  Returns:
    The counts.
  """
  calls = jnp.asarray(whether, jnp.int32)
  return counts._replace(
    values=counts.values + calls, gradients=counts.gradients + calls
  )


def after(
  counts: Counts, before: base.OptState, state: base.OptState
) -> Counts:
  """The counts after what the transformation itself did in a step.

  Args:
    counts: Those before it.
    before: The transformation's state before the step.
    state: The state after it.

  Returns:
    The counts.
  """
  change = lambda name: _sum(state, name) - _sum(before, name)
  trials = change('total_trials') + _zoom(state)
  # Armijo's test compares values, and may evaluate the gradient at its end.
  values, gradients = _backtracking(state)
  return Counts(
    counts.values + trials + values,
    counts.gradients + trials + gradients,
    counts.products + change('total_products'),
    counts.solves + change('total_solves'),
  )


def _sum(state, name):
  """All integers in a state with this name."""
  found = [
    jnp.sum(leaf, dtype=jnp.int32)
    for path, leaf in jax.tree.leaves_with_path(state)
    if path[-1:] == (jax.tree_util.GetAttrKey(name),)
  ]
  return sum(found, start=jnp.zeros((), jnp.int32))


def _zoom(state):
  """Evaluations of optax's line search with gradients in the last step."""
  return _steps(_nodes(state, 'Zoom'))


def _backtracking(state):
  """Values and gradients of optax's line search by values in the last step."""
  nodes = _nodes(state, 'Backtracking')
  return _steps(nodes), sum(node.grad is not None for node in nodes)


def _steps(nodes):
  counts = [node.info.num_linesearch_steps for node in nodes]
  return sum(
    (jnp.sum(count, dtype=jnp.int32) for count in counts),
    start=jnp.zeros((), jnp.int32),
  )


def _nodes(state, kind):
  name = f'ScaleBy{kind}LinesearchState'
  is_search = lambda node: type(node).__name__ == name
  found: list[Any] = jax.tree.leaves(state, is_leaf=is_search)
  return [node for node in found if is_search(node)]
