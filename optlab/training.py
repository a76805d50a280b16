"""One training step for every method, and a compiled loop to a tolerance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks

__all__ = [
  'GRAD_TOL',
  'MAX_STEPS',
  'NON_FINITE',
  'STALLED',
  'TARGET_VALUE',
  'MinimizeResult',
  'TrainState',
  'init',
  'minimize',
  'report',
  'train_step',
]


class TrainState(NamedTuple):
  """All that a run carries from step to step; a pytree that checkpoints."""

  step: jax.Array  # shape (), int32
  params: base.Params
  opt_state: base.OptState
  estimator_state: Any


def init(
  params: base.Params,
  estimator: base.GradientEstimator,
  tx: optax.GradientTransformation,
  *inner: base.ArrayTree,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    params: The parameters, any pytree of arrays.
    estimator: Makes the gradients.
    tx: Turns them into updates.
    *inner: Inner variables of the estimator (the lower variable of a bilevel
      problem), passed on to ``estimator.init``.

  Returns:
    A `TrainState`.

  Raises:
    TypeError: ``estimator`` is not a `GradientEstimator`, or ``tx`` not an
      optax transformation.
  """
  checks.check_estimator(estimator)
  checks.check_transformation('tx', tx)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    estimator_state=estimator.init(params, *inner),
  )


def train_step(
  estimator: base.GradientEstimator,
  tx: optax.GradientTransformation,
) -> Callable[[TrainState, base.Batch], tuple[TrainState, Any]]:
  """Makes the step that serves every method of optlab and optax.

  The step is pure: jit it, scan it, vmap it over seeds. What a method reports
  beside the loss (trials, effective sample size, batch size) lies in its state;
  `report` lists it.

  Args:
    estimator: Makes the gradients, for example `value_and_grad`.
    tx: Any optax transformation.

  Returns:
    ``step(state, batch) -> (state, value)``, with the loss before the step;
    ``(state, (value, aux))`` where the loss has auxiliary output.

  Raises:
    TypeError: ``estimator`` is not a `GradientEstimator`, or ``tx`` not an
      optax transformation.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> loss = lambda params, batch: jnp.mean((batch @ params - 1.0) ** 2)
    >>> estimator, tx = optlab.value_and_grad(loss), optax.adam(0.1)
    >>> state = optlab.init(jnp.zeros(3), estimator, tx)
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(3):
    ...   state, value = step(state, jnp.eye(3))
    ...   print(f'{value:.2f}')
    1.00
    0.81
    0.64
  """
  checks.check_estimator(estimator)
  checks.check_transformation('tx', tx)
  tx = optax.with_extra_args_support(tx)

  def step(state, batch):
    estimate, estimator_state = estimator.estimate(
      state.params, state.estimator_state, batch
    )
    updates, opt_state = tx.update(
      estimate.grads,
      state.opt_state,
      state.params,
      value=estimate.value,
      grad=estimate.grads,
      **estimate.extras,
    )
    params = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, opt_state, estimator_state)
    return state, with_aux(estimate)

  return step


def with_aux(estimate: base.Estimate) -> Any:
  """The value, and beside it the auxiliary output where there is one."""
  if isinstance(estimate.aux, tuple) and not estimate.aux:
    return estimate.value
  return estimate.value, estimate.aux


def report(state: Any) -> dict[str, jax.Array]:
  """All scalars of a state by path, for a logger.

  Args:
    state: A `TrainState`, the state of an estimator or of a transformation, or
      any nesting of them.

  Returns:
    A flat dict: the names on the way to a number, joined by ``/``, and the
    number, an array of shape (). Arrays with axes and PRNG keys are left out.

  Examples:
    >>> import jax.numpy as jnp, optax, optlab
    >>> plain = optlab.value_and_grad(lambda x, batch: jnp.sum(x * batch))
    >>> estimator = optlab.estimators.estimate_if_finite(plain)
    >>> state = optlab.init(jnp.ones(2), estimator, optax.adam(0.1))
    >>> for name, number in optlab.report(state).items():
    ...   print(name, number)
    step 0
    opt_state/0/count 0
    estimator_state/info/rejected False
    estimator_state/info/total_rejected 0
  """
  found = {}
  for path, leaf in jax.tree.leaves_with_path(state):
    if jnp.ndim(leaf) == 0 and not (
      hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    ):
      found[jax.tree_util.keystr(path, simple=True, separator='/')] = leaf
  return found


