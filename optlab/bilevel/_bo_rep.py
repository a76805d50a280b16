"""BO-REP: bilevel optimization with an upper level of unbounded smoothness.

Hao, Gong, Liu, "Bilevel Optimization under Unbounded Smoothness: A New
Algorithm and Convergence Analysis", ICLR 2024, https://arxiv.org/abs/2401.09587.
Three parts: `refine` for the start, the estimator `bo_rep`, and the upper step
`normalized_momentum`, which has a module of its own.
"""

from collections.abc import Callable

import jax
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel
from optlab.bilevel import _dual
from optlab.bilevel import _lower
from optlab.bilevel import _problem


@checks.domains(
  lower=_bilevel.LEVELS['lower'],
  learning_rate=checks.POSITIVE,
  first_steps=checks.Integer(),
  epochs=checks.Integer(),
  radius=_bilevel.RADIUS,
)
def refine(
  lower: _problem.Objective,
  params: base.Params,
  inner: base.Params,
  batches: base.Batch,
  *,
  learning_rate: float | jax.Array,
  first_steps: int,
  epochs: int,
  radius: float | jax.Array | None = None,
) -> base.Params:
  r"""Initialization refinement: the lower variable before the first step.

  Epoch-SGD. Epoch :math:`k = 0, 1, \dots` takes :math:`2^k` ``first_steps``
  steps of rate :math:`\gamma\, 2^{-k}`, each projected on the ball of
  ``radius`` :math:`2^{-k/2}` around the epoch's start, and returns the mean of
  its iterates.

  Args:
    lower: The lower objective, ``(x, y, batch) -> scalar``.
    params: The upper variable x, held fixed.
    inner: Where the lower variable y starts.
    batches: Fresh samples, stacked on a leading axis of ``first_steps *
      (2**epochs - 1)``; a tree without leaves where ``lower`` needs no data.
    learning_rate: Rate of the first epoch.
    first_steps: Steps of the first epoch.
    epochs: Number of epochs.
    radius: Radius of the first ball; ``None`` is none.

  Returns:
    The refined lower variable. An epoch that ends at a number that is not
    finite is dropped.

  Raises:
    TypeError: ``lower`` is not a function, a count not an integer, or a rate
      or radius not a real number.
    ValueError: A count is below one, a rate or radius is not positive, or
      ``batches`` has another length.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> lower = lambda x, y, batch: jnp.sum((y - x) ** 2)
    >>> y = optlab.bilevel.refine(lower, jnp.ones(2), jnp.zeros(2), None,
    ...                   learning_rate=0.3, first_steps=4, epochs=4)
    >>> print(jnp.max(jnp.abs(y - 1.0)) < 0.02)
    True

  References:
    Hao et al., `Bilevel Optimization under Unbounded Smoothness
    <https://arxiv.org/abs/2401.09587>`_, ICLR 2024, after Hazan and Kale,
    `Beyond the Regret Minimization Barrier
    <https://jmlr.org/papers/v15/hazan14a.html>`_, JMLR 2014.

  Notes:
    Cost: one gradient a sample. Compile it together with the first step, or
    under a ``jit`` of its own; it traces one loop an epoch.
  """
  checks.enforce(refine, locals())
  total = first_steps * (2**epochs - 1)
  _lower.check_step_samples(batches, total, 'first_steps * (2**epochs - 1)')
  start = 0
  for epoch in range(epochs):
    steps = first_steps * 2**epoch
    problem = _bilevel.problem_of(
      lower, lower, optax.sgd(learning_rate / 2**epoch)
    )
    end, *_ = _lower.descend(
      problem,
      params,
      inner,
      problem.optimizer.init(inner),
      jax.tree.map(lambda leaf: leaf[start : start + steps], batches),  # noqa: B023
      steps=steps,
      radius=None if radius is None else radius / 2 ** (0.5 * epoch),
      average=True,
    )
    inner = trees.where(trees.is_finite(end), end, inner)
    start += steps
  return inner


