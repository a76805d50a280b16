"""The search of `gns_newton`: trials from one point, until one is accepted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import _varying
from optlab import base
from optlab import checks
from optlab import trees
from optlab.newton import _metric
from optlab.newton import _search


class Start(NamedTuple):
  """What all trials of a step share: the point, and the solver prepared there.

  Attributes:
    params: The point.
    value: The objective there.
    rounding: How much of it rounding may hide.
    dual: The gradient there, in the coordinates of the space.
    grad_norm: Its norm.
    space: Coordinates in which the metric is the identity.
    prepared: Solves for the step of any shift.
    value_and_grad: Of the objective.
    shift_of: ``gamma -> lambda``.
    rejections: Attempts in vain in the steps since the last accepted one.
    project: Where a step lands; ``None`` is where it leads.
  """

  params: base.Params
  value: jax.Array
  rounding: jax.Array
  dual: Any
  grad_norm: jax.Array
  space: _metric.Space
  prepared: base.Prepared
  value_and_grad: Callable[[base.Params], tuple[jax.Array, base.Updates]]
  shift_of: Callable[[jax.Array], jax.Array]
  rejections: jax.Array
  project: Callable[[base.Params], base.Params] | None = None


class Point(NamedTuple):
  """A trial point.

  Attributes:
    step: The update that leads to it, like the parameters.
    value: The objective.
    grad: The gradient, like the parameters.
    grad_norm: Its norm in the coordinates of the space.
    square: The square of it, as a sum.
    move_norm: Of the step that rounding left, which may be none, in them.
    residual_norm: Of the error of the model's gradient, ``grad + shift move``.
    slope: The inner product of the start's gradient and the move.
    bent: That of the gradient and the move.
    still: Whether no parameter changes by more than a few units of rounding;
      where the value stands still too, gradients of such points are noise.
    solved: Whether the solver found the system positive definite.
    ok: Whether it did, and value and gradient are finite.
    products: int32, operator-vector products.
  """

  step: base.Updates
  value: jax.Array
  grad: base.Updates
  grad_norm: jax.Array
  square: jax.Array
  move_norm: jax.Array
  residual_norm: jax.Array
  slope: jax.Array
  bent: jax.Array
  still: jax.Array
  solved: jax.Array
  ok: jax.Array
  products: jax.Array


class Limits(NamedTuple):
  """How a search goes, and how far.

  Attributes:
    rule: Moves the smoothness.
    max_trials: The most attempts.
    gain: Accept also where the decrease is this part of the model's; ``None``
      never does.
    safeguard: Whether to accept on the gradient where rounding hides the
      decrease, and to stall where that fails too.
  """

  rule: _search.SearchRule
  max_trials: Any
  gain: Any
  safeguard: bool


class Search(NamedTuple):
  """Where a search stands: its best point, its smoothness, its counts."""

  step: base.Updates
  value: jax.Array
  grad: base.Updates
  gamma: jax.Array
  rule: Any  # the rule's state
  shift: jax.Array
  solves: jax.Array  # int32, attempts: systems solved
  trials: jax.Array  # int32, those that gave a point
  accepted: jax.Array
  flat: jax.Array  # whether rounding hides what the last trial did
  stalled: jax.Array
  products: jax.Array


def search(start: Start, found: Search, limits: Limits) -> Search:
  """Tries smaller and smaller smoothness until a trial is accepted.

  Args:
    start: The point.
    found: The search before its first trial.
    limits: How it goes, and how far.

  Returns:
    The search after its last trial. A trial whose decrease rounding hides
    teaches nothing: accepted on its gradient, it leaves smoothness and rule as
    they were tried; as the last of a search that failed, as they were before.
  """
  movable = jnp.isfinite(start.grad_norm) & jnp.isfinite(start.value)
  movable &= start.grad_norm > 0

  def unfinished(now):
    ended = now.accepted | now.stalled
    return movable & ~ended & (now.solves < limits.max_trials)

  def step(now):
    shift = start.shift_of(now.gamma)
    point = _try(start, shift)
    accepted, flat = _judge(start, point, shift, limits)
    stalled = jnp.asarray(False)
    if limits.safeguard:
      # A step across a symmetric valley is flat too, once.
      hidden = _predicted(point, shift) / 10 <= start.rounding
      hidden |= now.flat
      stalled = flat & ~accepted & hidden
    after = _learn(start, now, point, shift, accepted, limits.rule)
    taught = ~(flat & accepted) if limits.safeguard else True
    gamma, state = trees.where(
      taught, (after.gamma, after.rule), (now.gamma, now.rule)
    )
    return after._replace(gamma=gamma, rule=state, flat=flat, stalled=stalled)

  last = _varying.while_loop(unfinished, step, found)
  point = trees.where(
    last.accepted,
    (last.step, last.value, last.grad),
    (found.step, found.value, found.grad),
  )
  gamma, state = trees.where(
    last.flat & ~last.accepted,
    (found.gamma, found.rule),
    (last.gamma, last.rule),
  )
  return last._replace(
    step=point[0], value=point[1], grad=point[2], gamma=gamma, rule=state
  )


def _try(start, shift):
  """The point that a shift leads to."""
  dtype = start.value.dtype
  solution, solved, products = _solution(start, shift)
  step = jax.tree.map(
    lambda u, p: (-u).astype(p.dtype),
    start.space.primal(solution),
    start.params,
  )
  params = trees.rounded(optax.apply_updates(start.params, step))
  if start.project is not None:
    landed = start.project(params)
    move = start.space.lift(landed, start.params)
    # Cut short, a step may ascend: only a larger shift turns it around.
    uncut = ~trees.is_nonzero(jax.tree.map(jnp.subtract, landed, params))
    solved &= uncut | (trees.dot(start.dual, move) < 0)
    params = landed
  like = jax.eval_shape(start.value_and_grad, params)
  value, grad = _varying.cond(
    solved,
    lambda: trees.own(start.value_and_grad(params)),
    lambda: (
      jnp.full(like[0].shape, jnp.inf, like[0].dtype),
      # A full_like would forget how devices split the leaf.
      jax.tree.map(lambda x: jnp.abs(x) + jnp.inf, start.params),
    ),
  )
  value, dual = value.astype(dtype), start.space.dual(grad)
  move = start.space.lift(params, start.params)
  grad_norm, move_norm, residual_norm, square, slope, bent = trees.norms(
    dual, move, trees.scale_add(shift, move, dual),
    products=[(dual, dual), (start.dual, move), (dual, move)],
  )  # fmt: skip
  finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
  return Point(
    step=step,
    value=value,
    grad=grad,
    grad_norm=grad_norm,
    square=square,
    move_norm=move_norm,
    residual_norm=residual_norm,
    slope=slope,
    bent=bent,
    still=_is_rounding(step, params),
    solved=solved,
    ok=solved & finite,
    products=products,
  )


def _solution(start, shift):
  """What the solver finds, once it is what a solver must find."""
  found = start.prepared.solve(shift)
  known = isinstance(found, tuple) and len(found) == 3 and found[1] is not None
  if not known or jnp.shape(found[1]) or jnp.shape(found[2]):
    raise TypeError(
      'the solve of a solver must return (x, ok, products), where ok and'
      f' products are scalars; got {found!r}.'
    )
  checks.check_same_tree("the solver's x", found[0], 'grad', start.dual)
  return found[0], jnp.asarray(found[1], bool), jnp.asarray(found[2], jnp.int32)


def _judge(start, point, shift, limits):
  """Whether a trial is accepted, and whether rounding hides its decrease."""
  decrease = start.value - point.value
  needed = _per_shift(point.square, point.grad_norm, 8.0 * shift)
  flat = (jnp.abs(decrease) <= start.rounding) & point.ok
  accepted = decrease >= needed
  if limits.gain is not None:
    predicted = _predicted(point, shift)
    accepted |= (decrease >= limits.gain * predicted) & (predicted > 0)
  if limits.safeguard:
    smaller = point.grad_norm / start.grad_norm <= 0.9
    smaller |= -point.bent >= needed
    accepted = jnp.where(flat, smaller & ~point.still, accepted)
  return accepted & point.ok, flat


def _per_shift(square, norm, shift):
  """``norm ** 2 / shift``, also where the square under- or overflows."""
  info = jnp.finfo(norm.dtype)
  usual = (square > info.tiny**0.5) & (square < info.max)
  return jnp.where(usual, square / shift, norm * (norm / shift))


def _predicted(point, shift):
  """The decrease of the quadratic model, by its first-order condition."""
  return (shift * point.move_norm * point.move_norm - point.slope) / 2


def _is_rounding(step, params):
  """Whether a step to ``params`` changes none by more than a few roundings."""
  # Of the start's parameters the compiler would keep the magnitudes.
  small = jax.tree.map(
    lambda d, x: jnp.all(jnp.abs(d) <= 4 * jnp.finfo(x.dtype).eps * jnp.abs(x)),
    step,
    params,
  )
  return jnp.all(jnp.asarray(jax.tree.leaves(small)))


def _ruled(rule, trial, now):
  """What a rule finds, once it is what a rule must find."""
  found = rule.update(trial, now.rule)
  if not isinstance(found, tuple) or len(found) != 2 or jnp.shape(found[0]):
    raise TypeError(
      'the update of a rule must return (gamma, state), where gamma is a'
      f' scalar; got {found!r}.'
    )
  checks.check_same_tree("the rule's state", found[1], 'its init', now.rule)
  return jnp.asarray(found[0], now.gamma.dtype), found[1]


def _learn(start, now, point, shift, accepted, rule):
  """The search after a trial."""
  trial = _search.Trial(
    gamma=now.gamma,
    shift=shift,
    attempt=start.rejections + now.solves + 1,
    accepted=accepted,
    start_norm=start.grad_norm,
    grad_norm=point.grad_norm,
    step_norm=point.move_norm,
    residual_norm=point.residual_norm,
  )
  gamma, state = _ruled(rule, trial, now)
  # Nothing is learned where the gradient is zero or the point the same, unless
  # it is the same because the system could not be solved.
  useful = (gamma > 0) & jnp.isfinite(gamma)
  useful &= accepted | ~point.solved | (point.move_norm != 0)
  gamma, state = trees.where(useful, (gamma, state), (now.gamma, now.rule))
  return now._replace(
    step=point.step,
    value=point.value,
    grad=trees.cast_like(point.grad, now.grad),
    gamma=gamma,
    rule=state,
    shift=shift,
    solves=now.solves + 1,
    trials=now.trials + point.solved.astype(jnp.int32),
    accepted=accepted,
    products=now.products + point.products,
  )
