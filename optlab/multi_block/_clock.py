"""The time that lazy blocks have missed.

The clock is the sum of all step sizes, in two floats: late in a run the time
since a block's last visit is a small difference of large sums.
"""

import jax
import jax.numpy as jnp

from optlab import base


def add(clock: jax.Array, length: jax.Array) -> jax.Array:
  """The clock, of shape ``(2,)``, after a step of ``length``."""
  high, low = clock
  part = low + length.astype(clock.dtype)
  total = high + part
  added = total - high
  return jnp.stack([total, (high - (total - added)) + (part - added)])


def elapsed(clock: jax.Array, touched: jax.Array) -> jax.Array:
  """Sum of the step sizes since each row, now and one step ago."""
  difference = clock[:, None, :] - touched[None, :, :]
  return difference[..., 0] + difference[..., 1]


def advance(
  table: base.ArrayTree, slope: base.ArrayTree, time: jax.Array
) -> base.ArrayTree:
  """Takes the steps that rows have not taken since they were written.

  Args:
    table: Rows with leading axis ``sampled``.
    slope: Their descent directions, like ``table``.
    time: The sum of the step sizes gone by, shape ``(..., sampled)``.

  Returns:
    ``table - time * slope`` with the leading axes of ``time``, in the dtypes of
    ``table``.
  """

  def leaf(row, slope):
    step = time.reshape(time.shape + (1,) * (row.ndim - 1))
    return (row - step.astype(slope.dtype) * slope).astype(row.dtype)

  return jax.tree.map(leaf, table, slope)
