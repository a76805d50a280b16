"""Loops and branches in a `jax.shard_map` whose devices hold other data.

There the type of an array says over which axes of the mesh it differs, and a
loop's carry, or the two sides of a branch, must say the same.
"""

from collections.abc import Callable
from typing import Any

import jax


def varies_over(array: Any) -> frozenset:
  """The axes of a `jax.shard_map` over which an array differs by type."""
  aval = getattr(array, 'aval', array)
  if hasattr(aval, 'manual_axis_type'):
    return frozenset(getattr(aval.manual_axis_type, 'varying', ()))
  return frozenset(getattr(aval, 'vma', ()) or ())


def axes_of(*trees: Any) -> frozenset:
  """All axes over which a leaf differs."""
  return frozenset().union(*map(varies_over, jax.tree.leaves(trees)))


def over(axes: frozenset, tree: Any) -> Any:
  """The tree, each leaf of which may differ over ``axes`` by type."""

  def leaf(x):
    lacking = axes - varies_over(x)
    return jax.lax.pcast(x, tuple(lacking), to='varying') if lacking else x

  return jax.tree.map(leaf, tree) if axes else tree


def like(tree: Any, other: Any) -> Any:
  """The tree, each leaf of which differs wherever that of ``other`` does."""
  return jax.tree.map(lambda x, y: over(varies_over(y), x), tree, other)


def as_value(fun: Callable[[Any], jax.Array], params: Any) -> Any:
  """The parameters, as different over devices as the value of ``fun``.

  Of parameters that are the same on all devices `jax.grad` is the sum over
  them, where each value is that of a device.

  Raises:
    ValueError: The parameters differ over axes over which the value does not.
  """
  if not is_manual():
    return params
  value = jax.eval_shape(fun, params)
  params = over(axes_of(value), params)
  check_same(value, params)
  return params


def check_same(value: Any, params: Any) -> None:
  """Raises unless a value differs over devices as its parameters do."""
  axes, own = axes_of(value), axes_of(params)
  if lacking := tuple(sorted(axes - own)):
    raise ValueError(
      f'in a shard_map the value differs over the mesh axes {lacking} and'
      ' params do not: their gradient is the sum over the devices. Give it'
      f" jax.lax.pcast(params, {lacking}, to='varying') for a run on each"
      ' device, or take the jax.lax.psum of the value for one of all.'
    )
  if lacking := tuple(sorted(own - axes)):
    raise ValueError(
      f'in a shard_map params differ over the mesh axes {lacking} and the value'
      ' does not: norms would be those of a part. Gather the parameters, or'
      ' split them outside of the shard_map, by their sharding.'
    )


def while_loop(
  unfinished: Callable[[Any], jax.Array], step: Callable[[Any], Any], start: Any
) -> Any:
  """`jax.lax.while_loop`, whose carry differs wherever a part of it does."""
  axes = _found(step, start)
  return jax.lax.while_loop(
    unfinished, lambda now: over(axes, step(now)), over(axes, start)
  )


def cond(
  whether: jax.Array, on_true: Callable, on_false: Callable, *operands: Any
) -> Any:
  """`jax.lax.cond`, whose result differs wherever that of one side does."""
  axes = _found(on_true, *operands) | _found(on_false, *operands)
  return jax.lax.cond(
    whether,
    lambda *args: over(axes, on_true(*args)),
    lambda *args: over(axes, on_false(*args)),
    *operands,
  )


def is_manual() -> bool:
  """Whether this is traced in a `jax.shard_map`."""
  return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _found(function, *operands):
  """The axes over which what a function returns, or takes, differs."""
  if not is_manual():
    return frozenset()
  axes, before = axes_of(operands), None
  while axes != before:  # What it returns it may be given next.
    before = axes
    like = over(axes, operands)
    axes |= axes_of(jax.eval_shape(function, *like))
  return axes
