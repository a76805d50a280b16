r"""Coupled compositional problems: one tracker for each of many inner values.

References: Wang, Yang, `Finite-sum coupled compositional stochastic
optimization <https://arxiv.org/abs/2202.12396>`_ (SOX), ICML 2022; Jiang, Li,
Wang, Zhang, Yang, `Multi-block-single-probe variance reduced estimator
<https://arxiv.org/abs/2207.08540>`_ (MSVR), NeurIPS 2022.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import estimators
from optlab import tables
from optlab import trees
from optlab.multi_block import _blocks
from optlab.multi_block import _trackers


class FCCOBatch(NamedTuple):
  """The sampled blocks of one step of `fcco`, and its data.

  Attributes:
    blocks: int array of shape ``(sampled,)``; padding and repeats as in
      `BlockBatch`.
    inner: What the inner function takes, of any shape.
    outer: Pytree of data for the outer functions, leading axis ``sampled``.
  """

  blocks: jax.Array
  inner: Any = None
  outer: Any = None


class FCCOInfo(NamedTuple):
  """Diagnostics of `fcco`."""

  rejected: jax.Array  # shape (), int32, blocks left out of the last step
  total_rejected: jax.Array  # shape (), int32


class FCCOState(NamedTuple):
  """State of `fcco`."""

  tracked: base.ArrayTree  # u, leading axis num_blocks
  visited: jax.Array  # shape (num_blocks,), bool
  previous_params: base.Params  # where the tracker needs them, else ()
  info: FCCOInfo


@checks.domains(
  inner=checks.Function('(params, batch) -> values of the sampled blocks'),
  outer=checks.Function('(value, batch) -> scalar'),
  num_blocks=checks.Integer(),
  tracker=checks.Pair(
    _trackers.Tracker._fields,
    'a Tracker such as track_average()',
    optional=True,
  ),
)
def fcco(
  inner: Callable[[Any, Any], Any],
  outer: Callable[[Any, Any], jax.Array],
  num_blocks: int,
  *,
  tracker: _trackers.Tracker | None = None,
) -> base.GradientEstimator:
  r"""Gradients of functions of many expectations, from few samples of each.

  Choose it for :math:`\min_w \frac1m \sum_i f_i(g_i(w))` where :math:`g_i` is
  an expectation and :math:`f_i` is not linear: the normalizer of a softmax over
  many classes, contrastive losses with small batches, average precision. The
  gradient of a mini-batch's own loss is biased there, the more so the smaller
  the batch; here one tracker for each :math:`i` takes the place of its sample.

  .. math::
    u_i &\leftarrow (1 - \gamma)\, u_i + \gamma\, g_i(w; \xi),
      \quad i \in \mathcal{I}_t \\
    G &= \tfrac1I \textstyle\sum_{i \in \mathcal{I}_t}
      \nabla g_i(w; \xi)^\top \nabla f_i(u_i)

  Args:
    inner: ``(params, batch.inner) -> values``, :math:`g_i` of all sampled
      blocks at once, leading axis ``sampled``: so that what they share, an
      encoder's output say, is computed once.
    outer: ``(value_i, batch.outer_i) -> scalar``, :math:`f_i` of one block.
    num_blocks: The number of blocks :math:`m`.
    tracker: `track_average` (SOX, the default), `track_msvr`, or where
      ``inner`` returns logarithms `track_log_average` or `track_mirror`.

  Returns:
    A `GradientEstimator` for batches of `FCCOBatch`. ``init(params, table)``
    takes a table like the values of all blocks, leading axis ``num_blocks``;
    its numbers are those of a block until its first visit, which sets them.

  Raises:
    TypeError: ``inner`` or ``outer`` is not a function, ``num_blocks`` or
      ``blocks`` are not integers, ``tracker`` is not a `Tracker`, or a leaf is
      not a real floating array.
    ValueError: ``num_blocks`` is below 1, the table, the values or
      ``batch.outer`` lack their leading axis, or the blocks are none, negative
      or more than ``num_blocks``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> # min mean_i log E exp(w - a_i + noise), from one sample of each.
    >>> a = jnp.linspace(-1.0, 1.0, 50)
    >>> estimator = optlab.multi_block.fcco(
    ...     lambda w, batch: w**2 - batch, lambda log_u, batch: log_u, 50,
    ...     tracker=optlab.multi_block.track_log_average(0.1))
    >>> tx = optax.sgd(0.1)
    >>> state = optlab.init(jnp.ones(()), estimator, tx, jnp.zeros(50))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for key in jax.random.split(jax.random.key(0), 200):
    ...   blocks = optlab.sample_blocks(key, 50, 5)
    ...   state, value = step(
    ...       state, optlab.multi_block.FCCOBatch(blocks, a[blocks]))
    >>> print(f'{abs(state.params):.2f}')
    0.00

  References:
    Wang, Yang, `Finite-sum coupled compositional stochastic optimization
    <https://arxiv.org/abs/2202.12396>`_, ICML 2022.

  Notes:
    The paper's second moving average, of :math:`G`, is the momentum of the
    optimizer. :math:`\nabla f_i` is taken at the tracker after its step. The
    value is the mean of :math:`f_i(u_i)`. A block whose value is not finite is
    left out and counted; where the gradient is not finite, or no block is left,
    the step is a zero gradient. Weights of blocks belong into ``outer``, by its
    batch, and gaps in their rows into ``inner``, as a mask. Cost: one gradient
    of ``inner``, and one more value where the tracker needs it; a step touches
    the sampled rows alone.
  """
  checks.enforce(fcco, locals())
  tracker = _trackers.track_average() if tracker is None else tracker
  outer_of = _blocks.objective('outer', outer)

  def init(params, table):
    _blocks.check_levels(params, table, num_blocks, 'table')
    return FCCOState(
      tracked=trees.own(table),
      visited=trees.zeros_rows(table, (), jnp.bool_),
      previous_params=trees.own(params) if tracker.needs_before else (),
      info=FCCOInfo(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
    )

  def estimate(params, state, batch):
    checks.check_fields('state', state, FCCOState._fields, 'the state of fcco')
    tables.check_rows('state.tracked', state.tracked, num_blocks)
    _blocks.check_blocks(batch, num_blocks, FCCOBatch)
    blocks, sampled = batch.blocks, batch.blocks.shape[0]
    tables.check_rows('batch.outer', batch.outer, sampled, 'blocks')
    use = tables.distinct_blocks(blocks, num_blocks)
    rows, visited = tables.gather_rows((state.tracked, state.visited), blocks)
    now, pull = jax.vjp(lambda x: inner(x, batch.inner), params)
    checks.check_same_tree('what inner returns', now, 'table[blocks]', rows)
    checks.check_real_params('what inner returns', now)
    now_wide = trees.cast_like(now, rows)
    before = now_wide
    if tracker.needs_before:
      before = trees.cast_like(inner(state.previous_params, batch.inner), rows)
    fraction = jnp.sum(use) / num_blocks
    moved = tracker.update(rows, now_wide, before, fraction)
    moved = trees.where(visited, moved, now_wide)
    values, slopes = jax.vmap(jax.value_and_grad(outer_of))(moved, batch.outer)
    slopes = jax.tree.map(jnp.multiply, slopes, tracker.weight(now_wide, moved))
    ok = use & tables.finite_rows((now, moved, values, slopes))
    count, accepted = jnp.sum(use), jnp.sum(ok)
    weights = jnp.where(ok, 1 / jnp.maximum(accepted, 1), 0)
    cotangent = jax.tree.map(
      lambda slope, to: jnp.where(
        trees.align(ok, slope), slope * trees.align(weights, slope), 0
      ).astype(to.dtype),
      slopes,
      now,
    )
    (grads,) = pull(cotangent)
    fine = (accepted > 0) & trees.is_finite(grads)
    result = base.Estimate(
      (jnp.sum(jnp.where(ok, values, 0)) / accepted).astype(values.dtype),
      grads,
    )
    result, previous = estimators.accept(
      fine, result, params if tracker.needs_before else (),
      state.previous_params,
    )  # fmt: skip
    tracked, visited = tables.scatter_rows(
      (state.tracked, state.visited), (moved, visited | ok), blocks, ok & fine
    )
    rejected = jnp.where(fine, count - accepted, count).astype(jnp.int32)
    total = (state.info.total_rejected + rejected).astype(jnp.int32)
    info = FCCOInfo(rejected, total)
    return result, FCCOState(tracked, visited, previous, info)

  return base.GradientEstimator(init, estimate)
