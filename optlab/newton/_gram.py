r"""The curvature of losses of linear predictions, by one matrix product."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab import checks
from optlab import trees
from optlab.newton import _operators
from optlab.newton import _sparse


@checks.domains(
  inputs=checks.Function('(*args) -> matrix'),
  loss=checks.Function('(outputs, *args) -> scalar'),
  l2=checks.NON_NEGATIVE,
)
def linear_gauss_newton(
  inputs: Callable[..., jax.Array],
  loss: Callable[..., jax.Array],
  l2: float | jax.Array = 0.0,
  sparse_dtype: Any = None,
) -> _operators.OperatorFactory:
  r"""The dense Hessian of a loss of linear predictions, row by row separable.

  .. math:: f(x) = \ell(A x) + \tfrac{\lambda}{2} |x|^2, \quad
    \nabla^2 f = \sum_i a_i a_i^\top \otimes W_i + \lambda I, \quad
    W_i = \partial^2 \ell / \partial u_i^2

  Choose it for logistic, Poisson or softmax regression with few columns: one
  weighted matrix product per step (per pair of classes), half the cost of
  ``dense(hessian(f))`` or less. The work is done in the dtype of the inputs (of
  the parameters, where they are integers), so
  that float32 inputs halve it again in an otherwise float64 solve, with the
  same iterations; what else ``loss`` takes is rounded to it too. Subsampled
  inputs (and targets) are as good.

  Args:
    inputs: ``(*args) -> A``, shape ``(m, d)``, an array or a `SparseMatrix`
      made with ``gram=True``.
    loss: ``(outputs, *args) -> scalar``, where ``outputs = A @ params``; a sum
      or mean over rows of terms that depend on one row each. Else the matrix
      is NaN.
    l2: The coefficient of a ridge term ``l2 / 2 * |params| ** 2``.
    sparse_dtype: The dtype of the work where the inputs are sparse; ``None`` is
      that of the parameters.

  Returns:
    An operator factory for ``params`` that are one array of shape ``(d,)`` or
    ``(d, classes)``; it makes `Dense` operators.

  Raises:
    TypeError: ``inputs`` or ``loss`` is not a function; ``inputs`` returns a
      scipy matrix (when the factory is called).
    ValueError: ``params`` is no vector or matrix, or ``inputs`` returns one of
      another shape (when the factory is called).

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> factory = optlab.linear_gauss_newton(
    ...     lambda batch: batch, lambda u, batch: jnp.sum(2 * u ** 2))
    >>> print(factory(jnp.zeros(2), jnp.array([[1.0, 2.0]])).matrix)
    [[ 4.  8.]
     [ 8. 16.]]
  """
  checks.enforce(linear_gauss_newton, locals())

  def curvature(params, *args):
    is_array = jax.tree_util.all_leaves([params])
    if not is_array or jnp.ndim(params) not in (1, 2):
      raise ValueError(
        'linear_gauss_newton needs params that are one array of shape (d,) or'
        f' (d, classes), got {jax.tree.structure(params)} with shapes'
        f' {[jnp.shape(leaf) for leaf in jax.tree.leaves(params)]}; for other'
        ' models use dense(gauss_newton(model, loss)).'
      )
    features = _features(inputs(*args), params)
    sparse = isinstance(features, _sparse.SparseMatrix)
    narrow = sparse_dtype if sparse else features.dtype
    outputs = features @ params.astype(narrow or params.dtype)
    rest = _no_wider(args, outputs.dtype)
    product = jax.linearize(jax.grad(lambda u: loss(u, *rest)), outputs)[1]
    if params.ndim == 1:
      weights = product(jnp.ones_like(outputs)).astype(outputs.dtype)
      weights = _separable(product, outputs, weights, jnp.multiply)
      gram = features.gram if sparse else functools.partial(_gram, features)
      matrix = gram(weights)
    else:
      classes = params.shape[1]
      # weights[a][:, b] is the entry (a, b) of the Hessian blocks W_i.
      weights = jax.vmap(
        lambda unit: product(jnp.broadcast_to(unit, outputs.shape))
      )(jnp.eye(classes, dtype=outputs.dtype))
      weights = _separable(
        product, outputs, weights, lambda w, u: jnp.einsum('aib,ia->ib', w, u)
      )
      row, col = np.tril_indices(classes)
      blocks = jax.lax.map(
        lambda pair: (
          (features * weights[pair[0], :, pair[1]][:, None]).T @ features
        ),
        (jnp.asarray(row), jnp.asarray(col)),
      )
      which = np.zeros((classes, classes), int)
      which[row, col] = which[col, row] = np.arange(len(row))
      matrix = blocks[which].transpose(2, 0, 3, 1)
    n = params.size
    matrix = matrix.reshape(n, n).astype(trees.accumulator_dtype(params))
    return _operators.Dense(matrix + l2 * jnp.eye(n, dtype=matrix.dtype))

  return curvature


def _features(features: Any, params: Any) -> Any:
  """The inputs as a matrix of floats, or sparse."""
  kind = type(features).__name__
  if hasattr(features, 'tocsr'):
    raise TypeError(
      f'inputs must return an array or a SparseMatrix, got {kind}; make it with'
      ' optlab.sparse_matrix(..., gram=True).'
    )
  own = isinstance(features, _sparse.SparseMatrix)
  sparse = own or hasattr(features, 'todense')  # Of jax.experimental too.
  if sparse and params.ndim != 1:
    raise ValueError(
      f'linear_gauss_newton takes a {kind} for params of shape (d,) only, got'
      f' shape {params.shape}.'
    )
  features = features if sparse else jnp.asarray(features)
  if len(features.shape) != 2 or features.shape[1] != params.shape[0]:
    raise ValueError(
      f'inputs must return a matrix of shape (m, {params.shape[0]}), as params'
      f' have shape {params.shape}; got {features.shape}.'
    )
  # In the dtype of counts or flags the parameters would be cut to integers.
  if not own and not jnp.issubdtype(features.dtype, jnp.inexact):
    features = features.astype(trees.accumulator_dtype(params))
  return features


def _no_wider(args: Any, dtype: Any) -> Any:
  """Arguments that leave the work of a loss in the dtype of its outputs."""

  def leaf(x):
    kind = getattr(x, 'dtype', None)
    if kind is None or not jnp.issubdtype(kind, jnp.floating):
      return x
    return x if jnp.promote_types(kind, dtype) == dtype else x.astype(dtype)

  return jax.tree.map(leaf, args)


def _separable(product, outputs, weights, blocks):
  """The weights, NaN where the loss couples one row with another."""
  probe = jnp.cos(jnp.arange(outputs.size, dtype=outputs.dtype) ** 2)
  probe = probe.reshape(outputs.shape)
  whole = product(probe)
  coupled = trees.norm(whole - blocks(weights, probe))
  info = jnp.finfo(outputs.dtype)
  rounding = jnp.sqrt(info.eps) * trees.norm(whole) + outputs.size * info.tiny
  return jnp.where(coupled <= rounding, weights, jnp.nan)


def _gram(features, weights):
  """``A^T diag(w) A``; symmetric to the last bit where ``w >= 0``."""
  root = features * jnp.sqrt(jnp.abs(weights))[:, None]
  return (root * jnp.sign(weights)[:, None]).T @ root
