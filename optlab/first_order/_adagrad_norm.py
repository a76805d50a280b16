r"""AdaGrad-Norm: AdaGrad with one step length for all parameters.

Ward, Wu, Bottou, *AdaGrad Stepsizes: Sharp Convergence Over Nonconvex
Landscapes*, JMLR 2020, https://arxiv.org/abs/1806.01811.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import _varying
from optlab import base
from optlab import checks
from optlab import trees


class ScaleByAdaGradNormState(NamedTuple):
  """State of `scale_by_adagrad_norm`."""

  sum_of_squares: jax.Array  # shape (), the params' dtype, at least float32
  # Shape (), the same; the sum is in units of its square. It is 1 where the
  # squares of gradients neither over- nor underflow, else a power of 2.
  unit: jax.Array


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
    checks.check_params('params', params)
    real = jnp.finfo(trees.accumulator_dtype(params)).dtype
    start = jnp.asarray(initial_accumulator_value, real)
    return ScaleByAdaGradNormState(start, jnp.ones((), real))

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    wide = state.sum_of_squares.dtype
    # One pass over the gradient where its squares are numbers as they are.
    plain = trees.sq_norm(updates, wide)
    total, unit = _varying.cond(
      _is_plain(plain, state),
      lambda: (state.sum_of_squares + plain, state.unit),
      lambda: _in_units(updates, state, plain),
    )
    denominator = jnp.sqrt(total) + jnp.asarray(eps, wide) / unit
    # total = 0 where every gradient was 0; NaN must pass.
    scale = jnp.where(denominator == 0.0, 0.0, 1.0 / denominator)
    direction = trees.map_updates(
      lambda g: scale * (g.astype(jnp.promote_types(g.dtype, wide)) / unit),
      updates,
    )
    return trees.cast_updates(
      direction, updates, params
    ), ScaleByAdaGradNormState(total, unit)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_plain(square, state):
  """Whether the sum takes a square as it is: 1 is its unit before and after."""
  info = jnp.finfo(square.dtype)
  seen = (state.sum_of_squares > 0) | (square > info.tiny**0.5)
  return (state.unit == 1) & seen & (square < info.max * 2.0**-40)


def _in_units(updates, state, plain):
  """The next sum of squares and its unit."""
  before = state.sum_of_squares
  root, scale = trees.scaled_norm(updates, jnp.sqrt(plain))
  unit = _unit(root, scale, state)
  # The unit only shrinks where the sum is 0.
  kept = jnp.where(before == 0, 0, jnp.square(state.unit / unit))
  return before * kept + jnp.square(root / (scale * unit)), unit


def _unit(root, scale, state):
  """The unit of the sum after a gradient of norm ``root / scale``."""
  info = jnp.finfo(root.dtype)
  one = scale * state.unit
  over = root > one * (info.max**0.5 * 2.0**-20)
  under = (state.sum_of_squares == 0) & (root < one * info.tiny**0.25)
  move = jnp.isfinite(root) & (root > 0) & (over | under)
  exponent = jnp.frexp(root)[1] - jnp.frexp(scale)[1] + 1
  exponent = jnp.clip(exponent, info.minexp + 2, info.maxexp - 2)
  exponent = jnp.where(move, exponent, 0)
  return jnp.where(move, jnp.ldexp(jnp.ones_like(root), exponent), state.unit)


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
