r"""GNS-Newton: Newton steps regularized by gradient-normalized smoothness.

A globally convergent Newton method for convex and nonconvex objectives and any
symmetric approximation of the Hessian (Semenov, Jaggi and Doikov, ICLR 2026).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.newton import _curvature
from optlab.newton import _krylov
from optlab.newton import _linear
from optlab.newton import _metric
from optlab.newton import _operators
from optlab.newton import _search
from optlab.newton import _trials

SOLVER = checks.Function('(operator, b, shift) -> Prepared', optional=True)


GIVE_UP = 40  # rejected trials in a row


class GNSNewtonInfo(NamedTuple):
  """What `gns_newton` reports of its last step and, in totals, of the run.

  Attributes:
    shift: The regularization ``lambda`` of the last trial.
    trials: Trials of the last step.
    accepted: Whether the last step was accepted; a rejected step is zero.
    stalled: Whether the last search ended because rounding hides any decrease.
    failed: Whether 40 trials in a row, of one step or of several, were
      rejected.
    total_trials: Trials of all steps.
    total_products: Operator-vector products of all steps.
  """

  shift: jax.Array  # shape ()
  trials: jax.Array  # shape (), int32
  accepted: jax.Array  # shape (), bool
  stalled: jax.Array  # shape (), bool
  failed: jax.Array  # shape (), bool
  total_trials: jax.Array  # shape (), int32
  total_products: jax.Array  # shape (), int32


class GNSNewtonState(NamedTuple):
  """State of `gns_newton`; scalars are float32 or wider.

  Attributes:
    gamma: The gradient-normalized smoothness that the next search starts from;
      0 before the first step where the method chooses the first one itself.
    value: The objective at the current point, infinite if it is not known.
    grad: The gradient at the current point, for `value_and_grad_from_state`.
    rejections: Trials rejected since the last accepted one.
    rule: The state of the search rule, empty for those of optlab.
    info: Diagnostics.
  """

  gamma: jax.Array  # shape ()
  value: jax.Array  # shape ()
  grad: base.Updates
  rejections: jax.Array  # shape (), int32
  rule: Any
  info: GNSNewtonInfo


@checks.domains(
  solver=SOLVER,
  gamma_init=checks.POSITIVE._replace(optional=True),
  max_trials=checks.Integer(1, traced=True),
  gamma_offset=checks.NON_NEGATIVE,
)
def gns_newton(
  solver: base.Solver | None = None,
  metric: base.ArrayTree | None = None,
  gamma_init: float | jax.Array | None = None,
  rule: _search.SearchRule | None = None,
  max_trials: int | jax.Array = 40,
  gamma_offset: float | jax.Array = 0.0,
  safeguard: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""Newton's method, regularized by gradient-normalized smoothness.

  Choose it for smooth problems whose Hessian, or an approximation of it, can be
  had: from any start it descends, and near a solution it converges as fast as
  Newton's method. It has no learning rate and returns final updates:

  .. math::
    \lambda = |g|_* / \gamma, \quad d = -(H + \lambda B)^{-1} g, \quad
    \text{accept if } f(x) - f(x + d) \ge |g(x + d)|_*^2 / (8 \lambda)

  After a rejected trial it is tried again with a smaller :math:`\gamma`; see
  `optlab.newton` for the rules that move it.

  Args:
    solver: Solves ``(H + shift B) x = g``, see `optlab.base.Solver`; ``None``
      takes `cholesky` for operators with a ``matrix``, `woodbury` for those
      with a ``factor`` and `lanczos` for others.
    metric: ``B`` of the norm :math:`|d|^2 = \langle B d, d \rangle`: a pytree
      like the parameters (its positive diagonal), a `Dense` operator, or
      ``None`` for the identity.
    gamma_init: The first smoothness; ``None`` chooses a scale-invariant one,
      ``lambda = 0.01 <g, Hg> / <g, B^-1 g>``.
    rule: How the smoothness moves; ``None`` is `hold`.
    max_trials: The most trials a step.
    gamma_offset: Added to ``gamma`` where ``lambda`` is computed.
    safeguard: Where rounding hides the decrease, accept on the gradient
      instead, and report a stall where that fails too.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose ``update`` needs ``params``
    and the extra arguments ``value``, ``grad`` and ``value_fn``, and takes an
    operator ``curvature`` (the exact Hessian of ``value_fn`` if absent).

  Raises:
    TypeError: An argument is not of its type.
    ValueError: An argument is out of range; in ``update``, an extra argument is
      missing.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> def fun(x):
    ...   return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    >>> result = optlab.minimize(
    ...     fun, jnp.array([-2.0, 2.0]), optlab.gns_newton(), max_steps=100,
    ...     curvature=optlab.hessian(fun), grad_tol=1e-3)
    >>> print(result.params.round(2))
    [1. 1.]

  References:
    Semenov, Jaggi and Doikov, `Gradient-Normalized Smoothness for Optimization
    with Approximate Hessians <https://arxiv.org/abs/2506.13710>`_, ICLR 2026

  Notes:
    Cost per step: one preparation of the solver, and per trial one shift of it
    and one value and gradient; the accepted ones are kept in the state.
    Departures from the paper, all absent from `gns_newton_paper`: the first
    ``lambda``, the rule, and the safeguard. A trial whose system is not
    positive definite, or whose value or gradient is not finite, is rejected
    (the authors' code repeats the last step there). At the search limit the
    update is zero and the shrunken smoothness is kept (the authors' code takes
    the failing trial). A start on the axis of a saddle converges to the saddle.
    With stochastic batches ``value_fn`` must be bound to the batch of ``grad``;
    the value and gradient in the state belong to that batch too.
    It cannot be masked or partitioned, as `optax.lbfgs` cannot: ``value_fn``
    takes all parameters; close over what is frozen. Behind it in a chain, a
    link that changes its updates makes the value and gradient in its state
    those of a point where nobody is: `minimize` and `train_step` then evaluate
    anew, `optax.value_and_grad_from_state` cannot know.
  """
  checks.enforce(gns_newton, locals())
  _check_metric(metric)
  rule = _search.hold() if rule is None else rule
  _check_rule(rule)

  def init(params):
    _check_whole_and_real(params)
    dtype = trees.accumulator_dtype(params)
    gamma = 0.0 if gamma_init is None else gamma_init
    # No two fields share a buffer, so that the state can be donated.
    return GNSNewtonState(
      gamma=jnp.array(gamma, dtype),
      value=jnp.full((), jnp.inf, dtype),
      grad=optax.tree.zeros_like(params),
      rejections=jnp.zeros((), jnp.int32),
      rule=rule.init(jnp.array(gamma, dtype)),
      info=GNSNewtonInfo(
        shift=jnp.zeros((), dtype),
        trials=jnp.zeros((), jnp.int32),
        accepted=jnp.zeros((), bool),
        stalled=jnp.zeros((), bool),
        failed=jnp.zeros((), bool),
        total_trials=jnp.zeros((), jnp.int32),
        total_products=jnp.zeros((), jnp.int32),
      ),
    )

  def update(
    updates,
    state,
    params: Any = None,
    *,
    value: Any = None,
    grad: Any = None,
    value_fn: Any = None,
    curvature: Any = None,
    **unused,
  ):
    del unused
    checks.require_extra(
      'gns_newton',
      'the estimator value_and_grad',
      params=params,
      value=value,
      grad=grad,
      value_fn=value_fn,
    )
    checks.check_callable('value_fn', value_fn, 'params -> scalar')
    _check_whole_and_real(params)
    checks.check_same_tree('grad', grad, 'params', params)
    dtype = state.gamma.dtype
    if curvature is None:
      curvature = _curvature.hessian(value_fn)(params)
    _operators.check_operator(
      'curvature', curvature, sum(map(jnp.size, jax.tree.leaves(params)))
    )
    space: Any = _metric.Space.make(metric, params, dtype)
    operator = space.operator(curvature)
    g = space.dual(updates)
    g_norm = trees.norm(g)
    value = jnp.asarray(value).astype(dtype)
    gamma, products = state.gamma, jnp.zeros((), jnp.int32)
    if gamma_init is None:
      gamma, products = _first_gamma(operator, g, g_norm, value, gamma)
    shift_of = lambda gamma: g_norm / (gamma + gamma_offset)
    prepare: Any = solver or _default_solver(operator)
    prepared = prepare(operator, g, shift_of(gamma))
    _check_prepared(prepared)
    start = _trials.Start(
      params=params,
      value=value,
      dual=g,
      grad_norm=g_norm,
      space=space,
      prepared=prepared,
      value_and_grad=jax.value_and_grad(value_fn),
      shift_of=shift_of,
    )
    finite = jnp.isfinite(g_norm) & jnp.isfinite(value)
    found = _trials.search(
      start,
      _trials.Search(
        step=optax.tree.zeros_like(params),
        value=jnp.where(finite, value, jnp.inf),
        grad=trees.where(finite, grad, optax.tree.zeros_like(state.grad)),
        gamma=gamma,
        rule=state.rule,
        shift=state.info.shift,
        trials=jnp.zeros((), jnp.int32),
        accepted=jnp.zeros((), bool),
        flat=jnp.zeros((), bool),
        stalled=jnp.zeros((), bool),
        products=products + prepared.products,
      ),
      rule,
      max_trials,
      safeguard,
    )
    rejections = state.rejections + jnp.where(found.stalled, 0, found.trials)
    rejections = jnp.where(found.accepted, 0, rejections)
    return found.step, GNSNewtonState(
      gamma=found.gamma,
      value=found.value,
      grad=found.grad,
      rejections=rejections,
      rule=found.rule,
      info=GNSNewtonInfo(
        shift=found.shift,
        trials=found.trials,
        accepted=found.accepted,
        stalled=found.stalled,
        failed=rejections >= GIVE_UP,
        total_trials=state.info.total_trials + found.trials,
        total_products=state.info.total_products + found.products,
      ),
    )

  return optax.GradientTransformationExtraArgs(init, update)


