"""How `fcco` follows inner values: averages, MSVR, in logarithms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import checks
from optlab import tracking


class Tracker(NamedTuple):
  """How the inner values are followed.

  Attributes:
    update: ``(rows, now, before, fraction) -> rows``, with the samples at the
      current and at the previous point, and the sampled part of the blocks.
    weight: ``(now, rows) -> weights``, by which the slope of the outer function
      is multiplied: ones, or for logarithms the ratio of sample and tracker.
    needs_before: Whether it takes samples at the previous point.
  """

  update: Callable[..., Any]
  weight: Callable[..., Any]
  needs_before: bool = False


@checks.domains(rate=checks.FRACTION)
def track_average(rate: float | jax.Array = 0.1) -> Tracker:
  r"""A moving average of each inner value: SOX.

  .. math:: u_i \leftarrow (1 - \gamma)\, u_i + \gamma\, g_i

  Args:
    rate: Scalar :math:`\gamma` in (0, 1]; 1 is the plain mini-batch.

  Returns:
    A `Tracker` for `fcco`.

  Raises:
    TypeError: ``rate`` is not a real number.
    ValueError: ``rate`` is outside (0, 1].
  """
  checks.enforce(track_average, locals())

  def update(rows, now, before, fraction):
    del before, fraction
    return tracking.ema(rows, now, rate)

  return Tracker(update, _ones)


@checks.domains(
  alpha=tracking.RATE, gamma=checks.NON_NEGATIVE._replace(optional=True)
)
def track_msvr(
  alpha: float | jax.Array = 0.1, gamma: float | jax.Array | None = None
) -> Tracker:
  r"""A moving average that follows what moves: MSVR, see `tracking.msvr`.

  Choose it where the inner functions are smooth and their samples alike at two
  points. It costs the inner values at the previous point. Its corrections may
  carry a tracker out of the domain of the outer function, the argument of a
  logarithm below zero, say: such a block is left out and counted. Normalizers
  are for `track_log_average`.

  Args:
    alpha: Scalar :math:`\alpha` in (0, 1).
    gamma: Scalar :math:`\gamma`, or ``None`` for `tracking.msvr_gamma`.

  Returns:
    A `Tracker` for `fcco`.

  Raises:
    TypeError: One of them is not a real number.
    ValueError: ``alpha`` is outside (0, 1), or ``gamma`` negative.
  """
  checks.enforce(track_msvr, locals())

  def update(rows, now, before, fraction):
    drift = gamma
    if drift is None:
      # As `msvr_gamma`, but an empty batch must not divide by zero.
      part = jnp.where(fraction > 0, fraction, 1)
      drift = (1 - part) / part / (1 - alpha) + 1 - alpha
    return tracking.msvr(rows, now, before, alpha, drift)

  return Tracker(update, _ones, True)


@checks.domains(rate=checks.FRACTION)
def track_log_average(rate: float | jax.Array = 0.1) -> Tracker:
  r"""A moving average of each inner value, kept as its logarithm.

  Choose it for normalizers: ``inner`` returns :math:`\log g_i` (a logsumexp)
  and ``outer`` takes :math:`\log u_i`; nothing over- or underflows.

  .. math:: \log u_i \leftarrow
    \log((1 - \gamma)\, e^{\log u_i} + \gamma\, e^{\log g_i})

  Args:
    rate: Scalar :math:`\gamma` in (0, 1]; 1 is the plain mini-batch.

  Returns:
    A `Tracker` for `fcco`.

  Raises:
    TypeError: ``rate`` is not a real number.
    ValueError: ``rate`` is outside (0, 1].
  """
  checks.enforce(track_log_average, locals())

  def update(rows, now, before, fraction):
    del before, fraction
    keep, take = jnp.log1p(-jnp.asarray(rate)), jnp.log(jnp.asarray(rate))
    return jax.tree.map(
      lambda u, g: jnp.logaddexp(u + keep, g + take).astype(u.dtype), rows, now
    )

  return Tracker(update, _ratio)


@checks.domains(alpha=checks.POSITIVE)
def track_mirror(alpha: float | jax.Array = 1.0) -> Tracker:
  r"""A mirror step on the logarithm of each normalizer: SCENT.

  A moving average whose rate, :math:`\alpha u_i / (1 + \alpha u_i)`, is larger
  for a larger normalizer, so that a block whose normalizer is still far too
  large leaves it behind at once. ``inner`` and ``outer`` see logarithms, as for
  `track_log_average`.

  .. math:: u_i \leftarrow u_i\, \frac{1 + \alpha g_i}{1 + \alpha u_i}

  Args:
    alpha: Scalar :math:`\alpha > 0`, in units of :math:`1 / u`.

  Returns:
    A `Tracker` for `fcco`.

  Raises:
    TypeError: ``alpha`` is not a real number.
    ValueError: ``alpha`` is not positive.

  Notes:
    The proximal step of :math:`E[e^{s - \nu}] + \nu` in :math:`\nu = \log u`
    with the divergence of :math:`e^{-\nu}`, in closed form.
  """
  checks.enforce(track_mirror, locals())

  def update(rows, now, before, fraction):
    del before, fraction
    shift = jnp.log(jnp.asarray(alpha))
    soft = jax.nn.softplus
    return jax.tree.map(
      lambda u, g: (u + soft(g + shift) - soft(u + shift)).astype(u.dtype),
      rows,
      now,
    )

  return Tracker(update, _ratio)


def _ones(now, rows):
  del rows
  return jax.tree.map(jnp.ones_like, now)


def _ratio(now, rows):
  return jax.tree.map(lambda g, u: jnp.exp(g - u), now, rows)
