"""The tables of `bsvrb`: a row for each block, as of its last visit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import _growth
from optlab import base
from optlab import checks
from optlab import trees
from optlab.multi_block import _clock
from optlab.multi_block import _dual
from optlab.multi_block import _guard
from optlab.multi_block import _info
from optlab.multi_block import _swing


class BSVRBState(NamedTuple):
  """State of `bsvrb`. Tables have a leading axis ``num_blocks``."""

  step: jax.Array  # shape (), int32, steps that were not rejected
  hypergrad: base.Updates  # like params: z
  previous_params: base.Params  # x one step ago
  clock: jax.Array  # shape (2, 2), sum of step sizes now and one step ago
  touched: jax.Array  # shape (num_blocks, 2), the clock at the last visit
  visited: jax.Array  # shape (num_blocks,), int32, 1 + last visit; -1: never
  inner: base.ArrayTree  # y at the block's last visit, see inner_variables
  inner_grad: base.ArrayTree  # like inner: s
  dual: Any  # ProductState or HessianState
  pace: _guard.Pace  # what a block can bear
  rise: jax.Array  # shape (3,), how y and its gradients grow
  swing: jax.Array  # shape (7,), how y follows x
  info: _info.BSVRBInfo


def start(
  params: base.Params, inner: base.ArrayTree, dual: _dual.Dual
) -> BSVRBState:
  """The state before the first step; it owns what it is given."""
  dtype = trees.accumulator_dtype(inner)
  return BSVRBState(
    step=jnp.zeros((), jnp.int32),
    hypergrad=trees.zeros_accumulator(params),
    previous_params=params,
    clock=jnp.zeros((2, 2), dtype),
    touched=trees.zeros_rows(inner, (2,), dtype),
    visited=trees.zeros_rows(inner, (), jnp.int32) - 1,
    inner=inner,
    inner_grad=trees.zeros_accumulator(inner),
    dual=dual.init(inner),
    pace=_guard.start(inner),
    rise=_growth.start(dtype),
    swing=_swing.start(dtype),
    info=_info.start(inner),
  )


CHUNK = 1024  # Blocks of the first pass that are in memory at once.


def in_chunks(visit, state, first, num_blocks):
  """The state after a visit of all blocks, some at a time."""
  size = min(num_blocks, CHUNK)

  def turn(index, state):
    start = jnp.minimum(index * size, num_blocks - size)
    batch = jax.tree.map(
      lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), first
    )
    # The last chunk reaches back into the one before.
    seen = start + jnp.arange(size) < index * size
    blocks = jnp.where(seen, num_blocks, batch.blocks)
    return visit(state, batch._replace(blocks=blocks))

  if size == num_blocks:
    return visit(state, first)
  return jax.lax.fori_loop(0, -(-num_blocks // size), turn, state)


def inner_variables(state: BSVRBState) -> base.ArrayTree:
  """The lower variables of all blocks as of now, for evaluation.

  Args:
    state: State of `bsvrb`.

  Returns:
    Pytree like ``inner``, leading axis ``num_blocks``. Cost: all blocks.

  Raises:
    TypeError: ``state`` is not the state of `bsvrb`.
  """
  _check_state(state)
  elapsed = _elapsed(state)
  return _clock.advance(state.inner, state.inner_grad, elapsed)


def dual_variables(state: BSVRBState) -> base.ArrayTree:
  """The dual variables of all blocks as of now, before any projection.

  Args:
    state: State of `bsvrb` with `track_products`.

  Returns:
    Pytree like ``inner``, leading axis ``num_blocks``. Cost: all blocks.

  Raises:
    TypeError: ``state`` is not the state of `bsvrb` with `track_products`.
  """
  _check_state(state)
  checks.check_fields(
    'state.dual',
    state.dual,
    _dual.ProductState._fields,
    'the state of track_products()',
  )
  elapsed = _elapsed(state)
  return _clock.advance(state.dual.dual, state.dual.residual, elapsed)


def _elapsed(state):
  return state.pace.scale * _clock.elapsed(state.clock, state.touched)[0]


def _check_state(state):
  checks.check_fields('state', state, BSVRBState._fields, 'the state of bsvrb')
