"""Which blocks a step of a multi-block method samples.

Both samplers draw uniformly: each step afresh, or by epochs, in which every
block comes once.
"""

import math

import jax
import jax.numpy as jnp

from optlab import checks


def sample_blocks(
  key: jax.Array, num_blocks: int, sampled: int, *, replace: bool = False
) -> jax.Array:
  r"""Samples blocks uniformly.

  Without replacement every subset is equally likely; Floyd's algorithm makes it
  in time that does not grow with the number of blocks where few are sampled.

  Args:
    key: A PRNG key.
    num_blocks: The number of blocks :math:`m`.
    sampled: How many to sample, :math:`I`.
    replace: Whether one block may be drawn twice; `bsvrb` counts it once.

  Returns:
    int32 array of shape ``(sampled,)``, in no particular order; all blocks come
    in their own, so that rows of data that belong to them may stay as they are.

  Raises:
    TypeError: ``num_blocks`` or ``sampled`` is not an integer.
    ValueError: ``sampled`` is below 1, or above ``num_blocks`` without
      replacement.

  Examples:
    >>> import jax, optlab
    >>> print(optlab.sample_blocks(jax.random.key(0), 5, 5))
    [0 1 2 3 4]

  References:
    Bentley, Floyd, `Programming pearls: a sample of brilliance
    <https://doi.org/10.1145/30401.315746>`_, CACM 1987.
  """
  _check_sampled(num_blocks, sampled, replace)
  if replace:
    return jax.random.randint(key, (sampled,), 0, num_blocks, jnp.int32)
  if sampled == num_blocks:
    return jnp.arange(num_blocks, dtype=jnp.int32)
  if sampled**2 > num_blocks * math.log2(num_blocks + 1):
    return jax.random.permutation(key, num_blocks)[:sampled].astype(jnp.int32)
  tops = jnp.arange(num_blocks - sampled, num_blocks, dtype=jnp.int32)
  draws = jax.random.randint(key, (sampled,), 0, tops + 1, jnp.int32)
  none = jnp.full((sampled,), -1, jnp.int32)
  return jax.lax.scan(_floyd, none, (jnp.arange(sampled), draws, tops))[0]


def _floyd(chosen, step):
  # The j-th draw is from the blocks up to tops[j]; where it is taken already,
  # tops[j] itself, which no earlier draw could be, takes its place.
  index, draw, top = step
  taken = jnp.any(chosen == draw)
  return chosen.at[index].set(jnp.where(taken, top, draw)), None


def epoch_of_blocks(key: jax.Array, num_blocks: int, sampled: int) -> jax.Array:
  """One pass over all blocks in random order, cut into batches.

  Args:
    key: A PRNG key, a new one for each epoch.
    num_blocks: The number of blocks.
    sampled: How many a batch has.

  Returns:
    int32 array of shape ``(ceil(num_blocks / sampled), sampled)``; the last row
    is padded with ``num_blocks``, which `bsvrb` drops. All blocks at once come
    in their own order.

  Raises:
    TypeError: ``num_blocks`` or ``sampled`` is not an integer.
    ValueError: ``sampled`` is below 1 or above ``num_blocks``.

  Examples:
    >>> import jax, optlab
    >>> print(optlab.multi_block.epoch_of_blocks(jax.random.key(0), 3, 2))
    [[0 1]
     [2 3]]
  """
  _check_sampled(num_blocks, sampled, replace=False)
  if sampled == num_blocks:
    return jnp.arange(num_blocks, dtype=jnp.int32)[None]
  order = jax.random.permutation(key, num_blocks).astype(jnp.int32)
  padding = -num_blocks % sampled
  order = jnp.pad(order, (0, padding), constant_values=num_blocks)
  return order.reshape(-1, sampled)


def _check_sampled(num_blocks, sampled, replace):
  checks.check_int('num_blocks', num_blocks, 1)
  checks.check_int('sampled', sampled, 1)
  if sampled > num_blocks and not replace:
    raise ValueError(
      f'sampled must be at most num_blocks={num_blocks}, got {sampled}; lower'
      ' it, or sample with replace=True.'
    )
