"""What a bilevel estimator is given and keeps: batches, state, info."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import _growth
from optlab import base
from optlab import checks
from optlab import estimators
from optlab import trees
from optlab.bilevel import _dual
from optlab.bilevel import _free
from optlab.bilevel import _lag
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
  lower_lag: Any  # shape (), how far y* is from y at least, of late on average
  dual_residual: Any  # shape (), norm of g_yy z - f_y there
  truncated: Any  # shape (), part of z that a series lacks at least
  constrained: jax.Array  # shape (), bool, lower steps held a part of y
  ok: jax.Array  # shape (), bool, not rejected, no assumption seen to fail
  total_not_ok: jax.Array  # shape (), int32, without the rejected
  rejected: jax.Array  # shape (), bool, whether the last was not finite
  total_rejected: jax.Array  # shape (), int32


class BilevelState(NamedTuple):
  """State of a hypergradient estimator."""

  step: jax.Array  # shape (), int32, accepted estimates
  inner: base.Params  # the lower variable y
  dual: base.Params  # the linear-system variable z, float32 or wider
  lower_opt_state: base.OptState
  dual_state: Any  # what the steps of z need; () where it takes none
  pace: Any  # shape (7,), how y follows x, see `_lag`; () where nobody looks
  rise: Any  # shape (3,), how y and g_y grow, see `_growth`; () likewise
  memory: Any  # what the method alone keeps; () for most
  info: BilevelInfo


def check_batch(batch: Any) -> None:
  """Raises unless ``batch`` is a `BilevelBatch` whose samples have rows."""
  checks.check_fields('batch', batch, BilevelBatch._fields, 'a BilevelBatch')
  for name in BilevelBatch._fields:
    leaves = jax.tree.leaves(getattr(batch, name))
    # The mean of no rows is NaN with a gradient of zero, which looks done.
    if leaves and not any(map(jnp.size, leaves)):
      raise ValueError(
        f'batch.{name} must have rows, got arrays of size zero only: give None'
        ' for a level without data.'
      )


def init_state(
  problem: _problem.Problem,
  params: base.Params,
  inner: base.Params,
  *,
  dual: _dual.Dual | bool = True,
  memory: Any = (),
  smooth: bool = False,
  series: bool = False,
  rises: bool = True,
) -> BilevelState:
  """The state before the first estimate, with ``z = 0`` if it has one."""
  for name, tree in (('params', params), ('inner', inner)):
    checks.check_real_params(name, tree)
  inner = trees.own(inner)
  if problem.lower_map is None and dual:
    _free.check_free(problem.optimizer, inner)
  elif problem.lower_map is None:
    _free.check_moves(problem.optimizer, inner, smooth=smooth)
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
    pace=_lag.start(wide) if dual else (),
    rise=_growth.start(wide) if rises else (),
    memory=memory,
    info=BilevelInfo(
      lower_grad_norm=zero(wide),
      lower_lag=zero(wide) if dual else (),
      dual_residual=zero(wide) if dual else (),
      truncated=zero(wide) if series else (),
      constrained=zero(bool),
      ok=jnp.ones((), bool),
      total_not_ok=zero(jnp.int32),
      rejected=zero(bool),
      total_rejected=zero(jnp.int32),
    ),
  )


def accept(
  estimate: base.Estimate,
  old: BilevelState,
  *others: base.Params,
  sizes: Any = (),
  seen: bool = False,
  lower_value: Any = 0.0,
  ok: Any = True,
  constrained: Any = False,
  lower_grad_norm: Any = (),
  dual_residual: Any = (),
  truncated: Any = (),
  **fields: Any,
) -> tuple[base.Estimate, BilevelState]:
  """Commits a step, or holds the state where it is not finite.

  A rejected step keeps the old state but for its count; its gradient is zero
  and its value is reported as it is.

  Args:
    estimate: The estimate.
    old: The state before the step, to hold.
    *others: What must be finite too, beside the hypergradient, y and z.
    sizes: Norms that grow where y runs away, see `_growth.follow`; of those
      that look.
    seen: Whether y and z are finite where ``others`` are.
    lower_value: What must be finite as well.
    ok: For `BilevelInfo`, whether the linear system is.
    constrained: For `BilevelInfo`.
    lower_grad_norm: For `BilevelInfo`.
    dual_residual: For `BilevelInfo`.
    truncated: For `BilevelInfo`; more than a tenth is not ok.
    **fields: What the step changes in the state, beside its count.

  Returns:
    The estimate and the state.
  """
  ok = jnp.asarray(ok) & ~jnp.asarray(constrained)
  if isinstance(truncated, jax.Array):
    ok &= ~(truncated > _dual.LACKING)
  if sizes:
    fields['rise'], away = _growth.follow(old.rise, old.step, sizes)
    ok &= ~away
  pace = fields.get('pace', ())
  info = old.info._replace(
    lower_grad_norm=lower_grad_norm,
    lower_lag=pace[1] if isinstance(pace, jax.Array) else (),
    dual_residual=dual_residual,
    truncated=truncated,
    constrained=jnp.asarray(constrained),
    ok=ok,
    total_not_ok=old.info.total_not_ok + (~ok).astype(jnp.int32),
  )
  new = old._replace(step=old.step + 1, info=info, **fields)
  variables = () if seen else (new.inner, new.dual)
  # The residual is NaN where f_y is, which conjugate gradients swallow; and a
  # logarithm has a slope where it has no value.
  finite = trees.is_finite(estimate.grads, variables, dual_residual, others)
  finite &= jnp.isfinite(estimate.value) & jnp.isfinite(lower_value)
  estimate, state = estimators.accept(finite, estimate, new, old)
  info = state.info._replace(
    ok=state.info.ok & finite,
    rejected=~finite,
    total_rejected=old.info.total_rejected + (~finite).astype(jnp.int32),
  )
  return estimate, state._replace(info=info)
