r"""AdaGrad-Norm: AdaGrad with one step length for all parameters.

Ward, Wu, Bottou, *AdaGrad Stepsizes: Sharp Convergence Over Nonconvex
Landscapes*, JMLR 2020, https://arxiv.org/abs/1806.01811.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees


class ScaleByAdaGradNormState(NamedTuple):
  """State of `scale_by_adagrad_norm`."""

  sum_of_squares: jax.Array  # shape (), the params' dtype, at least float32


@checks.domains(
  initial_accumulator_value=checks.NON_NEGATIVE, eps=checks.NON_NEGATIVE
)
def scale_by_adagrad_norm(
  initial_accumulator_value: float | jax.Array = 0.1,
  eps: float | jax.Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Divides updates by the root of the sum of all squared gradient norms.

  .. math::

    b_t^2 = b_{t-1}^2 + \|g_t\|^2, \qquad u_t = \frac{g_t}{b_t + \epsilon}

  The norm is over all leaves together: one scalar for the whole model.

  Args:
    initial_accumulator_value: :math:`b_0^2`, >= 0.
    eps: Added to the root, >= 0. An update with ``b + eps = 0`` is 0.

  Returns:
    An optax transformation with `ScaleByAdaGradNormState`.

  Raises:
    TypeError: A hyperparameter is not a number.
    ValueError: A hyperparameter is negative or not finite.
  """
  checks.enforce(scale_by_adagrad_norm, locals())

  def init_fn(params):
    real = jnp.finfo(trees.accumulator_dtype(params)).dtype
    start = jnp.asarray(initial_accumulator_value, real)
    return ScaleByAdaGradNormState(sum_of_squares=start)

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    wide = state.sum_of_squares.dtype
    total = state.sum_of_squares + trees.sq_norm(updates, wide)
    denominator = jnp.sqrt(total) + jnp.asarray(eps, wide)
    # total = 0 where every gradient was 0; NaN must pass.
    scale = jnp.where(denominator == 0.0, 0.0, 1.0 / denominator)
    updates = jax.tree.map(lambda g: (scale * g).astype(g.dtype), updates)
    return updates, ScaleByAdaGradNormState(sum_of_squares=total)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@checks.domains(
  learning_rate=checks.LEARNING_RATE,
  initial_accumulator_value=checks.NON_NEGATIVE,
  eps=checks.NON_NEGATIVE,
)
def adagrad_norm(
  learning_rate: base.ScalarOrSchedule,
  initial_accumulator_value: float | jax.Array = 0.1,
  eps: float | jax.Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Gradient descent whose step length falls with the gradients seen.

  One adaptive scalar in place of AdaGrad's one per coordinate: choose it where
  the directions of plain gradient descent are wanted, without knowing the
  smoothness or the noise that a step length would be tuned to.

  .. math::

    b_t^2 = b_{t-1}^2 + \|g_t\|^2, \qquad
    \theta_t = \theta_{t-1} - \alpha_t \, \frac{g_t}{b_t + \epsilon}

  Args:
    learning_rate: Number, scalar array or optax schedule.
    initial_accumulator_value: :math:`b_0^2`, >= 0.
    eps: Added to the root, >= 0.

  Returns:
    An optax transformation.

  Raises:
    TypeError: A hyperparameter is not a number.
    ValueError: A hyperparameter is negative or not finite.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> loss = lambda x: jnp.sum((x - 1.0) ** 2)
    >>> tx, x = optlab.adagrad_norm(1.0), jnp.zeros(3)
    >>> state = tx.init(x)
    >>> for _ in range(3):
    ...   value, grads = jax.value_and_grad(loss)(x)
    ...   updates, state = tx.update(grads, state, x)
    ...   x = optax.apply_updates(x, updates)
    ...   print(f'{value:.2f}')
    3.00
    0.54
    0.12

  References:
    Ward, Wu, Bottou, *AdaGrad Stepsizes: Sharp Convergence Over Nonconvex
    Landscapes*, JMLR 2020, https://arxiv.org/abs/1806.01811; Lau, Liu, Kolar,
    *AdAdaGrad*, 2024, https://arxiv.org/abs/2402.11215

  Notes:
    The current gradient is accumulated before it is divided, and the sum runs
    over the whole model; the AdAdaGrad authors' code keeps one sum per output
    row of each array, which is another method.

    Cost per step: one gradient and a scalar of memory.

    A gradient that is not finite stays in the accumulator: wrap in
    `optax.apply_if_finite` where that may happen.
  """
  checks.enforce(adagrad_norm, locals())
  return optax.chain(
    scale_by_adagrad_norm(initial_accumulator_value, eps),
    optax.scale_by_learning_rate(learning_rate),
  )
