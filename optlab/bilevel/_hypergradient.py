"""Hypergradients by a linear-system variable: one step on it, or a solve.

`soba` takes one step on everything; `implicit` solves the linear system to a
tolerance and is the reference. `stocbio` and `ttsa` (neumann.py), `saba` and
`unrolled` have modules of their own. All are estimators over the same two
functions and the same batch.
"""

import functools

import jax
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel


def soba(
  upper: _bilevel.Objective,
  lower: _bilevel.Objective,
  lower_optimizer: optax.GradientTransformation,
  linear_lr: base.ScalarOrSchedule,
) -> base.GradientEstimator:
  r"""One step each on the lower variable, the linear system and x.

  The cheapest estimator: choose it where noise is small or steps are.

  .. math::
    d_t = f_x - g_{xy} z_t, \quad y_{t+1} = y_t - \rho\, g_y, \quad
    z_{t+1} = z_t - \nu (g_{yy} z_t - f_y)

  with all derivatives at :math:`(x_t, y_t)`.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``.
    linear_lr: The rate :math:`\nu`, a number or a schedule.

  Returns:
    A `GradientEstimator` with a `BilevelState`; it uses ``batch.upper`` and
    ``batch.lower``.

  Raises:
    TypeError: An objective is not a function.
    ValueError: ``linear_lr`` is not positive.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
    >>> lower = lambda x, y, batch: jnp.sum((y - 2.0 * x) ** 2)
    >>> estimator = optlab.soba(upper, lower, optax.sgd(0.2), 0.2)
    >>> tx = optax.sgd(0.02)
    >>> state = optlab.init(jnp.zeros(1), estimator, tx, jnp.zeros(1))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(100):
    ...   state, value = step(state, optlab.BilevelBatch(None, None))
    >>> print(f'{value:.3f} {state.params[0]:.2f}')
    0.000 0.50

  References:
    Dagreou, Ablin, Vaiter, Moreau, `A framework for bilevel optimization that
    enables stochastic and global variance reduction algorithms
    <https://arxiv.org/abs/2201.13409>`_, NeurIPS 2022.

  Notes:
    Cost: one upper gradient, one lower linearization with one Hessian-vector
    and one cross product. Unstable where f_y changes by much in one step: z
    then lags behind.
  """
  checks.check_positive('linear_lr', linear_lr, schedule=True)

  def solve(state, products, grad_y):
    cross, hessian_dual = products(state.dual)
    dual, residual = _bilevel.linear_step(
      state.dual, hessian_dual, grad_y, _bilevel.at(linear_lr, state.step)
    )
    return dual, cross, residual

  return _bilevel.linear_system_estimator(upper, lower, lower_optimizer, solve)


def implicit(
  upper: _bilevel.Objective,
  lower: _bilevel.Objective,
  lower_optimizer: optax.GradientTransformation,
  *,
  lower_steps: int = 5,
  tol: float | jax.Array = 1e-6,
  max_iterations: int = 100,
) -> base.GradientEstimator:
  r"""Implicit differentiation with the linear system solved to a tolerance.

  The reference: exact where the lower variable has converged.

  .. math::
    \|g_{yy} z_t - f_y\| \le \text{tol} \, \|f_y\|, \quad
    d_t = f_x - g_{xy} z_t

  at :math:`(x_t, y_{t+1})`, after the lower steps, by conjugate gradients from
  the last ``z``.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``.
    lower_steps: Lower steps, each with a sample of its own.
    tol: Relative tolerance of the linear system.
    max_iterations: The most iterations of conjugate gradients.

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
    linearization, up to ``max_iterations`` + 2 Hessian-vector products, one
    cross product. Conjugate gradients need ``g_yy`` positive definite on the
    sample; ``linear_residual`` shows where they failed.
  """
  checks.check_int('lower_steps', lower_steps, 1)
  checks.check_int('max_iterations', max_iterations, 1)
  checks.check_non_negative('tol', tol)

  def solve(state, products, grad_y):
    wide = trees.dtypes(state.dual)
    dual, _ = jax.scipy.sparse.linalg.cg(
      lambda z: trees.cast_like(products(z)[1], wide),
      trees.cast_like(grad_y, wide),
      x0=state.dual,
      tol=tol,
      maxiter=max_iterations,
    )
    cross, hessian_dual = products(dual)
    _, residual = _bilevel.linear_step(dual, hessian_dual, grad_y, 0.0)
    return dual, cross, residual

  move = functools.partial(_bilevel.lower_round, lower, lower_steps)
  return _bilevel.linear_system_estimator(
    upper, lower, lower_optimizer, solve, move
  )
