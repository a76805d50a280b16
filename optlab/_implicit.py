"""Derivatives of a minimizer by the implicit function theorem."""

from collections.abc import Callable
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from optlab import _box
from optlab import _varying
from optlab import base
from optlab import trees

DENSE = 256  # The most parameters whose Hessian is formed.


def run_constant(
  function: Callable[[base.Params], Any], params: base.Params
) -> Any:
  """Calls a function on what it is given and what it closes over, as constants.

  Nothing inside is differentiated, forward or backward.
  """
  closed, constants = jax.closure_convert(function, params)
  return closed(*jax.lax.stop_gradient((params, *constants)))


def minimizer(
  fun: Callable[[base.Params], jax.Array],
  params: base.Params,
  value: jax.Array,
  ok: jax.Array,
  start: base.Params,
  box: _box.Box | None = None,
  active: Any = (),
) -> tuple[base.Params, jax.Array]:
  r"""A minimizer and its value, with their derivatives.

  With respect to whatever ``fun`` closes over, and the bounds,

  .. math:: \dot x = -(\nabla^2 f)^{-1}\, \partial_\theta \nabla f\,
    \dot \theta, \quad \dot f = \partial_\theta f\, \dot \theta +
    \langle \nabla f, \dot x \rangle

  With bounds the system is that of the free coordinates; an active one moves as
  its bound does.

  Args:
    fun: The objective.
    params: Where it is least, a constant.
    value: The objective there, a constant.
    ok: Whether the run found it to be a minimizer. If not, it is one where the
      Newton step that is left is short beside the way from the start.
    start: Where the run began, a constant.
    box: The bounds, if any.
    active: Which of them hold ``params``.

  Returns:
    ``params`` and ``value``. The derivatives are NaN unless ``params`` is a
    minimizer and the Hessian is positive definite as far as the solver sees,
    and where the gradient does not say that an active bound holds, or a free
    coordinate is at its bound but for that Newton step: on one side of there it
    would leave or meet it.
  """
  closed, constants = jax.closure_convert(fun, params)
  if not constants and box is None:
    return params, value

  @jax.custom_jvp
  def attach(params, value, constants, box, active, ok, start):
    del constants, box, active, ok, start
    return params, value

  @attach.defjvp
  def rule(primals, tangents):
    constants, box, active, ok, start = primals[2:]
    moves, box_moves = tangents[2:4]
    # Its own derivative: that of the minimizer, where it is differentiated.
    params, value = attach(*primals)
    grad = lambda params, constants: jax.grad(closed)(params, *constants)
    shift = jax.jvp(lambda c: grad(params, c), (constants,), (moves,))[1]
    slope, product = jax.linearize(lambda p: grad(p, constants), params)
    inner, is_free = product, None
    sure = _is_near(closed, params, constants, box, active, ok, start)
    known: Any = None
    carried: Any = None
    if box is not None:
      sure &= _box.is_strict(box, active, slope)
      # Where an active coordinate may leave its bound, nothing is known of it:
      # NaN before and behind the system, which leaves it out, in both modes.
      known = lambda tree: trees.scaled(jnp.where(sure, 1.0, jnp.nan), tree)
      carried = _box.carried(active, *box_moves)
      shift = jax.tree.map(jnp.add, known(shift), product(carried))
      shift = _box.free(active, shift)
      inner, is_free = _of_face(product, active)
    shift = depends_on_all(shift)
    step = jax.lax.custom_linear_solve(
      inner, shift, lambda _, b: _solve(inner, b, sure, is_free), symmetric=True
    )
    step = jax.tree.map(jnp.negative, step)
    if box is not None:
      step = known(jax.tree.map(jnp.add, step, carried))
    # A slope that jax sees not to depend on them (of ``|x - c|``) would leave
    # out the system, and its NaN, on the way back.
    step = doubted(step, sure, moves)
    change = jax.jvp(closed, (params, *constants), (step, *moves))[1]
    return (params, value), (step, change.astype(value.dtype))

  return attach(params, value, constants, box, active, ok, start)


def depends_on_all(tree: base.ArrayTree) -> base.ArrayTree:
  """The tree, where every leaf depends on all others, by nothing.

  JAX transposes a solve only where all of its right side depends on what is
  asked for.
  """
  nothing = sum(0 * jnp.sum(leaf) for leaf in jax.tree.leaves(tree))
  return jax.tree.map(
    lambda leaf: leaf + jnp.asarray(nothing, leaf.dtype), tree
  )


def _is_near(fun, params, constants, box, active, ok, start):
  """Whether a point may be taken for the minimizer that the run looked for."""
  params, constants, box, start = jax.lax.stop_gradient(
    (params, constants, box, start)
  )
  slope, product = jax.linearize(
    lambda params: jax.grad(fun)(params, *constants), params
  )
  inner, is_free = product, None
  if box is not None:
    slope = _box.free(active, slope)
    inner, is_free = _of_face(product, active)
  left = _solve(inner, slope, jnp.asarray(True), is_free)
  far = trees.norm(jax.tree.map(jnp.subtract, params, start))
  eps = jnp.finfo(trees.accumulator_dtype(params)).eps
  near = trees.norm(left) <= jnp.cbrt(eps) * far + 8 * eps * trees.norm(params)
  near |= ok
  near &= trees.is_finite(left)
  if _size(params) > DENSE:
    near &= is_definite(inner, params, is_free)
  if box is not None:
    near &= _box.is_clear(box, active, params, left)
  return near


