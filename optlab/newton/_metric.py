"""The user's norm: a change of variables in which it is Euclidean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab.newton import _operators


class Space(NamedTuple):
  """Flat coordinates in which the metric ``B = L L^T`` is the identity."""

  dual: Callable[[Any], jax.Array]  # g -> L^-1 g
  lift: Callable[[Any, Any], jax.Array]  # x, y -> L^T (x - y)
  primal: Callable[[jax.Array], Any]  # z -> L^-T z
  operator: Callable[[base.Operator], base.Operator]  # H -> L^-1 H L^-T

  @classmethod
  def make(cls, metric, params, dtype):
    flat, unravel = ravel_pytree(params)
    is_vector = jax.tree_util.all_leaves([params]) and jnp.ndim(params) == 1
    matrix = _operators.matrix_of(metric)
    ravel = lambda tree: ravel_pytree(tree)[0].astype(dtype)
    back = lambda vector: unravel(vector.astype(flat.dtype))
    if metric is None:
      forward = backward = transposed = lambda x: x
    elif matrix is not None:
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

    def operator(a):
      matrix, factor = _operators.matrix_of(a), _operators.factor_of(a)
      if matrix is not None:
        return _operators.Dense(forward(forward(matrix.astype(dtype)).T))
      if factor is not None:
        return _operators.LowRank(forward(factor.astype(dtype).T).T)
      # A solver of the user's own finds the structure of the user's operator.
      if metric is None and is_vector and flat.dtype == dtype:
        return a
      return jax.tree_util.Partial(
        lambda v: forward(ravel(a(back(backward(v)))))
      )

    return cls(
      dual=lambda tree: forward(ravel(tree)),
      lift=lambda x, y: transposed(ravel(x) - ravel(y)),
      primal=lambda vector: back(backward(vector)),
      operator=operator,
    )
