r"""BSVRB: blockwise variance-reduced multi-block bilevel optimization.

Reference: Hu, Qiu, Guo, Zhang, Yang, `Blockwise stochastic variance-reduced
methods with parallel speedup for multi-block bilevel optimization
<https://arxiv.org/abs/2305.18730>`_, ICML 2023.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import estimators
from optlab import tables
from optlab import tracking
from optlab import trees
from optlab.multi_block import _blocks
from optlab.multi_block import _clock
from optlab.multi_block import _dual
from optlab.multi_block import _guard
from optlab.multi_block import _info
from optlab.multi_block import _points


class BSVRBState(NamedTuple):
  """State of `bsvrb`. Tables have a leading axis ``num_blocks``."""

  step: jax.Array  # shape (), int32, steps that were not rejected
  hypergrad: base.Updates  # like params: z
  previous_params: base.Params  # x one step ago
  clock: jax.Array  # shape (2, 2), sum of step sizes now and one step ago
  touched: jax.Array  # shape (num_blocks, 2), the clock at the last visit
  visited: jax.Array  # shape (num_blocks,), int32, 1 + last visit; -1: never
  inner: base.ArrayTree  # y at the block's last visit, see inner_variables
  inner_grad: base.ArrayTree  # like inner: s
  dual: Any  # ProductState or HessianState
  pace: _guard.Pace  # what a block can bear
  info: _info.BSVRBInfo


@checks.domains(
  upper=_blocks.OBJECTIVE,
  lower=_blocks.OBJECTIVE,
  num_blocks=checks.Integer(),
  inner_lr=checks.NON_NEGATIVE._replace(schedule=True, optional=True),
  alpha=tracking.RATE._replace(schedule=True),
  beta=checks.FRACTION._replace(schedule=True),
  gamma=checks.NON_NEGATIVE._replace(schedule=True, optional=True),
  dual=checks.Pair(
    _dual.Dual._fields, 'a Dual such as track_products()', optional=True
  ),
)
def bsvrb(
  upper: _blocks.BlockObjective,
  lower: _blocks.BlockObjective,
  num_blocks: int,
  *,
  inner_lr: base.ScalarOrSchedule | None = 0.1,
  alpha: base.ScalarOrSchedule = 0.1,
  beta: base.ScalarOrSchedule = 0.1,
  gamma: base.ScalarOrSchedule | None = None,
  dual: _dual.Dual | None = None,
  guarded: bool = True,
  has_aux: bool = False,
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
    inner_lr: How far a block moves between two visits, on average:
      :math:`\tau = \text{inner\_lr} \cdot I / m` in each step. A scalar, or a
      schedule over steps. ``None``: half of what the block's own curvature can
      bear, measured at its first visit, and now and then again.
    alpha: Rate of the trackers of the lower problems, in (0, 1).
    beta: Rate of the hypergradient, in (0, 1].
    gamma: The paper's :math:`\gamma`; ``None`` is `msvr_gamma`.
    dual: `track_products` (v2, the default) or `track_hessians` (v1).
    guarded: Whether a block whose curvature is more than its steps can bear
      takes shorter ones, see the notes. False is the paper's form to the
      letter: one such block ruins the run.
    has_aux: Whether ``upper`` returns ``(value, aux)``: `Estimate.aux` has that
      of the sampled blocks, on a leading axis.

  Returns:
    A `GradientEstimator` for batches of `BlockBatch`. ``init(params, inner)``
    takes the lower variables stacked on a leading axis of ``num_blocks``;
    ``init(params, inner, first)`` takes one pass over all blocks, a
    `BlockBatch` that has each of them once, for trackers that are unbiased
    from the start. Without it a block stands still until its first visit,
    where its trackers are set to their samples.

  Raises:
    TypeError: ``upper`` or ``lower`` is not a function or returns no scalar,
      ``num_blocks`` or ``blocks`` are not integers, or a leaf of ``params`` or
      ``inner`` is not a real floating array.
    ValueError: ``num_blocks`` is below 1, ``alpha`` outside (0, 1), ``beta``
      outside (0, 1], ``inner_lr`` negative, or ``None`` without the guard,
      ``inner`` or the batch lacks its leading axis, or ``blocks`` is empty, has
      a negative entry or more than ``num_blocks`` of them.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, target: 0.5 * (y - target) ** 2
    >>> lower = lambda x, y, batch: 0.5 * (y - x) ** 2
    >>> estimator = optlab.bsvrb(upper, lower, 100, inner_lr=1.0)
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
    the mean square error of a fixed quadratic contracts iff ``inner_lr * L``
    is below a bound between :math:`2 (1 - \alpha) / (1 + \alpha)`, at
    :math:`I \ll m`, and 2, at :math:`I = m`: 1.64 for ``alpha=0.1``, but 0.11
    for ``alpha=0.9``. The same holds for the dual variables. The paper's
    :math:`\tau` is ``inner_lr * I / m``.

    *Guard.* At a block's first visit, and where its lower gradient is not
    finite or above four times its average, six Hessian-vector products measure
    its curvature. Where that is above the bound, the block's steps are cut to
    half of what it can bear; where it also has grown since its last visit (at
    the same :math:`x` and data), the visit is rejected, and the block goes back
    to where it was. ``info`` counts it and names the worst and the stiffest
    block; the steps of all others are the paper's.

    *Departures.* The first hypergradient is :math:`G(x_0)` and a block's first
    trackers are its first samples. A block that is sampled twice counts once,
    padding does not count, and :math:`I` in :math:`\tau` and :math:`\gamma` is
    the number of blocks that count. A block whose samples are not finite keeps
    its trackers, stands still, is left out of :math:`G`, and counts as
    rejected; where no
    block is left the whole step is: the gradient is zero, and the value NaN.
    With ``beta`` constant and :math:`I < m` the estimate keeps an error of
    :math:`\sqrt{\beta / (2 - \beta)}` times the standard deviation of
    :math:`G` over the choice of blocks.

    *Cost.* At two points for each sampled block: a gradient of :math:`f_i` and
    of :math:`g_i`, a Hessian-vector and a cross product; no cross matrix.
    Memory: for each block its lower variable and tracker, and those of the
    dual; twice the params.
  """
  checks.enforce(bsvrb, locals())
  dual = _dual.track_products() if dual is None else dual
  if inner_lr is None and not guarded:
    raise ValueError(
      'inner_lr must be a number where guarded is False, got None; the guard'
      ' measures the curvature that would set it.'
    )
  levels = _blocks.objectives(upper, lower, has_aux)
  lr_of = functools.partial(
    trees.at_step, LONGEST if inner_lr is None else inner_lr
  )
  sample = functools.partial(_points.sample, *levels, dual, num_blocks)

  def stable(step, count):
    lr, rate = lr_of(step), trees.at_step(alpha, step)
    fraction = count / num_blocks
    return _guard.stable_curvature(lr, dual.lr_ratio, rate, fraction)

  def init(params, inner, first=None):
    _blocks.check_levels(params, inner, num_blocks)
    # Copies, so that a donated state takes nothing of the caller's with it.
    params, inner = trees.own(params), trees.own(inner)
    dtype = trees.accumulator_dtype(inner)
    state = BSVRBState(
      step=jnp.zeros((), jnp.int32),
      hypergrad=trees.zeros_accumulator(params),
      previous_params=params,
      clock=jnp.zeros((2, 2), dtype),
      touched=trees.zeros_rows(inner, (2,), dtype),
      visited=trees.zeros_rows(inner, (), jnp.int32) - 1,
      inner=inner,
      inner_grad=trees.zeros_accumulator(inner),
      dual=dual.init(inner),
      pace=_guard.start(inner),
      info=_info.start(inner),
    )
    if first is None:
      return state
    _blocks.check_first(first, num_blocks)
    # How many blocks a step will sample is not known: as if they were few.
    limit = (lambda _: stable(0, 0)) if guarded else None

    def visit(state, batch):
      sampled = sample(params, state, batch, limit)
      rows = _points.follow(dual, sampled, 0.5, 0.5, first_visit=True)
      state = _points.write(state, sampled, rows, batch.blocks, 0)
      return state._replace(info=_info.after(state.info, sampled, batch.blocks))

    return _in_chunks(visit, state, first, num_blocks)

  def estimate(params, state, batch):
    step = state.step
    limit = functools.partial(stable, step) if guarded else None
    sampled = sample(params, state, batch, limit)
    count, accepted = jnp.sum(sampled.use), jnp.sum(sampled.ok)
    rate = trees.at_step(alpha, step)
    if gamma is None:
      drift = tracking.msvr_gamma(num_blocks, count, rate)
    else:
      drift = trees.at_step(gamma, step)
    rows = _points.follow(dual, sampled, rate, drift)
    value = jnp.sum(jnp.where(sampled.ok, sampled.value, 0)) / accepted
    hypergrad = _follow_hypergrad(
      state, sampled, accepted, trees.at_step(beta, step)
    )
    # An empty batch neither moves a block nor ages one.
    length = lr_of(step) * count / num_blocks
    clock = jnp.stack([_clock.add(state.clock[0], length), state.clock[0]])
    estimate, new = estimators.accept(
      accepted > 0,
      base.Estimate(
        value.astype(sampled.value.dtype),
        trees.cast_like(hypergrad, params),
        aux=sampled.aux,
      ),
      (step + 1, hypergrad, params, clock),
      (step, state.hypergrad, state.previous_params, state.clock),
    )
    # Rows that are not to be written are dropped, where they are written.
    state = _points.write(state, sampled, rows, batch.blocks, step + 1)
    return estimate, state._replace(
      **dict(zip(HELD, new, strict=True)),
      info=_info.after(state.info, sampled, batch.blocks),
    )

  return base.GradientEstimator(init, estimate)