@checks.domains(solver=SOLVER, gamma_init=checks.POSITIVE)
def gns_newton_paper(
  solver: base.Solver | None = None,
  metric: base.ArrayTree | None = None,
  gamma_init: float | jax.Array = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """`gns_newton` exactly as published (Algorithm 1 and the authors' code).

  ``gamma`` starts at 1, is doubled or halved, is at least 1e-9 after a success,
  and ``lambda = |g|_* / (gamma + 1e-8)``; the decrease test stands alone.

  Args:
    solver: See `gns_newton`; the authors factorize (`cholesky`).
    metric: See `gns_newton`.
    gamma_init: The first smoothness.

  Returns:
    An `optax.GradientTransformationExtraArgs`, see `gns_newton`.

  Raises:
    TypeError: ``solver`` or ``metric`` is not a function, or ``gamma_init`` not
      a real number.
    ValueError: ``gamma_init`` is not a finite number above 0.
  """
  checks.enforce(gns_newton_paper, locals())
  return gns_newton(
    solver=solver,
    metric=metric,
    gamma_init=gamma_init,
    rule=_search.double(factor=2.0, gamma_min=1e-9),
    gamma_offset=1e-8,
    safeguard=False,
  )


def _first_gamma(operator, g, g_norm, value, gamma):
  """The smoothness, chosen where it is still 0, and the products it took."""
  finite = jnp.isfinite(g_norm) & jnp.isfinite(value)
  first = finite & (g_norm > 0) & (gamma == 0)
  unit = g / jnp.where(first, g_norm, 1)
  shift = jax.lax.cond(
    first,
    lambda: 0.01 * jnp.abs(unit @ operator(unit)),
    lambda: jnp.ones((), gamma.dtype),
  ).astype(gamma.dtype)
  shift = jnp.where((shift > 0) & jnp.isfinite(shift), shift, g_norm)
  return jnp.where(first, g_norm / shift, gamma), first.astype(jnp.int32)


def _check_whole_and_real(params):
  """Raises for a part of the parameters, which ``value_fn`` would not take."""
  is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
  for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_masked):
    where = f'params{jax.tree_util.keystr(path)}'
    if is_masked(leaf):
      raise ValueError(
        f'gns_newton cannot be masked or partitioned ({where} is left out):'
        ' value_fn takes all parameters. Give it those that are trained alone,'
        ' and close over the others: value_fn = lambda trained: fun(trained,'
        ' frozen).'
      )
    if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
      raise TypeError(
        f'gns_newton takes real parameters, got {where} of dtype'
        f' {jnp.result_type(leaf)}; give real and imaginary part as two leaves.'
      )


def _check_rule(rule):
  if not isinstance(rule, _search.SearchRule):
    raise TypeError(
      f'rule must be a SearchRule such as optlab.newton.hold() makes, got'
      f' {rule!r}.'
    )


def _check_prepared(prepared):
  if not isinstance(prepared, base.Prepared):
    raise TypeError(
      'solver must return optlab.newton.Prepared(solve, products), where solve'
      f' maps a shift to (x, ok, products); got {prepared!r}.'
    )


def _check_metric(metric):
  """Raises unless what is seen of the metric's diagonal is positive."""
  matrix = _operators.matrix_of(metric)
  if matrix is not None and not isinstance(matrix, jax.core.Tracer):
    metric = jnp.diagonal(matrix)
  for path, leaf in jax.tree.leaves_with_path(metric):
    checks.check_positive(f'metric{jax.tree_util.keystr(path)}', leaf)


def _default_solver(operator):
  if _operators.matrix_of(operator) is not None:
    return _linear.cholesky()
  if _operators.factor_of(operator) is not None:
    return _linear.woodbury()
  return _krylov.lanczos()
