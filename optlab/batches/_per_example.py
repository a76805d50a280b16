"""An estimator that knows how much the gradients of its examples differ."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab import checks
from optlab import trees
from optlab.batches import _moments
from optlab.estimators import stateless


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

  It holds the examples ``data[order[start : start + size]]``; nothing is
  gathered before a microbatch is needed.

  Attributes:
    data: Pytree of arrays with a leading axis of N.
    order: int32, shape (N,), a permutation.
    start: int32 scalar, may be traced.
    size: int32 scalar, may be traced; ``start + size <= N``.
  """

  data: base.Batch
  order: jax.Array
  start: jax.Array
  size: jax.Array | int


def _groups(batch, microbatch_size, wide):
  """``(number of groups, size, k -> (examples, mask) of group k)``."""
  if isinstance(batch, ResidentBatch):
    length, start, size = len(batch.order), batch.start, batch.size
    if microbatch_size is None:
      raise ValueError(
        'per_example needs a microbatch_size to read a ResidentBatch: the size'
        ' of one step of the loop that passes over it.'
      )
  elif isinstance(batch, PaddedBatch):
    length, start = _moments.batch_length(batch.examples), 0
    size = batch.size
  else:
    length, start = _moments.batch_length(batch), 0
    size = length
  width = min(microbatch_size or length, length)

  def get(k):
    # The last window slides back over examples that its mask leaves out.
    first = start + k * width
    begin = jnp.minimum(first, length - width)
    position = begin + jnp.arange(width)
    mask = (position >= first) & (position < start + size)
    if isinstance(batch, ResidentBatch):
      chosen = jax.lax.dynamic_slice_in_dim(batch.order, begin, width)
      examples = jax.tree.map(lambda leaf: leaf[chosen], batch.data)
    else:
      examples = batch.examples if isinstance(batch, PaddedBatch) else batch
      if width < length:
        examples = jax.tree.map(
          lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, begin, width),
          examples,
        )
    return examples, mask.astype(wide)

  count = 1 if width == length else -(-size // width)
  return count, size, get


def vary(tree: Any, axis_name: Any) -> Any:
  """Makes arrays count as different on each device.

  Else `jax.shard_map` would sum gradients over the devices too early. XLA
  removes the selection; `jax.lax.pcast` would fail on what varies already.
  """
  here = jax.lax.axis_index(axis_name) >= 0
  return jax.tree.map(lambda leaf: jnp.where(here, leaf, leaf), tree)


@checks.domains(
  losses=checks.Function('(params, examples) -> (n,) losses'),
  moments=checks.Function('such as optlab.ghost_norms'),
  inner_products=checks.Function(
    'such as optlab.batches.jvp_inner_products', optional=True
  ),
  microbatch_size=checks.Integer(optional=True),
)
def per_example(
  losses: _moments.Losses,
  moments: _moments.Route = _moments.vmap_grads,
  *,
  inner_products: _moments.InnerProducts | None = None,
  microbatch_size: int | None = None,
  axis_name: Any = None,
) -> base.GradientEstimator:
  r"""The mean gradient of a batch, with moments of its per-example gradients.

  It makes what the tests of `grow_batch` take:

  ========================= ================================================
  extra argument            what it is, for a mean gradient g of n examples
  ========================= ================================================
  ``sample_size``           n, an int32 scalar (optax's name)
  ``sum_sq_diff_grads``     tree, :math:`\sum_i (g_i - g)^2` per coordinate
                            (optax's name)
  ``sum_sq_diff_norm``      scalar, :math:`\sum_i \|g_i - g\|^2`
  ``sum_sq_diff_inner``     scalar, :math:`\sum_i (\langle g_i, g\rangle -
                            \|g\|^2)^2`
  ========================= ================================================

  ===================== ============================== ======================
  ``moments``           right for                      knows
  ===================== ============================== ======================
  `vmap_grads`          every model                    grads and norm
  `ghost_norms`         models without shared weights  norm
  `microbatch_means`    every model, as an estimate    norm
  `plain_grads`         every model                    neither
  ===================== ============================== ======================

  ``inner_products=jvp_inner_products`` adds ``sum_sq_diff_inner`` to any of
  them, by a second pass over the batch.

  Args:
    losses: ``(params, examples) -> (n,)``, one loss per example; examples is a
      pytree with the n examples on the leading axes. Loss i may depend on
      example i alone.
    moments: The route to the second moments, one of the functions above.
    inner_products: `jvp_inner_products`, `vmap_inner_products`, or ``None``.
    microbatch_size: Examples in one step of the loop over the batch; ``None``
      takes the batch at once.
    axis_name: Axis of `jax.shard_map` or `jax.vmap` over which every device
      holds its part of the batch; moments are merged over it. Not needed where
      `jax.jit` shards the batch.

  Returns:
    A `GradientEstimator` without memory. Its batch is a pytree of arrays,
    `PaddedBatch`, or `ResidentBatch`.

  Raises:
    TypeError: ``losses`` or a route is not a function, or ``microbatch_size``
      not an integer.
    ValueError: ``microbatch_size`` is below 1, `microbatch_means` has none or
      gets fewer than two microbatches, or ``losses`` doesn't return one number
      an example.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> losses = lambda x, rows: (rows @ x - 1.0) ** 2
    >>> estimator = optlab.per_example(losses, optlab.ghost_norms)
    >>> x = jnp.zeros(2)
    >>> estimate, _ = estimator.estimate(x, estimator.init(x), jnp.eye(2))
    >>> print(estimate.value, estimate.grads)
    1.0 [-1. -1.]
    >>> for name, value in sorted(estimate.extras.items()):
    ...   print(name, value)
    sample_size 2
    sum_sq_diff_norm 4.0

  Notes:
    Microbatches and devices are merged exactly: squared norms as sums, central
    moments by Chan's formula. Cost: see the routes; with ``inner_products`` a
    second pass over the batch.
  """
  checks.enforce(per_example, locals())
  is_means = moments is _moments.microbatch_means
  if is_means and microbatch_size is None:
    raise ValueError(
      'microbatch_means needs a microbatch_size, at most half of the batch'
      ' size.'
    )

  def add_up(function: Callable[[int | jax.Array], Any], count, merge):
    if isinstance(count, int) and count == 1:
      return function(0)
    shapes = jax.eval_shape(function, 0)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if axis_name is not None:
      start = vary(start, axis_name)
    return jax.lax.fori_loop(
      0, count, lambda k, total: merge(total, function(k)), start
    )

  def estimate(params, batch):
    wide = jnp.finfo(trees.accumulator_dtype(params)).dtype
    count, size, get = _groups(batch, microbatch_size, wide)
    if (
      microbatch_size is not None
      and is_means
      and isinstance(size, (int, np.integer))
      and size < 2 * microbatch_size
    ):
      raise ValueError(
        'microbatch_means needs at least two microbatches: a batch of at least'
        f' {2 * microbatch_size} examples for microbatch_size='
        f'{microbatch_size}, got {size}. Lower microbatch_size, or start with a'
        ' larger batch_size.'
      )
    local = params if axis_name is None else vary(params, axis_name)

    def group(k):
      result = moments(losses, local, *get(k))
      # Sizes alone don't vary over devices; the merged groups do.
      return result if axis_name is None else vary(result, axis_name)

    result = add_up(group, count, _moments.merge)
    if axis_name is not None:
      result = _moments.merge_over(result, axis_name)
    result = _moments.centred(result)
    # What K units say about the sum over n examples.
    spread = (result.count - 1.0) / (result.units - 1.0)
    extras = {
      'sum_sq_diff_grads': result.sum_sq_diff_grads,
      'sum_sq_diff_norm': result.sum_sq_diff_norm,
    }
    extras = jax.tree.map(lambda leaf: spread * leaf, extras)

    if inner_products is not None:
      direction = result.grads
      if axis_name is not None:
        direction = vary(direction, axis_name)

      def sums(k):
        rest = inner_products(losses, local, direction, *get(k))
        return jnp.sum(rest), jnp.sum(jnp.square(rest))

      total = add_up(sums, count, lambda a, b: jax.tree.map(jnp.add, a, b))
      if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
      # The first is 0 but for the rounding of the mean gradient.
      excess = jnp.square(total[0]) / jnp.maximum(result.count, 1.0)
      extras['sum_sq_diff_inner'] = total[1] - excess

    extras = {name: leaf for name, leaf in extras.items() if leaf is not None}
    extras['sample_size'] = result.count.astype(jnp.int32)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), result.grads, params)
    return base.Estimate(result.value, grads, extras)

  return stateless(estimate)