LONGEST = 1e3  # The step size of blocks whose own curvature sets it.
CHUNK = 1024  # Blocks of the first pass that are in memory at once.


def _in_chunks(visit, state, first, num_blocks):
  """Visits all blocks, some at a time."""
  size = min(num_blocks, CHUNK)

  def turn(index, state):
    start = jnp.minimum(index * size, num_blocks - size)
    batch = jax.tree.map(
      lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), first
    )
    # The last chunk reaches back into the one before.
    seen = tables.gather_rows(state.visited, batch.blocks) >= 0
    blocks = jnp.where(seen, num_blocks, batch.blocks)
    return visit(state, batch._replace(blocks=blocks))

  if size == num_blocks:
    return visit(state, first)
  return jax.lax.fori_loop(0, -(-num_blocks // size), turn, state)


HELD = 'step', 'hypergrad', 'previous_params', 'clock'


def _follow_hypergrad(state, sampled, accepted, beta):
  """The estimate after its step; at the first, the hypergradient itself."""
  now, before = jax.tree.map(
    lambda total: total / jnp.maximum(accepted, 1).astype(total.dtype),
    sampled.hypergrad,
  )
  recursive = tracking.storm(state.hypergrad, now, before, beta)
  return trees.where(state.step == 0, now, recursive)


def inner_variables(state: BSVRBState) -> base.ArrayTree:
  """The lower variables of all blocks as of now, for evaluation.

  Args:
    state: State of `bsvrb`.

  Returns:
    Pytree like ``inner``, leading axis ``num_blocks``. Cost: all blocks.

  Raises:
    TypeError: ``state`` is not the state of `bsvrb`.
  """
  _check_state(state)
  elapsed = _elapsed(state)
  return _clock.advance(state.inner, state.inner_grad, elapsed)


def dual_variables(state: BSVRBState) -> base.ArrayTree:
  """The dual variables of all blocks as of now, before any projection.

  Args:
    state: State of `bsvrb` with `track_products`.

  Returns:
    Pytree like ``inner``, leading axis ``num_blocks``. Cost: all blocks.

  Raises:
    TypeError: ``state`` is not the state of `bsvrb` with `track_products`.
  """
  _check_state(state)
  checks.check_fields(
    'state.dual',
    state.dual,
    _dual.ProductState._fields,
    'the state of track_products()',
  )
  elapsed = _elapsed(state)
  return _clock.advance(state.dual.dual, state.dual.residual, elapsed)


def _elapsed(state):
  return state.pace.scale * _clock.elapsed(state.clock, state.touched)[0]


def _check_state(state):
  checks.check_fields('state', state, BSVRBState._fields, 'the state of bsvrb')
