"""A step of `gns_newton`: what its search starts from, and the state after."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import _varying
from optlab import base
from optlab import checks
from optlab import trees
from optlab.newton import _curvature
from optlab.newton import _defaults
from optlab.newton import _metric
from optlab.newton import _operators
from optlab.newton import _trials

GIVE_UP = 40  # attempts in a row


class GNSNewtonInfo(NamedTuple):
  """What `gns_newton` reports of its last step and, in totals, of the run.

  Attributes:
    shift: The regularization ``lambda`` of the last trial.
    trials: Trials of the last step: points tried, a value and a gradient each.
    solves: Systems solved in the last step, those that were found not to be
      positive definite included.
    accepted: Whether the last step was accepted; a rejected step is zero.
    stalled: Whether the last search ended because rounding hides any decrease.
    failed: Whether 40 attempts in a row, of one step or of several, were in
      vain, value or gradient are not finite in the state's dtype, or a link of
      the chain before it zeroed a part of the gradient.
    total_trials: Trials of all steps.
    total_solves: Systems solved in all steps.
    total_products: Operator-vector products of all steps.
  """

  shift: jax.Array  # shape ()
  trials: jax.Array  # shape (), int32
  solves: jax.Array  # shape (), int32
  accepted: jax.Array  # shape (), bool
  stalled: jax.Array  # shape (), bool
  failed: jax.Array  # shape (), bool
  total_trials: jax.Array  # shape (), int32
  total_solves: jax.Array  # shape (), int32
  total_products: jax.Array  # shape (), int32


class GNSNewtonState(NamedTuple):
  """State of `gns_newton`; scalars are float32 or wider.

  Attributes:
    gamma: The gradient-normalized smoothness that the next search starts from;
      0 before the first step where the method chooses the first one itself.
    value: The objective at the current point, infinite if it is not known.
    grad: The gradient at the current point, for `value_and_grad_from_state`.
    rejections: Attempts in vain since the last accepted one.
    rule: The state of the search rule, empty for those of optlab.
    info: Diagnostics.
  """

  gamma: jax.Array  # shape ()
  value: jax.Array  # shape ()
  grad: base.Updates
  rejections: jax.Array  # shape (), int32
  rule: Any
  info: GNSNewtonInfo


class Method(NamedTuple):
  """The arguments of `gns_newton`."""

  solver: base.Solver | None
  metric: base.ArrayTree | None
  gamma_init: Any
  gamma_offset: Any
  limits: _trials.Limits


def init(method: Method, params: base.Params) -> GNSNewtonState:
  """The state before the first step."""
  _check_whole_and_real(params)
  dtype = trees.accumulator_dtype(params)
  gamma = 0.0 if method.gamma_init is None else method.gamma_init
  # No two fields share a buffer, so that the state can be donated.
  return GNSNewtonState(
    gamma=jnp.array(gamma, dtype),
    value=jnp.full((), jnp.inf, dtype),
    grad=optax.tree.zeros_like(params),
    rejections=jnp.zeros((), jnp.int32),
    rule=method.limits.rule.init(jnp.array(gamma, dtype)),
    info=GNSNewtonInfo(
      shift=jnp.zeros((), dtype),
      trials=jnp.zeros((), jnp.int32),
      solves=jnp.zeros((), jnp.int32),
      accepted=jnp.zeros((), bool),
      stalled=jnp.zeros((), bool),
      failed=jnp.zeros((), bool),
      total_trials=jnp.zeros((), jnp.int32),
      total_solves=jnp.zeros((), jnp.int32),
      total_products=jnp.zeros((), jnp.int32),
    ),
  )


def update(
  method: Method,
  updates: base.Updates,
  state: GNSNewtonState,
  params: Any = None,
  *,
  value: Any = None,
  grad: Any = None,
  value_fn: Any = None,
  curvature: Any = None,
  **unused: Any,
) -> tuple[base.Updates, GNSNewtonState]:
  """The step, and the state after it."""
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
  if jnp.shape(value):
    raise ValueError(f'value must be a scalar, got shape {jnp.shape(value)}.')
  for name, tree in [
    ('updates', updates),
    ('grad', grad),
    ("the state's grad", state.grad),
  ]:
    checks.check_same_tree(name, tree, 'params', params)
  _varying.check_same(value, params)
  value = _known(value, updates, grad)
  if curvature is None:
    curvature = _curvature.hessian(value_fn)(params)
  _operators.check_operator(
    'curvature', curvature, sum(map(jnp.size, jax.tree.leaves(params)))
  )
  start, gamma, products = _start(
    method, state, params, updates, value, value_fn, curvature
  )
  finite = jnp.isfinite(start.grad_norm) & jnp.isfinite(start.value)
  found = _trials.search(
    start,
    _trials.Search(
      step=optax.tree.zeros_like(params),
      value=jnp.where(finite, start.value, jnp.inf),
      grad=trees.where(finite, grad, optax.tree.zeros_like(state.grad)),
      gamma=gamma,
      rule=state.rule,
      shift=state.info.shift,
      trials=jnp.zeros((), jnp.int32),
      solves=jnp.zeros((), jnp.int32),
      accepted=jnp.zeros((), bool),
      flat=jnp.zeros((), bool),
      stalled=jnp.zeros((), bool),
      products=products,
    ),
    method.limits,
  )
  return found.step, _after(state, found)


def _start(method, state, params, updates, value, value_fn, curvature):
  """Prepares the search; its first smoothness; the products that this took."""
  dtype = state.gamma.dtype
  eps = jnp.finfo(
    jnp.result_type(float, value)
  ).eps  # of a narrow loss, its own
  value = jnp.asarray(value).astype(dtype)
  space: Any = _metric.Space.make(method.metric, curvature, params, dtype)
  operator = space.operator
  g = space.dual(updates)
  g_norm = trees.norm(g)
  gamma, products = state.gamma, jnp.zeros((), jnp.int32)
  if method.gamma_init is None:
    gamma, products = _first_gamma(operator, g, g_norm, value, gamma)
  shift_of = lambda gamma: g_norm / (gamma + method.gamma_offset)
  solver: Any = method.solver or _defaults.solver
  prepared = solver(operator, g, shift_of(gamma))
  _check_prepared(prepared)
  start = _trials.Start(
    params=params,
    value=value,
    rounding=10 * eps * jnp.abs(value),
    dual=g,
    grad_norm=g_norm,
    space=space,
    prepared=prepared,
    value_and_grad=jax.value_and_grad(value_fn),
    shift_of=shift_of,
    rejections=state.rejections,
    # What `minimize` shows of its bounds.
    project=getattr(value_fn, 'project', None),
  )
  return start, gamma, products + jnp.asarray(prepared.products, jnp.int32)


def _after(state, found):
  """The state after a search."""
  rejections = state.rejections + jnp.where(found.stalled, 0, found.solves)
  rejections = jnp.where(found.accepted, 0, rejections)
  return GNSNewtonState(
    gamma=found.gamma,
    value=found.value,
    grad=found.grad,
    rejections=rejections,
    rule=found.rule,
    info=GNSNewtonInfo(
      shift=found.shift,
      trials=found.trials,
      solves=found.solves,
      accepted=found.accepted,
      stalled=found.stalled,
      failed=(rejections >= GIVE_UP) | ~jnp.isfinite(found.value),
      total_trials=state.info.total_trials + found.trials,
      total_solves=state.info.total_solves + found.solves,
      total_products=state.info.total_products + found.products,
    ),
  )


def _known(value, updates, grad):
  """The value, NaN where a link before zeroed a part of the gradient.

  That freezes nothing: the curvature couples it with the rest.
  """
  cut = [
    jnp.any((u == 0) & (g != 0))
    for u, g in zip(
      jax.tree.leaves(updates), jax.tree.leaves(grad), strict=True
    )
    if u is not g
  ]
  return jnp.where(jnp.any(jnp.stack(cut)), jnp.nan, value) if cut else value


def _first_gamma(operator, g, g_norm, value, gamma):
  """The smoothness, chosen where it is still 0, and the products it took."""
  finite = jnp.isfinite(g_norm) & jnp.isfinite(value)
  first = finite & (g_norm > 0) & (gamma == 0)

  def choose():
    unit = trees.divided(g, jnp.where(first, g_norm, 1))
    bent = trees.dot(unit, _operators.checked(operator)(unit))
    shift = (0.01 * jnp.abs(bent)).astype(gamma.dtype)
    shift = jnp.where((shift > 0) & jnp.isfinite(shift), shift, g_norm)
    return (g_norm / shift).astype(gamma.dtype)

  return _varying.cond(first, choose, lambda: gamma), first.astype(jnp.int32)


def _check_whole_and_real(params):
  """Raises for a part of the parameters, which ``value_fn`` would not take."""
  checks.check_params('params', params)
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


def _check_prepared(prepared):
  if not isinstance(prepared, base.Prepared):
    raise TypeError(
      'solver must return optlab.newton.Prepared(solve, products), where solve'
      f' maps a shift to (x, ok, products); got {prepared!r}.'
    )
