"""Normalized momentum: steps whose length is the learning rate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees


class ScaleByNormalizedMomentumState(NamedTuple):
  """State of `scale_by_normalized_momentum`."""

  mu: base.Updates  # average gradient, float32 or wider


@checks.domains(beta=checks.DECAY)
def scale_by_normalized_momentum(
  beta: float | jax.Array = 0.9,
) -> optax.GradientTransformationExtraArgs:
  r"""The direction of the averaged gradient, of Euclidean norm one.

  .. math:: m_t = \beta\, m_{t-1} + (1 - \beta)\, g_t, \quad
    u_t = m_t / \|m_t\|

  Args:
    beta: Decay of the average, in [0, 1).

  Returns:
    An optax transformation. A gradient that is zero or not finite gives a zero
    update and leaves the average alone.

  Raises:
    TypeError: ``beta`` is not a real number.
    ValueError: ``beta`` is outside [0, 1).

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> tx = optlab.first_order.scale_by_normalized_momentum()
    >>> updates, _ = tx.update(jnp.array([3e8, 4e8]), tx.init(jnp.zeros(2)))
    >>> print(updates)
    [0.6 0.8]

  Notes:
    Cost: three passes over the gradient; memory of one gradient. Where the
    squares would overflow, the norm is taken after division by the largest
    entry. It is the norm of all parameters that it sees:
    under `optax.partition` each group gets a norm of its own.
  """
  checks.enforce(scale_by_normalized_momentum, locals())

  def init(params):
    checks.check_params('params', params)
    return ScaleByNormalizedMomentumState(trees.zeros_accumulator(params))

  def update(updates, state, params=None, **extra_args):
    del extra_args
    top = trees.largest(updates)  # NaN where a number is NaN.
    informative = jnp.isfinite(top) & (top > 0)

    def average(g, m):
      if g is None:
        return m
      fresh = (beta * m + (1 - beta) * g).astype(m.dtype)
      return jnp.where(informative, fresh, m)

    mu = jax.tree.map(
      average, updates, state.mu, is_leaf=lambda leaf: leaf is None
    )
    length = trees.norm(mu)
    moves = informative & (length > 0)
    direction = trees.map_updates(
      lambda g, m: jnp.where(moves, m / length.astype(m.dtype), 0), updates, mu
    )
    updates = trees.cast_updates(direction, updates, params)
    return updates, ScaleByNormalizedMomentumState(mu)

  return optax.GradientTransformationExtraArgs(init, update)


@checks.domains(learning_rate=checks.LEARNING_RATE, beta=checks.DECAY)
def normalized_momentum(
  learning_rate: base.ScalarOrSchedule, beta: float | jax.Array = 0.9
) -> optax.GradientTransformationExtraArgs:
  r"""Steps of a given length along the averaged gradient.

  Choose it where the curvature grows with the gradient: the step's length does
  not depend on the gradient's. Decay the rate, since a constant one circles the
  optimum at its own distance.

  .. math:: m_t = \beta\, m_{t-1} + (1 - \beta)\, g_t, \quad
    x_{t+1} = x_t - \eta_t\, m_t / \|m_t\|

  Args:
    learning_rate: The length :math:`\eta` of a step, a number or a schedule.
    beta: Decay of the average, in [0, 1).

  Returns:
    An optax optimizer.

  Raises:
    TypeError: One of them is not a real number.
    ValueError: ``beta`` is outside [0, 1), or ``learning_rate`` negative.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> loss = lambda x, batch: jnp.sum(jnp.cosh(x))
    >>> estimator = optlab.value_and_grad(loss)
    >>> tx = optlab.normalized_momentum(optax.cosine_decay_schedule(0.1, 99))
    >>> state = optlab.init(jnp.array([3.0]), estimator, tx)
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(100):
    ...   state, value = step(state, None)
    >>> print(f'{value:.2f}')
    1.00

  References:
    Cutkosky, Mehta, `Momentum Improves Normalized SGD
    <https://arxiv.org/abs/2002.03305>`_, ICML 2020.

  Notes:
    The average remembers large gradients for about ``1 / (1 - beta)`` steps.
    Where they fall faster than that, it walks past the optimum: with ``beta``
    0.98 large rates diverge where 0.9 does not.
  """
  checks.enforce(normalized_momentum, locals())
  return optax.chain(
    scale_by_normalized_momentum(beta),
    optax.scale_by_learning_rate(learning_rate),
  )
