"""SPSA: a descent direction from two losses, without a derivative."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from optlab import base
from optlab import checks


class SpsaState(NamedTuple):
  """State of `spsa`."""

  key: jax.Array  # shape (), typed PRNG key


@checks.domains(
  fun=checks.Function('(params, batch) -> scalar'), scale=checks.POSITIVE
)
def spsa(
  fun: Callable[[base.Params, base.Batch], jax.Array],
  scale: float | jax.Array = 0.01,
) -> base.GradientEstimator:
  r"""The gradient along one random direction, from two losses alone.

  Choose it where the loss can be evaluated but not differentiated.

  .. math:: \hat g = \frac{f(x + c \Delta) - f(x - c \Delta)}{2 c}\, \Delta,
    \quad \Delta_j = \pm 1

  Args:
    fun: The loss, ``(params, batch) -> scalar``.
    scale: The length c of the perturbation of a coordinate, positive.

  Returns:
    A `GradientEstimator`; ``init(params, key)`` takes a PRNG key.

  Raises:
    TypeError: ``fun`` is not a function, or ``scale`` no real number.
    ValueError: ``scale`` is not positive.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> steps = lambda x, batch: jnp.sum(jnp.abs(jnp.round(20 * x))) / 20
    >>> estimator, tx = optlab.first_order.spsa(steps, 0.2), optax.sgd(0.05)
    >>> state = optlab.init(jnp.array([2.0, -3.0]), estimator, tx,
    ...                     jax.random.key(0))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(100):
    ...   state, value = step(state, None)
    >>> bool(value < 1.0)
    True

  References:
    Spall, `Multivariate Stochastic Approximation Using a Simultaneous
    Perturbation Gradient Approximation <https://doi.org/10.1109/9.119632>`_,
    IEEE TAC 1992.

  Notes:
    Cost: two losses. The variance grows with the number of parameters.
  """
  checks.enforce(spsa, locals())

  def init(params, key):
    del params
    return SpsaState(jax.random.clone(key))  # A copy: both may be donated.

  def estimate(params, state, batch):
    key, subkey = jax.random.split(state.key)
    signs = optax.tree.random_like(subkey, params, jax.random.rademacher)
    above = fun(optax.tree.add_scale(params, scale, signs), batch)
    below = fun(optax.tree.add_scale(params, -scale, signs), batch)
    slope = (above - below) / (2 * scale)
    grads = jax.tree.map(lambda sign: (slope * sign).astype(sign.dtype), signs)
    return base.Estimate((above + below) / 2, grads), SpsaState(key)

  return base.GradientEstimator(init, estimate)
