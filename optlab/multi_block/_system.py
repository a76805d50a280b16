"""The linear system of the dual variable of a block, as the user wants it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees


class Problem(NamedTuple):
  """The objectives of a block, and how its dual system is to be taken."""

  upper: Callable[..., Any]  # returns (value, aux)
  lower: Callable[..., Any]
  num_blocks: int
  curvature: Any = None
  damping: Any = None

  def at_step(self, step: jax.Array) -> 'Problem':
    """The problem with the damping of a step."""
    if self.damping is None:
      return self
    return self._replace(damping=trees.at_step(self.damping, step))


SYSTEM = {
  'curvature': checks.Function(
    '(params, inner, batch) -> operator on inner', optional=True
  ),
  'damping': checks.NON_NEGATIVE._replace(schedule=True, optional=True),
}


def products(
  problem: Problem,
  params: base.Params,
  inner: base.ArrayTree,
  batch: Any,
  directions: base.ArrayTree,
  hessian: base.ArrayTree,
) -> base.ArrayTree:
  """What the matrices of all blocks make of their directions.

  Args:
    problem: The problem, with the damping of now.
    params: The upper variable.
    inner: The lower variables, leading axis ``sampled``.
    batch: The data of the lower objectives.
    directions: What is multiplied.
    hessian: The products with the lower Hessians.
  """
  product = hessian
  if problem.curvature is not None:
    multiply = lambda y, batch, v: problem.curvature(params, y, batch)(v)
    product = jax.vmap(multiply)(inner, batch, directions)
    checks.check_same_tree(
      'curvature(params, inner, batch)(inner)', product, 'inner', inner
    )
  if problem.damping is not None:
    product = jax.tree.map(
      lambda hv, v: hv + (problem.damping * v).astype(hv.dtype),
      product,
      directions,
    )
  return product


def matrix(
  problem: Problem,
  params: base.Params,
  inner: base.ArrayTree,
  batch: Any,
  hessian: Callable[[], jax.Array],
) -> jax.Array:
  """The matrix of one block."""
  if problem.curvature is None:
    result = hessian()
  else:
    flat, unravel = flatten_util.ravel_pytree(inner)
    operator = problem.curvature(params, inner, batch)
    column = lambda v: flatten_util.ravel_pytree(operator(unravel(v)))[0]
    result = jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))
  if problem.damping is not None:
    shift = jnp.asarray(problem.damping, result.dtype)
    result += shift * jnp.eye(result.shape[-1], dtype=result.dtype)
  return result
