"""What a transformation keeps of the point where it goes, and says."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optlab import _varying
from optlab import base
from optlab import trees

# Wrappers that hand on the update of what they wrap, or none at all.
_HAND_ON = {
  'InjectHyperparamsState': 'inner_state',
  'InjectStatefulHyperparamsState': 'inner_state',
  'MultiStepsState': 'inner_opt_state',
}


def evaluate(
  fun: Callable[[base.Params], jax.Array],
  params: base.Params,
  opt_state: base.OptState,
  anew: Any,
) -> tuple[jax.Array, base.Updates, jax.Array]:
  """Value and gradient, from the state where they are those of ``params``.

  Args:
    fun: The objective.
    params: The point.
    opt_state: The transformation's state there.
    anew: Whether it may be of another point or problem.

  Returns:
    Value, gradient, and whether they had to be evaluated.
  """
  kept = _kept(opt_state)
  again = lambda: trees.own(jax.value_and_grad(fun)(params))
  if kept is None:
    return *again(), jnp.asarray(True)
  like = jax.eval_shape(again)
  known = jnp.isfinite(kept.value) & ~jnp.asarray(anew)
  value, grad = _varying.cond(
    known,
    lambda: trees.cast_like((kept.value, kept.grad), like),
    again,
  )
  return value, grad, ~known


def _kept(opt_state):
  """The part of a state that keeps ``value`` and ``grad`` of the next point.

  Only if the update that belongs to it is the one that is applied: that of the
  last link of a chain, handed on by every wrapper around it.
  """
  kind = type(opt_state).__name__
  if kind in _HAND_ON:
    return _kept(getattr(opt_state, _HAND_ON[kind]))
  if type(opt_state) is tuple and opt_state:
    return _kept(opt_state[-1])
  grad = getattr(opt_state, 'grad', None)
  known = grad is not None and getattr(opt_state, 'value', None) is not None
  return opt_state if known else None


def says(opt_state: base.OptState, name: str) -> jax.Array:
  """Whether any transformation says so in its state."""
  found = [
    jnp.any(leaf)
    for path, leaf in jax.tree.leaves_with_path(opt_state)
    if leaf.dtype == bool and path[-1:] == (jax.tree_util.GetAttrKey(name),)
  ]
  return jnp.any(jnp.asarray(found)) if found else jnp.asarray(False)


def takes_extras(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Like `optax.with_extra_args_support`; `optax.MultiSteps` gets them too."""
  steps = getattr(tx.update, '__self__', None)
  if isinstance(steps, optax.MultiSteps):
    update: Any = steps.update
    return optax.GradientTransformationExtraArgs(steps.init, update)
  return optax.with_extra_args_support(tx)
