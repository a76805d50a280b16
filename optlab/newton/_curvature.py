r"""Curvature: symmetric linear operators at a point, for Newton-type methods.

A factory such as ``hessian(fun)`` returns a function ``(params, *args) ->
operator``; ``args`` is usually the batch. An *operator* is a pytree that maps
``v`` to ``A v``. Products alone make it matrix-free; `Dense` operators carry
their ``matrix`` and `LowRank` operators their ``factor``, which the solvers of
`optlab.newton` look for.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab import checks
from optlab.newton import _operators


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
    checks.check_floating('params', params)
    grad = jax.grad(lambda params: _scalar('fun', fun(params, *args)))
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
    checks.check_floating('model(params)', outputs)
    jvp = jax.linearize(outputs_fn, params)[1]
    slope = jax.grad(lambda u: _scalar('loss', loss(u, *args)))
    outer = jax.linearize(slope, outputs)[1]
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
    ValueError: The examples have no common leading axis, or ``weights`` returns
      another number of them.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> factory = optlab.empirical_fisher(lambda x, a: jnp.dot(a, x) ** 2 / 2)
    >>> print(factory(jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])).factor)
    [[0.70710677 0.        ]
     [0.         2.828427  ]]
  """
  checks.enforce(empirical_fisher, locals())

  def curvature(params, *args):
    checks.check_floating('params', params)
    value_and_row = lambda *args: _value_and_row(loss, params, *args)
    if _examples(args):
      losses, rows = jax.vmap(value_and_row)(*args)
    else:
      losses, rows = jax.tree.map(lambda x: x[None], value_and_row(*args))
    scale = 1.0 / losses.shape[0] if weights is None else weights(losses)
    if jnp.shape(scale) not in ((), losses.shape):
      raise ValueError(
        'weights must return one number an example, shape'
        f' {losses.shape}, got shape {jnp.shape(scale)}.'
      )
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
    An operator factory that makes `LowRank` operators of rank ``m * classes``,
    NaN where the probabilities of an example do not sum to one.

  Raises:
    TypeError: ``log_probs`` is not a function.
    ValueError: ``log_probs`` does not return one number a class, or the
      examples have no common leading axis.

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
      if jnp.ndim(logs) != 1 or len(logs) < 2:
        raise ValueError(
          'log_probs must return one number a class of one example, shape'
          f' (classes,) for two or more, got shape {jnp.shape(logs)}.'
        )
      grads = jax.vmap(lambda e: _operators.ravel(vjp(e)[0]))(
        jnp.eye(logs.shape[0], dtype=logs.dtype)
      )
      # Of what is no distribution the sum is no Fisher matrix.
      left = jnp.abs(jnp.sum(jnp.exp(logs)) - 1)
      known = left <= 4 * jnp.sqrt(jnp.finfo(logs.dtype).eps)
      roots = jnp.where(known, jnp.exp(logs / 2), jnp.nan)
      return roots.astype(grads.dtype)[:, None] * grads

    if _examples(args):
      factor = jax.vmap(rows)(*args)
      factor = factor / np.sqrt(factor.shape[0]).astype(factor.dtype)
      return _operators.LowRank(factor.reshape(-1, factor.shape[-1]))
    return _operators.LowRank(rows())

  return curvature


def _value_and_row(fun, params, *args):
  scalar = lambda params: _scalar('loss', fun(params, *args))
  value, grad = jax.value_and_grad(scalar)(params)
  return value, _operators.ravel(grad)


def _scalar(name, value):
  checks.check_scalar(name, value)
  return value


def _examples(args):
  """How many examples there are, along the first axis; 0 without ``args``."""
  leaves = jax.tree.leaves(args)
  sizes = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in leaves}
  if leaves and (len(sizes) > 1 or sizes & {None, 0}):
    raise ValueError(
      'the args of a factory must have one leading axis, over one example or'
      f' more; got shapes {[jnp.shape(leaf) for leaf in leaves]}. Close over'
      ' what is no example.'
    )
  return sizes.pop() if leaves else 0