class MinimizeResult(NamedTuple):
  """Where `minimize` stopped, and why.

  Attributes:
    params: The last iterate.
    opt_state: The transformation's state.
    value: Scalar, the objective at ``params``.
    grad_norm: Scalar, the Euclidean norm of the gradient at ``params``.
    steps: int32 scalar, the steps taken.
    status: int32 scalar, one of the constants below.
    trace: What ``trace`` returned before each step and at the end, stacked on a
      leading axis of ``max_steps + 1``; rows beyond ``steps`` are zero.
  """

  params: base.Params
  opt_state: base.OptState
  value: jax.Array
  grad_norm: jax.Array
  steps: jax.Array
  status: jax.Array
  trace: Any


MAX_STEPS, GRAD_TOL, TARGET_VALUE, STALLED, NON_FINITE = range(5)


class _LoopState(NamedTuple):
  result: MinimizeResult
  grad: base.Updates
  best: jax.Array  # shape (), the lowest value seen
  since_best: jax.Array  # shape (), int32, steps without progress
  running: jax.Array  # shape (), bool


def minimize(
  fun: Callable[[base.Params], jax.Array],
  params: base.Params,
  tx: optax.GradientTransformation,
  *,
  max_steps: int,
  grad_tol: float | jax.Array = 0.0,
  target_value: float | jax.Array = -jnp.inf,
  stall_steps: int | None = None,
  stall_tol: float | jax.Array = 0.0,
  curvature: Callable[[base.Params], base.Operator] | None = None,
  opt_state: base.OptState | None = None,
  trace: Callable[[MinimizeResult], Any] | None = None,
) -> MinimizeResult:
  """Runs an optimizer on the device until a stopping test holds.

  One ``lax.while_loop``: no host round trip. Transformations that keep the
  accepted ``value`` and ``grad`` in their state (`gns_newton`, `optax.lbfgs`)
  are not made to evaluate them again. Pure; jit it, or vmap it over starting
  points, where each stops on its own.

  Args:
    fun: The objective, ``params -> scalar``.
    params: The start.
    tx: Any optax transformation; it gets ``value``, ``grad`` and ``value_fn``.
    max_steps: The most steps, a Python integer.
    grad_tol: Stop where the Euclidean norm of the gradient is at most this.
    target_value: Stop where the value is at most this.
    stall_steps: Stop after so many steps in a row that do not lower the best
      value by more than ``stall_tol * |value|``; ``None`` never does.
    stall_tol: Relative decrease that counts as progress.
    curvature: ``params -> operator``, called once a step and handed to the
      transformation as ``curvature``, for example ``hessian(fun)``.
    opt_state: State of ``tx`` at ``params``, to go on where an earlier result
      stopped; ``None`` starts afresh.
    trace: Called on the `MinimizeResult` so far (with ``trace=None``) before
      each step and at the end; its results are stacked.

  Returns:
    A `MinimizeResult`; ``status`` is `MAX_STEPS`, `GRAD_TOL`, `TARGET_VALUE`,
    `STALLED` or `NON_FINITE` (the value or the gradient at ``params`` is not
    finite, where no method could go on).

  Raises:
    TypeError: ``max_steps`` is not an integer, or ``fun`` not a function.
    ValueError: A tolerance is negative or NaN.

  Examples:
    >>> import jax.numpy as jnp, optax, optlab
    >>> fun = lambda x: jnp.sum((x - 1.0) ** 2)
    >>> result = optlab.minimize(
    ...     fun, jnp.zeros(3), optax.lbfgs(), max_steps=100, grad_tol=1e-6)
    >>> print(result.params, int(result.status) == optlab.training.GRAD_TOL)
    [1. 1. 1.] True
  """
  checks.check_callable('fun', fun, 'params -> scalar')
  checks.check_int('max_steps', max_steps, 0)
  checks.check_non_negative('grad_tol', grad_tol)
  checks.check_non_negative('stall_tol', stall_tol)
  if stall_steps is not None:
    checks.check_int('stall_steps', stall_steps, 1)
  checks.check_transformation('tx', tx)
  checks.check_real('target_value', target_value)
  if curvature is not None:
    checks.check_callable('curvature', curvature, 'params -> operator')
  if trace is not None:
    checks.check_callable('trace', trace, 'MinimizeResult -> row')
  tx = optax.with_extra_args_support(tx)
  if opt_state is None:
    opt_state = tx.init(params)
  plain_value_and_grad = jax.value_and_grad(fun)
  # optax counts a state with `value` and `grad` as reusable.
  reuse = all(
    optax.tree.get(opt_state, name, None) is not None
    for name in ('value', 'grad')
  )
  from_state = optax.value_and_grad_from_state(fun)

  def evaluate(params, opt_state):
    if reuse:
      return from_state(params, state=opt_state)
    return plain_value_and_grad(params)

  def test(loop):
    result = loop.result
    finite = jnp.isfinite(result.value) & jnp.isfinite(result.grad_norm)
    stalled = jnp.asarray(False)
    if stall_steps is not None:
      stalled = loop.since_best >= stall_steps
    # The first test that holds names the status.
    tests = [
      (~finite, NON_FINITE),
      (result.grad_norm <= grad_tol, GRAD_TOL),
      (result.value <= target_value, TARGET_VALUE),
      (stalled, STALLED),
      (result.steps >= max_steps, MAX_STEPS),
    ]
    stop, status = zip(*tests, strict=True)
    status = jnp.select(stop, [jnp.int32(code) for code in status], MAX_STEPS)
    return loop._replace(
      result=result._replace(status=status.astype(jnp.int32)),
      running=~jnp.any(jnp.stack(stop)),
    )

  def record(result):
    if trace is None:
      return result
    row = trace(result._replace(trace=None))
    if result.trace is None:
      rows = jax.tree.map(
        lambda leaf: jnp.zeros(
          (max_steps + 1,) + jnp.shape(leaf), jnp.asarray(leaf).dtype
        ),
        row,
      )
    else:
      rows = result.trace
    return result._replace(
      trace=jax.tree.map(
        lambda all_rows, leaf: all_rows.at[result.steps].set(leaf),
        rows,
        row,
      )
    )

  def body(loop):
    result = loop.result
    extras = (
      {} if curvature is None else {'curvature': curvature(result.params)}
    )
    updates, opt_state = tx.update(
      loop.grad,
      result.opt_state,
      result.params,
      value=result.value,
      grad=loop.grad,
      value_fn=fun,
      **extras,
    )
    params = optax.apply_updates(result.params, updates)
    value, grad = evaluate(params, opt_state)
    progress = value < loop.best - stall_tol * jnp.abs(loop.best)
    result = record(
      result._replace(
        params=params,
        opt_state=opt_state,
        value=value,
        grad_norm=optax.tree.norm(grad),
        steps=result.steps + 1,
      )
    )
    return test(
      _LoopState(
        result=result,
        grad=grad,
        best=jnp.minimum(loop.best, value),
        since_best=jnp.where(progress, 0, loop.since_best + 1),
        running=loop.running,
      )
    )

  value, grad = evaluate(params, opt_state)
  start = MinimizeResult(
    params=params,
    opt_state=opt_state,
    value=value,
    grad_norm=optax.tree.norm(grad),
    steps=jnp.zeros((), jnp.int32),
    status=jnp.zeros((), jnp.int32),
    trace=None,
  )
  loop = _LoopState(
    result=record(start),
    grad=grad,
    best=value,
    since_best=jnp.zeros((), jnp.int32),
    running=jnp.asarray(True),
  )
  return jax.lax.while_loop(lambda loop: loop.running, body, test(loop)).result
