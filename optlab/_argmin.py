"""The solution of a lower level as a function that can be differentiated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import _implicit
from optlab import _minimize
from optlab import _systems
from optlab import base
from optlab import checks
from optlab import trees


class ArgminResult(NamedTuple):
  """The solution of a lower level.

  Attributes:
    inner: The lower variable, differentiable in x and batch.
    residual: Scalar, the norm of ``g_y`` there, or of ``y - lower_map(x, y)``.
    steps: int32 scalar, the steps taken.
    ok: bool scalar, whether ``residual`` is at most ``grad_tol``.
  """

  inner: base.Params
  residual: jax.Array
  steps: jax.Array
  ok: jax.Array


@checks.domains(
  lower=checks.Function('(x, y, batch) -> scalar'),
  max_steps=checks.Integer(),
  grad_tol=checks.NON_NEGATIVE,
  rtol=checks.NON_NEGATIVE,
  cg_steps=checks.Integer(),
  lower_map=checks.Function('(x, y, batch) -> y', optional=True),
)
def argmin(
  lower: Callable[..., Any],
  tx: optax.GradientTransformation | None = None,
  *,
  max_steps: int = 1000,
  grad_tol: float | jax.Array = 1e-5,
  rtol: float | jax.Array = 1e-6,
  cg_steps: int = 1000,
  lower_map: Callable[..., base.Params] | None = None,
) -> Callable[..., ArgminResult]:
  r"""Makes ``y*(x)``, to be used inside a function under `jax.grad`.

  Choose it where the lower level is cheap enough to be solved at each step of
  x, or stands inside a larger model; else the estimators of `bilevel`, which
  keep y from step to step.

  .. math:: y^*(x) = \arg\min_y g(x, y), \quad
    \partial y^* = -g_{yy}^{-1}\, g_{yx}

  Args:
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    tx: Any optax optimizer for `minimize`; ``None`` is `optax.lbfgs`, or the
      iteration of ``lower_map`` where there is one.
    max_steps: The most steps of it.
    grad_tol: Where it stops: the norm of ``g_y``, or of ``y - lower_map(x,
      y)``.
    rtol: Relative tolerance of the linear system of the derivative.
    cg_steps: The most steps of conjugate gradients on it.
    lower_map: ``(x, y, batch) -> y`` whose fixed point y* is, where the lower
      level has constraints: see `proximal_map`.

  Returns:
    ``(x, y, batch=None) -> ArgminResult``, where ``y`` is the start. Forward
    and reverse derivatives, of any order, with respect to x and batch.

  Raises:
    TypeError: ``lower`` is not a function, a number of a wrong type, or ``tx``
      not an optax transformation.
    ValueError: A number is outside its domain.

  Examples:
    >>> import jax, jax.numpy as jnp, optlab
    >>> lower = lambda x, y, batch: jnp.sum((y - x) ** 2 * batch) + jnp.sum(y)
    >>> solve = optlab.argmin(lower)
    >>> def loss(x):
    ...   y = solve(x, jnp.zeros(2), jnp.array([1.0, 2.0])).inner
    ...   return jnp.sum(y ** 2)
    >>> x = jnp.array([1.0, 1.0])
    >>> print(f'{loss(x):.3f} {jax.grad(loss)(x)[1]:.3f}')
    0.812 1.500

  References:
    Blondel et al., `Efficient and Modular Implicit Differentiation
    <https://arxiv.org/abs/2105.15183>`_, NeurIPS 2022.

  Notes:
    The derivative is that of a solution: where ``ok`` is false it is wrong by
    about the distance to it. Where the residual is not finite, ``g_yy`` not
    positive definite, or the system with ``lower_map`` not solved, it is NaN.
    Cost of a derivative: two lower linearizations, up to ``cg_steps`` products,
    and as many as a system with another right side takes, which sees flat
    directions.
  """
  checks.enforce(argmin, locals())
  if tx is not None:
    checks.check_transformation('tx', tx)

  def solve(x, y, batch=None):
    checks.check_params('x', x)
    checks.check_real_params('y', y)

    def value(y):
      result = lower(x, y, batch)
      checks.check_scalar('lower', result, 'Sum or average the losses.')
      return result

    def residual(y):
      if lower_map is None:
        return jax.grad(value)(y)
      mapped = lower_map(x, y, batch)
      checks.check_same_tree('lower_map(x, y, batch)', mapped, 'y', y)
      return jax.tree.map(jnp.subtract, y, mapped)

    def find(_, y):
      if lower_map is None or tx is not None:
        result = _minimize.minimize(
          value, y, tx or optax.lbfgs(),
          max_steps=max_steps, grad_tol=grad_tol if lower_map is None else 0.0,
        )  # fmt: skip
        inner, steps = result.params, result.steps
      else:
        inner, steps = _iterate(residual, y, grad_tol, max_steps)
      # As a float: derivatives of integers are not zeros of their own dtype.
      return inner, steps.astype(jnp.float32)

    # A solution does not depend on the start.
    start = jax.lax.stop_gradient(trees.own(y))
    inner, steps = jax.lax.custom_root(
      residual, start, find, _tangent_solve(lower_map is None, rtol, cg_steps),
      has_aux=True,
    )  # fmt: skip
    size = trees.norm(residual(jax.lax.stop_gradient(inner)))
    sure = jnp.isfinite(size)
    if lower_map is None:
      sure &= _is_curved(lower, x, inner, batch)
    inner = _doubted(inner, sure, (x, batch))
    return ArgminResult(inner, size, steps.astype(jnp.int32), size <= grad_tol)

  return solve


@jax.custom_jvp
def _doubted(inner, sure, inputs):
  """The solution, whose derivative is NaN where it is not ``sure``.

  Where jax sees that the slope does not depend on the inputs (of ``|x - y|``,
  say), it leaves out the linear system, and its NaN.
  """
  del sure, inputs
  return inner


@_doubted.defjvp
def _doubted_jvp(primals, tangents):
  inner, sure, inputs = primals
  moves = jax.tree.leaves(tangents[2])
  moved = _implicit.doubted(tangents[0], sure, moves)
  return _doubted(inner, sure, inputs), moved


def _is_curved(lower, x, y, batch):
  """Whether the lower level is curved along all directions there."""
  x, y, batch = jax.lax.stop_gradient((x, y, batch))
  slope = lambda y: jax.grad(lower, argnums=1)(x, y, batch)
  return _implicit.is_definite(jax.linearize(slope, y)[1], y)


def _iterate(residual, y, tol, max_steps):
  """The fixed-point iteration until it moves by no more than ``tol``."""

  def body(carry):
    y, step, _ = carry
    change = residual(y)
    return (
      jax.tree.map(jnp.subtract, y, change),
      step + 1,
      trees.norm(change),
    )

  def going_on(carry):
    _, step, size = carry
    return (size > tol) & (step < max_steps)

  start = y, jnp.zeros((), jnp.int32), trees.norm(residual(y))
  y, step, _ = jax.lax.while_loop(going_on, body, start)
  return y, step


def _tangent_solve(symmetric, rtol, max_steps):
  """Solves the linear system of the derivative, forward and transposed."""

  def attempt(multiply, b):
    wide = trees.zeros_accumulator(b)
    product = lambda v: trees.cast_like(multiply(trees.cast_like(v, b)), wide)
    method = _systems.cg if symmetric else _systems.gmres
    x, ok = method(
      product, trees.cast_like(b, wide), None, rtol=rtol, max_steps=max_steps
    )
    # No derivative is better than a wrong one.
    x = jax.tree.map(lambda leaf: jnp.where(ok, leaf, jnp.nan), x)
    return trees.cast_like(x, b)

  def tangent_solve(multiply, b):
    return jax.lax.custom_linear_solve(
      multiply, _implicit.depends_on_all(b), attempt, attempt,
      symmetric=symmetric,
    )  # fmt: skip

  return tangent_solve
