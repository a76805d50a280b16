r"""BSVRB: blockwise variance-reduced multi-block bilevel optimization.

Reference: Hu, Qiu, Guo, Zhang, Yang, `Blockwise stochastic variance-reduced
methods with parallel speedup for multi-block bilevel optimization
<https://arxiv.org/abs/2305.18730>`_, ICML 2023.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optlab import _growth
from optlab import base
from optlab import checks
from optlab import estimators
from optlab import tracking
from optlab import trees
from optlab.multi_block import _blocks
from optlab.multi_block import _clock
from optlab.multi_block import _dual
from optlab.multi_block import _guard
from optlab.multi_block import _info
from optlab.multi_block import _points
from optlab.multi_block import _rows
from optlab.multi_block import _state
from optlab.multi_block import _swing
from optlab.multi_block import _system


class _Method(NamedTuple):
  """The problem, and how `bsvrb` is to follow it."""

  problem: _system.Problem
  dual: _dual.Dual
  inner_lr: base.ScalarOrSchedule
  alpha: base.ScalarOrSchedule
  beta: base.ScalarOrSchedule
  gamma: base.ScalarOrSchedule | None
  guarded: bool
  idle: float  # length of the steps of a block without any curvature

  def sample(self, params, state, batch, stable):
    return _points.sample(
      self.problem, self.dual, params, state, batch,
      stable if self.guarded else None, self.idle,
    )  # fmt: skip

  def stable(self, step, count):
    """What curvature steps of full length can bear."""
    return _guard.stable_curvature(
      trees.at_step(self.inner_lr, step),
      self.dual.lr_ratio,
      trees.at_step(self.alpha, step),
      count / self.problem.num_blocks,
    )


@checks.domains(
  upper=_blocks.OBJECTIVE,
  lower=_blocks.OBJECTIVE,
  num_blocks=checks.Integer(),
  inner_lr=checks.POSITIVE._replace(schedule=True, optional=True),
  alpha=tracking.RATE._replace(schedule=True),
  beta=checks.FRACTION._replace(schedule=True),
  gamma=checks.NON_NEGATIVE._replace(schedule=True, optional=True),
  dual=checks.Pair(
    _dual.Dual._fields, 'a Dual such as track_products()', optional=True
  ),
  **_system.SYSTEM,
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
  damping: base.ScalarOrSchedule | None = None,
  curvature: Callable[..., base.Operator] | None = None,
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
      bear, measured at its first visit, and now and then again; none where it
      has no curvature.
    alpha: Rate of the trackers of the lower problems, in (0, 1).
    beta: Rate of the hypergradient, in (0, 1].
    gamma: The paper's :math:`\gamma`; ``None`` is `msvr_gamma`.
    dual: `track_products` (v2, the default) or `track_hessians` (v1).
    damping: Added to :math:`d_{yy} g_i` in the system of :math:`v_i`, a number
      or a schedule; ``None`` is none. Where it may be singular or indefinite,
      and for `track_hessians` where it would lie below the floor.
    curvature: ``(params, inner_i, batch_i) -> operator`` on ``inner_i`` in
      place of :math:`d_{yy} g_i`, such as `gauss_newton` of a network, which is
      never indefinite.
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
      outside (0, 1], ``inner_lr`` not positive, or ``None`` without the guard,
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
    to where it was. A block whose Hessian has negative curvature along its dual
    variable, now and on average over its visits, has no lower solution: it is
    left out and stands still while that is so. A block whose lower gradient
    has a part without curvature, linear or singular, has no lower solution in
    sight: it is left out too, while its lower variable goes on, as a Huber loss
    is linear far out. ``info`` counts both and names them, and the worst and
    the stiffest block; the steps of all others are the paper's. From 50 visits
    a block on, ``info.ok`` also tells a block that has farther to go than it
    would have gone at its pace in all steps so far: ``inner_lr`` is too small.

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
  lr = LONGEST if inner_lr is None else inner_lr
  method = _Method(
    _system.Problem(
      *_blocks.objectives(upper, lower, has_aux), num_blocks, curvature, damping
    ),
    dual, lr, alpha, beta, gamma, guarded, 1.0 if inner_lr is not None else 0.0,
  )  # fmt: skip

  def init(params, inner, first=None):
    _blocks.check_levels(params, inner, num_blocks)
    # Copies, so that a donated state takes nothing of the caller's with it.
    state = _state.start(trees.own(params), trees.own(inner), dual)
    return state if first is None else _first_pass(method, state, first)

  return base.GradientEstimator(init, functools.partial(_estimate, method))


LONGEST = 1e10  # The step size of blocks whose own curvature sets it.
HELD = 'step', 'hypergrad', 'previous_params', 'clock'


def _first_pass(method, state, first):
  """The state after a visit of all blocks."""
  _blocks.check_first(first, method.problem.num_blocks)
  # How many blocks a step will sample is not known: as if they were few.
  limit = lambda _: method.stable(0, 0)

  def visit(state, batch):
    sampled = method.sample(state.previous_params, state, batch, limit)
    rows = _rows.follow(method.dual, sampled, 0.5, 0.5, first_visit=True)
    state = _rows.write(state, sampled, rows, batch.blocks, 0)
    return state._replace(info=_info.after(state.info, sampled, batch.blocks))

  return _state.in_chunks(visit, state, first, method.problem.num_blocks)


def _estimate(method, params, state, batch):
  _blocks.check_step(
    params, state, _state.BSVRBState, method.problem.num_blocks, 'bsvrb'
  )
  step, num_blocks = state.step, method.problem.num_blocks
  limit = functools.partial(method.stable, step)
  sampled = method.sample(params, state, batch, limit)
  count, accepted = jnp.sum(sampled.use), jnp.sum(sampled.ok)
  rate = trees.at_step(method.alpha, step)
  if method.gamma is None:
    drift = tracking.msvr_gamma(num_blocks, count, rate)
  else:
    drift = trees.at_step(method.gamma, step)
  rows = _rows.follow(method.dual, sampled, rate, drift)
  value = jnp.sum(jnp.where(sampled.ok, sampled.value, 0)) / accepted
  hypergrad = _follow_hypergrad(
    state, sampled, accepted, trees.at_step(method.beta, step)
  )
  # An empty batch neither moves a block nor ages one.
  length = trees.at_step(method.inner_lr, step) * count / num_blocks
  clock = jnp.stack([_clock.add(state.clock[0], length), state.clock[0]])
  estimate, new = estimators.accept(
    accepted > 0,
    base.Estimate(
      value.astype(sampled.value.dtype),
      trees.cast_like(hypergrad, params),
      aux=sampled.aux,
    ),
    (step + 1, hypergrad),
    (step, state.hypergrad),
  )
  # Time goes on where all blocks were looked at and refused: at the next look
  # they have moved, and may be fine.
  moved = trees.where(
    (accepted > 0) | jnp.any(sampled.rejected | sampled.flat),
    (params, clock),
    (state.previous_params, state.clock),
  )
  # Rows that are not to be written are dropped, where they are written.
  state = _rows.write(state, sampled, rows, batch.blocks, step + 1)
  share = count / num_blocks
  rise, away = _growth.follow(state.rise, step, sampled.sizes)
  swing, grows = _swing.follow(state.swing, step, share, sampled.gap)
  rise, swing = trees.where(
    accepted > 0, (rise, swing), (state.rise, state.swing)
  )
  info = _info.after(
    state.info, sampled, batch.blocks, away | grows, step * share, swing[1]
  )
  return estimate, state._replace(
    **dict(zip(HELD, (*new, *moved), strict=True)),
    rise=rise,
    swing=swing,
    info=info,
  )


def _follow_hypergrad(state, sampled, accepted, beta):
  """The estimate after its step; at the first, the hypergradient itself."""
  now, before = jax.tree.map(
    lambda total: total / jnp.maximum(accepted, 1).astype(total.dtype),
    sampled.hypergrad,
  )
  recursive = tracking.storm(state.hypergrad, now, before, beta)
  return trees.where(state.step == 0, now, recursive)
