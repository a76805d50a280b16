"""Bounds on parameters: the box, and what an optimizer sees of it.

A transformation of optax knows no bounds. It is given the objective of the
point that the bounds leave, with the gradient of those coordinates alone that
may move: on the face of the box where the run stands, the problem has none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab import trees


class Box(NamedTuple):
  """Trees like the parameters; a leaf is a scalar or has the leaf's shape."""

  lower: base.ArrayTree
  upper: base.ArrayTree


def make(bounds: Any, params: base.Params) -> Box | None:
  """A box, from what a user gives.

  Args:
    bounds: ``(lower, upper)`` or ``None``; either may be ``None``, a number, or
      a tree like ``params``, whose leaves may be so too.
    params: The parameters.

  Returns:
    The box, in the dtypes of ``params``.

  Raises:
    TypeError: A bound is no number, or the parameters are complex.
    ValueError: A bound has another tree or shape, is NaN, or the lower one is
      above the upper one.
  """
  if bounds is None:
    return None
  if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
    raise ValueError(
      'bounds must be a pair (lower, upper) of trees like params, numbers or'
      f' None, got {bounds!r}.'
    )
  if any(map(jnp.iscomplexobj, jax.tree.leaves(params))):
    raise TypeError(
      'bounds need real params; give real and imaginary part as two leaves.'
    )
  lower = _ends('lower', bounds[0], params, -np.inf)
  upper = _ends('upper', bounds[1], params, np.inf)
  leaves = jax.tree.leaves_with_path(params)
  for (path, _), low, high in zip(leaves, lower, upper, strict=True):
    known = _is_known(low) and _is_known(high)
    if known and not np.all(np.asarray(low) <= np.asarray(high)):
      raise ValueError(
        'bounds must have lower <= upper, got'
        f' lower{jax.tree_util.keystr(path)} = {low} and upper = {high}.'
      )
  like = lambda ends: jax.tree.map(
    lambda leaf, end: jnp.asarray(end, jnp.result_type(leaf)),
    params,
    jax.tree.structure(params).unflatten(ends),
  )
  return Box(like(lower), like(upper))


def _is_known(x):
  return not isinstance(x, jax.core.Tracer)


def _ends(name, bound, params, absent):
  """The bounds of all leaves in a list, ``absent`` where there is none."""
  is_none = lambda x: x is None
  leaves = jax.tree.leaves_with_path(params)
  given, kind = jax.tree.flatten(bound, is_leaf=is_none)
  if jax.tree_util.treedef_is_leaf(kind) and np.ndim(given[0]) == 0:
    given = given * len(leaves)
  elif kind != jax.tree.structure(params):
    raise ValueError(
      f'the {name} end of bounds must be a tree like params, a number or None:'
      f' got {kind}, expected {jax.tree.structure(params)}.'
    )
  ends = [absent if end is None else end for end in given]
  for (path, leaf), end in zip(leaves, ends, strict=True):
    _check_end(f'{name}{jax.tree_util.keystr(path)}', end, leaf)
  return ends


def _check_end(where, end, leaf):
  dtype = getattr(end, 'dtype', None) or np.asarray(end).dtype
  if not any(jnp.issubdtype(dtype, kind) for kind in (np.floating, np.integer)):
    raise TypeError(f'bounds must be real numbers, got {where} = {end!r}.')
  if jnp.shape(end) not in ((), jnp.shape(leaf)):
    raise ValueError(
      f'bounds must be scalars or have the shapes of params: {where} has shape'
      f' {jnp.shape(end)}, the parameter {jnp.shape(leaf)}.'
    )
  if _is_known(end) and np.any(np.isnan(np.asarray(end, np.float64))):
    raise ValueError(f'bounds must not be NaN, got {where} = {end!r}.')


def inside(box: Box, params: base.Params) -> base.Params:
  """The nearest point in the box; NaN where it is empty."""
  # Which is known of tracers only when they run.
  return jax.tree.map(
    lambda x, low, high: jnp.where(
      low <= high, jnp.clip(x, low, high), jnp.nan
    ).astype(x.dtype),
    params,
    *box,
  )


def active(box: Box, params: base.Params, grad: base.Updates) -> Any:
  """Which coordinates a bound holds against the gradient.

  Args:
    box: The bounds.
    params: A point in the box.
    grad: The gradient there; what a bound holds may be zero.

  Returns:
    A tree of int8: -1 at the lower bound, 1 at the upper one, else 0.
  """

  def leaf(x, g, low, high):
    at_low = (x <= low) & ((g >= 0) | (low >= high))
    at_high = (x >= high) & (g <= 0)
    return jnp.where(at_low, -1, at_high.astype(jnp.int8)).astype(jnp.int8)

  return jax.tree.map(leaf, params, grad, *box)


def free(held: Any, tree: base.ArrayTree) -> Any:
  """A tree with zeros in place of what is active."""
  return jax.tree.map(lambda a, x: jnp.where(a == 0, x, 0), held, tree)


