"""The arithmetic of batch sizes: what a request gives, what has been seen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab import checks


def samples_seen(samples: jax.Array, dtype: Any) -> jax.Array:
  """The number of examples, as a real number."""
  units, rest = samples.astype(dtype)
  return units * 2.0**30 + rest


def add_samples(samples: jax.Array, more: Any) -> jax.Array:
  """The count of samples after so many more, which may pass int32."""
  # The rest is below 2^30 and a batch below 2^31: as unsigned no overflow.
  rest = samples[1].astype(jnp.uint32) + jnp.asarray(more, jnp.uint32)
  units = samples[0] + (rest >> 30).astype(jnp.int32)
  return jnp.stack([units, (rest & (2**30 - 1)).astype(jnp.int32)])


def check_sizes(batch_size: Any, max_batch_size: Any, multiple_of: Any) -> None:
  """What the domains of two sizes do not say: how they fit together."""
  for name, size in (
    ('batch_size', batch_size),
    ('max_batch_size', max_batch_size),
  ):
    if is_static(size, multiple_of) and size % multiple_of:
      raise ValueError(
        f'{name} must be a multiple of multiple_of={multiple_of}, got {size}:'
        f' take {size + -size % multiple_of} or {size - size % multiple_of}.'
      )
  if is_static(batch_size, max_batch_size) and batch_size > max_batch_size:
    raise ValueError(
      f'batch_size must be at most max_batch_size={max_batch_size}, got'
      f' {batch_size}.'
    )
  if is_static(max_batch_size) and max_batch_size > np.iinfo(np.int32).max:
    raise ValueError(f'max_batch_size must be an int32, got {max_batch_size}.')


def is_static(*values: Any) -> bool:
  """Whether all are known when the program is made."""
  return not any(isinstance(value, jax.core.Tracer) for value in values)


def on_host(name: str, size: Any) -> int:
  """The size of a batch that is made on the host."""
  checks.check_int(name, size, 1, traced=True)
  if not is_static(size):
    raise TypeError(
      f'{name} must be known on the host, got {size}: batches are taken outside'
      ' of jax.jit.'
    )
  return int(size)


def next_size(
  requested: jax.Array,
  now: jax.Array,
  limit: jax.Array,
  growth_cap: Any,
  multiple_of: Any,
) -> jax.Array:
  """The size after ``now``: never smaller, nor above ``limit``."""
  wide = requested.dtype
  # A schedule's 8 * (0.03 / 0.03) may be 8 and a rounding, and is not 9.
  whole = jnp.round(requested)
  slack = 4 * jnp.finfo(wide).eps * jnp.abs(requested)
  is_whole = jnp.abs(requested - whole) <= slack
  wanted = jnp.where(is_whole, whole, requested)
  if growth_cap is not None:
    cap = jnp.floor(jnp.asarray(growth_cap, wide) * now.astype(wide))
    cap = jnp.maximum(cap, now.astype(wide) + 1)  # Or it never grew.
    wanted = jnp.where(jnp.isnan(wanted), wanted, jnp.minimum(wanted, cap))
  # Compared as real numbers: an integer cast of more than int32 is undefined,
  # and float32(2^31 - 1) is 2^31.
  below = wanted < limit.astype(wide)
  size = jnp.ceil(jnp.where(below, wanted, 0.0)).astype(jnp.int32)
  # Not past the limit, of which multiple_of is a divisor.
  size = size + (-size) % multiple_of
  size = jnp.where(below, jnp.minimum(size, limit), limit)
  return jnp.where(jnp.isnan(wanted), now, jnp.maximum(now, size))


def local_size(size: Any, devices: int, name: str) -> Any:
  """A device's part of a batch."""
  if is_static(size) and np.any(np.asarray(size) % devices):
    raise ValueError(
      f'the batch size must be a multiple of the {devices} devices of {name},'
      f' got {size}: take {size + -size % devices}, and multiple_of={devices}'
      ' in grow_batch.'
    )
  return size // devices
