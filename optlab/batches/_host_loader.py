"""Batches of any size from the host, padded to a few sizes.

For data that don't fit on the device; where they do, `growing_step` compiles
once and copies nothing.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import NamedTuple

import numpy as np

from optlab import base
from optlab import checks
from optlab.batches._losses import batch_length
from optlab.batches._rest import REST
from optlab.batches._rest import Rest
from optlab.batches._rest import ask
from optlab.batches._rest import order_after
from optlab.batches._rest import wrap
from optlab.batches._sizes import on_host
from optlab.batches._windows import PaddedBatch


class LoaderState(NamedTuple):
  """Where a `host_loader` stands; a checkpoint holds it."""

  seed: np.ndarray  # shape (), int64
  epoch: np.ndarray  # shape (), int64
  position: np.ndarray  # shape (), int64, where in it the next batch begins
  order: np.ndarray  # shape (N,), int64, this epoch's permutation


class HostLoader(NamedTuple):
  """A pair of functions that makes batches on the host.

  Attributes:
    init: ``seed -> LoaderState``.
    take: ``(LoaderState, batch_size) -> (PaddedBatch, LoaderState)``.
  """

  init: Callable[[int], LoaderState]
  take: Callable[[LoaderState, int], tuple[PaddedBatch, LoaderState]]


@checks.domains(batch_size=checks.Integer(), multiple_of=checks.Integer())
def bucket_sizes(
  batch_size: int, max_batch_size: int, *, multiple_of: int = 1
) -> tuple[int, ...]:
  """Sizes by doubling: at most ``log2(max / first) + 2`` programs to compile.

  Args:
    batch_size: The first size.
    max_batch_size: The last size.
    multiple_of: Every size is rounded up to a multiple of this.

  Returns:
    Increasing sizes, the last at least ``max_batch_size``.

  Raises:
    TypeError: One of them is not an integer.
    ValueError: ``batch_size`` is below 1 or above ``max_batch_size``.

  Examples:
    >>> import optlab
    >>> optlab.batches.bucket_sizes(8, 100)
    (8, 16, 32, 64, 100)
  """
  checks.enforce(bucket_sizes, locals())
  checks.check_int(
    'max_batch_size', max_batch_size, batch_size, 'It ends the list.'
  )
  sizes = []
  size = batch_size
  while size < max_batch_size:
    sizes.append(size)
    size *= 2
  sizes.append(max_batch_size)
  return tuple(sorted({size + -size % multiple_of for size in sizes}))


@checks.domains(
  gather=checks.Function('indices -> examples'),
  num_examples=checks.Integer(),
  rest=REST,
)
def host_loader(
  gather: Callable[[np.ndarray], base.Batch],
  num_examples: int,
  buckets: Sequence[int],
  *,
  rest: Rest = wrap,
) -> HostLoader:
  """Epochs of shuffled batches from the host, padded to a few sizes.

  For data that don't fit on the device. Each batch has the size of the smallest
  bucket that holds it, so that a jitted step compiles once a bucket; what is
  padded repeats the batch's first example and doesn't count. A run restarts
  exactly from its `LoaderState`.

  Args:
    gather: ``(n,) int64 indices -> examples``, a pytree of arrays with n
      examples on the leading axes; index an `numpy.memmap`, or read files.
    num_examples: The number N of examples.
    buckets: Increasing sizes, from `bucket_sizes`.
    rest: The end of an epoch, see `growing_step`.

  Returns:
    A `HostLoader`.

  Raises:
    TypeError: ``gather`` or ``rest`` is not a function.
    ValueError: ``num_examples`` is below 1, or ``buckets`` not increasing and
      positive; in ``take``, a batch size below 1 or above the last bucket, a
      state of another number of examples, and a ``gather`` that does not give
      an example an index.

  Examples:
    >>> import numpy as np, optlab
    >>> data = np.arange(10.0)
    >>> loader = optlab.host_loader(
    ...     lambda rows: data[rows], 10, optlab.batches.bucket_sizes(2, 8))
    >>> batch, state = loader.take(loader.init(0), 3)
    >>> print(batch.examples.shape, batch.size)
    (4,) 3

  Notes:
    The state holds the permutation, 8 bytes an example. For data in an order of
    their own, or so many that this is too much, see `stream`.
  """
  checks.enforce(host_loader, locals())
  if not isinstance(buckets, Sequence):
    raise TypeError(
      f'buckets must be a sequence such as bucket_sizes makes, got {buckets!r}.'
    )
  for size in buckets:
    checks.check_int('buckets', size, 1)
  if not buckets or any(b <= a for a, b in itertools.pairwise(buckets)):
    raise ValueError(f'buckets must be increasing, got {tuple(buckets)}.')

  def order(seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(num_examples)

  def init(seed):
    checks.check_int('seed', seed, 0)
    return _state(seed, 0, 0, order(seed, 0))

  def take(state, batch_size):
    size = on_host('batch_size', batch_size)
    if size > buckets[-1]:
      raise ValueError(
        f'batch_size must be at most the last bucket {buckets[-1]}, got {size}.'
      )
    if len(state.order) != num_examples:
      raise ValueError(
        f'state must be that of a loader of {num_examples} examples, got one of'
        f' {len(state.order)}: start again by init.'
      )
    seed, epoch, position = map(int, state[:3])
    size = min(size, num_examples)
    size, skipped = ask(rest, size, num_examples - position, np)
    first, now = position + skipped, state.order
    rows = now[first : first + size]
    position = first + size
    if position >= num_examples:
      epoch, position = epoch + 1, position - num_examples
      now = order_after(order(seed, epoch), now, first, position, np)
      rows = np.concatenate([rows, now[:position]])
    bucket = next(bucket for bucket in buckets if bucket >= size)
    padded = np.concatenate([rows, np.repeat(rows[:1], bucket - size)])
    examples = gather(padded)
    found = batch_length(examples)
    if found != bucket:
      raise ValueError(
        f'gather must return an example for each of the {bucket} indices, got'
        f' {found}.'
      )
    batch = PaddedBatch(examples, np.asarray(size, np.int32))
    return batch, _state(seed, epoch, position, now)

  return HostLoader(init, take)


def _state(seed, epoch, position, order):
  return LoaderState(
    *(np.asarray(leaf, np.int64) for leaf in (seed, epoch, position, order))
  )
