r"""Whether the model that a classifier learns has the noise's total mass.

NCE fits densities, not their shapes: a model without a normalizer is bent until
its mass is one, and its shape is wrong. What shows it is the derivative by a
constant beside the log density, the slopes of noise minus those of data. It is
zero in the mean where such a constant has been learned, and stays away from
zero where the model has none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import tracking
from optlab import trees

MEMORY = 100  # Steps of the means.
LIMIT = 0.05  # Of the difference, beside the sum.
ERRORS = 4.0  # Of the mean of so many differences.


class Balance(NamedTuple):
  """Means of what each side pulls."""

  step: jax.Array  # shape (), int32, steps that counted
  data: jax.Array  # shape (), not negative
  noise: jax.Array  # shape (), not negative
  square: jax.Array  # shape (), of the difference of a step


def start(dtype: Any) -> Balance:
  """Before the first step."""
  zero = lambda kind: jnp.zeros((), kind)  # Each a buffer of its own.
  return Balance(zero(jnp.int32), zero(dtype), zero(dtype), zero(dtype))


def follow(
  old: Balance, data: jax.Array, noise: jax.Array, usable: jax.Array
) -> Balance:
  """The means after a step whose sides pulled by ``data`` and ``noise``."""
  square = (noise - data) ** 2
  counts = usable & jnp.isfinite(square)
  rate = jnp.maximum(1 / MEMORY, 1 / (old.step.astype(square.dtype) + 1))
  means = tracking.ema(old[1:], (data, noise, square), rate)
  return trees.where(counts, Balance(old.step + 1, *means), old)


def judge(balance: Balance) -> tuple[jax.Array, jax.Array]:
  """The imbalance, from -1 to 1, and whether it is one after `MEMORY` steps."""
  gap, total = balance.noise - balance.data, balance.noise + balance.data
  error = jnp.sqrt(balance.square / (2 * MEMORY))
  warning = (jnp.abs(gap) > LIMIT * total) & (jnp.abs(gap) > ERRORS * error)
  imbalance = gap / jnp.where(total > 0, total, 1)
  return imbalance, warning & (balance.step >= MEMORY)
