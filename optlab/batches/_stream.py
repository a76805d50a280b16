"""Batches from a source that can only be read forward.

For data in an order of their own: files that are read one after the other, a
generator, a loader of another library. Where examples can be fetched by their
index, see `optlab.host_loader`.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from optlab import checks
from optlab.batches import _processes
from optlab.batches import _sizes
from optlab.batches._reader import Reader
from optlab.batches._reader import StreamState
from optlab.batches._windows import PaddedBatch


class Stream(NamedTuple):
  """Functions that read a source; what they share is not pure.

  Attributes:
    take: ``size -> PaddedBatch`` of the next examples, of constant shape.
    position: ``() -> StreamState``, of the next example.
    seek: Goes on at a `StreamState`.
    close: Ends the reading ahead.
    microbatch_size: The largest ``size``.
  """

  take: Callable[[int], PaddedBatch]
  position: Callable[[], StreamState]
  seek: Callable[[StreamState], None]
  close: Callable[[], None]
  microbatch_size: int


class _Iterable(NamedTuple):
  """A domain: what can be read forward."""

  optional: bool = False

  def check(self, name: str, value: Any) -> None:
    """Raises unless ``value`` is in the domain."""
    if not hasattr(value, '__iter__') or isinstance(value, (str, bytes, dict)):
      raise TypeError(
        f'{name} must be an iterable of examples or batches, such as a list or'
        f' a loader, got {value!r} of type {type(value).__name__}.'
      )


@checks.domains(
  source=_Iterable(),
  microbatch_size=checks.Integer(),
  prefetch=checks.Integer(0),
)
def stream(
  source: Iterable[Any],
  microbatch_size: int,
  *,
  batched: bool = True,
  prefetch: int = 2,
  sharding: jax.sharding.Sharding | None = None,
  finite: bool = True,
) -> Stream:
  """Microbatches of one shape from any iterable: grain, a DataLoader, a list.

  A thread reads ahead while the device works. `stream_step` takes as many
  microbatches as a batch has.

  Args:
    source: An iterable of pytrees of arrays (of torch too). One that can be
      iterated again, such as a loader, begins again where it ends; an iterator
      or a generator ends.
    microbatch_size: The most examples that are on the device at once.
    batched: Whether the source yields batches, of any lengths, with the
      examples on the leading axes; ``False`` for single examples.
    prefetch: How many items of the source are read ahead; 0 for no thread.
    sharding: Of the leading axis over devices; ``None`` for the default device.
    finite: Whether a number that is not finite is an error.

  Returns:
    A `Stream`.

  Raises:
    TypeError: ``source`` is not iterable, or a size not an integer.
    ValueError: ``microbatch_size`` is below 1 or no multiple of the devices of
      ``sharding``, ``prefetch`` is below 0, or ``sharding`` not over all of
      several processes. In ``take``: a size below 1 or above
      ``microbatch_size``; the source is empty, yields examples of other
      shapes or dtypes than its first ones, or what the device would not have as
      finite numbers (1e300, or 2^40 as an integer, without 64 bits). In
      ``seek``: the source has been read and cannot begin again, or ends too
      early.
    EOFError: In ``take``, the source has ended: no example is lost, and as many
      as are left can be taken.

  Examples:
    >>> import numpy as np, optlab
    >>> files = [np.arange(3.0), np.arange(3.0, 5.0)]
    >>> stream = optlab.batches.stream(files, 4)
    >>> for size in (4, 2):
    ...   batch = stream.take(size)
    ...   print(batch.examples, batch.size)
    [0. 1. 2. 3.] 4
    [4. 0. 4. 4.] 2
    >>> stream.position()
    StreamState(epoch=1, chunks=0, offset=1, source=None)
    >>> stream.close()

  Notes:
    A source is positioned by its iterator's ``get_state`` and ``set_state``
    (grain) or its own ``state_dict`` and ``load_state_dict`` (torchdata), if it
    has them: then `StreamState.source` is what they give. Else ``seek`` reads a
    new source again up to the place, which is right where it repeats itself.

    In several processes each has a source of its own, with its part of the
    data, and gives an equal part of every microbatch, in the order of the
    devices; ``take``, ``position`` and ``seek`` are then called by all. Sizes
    are multiples of ``microbatch_size`` (``multiple_of`` of `grow_batch`).
    Where one source ends or fails, every process raises and none loses an
    example. A `StreamState` has a row a process.
  """
  checks.enforce(stream, locals())
  several = jax.process_count() > 1
  put = _placement(microbatch_size, sharding)
  reader = Reader(source, batched, prefetch, finite)

  def take(size):
    size = _sizes.on_host('size', size)
    if size > microbatch_size:
      raise ValueError(
        f'size must be at most microbatch_size={microbatch_size}, got {size}:'
        ' stream_step takes larger batches in parts.'
      )
    if several and size < microbatch_size:
      raise ValueError(
        f'size must be microbatch_size={microbatch_size} in several processes,'
        f' got {size}: batch sizes must be multiples of it, as by'
        f' multiple_of={microbatch_size} in grow_batch.'
      )
    if several:
      rows = _processes.rows(reader, size // jax.process_count())
    else:
      rows = reader.rows(size)

    def pad(leaf):
      fill = np.repeat(leaf[:1], microbatch_size - size, 0)
      return put(np.concatenate([leaf, fill]))

    return PaddedBatch(jax.tree.map(pad, rows), np.asarray(size, np.int32))

  def position():
    return _processes.position(reader) if several else reader.position()

  def seek(state):
    if not isinstance(state, StreamState):
      raise TypeError(
        f'state must be a StreamState, of position(), got {state!r}.'
      )
    go = lambda: reader.seek(_processes.own_position(state)) or 0
    _ = _processes.together(go) if several else go()

  return Stream(take, position, seek, reader.close, microbatch_size)


def _placement(microbatch_size, sharding):
  if jax.process_count() > 1:
    _processes.check_sharding(sharding)
  if sharding is None:
    return lambda leaf: leaf
  try:
    sharding.shard_shape((microbatch_size,))
  except ValueError as error:
    raise ValueError(
      f'microbatch_size must be a multiple of the devices of {sharding}, got'
      f' {microbatch_size}.'
    ) from error
  if jax.process_count() > 1:
    return _processes.placement(sharding, microbatch_size)
  return lambda leaf: jax.device_put(leaf, sharding)
