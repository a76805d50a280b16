r"""BSVRB: blockwise variance-reduced multi-block bilevel optimization.

Reference: Hu, Qiu, Guo, Zhang, Yang, `Blockwise stochastic variance-reduced
methods with parallel speedup for multi-block bilevel optimization
<https://arxiv.org/abs/2305.18730>`_, ICML 2023.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
from jax import flatten_util
import jax.numpy as jnp

from optlab import base
from optlab import block_dual
from optlab import tracking

BlockObjective = Callable[[base.Params, chex.ArrayTree, Any], jax.Array]


class BlockBatch(NamedTuple):
  """The sampled blocks of one step, and data for each of them.

  Attributes:
    blocks: int array of shape ``(sampled,)``. ``num_blocks`` and beyond is
      padding, and a block named again is ignored.
    upper: Pytree of data for the upper objectives, leading axis ``sampled``.
    lower: Pytree of data for the lower objectives, leading axis ``sampled``.
  """

  blocks: jax.Array
  upper: Any = None
  lower: Any = None


class BSVRBState(NamedTuple):
  """State of `bsvrb`. Tables have a leading axis ``num_blocks``."""

  iteration: jax.Array  # shape (), int32, steps that were not rejected
  rejected: jax.Array  # shape (), int32, sampled blocks left out so far
  hypergrad: base.Updates  # like params: z
  previous: base.Params  # x one step ago
  clock: jax.Array  # shape (2, 2), sum of step sizes now and one step ago
  touched: jax.Array  # shape (num_blocks, 2), the clock at the last visit
  visited: jax.Array  # shape (num_blocks,), int32, 1 + last visit; -1: never
  inner: chex.ArrayTree  # y at the block's last visit, see inner_variables
  inner_grad: chex.ArrayTree  # like inner: s
  dual: Any  # ProductState or HessianState


def bsvrb(
  upper: BlockObjective,
  lower: BlockObjective,
  num_blocks: int,
  *,
  step_size: base.ScalarOrSchedule = 0.1,
  alpha: base.ScalarOrSchedule = 0.1,
  beta: base.ScalarOrSchedule = 0.1,
  gamma: base.ScalarOrSchedule | None = None,
  dual: block_dual.Dual | None = None,
) -> base.GradientEstimator:
  r"""The hypergradient of many bilevel problems, at the price of a few.

  Choose it for :math:`\min_x \frac1m \sum_i f_i(x, y_i(x))`,
  :math:`y_i(x) = \arg\min_y g_i(x, y)`, with one lower problem for each of many
  tasks, classes or clients. A step samples :math:`I` blocks and costs no more
  with a hundred thousand of them than with a hundred.

  .. math::
    s_i &\leftarrow \text{MSVR of } d_y g_i, \quad i \in \mathcal{I}_t \\
    G(x, y, v) &= \tfrac1I \textstyle\sum_{i \in \mathcal{I}_t}
      d_x f_i - d_{xy} g_i\, v_i \\
    z &\leftarrow (1 - \beta)\, (z - G(\text{before})) + G(\text{now}) \\
    y_i &\leftarrow y_i - \tau s_i \quad \text{for all } i

  ``now`` is the current point and ``before`` that of the last step, both with
  the same samples. The estimate is :math:`z`; any optimizer moves :math:`x`.
  How :math:`v_i` comes about is the choice of ``dual``.

  Args:
    upper: ``(params, inner_i, batch_i) -> scalar``, :math:`f_i`.
    lower: ``(params, inner_i, batch_i) -> scalar``, :math:`g_i`, strongly
      convex in ``inner_i``.
    num_blocks: The number of blocks :math:`m`.
    step_size: How far a block moves between two visits, on average:
      :math:`\tau = \text{step\_size} \cdot I / m` in each step. A scalar, or a
      schedule over steps.
    alpha: Rate of the trackers of the lower problems, in (0, 1).
    beta: Rate of the hypergradient, in (0, 1].
    gamma: The paper's :math:`\gamma`; ``None`` is `msvr_gamma`.
    dual: `track_products` (v2, the default) or `track_hessians` (v1).

  Returns:
    A `GradientEstimator` for batches of `BlockBatch`. ``init(params, inner)``
    takes the lower variables stacked on a leading axis of ``num_blocks``;
    ``init(params, inner, first)`` takes one pass over all blocks, a
    `BlockBatch` that has each of them once, for trackers that are unbiased
    from the start. Without it a block stands still until its first visit,
    where its trackers are set to their samples.

  Raises:
    TypeError: ``upper`` or ``lower`` is not a function, or ``num_blocks`` or
      ``blocks`` are not integers.
    ValueError: ``num_blocks`` is below 1, ``alpha`` outside (0, 1), ``beta``
      outside (0, 1], ``step_size`` negative, ``inner`` or the batch lacks its
      leading axis, or ``blocks`` has a negative entry or more than
      ``num_blocks`` of them.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, target: 0.5 * (y - target) ** 2
    >>> lower = lambda x, y, batch: 0.5 * (y - x) ** 2
    >>> estimator = optlab.bsvrb(upper, lower, 100, step_size=1.0)
    >>> tx = optax.sgd(0.05)
    >>> state = optlab.init(jnp.zeros(()), estimator, tx, jnp.zeros(100))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for key in jax.random.split(jax.random.key(0), 400):
    ...   blocks = optlab.sample_blocks(key, 100, 10)
    ...   batch = optlab.BlockBatch(blocks, upper=jnp.ones(10))
    ...   state, value = step(state, batch)
    >>> print(f'{state.params:.2f}')
    1.00

  References:
    Hu, Qiu, Guo, Zhang, Yang, `Blockwise stochastic variance-reduced methods
    with parallel speedup for multi-block bilevel optimization
    <https://arxiv.org/abs/2305.18730>`_, ICML 2023.

  Notes:
    *Lazy steps.* That all blocks move, with stale :math:`s_i`, is the paper's
    form. It is computed exactly, but only for the blocks that are looked at: a
    block is stored as of its last visit, with the sum of the step sizes then.
    `inner_variables` gives all blocks as of now.

    *Stability.* With :math:`L` the largest curvature of the lower problems,
    the mean square error of a fixed quadratic contracts iff ``step_size * L``
    is below a bound between :math:`2 (1 - \alpha) / (1 + \alpha)`, at
    :math:`I \ll m`, and 2, at :math:`I = m`: 1.64 for ``alpha=0.1``, but 0.11
    for ``alpha=0.9``. The same holds for the dual variables. The paper's
    :math:`\tau` is ``step_size * I / m``.

    *Departures.* The first hypergradient is :math:`G(x_0)` and a block's first
    trackers are its first samples. A block that is sampled twice counts once,
    padding does not count, and :math:`I` in :math:`\tau` and :math:`\gamma` is
    the number of blocks that count. A block whose samples are not finite keeps
    its trackers, is left out of :math:`G`, and adds one to ``rejected``; where
    no block is left the whole step is rejected, and the value is NaN. With
    ``beta`` constant and :math:`I < m` the estimate keeps an error of
    :math:`\sqrt{\beta / (2 - \beta)}` times the standard deviation of
    :math:`G` over the choice of blocks.

    *Cost.* At two points for each sampled block: a gradient of :math:`f_i` and
    of :math:`g_i`, a Hessian-vector and a cross product; no cross matrix.
    Memory: for each block its lower variable and tracker, and those of the
    dual; twice the params.
  """
  base.check_callable('upper', upper, '(params, inner, batch) -> scalar')
  base.check_callable('lower', lower, '(params, inner, batch) -> scalar')
  base.check_int('num_blocks', num_blocks, 1)
  base.check_non_negative('step_size', step_size)
  if not callable(alpha):
    tracking.check_alpha(alpha)
  base.check_real('beta', beta, low=0.0, high=1.0, low_open=True)
  if gamma is not None:
    base.check_non_negative('gamma', gamma)
  dual = block_dual.track_products() if dual is None else dual

  def init(params, inner, first=None):
    # Copies, so that a donated state takes nothing of the caller's with it.
    params, inner = jax.tree.map(jnp.array, (params, inner))
    _check_leading('inner', inner, num_blocks, 'num_blocks')
    dtype = base.accumulator_dtype(inner)
    state = BSVRBState(
      iteration=jnp.zeros((), jnp.int32),
      rejected=jnp.zeros((), jnp.int32),
      hypergrad=jax.tree.map(block_dual.zeros_like_accumulator, params),
      previous=params,
      clock=jnp.zeros((2, 2), dtype),
      touched=jnp.zeros((num_blocks, 2), dtype),
      visited=jnp.full((num_blocks,), -1, jnp.int32),
      inner=inner,
      inner_grad=jax.tree.map(block_dual.zeros_like_accumulator, inner),
      dual=dual.init(inner),
    )
    if first is None:
      return state
    sampled = _sample(upper, lower, dual, num_blocks, params, state, first)
    if first.blocks.shape[0] != num_blocks:
      raise ValueError(
        f'first must have each of the num_blocks={num_blocks} blocks once, got'
        f' {first.blocks.shape[0]} blocks.'
      )
    rows = _follow(dual, sampled, 0.5, 0.5, first_visit=True)
    return _write(state, rows, first.blocks, sampled.ok, visited=0)

  def estimate(params, state, batch):
    step = state.iteration
    sampled = _sample(upper, lower, dual, num_blocks, params, state, batch)
    rate = _at(alpha, step)
    if gamma is None:
      drift = tracking.msvr_gamma(num_blocks, sampled.count, rate)
    else:
      drift = _at(gamma, step)
    rows = _follow(dual, sampled, rate, drift)

    accepted = jnp.sum(sampled.ok)
    any_accepted = accepted > 0
    mean = jax.tree.map(
      lambda total: total / jnp.maximum(accepted, 1).astype(total.dtype),
      sampled.hypergrad,
    )
    now = jax.tree.map(lambda leaf: leaf[0], mean)
    before = jax.tree.map(lambda leaf: leaf[1], mean)
    follow = tracking.storm(state.hypergrad, now, before, _at(beta, step))
    hypergrad = _where(
      any_accepted, _where(step == 0, now, follow), state.hypergrad
    )
    # An empty batch neither moves a block nor ages one.
    length = _at(step_size, step) * sampled.count / num_blocks
    clock = jnp.stack([_add(state.clock[0], length), state.clock[0]])
    value = jnp.sum(jnp.where(sampled.ok, sampled.value, 0)) / accepted
    state = _write(state, rows, batch.blocks, sampled.ok, visited=step + 1)
    state = state._replace(
      iteration=step + any_accepted.astype(jnp.int32),
      rejected=state.rejected + (sampled.count - accepted).astype(jnp.int32),
      hypergrad=hypergrad,
      previous=_where(any_accepted, params, state.previous),
      clock=_where(any_accepted, clock, state.clock),
    )
    grads = jax.tree.map(
      lambda grad, param: grad.astype(param.dtype), hypergrad, params
    )
    return base.Estimate(value.astype(sampled.value.dtype), grads), state

  return base.GradientEstimator(init, estimate)


def inner_variables(state: BSVRBState) -> chex.ArrayTree:
  """The lower variables of all blocks as of now, for evaluation.

  Args:
    state: State of `bsvrb`.

  Returns:
    Pytree like ``inner``, leading axis ``num_blocks``. Cost: all blocks.
  """
  elapsed = _elapsed(state.clock, state.touched)[0]
  return block_dual.advance(state.inner, state.inner_grad, elapsed)


def dual_variables(state: BSVRBState) -> chex.ArrayTree:
  """The dual variables of all blocks as of now, before any projection.

  Args:
    state: State of `bsvrb` with `track_products`.

  Returns:
    Pytree like ``inner``, leading axis ``num_blocks``. Cost: all blocks.
  """
  elapsed = _elapsed(state.clock, state.touched)[0]
  return block_dual.advance(state.dual.dual, state.dual.residual, elapsed)


class _Rows(NamedTuple):
  """The rows of the tables that one step sampled."""

  touched: jax.Array
  visited: jax.Array
  inner: chex.ArrayTree
  inner_grad: chex.ArrayTree
  dual: Any


class _Sampled(NamedTuple):
  """What one step sampled; points are stacked on a leading axis of two."""

  rows: _Rows
  inner: chex.ArrayTree  # at both points
  held: Any  # at both points
  clock: jax.Array  # shape (2,), now
  count: jax.Array  # shape (), blocks that count
  ok: jax.Array  # shape (sampled,), those of them with finite samples
  value: jax.Array  # shape (sampled,)
  inner_grad: chex.ArrayTree  # samples at both points
  dual: Any  # samples at both points
  hypergrad: base.Updates  # sums over the blocks that are ok, at both points


def _sample(upper, lower, dual, num_blocks, params, state, batch):
  """Evaluates the sampled blocks now and before, leaving out the bad ones."""
  tracking.check_blocks(batch.blocks, num_blocks)
  sampled = batch.blocks.shape[0]
  _check_leading('batch.upper', batch.upper, sampled, 'blocks')
  _check_leading('batch.lower', batch.lower, sampled, 'blocks')
  use = tracking.distinct_blocks(batch.blocks, num_blocks)
  table = _Rows(*(getattr(state, name) for name in _Rows._fields))
  rows = tracking.gather_rows(table, batch.blocks)
  elapsed = _elapsed(state.clock, rows.touched)
  inner = block_dual.advance(rows.inner, rows.inner_grad, elapsed)
  just_visited = (rows.visited == state.iteration) & (rows.visited > 0)
  held = dual.held(rows.dual, elapsed, just_visited)
  points = jax.tree.map(lambda *x: jnp.stack(x), params, state.previous)

  def evaluate(inner, held, batch, use):
    return jax.vmap(
      lambda x, y, held: _point(upper, lower, dual, x, y, held, batch, use)
    )(points, inner, held)

  data = batch.upper, batch.lower
  blockwise, total = evaluate(inner, held, data, use)
  finite = _finite_rows(blockwise)
  bad = jnp.any(use & ~finite) | ~base.all_finite(total)

  # The sum over blocks has taken in what is not finite. Add up anew, one block
  # at a time. A loop and not a cond, which under vmap would always be taken.
  def add(carry):
    index, ok, total = carry
    rows, data, mask = jax.tree.map(
      lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1),
      ((_swap((inner, held))), batch[1:], use),
    )
    alone, part = evaluate(*_swap(rows), data, mask)
    fine = mask[0] & _finite_rows(alone)[0] & base.all_finite(part)
    total = _where(fine, jax.tree.map(jnp.add, total, part), total)
    return index + 1, ok.at[index].set(fine), total

  start = jnp.where(bad, 0, sampled).astype(jnp.int32)
  empty = jax.tree.map(jnp.zeros_like, total)
  carry = start, use & ~bad, _where(bad, empty, total)
  _, ok, total = jax.lax.while_loop(lambda c: c[0] < sampled, add, carry)
  value, inner_grad, dual_sample = blockwise
  return _Sampled(
    rows=rows,
    inner=inner,
    held=held,
    clock=state.clock[0],
    count=jnp.sum(use),
    ok=ok,
    value=value[0],
    inner_grad=inner_grad,
    dual=dual_sample,
    hypergrad=total,
  )


def _point(upper, lower, dual, params, inner, held, batch, use):
  """Samples of all blocks at one point, and the sum of the hypergradients."""
  upper_batch, lower_batch = batch

  def total_upper(params, inner):
    value = jax.vmap(upper, (None, 0, 0))(params, inner, upper_batch)
    return jnp.sum(jnp.where(use, value, 0)), value

  def total_lower(params, inner):
    return jnp.sum(jax.vmap(lower, (None, 0, 0))(params, inner, lower_batch))

  (_, value), (upper_x, upper_y) = jax.value_and_grad(
    total_upper, argnums=(0, 1), has_aux=True
  )(params, inner)
  direction = jax.tree.map(
    lambda v, y: jnp.where(block_dual.align(use, v), v, 0).astype(y.dtype),
    dual.direction(held, upper_y),
    inner,
  )
  # The gradient, pushed forward along the dual variables, gives Hessian-vector
  # and cross products in one sweep. Other blocks' lower variables don't enter.
  (_, lower_y), (cross, product) = jax.jvp(
    lambda y: jax.grad(total_lower, argnums=(0, 1))(params, y),
    (inner,),
    (direction,),
  )

  def hessian():
    def block(y, batch):
      flat, unravel = flatten_util.ravel_pytree(y)
      return jax.hessian(lambda flat: lower(params, unravel(flat), batch))(flat)

    return jax.vmap(block)(inner, lower_batch)

  sample = dual.sample(product, upper_y, hessian)
  hypergrad = jax.tree.map(
    lambda upper_x, cross: (
      upper_x.astype(base.accumulator_dtype(upper_x)) - cross
    ),
    upper_x,
    cross,
  )
  return (value, lower_y, sample), hypergrad


def _follow(dual, sampled, alpha, gamma, *, first_visit=False):
  """The sampled rows after the step of their trackers."""
  first = jnp.logical_or(first_visit, sampled.rows.visited < 0)

  def follow(tracker, samples):
    def leaf(old, sample):
      sample = sample.astype(old.dtype)
      new = tracking.msvr(old, sample[0], sample[1], alpha, gamma)
      return jnp.where(block_dual.align(first, new), sample[0], new)

    return jax.tree.map(leaf, tracker, samples)

  rows = sampled.rows
  touched = jnp.broadcast_to(sampled.clock, rows.touched.shape)
  return _Rows(
    touched=touched,
    visited=rows.visited,
    inner=jax.tree.map(lambda leaf: leaf[0], sampled.inner),
    inner_grad=follow(rows.inner_grad, sampled.inner_grad),
    dual=dual.update(
      rows.dual,
      sampled.held,
      lambda tracker: follow(tracker, sampled.dual),
      sampled.ok,
    ),
  )


def _write(state, rows, blocks, use, visited):
  visited = jnp.full_like(rows.visited, visited)
  rows = rows._replace(visited=visited)
  table = _Rows(*(getattr(state, name) for name in _Rows._fields))
  table = tracking.scatter_rows(table, rows, blocks, use)
  return state._replace(**table._asdict())


# The clock is the sum of all step sizes, in two floats: late in a run the time
# since a block's last visit is a small difference of large sums.


def _add(clock, length):
  high, low = clock
  total = high + length.astype(clock.dtype)
  part = total - high
  error = (high - (total - part)) + (length.astype(clock.dtype) - part)
  return jnp.stack([total, low + error])


def _elapsed(clock, touched):
  difference = clock[:, None, :] - touched[None, :, :]
  return difference[..., 0] + difference[..., 1]


def _at(value, step):
  return value(step) if callable(value) else value


def _where(condition, on_true, on_false):
  return jax.tree.map(
    lambda a, b: jnp.where(condition, a, b.astype(a.dtype)), on_true, on_false
  )


def _swap(tree):
  return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)


def _finite_rows(tree):
  """Which rows of leaves of shape ``(2, sampled, ...)`` are all finite."""
  finite = [
    jnp.all(jnp.isfinite(leaf), axis=(0, *range(2, leaf.ndim)))
    for leaf in jax.tree.leaves(tree)
  ]
  return jnp.all(jnp.stack(finite), axis=0)


def _check_leading(name, tree, size, like):
  for path, leaf in jax.tree.leaves_with_path(tree):
    shape = jnp.shape(leaf)
    if not shape or shape[0] != size:
      raise ValueError(
        f'{name}{jax.tree_util.keystr(path)} must have a leading axis of'
        f' {size}, one row for each of {like}; got shape {shape}.'
      )