def _of_face(product, active):
  """A product on the free coordinates, the others as they are; which are so."""

  def inner(v):
    return jax.tree.map(
      lambda a, bent, old: jnp.where(a == 0, bent, old),
      active, product(_box.free(active, v)), v,
    )  # fmt: skip

  return inner, ravel_pytree(active)[0] == 0


def _solve(product, b, ok, is_free):
  """``H x = b`` for a positive definite operator; NaN where it is not."""
  product, like, b = _wide(product, b), b, trees.wide(b)
  if _size(b) > DENSE:
    x, found, definite = conjugate_gradient(product, b)
    ok &= found & definite
  else:
    flat, unravel = ravel_pytree(b)
    columns = lambda unit: ravel_pytree(
      product(_varying.like(unravel(unit), b))
    )[0]
    matrix = jax.vmap(columns)(jnp.eye(flat.size, dtype=flat.dtype))
    if is_free is not None:
      matrix = _box.face(matrix, is_free)
    # In units of its own: what is badly scaled is not singular. The pivots of
    # a factorization without exchanges would not tell.
    scale = jnp.sqrt(jnp.abs(jnp.diagonal(matrix)))
    scale = jnp.where(scale > 0, scale, 1)
    values, vectors = jnp.linalg.eigh(matrix / scale / scale[:, None])
    largest = jnp.max(jnp.abs(values), initial=0.0)
    floor = (8 + flat.size) * jnp.finfo(values.dtype).eps * largest
    ok &= jnp.all(values > floor)
    x = unravel(vectors @ ((flat / scale) @ vectors / values) / scale)
  x = jax.tree.map(lambda leaf: jnp.where(ok, leaf, jnp.nan), x)
  return trees.cast_like(x, like)


def is_definite(
  product: base.Operator, like: base.ArrayTree, is_free: Any = None
) -> jax.Array:
  """Whether a vector of all directions is reached: none is flat or downhill.

  The right side of a derivative may have no part in such a direction.
  """
  product = _wide(product, like)
  flat, unravel = ravel_pytree(trees.wide(like))
  probe = jnp.cos(jnp.arange(flat.size, dtype=flat.dtype) ** 2)
  probe = unravel(probe if is_free is None else jnp.where(is_free, probe, 0))
  probe = _varying.like(probe, like)
  # A single flat direction holds about 1 / sqrt(n) of it.
  rtol = 1e-3 / flat.size**0.5
  _, found, definite = conjugate_gradient(product, probe, rtol=rtol)
  return found & definite


def _wide(product, like):
  """Products with vectors of float32 or wider."""
  return lambda v: trees.wide(product(trees.cast_like(v, like)))


def doubted(step: base.ArrayTree, sure: jax.Array, moves: Any) -> Any:
  """A tangent that is NaN where it is not ``sure``, in reverse mode too."""
  # Tangents of Python's numbers are Python's numbers, without a dtype.
  float0 = jax.dtypes.float0
  real = [x for x in moves if getattr(x, 'dtype', None) != float0]
  total = sum((jnp.sum(jnp.real(x)) for x in real), start=jnp.zeros(()))
  doubt = jnp.where(sure, 0.0, jnp.nan) * total
  return jax.tree.map(lambda x: x + doubt.astype(x.dtype), step)


def _size(tree):
  return sum(map(jnp.size, jax.tree.leaves(tree)))


def conjugate_gradient(
  product: base.Operator,
  b: base.ArrayTree,
  max_steps: int = 1000,
  rtol: float | None = None,
) -> tuple[base.ArrayTree, jax.Array, jax.Array]:
  """Solves a positive definite system on trees, to near the last digit.

  Args:
    product: The operator.
    b: The right side, a tree.
    max_steps: The most products.
    rtol: The relative residual to stop at; ``None`` is near the last digit.

  Returns:
    The solution, whether its residual is small, and whether all directions met
    are of positive curvature.
  """
  dot = lambda x, y: sum(
    jax.tree.leaves(jax.tree.map(jnp.vdot, x, y)), start=jnp.zeros(())
  )
  add = lambda x, by, y: jax.tree.map(
    lambda a, c: a + by.astype(a.dtype) * c, x, y
  )
  dtype = trees.accumulator_dtype(b)
  tol = jnp.finfo(dtype).eps ** 0.75 if rtol is None else rtol
  slack = 100 if rtol is None else 1

  def step(carry):
    x, residual, direction, square, ok, k = carry
    image = product(direction)
    bend = dot(direction, image)
    ok &= bend > 0
    length = square / jnp.where(ok, bend, 1.0)
    x = add(x, jnp.where(ok, length, 0.0), direction)
    residual = add(residual, -length, image)
    fresh = dot(residual, residual)
    direction = add(residual, fresh / square, direction)
    return x, residual, direction, fresh, ok, k + 1

  def unfinished(carry):
    *_, square, ok, k = carry
    return ok & (square > (tol * norm) ** 2) & (k < max_steps)

  norm = trees.norm(b)
  zero = jax.tree.map(jnp.zeros_like, b)
  start = (zero, b, b, dot(b, b), jnp.asarray(True), jnp.zeros((), jnp.int32))
  x, *_, square, ok, _ = _varying.while_loop(unfinished, step, start)
  return x, square <= (slack * tol * norm) ** 2, ok
