r"""RSVRB: randomized variance-reduced multi-block bilevel optimization.

Reference: Guo, Hu, Zhang, Yang, `Randomized stochastic variance-reduced methods
for multi-task stochastic bilevel optimization
<https://arxiv.org/abs/2105.02266>`_, 2021. A baseline of `bsvrb`.
"""

from typing import Any, NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import tracking
from optlab import trees
from optlab.multi_block import _dual
from optlab.multi_block import _points


class PairedBlockBatch(NamedTuple):
  """The sampled blocks of one step, and a second, independent set of blocks.

  Attributes:
    blocks: int array of shape ``(sampled,)``, whose trackers are updated;
      padding and repeats as in `BlockBatch`.
    upper: Pytree of data for the upper objectives, leading axis ``sampled``.
    lower: Pytree of data for the lower objectives, leading axis ``sampled``.
    outer: int array of shape ``(outer_sampled,)``, the blocks over which the
      hypergradient is averaged. It needs no data.
  """

  blocks: jax.Array
  upper: Any
  lower: Any
  outer: jax.Array


class Tracked(NamedTuple):
  """What `rsvrb` tracks of each block; lower and upper variables are flat."""

  inner_grad: jax.Array  # shape (num_blocks, dim), of d_y g
  upper_x: jax.Array  # shape (num_blocks, params), of d_x f
  upper_y: jax.Array  # shape (num_blocks, dim), of d_y f
  cross: jax.Array  # shape (num_blocks, dim, params), of d_yx g
  hessian: jax.Array  # shape (num_blocks, dim, dim), of d_yy g


class RSVRBState(NamedTuple):
  """State of `rsvrb`."""

  iteration: jax.Array  # shape (), int32
  rejected: jax.Array  # shape (), int32, sampled blocks left out so far
  hypergrad: base.Updates  # like params
  previous: base.Params  # x one step ago
  inner: base.ArrayTree  # y, leading axis num_blocks
  inner_before: base.ArrayTree  # y one step ago
  tracked: Tracked


