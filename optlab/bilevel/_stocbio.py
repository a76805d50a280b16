"""StocBiO: a Neumann series of the lower Hessian."""

import functools

import jax
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel
from optlab.bilevel import _lower


@checks.domains(
  **_bilevel.LEVELS,
  neumann_lr=_bilevel.RATE,
  lower_steps=checks.Integer(),
  neumann_steps=checks.Integer(),
)
def stocbio(
  upper: _bilevel.Objective,
  lower: _bilevel.Objective,
  lower_optimizer: optax.GradientTransformation,
  neumann_lr: base.ScalarOrSchedule,
  *,
  lower_steps: int = 5,
  neumann_steps: int = 5,
) -> base.GradientEstimator:
  r"""Lower steps from where the last ones ended, then a Neumann series.

  .. math::
    z_t = \nu \sum_{q=0}^{Q-1} (I - \nu\, g_{yy})^q f_y, \quad
    d_t = f_x - g_{xy} z_t

  at :math:`(x_t, y_{t+1})`, after the lower steps. Its bias is that of the
  lower steps and :math:`z_t - z^* = -(I - \nu\, g_{yy})^Q z^*`.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``.
    neumann_lr: The rate :math:`\nu`; the series diverges from two over the
      largest eigenvalue of ``g_yy`` on.
    lower_steps: Lower steps, each with a sample of its own.
    neumann_steps: Terms Q of the series.

  Returns:
    A `GradientEstimator` with a `BilevelState`.

  Raises:
    TypeError: An objective is not a function, a count not an integer.
    ValueError: A count is below one, or the rate not positive.

  Examples:
    >>> import jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum(y ** 2)
    >>> lower = lambda x, y, batch: jnp.sum((y - x) ** 2)
    >>> estimator = optlab.stocbio(upper, lower, optax.sgd(0.5), 0.25)
    >>> x = jnp.ones(1)
    >>> batch = optlab.BilevelBatch(None, None)
    >>> result, _ = estimator.estimate(x, estimator.init(x, x), batch)
    >>> print(result.grads, 2.0 * (1.0 - 0.5 ** 5))
    [1.9375] 1.9375

  References:
    Ji, Yang, Liang, `Bilevel Optimization: Convergence Analysis and Enhanced
    Design <https://arxiv.org/abs/2010.07962>`_, ICML 2021.

  Notes:
    Departure: all terms use one sample ``batch.lower``, as the authors' code
    does, where the paper draws a fresh one for each.

    Cost: one upper gradient, ``lower_steps`` lower gradients, one lower
    linearization, ``neumann_steps`` Hessian-vector products (the last for the
    residual) and one cross product.
  """
  checks.enforce(stocbio, locals())

  def solve(state, products, grad_y):
    rate = trees.at_step(neumann_lr, state.step)

    def add_term(_, dual):
      return _bilevel.dual_step(dual, products(dual)[1], grad_y, rate)[0]

    # The first term is the gradient itself.
    dual = jax.tree.map(
      lambda z, fy: (rate * fy.astype(z.dtype)).astype(z.dtype),
      state.dual,
      grad_y,
    )
    dual = jax.lax.fori_loop(1, neumann_steps, add_term, dual)
    cross, hessian_dual = products(dual)
    _, residual = _bilevel.dual_step(dual, hessian_dual, grad_y, rate)
    return dual, cross, residual

  move = functools.partial(_lower.lower_round, lower, lower_steps)
  return _bilevel.estimator(upper, lower, lower_optimizer, solve, move)
