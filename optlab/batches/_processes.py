"""Reading a source in several processes, each its own part of it.

A process that stops alone leaves the others waiting in the next step. So all
agree before they take examples, and a position is that of all of them.
"""

from collections.abc import Callable
import pickle
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from optlab import base
from optlab.batches._reader import Reader
from optlab.batches._reader import StreamState


def check_sharding(sharding: Any) -> None:
  """Raises unless an array may lie on the devices of all processes."""
  if sharding is None or sharding.is_fully_addressable:
    raise ValueError(
      f'sharding must be over the devices of all {jax.process_count()}'
      f' processes, got {sharding}: take jax.NamedSharding(mesh,'
      " jax.P('data')) with a mesh of all jax.devices()."
    )


def placement(
  sharding: jax.sharding.Sharding, microbatch_size: int
) -> Callable[[np.ndarray], jax.Array]:
  """What joins the rows of all processes, in the order of their devices."""

  def put(leaf):
    shape = (microbatch_size, *leaf.shape[1:])
    return jax.make_array_from_process_local_data(sharding, leaf, shape)

  return put


def rows(reader: Reader, size: int) -> base.Batch:
  """The next examples of this process, or an error in every process.

  Args:
    reader: Of this process.
    size: Examples of each process.

  Returns:
    The examples; where one process has none, no process has lost any.
  """
  kinds = together(lambda: reader.fill(size) or zlib.crc32(reader.kind()))
  if np.any(kinds != kinds[0]):
    raise ValueError(
      'source must yield examples of one shape and dtype in every process, got'
      f' {reader.kind().decode()} in process {jax.process_index()} and others'
      ' elsewhere.'
    )
  return reader.rows(size)


def together(function: Callable[[], int]) -> np.ndarray:
  """What every process gets by a function, or an error in all of them."""
  error, found = None, 0
  try:
    found = function()
  except Exception as own:
    error = own
  table = multihost_utils.process_allgather(
    np.asarray([error is not None, found], np.uint32)
  )
  if error is not None:
    raise error
  failed = table[:, 0]
  if np.any(failed):
    raise EOFError(
      f'source has ended, or failed, in process {np.argmax(failed)}: no process'
      ' has lost an example.'
    )
  return table[:, 1]


def position(reader: Reader) -> StreamState:
  """Where all processes stand: a row a process."""
  here = reader.position()
  numbers = multihost_utils.process_allgather(np.asarray(here[:3], np.int32))
  epoch, chunks, offset = np.asarray(numbers).T
  return StreamState(epoch, chunks, offset, _sources(here.source))


def _sources(source):
  """What the sources of all processes say of themselves."""
  own = np.frombuffer(pickle.dumps(source), np.uint8)
  lengths = multihost_utils.process_allgather(np.asarray(len(own), np.int32))
  padded = np.zeros(int(np.max(lengths)), np.uint8)
  padded[: len(own)] = own
  table = multihost_utils.process_allgather(padded)
  found = [
    pickle.loads(row[:length].tobytes())
    for row, length in zip(table, lengths, strict=True)
  ]
  return None if all(one is None for one in found) else tuple(found)


def own_position(state: StreamState) -> StreamState:
  """The part of a position that is this process's.

  Raises:
    ValueError: The position is that of another number of processes.
  """
  count, index = jax.process_count(), jax.process_index()
  held = np.size(state.epoch) if np.ndim(state.epoch) else 1
  if held != count:
    raise ValueError(
      f'state must be a position of {count} processes, got one of {held}: each'
      ' reads a part of its own, so that as many go on as began.'
    )
  if count == 1:
    return state
  epoch, chunks, offset = (int(np.asarray(row)[index]) for row in state[:3])
  source = None if state.source is None else state.source[index]
  return StreamState(epoch, chunks, offset, source)
