"""The contexts of a batch, numbered within it.

A batch sees some contexts of many, by the rows of noise that name them. Each
has a *slot*, so that a step costs what they cost and not what all of them do.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import tables


class Slots(NamedTuple):
  """The contexts that a batch's noise names.

  Attributes:
    context: ``[m]``, the context of each slot, ascending; the number of
      contexts in those that are not used.
    used: bool ``[m]``.
    noise: ``[m]``, the slot of each row of noise.
    data: ``[n]``, the slot of each row of data, if it has one.
    noise_named: bool ``[m]``, rows that name a context; others are padding.
    data_named: bool ``[n]``.
    found: bool ``[n]``, rows of data with noise of their context beside them.
  """

  context: jax.Array
  used: jax.Array
  noise: jax.Array
  data: jax.Array
  noise_named: jax.Array
  data_named: jax.Array
  found: jax.Array


class Sums(NamedTuple):
  """The noise of each slot; of those without weight ``log_mean`` is -inf."""

  log_scale: jax.Array  # shape [m], the largest log weight
  log_mean: jax.Array  # shape [m], of the weights over the good rows
  count: jax.Array  # shape [m], good rows
  ess: jax.Array  # shape [m]
  scaled: jax.Array  # shape [m], weight of each row over its slot's largest


def number(batch: Any, contexts: int) -> Slots:
  """Numbers the contexts of a batch, of so many."""
  data, data_named = _named(batch.contexts, contexts)
  noise, noise_named = _named(batch.noise_contexts, contexts)
  order = jnp.argsort(noise)
  ascending = noise[order]
  new = jnp.concatenate([jnp.zeros(1, bool), ascending[1:] != ascending[:-1]])
  rank = jnp.cumsum(new)
  context = jnp.full_like(noise, contexts).at[rank].set(ascending)
  place = jnp.minimum(jnp.searchsorted(context, data), noise.size - 1)
  return Slots(
    context=context,
    used=context < contexts,
    noise=jnp.zeros_like(rank).at[order].set(rank, unique_indices=True),
    data=place,
    noise_named=noise_named,
    data_named=data_named,
    found=data_named & (context[place] == data),
  )


def _named(indices, contexts):
  """Indices of at least 32 bits, and whether they are in range."""
  indices = whole(indices)
  indices = indices.astype(jnp.promote_types(indices.dtype, jnp.int32))
  named = (indices >= 0) & (indices < contexts)
  return jnp.where(named, indices, contexts), named


def whole(array: jax.Array) -> jax.Array:
  """On an explicit mesh, the array on every device: it is looked up by rows."""
  where = tables.layout(array)
  if where is None:
    return array
  return jax.sharding.reshard(array, where.update(spec=jax.P()))


def sums(slots: Slots, log_w: jax.Array, good: jax.Array) -> Sums:
  """Sums up the noise; ``log_w`` is -inf in rows that are not good."""
  size, which = log_w.size, slots.noise
  add = lambda rows: jax.ops.segment_sum(rows, which, size)
  top = jax.ops.segment_max(log_w, which, size)
  scaled = jnp.exp(log_w - jnp.where(top > -jnp.inf, top, 0)[which])
  total, squares = add(scaled), add(scaled**2)
  count = add(good.astype(log_w.dtype))
  tiny = jnp.finfo(log_w.dtype).tiny
  return Sums(
    log_scale=top,
    log_mean=top + jnp.log(total) - jnp.log(jnp.maximum(count, 1)),
    count=count,
    ess=total**2 / jnp.maximum(squares, tiny),
    scaled=scaled,
  )
