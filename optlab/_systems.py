"""Linear systems on pytrees, by products alone.

Conjugate gradients survive an operator which is not positive definite: where a
direction has no positive curvature they stop, as Steihaug's do, and return the
iterate of the smallest residual; a start that is worse than zero is not taken.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import trees


def magnitude(b: base.Params) -> jax.Array:
  """A power of two near the largest number of ``b``, or one if it is usual.

  To divide a system by it changes no digit of the solution.
  """
  top = trees.largest(b)
  _, exponent = jnp.frexp(top)
  unusual = (jnp.abs(exponent) > 30) & (top > 0) & jnp.isfinite(top)
  return jnp.ldexp(jnp.ones_like(top), jnp.where(unusual, exponent - 1, 0))


class _State(NamedTuple):
  x: base.Params
  residual: base.Params  # b - A x
  direction: base.Params
  sq_norm: jax.Array  # of the residual
  best: base.Params
  best_sq_norm: jax.Array
  steepest: jax.Array  # the largest curvature met
  convex: jax.Array  # shape (), bool
  steps: jax.Array


def cg(
  multiply: Callable[[base.Params], base.Params],
  b: base.Params,
  start: base.Params | None,
  *,
  rtol: Any,
  max_steps: int,
) -> tuple[base.Params, jax.Array]:
  """Solves ``A x = b`` to ``norm(A x - b) <= rtol * norm(b)``.

  Args:
    multiply: ``v -> A v``, in the dtypes of ``b``.
    b: The right-hand side, float32 or wider.
    start: Where to start if that is better than zero; ``None`` is zero.
    rtol: Relative tolerance.
    max_steps: The most steps.

  Returns:
    ``x``, and whether no direction of negative curvature was met.
  """
  dot = trees.inner_product
  target = rtol**2 * dot(b, b)
  zero = jax.tree.map(jnp.zeros_like, b)
  x, residual, cold = zero, b, jnp.asarray(True)
  if start is not None:
    there = jax.tree.map(jnp.subtract, b, multiply(start))
    better = dot(there, there) <= dot(b, b)
    x, residual = trees.where(better, (start, there), (zero, b))
    cold = ~better
  sq_norm = dot(residual, residual)
  eps = jnp.finfo(sq_norm.dtype).eps
  first = _State(
    x=x,
    residual=residual,
    direction=residual,
    sq_norm=sq_norm,
    best=x,
    best_sq_norm=sq_norm,
    steepest=jnp.zeros_like(sq_norm),
    convex=jnp.asarray(True),
    steps=jnp.zeros((), jnp.int32),
  )

  def going_on(s):
    return s.convex & (s.sq_norm > target) & (s.steps < max_steps)

  def body(s):
    product = multiply(s.direction)
    length = dot(s.direction, s.direction)
    curvature = dot(s.direction, product)
    steepest = jnp.maximum(s.steepest, jnp.abs(curvature) / length)
    convex = curvature > eps * steepest * length
    # From zero the first direction is b itself: a step along it, as long as
    # curvature of the other sign would make it, tells more than none.
    alone = ~convex & cold & (s.steps == 0)
    rate = s.sq_norm / jnp.where(convex, curvature, steepest * length)
    rate = jnp.where(convex | alone, rate, 0)
    move = lambda x, p: x + rate.astype(x.dtype) * p
    x = jax.tree.map(move, s.x, s.direction)
    residual = jax.tree.map(
      lambda r, p: r - rate.astype(r.dtype) * p, s.residual, product
    )
    sq_norm = dot(residual, residual)
    beta = sq_norm / s.sq_norm
    direction = jax.tree.map(
      lambda r, p: r + beta.astype(r.dtype) * p, residual, s.direction
    )
    better = (sq_norm < s.best_sq_norm) | alone
    best = trees.where(better, x, s.best)
    return _State(
      x, residual, direction, sq_norm, best,
      jnp.where(better, sq_norm, s.best_sq_norm), steepest, convex,
      s.steps + 1,
    )  # fmt: skip

  last = jax.lax.while_loop(going_on, body, first)
  return trees.where(last.convex, last.x, last.best), last.convex


def gmres(
  multiply: Callable[[base.Params], base.Params],
  b: base.Params,
  start: base.Params | None,
  *,
  rtol: Any,
  max_steps: int,
) -> tuple[base.Params, jax.Array]:
  """The same for an operator that is not symmetric.

  Returns:
    ``x``, and whether it is better than zero.
  """
  restart = min(max_steps, 20)
  x, _ = jax.scipy.sparse.linalg.gmres(
    multiply, b, x0=start, tol=rtol, restart=restart,
    maxiter=-(-max_steps // restart),
  )  # fmt: skip
  residual = jax.tree.map(jnp.subtract, b, multiply(x))
  ok = trees.norm(residual) <= trees.norm(b)  # Not so where it is NaN.
  zero = jax.tree.map(jnp.zeros_like, b)
  return trees.where(ok, x, zero), ok
