"""A compiled loop of an optimizer, to a tolerance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import io_callback
import jax.numpy as jnp
import numpy as np
import optax

from optlab import _counts
from optlab import _implicit
from optlab import _results
from optlab import base
from optlab import checks
from optlab import trees


class _Run(NamedTuple):
  """What stays the same in a run."""

  tx: optax.GradientTransformationExtraArgs
  fun: Callable[..., jax.Array]
  max_steps: int
  grad_tol: Any
  target_value: Any
  stall_steps: int | None
  stall_tol: Any
  curvature: Callable[..., base.Operator] | None
  trace: Callable[[_results.MinimizeResult], Any] | None
  callback: Callable[[_results.Progress], Any] | None


class _LoopState(NamedTuple):
  result: _results.MinimizeResult
  grad: base.Updates  # as jax.grad makes it
  best: jax.Array  # shape (), the lowest value seen
  since_best: jax.Array  # shape (), int32, steps without progress
  running: jax.Array  # shape (), bool


@checks.domains(
  fun=checks.Function('(params, *args) -> scalar'),
  tx=checks.TRANSFORMATION,
  max_steps=checks.Integer(0),
  grad_tol=checks.NON_NEGATIVE,
  target_value=checks.Real(),
  stall_steps=checks.Integer(1, optional=True),
  stall_tol=checks.NON_NEGATIVE,
  curvature=checks.Function('(params, *args) -> operator', optional=True),
  trace=checks.Function('MinimizeResult -> row', optional=True),
  callback=checks.Function('Progress -> whether to stop', optional=True),
)
def minimize(
  fun: Callable[..., jax.Array],
  params: base.Params,
  tx: optax.GradientTransformation,
  *,
  max_steps: int,
  args: tuple[Any, ...] = (),
  has_aux: bool = False,
  grad_tol: float | jax.Array = 0.0,
  target_value: float | jax.Array = -jnp.inf,
  stall_steps: int | None = None,
  stall_tol: float | jax.Array = 0.0,
  curvature: Callable[..., base.Operator] | None = None,
  opt_state: base.OptState | None = None,
  trace: Callable[[_results.MinimizeResult], Any] | None = None,
  callback: Callable[[_results.Progress], Any] | None = None,
) -> _results.MinimizeResult:
  """Runs an optimizer on the device until a stopping test holds.

  One ``lax.while_loop``: no host round trip. Transformations that keep the
  accepted ``value`` and ``grad`` in their state (`gns_newton`, `optax.lbfgs`)
  are not made to evaluate them again, where their update is the last word: in
  ``chain(gns_newton(), scale(0.5))`` it is not, and the point is evaluated.
  Pure; jit it, or vmap it over starting points, where each stops on its own.

  Args:
    fun: The objective, ``(params, *args) -> scalar``.
    params: The start; complex leaves descend along the conjugate of `jax.grad`.
    tx: Any optax transformation; it gets ``value``, ``grad`` and ``value_fn``.
    max_steps: The most steps, a Python integer.
    args: Further arguments of ``fun`` and ``curvature``, data for example.
    has_aux: Whether ``fun`` returns ``(scalar, aux)``; that of the last point
      is in the result.
    grad_tol: Stop where the Euclidean norm of the gradient is at most this.
    target_value: Stop where the value is at most this.
    stall_steps: Stop after so many steps in a row that do not lower the best
      value by more than ``stall_tol * |value|``; ``None`` never does.
    stall_tol: Relative decrease that counts as progress.
    curvature: ``(params, *args) -> operator``, called once a step and handed to
      the transformation as ``curvature``, for example ``hessian(fun)``.
    opt_state: State of ``tx`` at ``params``, to go on where an earlier result
      stopped; ``None`` starts afresh.
    trace: Called on the `MinimizeResult` so far (with ``trace=None``) before
      each step and at the end; its results are stacked.
    callback: Called on the host with a `Progress` after each step; stops the
      run where it returns true (``None`` goes on), by the clock for example.
      Under ``vmap`` it is called once a lane, until the last lane ends.

  Returns:
    A `MinimizeResult`; ``status`` is `MAX_STEPS`, `GRAD_TOL`, `TARGET_VALUE`,
    `STOPPED` (by ``callback``), `STALLED` (by ``stall_steps``, or the
    transformation says ``stalled`` in its state), `NON_FINITE` (the value or
    the gradient at ``params`` is not finite, where no method could go on) or
    `REJECTED` (the transformation says ``failed`` in its state: all that it
    tried was rejected).

  Raises:
    TypeError: ``max_steps`` is not an integer, ``fun`` not a function, or a
      leaf of ``params`` no array of floats.
    ValueError: A tolerance is negative or NaN.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> fun = lambda x: jnp.sum((x - 1.0) ** 2)
    >>> result = optlab.minimize(
    ...     fun, jnp.zeros(3), optax.lbfgs(), max_steps=100, grad_tol=1e-6)
    >>> print(result.params, int(result.status) == optlab.training.GRAD_TOL)
    [1. 1. 1.] True

    What the objective depends on may be differentiated with respect to:

    >>> centre = lambda c: optlab.minimize(
    ...     lambda x: jnp.sum((x - c) ** 4 + (x - c) ** 2), jnp.zeros(2),
    ...     optax.lbfgs(), max_steps=100, grad_tol=1e-5).params.sum()
    >>> print(jax.grad(centre)(jnp.ones(2)).round(3))
    [1. 1.]

  Notes:
    ``params`` and ``value`` have derivatives, forward and backward, by the
    implicit function theorem: one linear system with the Hessian, formed for at
    most 256 parameters, else conjugate gradients. They are NaN where the point
    is no minimizer: the Hessian is not positive definite there (as far as
    products with a few vectors tell, beyond 256 parameters), or the run neither
    met ``grad_tol`` nor reduced the gradient's norm a thousandfold.
    What else is in the result (``trace``, ``opt_state``) and the start count as
    constants; complex parameters have no derivatives.
  """
  checks.enforce(minimize, locals())
  checks.check_params('params', params)
  args = args if isinstance(args, tuple) else (args,)
  whole = lambda params: fun(params, *args)
  value_fn = (lambda params: whole(params)[0]) if has_aux else whole
  bound = None
  if curvature is not None:
    bound = lambda params: curvature(params, *args)
  run = _Run(
    takes_extras(tx), value_fn, max_steps, grad_tol, target_value, stall_steps,
    stall_tol, bound, trace, callback,
  )  # fmt: skip
  params = trees.own(params)
  found = _implicit.run_constant(
    lambda params: _loop(run, params, opt_state), params
  )
  result, start_norm = found
  if not any(map(jnp.iscomplexobj, jax.tree.leaves(params))):
    ok = result.status == _results.GRAD_TOL
    ok |= result.grad_norm <= 1e-3 * start_norm
    last, value = _implicit.minimizer(value_fn, result.params, result.value, ok)
    result = result._replace(params=last, value=value)
  if has_aux:
    result = result._replace(aux=whole(result.params)[1])
  return result


def _loop(run, params, opt_state):
  """The result, and the norm of the gradient at the start."""
  opt_state = run.tx.init(params) if opt_state is None else opt_state
  loop = _start(run, params, opt_state)
  start_norm = loop.result.grad_norm
  loop = jax.lax.while_loop(
    lambda loop: loop.running, lambda loop: _step(run, loop), loop
  )
  return loop.result, start_norm


def _start(run, params, opt_state):
  """The loop before its first step."""
  value, grad, evaluated = _evaluate(run, params, opt_state)
  result = _results.MinimizeResult(
    params=params,
    opt_state=opt_state,
    value=value,
    grad_norm=trees.norm(grad),
    steps=jnp.zeros((), jnp.int32),
    status=jnp.zeros((), jnp.int32),
    trace=None,
    counts=_counts.start(evaluated),
  )
  loop = _LoopState(
    result=_record(run, result),
    grad=grad,
    best=value,
    since_best=jnp.zeros((), jnp.int32),
    running=jnp.asarray(True),
  )
  # What an earlier run said of its last step says nothing of this one.
  no = jnp.asarray(False)
  return _stop(run, loop, stalled=no, failed=no, stopped=no)


def _step(run, loop):
  """One update of the transformation."""
  result = loop.result
  extras = {}
  if run.curvature is not None:
    extras['curvature'] = run.curvature(result.params)
  updates, opt_state = run.tx.update(
    trees.conjugate(loop.grad),
    result.opt_state,
    result.params,
    value=result.value,
    grad=loop.grad,  # optax's line searches take it as jax.grad makes it.
    value_fn=run.fun,
    **extras,
  )
  params = trees.rounded(optax.apply_updates(result.params, updates))
  value, grad, evaluated = _evaluate(run, params, opt_state)
  result = result._replace(
    params=params,
    opt_state=opt_state,
    value=value,
    grad_norm=trees.norm(grad),
    steps=result.steps + 1,
    counts=_counts.after(result.counts, evaluated, result.opt_state, opt_state),
  )
  progress = value < loop.best - run.stall_tol * jnp.abs(loop.best)
  since_best = jnp.where(progress, 0, loop.since_best + 1)
  stalled = _says(opt_state, 'stalled')
  if run.stall_steps is not None:
    stalled |= since_best >= run.stall_steps
  return _stop(
    run,
    _LoopState(
      result=_record(run, result),
      grad=grad,
      best=jnp.minimum(loop.best, value),
      since_best=since_best,
      running=loop.running,
    ),
    stalled,
    failed=_says(opt_state, 'failed'),
    stopped=_called_back(run, result),
  )


def _called_back(run, result):
  """Whether the callback stops the run."""
  if run.callback is None:
    return jnp.asarray(False)

  def call(*progress):
    return np.bool_(run.callback(_results.Progress(*progress)) or False)

  return io_callback(
    call, jax.ShapeDtypeStruct((), bool),
    result.params, result.value, result.grad_norm, result.steps, result.counts,
  )  # fmt: skip


def _stop(run, loop, stalled, failed, stopped):
  """Whether the loop goes on; the first test that holds names the status."""
  result = loop.result
  finite = jnp.isfinite(result.value) & jnp.isfinite(result.grad_norm)
  tests = [
    (~finite, _results.NON_FINITE),
    (result.grad_norm <= run.grad_tol, _results.GRAD_TOL),
    (result.value <= run.target_value, _results.TARGET_VALUE),
    (stopped, _results.STOPPED),
    (stalled, _results.STALLED),
    (failed, _results.REJECTED),
    (result.steps >= run.max_steps, _results.MAX_STEPS),
  ]
  stop, status = zip(*tests, strict=True)
  status = jnp.select(
    stop, [jnp.int32(code) for code in status], _results.MAX_STEPS
  )
  return loop._replace(
    result=result._replace(status=status.astype(jnp.int32)),
    running=~jnp.any(jnp.stack(stop)),
  )


def _record(run, result):
  """Adds a row to the trace."""
  if run.trace is None:
    return result
  row = run.trace(result._replace(trace=None))
  rows = result.trace
  if rows is None:
    rows = jax.tree.map(
      lambda leaf: jnp.zeros(
        (run.max_steps + 1,) + jnp.shape(leaf), jnp.asarray(leaf).dtype
      ),
      row,
    )
  return result._replace(
    trace=jax.tree.map(
      lambda all_rows, leaf: all_rows.at[result.steps].set(leaf), rows, row
    )
  )


def _evaluate(run, params, opt_state):
  """Value and gradient, from the state where they are those of ``params``.

  Also whether they had to be evaluated.
  """
  kept = _kept(opt_state)
  again = lambda: trees.own(jax.value_and_grad(run.fun)(params))
  if kept is None:
    return *again(), jnp.asarray(True)
  like = jax.eval_shape(again)
  known = jnp.isfinite(kept.value)
  value, grad = jax.lax.cond(
    known,
    lambda: trees.cast_like((kept.value, kept.grad), like),
    again,
  )
  return value, grad, ~known


# Wrappers that hand on the update of what they wrap, or none at all.
_HAND_ON = {
  'InjectHyperparamsState': 'inner_state',
  'InjectStatefulHyperparamsState': 'inner_state',
  'MultiStepsState': 'inner_opt_state',
}


def _kept(opt_state):
  """The part of a state that keeps ``value`` and ``grad`` of the next point.

  Only if the update that belongs to it is the one that is applied: that of the
  last link of a chain, handed on by every wrapper around it.
  """
  kind = type(opt_state).__name__
  if kind in _HAND_ON:
    return _kept(getattr(opt_state, _HAND_ON[kind]))
  if type(opt_state) is tuple and opt_state:
    return _kept(opt_state[-1])
  grad = getattr(opt_state, 'grad', None)
  known = grad is not None and getattr(opt_state, 'value', None) is not None
  return opt_state if known else None


def _says(opt_state, name):
  """Whether any transformation says so in its state."""
  found = [
    jnp.any(leaf)
    for path, leaf in jax.tree.leaves_with_path(opt_state)
    if leaf.dtype == bool and path[-1:] == (jax.tree_util.GetAttrKey(name),)
  ]
  return jnp.any(jnp.asarray(found)) if found else jnp.asarray(False)


def takes_extras(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Like `optax.with_extra_args_support`; `optax.MultiSteps` gets them too."""
  steps = getattr(tx.update, '__self__', None)
  if isinstance(steps, optax.MultiSteps):
    update: Any = steps.update
    return optax.GradientTransformationExtraArgs(steps.init, update)
  return optax.with_extra_args_support(tx)
