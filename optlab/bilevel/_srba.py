"""SRBA: recursive differences of all three directions between full batches."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel
from optlab.bilevel import _dual
from optlab.bilevel import _lag
from optlab.bilevel import _lower
from optlab.bilevel import _problem
from optlab.bilevel import _state


class SrbaMemory(NamedTuple):
  """What `srba` and `mrbo` keep: the last point, and the directions there."""

  params: base.Params
  inner: base.Params
  dual: base.Params
  directions: tuple[base.Updates, base.Params, base.Params]  # of x, y and z


@checks.domains(
  **_bilevel.LEVELS,
  lower_optimizer=checks.TRANSFORMATION,
  dual_lr=_bilevel.RATE,
  period=checks.Integer(),
  dual_radius=_bilevel.RADIUS,
  damping=_bilevel.SYSTEM['damping'],
  curvature=_bilevel.SYSTEM['curvature'],
)
def srba(
  upper: _problem.Objective,
  lower: _problem.Objective,
  lower_optimizer: optax.GradientTransformation,
  dual_lr: base.ScalarOrSchedule,
  full: _state.BilevelBatch,
  *,
  period: int,
  dual_radius: float | jax.Array | None = None,
  damping: base.ScalarOrSchedule | None = None,
  curvature: Callable[..., base.Operator] | None = None,
) -> base.GradientEstimator:
  r"""`soba` with SARAH's variance reduction of y, z and x at once.

  Choose it for finite sums, where `saba`'s tables do not fit: its memory is one
  point and one direction more, and constant rates converge.

  .. math::
    v_t = \begin{cases} D(u_t;\, \text{all}) & t \bmod \text{period} = 0 \\
      v_{t-1} + D(u_t;\, \xi) - D(u_{t-1};\, \xi) & \text{otherwise}
    \end{cases}

  with :math:`u = (x, y, z)` and :math:`D = (f_x - g_{xy} z,\ g_y,\
  g_{yy} z - f_y)`.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``.
    dual_lr: The rate of ``z``, a number or a schedule.
    full: A `BilevelBatch` of all data; its ``step_samples`` are not used.
    period: Steps from one look at all data to the next.
    dual_radius: See `soba`.
    damping: See `soba`.
    curvature: See `soba`.

  Returns:
    A `GradientEstimator` with a `BilevelState` whose ``memory`` is an
    `SrbaMemory`; it uses ``batch.upper`` and ``batch.lower``.

  Raises:
    TypeError: An argument is of a wrong type, or a leaf not a real array.
    ValueError: A number is outside its domain, or ``lower_optimizer`` keeps y
      in a set.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, rows: jnp.mean(jnp.sum((y - rows) ** 2, -1))
    >>> lower = lambda x, y, rows: jnp.mean(jnp.sum((y - rows * x) ** 2, -1))
    >>> rows = jnp.array([[0.0], [2.0]])
    >>> estimator = optlab.bilevel.srba(upper, lower, optax.sgd(0.1), 0.1,
    ...     optlab.BilevelBatch(rows, rows), period=10)
    >>> tx = optax.sgd(0.05)
    >>> state = optlab.init(jnp.zeros(1), estimator, tx, jnp.zeros(1))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for i in jax.random.bernoulli(jax.random.key(0), 0.5, (400,)) * 1:
    ...   state, _ = step(state, optlab.BilevelBatch(rows[i:], rows[i:]))
    >>> print(jnp.round(state.params, 3))
    [1.]

  References:
    Dagreou, Moreau, Vaiter, Ablin, `A Lower Bound and a Near-Optimal Algorithm
    for Bilevel Empirical Risk Minimization
    <https://arxiv.org/abs/2302.08766>`_, AISTATS 2024.

  Notes:
    Departures: the reset is at every ``period``-th accepted step, and ``z``
    stays in the ball of `soba`.

    Cost: twice that of `soba` a step, and one of `soba` on all data every
    ``period`` steps. Memory: two x, y and z more.
  """
  checks.enforce(srba, locals())
  _state.check_batch(full)
  problem = _bilevel.problem_of(
    upper, lower, lower_optimizer, curvature=curvature, damping=damping
  )
  dual = _bilevel.dual_of(dual_lr, None, 1, dual_radius)

  def renew(look, now, state, batch):
    def recursive():
      seen, fresh = look(*now, batch)
      x, y, z, _ = state.memory
      _, old = look(x, y, z, batch)
      return seen, jax.tree.map(
        lambda v, a, b: v + (a - b), state.memory.directions, fresh, old
      )

    first = state.step % period == 0
    return jax.lax.cond(first, lambda: look(*now, full), recursive)

  return recursive_estimator(problem, dual, renew)


def recursive_estimator(
  problem: _problem.Problem,
  dual: _dual.Dual,
  renew: Callable[..., Any],
  average: Any = None,
  calm: Any = 1,
) -> base.GradientEstimator:
  """`soba` whose three directions follow a recursion of their own.

  Args:
    problem: The levels.
    dual: The rate and the ball of z.
    renew: ``(look, (x, y, z), state, batch) -> (seen, directions)`` with
      ``look(x, y, z, batch)``, which returns the same of one sample.
    average: Weight of y in its moving average, which is then looked at in its
      place, while y takes steps of its own; ``None`` is none.
    calm: Steps for which the noise of the directions lasts.

  Returns:
    A `GradientEstimator` whose memory is an `SrbaMemory`.
  """

  def init(params, inner):
    state = _state.init_state(problem, params, inner, dual=dual)
    zeros = trees.zeros_accumulator
    memory = SrbaMemory(
      trees.own(params), trees.own(inner), zeros(inner),
      (zeros(params), zeros(inner), zeros(inner)),
    )  # fmt: skip
    return state._replace(memory=memory)

  def estimate(params, state, batch):
    _state.check_batch(batch)
    checks.check_real_params('params', params)
    at = state.inner
    if average is not None:  # The point before is the average before.
      weigh = lambda a, y: a + (average * (y - a)).astype(a.dtype)
      at = trees.combine(weigh, state.memory.inner, at)
    now = params, at, state.dual
    look = functools.partial(_look, problem, state.step)
    seen, moves = renew(look, now, state, batch)
    value, lower_value, size, convex, products = seen
    d_x, d_y, d_z = moves
    rate = trees.at_step(dual.lr, state.step)
    reach = state.dual_state.reach
    reach += (rate * size).astype(reach.dtype)
    z, ok, length = _dual.hold(
      _dual.subtract(state.dual, rate, d_z),
      2 * reach if dual.radius is None else dual.radius,
    )
    after = _lower.step(
      problem, params, state.inner, state.lower_opt_state, batch.lower,
      seen=(lower_value, d_y) if average is None else None,
    )  # fmt: skip
    others, pairs = _lag.beside(state.dual, d_y, after, state.inner)
    residual, slope, reached, along, moved, *found = trees.norms(
      d_z, *others, products=pairs
    )
    pace, behind = _lag.follow(
      state.pace, state.step, along, residual + size, moved, reached,
      calm=calm,
    )  # fmt: skip
    felt = _dual.follow(state.dual_state.felt, products, state.step)
    idle = _dual.is_idle(length, reach, felt, state.step)
    idle |= ~_dual.feels(felt[0], length, size) & (state.step >= _dual.PATIENCE)
    return _state.accept(
      base.Estimate(value, trees.cast_like(d_x, params)),
      state,
      (length, residual, slope, reached),
      seen=True,
      sizes=(slope, reached),
      lower_value=lower_value,
      inner=after.inner,
      dual=z,
      lower_opt_state=after.opt_state,
      pace=pace,
      dual_state=_dual.DualState((), reach, felt),
      memory=SrbaMemory(*now, moves),
      lower_grad_norm=slope,
      dual_residual=residual,
      ok=ok & convex & ~behind & ~idle,
      constrained=_lower.holds_some(found, state.info.constrained),
    )

  return base.GradientEstimator(init, estimate)


def _look(problem, step, params, inner, z, batch):
  """The values, what is watched, and the directions of x, y and z."""
  value, _, grad_x, grad_y = _problem.upper_value_and_grads(
    problem, params, inner, batch.upper
  )
  point = _problem.Point(params, inner, batch.lower, step)
  seen, cross, product = _problem.multiply(problem, point, z)
  length, scale, size, along, due = trees.norms(
    z, product, grad_y, products=[(z, product), (z, grad_y)]
  )
  convex = _dual.is_convex(along, length * scale)
  return (value, seen.value, size, convex, (along, due)), (
    trees.wide(_bilevel.hypergradient(grad_x, cross)),
    trees.wide(seen.grad),
    _dual.residual_of(z, product, grad_y),
  )
