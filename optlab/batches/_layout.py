"""Microbatches that lie on the devices as the data do.

A microbatch gathered from data that are split over devices would lie whole on
each of them, and each would do the whole work.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from optlab import base


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
  """How the leaves of the data lie, as part of a program and not of a state.

  Attributes:
    shardings: In the order of the leaves; ``None`` where a leaf is not split.
  """

  shardings: tuple[Any, ...]


def layout_of(data: base.Batch) -> Layout | None:
  """The layout of concrete arrays; ``None`` where no leading axis is split."""
  shardings = []
  for leaf in jax.tree.leaves(data):
    sharding = getattr(leaf, 'sharding', None)
    if isinstance(leaf, jax.core.Tracer) or not _is_split(sharding):
      sharding = None
    shardings.append(sharding)
  return Layout(tuple(shardings)) if any(shardings) else None


def _is_split(sharding):
  return (
    isinstance(sharding, jax.NamedSharding)
    and len(sharding.spec) > 0
    and sharding.spec[0] is not None
  )


def take(data: base.Batch, index: jax.Array, layout: Layout | None) -> Any:
  """Rows of all leaves, which lie as the leaves do.

  Args:
    data: Pytree of arrays with the examples on the leading axes.
    index: int32, shape (n,), the rows.
    layout: Of the data, where it is known; on meshes with explicit axes the
      arrays themselves say it.

  Returns:
    Pytree of arrays with n rows; whole on each device where the devices do not
    divide n.
  """
  leaves, treedef = jax.tree.flatten(data)
  shardings = layout.shardings if layout else [None] * len(leaves)
  rows = []
  for leaf, sharding in zip(leaves, shardings, strict=True):
    if explicit(leaf) is not None:
      typed = _divided(jax.typeof(leaf).sharding, len(index))
      rows.append(leaf.at[index].get(out_sharding=typed))
    elif sharding is None:
      rows.append(leaf[index])
    else:
      sharding = _divided(sharding, len(index))
      rows.append(jax.lax.with_sharding_constraint(leaf[index], sharding))
  return jax.tree.unflatten(treedef, rows)


def _divided(sharding, length):
  """As ``sharding``, but whole where the devices do not divide the rows."""
  axes = sharding.spec[0]
  axes = axes if isinstance(axes, tuple) else (axes,)
  parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
  if length % parts == 0:
    return sharding
  return sharding.update(spec=jax.P(None, *sharding.spec[1:]))


def explicit(data: base.Batch) -> Any:
  """The sharding of rows on a mesh with explicit axes, or ``None``."""
  for leaf in jax.tree.leaves(data):
    sharding = jax.typeof(leaf).sharding
    if len(sharding.spec) and sharding.spec[0] is not None:
      return sharding.update(spec=jax.P(sharding.spec[0]))
  return None


def like_rows(array: jax.Array, data: base.Batch) -> jax.Array:
  """Numbers by example, which lie as the examples do."""
  sharding = explicit(data)
  if sharding is None:
    return array
  return jax.sharding.reshard(array, sharding)


def permutation(
  key: jax.Array, length: int, data: base.Batch = (), layout: Any = None
) -> jax.Array:
  """That of `jax.random.permutation`, whose bits the devices draw together.

  Bits are most of its work. A generator that is not known to give the same
  ones wherever they are drawn is left to each device.

  Args:
    key: Typed PRNG key.
    length: The number n of examples.
    data: Pytree of arrays with the examples on the leading axes, of which
      explicit meshes say where they lie.
    layout: Of the data, where it is known.

  Returns:
    int32, shape (n,), whole on each device.
  """
  sharding = next(filter(None, layout.shardings), None) if layout else None
  typed = explicit(data)
  same = str(jax.random.key_impl(key)) == 'threefry2x32'
  if not (same and getattr(jax.config, 'jax_threefry_partitionable', True)):
    sharding = typed = None
  order = jnp.arange(length, dtype=jnp.int32)
  # Rounds and keys are those of jax.random, which tests compare with this.
  for _ in range(math.ceil(3 * math.log(max(1, length)) / math.log(2**32 - 1))):
    key, once = jax.random.split(key)
    if typed is not None:
      bits = jax.random.bits(once, (length,), out_sharding=typed)
      bits = jax.sharding.reshard(bits, typed.update(spec=jax.P()))
    elif sharding is not None:
      bits = jax.lax.with_sharding_constraint(
        jax.random.bits(once, (length,)),
        sharding.update(spec=jax.P(sharding.spec[0])),
      )
    else:
      bits = jax.random.bits(once, (length,))
    _, order = jax.lax.sort_key_val(bits, order)
  return order


def strided(leaf: jax.Array, group: Any, groups: int) -> jax.Array:
  """Every ``groups``-th row of an array from row ``group`` on.

  So every device has a part of each group; of a window, one would have all.
  """
  shape = (leaf.shape[0] // groups, groups, *leaf.shape[1:])
  return jax.lax.dynamic_index_in_dim(
    jnp.reshape(leaf, shape), group, 1, keepdims=False
  )