def rsvrb(
  upper: _points.BlockObjective,
  lower: _points.BlockObjective,
  num_blocks: int,
  *,
  step_size: base.ScalarOrSchedule = 0.1,
  beta: base.ScalarOrSchedule = 0.1,
  floor: float | jax.Array = 1e-2,
) -> base.GradientEstimator:
  r"""The hypergradient of many bilevel problems, with every part tracked.

  A baseline for small problems: it keeps the cross Jacobian of each block,
  :math:`m\, d_x d_y` numbers, and touches all blocks in each step.

  .. math::
    T_i &\leftarrow (1 - \beta)\, (T_i - \tfrac{m}{I} T_i(\text{before}))
      + \tfrac{m}{I} T_i(\text{now}), \quad i \in \mathcal{I}_t \\
    T_i &\leftarrow (1 - \beta)\, T_i, \quad i \notin \mathcal{I}_t \\
    G &= \tfrac1{I'} \textstyle\sum_{i \in \mathcal{I}'_t}
      d_x f_i - J_i^\top H_i^{-1} d_y f_i \\
    z &\leftarrow (1 - \beta)\, (z - G(\text{before})) + G(\text{now}) \\
    y_i &\leftarrow y_i - \tau s_i \quad \text{for all } i

  The trackers are those of :math:`d_y g, d_x f, d_y f, J = d_{yx} g` and
  :math:`H = d_{yy} g`. ``G(now)`` is made of the trackers after their update
  and ``G(before)`` of those before it, on the second set of blocks.

  Args:
    upper: ``(params, inner_i, batch_i) -> scalar``, :math:`f_i`.
    lower: ``(params, inner_i, batch_i) -> scalar``, :math:`g_i`, strongly
      convex in ``inner_i``.
    num_blocks: The number of blocks :math:`m`.
    step_size: As in `bsvrb`: :math:`\tau = \text{step\_size} \cdot I / m`.
    beta: Rate of all trackers, in (0, 1).
    floor: The smallest eigenvalue that a tracked Hessian is given.

  Returns:
    A `GradientEstimator` for batches of `PairedBlockBatch`.
    ``init(params, inner)`` starts all trackers from zero;
    ``init(params, inner, first)`` from one pass over all blocks, a `BlockBatch`
    that has each of them once.

  Raises:
    TypeError: ``upper`` or ``lower`` is not a function, or ``num_blocks`` or
      ``blocks`` are not integers.
    ValueError: ``num_blocks`` is below 1, ``beta`` outside (0, 1), ``floor``
      not positive, ``step_size`` negative, ``inner`` or the batch lacks its
      leading axis, or the blocks are negative or more than ``num_blocks``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, target: 0.5 * (y - target) ** 2
    >>> lower = lambda x, y, batch: 0.5 * (y - x) ** 2
    >>> estimator = optlab.multi_block.rsvrb(upper, lower, 4, step_size=0.5)
    >>> blocks = jnp.arange(4)
    >>> batch = optlab.multi_block.PairedBlockBatch(
    ...     blocks, jnp.ones(4), None, blocks)
    >>> tx = optax.sgd(0.1)
    >>> state = optlab.init(jnp.zeros(()), estimator, tx, jnp.zeros(4))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(200):
    ...   state, value = step(state, batch)
    >>> print(f'{state.params:.2f}')
    1.00

  References:
    Guo, Hu, Zhang, Yang, `Randomized stochastic variance-reduced methods for
    multi-task stochastic bilevel optimization
    <https://arxiv.org/abs/2105.02266>`_, 2021.

  Notes:
    The tracker of :math:`d_x f` is ours; the paper's problem has none. A
    tracker that is not visited decays to zero, so that the floor is applied
    where a Hessian is used, not where it is tracked. The first hypergradient is
    :math:`G` itself. Padding, repeats and blocks that are not finite are
    treated as in `bsvrb`. Cost for each sampled block, at two points: the
    gradients, the Hessian and the cross Jacobian; all tables are rewritten.
  """
  checks.check_callable('upper', upper, '(params, inner, batch) -> scalar')
  checks.check_callable('lower', lower, '(params, inner, batch) -> scalar')
  checks.check_int('num_blocks', num_blocks, 1)
  checks.check_non_negative('step_size', step_size, schedule=True)
  tracking.check_rate('beta', beta, schedule=True)
  checks.check_positive('floor', floor)

  def sample(params, inner, batch):
    """Fresh samples of all tracked quantities for each block, and values."""
    flat_params, unravel_params = flatten_util.ravel_pytree(params)

    def block(inner, upper_batch, lower_batch):
      flat, unravel = flatten_util.ravel_pytree(inner)

      def upper_flat(x, y):
        return upper(unravel_params(x), unravel(y), upper_batch)

      def lower_grad(x, y):
        def value(y):
          return lower(unravel_params(x), unravel(y), lower_batch)

        return jax.grad(value)(y)

      value, (upper_x, upper_y) = jax.value_and_grad(upper_flat, (0, 1))(
        flat_params, flat
      )
      # The lower variables are few and the parameters many: reverse mode.
      cross = jax.jacrev(lower_grad, 0)(flat_params, flat)
      hessian = jax.jacfwd(lower_grad, 1)(flat_params, flat)
      grad = lower_grad(flat_params, flat)
      return Tracked(grad, upper_x, upper_y, cross, hessian), value

    return jax.vmap(block)(inner, batch.upper, batch.lower)

  def hypergradient(rows, use):
    hessian = _dual.project_floor(rows.hessian, floor, use)
    factor = jnp.linalg.cholesky(hessian)
    dual = jax.vmap(lambda f, b: jax.scipy.linalg.cho_solve((f, True), b))(
      factor, rows.upper_y
    )
    parts = rows.upper_x - jnp.einsum('idx,id->ix', rows.cross, dual)
    parts = jnp.where(use[:, None], parts, 0)
    return jnp.sum(parts, 0) / jnp.maximum(jnp.sum(use), 1)

  def init(params, inner, first=None):
    params, inner = jax.tree.map(jnp.array, (params, inner))
    _points.check_leading('inner', inner, num_blocks, 'num_blocks')
    dtype = trees.accumulator_dtype(params, inner)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    dim = sum(leaf[0].size for leaf in jax.tree.leaves(inner))
    shapes = (dim,), (size,), (dim,), (dim, size), (dim, dim)
    tracked = Tracked(*(jnp.zeros((num_blocks, *s), dtype) for s in shapes))
    if first is not None:
      _points.check_first(first, num_blocks)
      samples, _ = sample(
        params, tracking.gather_rows(inner, first.blocks), first
      )
      use = tracking.distinct_blocks(first.blocks, num_blocks)
      use &= _finite(samples)
      tracked = tracking.scatter_rows(tracked, samples, first.blocks, use)
    return RSVRBState(
      iteration=jnp.zeros((), jnp.int32),
      rejected=jnp.zeros((), jnp.int32),
      hypergrad=jax.tree.map(_dual.zeros_like_accumulator, params),
      previous=params,
      inner=inner,
      inner_before=jax.tree.map(jnp.array, inner),
      tracked=tracked,
    )

  def estimate(params, state, batch):
    checks.check_fields(
      'batch', batch, PairedBlockBatch._fields, 'a PairedBlockBatch'
    )
    tracking.check_blocks(batch.outer, num_blocks)
    _points.check_batch(batch, num_blocks)
    step = state.iteration
    rate = trees.at_step(beta, step)
    use = tracking.distinct_blocks(batch.blocks, num_blocks)
    now, value = sample(
      params, tracking.gather_rows(state.inner, batch.blocks), batch
    )
    before, _ = sample(
      state.previous,
      tracking.gather_rows(state.inner_before, batch.blocks),
      batch,
    )
    ok = use & _finite((now, before, value))
    count, accepted = jnp.sum(use), jnp.sum(ok)
    scale = num_blocks / jnp.maximum(count, 1)

    def follow(table, now, before):
      # Rows that were not sampled forget, so this is all of the table.
      fresh = scale * (now - (1 - rate) * before)
      fresh = jnp.where(_dual.align(ok, fresh), fresh, 0)
      index = jnp.where(ok, batch.blocks, num_blocks)
      decayed = ((1 - rate) * table).astype(table.dtype)
      return decayed.at[index].add(fresh.astype(table.dtype), mode='drop')

    tracked = jax.tree.map(follow, state.tracked, now, before)
    outer_use = tracking.distinct_blocks(batch.outer, num_blocks)
    unravel = flatten_util.ravel_pytree(state.hypergrad)[1]
    # Both points in one batch: see project_floor on solves that run at once.
    rows = [
      tracking.gather_rows(t, batch.outer) for t in (tracked, state.tracked)
    ]
    both = jax.vmap(hypergradient, (0, None))(
      jax.tree.map(lambda *leaf: jnp.stack(leaf), *rows), outer_use
    )
    new, old = unravel(both[0]), unravel(both[1])
    follow_z = tracking.storm(state.hypergrad, new, old, rate)
    any_accepted = accepted > 0
    hypergrad = _points.select(
      any_accepted, _points.select(step == 0, new, follow_z),
      state.hypergrad,
    )  # fmt: skip
    length = trees.at_step(step_size, step) * count / num_blocks
    unravel_inner = flatten_util.ravel_pytree(
      jax.tree.map(lambda leaf: leaf[0], state.inner)
    )[1]
    slope = jax.vmap(unravel_inner)(tracked.inner_grad)
    moved = jax.tree.map(
      lambda y, s: (y - length.astype(s.dtype) * s).astype(y.dtype),
      state.inner,
      slope,
    )
    total = jnp.sum(jnp.where(ok, value, 0))
    kept = _points.select(
      any_accepted,
      (params, moved, state.inner, tracked),
      (state.previous, state.inner, state.inner_before, state.tracked),
    )
    new_state = RSVRBState(
      step + any_accepted.astype(jnp.int32),
      state.rejected + (count - accepted).astype(jnp.int32),
      hypergrad,
      *kept,
    )
    grads = jax.tree.map(
      lambda grad, param: grad.astype(param.dtype), hypergrad, params
    )
    mean = (total / accepted.astype(total.dtype)).astype(value.dtype)
    return base.Estimate(mean, grads), new_state

  return base.GradientEstimator(init, estimate)


def _finite(rows):
  return jax.vmap(trees.all_finite)(rows)
