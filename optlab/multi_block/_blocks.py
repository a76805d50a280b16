"""What a step of a multi-block method is given: blocks, data, objectives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optlab import checks
from optlab import tables

#: ``(params, inner, batch) -> scalar``: a loss of one block.
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


def objective(
  name: str, fun: Callable[..., Any], has_aux: bool = False
) -> Callable[..., Any]:
  """An objective that says what is wrong with what it returns.

  Args:
    name: Of the argument, for the message.
    fun: The objective of a block.
    has_aux: Whether it returns auxiliary output beside the value.

  Returns:
    The same function.
  """

  def call(*args):
    value = fun(*args)
    aux = ()
    if has_aux:
      if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(
          f'{name} must return (value, aux) where has_aux is set, got'
          f' {type(value).__name__}.'
        )
      value, aux = value
    if isinstance(value, (tuple, list, dict)) or jnp.shape(value):
      what = f'shape {jnp.shape(value)}' if hasattr(value, 'shape') else (
        type(value).__name__
      )  # fmt: skip
      raise TypeError(
        f'{name} must return a scalar for one block, got {what}; average over'
        ' the data of the block; auxiliary output is for upper, with has_aux.'
      )
    return (value, aux) if has_aux else value

  return call


def objectives(upper: Any, lower: Any, has_aux: bool) -> tuple[Any, Any]:
  """Both objectives; the upper one returns ``(value, aux)`` in any case."""
  upper = objective('upper', upper, has_aux)
  if has_aux:
    return upper, objective('lower', lower)
  return lambda *args: (upper(*args), ()), objective('lower', lower)


def check_levels(
  params: Any, inner: Any, num_blocks: int, called: str = 'inner'
) -> None:
  """Raises unless both variables are real, and ``inner`` is a table."""
  for name, tree in (('params', params), (called, inner)):
    checks.check_real_params(name, tree)
  if not jax.tree.leaves(inner):
    raise ValueError(f'{called} must have at least one leaf, got none.')
  tables.check_rows(called, inner, num_blocks)


def check_blocks(batch: Any, num_blocks: int, kind: Any) -> None:
  """Raises unless ``batch`` is of a kind, with good names of blocks."""
  checks.check_fields('batch', batch, kind._fields, f'a {kind.__name__}')
  for name in ('blocks', 'outer') if kind is PairedBlockBatch else ('blocks',):
    tables.check_blocks(getattr(batch, name), num_blocks)
    if not getattr(batch, name).size:
      raise ValueError(
        f'{name} must name at least one block, got shape (0,); skip the step,'
        f' or pad with num_blocks={num_blocks}, which is dropped.'
      )


def check_step(
  params: Any, state: Any, kind: Any, num_blocks: int, made_by: str
) -> None:
  """Raises unless the state is of this method, its blocks and parameters."""
  checks.check_fields('state', state, kind._fields, f'the state of {made_by}')
  tables.check_rows('state.inner', state.inner, num_blocks)
  checks.check_same_tree(
    'params', params, 'state.previous_params', state.previous_params
  )


def check_batch(batch: Any, num_blocks: int, kind: Any = BlockBatch) -> None:
  """Raises unless ``batch`` has blocks, and data for each of them."""
  check_blocks(batch, num_blocks, kind)
  sampled = batch.blocks.shape[0]
  tables.check_rows('batch.upper', batch.upper, sampled, 'blocks')
  tables.check_rows('batch.lower', batch.lower, sampled, 'blocks')


def check_first(batch: Any, num_blocks: int) -> None:
  """Raises unless ``batch`` is one pass over all blocks."""
  check_batch(batch, num_blocks)
  blocks, count = batch.blocks, batch.blocks.shape[0]
  if not isinstance(blocks, jax.core.Tracer):
    count = np.unique(np.asarray(blocks)[np.asarray(blocks) < num_blocks]).size
  if count != num_blocks:
    raise ValueError(
      f'first must have each of the num_blocks={num_blocks} blocks once, got'
      f' {count} blocks.'
    )
