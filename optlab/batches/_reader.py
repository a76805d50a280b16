"""What reads a source ahead, and knows where it stands."""

from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab.batches._losses import batch_length


class StreamState(NamedTuple):
  """Where a `stream` stands; of several processes, with a row for each."""

  epoch: Any  # int, passes over the source that have ended
  chunks: Any  # int, of this pass, those that are used up
  offset: Any  # int, examples that are used of the next one
  source: Any  # what the source says of itself there, or ``None``


class _Chunk(NamedTuple):
  """An item of the source, and where it was found."""

  rows: Any
  length: int
  epoch: int
  number: int
  source: Any


class Reader:
  """The one place with a memory: an iterator, and what was read ahead."""

  def __init__(self, source, batched, prefetch, finite):
    self._source = source
    self._batched, self._prefetch, self._finite = batched, prefetch, finite
    self._begins_again = iter(source) is not source
    self._is_new, self._closed = True, False
    self._like = None
    self._thread = futures.ThreadPoolExecutor(1) if prefetch else None
    self._ahead: list[Any] = []  # what the thread will have read
    self._begin()
    self._at = StreamState(0, 0, 0, self._snapshot())

  def _begin(self):
    self._iterator = iter(self._source)
    self._epoch = self._number = 0  # of the next item
    self._held: list[_Chunk] = []  # read, and not used up
    self._offset = 0  # in the first of them

  def _snapshot(self):
    if hasattr(self._iterator, 'get_state'):
      return self._iterator.get_state()
    if hasattr(self._source, 'state_dict'):
      return self._source.state_dict()
    return None

  def _read(self) -> _Chunk | None:
    """The next chunk, or ``None`` at the end; in the thread."""
    self._is_new = False
    while True:
      at = self._snapshot()
      try:
        item = next(self._iterator)
      except StopIteration:
        if not self._begins_again:
          return None
        if self._number == 0:
          raise ValueError(
            'source must yield examples, got an empty one.'
          ) from None
        self._iterator = iter(self._source)
        self._epoch, self._number = self._epoch + 1, 0
        continue
      number, self._number = self._number, self._number + 1
      chunk = self._chunk(item, number, at)
      self._check(chunk)
      return chunk

  def _chunk(self, item, number, at) -> _Chunk:
    try:
      rows = jax.tree.map(_array, item)
      if not self._batched:
        rows = jax.tree.map(lambda leaf: leaf[None], rows)
      length = batch_length(rows)
    except (TypeError, ValueError) as error:
      kind = TypeError if isinstance(error, TypeError) else ValueError
      raise kind(
        'source must yield batches, or with batched=False examples, of arrays,'
        f' and not in item {number} of pass {self._epoch}: {error}'
      ) from error
    return _Chunk(rows, length, self._epoch, number, at)

  def _check(self, chunk):
    like = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), chunk.rows
    )
    self._like = like if self._like is None else self._like
    where = f'item {chunk.number} of pass {chunk.epoch}'
    if like != self._like:
      raise ValueError(
        f'source must yield examples of one shape and dtype, {self._like} at'
        f' first, got {like} in {where}.'
      )
    for path, leaf in jax.tree.leaves_with_path(chunk.rows):
      fault = _fault(leaf, self._finite)
      if fault:
        raise ValueError(
          f'source must yield {fault} in {where}{jax.tree_util.keystr(path)}:'
          ' leave such examples out'
          + (', or pass finite=False.' if 'finite' in fault else '.')
        )

  def _next(self):
    if self._thread is None:
      return self._read()
    while len(self._ahead) <= self._prefetch:
      self._ahead.append(self._thread.submit(self._read))
    return self._ahead.pop(0).result()

  def fill(self, size: int) -> None:
    """Reads until so many examples are held; on an error none is lost."""
    if self._closed:
      raise ValueError('stream is closed, it takes no more examples.')
    have = sum(chunk.length for chunk in self._held) - self._offset
    while have < size:
      chunk = self._next()
      if chunk is None:
        raise EOFError(
          f'source has ended, with {have} examples left of {size}: take those,'
          ' or pass an iterable that begins again, such as a list or a loader.'
        )
      self._held.append(chunk)
      have += chunk.length

  def rows(self, size: int) -> base.Batch:
    """The next examples; on an error none of them is lost."""
    self.fill(size)
    parts = []
    while size:
      chunk = self._held[0]
      if self._offset == chunk.length:
        self._held.pop(0)
        self._offset = 0
        continue
      cut = slice(self._offset, min(self._offset + size, chunk.length))
      parts.append(jax.tree.map(lambda leaf, cut=cut: leaf[cut], chunk.rows))
      size -= cut.stop - cut.start
      self._offset = cut.stop
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

  def kind(self) -> bytes:
    """Structure, shapes and dtypes of an example."""
    return str(self._like).encode()

  def position(self) -> StreamState:
    """Of the next example."""
    if not self._held:
      return self._at
    chunk = self._held[0]
    return StreamState(chunk.epoch, chunk.number, self._offset, chunk.source)

  def seek(self, state: StreamState) -> None:
    """Goes on at a position."""
    if min(map(int, state[:3])) < 0:
      raise ValueError(
        f'state must be a position, numbers of at least 0, got {state}.'
      )
    if not (self._begins_again or self._is_new):
      raise ValueError(
        'source must be new where a stream goes on at a position, got an'
        ' iterator that has been read: make it, and the stream, again.'
      )
    self._cancel()
    self._begin()
    self._at, there = state, tuple(map(int, state[:2]))
    if state.source is not None:
      if hasattr(self._iterator, 'set_state'):
        self._iterator.set_state(state.source)
      else:
        self._source.load_state_dict(state.source)
        self._iterator = iter(self._source)
      self._epoch, self._number = there
    elif there == (0, 0) and not state.offset:
      return
    here, length = (-1, 0), 0
    while here < there:
      chunk = self._read()
      if chunk is None:
        break
      here, length = (chunk.epoch, chunk.number), chunk.length
      self._held = [chunk]
    self._offset = int(state.offset)
    if here != there or length < state.offset:
      raise ValueError(
        f'source must have the item {there[1]} of pass {there[0]} that it had,'
        ' got fewer, or shorter ones.'
      )

  def _cancel(self):
    for future in self._ahead:
      future.cancel()
    futures.wait(self._ahead)
    self._ahead = []

  def close(self) -> None:
    """Ends the thread."""
    self._cancel()
    self._closed = True
    if self._thread is not None:
      self._thread.shutdown(wait=False)


def _array(leaf: Any) -> np.ndarray:
  if np.ma.is_masked(leaf):
    raise ValueError(
      'source must yield whole arrays, got a masked one, whose hidden entries'
      ' would be used: fill or drop them.'
    )
  return np.asarray(leaf)


def _fault(leaf: np.ndarray, finite: bool) -> str:
  """What is wrong with an array on its way to the device, or nothing."""
  if not jnp.issubdtype(leaf.dtype, np.number) and leaf.dtype != bool:
    return f'numbers, got {leaf.dtype}'
  there = jax.dtypes.canonicalize_dtype(leaf.dtype)
  with np.errstate(over='ignore'):
    arrived = leaf.astype(there)
  if jnp.issubdtype(there, np.inexact):
    lost = finite and not np.all(np.isfinite(arrived))
    return 'finite numbers, got others' if lost else ''
  same = there == leaf.dtype or np.array_equal(arrived, leaf)
  return '' if same else f'integers within {there}, got others'
