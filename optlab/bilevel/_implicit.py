"""Implicit differentiation, the linear system solved to a tolerance."""

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
  lower_steps=checks.Integer(),
  rtol=checks.NON_NEGATIVE,
  max_steps=checks.Integer(),
)
def implicit(
  upper: _bilevel.Objective,
  lower: _bilevel.Objective,
  lower_optimizer: optax.GradientTransformation,
  *,
  lower_steps: int = 5,
  rtol: float | jax.Array = 1e-6,
  max_steps: int = 100,
) -> base.GradientEstimator:
  r"""Implicit differentiation with the linear system solved to a tolerance.

  The reference: exact where the lower variable has converged.

  .. math::
    \|g_{yy} z_t - f_y\| \le \text{rtol} \, \|f_y\|, \quad
    d_t = f_x - g_{xy} z_t

  at :math:`(x_t, y_{t+1})`, after the lower steps, by conjugate gradients from
  the last ``z``.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``.
    lower_steps: Lower steps, each with a sample of its own.
    rtol: Relative tolerance of the linear system.
    max_steps: The most steps of conjugate gradients.

  Returns:
    A `GradientEstimator` with a `BilevelState`.

  Raises:
    TypeError: An objective is not a function, a count not an integer.
    ValueError: A count is below one, or the tolerance negative.

  Examples:
    >>> import jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum(y ** 2)
    >>> lower = lambda x, y, batch: jnp.sum((y - x) ** 2)
    >>> estimator = optlab.implicit(upper, lower, optax.sgd(0.5))
    >>> x = jnp.ones(1)
    >>> batch = optlab.BilevelBatch(None, None)
    >>> result, _ = estimator.estimate(x, estimator.init(x, x), batch)
    >>> print(result.grads)
    [2.]

  References:
    Pedregosa, `Hyperparameter optimization with approximate gradient
    <https://arxiv.org/abs/1602.02355>`_, ICML 2016.

  Notes:
    Cost: one upper gradient, ``lower_steps`` lower gradients, one lower
    linearization, up to ``max_steps`` + 2 Hessian-vector products, one
    cross product. Conjugate gradients need ``g_yy`` positive definite on the
    sample; ``dual_residual`` shows where they failed.
  """
  checks.enforce(implicit, locals())

  def solve(state, products, grad_y):
    wide = trees.dtypes(state.dual)
    dual, _ = jax.scipy.sparse.linalg.cg(
      lambda z: trees.cast_like(products(z)[1], wide),
      trees.cast_like(grad_y, wide),
      x0=state.dual,
      tol=rtol,
      maxiter=max_steps,
    )
    cross, hessian_dual = products(dual)
    _, residual = _bilevel.dual_step(dual, hessian_dual, grad_y, 0.0)
    return dual, cross, residual

  move = functools.partial(_lower.lower_round, lower, lower_steps)
  return _bilevel.estimator(upper, lower, lower_optimizer, solve, move)
