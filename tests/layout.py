"""Where arrays lie, and what a compiled step moves."""

import re
from typing import Any

import jax

COLLECTIVES = re.compile(
  r'\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)'
  r'(?:-start)?\('
)


def bytes_a_device(tree: Any) -> int:
  """Bytes on the fullest device."""
  held: dict[Any, int] = {}
  for leaf in jax.tree.leaves(tree):
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    for shard in leaf.addressable_shards:
      held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
  return max(held.values(), default=0)
