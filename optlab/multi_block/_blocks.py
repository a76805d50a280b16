"""What a step of a multi-block method is given: blocks, data, objectives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from optlab import checks
from optlab import tracking

BlockObjective = Callable[[Any, Any, Any], jax.Array]
OBJECTIVE = checks.Function('(params, inner, batch) -> scalar')


class BlockBatch(NamedTuple):
  """The sampled blocks of one step, and data for each of them.

  Attributes:
    blocks: int array of shape ``(sampled,)``. ``num_blocks`` and beyond is
      padding, and a block named again is ignored.
    upper: Pytree of data for the upper objectives, leading axis ``sampled``.
    lower: Pytree of data for the lower objectives, leading axis ``sampled``.
  """

  blocks: jax.Array
  upper: Any = None
  lower: Any = None


class PairedBlockBatch(NamedTuple):
  """The sampled blocks of one step, and a second, independent set of blocks.

  Attributes:
    blocks: int array of shape ``(sampled,)``, whose trackers are updated;
      padding and repeats as in `BlockBatch`.
    upper: Pytree of data for the upper objectives, leading axis ``sampled``.
    lower: Pytree of data for the lower objectives, leading axis ``sampled``.
    outer: int array of shape ``(outer_sampled,)``, the blocks over which the
      hypergradient is averaged. It needs no data.
  """

  blocks: jax.Array
  upper: Any
  lower: Any
  outer: jax.Array


def check_batch(batch: Any, num_blocks: int, kind: Any = BlockBatch) -> None:
  """Raises unless ``batch`` has blocks, and data for each of them."""
  checks.check_fields('batch', batch, kind._fields, f'a {kind.__name__}')
  tracking.check_blocks(batch.blocks, num_blocks)
  sampled = batch.blocks.shape[0]
  tracking.check_rows('batch.upper', batch.upper, sampled, 'blocks')
  tracking.check_rows('batch.lower', batch.lower, sampled, 'blocks')
  if kind is PairedBlockBatch:
    tracking.check_blocks(batch.outer, num_blocks)


def check_first(batch: Any, num_blocks: int) -> None:
  """Raises unless ``batch`` is one pass over all blocks."""
  check_batch(batch, num_blocks)
  if batch.blocks.shape[0] != num_blocks:
    raise ValueError(
      f'first must have each of the num_blocks={num_blocks} blocks once, got'
      f' {batch.blocks.shape[0]} blocks.'
    )
