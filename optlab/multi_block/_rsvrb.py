r"""RSVRB: randomized variance-reduced multi-block bilevel optimization.

Reference: Guo, Hu, Zhang, Yang, `Randomized stochastic variance-reduced methods
for multi-task stochastic bilevel optimization
<https://arxiv.org/abs/2105.02266>`_, 2021. A baseline of `bsvrb`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp

from optlab import _growth
from optlab import base
from optlab import checks
from optlab import estimators
from optlab import tables
from optlab import tracking
from optlab import trees
from optlab.multi_block import _blocks
from optlab.multi_block import _guard
from optlab.multi_block import _info
from optlab.multi_block import _sight
from optlab.multi_block import _swing
from optlab.multi_block import _system
from optlab.multi_block import _tracked


class RSVRBState(NamedTuple):
  """State of `rsvrb`."""

  step: jax.Array  # shape (), int32, steps that were not rejected
  hypergrad: base.Updates  # like params
  previous_params: base.Params  # x one step ago
  inner: base.ArrayTree  # y, leading axis num_blocks
  inner_before: base.ArrayTree  # y one step ago
  tracked: _tracked.Tracked
  scale: jax.Array  # shape (num_blocks,), of the steps of each block
  bend: jax.Array  # shape (num_blocks,), average curvature along d_y f
  flat: jax.Array  # shape (num_blocks,), how often no solution was in sight
  rise: jax.Array  # shape (3,), how y and its gradients grow
  swing: jax.Array  # shape (7,), how y follows x
  info: _info.BSVRBInfo


@checks.domains(
  upper=_blocks.OBJECTIVE,
  lower=_blocks.OBJECTIVE,
  num_blocks=checks.Integer(),
  inner_lr=checks.POSITIVE._replace(schedule=True),
  beta=tracking.RATE._replace(schedule=True),
  floor=checks.POSITIVE,
  **_system.SYSTEM,
)
def rsvrb(
  upper: _blocks.BlockObjective,
  lower: _blocks.BlockObjective,
  num_blocks: int,
  *,
  inner_lr: base.ScalarOrSchedule = 0.1,
  beta: base.ScalarOrSchedule = 0.1,
  floor: float | jax.Array = 1e-2,
  damping: base.ScalarOrSchedule | None = None,
  curvature: Callable[..., base.Operator] | None = None,
  has_aux: bool = False,
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
    inner_lr: As in `bsvrb`: :math:`\tau = \text{inner\_lr} \cdot I / m`.
    beta: Rate of all trackers, in (0, 1).
    floor: The smallest eigenvalue that a tracked Hessian is given.
    damping: As in `bsvrb`.
    curvature: As in `bsvrb`.
    has_aux: As in `bsvrb`.

  Returns:
    A `GradientEstimator` for batches of `PairedBlockBatch`.
    ``init(params, inner)`` starts all trackers from zero;
    ``init(params, inner, first)`` from one pass over all blocks, a `BlockBatch`
    that has each of them once.

  Raises:
    TypeError: ``upper`` or ``lower`` is not a function or returns no scalar,
      ``num_blocks`` or ``blocks`` are not integers, or a leaf of ``params`` or
      ``inner`` is not a real floating array.
    ValueError: ``num_blocks`` is below 1, ``beta`` outside (0, 1), ``floor``
      not positive, ``inner_lr`` neither, ``inner`` or the batch lacks its
      leading axis, or the blocks are negative or more than ``num_blocks``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, target: 0.5 * (y - target) ** 2
    >>> lower = lambda x, y, batch: 0.5 * (y - x) ** 2
    >>> estimator = optlab.multi_block.rsvrb(upper, lower, 4, inner_lr=0.5)
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
    treated as in `bsvrb`; a block whose sampled Hessian is more than its steps
    can bear (2 over ``inner_lr``) takes shorter ones. Cost for each sampled
    block, at two points: the gradients, the Hessian and the cross Jacobian; all
    tables are rewritten.
  """
  checks.enforce(rsvrb, locals())
  problem = _system.Problem(
    *_blocks.objectives(upper, lower, has_aux), num_blocks, curvature, damping
  )

  def init(params, inner, first=None):
    _blocks.check_levels(params, inner, num_blocks)
    return _start(problem, trees.own(params), trees.own(inner), first)

  def estimate(params, state, batch):
    _blocks.check_step(params, state, RSVRBState, num_blocks, 'rsvrb')
    _blocks.check_batch(batch, num_blocks, _blocks.PairedBlockBatch)
    rate = trees.at_step(beta, state.step)
    use = tables.distinct_blocks(batch.blocks, num_blocks)
    level = problem.at_step(state.step)
    now, value, aux = _tracked.sample(level, params, state.inner, batch)
    before, _, _ = _tracked.sample(
      level, state.previous_params, state.inner_before, batch
    )
    finite = use & tables.finite_rows((now, before, value))
    bend, concave = _bend(state, batch.blocks, now)
    tracks = finite & ~concave
    lost, flat = _lost(state, batch.blocks, now, tracks)
    ok = tracks & ~flat
    count, accepted = jnp.sum(use), jnp.sum(ok)
    tracked = _tracked.follow(
      state.tracked, now, before, batch.blocks, tracks, rate,
      num_blocks / jnp.maximum(count, 1),
    )  # fmt: skip
    lost = tables.scatter_rows(state.flat, lost, batch.blocks, tracks)
    hypergrad = _tracked.follow_hypergrad(
      state, tracked, batch.outer, rate, floor, lost
    )
    lr = trees.at_step(inner_lr, state.step)
    seen = _pace(state, batch.blocks, now.hessian, lr, use, finite, concave)
    behind, slopes, gap = _is_behind(
      state, batch.blocks, now, before, params, finite, lr * count / num_blocks
    )
    sizes = (
      jnp.sum(jnp.where(finite, norm, 0)) for norm in (slopes, gap.length)
    )
    rise, away = _growth.follow(state.rise, state.step, tuple(sizes))
    share = count / num_blocks
    swing, grows = _swing.follow(state.swing, state.step, share, gap)
    visits = state.step * share
    behind &= use & (visits >= _swing.VISITS)
    seen = seen._replace(ok=ok, flat=flat, behind=behind)
    scales = tables.scatter_rows(
      state.scale, seen.pace.scale, batch.blocks, tracks
    )
    moved = _tracked.move(
      state.inner, tracked.inner_grad, scales * (lr * count / num_blocks)
    )
    mean = jnp.sum(jnp.where(ok, value, 0)) / accepted.astype(value.dtype)
    new = RSVRBState(
      state.step + 1, hypergrad, params, moved, state.inner, tracked, scales,
      state.bend, lost, rise, swing, state.info,
    )  # fmt: skip
    # Blocks without a solution in sight go on, alone too.
    alone = new._replace(step=state.step, hypergrad=state.hypergrad)
    result, new = estimators.accept(
      accepted > 0,
      base.Estimate(
        mean.astype(value.dtype), trees.cast_like(hypergrad, params), aux=aux
      ),
      new,
      trees.where(jnp.any(flat), alone, state),
    )
    return result, new._replace(
      bend=tables.scatter_rows(state.bend, bend, batch.blocks, finite),
      info=_info.after(
        state.info, seen, batch.blocks, away | grows, visits, swing[1]
      ),
    )

  return base.GradientEstimator(init, estimate)


