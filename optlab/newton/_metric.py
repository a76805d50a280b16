"""The user's norm: a change of variables in which it is Euclidean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.newton import _blocks
from optlab.newton import _operators


class Space(NamedTuple):
  """Coordinates in which the metric ``B = L L^T`` is the identity.

  They are trees like the parameters, in float32 or wider; only where a matrix
  is at hand, the metric's or the curvature's, one flat vector.
  """

  dual: Callable[[Any], Any]  # g -> L^-1 g
  lift: Callable[[Any, Any], Any]  # x, y -> L^T (x - y)
  primal: Callable[[Any], Any]  # z -> L^-T z
  operator: base.Operator  # L^-1 H L^-T

  @classmethod
  def make(cls, metric, curvature, params, dtype):
    shown = (
      _operators.matrix_of(metric),
      _operators.matrix_of(curvature),
      _operators.factor_of(curvature),
    )
    if any(part is not None for part in shown):
      return _flat(metric, curvature, params, dtype)
    return _tree(metric, curvature, params)


def _tree(metric, curvature, params):
  """Coordinates laid out like the parameters; a metric is their diagonal."""
  root = None
  if metric is None:
    divide = multiply = lambda tree: tree
  else:
    checks.check_same_tree('metric', metric, 'params', params)
    root = jax.tree.map(
      lambda leaf, param: jnp.sqrt(leaf).astype(param.dtype),
      trees.wide(metric),
      trees.wide(params),
    )
    divide = lambda tree: jax.tree.map(jnp.divide, tree, root)
    multiply = lambda tree: jax.tree.map(jnp.multiply, tree, root)
  back = lambda tree: trees.cast_like(divide(tree), params)
  is_wide = all(
    leaf.dtype == trees.accumulator_dtype(leaf)
    for leaf in map(jnp.asarray, jax.tree.leaves(params))
  )
  product = _operators.checked(curvature)
  operator = jax.tree_util.Partial(
    lambda v: divide(trees.wide(product(back(v))))
  )
  if isinstance(curvature, _blocks.Blocks):
    operator = curvature if root is None else curvature.between(root)
  elif metric is None and is_wide:
    # A solver of the user's own finds the structure of the user's operator.
    operator = curvature
  return Space(
    dual=lambda tree: divide(trees.wide(tree)),
    lift=lambda x, y: multiply(
      jax.tree.map(jnp.subtract, trees.wide(x), trees.wide(y))
    ),
    primal=back,
    operator=operator,
  )


def _flat(metric, curvature, params, dtype):
  """One vector, for matrices."""
  flat, unravel = _operators.flatten(params)
  matrix = _operators.matrix_of(metric)
  ravel = lambda tree: _operators.ravel(tree).astype(dtype)
  back = lambda vector: unravel(vector.astype(flat.dtype))
  if metric is None:
    forward = backward = transposed = lambda x: x
  elif matrix is not None:
    _operators.check_operator('metric', metric, flat.size)
    lower = jnp.linalg.cholesky(matrix.astype(dtype))
    triangular = jax.scipy.linalg.solve_triangular
    forward = lambda x: triangular(lower, x, lower=True)
    backward = lambda x: triangular(lower, x, lower=True, trans=1)
    transposed = lambda x: x @ lower
  else:
    checks.check_same_tree('metric', metric, 'params', params)
    root = jnp.sqrt(ravel(metric))
    scale = lambda x, by: x * by.reshape((-1,) + (1,) * (x.ndim - 1))
    forward = backward = lambda x: scale(x, 1.0 / root)
    transposed = lambda x: scale(x, root)
  matrix = _operators.matrix_of(curvature)
  factor = _operators.factor_of(curvature)
  if matrix is not None:
    operator = _operators.Dense(forward(forward(matrix.astype(dtype)).T))
  elif factor is not None:
    operator = _operators.LowRank(forward(factor.astype(dtype).T).T)
  else:
    product = _operators.checked(curvature)
    operator = jax.tree_util.Partial(
      lambda v: forward(ravel(product(back(backward(v)))))
    )
  return Space(
    dual=lambda tree: forward(ravel(tree)),
    lift=lambda x, y: transposed(ravel(x) - ravel(y)),
    primal=lambda vector: back(backward(vector)),
    operator=operator,
  )
