"""What the bilevel estimators share: batches, state, one way to make them.

The problem is ``min_x f(x, y*(x))`` with ``y*(x) = argmin_y g(x, y)`` and ``g``
strongly convex in ``y``. The user writes ``upper(x, y, batch)`` for ``f`` and
``lower(x, y, batch)`` for ``g``; ``x`` and ``y`` are any pytrees. With the
*linear-system variable* ``z``, where ``g_yy z = f_y``, the hypergradient is
``f_x - g_xy z``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import estimators
from optlab import trees
from optlab.bilevel import _dual
from optlab.bilevel import _lower
from optlab.bilevel import _problem


class BilevelBatch(NamedTuple):
  """The samples of one bilevel step.

  Attributes:
    upper: Sample of the upper objective.
    lower: Sample of the lower objective for Hessian-vector and cross products
      (and for the lower step of `soba` and `saba`).
    step_samples: Fresh samples for the lower steps, stacked on a leading axis
      of ``lower_steps``; unused by `soba` and `saba`.
  """

  upper: base.Batch
  lower: base.Batch
  step_samples: base.Batch = ()


class BilevelInfo(NamedTuple):
  """Diagnostics of a hypergradient estimator; ``()`` is what it has not."""

  lower_grad_norm: Any  # shape (), norm of g_y at the last accepted estimate
  dual_residual: Any  # shape (), norm of g_yy z - f_y there
  constrained: jax.Array  # shape (), bool, lower steps held a part of y
  ok: jax.Array  # shape (), bool, no assumption was seen to fail there
  total_not_ok: jax.Array  # shape (), int32
  rejected: jax.Array  # shape (), bool, whether the last was not finite
  total_rejected: jax.Array  # shape (), int32


class BilevelState(NamedTuple):
  """State of a hypergradient estimator."""

  step: jax.Array  # shape (), int32, accepted estimates
  inner: base.Params  # the lower variable y
  dual: base.Params  # the linear-system variable z, float32 or wider
  lower_opt_state: base.OptState
  dual_state: Any  # what the steps of z need; () where it takes none
  memory: Any  # what the method alone keeps; () for most
  info: BilevelInfo


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


def check_batch(batch: Any) -> None:
  """Raises a ``TypeError`` unless ``batch`` is a `BilevelBatch`."""
  checks.check_fields('batch', batch, BilevelBatch._fields, 'a BilevelBatch')


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


def init_state(
  problem: _problem.Problem,
  params: base.Params,
  inner: base.Params,
  *,
  dual: _dual.Dual | bool = True,
  memory: Any = (),
) -> BilevelState:
  """The state before the first estimate, with ``z = 0`` if it has one."""
  for name, tree in (('params', params), ('inner', inner)):
    check_real(name, tree)
  inner = trees.own(inner)
  if problem.lower_map is None and dual:
    _lower.check_free(problem.optimizer, inner)
  z = trees.zeros_accumulator(inner) if dual else ()
  # Not one zero twice: a buffer can be donated once.
  zero = lambda dtype: jnp.zeros((), dtype)
  wide = trees.accumulator_dtype(inner)
  return BilevelState(
    step=zero(jnp.int32),
    inner=inner,
    dual=z,
    lower_opt_state=(
      () if problem.optimizer is None else problem.optimizer.init(inner)
    ),
    dual_state=_dual.init(dual, z) if isinstance(dual, _dual.Dual) else (),
    memory=memory,
    info=BilevelInfo(
      lower_grad_norm=zero(wide),
      dual_residual=zero(wide) if dual else (),
      constrained=zero(bool),
      ok=jnp.ones((), bool),
      total_not_ok=zero(jnp.int32),
      rejected=zero(bool),
      total_rejected=zero(jnp.int32),
    ),
  )


def check_real(name: str, tree: Any) -> None:
  """Raises a ``TypeError`` for a leaf that no hypergradient exists for."""
  checks.check_params(name, tree)
  for path, leaf in jax.tree.leaves_with_path(tree):
    if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
      raise TypeError(
        f'{name}{jax.tree_util.keystr(path)} must be real, got dtype'
        f' {leaf.dtype}: pass real and imaginary parts as two leaves.'
      )


def accept(
  estimate: base.Estimate,
  old: BilevelState,
  *others: base.Params,
  dual_seen: bool = False,
  ok: Any = True,
  constrained: Any = False,
  lower_grad_norm: Any = (),
  dual_residual: Any = (),
  **fields: Any,
) -> tuple[base.Estimate, BilevelState]:
  """Commits a step, or holds the state where it is not finite.

  A rejected step keeps the old state but for its count; its gradient is zero
  and its value is reported as it is.

  Args:
    estimate: The estimate.
    old: The state before the step, to hold.
    *others: What must be finite too, beside the hypergradient, y and z.
    dual_seen: Whether z is finite where ``others`` are.
    ok: For `BilevelInfo`, whether the linear system is.
    constrained: For `BilevelInfo`.
    lower_grad_norm: For `BilevelInfo`.
    dual_residual: For `BilevelInfo`.
    **fields: What the step changes in the state, beside its count.

  Returns:
    The estimate and the state.
  """
  ok = jnp.asarray(ok) & ~jnp.asarray(constrained)
  info = old.info._replace(
    lower_grad_norm=lower_grad_norm,
    dual_residual=dual_residual,
    constrained=jnp.asarray(constrained),
    ok=ok,
    total_not_ok=old.info.total_not_ok + (~ok).astype(jnp.int32),
  )
  new = old._replace(step=old.step + 1, info=info, **fields)
  dual = () if dual_seen else new.dual
  # The residual is NaN where f_y is, which conjugate gradients swallow.
  finite = trees.is_finite(
    estimate.grads, new.inner, dual, dual_residual, others
  )
  estimate, state = estimators.accept(finite, estimate, new, old)
  info = state.info._replace(
    rejected=~finite,
    total_rejected=old.info.total_rejected + (~finite).astype(jnp.int32),
  )
  return estimate, state._replace(info=info)


def hypergradient(grad_x: base.Updates, cross: base.Updates) -> base.Updates:
  """Returns ``f_x - g_xy z``."""
  return trees.combine(jnp.subtract, grad_x, cross)


Solve = Callable[..., tuple[_dual.Solution, base.Updates, _problem.Lower]]


def estimator(
  problem: _problem.Problem,
  solve: Solve,
  move: Callable[..., Any] | None = None,
  dual: _dual.Dual | bool = True,
) -> base.GradientEstimator:
  """An estimator of ``f_x - g_xy z``.

  Args:
    problem: The levels.
    solve: ``(point, state, f_y) -> (solution, g_xy z, lower)``: the next z, the
      cross product that the estimate takes, what was seen of the lower level.
    move: ``(params, state, batch) -> (y, lower_opt_state, held)``, before the
      derivatives are taken; without it, y takes one step after them.
    dual: How z moves, if in steps.

  Returns:
    A `GradientEstimator`; ``init(x, y)`` starts at ``z = 0``.
  """

  def init(params, inner):
    return init_state(problem, params, inner, dual=dual)

  def estimate(params, state, batch):
    check_batch(batch)
    check_real('params', params)
    inner, lower_opt_state = state.inner, state.lower_opt_state
    held = state.info.constrained
    if move is not None:
      inner, lower_opt_state, held = move(params, state, batch)
    value, upper_aux, grad_x, grad_y = _problem.upper_value_and_grads(
      problem, params, inner, batch.upper
    )
    point = _problem.Point(params, inner, batch.lower, state.step)
    solution, cross, lower = solve(point, state, grad_y)
    if move is None:
      inner, lower_opt_state, held = _lower.step(
        problem, params, inner, lower_opt_state, batch.lower,
        held,
        seen=None if problem.lower_map else (lower.value, lower.grad),
      )  # fmt: skip
    result = base.Estimate(
      value,
      hypergradient(grad_x, cross),
      aux=aux_of(problem, upper_aux, lower.aux),
    )
    # A norm is finite where all numbers are: these need no second look.
    looked, dual_seen = solution.looked, len(solution.looked) == 2
    if not dual_seen:
      looked = (lower.grad, trees.norm(lower.grad))
    return accept(
      result,
      state,
      looked,
      dual_seen=dual_seen,
      inner=inner,
      dual=solution.dual,
      lower_opt_state=lower_opt_state,
      dual_state=solution.dual_state,
      lower_grad_norm=looked[-1],
      dual_residual=solution.residual,
      ok=solution.ok,
      constrained=held,
    )

  return base.GradientEstimator(init, estimate)


def aux_of(problem: _problem.Problem, upper: Any, lower: Any) -> Any:
  """The auxiliary output of an estimate."""
  return _problem.BilevelAux(upper, lower) if problem.upper.has_aux else ()
