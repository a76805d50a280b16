"""Batches that only name their examples, and passes over them in groups."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab import losses as loss_lib
from optlab.batches import _layout
from optlab.batches import _losses


class PaddedBatch(NamedTuple):
  """A batch of which only the first ``size`` examples count.

  Attributes:
    examples: Pytree of arrays with a leading axis of at least ``size``.
    size: int32 scalar, may be traced: one program serves every size.
  """

  examples: base.Batch
  size: jax.Array | np.ndarray


class ResidentBatch(NamedTuple):
  """A batch that lies in a data set on the device, as a window of an order.

  It holds the examples ``data[order[start : start + size]]``, and goes on at
  the beginning of the order where that ends; nothing is gathered before a
  microbatch is needed.

  Attributes:
    data: Pytree of arrays with a leading axis of N.
    order: int32, shape (N,), a permutation.
    start: int32 scalar, may be traced.
    size: int32 scalar, may be traced; at most N.
  """

  data: base.Batch
  order: jax.Array
  start: jax.Array
  size: jax.Array | int
  layout: _layout.Layout | None = None  # of the data over devices


@base.rows_of.register
def _(batch: PaddedBatch):
  size = _static(batch.size)
  return jax.tree.map(lambda leaf: leaf[:size], batch.examples)


@base.rows_of.register
def _(batch: ResidentBatch):
  index = _around(batch, batch.start + jnp.arange(_static(batch.size)))
  return jax.tree.map(lambda leaf: leaf[index], batch.data)


def _around(batch, positions):
  return batch.order[positions % len(batch.order)]


def _static(size):
  if isinstance(size, jax.core.Tracer):
    raise ValueError(
      'the size of the batch must be known when the step is compiled where a'
      ' loss or a curvature sees all its rows at once, got a traced size. In'
      ' growing_step take the estimator per_example, which reads them in'
      ' microbatches; without with_curvature, gns_newton takes the exact'
      ' Hessian of its value_fn.'
    )
  return int(size)


class Window(NamedTuple):
  """Examples from ``first`` on; how many is known when a program is made."""

  first: Any
  width: int


class Groups(NamedTuple):
  """How a batch falls into groups.

  Attributes:
    count: The number of groups of ``width`` examples, may be traced.
    width: Examples of a group.
    rest: Sizes of the groups behind them. Where ``count`` is traced they are
      powers of two, and those in the binary digits of what is left are there.
    size: Examples of the batch, may be traced.
    get: ``Window -> (examples, mask, index)``. The index of an example is its
      place in the data set, or in the batch where that is all there is: it does
      not depend on the groups.
  """

  count: Any
  width: int
  rest: tuple[int, ...]
  size: Any
  get: Callable[[Window], Any]

  @property
  def fills(self) -> bool:
    """Whether the last group may hold examples that do not count."""
    if self.rest:
      return False
    known = isinstance(self.size, int)
    return not known or self.count * self.width != self.size


def groups(batch, microbatch_size, wide, axis_name, exact=False) -> Groups:
  """The groups of a batch.

  Args:
    batch: Arrays, `PaddedBatch` or `ResidentBatch`.
    microbatch_size: Examples of a group; ``None`` takes all.
    wide: The dtype of masks.
    axis_name: The axis over which every device has its part of the batch.
    exact: Whether a model sees the examples of a group in their order, and no
      others; else the last group is filled up with some that its mask leaves
      out.

  Returns:
    `Groups`.
  """
  if isinstance(batch, ResidentBatch):
    length, start, size = len(batch.order), batch.start, batch.size
    if microbatch_size is None:
      raise ValueError(
        'per_example needs a microbatch_size to read a ResidentBatch: the size'
        ' of one step of the loop that passes over it.'
      )
  elif isinstance(batch, PaddedBatch):
    length, start = _losses.batch_length(batch.examples), 0
    size = batch.size
  else:
    length, start = _losses.batch_length(batch), 0
    size = length
  known = isinstance(size, (int, np.integer))
  size = int(min(size, length)) if known else jnp.minimum(size, length)
  width = min(microbatch_size or length, length)
  shard = 0 if axis_name is None else jax.lax.axis_index(axis_name)
  whole = not isinstance(batch, (ResidentBatch, PaddedBatch))

  if whole and not exact and width < length and length % width == 0:
    get = functools.partial(_strided, batch, wide, shard * length, width)
  else:
    get = functools.partial(_window, batch, wide, shard * length, start, size)
  if exact and whole:
    rest = (length % width,) if length % width else ()
    return Groups(length // width, width, rest, size, get)
  if exact:
    rest = [1 << k for k in reversed(range((width - 1).bit_length()))]
    if known:
      rest = [part for part in rest if (size % width) & part]
    return Groups(size // width, width, tuple(rest), size, get)
  count = 1 if width == length else -(-size // width)
  return Groups(count, width, (), size, get)


def _window(batch, wide, place, start, size, window):
  """Examples that lie side by side."""
  first = start + window.first
  if isinstance(batch, ResidentBatch):
    position = first + jnp.arange(window.width)
    mask = position < start + size
    index = _around(batch, position)
    examples = _layout.take(batch.data, index, batch.layout)
  else:
    examples = batch.examples if isinstance(batch, PaddedBatch) else batch
    length = _losses.batch_length(examples)
    # The last window slides back over examples that its mask leaves out.
    begin = jnp.minimum(first, length - window.width)
    position = begin + jnp.arange(window.width)
    mask = (position >= first) & (position < start + size)
    index = position
    if window.width < length and _layout.explicit(examples) is not None:
      examples = _layout.take(examples, index, None)
    elif window.width < length:
      examples = jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, begin, window.width),
        examples,
      )
  mask = _layout.like_rows(mask.astype(wide), examples)
  return examples, mask, index + place


def _strided(batch, wide, place, width, window):
  """Examples that lie apart, so that every device has some of them."""
  count, k = _losses.batch_length(batch) // width, window.first // width
  examples = jax.tree.map(lambda leaf: _layout.strided(leaf, k, count), batch)
  mask = _layout.like_rows(jnp.ones(width, wide), examples)
  return examples, mask, jnp.arange(width) * count + k + place


def vary(tree: Any, axis_name: Any) -> Any:
  """Makes arrays count as different on each device.

  Else `jax.shard_map` would sum gradients over the devices too early. XLA
  removes the selection; `jax.lax.pcast` would fail on what varies already.
  """
  here = jax.lax.axis_index(axis_name) >= 0
  return jax.tree.map(lambda leaf: jnp.where(here, leaf, leaf), tree)


class Over(NamedTuple):
  """A loss over the groups of a batch."""

  loss: loss_lib.Loss
  groups: Groups
  key: Any
  axis_name: Any
  unit: Any = None  # by which the losses are divided

  def vary(self, tree):
    return tree if self.axis_name is None else vary(tree, self.axis_name)

  def group(self, window):
    """The examples of a group, with their keys, and the mask."""
    examples, mask, index = self.groups.get(window)
    if not self.loss.has_key:
      return (examples, ()), mask
    return (
      examples,
      jax.vmap(jax.random.fold_in, (None, 0))(self.key, index),
    ), mask

  def bind(self, model_state):
    """One loss an example, of parameters and of examples with their keys."""

    def losses(params, pair):
      values = self.loss(params, model_state, *pair)[0]
      if self.unit is None or not jnp.issubdtype(values.dtype, jnp.floating):
        return values
      return values * (1 / self.unit).astype(values.dtype)

    return losses

  def rest(self, params, model_state, examples, mask):
    """The sums of the auxiliary output, and the model state after the group."""
    if not (self.loss.has_aux or self.loss.has_state):
      return (), model_state
    _, (model_state, aux) = self.loss(params, model_state, *examples)

    def total(leaf):
      if jnp.shape(leaf)[:1] != mask.shape:
        raise ValueError(
          'aux must have one row an example, a leading axis of'
          f' {mask.shape[0]}, got shape {jnp.shape(leaf)}: per_example takes'
          ' its mean over the examples.'
        )
      if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(
          f'aux must be numbers, got dtype {leaf.dtype}: per_example takes its'
          ' mean over the examples.'
        )
      wide = leaf.astype(jnp.promote_types(leaf.dtype, mask.dtype))
      return jnp.tensordot(mask.astype(wide.dtype), wide, 1)

    return jax.tree.map(total, aux), model_state

  def add_up(self, function, merge, model_state):
    """Merges ``function`` over the groups; the model state goes through."""
    count, width, rest, size, _ = self.groups
    known = isinstance(count, int)
    if known and (count, len(rest)) in ((1, 0), (0, 1)):
      return function(Window(0, width if count else rest[0]), model_state)
    function_of = functools.partial(function, Window(0, width))
    shapes, _ = jax.eval_shape(function_of, model_state)
    start = jax.tree.map(jnp.zeros_like, shapes)

    def add(window, carry):
      total, model_state = carry
      new, model_state = function(window, model_state)
      return merge(total, new), model_state

    carry = jax.lax.fori_loop(
      0,
      count,
      lambda k, carry: add(Window(k * width, width), carry),
      (self.vary(start), model_state),
    )
    first = count * width
    for part in rest:
      if known:
        carry = add(Window(first, part), carry)
        first += part
        continue
      left = size - count * width
      window = Window(first + left // (2 * part) * (2 * part), part)
      carry = jax.lax.cond(
        (left & part) > 0, functools.partial(add, window), lambda c: c, carry
      )
    return carry
