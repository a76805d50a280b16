"""Conjugate gradients; `optlab.newton` compares the solvers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optlab import _varying
from optlab import base
from optlab import checks
from optlab import trees
from optlab.newton import _operators

# (operator, like) -> (operator, products)
Preconditioner = Callable[[base.Operator, base.ArrayTree], tuple[Any, Any]]


@checks.domains(
  max_steps=checks.Integer(1),
  rtol=checks.NON_NEGATIVE._replace(optional=True),
  power=checks.NON_NEGATIVE,
  preconditioner=checks.Function(
    '(operator, like) -> (operator, products) such as'
    ' optlab.newton.hutchinson(key) makes',
    optional=True,
  ),
)
def cg(
  max_steps: int = 100,
  rtol: float | jax.Array | None = None,
  power: float | jax.Array = 0.5,
  preconditioner: Preconditioner | None = None,
) -> base.Solver:
  r"""Conjugate gradients, anew for each shift.

  Stops where the residual is below :math:`\min(\text{rtol}, |b|^{\text{power}})
  |b|`, the forcing term of inexact Newton methods, which keeps superlinear
  convergence. Choose it over `lanczos` and `multishift_cg` with a
  preconditioner, or where memory is short and rejected trials are rare. ``ok``
  is false where a direction of non-positive curvature was met.

  Args:
    max_steps: The most products per shift; the iterate reached is returned.
    rtol: The largest relative residual; ``None`` is 0.1, and 0.01 for up to 20
      parameters, where the last products are few and save evaluations.
    power: The power of the norm in the forcing term; 0 leaves ``rtol`` alone.
    preconditioner: ``(operator, like) -> (near, products)``: makes an operator
      near ``A``, such as a `Diagonal`, whose ``inverse(shift)`` is a positive
      definite ``v -> (P + shift I)^-1 v``: `hutchinson`, `row_norms` or
      `leaf_blocks`. The residual that stops it stays that of the system.

  Returns:
    A solver.

  Raises:
    TypeError: ``max_steps`` is not an integer, or ``preconditioner`` not a
      function that returns what it says.
    ValueError: ``max_steps`` is below one, or ``rtol`` or ``power`` negative.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> solver = optlab.cg(rtol=1e-6)
    >>> solve = solver(lambda v: v * jnp.array([3.0, 15.0]), jnp.ones(2), 1.0)
    >>> print(solve(1.0)[0].round(4), solve(-4.0)[1])
    [0.25   0.0625] False
  """
  checks.enforce(cg, locals())

  def solver(operator, b, shift):
    del shift
    unit, norm, product = unit_and_product(operator, b)
    tolerance = forcing(norm, rtol, power, unit)
    near, products = None, 0
    if preconditioner is not None:
      near, products = _preconditioned(preconditioner, operator, b)

    def solve(shift):
      inverse = lambda v: v
      if near is not None:
        inverse = _operators.checked(near.inverse(shift))
      x, ok, k = iterate(product, unit, shift, tolerance, max_steps, inverse)
      return like(trees.scaled(norm, x), b), ok & trees.is_finite(x), k

    return base.Prepared(solve, jnp.asarray(products, jnp.int32))

  return solver


def iterate(product, b, shift, tolerance, max_steps, inverse=lambda v: v):
  """``(A + shift I) x = b`` from zero.

  Args:
    product: ``v -> A v``.
    b: The right-hand side.
    shift: Of the diagonal.
    tolerance: The norm of the residual to stop at.
    max_steps: The most products.
    inverse: The preconditioner, ``r -> z``.

  Returns:
    The solution reached, whether all curvatures met were positive, and the
    number of products.
  """

  def step(carry):
    x, residual, direction, square, _, _, k = carry
    image = trees.scale_add(shift, direction, product(direction))
    bend = trees.dot(direction, image)
    ok = bend > 0
    length = square / jnp.where(ok, bend, 1.0)
    x = trees.where(ok, trees.scale_add(length, direction, x), x)
    residual = trees.scale_add(-length, image, residual)
    z = inverse(residual)
    new_square = trees.dot(residual, z)
    # A preconditioner that is not positive definite, or not finite.
    ok &= new_square >= 0
    direction = trees.scale_add(new_square / square, direction, z)
    left = new_square if z is residual else trees.dot(residual, residual)
    return x, residual, direction, new_square, left, ok, k + 1

  def unfinished(carry):
    *_, left, ok, k = carry
    return ok & (jnp.sqrt(left) > tolerance) & (k < max_steps)

  z = inverse(b)
  square, left = trees.dot(b, z), trees.dot(b, b)
  start = (jax.tree.map(jnp.zeros_like, b), b, z, square, left)
  start += (square >= 0, jnp.zeros((), jnp.int32))
  x, *_, ok, k = _varying.while_loop(unfinished, step, start)
  return x, ok, k


def forcing(norm, rtol, power, b):
  """The residual to stop at, of a right-hand side of norm one.

  On CUTEst problems a relative residual of 0.1 takes 1.07 times the evaluations
  of exact solves, 0.01 as many, and no more products; on regressions 0.1 takes
  the fewest.
  """
  if rtol is None:
    few = sum(leaf.size for leaf in jax.tree.leaves(b)) <= 20
    rtol = 0.01 if few else 0.1
  tiny = 10 * jnp.finfo(norm.dtype).eps
  return jnp.maximum(jnp.minimum(rtol, norm**power), tiny).astype(norm.dtype)


def unit_and_product(operator, b):
  """``b / |b|`` in float32 or wider, ``|b|``, and the products with such."""
  vector, norm, product = prepare(operator, b)
  unit = trees.divided(vector, jnp.where(norm > 0, norm, 1.0))
  return unit, norm, product


def prepare(operator, b):
  """``b`` in float32 or wider, ``|b|``, and the products with such."""
  _operators.check_system(operator, b)
  vector, of = trees.wide(b), _operators.checked(operator)
  product = lambda v: trees.wide(of(like(v, b)))
  return vector, trees.norm(vector), product


def like(vector, b):
  """In the dtypes of the right-hand side."""
  return trees.cast_like(vector, jax.tree.map(jnp.asarray, b))


def _preconditioned(preconditioner, operator, b):
  """What a preconditioner makes of an operator."""
  made = preconditioner(operator, b)
  if not (
    isinstance(made, tuple)
    and len(made) == 2
    and callable(getattr(made[0], 'inverse', None))
  ):
    raise TypeError(
      'preconditioner must return (operator, products), where the operator has'
      f' inverse(shift), such as optlab.newton.hutchinson(key) makes; got'
      f' {made!r}.'
    )
  return made