def _start(problem, params, inner, first):
  """The state before the first step."""
  tracked = _tracked.start(params, inner)
  if first is not None:
    _blocks.check_first(first, problem.num_blocks)
    tracked = _tracked.first_pass(
      tracked, problem.at_step(0), params, inner, first
    )
  return RSVRBState(
    step=jnp.zeros((), jnp.int32),
    hypergrad=trees.zeros_accumulator(params),
    previous_params=params,
    inner=inner,
    inner_before=trees.own(inner),
    tracked=tracked,
    scale=trees.zeros_rows(inner, (), tracked.hessian.dtype) + 1,
    bend=trees.zeros_rows(inner, (), tracked.hessian.dtype),
    flat=trees.zeros_rows(inner, (), tracked.hessian.dtype) - 1,
    rise=_growth.start(tracked.hessian.dtype),
    swing=_swing.start(tracked.hessian.dtype),
    info=_info.start(inner),
  )


class _Seen(NamedTuple):
  """What `_info.after` looks at."""

  use: jax.Array
  ok: jax.Array
  left: jax.Array
  concave: jax.Array
  flat: jax.Array
  behind: jax.Array
  rejected: jax.Array
  pace: _guard.Pace
  rows: Any


def _bend(state, blocks, now):
  """Curvatures along the upper gradients, and which blocks are concave."""
  v = now.upper_y
  size = jnp.sum(v * v, -1)
  along = jnp.einsum('ij,ijk,ik->i', v, now.hessian, v)
  along = jnp.where(size > 0, along / jnp.where(size > 0, size, 1), 0)
  old = tables.gather_rows(state.bend, blocks)
  return _guard.bent(old, along, along < 0)


