"""MRBO and AccBO: STORM of the directions, around one shared y and z."""

from collections.abc import Callable

import jax
import optax

from optlab import base
from optlab import checks
from optlab import tracking
from optlab import trees
from optlab.bilevel import _bilevel
from optlab.bilevel import _problem
from optlab.bilevel import _srba


@checks.domains(
  **_bilevel.LEVELS,
  lower_optimizer=checks.TRANSFORMATION,
  dual_lr=_bilevel.RATE,
  beta=checks.FRACTION,
  lower_beta=checks.FRACTION,
  lower_average=checks.FRACTION._replace(optional=True),
  dual_radius=_bilevel.RADIUS,
  damping=_bilevel.SYSTEM['damping'],
  curvature=_bilevel.SYSTEM['curvature'],
)
def mrbo(
  upper: _problem.Objective,
  lower: _problem.Objective,
  lower_optimizer: optax.GradientTransformation,
  dual_lr: base.ScalarOrSchedule,
  *,
  beta: float | jax.Array = 0.1,
  lower_beta: float | jax.Array = 0.1,
  lower_average: float | jax.Array | None = None,
  dual_radius: float | jax.Array | None = None,
  damping: base.ScalarOrSchedule | None = None,
  curvature: Callable[..., base.Operator] | None = None,
) -> base.GradientEstimator:
  r"""`soba` with recursive momentum of x, y and z.

  Choose it on streams of samples, whose noise no table or full batch can
  remove, where a sample's derivatives move smoothly with the point. The
  momentum takes the place of the optimizer's.

  .. math::
    v_t = D(u_t; \xi_t) + (1 - \beta)\,(v_{t-1} - D(u_{t-1}; \xi_t))

  with :math:`u = (x, y, z)` and :math:`D = (f_x - g_{xy} z,\ g_y,\
  g_{yy} z - f_y)`. AccBO is ``lower_beta=1`` with a ``lower_average``,
  ``optax.sgd(rate, 0.9, nesterov=True)`` below and `normalized_momentum` of
  decay 0 above: x and z then see :math:`\hat y_t = (1 - \tau)\, \hat y_{t-1} +
  \tau\, y_t`, while y takes plain steps.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``.
    dual_lr: The rate of ``z``, a number or a schedule.
    beta: Weight of a fresh direction of x, in (0, 1]; 1 is that of `soba`.
    lower_beta: The same of y and z.
    lower_average: AccBO's weight :math:`\tau` of y in its moving average, in
      (0, 1]; ``None`` takes y itself, which then moves by its momentum.
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
    >>> upper = lambda x, y, noise: jnp.sum((y - 1.0 + noise) ** 2)
    >>> lower = lambda x, y, noise: jnp.sum((y - 2.0 * x + noise) ** 2)
    >>> estimator = optlab.bilevel.mrbo(upper, lower, optax.sgd(0.2), 0.2)
    >>> tx = optlab.normalized_momentum(
    ...   optax.linear_schedule(0.02, 0.0, 300), 0.0)
    >>> state = optlab.init(jnp.zeros(1), estimator, tx, jnp.zeros(1))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for noise in 0.3 * jax.random.normal(jax.random.key(0), (300, 2)):
    ...   state, _ = step(state, optlab.BilevelBatch(*noise))
    >>> print(jnp.abs(state.params - 0.5) < 0.1)
    [ True]

  References:
    Yang, Ji, Liang, `Provably Faster Algorithms for Bilevel Optimization
    <https://arxiv.org/abs/2106.04692>`_, NeurIPS 2021. Gong, Hao, Liu, `An
    Accelerated Algorithm for Stochastic Bilevel Optimization under Unbounded
    Smoothness <https://arxiv.org/abs/2409.19212>`_, NeurIPS 2024.

  Notes:
    The recursions of x and y, one sample at both points and both moved at once,
    are MRBO's, checked against `benchmark_bilevel
    <https://github.com/benchopt/benchmark_bilevel>`_'s solver; the first
    direction is the first sample, where that one starts from zero. Departures:
    ``z`` takes one step on its linear system a step, with the same recursion,
    in place of the papers' Neumann series. AccBO moves y in rounds: here it
    takes one step a step. Its authors' code has average and y in one and the
    same network, and subtracts the last step's direction on the last step's
    sample; the paper's recursions, with one sample at both points, are
    followed.

    Cost: twice that of `soba`, and with an average one lower gradient more.
    Memory: two x, y and z more, half of what `with_storm` over `soba` keeps.
  """
  checks.enforce(mrbo, locals())
  problem = _bilevel.problem_of(
    upper, lower, lower_optimizer, curvature=curvature, damping=damping
  )
  dual = _bilevel.dual_of(dual_lr, None, 1, dual_radius)
  weights = beta, lower_beta, lower_beta

  def renew(look, now, state, batch):
    seen, fresh = look(*now, batch)
    x, y, z, directions = state.memory
    _, old = look(x, y, z, batch)
    moved = tuple(map(tracking.storm, directions, fresh, old, weights))
    return seen, trees.where(state.step > 0, moved, fresh)

  return _srba.recursive_estimator(
    problem, dual, renew, lower_average, 1 / lower_beta
  )
