"""What the bilevel estimators share: domains, parts, one way to make them.

The problem is ``min_x f(x, y*(x))`` with ``y*(x) = argmin_y g(x, y)`` and ``g``
strongly convex in ``y``. The user writes ``upper(x, y, batch)`` for ``f`` and
``lower(x, y, batch)`` for ``g``; ``x`` and ``y`` are any pytrees. With the
*linear-system variable* ``z``, where ``g_yy z = f_y``, the hypergradient is
``f_x - g_xy z``.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _dual
from optlab.bilevel import _lag
from optlab.bilevel import _lower
from optlab.bilevel import _problem
from optlab.bilevel import _state

LEVELS = {
  'upper': checks.Function('(x, y, batch) -> scalar'),
  'lower': checks.Function('(x, y, batch) -> scalar'),
}
RATE = checks.POSITIVE._replace(schedule=True)
RADIUS = checks.POSITIVE._replace(
  optional=True, remedy='Pass None for no projection.'
)
SYSTEM = {
  'dual_radius': RADIUS,
  'damping': checks.NON_NEGATIVE._replace(schedule=True, optional=True),
  'curvature': checks.Function('(x, y, batch) -> operator on y', optional=True),
  'lower_map': checks.Function('(x, y, batch) -> y', optional=True),
}
DUAL = {
  'dual_lr': RATE._replace(optional=True),
  'dual_optimizer': checks.TRANSFORMATION._replace(optional=True),
  'dual_steps': checks.Integer(),
}


def problem_of(
  upper: _problem.Objective,
  lower: _problem.Objective,
  lower_optimizer: optax.GradientTransformation | None,
  *,
  has_aux: bool = False,
  lower_map: _problem.Objective | None = None,
  curvature: Callable[..., base.Operator] | None = None,
  damping: base.ScalarOrSchedule | None = None,
  reuse_sample: bool = False,
) -> _problem.Problem:
  """The two levels in one form; checks what domains cannot say."""
  if lower_map is None:
    checks.check_transformation('lower_optimizer', lower_optimizer)
  optimizer = None
  if lower_optimizer is not None:
    checks.check_transformation('lower_optimizer', lower_optimizer)
    optimizer = optax.with_extra_args_support(lower_optimizer)
  if lower_map is not None and curvature is not None:
    raise ValueError(
      'curvature must be None beside lower_map, whose own derivative is in the'
      ' linear system.'
    )
  return _problem.Problem(
    _problem.Level('upper', upper, has_aux),
    _problem.Level('lower', lower, has_aux),
    optimizer,
    lower_map,
    curvature,
    damping,
    reuse_sample,
  )


def dual_of(
  dual_lr: base.ScalarOrSchedule | None,
  dual_optimizer: optax.GradientTransformation | None,
  dual_steps: int,
  dual_radius: Any,
) -> _dual.Dual:
  """How z moves; raises unless it has a rate or an optimizer, not both."""
  if (dual_lr is None) == (dual_optimizer is None):
    raise ValueError(
      f'dual_lr must be given, or dual_optimizer in its place; got {dual_lr!r}'
      f' and {"none" if dual_optimizer is None else "one"}.'
    )
  if dual_optimizer is not None:
    dual_optimizer = optax.with_extra_args_support(dual_optimizer)
  return _dual.Dual(dual_lr, dual_optimizer, dual_steps, dual_radius)


def hypergradient(grad_x: base.Updates, cross: base.Updates) -> base.Updates:
  """Returns ``f_x - g_xy z``."""
  return trees.combine(jnp.subtract, grad_x, cross)


Solve = Callable[..., tuple[_dual.Solution, base.Updates, _problem.Lower, Any]]


def estimator(
  problem: _problem.Problem,
  solve: Solve,
  move: Callable[..., Any] | None = None,
  dual: _dual.Dual | bool = True,
  every: int = 1,
  series: bool = False,
) -> base.GradientEstimator:
  """An estimator of ``f_x - g_xy z``.

  Args:
    problem: The levels.
    solve: ``(point, state, f_y, beside) -> (solution, g_xy z, lower, rest)``:
      the next z, the cross product that the estimate takes, what was seen of
      the lower level; see `_dual.advance`.
    move: ``(params, state, batch) -> (y, lower_opt_state, held)``, before the
      derivatives are taken; without it, y takes one step after them.
    dual: How z moves, if in steps.
    every: Steps from one move of y to the next.
    series: Whether z is a sum of so many terms.

  Returns:
    A `GradientEstimator`; ``init(x, y)`` starts at ``z = 0``.
  """

  def init(params, inner):
    return _state.init_state(problem, params, inner, dual=dual, series=series)

  def estimate(params, state, batch):
    _state.check_batch(batch)
    checks.check_real_params('params', params)
    inner, lower_opt_state = state.inner, state.lower_opt_state
    held = state.info.constrained
    if move is not None:
      inner, lower_opt_state, held = move(params, state, batch)
    value, upper_aux, grad_x, grad_y = _problem.upper_value_and_grads(
      problem, params, inner, batch.upper
    )
    point = _problem.Point(params, inner, batch.lower, state.step)

    def beside(lower, z):
      after = _lower.Step(inner, lower_opt_state)
      if move is None:
        after = _lower.step(
          problem, params, inner, lower_opt_state, batch.lower,
          seen=None if problem.lower_map else (lower.value, lower.grad),
        )  # fmt: skip
      return *_lag.beside(z, lower.grad, after, state.inner), after

    solution, cross, lower, after = solve(point, state, grad_y, beside)
    _, slope, size, along, moved, *found = solution.seen
    pace, behind = _lag.follow(
      state.pace,
      state.step,
      along,
      solution.scale,
      moved,
      size,
      every=every,
    )
    if move is None:
      held = _lower.holds_some(found, held)
    result = base.Estimate(
      value,
      hypergradient(grad_x, cross),
      aux=aux_of(problem, upper_aux, lower.aux),
    )
    return _state.accept(
      result,
      state,
      solution.seen[:3],  # A norm is finite where all numbers are.
      seen=True,
      sizes=(slope, size),
      lower_value=lower.value,
      inner=after.inner,
      dual=solution.dual,
      lower_opt_state=after.opt_state,
      dual_state=solution.dual_state,
      pace=pace,
      lower_grad_norm=slope,
      dual_residual=solution.residual,
      truncated=solution.truncated,
      ok=solution.ok & ~behind,
      constrained=held,
    )

  return base.GradientEstimator(init, estimate)


def aux_of(problem: _problem.Problem, upper: Any, lower: Any) -> Any:
  """The auxiliary output of an estimate."""
  return _problem.BilevelAux(upper, lower) if problem.upper.has_aux else ()
