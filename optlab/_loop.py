"""The compiled loop of `minimize`."""

from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import io_callback
import jax.numpy as jnp
import numpy as np
import optax

from optlab import _box
from optlab import _counts
from optlab import _kept
from optlab import _results
from optlab import _varying
from optlab import base
from optlab import trees


class Run(NamedTuple):
  """What stays the same in a run; see `minimize`."""

  tx: optax.GradientTransformationExtraArgs
  fun: Callable[..., jax.Array]
  max_steps: int
  max_seconds: Any
  grad_tol: Any
  target_value: Any
  stall_steps: int | None
  stall_tol: Any
  curvature: Callable[..., base.Operator] | None
  box: _box.Box | None
  trace: Callable[[_results.MinimizeResult], Any] | None
  callback: Callable[[_results.Progress], Any] | None


class _Loop(NamedTuple):
  """At the head of the loop: a point that is still to be evaluated."""

  result: _results.MinimizeResult
  best: jax.Array  # shape (), the lowest value seen
  since_best: jax.Array  # shape (), int32, steps without progress
  began: jax.Array  # shape (), int32, milliseconds of the host's clock
  running: jax.Array  # shape (), bool


def loop(
  run: Run, params: base.Params, opt_state: base.OptState | None
) -> _results.MinimizeResult:
  """Runs to a stopping test.

  Args:
    run: How.
    params: The start, in the box.
    opt_state: The state to go on from; ``None`` starts afresh.

  Returns:
    The result.
  """
  opt_state = run.tx.init(params) if opt_state is None else opt_state
  last = _varying.while_loop(
    lambda now: now.running,
    lambda now: _turn(run, now),
    _start(run, params, opt_state),
  )
  return last.result


def _start(run, params, opt_state):
  """The loop before its first evaluation."""
  kind, _ = jax.eval_shape(jax.value_and_grad(run.fun), params)
  value = jnp.full((), jnp.inf, kind.dtype)
  norm = jnp.zeros((), trees.real_dtype(params))
  zero = jnp.zeros((), jnp.int32)
  held = ()
  if run.box is not None:
    held = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.int8), params)
  result = _results.MinimizeResult(
    params=params,
    opt_state=opt_state,
    value=value,
    grad_norm=norm,
    steps=zero,
    status=zero,
    trace=None,
    counts=_counts.Counts(zero, zero, zero, zero),
    active=held,
  )
  if run.trace is not None:
    rows = jax.tree.map(
      lambda row: jnp.zeros((run.max_steps + 1, *row.shape), row.dtype),
      jax.eval_shape(run.trace, result),
    )
    result = result._replace(trace=rows)
  return _Loop(result, value, zero, zero, jnp.asarray(True))


def _turn(run, now):
  """Evaluates, looks whether to stop, and takes a step if not.

  The objective stands here once for the start and for all steps: each site is
  compiled.
  """
  result = now.result
  first = result.steps == 0
  fun, land = run.fun, None
  if run.box is not None:
    land = _box.landing(run.box, result.params, result.active)
    fun = _box.objective(run.fun, run.box, land)
  # The state of an earlier run may be of another point, box or objective.
  value, grad, evaluated = _kept.evaluate(
    fun, result.params, result.opt_state, anew=first
  )
  if run.box is not None:
    held = _box.active(run.box, result.params, grad)
    result = result._replace(active=held)
    land = _box.landing(run.box, result.params, held)
    fun = _box.objective(run.fun, run.box, land)
  result = result._replace(
    value=value,
    grad_norm=trees.norm(grad),
    counts=_counts.evaluated(result.counts, evaluated),
  )
  result = _record(run, result)
  progress = first | (value < now.best - run.stall_tol * jnp.abs(now.best))
  now = now._replace(
    result=result,
    best=jnp.minimum(now.best, value),
    since_best=jnp.where(progress, 0, now.since_best + 1),
  )
  now = _stop(run, now, first)
  result = _varying.cond(
    now.running,
    lambda result, grad: _step(run, result, grad, fun, land),
    lambda result, grad: result,
    now.result,
    grad,
  )
  return now._replace(result=result)


def _step(run, result, grad, fun, land):
  """One update of the transformation."""
  extras = {}
  if run.curvature is not None:
    operator = run.curvature(result.params)
    if land is not None:
      operator = _box.restricted(operator, result.active)
    extras['curvature'] = operator
  updates, opt_state = run.tx.update(
    trees.conjugate(grad),
    result.opt_state,
    result.params,
    value=result.value,
    grad=grad,  # optax's line searches take it as jax.grad makes it.
    value_fn=fun,
    **extras,
  )
  params = trees.rounded(optax.apply_updates(result.params, updates))
  return result._replace(
    params=params if land is None else land(params),
    opt_state=opt_state,
    steps=result.steps + 1,
    counts=_counts.after(result.counts, result.opt_state, opt_state),
  )


def _stop(run, now, first):
  """Whether the loop goes on; the first test that holds names the status."""
  result = now.result
  # What an earlier run said of its last step says nothing of this one.
  stalled = ~first & _kept.says(result.opt_state, 'stalled')
  if run.stall_steps is not None:
    stalled |= now.since_best >= run.stall_steps
  stopped, late, began = _ask_host(run, now)
  finite = jnp.isfinite(result.value) & jnp.isfinite(result.grad_norm)
  tests = [
    (~finite, _results.NON_FINITE),
    (result.grad_norm <= run.grad_tol, _results.GRAD_TOL),
    (result.value <= run.target_value, _results.TARGET_VALUE),
    (stopped, _results.STOPPED),
    (stalled, _results.STALLED),
    (~first & _kept.says(result.opt_state, 'failed'), _results.REJECTED),
    (result.steps >= run.max_steps, _results.MAX_STEPS),
    (late, _results.MAX_SECONDS),
  ]
  stop, status = zip(*tests, strict=True)
  status = jnp.select(
    stop, [jnp.int32(code) for code in status], _results.MAX_STEPS
  )
  return now._replace(
    result=result._replace(status=status.astype(jnp.int32)),
    running=~jnp.any(jnp.stack(stop)),
    began=began,
  )


def _ask_host(run, now):
  """Whether the callback, or the clock, stops the run; when it began."""
  no = jnp.asarray(False)
  result = now.result
  if run.callback is None and run.max_seconds is None:
    return no, no, now.began
  progress: Any = _results.Progress(
    result.params, result.value, result.grad_norm, result.steps, result.counts
  )
  if run.callback is None:
    progress = progress._replace(params=None, counts=None)

  def ask(began, max_seconds, progress):
    clock = np.int32(int(1e3 * time.monotonic()) & 0x7FFFFFFF)
    if progress.steps == 0:
      return np.bool_(False), np.bool_(False), clock
    stopped = False
    if run.callback is not None:
      stopped = bool(run.callback(progress) or False)
    taken = (int(clock) - int(began)) & 0x7FFFFFFF
    late = max_seconds is not None and taken >= 1e3 * max_seconds
    return np.bool_(stopped), np.bool_(late), began

  flag = jax.ShapeDtypeStruct((), bool)
  shapes = flag, flag, jax.ShapeDtypeStruct((), jnp.int32)
  return io_callback(ask, shapes, now.began, run.max_seconds, progress)


def _record(run, result):
  """Adds a row to the trace."""
  if run.trace is None:
    return result
  row = run.trace(result._replace(trace=None))
  return result._replace(
    trace=jax.tree.map(
      lambda rows, leaf: rows.at[result.steps].set(leaf), result.trace, row
    )
  )
