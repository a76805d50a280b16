"""Optimality maps of constrained and penalized lower levels."""

from collections.abc import Callable
from typing import Any

import jax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _problem


@checks.domains(
  lower=checks.Function('(x, y, batch) -> scalar'),
  prox=checks.Function('(x, y, learning_rate) -> y'),
  learning_rate=checks.POSITIVE,
)
def proximal_map(
  lower: _problem.Objective,
  prox: Callable[[base.Params, base.Params, Any], base.Params],
  learning_rate: float | jax.Array,
) -> _problem.Objective:
  r"""The proximal gradient step, whose fixed point a constrained y* is.

  For ``lower_map`` of the hypergradient estimators: where the lower level has a
  constraint (``prox`` is then a projection) or a penalty with kinks, ``g_y`` is
  not zero at the solution and the formula for a free ``y`` is wrong.

  .. math:: T(x, y) = \operatorname{prox}_{\rho h(x, \cdot)}(y - \rho\, g_y),
    \quad y^* = T(x, y^*), \quad
    \nabla F = f_x + T_x^\top z, \quad (I - T_y^\top)\, z = f_y

  Args:
    lower: The smooth part g of the lower objective, ``(x, y, batch) ->
      scalar``, without ``aux``.
    prox: ``(x, y, learning_rate) -> y``: the projection of y, or ``argmin_u
      h(x, u) + |u - y|^2 / (2 learning_rate)``. It may depend on x.
    learning_rate: The rate :math:`\rho`, below two over the largest eigenvalue
      of ``g_yy``.

  Returns:
    ``(x, y, batch) -> y``.

  Raises:
    TypeError: ``lower`` or ``prox`` is not a function, or ``learning_rate`` not
      a real number.
    ValueError: ``learning_rate`` is not positive.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
    >>> lower = lambda x, y, batch: jnp.sum((y - x) ** 2)
    >>> lower_map = optlab.bilevel.proximal_map(
    ...     lower, lambda x, y, rate: jnp.maximum(y, 0.0), 0.4)
    >>> estimator = optlab.soba(
    ...     upper, lower, None, 1.0, lower_map=lower_map)
    >>> x, batch = jnp.array([2.0, -2.0]), optlab.BilevelBatch(None, None)
    >>> state = estimator.init(x, jnp.zeros(2))
    >>> for _ in range(50):
    ...   estimate, state = estimator.estimate(x, state, batch)
    >>> print(estimate.grads, state.inner)
    [2. 0.] [2. 0.]

  References:
    Bolte, Pauwels, Vaiter, `Automatic Differentiation of Nonsmooth Iterative
    Algorithms <https://arxiv.org/abs/2206.00457>`_, NeurIPS 2022. Bertrand et
    al., `Implicit Differentiation for Fast Hyperparameter Selection in
    Non-Smooth Convex Learning <https://arxiv.org/abs/2105.01637>`_, JMLR 2022.

  Notes:
    The derivative is exact where small changes of x leave the active
    constraints as they are. On samples instead of the whole lower level the map
    is that of the sample: the mean of projected steps is not the projected step
    of the mean, so keep its noise small.
  """
  checks.enforce(proximal_map, locals())

  def apply(params, inner, batch):
    grad = jax.grad(lower, argnums=1)(params, inner, batch)
    moved = trees.combine(lambda y, g: y - learning_rate * g, inner, grad)
    return prox(params, moved, learning_rate)

  return apply