def _lost(state, blocks, now, looked):
  """How often blocks had no solution in sight, and which have none now."""
  inner = jax.vmap(lambda row: flatten_util.ravel_pytree(row)[0])(
    tables.gather_rows(state.inner, blocks)
  )

  def one(hessian, slope, inner):
    top = _guard.largest_eigenvalue(hessian)
    return _sight.is_lost(lambda v: hessian @ v, slope, inner, top)

  lost = looked * jax.vmap(one)(now.hessian, now.inner_grad, inner)
  old = tables.gather_rows(state.flat, blocks)
  return _sight.judge(old, lost, old < 0, looked)


def _is_behind(state, blocks, now, before, params, finite, length):
  """Which blocks have farther to go than in all steps at their pace.

  And the norms of their lower gradients, and how far they have.
  """
  pull, changed = (
    jnp.sum(now.upper_y * grad, -1)
    for grad in (now.inner_grad, now.inner_grad - before.inner_grad)
  )
  step = jax.tree.map(jnp.subtract, params, state.previous_params)
  push = jnp.einsum(
    'iy,iyx,x->i', now.upper_y, now.cross, flatten_util.ravel_pytree(step)[0]
  )
  bent = jnp.linalg.norm(
    jnp.einsum('ijk,ik->ij', now.hessian, now.upper_y), axis=-1
  )
  toward = pull * _sight.inverse(bent)
  scale = tables.gather_rows(state.scale, blocks)
  slope = jnp.linalg.norm(now.inner_grad, axis=-1)
  size = jax.vmap(trees.norm)(tables.gather_rows(state.inner, blocks))
  far = jnp.abs(toward) > state.step * scale * length * slope
  far &= jnp.abs(toward) > 0.1 * size
  pushed = jnp.sum(jnp.where(finite, push, 0))
  return far, slope, _swing.Gap(size, finite, toward, bent, pushed, changed)


def _pace(state, blocks, hessian, lr, use, finite, rejected):
  """The paces of the sampled blocks; 2 / lr is what its steps can bear."""
  ok = finite & ~rejected
  old = tables.gather_rows(state.scale, blocks)
  curvature = jax.vmap(_guard.largest_eigenvalue)(hessian)
  curvature = jnp.where(finite, curvature, 0)
  stable = jnp.where(lr > 0, 2 / jnp.where(lr > 0, lr, 1), jnp.inf)
  scale = jnp.where(ok, _guard.shortened(curvature, stable), old)
  before = _guard.Pace(old, *(curvature,) * 4)
  # No factor exists where an eigenvalue is below zero by more than rounding.
  shift = 1e-3 * curvature[:, None, None] * jnp.eye(hessian.shape[-1])
  factor = jnp.linalg.cholesky(hessian + shift)
  concave = finite & (curvature > 0) & jnp.any(jnp.isnan(factor), (1, 2))
  return _Seen(
    use,
    ok,
    jnp.zeros_like(curvature),
    concave,
    jnp.zeros_like(ok),
    jnp.zeros_like(ok),
    finite & rejected,
    before._replace(scale=scale.astype(old.dtype)),
    _Before(before),
  )


class _Before(NamedTuple):
  pace: _guard.Pace