@checks.domains(
  **_bilevel.LEVELS,
  period=checks.Integer(),
  lower_steps=checks.Integer(),
  radius=_bilevel.RADIUS,
  **_bilevel.DUAL,
  **_bilevel.SYSTEM,
)
def bo_rep(
  upper: _problem.Objective,
  lower: _problem.Objective,
  lower_optimizer: optax.GradientTransformation | None,
  dual_lr: base.ScalarOrSchedule | None = None,
  *,
  period: int = 2,
  lower_steps: int = 5,
  radius: float | jax.Array | None = None,
  average: bool = True,
  fresh_dual: bool = False,
  dual_optimizer: optax.GradientTransformation | None = None,
  dual_steps: int = 1,
  dual_radius: float | jax.Array | None = None,
  damping: base.ScalarOrSchedule | None = None,
  curvature: Callable[..., base.Operator] | None = None,
  lower_map: _problem.Objective | None = None,
  has_aux: bool = False,
  reuse_sample: bool = False,
) -> base.GradientEstimator:
  r"""Hypergradients with periodic lower updates, by Hao, Gong and Liu.

  Choose it for ``min_x f(x, y*(x))``, ``y*(x) = argmin_y g(x, y)``, where
  ``g`` is strongly convex in ``y`` and the curvature of ``f`` may grow with its
  gradient (recurrent networks). Pair it with `normalized_momentum`, and refine
  the start of ``y`` with `refine`.

  .. math::
    y_t &= \begin{cases} \text{mean of } N \text{ projected steps on }
      g(x_t, \cdot) & t > 0,\ t \bmod \text{period} = 0 \\
      y_{t-1} & \text{otherwise} \end{cases} \\
    d_t &= f_x(x_t, y_t; \xi) - g_{xy}(x_t, y_t; \zeta)\, z_t \\
    z_{t+1} &= \Pi[z_t - \nu (g_{yy}(x_t, y_t; \zeta)\, z_t
      - f_y(x_t, y_t; \xi))]

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``.
    dual_lr: The rate :math:`\nu`, below two over the largest eigenvalue of
      ``g_yy``; a number or a schedule of accepted steps.
    period: Steps from one round of lower updates to the next.
    lower_steps: Lower steps N in a round, each with a sample of its own.
    radius: Keeps a round's iterates within this distance of its start, over
      all of ``y``; ``None`` is none.
    average: Whether a round returns the mean of its iterates or the last one.
    fresh_dual: Whether the estimate uses :math:`z_{t+1}` instead of
      :math:`z_t`, for one cross product more.
    dual_optimizer: See `soba`.
    dual_steps: See `soba`.
    dual_radius: See `soba`.
    damping: See `soba`.
    curvature: See `soba`.
    lower_map: See `soba`.
    has_aux: See `soba`.
    reuse_sample: Whether lower steps take ``batch.lower`` where the batch has
      no ``step_samples``.

  Returns:
    A `GradientEstimator`: ``init(x, y)``, and ``estimate`` eats a
    `BilevelBatch`. Its state is a `BilevelState`; `report` lists its ``info``.

  Raises:
    TypeError: An argument is of a wrong type, or a leaf not a real array.
    ValueError: A number is outside its domain, ``lower_optimizer`` keeps y in
      a set, or the step samples are missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum(jnp.cosh(y - 1.0))
    >>> lower = lambda x, y, batch: jnp.sum((y - 2.0 * x) ** 2)
    >>> estimator = optlab.bo_rep(upper, lower, optax.sgd(0.2), 0.2)
    >>> tx = optlab.normalized_momentum(optax.cosine_decay_schedule(0.1, 200))
    >>> state = optlab.init(jnp.array([2.0]), estimator, tx, jnp.array([4.0]))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> batch = optlab.BilevelBatch(upper=None, lower=None)
    >>> for _ in range(200):
    ...   state, value = step(state, batch)
    >>> print(f'{value:.2f} {state.params[0]:.1f}')
    1.00 0.5

  References:
    Hao, Gong, Liu, `Bilevel Optimization under Unbounded Smoothness: A New
    Algorithm and Convergence Analysis <https://arxiv.org/abs/2401.09587>`_,
    ICLR 2024.

  Notes:
    Departures. ``z`` is one step of SGD on its quadratic a step, in place of
    the paper's Neumann series; ``z_t`` before its update gave better results
    than the fresh one. The estimate does not contain the momentum: that is the
    optimizer's. The authors' code differs from the paper (it takes the cross
    derivative on validation data and does not clear the lower gradients); this
    follows the paper.

    Cost: a step takes one upper gradient and one lower linearization with one
    Hessian-vector and one cross product; every ``period`` steps ``lower_steps``
    lower gradients more. Memory: ``y``, ``z`` and the lower optimizer's state.
    Under ``vmap`` a round is computed at every step, since a batch of
    conditions becomes a select.

    What survives a far start is the bounded step with a decaying rate, whatever
    the estimator; measured results stand in ``docs/reproduced.md``.

    Strong convexity is assumed. Where ``g_yy`` is singular along ``f_y``, ``z``
    grows linearly: ``dual_radius`` bounds it and ``dual_residual`` shows it.
    Where it is indefinite, or after 200 steps not felt, ``info.ok`` is false. A
    step with numbers that are not finite is rejected: the state is held, the
    hypergradient is zero, and ``info.total_rejected`` counts it.
  """
  checks.enforce(bo_rep, locals())
  problem = _bilevel.problem_of(
    upper, lower, lower_optimizer, has_aux=has_aux, lower_map=lower_map,
    curvature=curvature, damping=damping, reuse_sample=reuse_sample,
  )  # fmt: skip
  dual = _bilevel.dual_of(dual_lr, dual_optimizer, dual_steps, dual_radius)

  def move(params, state, batch):
    samples, of = _lower.sampler(problem, batch, lower_steps)
    return jax.lax.cond(
      (state.step > 0) & (state.step % period == 0),
      lambda: _lower.descend(
        problem, params, state.inner, state.lower_opt_state, samples,
        steps=lower_steps, held=state.info.constrained, of=of, radius=radius,
        average=average,
      ),
      lambda: (state.inner, state.lower_opt_state, state.info.constrained),
    )  # fmt: skip

  def solve(point, state, grad_y, beside):
    return _dual.advance(
      dual, problem, point, state, grad_y, beside, fresh=fresh_dual
    )

  return _bilevel.estimator(problem, solve, move, dual, period)
