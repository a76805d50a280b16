r"""A training step for batches that grow, compiled once for all sizes.

The data stay on the device, and a batch is passed over in microbatches, as many
as it has. For data that don't fit, see `optlab.host_loader`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab import base
from optlab import checks
from optlab import training
from optlab.batches._growth import next_size
from optlab.batches._growth import rules_of
from optlab.batches._layout import Layout
from optlab.batches._layout import layout_of
from optlab.batches._layout import permutation
from optlab.batches._losses import batch_length
from optlab.batches._rest import REST
from optlab.batches._rest import Rest
from optlab.batches._rest import ask
from optlab.batches._rest import order_after
from optlab.batches._rest import wrap
from optlab.batches._sizes import is_static
from optlab.batches._sizes import local_size
from optlab.batches._windows import ResidentBatch
from optlab.batches._windows import vary


class EpochState(NamedTuple):
  """Where a run stands in its data; checkpoints with the rest of the state."""

  key: jax.Array  # shape (), typed PRNG key, never changes
  order: jax.Array  # shape (N,), int32, this epoch's permutation
  epoch: jax.Array  # shape (), int32
  position: jax.Array  # shape (), int32, where in it the next batch begins
  layout: Layout | None = None  # of the data over devices, no array


class GrowingState(NamedTuple):
  """All that `growing_step` carries from step to step."""

  train: training.TrainState
  epochs: EpochState


def _order(key, epoch, shard, *args):
  key = jax.random.fold_in(jax.random.fold_in(key, epoch), shard)
  return permutation(key, *args)


@checks.domains(
  estimator=checks.ESTIMATOR,
  tx=checks.TRANSFORMATION,
  num_shards=checks.Integer(),
)
def growing_init(
  params: base.Params,
  estimator: base.GradientEstimator,
  tx: optax.GradientTransformation,
  data: base.Batch,
  key: jax.Array,
  *inner: base.ArrayTree,
  num_shards: int = 1,
) -> GrowingState:
  """The state before the first `growing_step`.

  Args:
    params: The parameters.
    estimator: From `per_example`, with a ``microbatch_size``.
    tx: Any optax transformation, with or without a `grow_batch`.
    data: The data set, a pytree of arrays with N examples on the leading axes.
      Where they are split over devices, every device will do its part of each
      microbatch.
    key: PRNG key of the permutations.
    *inner: What ``estimator.init`` takes after the parameters: model state, the
      key of the run.
    num_shards: Devices over which `data` is split by `jax.shard_map`.

  Returns:
    A `GrowingState`.

  Raises:
    TypeError: ``estimator`` is not a `GradientEstimator`, ``tx`` not an optax
      transformation, or ``num_shards`` not an integer.
    ValueError: The data have no common leading axis, are fewer than the
      ``max_batch_size`` of `grow_batch`; they or the first batch are not
      divisible by ``num_shards``; or the first batch is too small for the
      estimator.
  """
  checks.enforce(growing_init, locals())
  key = checks.as_key('key', key)
  length = batch_length(data)
  if length % num_shards:
    raise ValueError(
      f'data must split evenly over num_shards={num_shards}, got {length}'
      f' examples: leave out {length % num_shards}.'
    )
  state = training.init(params, estimator, tx, *inner)
  start = jnp.zeros((), jnp.int32)
  rules = rules_of(state.opt_state)
  for rule in rules:
    largest = rule.max_batch_size
    if is_static(largest) and np.max(largest) > length:
      raise ValueError(
        f'max_batch_size must be at most the {length} examples of data, got'
        f' {np.max(largest)}.'
      )
  size = next_size(state.opt_state) if rules else None
  if size is not None and is_static(size):
    first = int(np.min(local_size(size, num_shards, 'num_shards')))
    local = length // num_shards
    if num_shards == 1:
      # Nothing runs: the estimator sees a size that it can refuse.
      jax.eval_shape(
        lambda data, order: estimator.estimate(
          params,
          state.estimator_state,
          ResidentBatch(data, order, start, first),
        ),
        data,
        jax.ShapeDtypeStruct((local,), jnp.int32),
      )
  orders = [
    _order(key, start, shard, length // num_shards)
    for shard in range(num_shards)
  ]
  # Two buffers, so that the state can be donated.
  position = jnp.zeros((), jnp.int32)
  return GrowingState(
    state,
    EpochState(
      key,
      jnp.concatenate(orders),
      start,
      position,
      layout_of(data) if num_shards == 1 else None,
    ),
  )


@checks.domains(
  estimator=checks.ESTIMATOR,
  tx=checks.TRANSFORMATION,
  batch_size=checks.Integer(traced=True, optional=True),
  rest=REST,
)
def growing_step(
  estimator: base.GradientEstimator,
  tx: optax.GradientTransformation,
  *,
  batch_size: int | jax.Array | None = None,
  rest: Rest = wrap,
  axis_name: str | None = None,
) -> Callable[[GrowingState, base.Batch], tuple[GrowingState, jax.Array]]:
  r"""A training step whose batch size lies in the optimizer's state.

  It takes the next examples of the epoch's permutation, as many as the rule in
  ``tx`` asks for, and passes over them in microbatches: a loop whose number of
  rounds is traced, so that one compilation serves the whole run from the first
  batch size to N. Pure: jit it with the state donated, scan it, vmap it over
  seeds.

  Args:
    estimator: From `per_example`, with a ``microbatch_size``.
    tx: Any optax transformation; where it has no `grow_batch`, pass
      ``batch_size``.
    batch_size: A constant size, which may be traced; ``None`` reads
      ``batch_size`` from the state of ``tx``.
    rest: What becomes of the end of an epoch that is less than a batch:
      `batches.wrap` goes on in the next epoch, `batches.keep` makes a smaller
      batch of it, `batches.drop` leaves it out.
    axis_name: Axis of `jax.shard_map` over which data and permutation are
      split; each device takes an equal part of the batch. The estimator needs
      the same, and `grow_batch` a ``multiple_of`` the number of devices.

  Returns:
    ``step(state, data) -> (state, value)``, with the loss before the step.

  Raises:
    TypeError: ``estimator`` is not a `GradientEstimator`, ``tx`` not an optax
      transformation, or ``batch_size`` not an integer.
    ValueError: Neither ``tx`` nor the argument gives a batch size; in the step,
      ``data`` of another length than `growing_init` saw, or fewer than
      ``batch_size``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> losses = lambda x, rows: (rows @ x - 1.0) ** 2
    >>> estimator = optlab.per_example(
    ...     losses, optlab.ghost_norms, microbatch_size=8)
    >>> tx = optlab.adadagrad(0.1, optlab.norm_test(0.5), 8, 100)
    >>> rows = jax.random.normal(jax.random.key(0), (100, 3))
    >>> state = optlab.growing_init(
    ...     jnp.zeros(3), estimator, tx, rows, jax.random.key(1))
    >>> step = jax.jit(optlab.growing_step(estimator, tx), donate_argnums=0)
    >>> for _ in range(3):
    ...   size = int(optlab.batches.next_size(state))
    ...   state, value = step(state, rows)
    ...   print(size, f'{value:.2f}')
    8 1.00
    32 1.04
    88 1.02

  Notes:
    Under `jax.vmap` the loop runs as long as the largest batch among the seeds;
    a permutation is drawn only in steps where one of them ends its epoch.

    The number of samples so far is ``epoch * N + position``, in Python integers
    where it may pass 2^31, and with `batches.drop` counts those left out.
  """
  checks.enforce(growing_step, locals())
  train_step = training.train_step(estimator, tx)

  def step(state, data):
    train, epochs = state
    length = len(epochs.order)
    if batch_length(data) != length:
      raise ValueError(
        f'data must have the {length} examples that growing_init saw, got'
        f' {batch_length(data)}: start again by growing_init.'
      )
    # Of numpy's arrays, where they are constants, a traced index takes no rows.
    data = jax.tree.map(jnp.asarray, data)
    size = batch_size
    if size is None and rules_of(train.opt_state):
      size = next_size(train.opt_state)
    if size is None:
      raise ValueError(
        'growing_step needs a batch size: put grow_batch into tx, or pass'
        ' batch_size.'
      )
    shard = 0
    if axis_name is not None:
      shard = jax.lax.axis_index(axis_name)
      size = local_size(size, jax.lax.axis_size(axis_name), 'axis_name')
    if is_static(size) and np.max(size) > length:
      raise ValueError(
        f'batch_size must be at most the {length} examples of data, got'
        f' {np.max(size)}.'
      )
    # What is traced and larger takes all examples, and one if it is below 1.
    size = jnp.clip(jnp.asarray(size, jnp.int32), 1, length)
    taken, skipped = ask(rest, size, length - epochs.position)
    first = epochs.position + skipped
    end = first + taken

    def draw(carry):
      next_epoch = epochs.epoch + 1
      order = _order(epochs.key, next_epoch, shard, length, data, epochs.layout)
      order = order_after(order, epochs.order, first, end - length)
      return order if axis_name is None else vary(order, axis_name), False

    # A loop of at most one round, because vmap turns lax.cond into a select
    # that would draw a permutation in every step.
    ends = end >= length
    order, _ = jax.lax.while_loop(
      lambda carry: carry[1], draw, (epochs.order, ends)
    )
    # The batch goes on where the next order begins.
    window = jnp.where(jnp.arange(length) < first, order, epochs.order)
    batch = ResidentBatch(data, window, first, taken, epochs.layout)
    train, value = train_step(train, batch)
    epochs = epochs._replace(
      order=order,
      epoch=epochs.epoch + ends,
      position=jnp.where(ends, end - length, end),
    )
    return GrowingState(train, epochs), value

  return step


def growing_specs(axis_name: str) -> GrowingState:
  """Partition specs of a `GrowingState` for `jax.shard_map`.

  Args:
    axis_name: The axis over which data and permutation are split.

  Returns:
    A prefix tree: the permutation is split, all else the same everywhere.

  Raises:
    TypeError: ``axis_name`` is not a string.
  """
  if not isinstance(axis_name, str):
    raise TypeError(
      f'axis_name must be the name of a mesh axis, got {axis_name!r} of type'
      f' {type(axis_name).__name__}.'
    )
  everywhere: Any = jax.P()
  split: Any = jax.P(axis_name)
  return GrowingState(
    train=everywhere,
    epochs=EpochState(everywhere, split, everywhere, everywhere),
  )
