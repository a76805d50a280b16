"""An estimator that knows how much the gradients of its examples differ."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab import checks
from optlab import losses as loss_lib
from optlab import trees
from optlab.batches import _layout
from optlab.batches import _losses
from optlab.batches import _moments


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
  layout: _layout.Layout | None = None  # of the data over devices


@base.rows_of.register
def _(batch: PaddedBatch):
  size = _static(batch.size)
  return jax.tree.map(lambda leaf: leaf[:size], batch.examples)


@base.rows_of.register
def _(batch: ResidentBatch):
  index = jax.lax.dynamic_slice_in_dim(
    batch.order, batch.start, _static(batch.size)
  )
  return jax.tree.map(lambda leaf: leaf[index], batch.data)


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


def _groups(batch, microbatch_size, wide, axis_name, in_order=False):
  """Number of groups, size, and ``k -> (examples, mask, index)``.

  The index of an example is its place in the data set, or in the batch where
  that is all there is: it does not depend on the groups.
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
  width = min(microbatch_size or length, length)
  shard = 0 if axis_name is None else jax.lax.axis_index(axis_name)

  def get(k):
    # The last window slides back over examples that its mask leaves out.
    first = start + k * width
    begin = jnp.minimum(first, length - width)
    position = begin + jnp.arange(width)
    mask = (position >= first) & (position < start + size)
    if isinstance(batch, ResidentBatch):
      index = jax.lax.dynamic_slice_in_dim(batch.order, begin, width)
      examples = _layout.take(batch.data, index, batch.layout)
    else:
      index = position
      examples = batch.examples if isinstance(batch, PaddedBatch) else batch
      if width < length and _layout.explicit(examples) is not None:
        examples = _layout.take(examples, index, None)
      elif width < length:
        examples = jax.tree.map(
          lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, begin, width),
          examples,
        )
    mask = _layout.like_rows(mask.astype(wide), examples)
    return examples, mask, index + shard * length

  def get_strided(k):
    groups = length // width
    examples = jax.tree.map(
      lambda leaf: _layout.strided(leaf, k, groups), batch
    )
    return (
      examples,
      _layout.like_rows(jnp.ones(width, wide), examples),
      jnp.arange(width) * groups + k + shard * length,
    )

  count = 1 if width == length else -(-size // width)
  whole = not isinstance(batch, (ResidentBatch, PaddedBatch))
  if whole and not in_order and width < length and length % width == 0:
    get = get_strided
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
  layers: bool = False,
  has_aux: bool = False,
  has_state: bool = False,
  has_key: bool = False,
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
  ``sum_sq_diff_norms``     tree of scalars, the same by array; if ``layers``
  ``sum_sq_diff_inner``     scalar, :math:`\sum_i (\langle g_i, g\rangle -
                            \|g\|^2)^2`
  ========================= ================================================

  ===================== ============================== ======================
  ``moments``           right for                      knows
  ===================== ============================== ======================
  `vmap_grads`          every model                    grads and norm
  `ghost_norms`         every model, dense ones cheap  norm
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
    layers: Whether to add ``sum_sq_diff_norms``, which has the norm's sum for
      each array of the parameters.
    has_aux: Whether ``losses`` returns auxiliary output too, see
      `value_and_grad`; with one row an example. `Estimate.aux` is its mean.
    has_state: Whether the model has state, see `value_and_grad`. It goes
      through the microbatches one after the other. Losses that see it change
      within a batch (batch normalization that trains) are those of
      microbatches, which `microbatch_means` and `plain_grads` take.
    has_key: Whether the losses are random. ``losses`` gets an array of n keys
      last, folded with the step and with each example's index in the data, so
      that neither the microbatches nor the devices change the numbers.

  Returns:
    A `GradientEstimator`, with the state of `value_and_grad`. Its batch is a
    pytree of arrays, `PaddedBatch`, or `ResidentBatch`.

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
    >>> for name in ('sample_size', 'sum_sq_diff_norm'):
    ...   print(name, estimate.extras[name])
    sample_size 2
    sum_sq_diff_norm 4.0

  Notes:
    Microbatches and devices are merged exactly: squared norms as sums, central
    moments by Chan's formula. Cost: see the routes; with ``inner_products`` a
    second pass over the batch.

    ``value_fn``, the mean loss as a function of the parameters, comes with the
    extra arguments unless there is an ``axis_name``: its gradient is a loop
    over the microbatches as well.
  """
  checks.enforce(per_example, locals())
  is_means = moments is _moments.microbatch_means
  if is_means and microbatch_size is None:
    raise ValueError(
      'microbatch_means needs a microbatch_size, at most half of the batch'
      ' size.'
    )

  loss = loss_lib.Loss(losses, has_aux, has_state, has_key)

  def estimate(params, state, batch):
    wide = jnp.finfo(trees.accumulator_dtype(params)).dtype
    count, size, get = _groups(
      batch, microbatch_size, wide, axis_name, has_state
    )
    if is_means:
      _check_means(size, microbatch_size)
    model_state, key, state = loss.begin(state)
    over = _Over(loss, count, get, key, axis_name)
    local = over.vary(params)

    def group(k, model_state):
      examples, mask = over.group(k)
      result = moments(over.bind(model_state), local, examples, mask)
      aux, model_state = over.rest(local, model_state, examples, mask)
      # Sizes alone don't vary over devices; the merged groups do.
      return over.vary((result, aux)), over.vary(model_state)

    (result, aux), new_state = over.add_up(
      group,
      lambda a, b: (
        _moments.merge(a[0], b[0]),
        jax.tree.map(jnp.add, a[1], b[1]),
      ),
      over.vary(model_state),
    )
    if axis_name is not None:
      result = _moments.merge_over(result, axis_name)
      aux = jax.lax.psum(aux, axis_name)
      new_state = _average(new_state, axis_name)
    result = _moments.centred(result)
    # What K units say about the sum over n examples.
    spread = (result.count - 1.0) / (result.units - 1.0)
    extras = {
      'sum_sq_diff_grads': result.sum_sq_diff_grads,
      'sum_sq_diff_norms': result.sum_sq_diff_norm,
    }
    extras = jax.tree.map(lambda leaf: spread * leaf, extras)
    norms = extras['sum_sq_diff_norms']
    if norms is not None:
      extras['sum_sq_diff_norm'] = sum(
        jax.tree.leaves(norms), start=jnp.zeros((), wide)
      )
    if not layers:
      del extras['sum_sq_diff_norms']

    if inner_products is not None:
      direction = over.vary(result.grads)

      def sums(k, model_state):
        rest = inner_products(
          over.bind(model_state), local, direction, *over.group(k)
        )
        return (jnp.sum(rest), jnp.sum(jnp.square(rest))), model_state

      total, _ = over.add_up(
        sums, lambda a, b: jax.tree.map(jnp.add, a, b), over.vary(model_state)
      )
      if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
      # The first is 0 but for the rounding of the mean gradient.
      excess = jnp.square(total[0]) / jnp.maximum(result.count, 1.0)
      extras['sum_sq_diff_inner'] = total[1] - excess

    extras = {name: leaf for name, leaf in extras.items() if leaf is not None}
    extras['sample_size'] = result.count.astype(jnp.int32)
    if axis_name is None:  # Else it holds one device's part of the batch.
      extras['value_fn'] = jax.tree_util.Partial(
        value_fn, (batch, model_state, key)
      )
    aux = jax.tree.map(lambda leaf: leaf / jnp.maximum(result.count, 1), aux)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), result.grads, params)
    return base.Estimate(
      result.value, trees.conjugate(grads), extras, aux
    ), loss.end(state, new_state)

  @jax.custom_vjp
  def mean(bound, params):
    return mean_and_grads(bound, params)[0]

  # The names let optax's line searches pass them on, which refuse others.
  def value_fn(
    bound, params, *, sample_size=None, sum_sq_diff_grads=None,
    sum_sq_diff_norm=None, sum_sq_diff_norms=None, sum_sq_diff_inner=None,
    curvature=None,
  ):  # fmt: skip
    del sample_size, sum_sq_diff_grads, sum_sq_diff_norm, sum_sq_diff_norms
    del sum_sq_diff_inner, curvature
    return mean(bound, params)

  def mean_and_grads(bound, params):
    """The mean loss by a loop that reverse mode would not pass."""
    batch, model_state, key = bound
    wide = jnp.finfo(trees.accumulator_dtype(params)).dtype
    count, _, get = _groups(batch, microbatch_size, wide, None, has_state)
    over = _Over(loss, count, get, key, None)

    def group(k, model_state):
      examples, mask = over.group(k)
      result = _moments.plain_grads(
        over.bind(model_state), params, examples, mask
      )
      return result, over.rest(params, model_state, examples, mask)[1]

    result, _ = over.add_up(group, _moments.merge, model_state)
    return result.value, trees.cast_like(result.grads, params)

  mean.defvjp(
    mean_and_grads,
    lambda grads, tangent: (
      None, jax.tree.map(lambda g: (tangent * g).astype(g.dtype), grads)
    ),
  )  # fmt: skip

  return base.GradientEstimator(loss.init, estimate)


class _Over(NamedTuple):
  """A loss over the groups of a batch."""

  loss: loss_lib.Loss
  count: Any
  get: Callable[..., Any]
  key: Any
  axis_name: Any

  def vary(self, tree):
    return tree if self.axis_name is None else vary(tree, self.axis_name)

  def group(self, k):
    """The examples of a group, with their keys, and the mask."""
    examples, mask, index = self.get(k)
    if not self.loss.has_key:
      return (examples, ()), mask
    return (
      examples,
      jax.vmap(jax.random.fold_in, (None, 0))(self.key, index),
    ), mask

  def bind(self, model_state):
    """One loss an example, of parameters and of examples with their keys."""
    return lambda params, pair: self.loss(params, model_state, *pair)[0]

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
      wide = leaf.astype(jnp.promote_types(leaf.dtype, mask.dtype))
      return jnp.tensordot(mask.astype(wide.dtype), wide, 1)

    return jax.tree.map(total, aux), model_state

  def add_up(self, function, merge, model_state):
    """Merges ``function`` over the groups; the model state goes through."""
    if isinstance(self.count, int) and self.count == 1:
      return function(0, model_state)
    shapes, _ = jax.eval_shape(function, 0, model_state)
    start = jax.tree.map(jnp.zeros_like, shapes)

    def body(k, carry):
      total, model_state = carry
      new, model_state = function(k, model_state)
      return merge(total, new), model_state

    return jax.lax.fori_loop(
      0, self.count, body, (self.vary(start), model_state)
    )


def _check_means(size, microbatch_size):
  if isinstance(size, (int, np.integer)) and size < 2 * microbatch_size:
    raise ValueError(
      'microbatch_means needs at least two microbatches: a batch of at least'
      f' {2 * microbatch_size} examples for microbatch_size='
      f'{microbatch_size}, got {size}. Lower microbatch_size, or start with a'
      ' larger batch_size.'
    )


def _average(model_state, axis_name):
  """The model state of all devices: means, and the largest of integers."""
  return jax.tree.map(
    lambda leaf: (
      jax.lax.pmean(leaf, axis_name)
      if jnp.issubdtype(leaf.dtype, jnp.inexact)
      else jax.lax.pmax(leaf, axis_name)
    ),
    model_state,
  )
