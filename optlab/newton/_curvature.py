r"""Curvature: symmetric linear operators at a point, for Newton-type methods.

A factory such as ``hessian(fun)`` returns a function ``(params, *args) ->
operator``; ``args`` is usually the batch. An *operator* is a pytree that maps
``v`` to ``A v``. Products alone make it matrix-free; `Dense` operators carry
their ``matrix`` and `LowRank` operators their ``factor``, which the solvers of
`optlab.newton` look for.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab import checks
from optlab import trees
from optlab.newton import _operators
from optlab.newton import _sparse


@checks.domains(fun=checks.Function('(params, *args) -> scalar'))
def hessian(fun: Callable[..., jax.Array]) -> _operators.OperatorFactory:
  r"""The exact Hessian, matrix-free.

  .. math:: A v = \nabla^2 f(x)\, v

  The function is linearized once a point; a product then costs about two
  gradients and no second evaluation of ``fun``. Indefinite where ``fun`` is not
  convex.

  Args:
    fun: The objective, ``(params, *args) -> scalar``.

  Returns:
    An operator factory.

  Raises:
    TypeError: ``fun`` is not a function.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> operator = optlab.hessian(lambda x: jnp.sum(x ** 3))(jnp.arange(3.0))
    >>> print(operator(jnp.ones(3)))
    [ 0.  6. 12.]
  """
  checks.enforce(hessian, locals())

  def curvature(params, *args):
    grad = jax.grad(lambda params: fun(params, *args))
    return jax.linearize(grad, params)[1]

  return curvature


@checks.domains(
  model=checks.Function('(params, *args) -> outputs'),
  loss=checks.Function('(outputs, *args) -> scalar'),
)
def gauss_newton(
  model: Callable[..., base.ArrayTree], loss: Callable[..., jax.Array]
) -> _operators.OperatorFactory:
  r"""The generalized Gauss-Newton matrix, matrix-free.

  .. math:: A = J^\top \nabla^2 \ell(u)\, J, \quad u = m(x),\ J = m'(x)

  Choose it for ``loss(model(params))`` with a convex ``loss``: it is positive
  semidefinite where the Hessian need not be, and equal to it for a linear
  model. With ``loss = norm(u) ** p / p`` it is the matrix of Semenov et al. for
  nonlinear equations, :math:`|u|^{p-2} J^\top J + (p-2) |u|^{p-4} (J^\top u)
  (J^\top u)^\top`; with a cross-entropy it is the Fisher matrix.

  Args:
    model: ``(params, *args) -> outputs``, a pytree.
    loss: ``(outputs, *args) -> scalar``. To weight outputs by some ``w(u)``
      instead of the Hessian of a loss, give it ``0.5 * sum(stop_gradient(w(u))
      * u ** 2)``.

  Returns:
    An operator factory. A product costs one ``jvp`` and one ``vjp`` of the
    model and a Hessian-vector product of the loss.

  Raises:
    TypeError: ``model`` or ``loss`` is not a function.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> model = lambda x: jnp.stack([x[0] * x[1], x[1]])
    >>> factory = optlab.gauss_newton(model, lambda u: jnp.sum(u ** 2) / 2)
    >>> print(factory(jnp.array([1.0, 2.0]))(jnp.array([1.0, 0.0])))
    [4. 2.]
  """
  checks.enforce(gauss_newton, locals())

  def product(jvp, outer, vjp, vector):
    return vjp(outer(jvp(vector)))[0]

  def curvature(params, *args):
    checks.check_floating('params', params)
    outputs_fn = lambda params: model(params, *args)
    outputs, vjp = jax.vjp(outputs_fn, params)
    jvp = jax.linearize(outputs_fn, params)[1]
    outer = jax.linearize(jax.grad(lambda u: loss(u, *args)), outputs)[1]
    return jax.tree_util.Partial(product, jvp, outer, vjp)

  return curvature


@checks.domains(
  loss=checks.Function('(params, *example) -> scalar'),
  weights=checks.Function('(losses) -> weights', optional=True),
)
def empirical_fisher(
  loss: Callable[..., jax.Array],
  weights: Callable[[jax.Array], jax.Array] | None = None,
) -> _operators.OperatorFactory:
  r"""A weighted sum of outer products of per-example gradients, low rank.

  .. math:: A = \sum_{i=1}^m w_i\, \nabla \ell_i(x)\, \nabla \ell_i(x)^\top

  Choose it where gradients are all there is, with few examples ``m``: the
  factor takes ``m`` gradients of memory, and `woodbury` then solves in ``m``
  dimensions. With weights it covers more than its name says: the Fisher term
  of :math:`f = |u|^p / p` is ``weights=lambda f: (p - 2) / (p * f)`` on the
  objective itself (rank one), and the weighted Gauss-Newton matrix of
  log-sum-exp is ``weights=lambda s: softmax(s / mu) / mu`` on its terms.

  Args:
    loss: ``(params, *example) -> scalar``. The leaves of the ``args`` given to
      the factory have a leading axis over examples; without ``args`` there is
      one example.
    weights: Maps the losses, shape ``(m,)``, to non-negative weights; ``None``
      is the mean, ``1 / m``.

  Returns:
    An operator factory that makes `LowRank` operators of rank ``m``.

  Raises:
    TypeError: ``loss`` or ``weights`` is not a function.
    ValueError: The examples have no common leading axis.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> factory = optlab.empirical_fisher(lambda x, a: jnp.dot(a, x) ** 2 / 2)
    >>> print(factory(jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])).factor)
    [[0.70710677 0.        ]
     [0.         2.828427  ]]
  """
  checks.enforce(empirical_fisher, locals())

  def curvature(params, *args):
    value_and_row = lambda *args: _value_and_row(loss, params, *args)
    if jax.tree.leaves(args):
      losses, rows = jax.vmap(value_and_row)(*args)
    else:
      losses, rows = jax.tree.map(lambda x: x[None], value_and_row(*args))
    scale = 1.0 / losses.shape[0] if weights is None else weights(losses)
    scale = jnp.sqrt(jnp.broadcast_to(scale, losses.shape)).astype(rows.dtype)
    return _operators.LowRank(scale[:, None] * rows)

  return curvature


@checks.domains(log_probs=checks.Function('(params, *example) -> array'))
def fisher(log_probs: Callable[..., jax.Array]) -> _operators.OperatorFactory:
  r"""The Fisher matrix of a classifier, exact over its classes, low rank.

  .. math:: A = \frac1m \sum_{i=1}^m \sum_c p_{ic}\,
    \nabla \log p_{ic}(x)\, \nabla \log p_{ic}(x)^\top

  Unlike `empirical_fisher` it takes the expectation over the model's own labels
  and needs no targets. For a softmax it equals ``gauss_newton(model,
  cross_entropy)``, which is the matrix-free way for many examples.

  Args:
    log_probs: ``(params, *example) -> array`` of shape ``(classes,)``. The
      leaves of the ``args`` given to the factory have a leading axis over
      examples; without ``args`` there is one example.

  Returns:
    An operator factory that makes `LowRank` operators of rank ``m * classes``.

  Raises:
    TypeError: ``log_probs`` is not a function.
    ValueError: ``log_probs`` does not return one number a class.

  Examples:
    >>> import jax, jax.numpy as jnp, optlab
    >>> factory = optlab.fisher(lambda x, a: jax.nn.log_softmax(a * x))
    >>> operator = factory(jnp.zeros(2), jnp.ones((4, 2)))
    >>> print(operator(jnp.array([4.0, 0.0])).round(3))
    [ 1. -1.]
  """
  checks.enforce(fisher, locals())

  def curvature(params, *args):
    checks.check_floating('params', params)

    def rows(*example):
      logs, vjp = jax.vjp(lambda params: log_probs(params, *example), params)
      if jnp.ndim(logs) != 1:
        raise ValueError(
          'log_probs must return one number a class of one example, shape'
          f' (classes,), got shape {jnp.shape(logs)}.'
        )
      grads = jax.vmap(lambda e: _operators.ravel(vjp(e)[0]))(
        jnp.eye(logs.shape[0], dtype=logs.dtype)
      )
      return jnp.exp(logs / 2).astype(grads.dtype)[:, None] * grads

    if jax.tree.leaves(args):
      factor = jax.vmap(rows)(*args)
      factor = factor / np.sqrt(factor.shape[0]).astype(factor.dtype)
      return _operators.LowRank(factor.reshape(-1, factor.shape[-1]))
    return _operators.LowRank(rows())

  return curvature


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
  ``dense(hessian(f))`` or less. The work is done in the dtype of the inputs, so
  that float32 inputs halve it again in an otherwise float64 solve, with the
  same iterations; subsampled inputs (and targets) are as good.

  Args:
    inputs: ``(*args) -> A``, shape ``(m, d)``, an array or a `SparseMatrix`
      made with ``gram=True``.
    loss: ``(outputs, *args) -> scalar``, where ``outputs = A @ params``; a sum
      or mean over rows of terms that depend on one row each (not checked).
    l2: The coefficient of a ridge term ``l2 / 2 * |params| ** 2``.
    sparse_dtype: The dtype of the work where the inputs are sparse; ``None`` is
      that of the parameters.

  Returns:
    An operator factory for ``params`` that are one array of shape ``(d,)`` or
    ``(d, classes)``; it makes `Dense` operators.

  Raises:
    TypeError: ``inputs`` or ``loss`` is not a function.
    ValueError: ``params`` is no vector or matrix (when the factory is called).

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
    features: Any = inputs(*args)
    sparse = isinstance(features, _sparse.SparseMatrix)
    if sparse and params.ndim != 1:
      raise ValueError(
        'linear_gauss_newton takes a SparseMatrix for params of shape (d,)'
        f' only, got shape {params.shape}.'
      )
    narrow = sparse_dtype if sparse else features.dtype
    outputs = features @ params.astype(narrow or params.dtype)
    product = jax.linearize(jax.grad(lambda u: loss(u, *args)), outputs)[1]
    if params.ndim == 1:
      weights = product(jnp.ones_like(outputs)).astype(outputs.dtype)
      gram = features.gram if sparse else functools.partial(_gram, features)
      matrix = gram(weights)
    else:
      classes = params.shape[1]
      # weights[a][:, b] is the entry (a, b) of the Hessian blocks W_i.
      weights = jax.vmap(
        lambda unit: product(jnp.broadcast_to(unit, outputs.shape))
      )(jnp.eye(classes, dtype=outputs.dtype))
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


def _gram(features, weights):
  """``A^T diag(w) A``; symmetric to the last bit where ``w >= 0``."""
  root = features * jnp.sqrt(jnp.abs(weights))[:, None]
  return (root * jnp.sign(weights)[:, None]).T @ root


def _value_and_row(fun, params, *args):
  value, grad = jax.value_and_grad(fun)(params, *args)
  return value, _operators.ravel(grad)