def carried(held: Any, lower: base.ArrayTree, upper: base.ArrayTree) -> Any:
  """What is active of two trees like a box's; zero where nothing is."""
  return jax.tree.map(
    lambda a, low, high: jnp.where(a < 0, low, jnp.where(a > 0, high, 0)),
    held,
    lower,
    upper,
  )


def is_strict(box: Box, held: Any, grad: base.Updates) -> jax.Array:
  """Whether the gradient presses on every active bound, beyond its own error.

  That is the norm of what no bound holds, which would be zero at a minimizer.
  """
  error = trees.norm(free(held, grad))
  weak = jax.tree.map(
    lambda a, g, low, high: jnp.any(
      (a != 0) & (low < high) & (jnp.abs(g) <= error)
    ),
    held,
    grad,
    *box,
  )
  return ~jnp.any(jnp.asarray(jax.tree.leaves(weak), bool))


def is_clear(
  box: Box, held: Any, params: base.Params, left: base.Params
) -> jax.Array:
  """Whether what is free stays away from its bounds, ``left`` further too."""

  def leaf(a, x, d, low, high):
    reach = 2 * jnp.abs(d) + 8 * jnp.finfo(x.dtype).eps * jnp.abs(x)
    return jnp.all((a != 0) | ((x - low > reach) & (high - x > reach)))

  clear = jax.tree.map(leaf, held, params, left, *box)
  return jnp.all(jnp.asarray(jax.tree.leaves(clear), bool))


def landing(box: Box, params: base.Params, held: Any) -> Callable[..., Any]:
  """Where a step ends: in the box, what is active as it was."""

  def land(point):
    stay = lambda a, old, new: jnp.where(a == 0, new, old)
    return inside(box, jax.tree.map(stay, held, params, point))

  return land


class Objective(NamedTuple):
  """An objective that shows where a step lands, for who tries steps itself."""

  fun: Callable[[base.Params], jax.Array]
  project: Callable[[base.Params], base.Params]

  def __call__(self, params: base.Params, curvature: Any = None) -> jax.Array:
    del curvature
    return self.fun(params)


def objective(
  fun: Callable[[base.Params], jax.Array],
  box: Box,
  land: Callable[[base.Params], base.Params],
) -> Objective:
  """The objective where a step lands, of the gradient that may move it.

  Args:
    fun: The objective.
    box: The bounds.
    land: See `landing`.

  Returns:
    A function like ``fun``. Its gradient is that of ``fun`` at the point where
    it lands, without what the bounds hold there: of what they release, it is
    not zero. Its Hessian is that of the face.
  """

  @jax.custom_jvp
  def bounded(point):
    return fun(land(point))

  @jax.custom_jvp
  def slope(point):
    landed = land(point)
    value, grad = jax.value_and_grad(fun)(landed)
    # In the dtypes of the gradient, for want of which shard_map has no tangent.
    held = trees.cast_like(active(box, landed, grad), grad)
    return value, free(held, grad), held

  @bounded.defjvp
  def bounded_rule(primals, tangents):
    value, grad, _ = slope(*primals)
    return value, _along(grad, tangents[0], value.dtype)

  @slope.defjvp
  def slope_rule(primals, tangents):
    value, grad, held = slope(*primals)
    move = free(held, tangents[0])
    bend = jax.jvp(jax.grad(fun), (land(*primals),), (move,))[1]
    none = jax.tree.map(jnp.zeros_like, held)
    out = _along(grad, tangents[0], value.dtype), free(held, bend), none
    return (value, grad, held), out

  return Objective(bounded, land)


def _along(grad, move, dtype):
  products = jax.tree.map(lambda g, d: jnp.sum(g * d).astype(dtype), grad, move)
  return sum(jax.tree.leaves(products), start=jnp.zeros((), dtype))


def restricted(operator: Any, held: Any) -> Any:
  """A curvature on the coordinates that are free.

  Args:
    operator: An operator; its ``matrix`` or ``factor`` is kept where it shows
      one.
    held: See `active`.

  Returns:
    An operator of the same kind, zero between what is free and what is not.
  """
  flat = ravel_pytree(held)[0] == 0
  matrix = getattr(operator, 'matrix', None)
  factor = getattr(operator, 'factor', None)
  if matrix is not None and hasattr(operator, '_replace'):
    return operator._replace(matrix=face(matrix, flat))
  if factor is not None and hasattr(operator, '_replace'):
    return operator._replace(factor=jnp.where(flat, factor, 0))
  return jax.tree_util.Partial(lambda v: free(held, operator(free(held, v))))


def face(matrix: jax.Array, free: jax.Array) -> jax.Array:
  """A matrix of the free coordinates; the others have a large diagonal."""
  size = jnp.max(jnp.where(free, jnp.abs(jnp.diagonal(matrix)), 0), initial=0.0)
  size = jnp.where(size > 0, size, 1)
  kept = jnp.where(free[:, None] & free, matrix, 0)
  return kept + jnp.diag(jnp.where(free, 0, size).astype(matrix.dtype))
