"""The two levels in one form, and the second-order products of the lower one.

Products are forward over reverse: one ``jax.jvp`` of ``(g_x, g_y)`` along y
gives the lower gradient, ``g_xy z`` and ``g_yy z`` in half the memory of a
reverse pass over the gradient, which is the way where a part of the objective
has a ``custom_vjp`` and so no forward derivative.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees

#: ``(x, y, batch) -> scalar``: an upper or a lower loss.
Objective = Callable[[base.Params, base.Params, base.Batch], Any]


class BilevelAux(NamedTuple):
  """Auxiliary output of both levels; ``()`` where there is none."""

  upper: Any
  lower: Any


class Level(NamedTuple):
  """A user's objective as ``(x, y, batch) -> (value, aux)``."""

  name: str
  fun: Objective
  has_aux: bool = False

  def __call__(self, params, inner, batch):
    out = self.fun(params, inner, batch)
    aux = ()
    if self.has_aux:
      if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
          f'{self.name} must return (scalar, aux), got {type(out).__name__}:'
          ' that is what has_aux=True declares, for both levels.'
        )
      out, aux = out
    elif isinstance(out, tuple):
      raise TypeError(
        f'{self.name} must return a scalar, got a tuple of {len(out)}: declare'
        ' has_aux=True, where the estimator has it, and return (scalar, aux)'
        ' from both levels; else leave the aux out.'
      )
    checks.check_scalar(self.name, out, 'Sum or average the losses.')
    return out, aux


class Problem(NamedTuple):
  """What is to be solved, and how the lower level is differentiated."""

  upper: Level
  lower: Callable[..., tuple[jax.Array, Any]]
  optimizer: Any  # of y; None where it moves by the map
  lower_map: Any = None
  curvature: Any = None
  damping: Any = None
  reuse_sample: bool = False


class Point(NamedTuple):
  """Where derivatives are taken."""

  params: base.Params
  inner: base.Params
  batch: base.Batch
  step: jax.Array


class Lower(NamedTuple):
  """What a look at the lower level gives beside its products."""

  value: jax.Array
  aux: Any
  grad: base.Params  # g_y, or y - T(x, y) of an optimality map


Products = Callable[[base.Params], tuple[base.Updates, base.Params]]


def upper_value_and_grads(
  problem: Problem,
  params: base.Params,
  inner: base.Params,
  batch: base.Batch,
) -> tuple[jax.Array, Any, base.Updates, base.Params]:
  """Returns ``f``, its auxiliary output, ``f_x`` and ``f_y``."""
  (value, aux), (grad_x, grad_y) = jax.value_and_grad(
    problem.upper, argnums=(0, 1), has_aux=True
  )(params, inner, batch)
  return value, aux, grad_x, grad_y


def multiply(
  problem: Problem, point: Point, dual: base.Params
) -> tuple[Lower, base.Updates, base.Params]:
  """One look at the lower level: its gradient, ``g_xy z`` and ``g_yy z``."""

  def forward():
    inner = _floating(point.inner)
    (_, grad), (cross, product), (value, aux) = jax.jvp(
      gradients(problem, point),
      (inner,),
      (trees.cast_like(dual, inner),),
      has_aux=True,
    )
    return Lower(value, aux, grad), cross, product

  def reverse():
    lower, products = _reverse(problem, point)
    return lower, *products(dual)

  lower, cross, product = _either(problem, forward, reverse)
  return lower, cross, _curved(problem, point, dual, product)


def linearize(problem: Problem, point: Point) -> tuple[Lower, Products]:
  """The same for many ``z``: the gradient, and ``z -> (g_xy z, g_yy z)``."""

  def forward():
    inner = _floating(point.inner)
    (_, grad), jvp, (value, aux) = jax.linearize(
      gradients(problem, point), inner, has_aux=True
    )
    return Lower(value, aux, grad), lambda z: jvp(trees.cast_like(z, inner))

  lower, products = _either(problem, forward, lambda: _reverse(problem, point))

  def apply(dual):
    cross, product = products(dual)
    return cross, _curved(problem, point, dual, product)

  return lower, apply


def _floating(tree):
  return jax.tree.map(jnp.asarray, tree)


def gradients(problem, point):
  """``y -> ((g_x, g_y), (g, aux))``."""

  def look(inner):
    (value, aux), grads = jax.value_and_grad(
      problem.lower, argnums=(0, 1), has_aux=True
    )(point.params, inner, point.batch)
    return grads, (value, aux)

  return look


def _either(problem, forward, reverse):
  """Forward over reverse, or reverse alone where it cannot be."""
  if problem.lower_map is not None:
    return reverse()
  try:
    return forward()
  except (TypeError, ValueError, NotImplementedError):
    # No forward derivative, or a fault of the user's, which is raised again.
    return reverse()


def _reverse(problem, point):
  """One vjp of the lower gradient, or of an optimality map's residual."""

  def gradient(params, inner):
    (value, aux), grad = jax.value_and_grad(
      problem.lower, argnums=1, has_aux=True
    )(params, inner, point.batch)
    return grad, (value, aux)

  def residual(params, inner):
    value, aux = problem.lower(params, inner, point.batch)
    mapped = problem.lower_map(params, inner, point.batch)
    checks.check_same_tree('lower_map(x, y, batch)', mapped, 'y', inner)
    return jax.tree.map(jnp.subtract, inner, mapped), (value, aux)

  function = gradient if problem.lower_map is None else residual
  grad, vjp, (value, aux) = jax.vjp(
    function, point.params, point.inner, has_aux=True
  )
  return Lower(value, aux, grad), lambda z: vjp(trees.cast_like(z, grad))


def _curved(problem, point, dual, product):
  """``g_yy z`` by the products that the user asked for."""
  if problem.curvature is not None:
    operator = problem.curvature(point.params, point.inner, point.batch)
    product = operator(trees.cast_like(dual, point.inner))
  if problem.damping is not None:
    damping = trees.at_step(problem.damping, point.step)
    product = jax.tree.map(
      lambda hz, z: hz.astype(z.dtype) + (damping * z).astype(z.dtype),
      product,
      dual,
    )
  return product
