"""SOBA: one step each on the lower variable, the linear system and x."""

import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel


@checks.domains(**_bilevel.LEVELS, dual_lr=_bilevel.RATE)
def soba(
  upper: _bilevel.Objective,
  lower: _bilevel.Objective,
  lower_optimizer: optax.GradientTransformation,
  dual_lr: base.ScalarOrSchedule,
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
    dual_lr: The rate :math:`\nu`, a number or a schedule.

  Returns:
    A `GradientEstimator` with a `BilevelState`; it uses ``batch.upper`` and
    ``batch.lower``.

  Raises:
    TypeError: An objective is not a function.
    ValueError: ``dual_lr`` is not positive.

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
  checks.enforce(soba, locals())

  def solve(state, products, grad_y):
    cross, hessian_dual = products(state.dual)
    dual, residual = _bilevel.dual_step(
      state.dual, hessian_dual, grad_y, trees.at_step(dual_lr, state.step)
    )
    return dual, cross, residual

  return _bilevel.estimator(upper, lower, lower_optimizer, solve)
