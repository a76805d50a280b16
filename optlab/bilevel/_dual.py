"""Steps on the linear system ``g_yy z = f_y``, bounded and watched."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import trees
from optlab.bilevel import _problem

PATIENCE = 200  # Steps after which z must have felt the curvature.
LACKING = 0.1  # Of z, more than which a series must not lack.


class Dual(NamedTuple):
  """How z moves."""

  lr: Any
  optimizer: Any = None
  steps: int = 1
  radius: Any = None


class DualState(NamedTuple):
  """What the steps of z need."""

  opt_state: base.OptState
  reach: jax.Array  # shape (), the length of all steps f_y alone would take
  felt: Any  # two of shape (), means of z' g_yy z and z' f_y of late


class Solution(NamedTuple):
  """A linear-system variable, and what is known of it."""

  dual: base.Params
  residual: jax.Array  # shape (), norm of g_yy z - f_y
  ok: jax.Array  # shape (), bool, no sign of an indefinite or too steep g_yy
  scale: jax.Array  # shape (), norm of g_yy z, or more
  dual_state: Any = ()
  seen: Any = None  # norms and products of what lies beside, all finite with z
  truncated: Any = ()  # shape (), see `lacking`; of a series alone


# ``(lower, z) -> (trees, pairs, rest)``: norms and products to take, of what
# lies beside a step of z, and what is handed on.
Beside = Callable[[_problem.Lower, base.Params], Any]


def init(dual: Dual, z: base.Params) -> DualState:
  """The state before the first step."""
  opt_state = () if dual.optimizer is None else dual.optimizer.init(z)
  dtype = trees.accumulator_dtype(z)
  # Not one zero twice: a buffer can be donated once.
  zero, *both = (jnp.zeros((), dtype) for _ in range(3))
  return DualState(opt_state, zero, tuple(both))


def advance(
  dual: Dual,
  problem: _problem.Problem,
  point: _problem.Point,
  state: Any,
  grad_y: base.Params,
  beside: Beside,
  *,
  fresh: bool = False,
) -> tuple[Solution, base.Updates, _problem.Lower, Any]:
  """The steps of z.

  Args:
    dual: How z moves.
    problem: The levels.
    point: Where derivatives are taken.
    state: The estimator's state before.
    grad_y: The upper gradient f_y.
    beside: What to look at as well.
    fresh: Whether the cross product is that of the new z.

  Returns:
    The next z, ``g_xy z``, what was seen of the lower level, and the rest.
  """
  if dual.steps == 1 and dual.optimizer is None:
    lower, cross, product = _problem.multiply(problem, point, state.dual)
    *looked, rest = beside(lower, state.dual)
    solution = step(
      dual, state.dual, product, grad_y, state.dual_state, state.step,
      beside=looked,
    )  # fmt: skip
    if fresh:
      _, cross, _ = _problem.multiply(problem, point, solution.dual)
    return solution, cross, lower, rest
  lower, products = _problem.linearize(problem, point)

  def once(z, dual_state):
    return step(
      dual, z, products(z)[1], grad_y, dual_state, state.step, products
    )

  def again(_, before):
    after = once(before.dual, before.dual_state)
    # What is seen beside belongs to the z of the start.
    return after._replace(ok=before.ok & after.ok, scale=before.scale)

  first = once(state.dual, state.dual_state)
  solution = jax.lax.fori_loop(1, dual.steps, again, first)
  cross, _ = products(solution.dual if fresh else state.dual)
  return look(solution, cross, lower, state.dual, beside)


def look(
  solution: Solution,
  cross: base.Updates,
  lower: _problem.Lower,
  z: base.Params,
  beside: Beside,
) -> tuple[Solution, base.Updates, _problem.Lower, Any]:
  """What `advance` returns, once ``beside`` was looked at by itself."""
  others, pairs, rest = beside(lower, z)
  seen = trees.norms(solution.dual, *others, products=pairs)
  return solution._replace(seen=seen), cross, lower, rest


def residual_of(
  z: base.Params, product: base.Params, grad_y: base.Params
) -> base.Params:
  """``g_yy z - f_y``, the gradient of the quadratic that z minimizes."""
  return jax.tree.map(
    lambda z, hz, fy: hz.astype(z.dtype) - fy.astype(z.dtype),
    z,
    product,
    grad_y,
  )


def subtract(z: base.Params, rate: Any, residual: base.Params) -> base.Params:
  """``z - rate * residual``."""
  return jax.tree.map(lambda z, r: (z - rate * r).astype(z.dtype), z, residual)


def step(
  dual: Dual,
  z: base.Params,
  product: base.Params,
  grad_y: base.Params,
  state: DualState,
  count: jax.Array,
  products: Any = None,
  *,
  sampled: base.Params | None = None,
  beside: Any = ((), ()),
) -> Solution:
  r"""One step on ``z' g_yy z / 2 - f_y' z``.

  Where ``g_yy`` is positive semidefinite and the rate at most two over its
  largest eigenvalue, a step makes ``z`` longer by at most the rate times the
  norm of ``f_y``. The sum of these is the ball, twice as wide, that holds ``z``
  where the caller gave none: it cuts only what would diverge. A ``z`` that is
  still nearly as long after many steps has met no curvature that it can feel:
  the lower level is linear there, singular, or the rate far too small, and the
  hypergradient not that of a solution. The sign of
  ``z' g_yy z`` is looked at too, by ``sampled`` where ``product`` is no true
  one. Norms and products of ``beside``, trees and pairs of them, are taken with
  the others: in small problems looking costs as much as computing.
  """
  residual = residual_of(z, product, grad_y)
  rate: Any = None
  if dual.optimizer is None:
    rate = trees.at_step(dual.lr, count)
    moved, opt_state = subtract(z, rate, residual), state.opt_state
  else:

    def value(z, product):
      half = 0.5 * trees.inner_product(z, product)
      return half - trees.inner_product(z, grad_y)

    updates, opt_state = dual.optimizer.update(
      residual, state.opt_state, z, value=value(z, product), grad=residual,
      value_fn=lambda z: value(z, products(z)[1]),
    )  # fmt: skip
    moved = optax.apply_updates(z, updates)
  others, pairs = beside
  curved = z, product if sampled is None else sampled
  length, size, reached, *seen, along, due = trees.norms(
    residual, grad_y, moved, *others, products=[*pairs, curved, (z, grad_y)]
  )
  reach, bound, idle = state.reach, dual.radius, jnp.asarray(False)
  felt = follow(state.felt, (along, due), count)
  if rate is not None:
    reach += (rate * size).astype(reach.dtype)
    bound = 2 * reach if bound is None else bound
    idle = is_idle(reached, reach, felt, count)
  moved, ok, _ = hold(moved, jnp.inf if bound is None else bound, reached)
  scale = length + size  # At least the norm of g_yy z.
  ok &= is_convex(along, reached * scale)
  # In the mean, since z may pass through zero.
  ok &= ~idle & (feels(felt[0], reached, size) | (count < PATIENCE))
  return Solution(
    moved,
    length,
    ok,
    scale,
    DualState(opt_state, reach, felt),
    (reached, *seen),
  )


def hold(
  z: base.Params, radius: Any, length: Any = None
) -> tuple[base.Params, jax.Array, jax.Array]:
  """``z`` in a ball around zero, whether it was there, and its norm before."""
  length = trees.norm(z) if length is None else length
  inside = ~(length > radius)
  scale = jnp.where(inside, 1, radius / jnp.where(inside, 1, length))
  z = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), z)
  return z, inside, length


def series_radius(radius: Any, rates: Any, grad_y: base.Params) -> jax.Array:
  """The caller's ball, or that of a Neumann series whose terms do not grow."""
  own = 1.01 * rates * trees.norm(grad_y)
  return own if radius is None else jnp.minimum(own, radius)


def lacking(
  before: jax.Array,
  after: jax.Array,
  sign: jax.Array,
  length: jax.Array,
  cross: base.Updates,
  terms: Any = 0,
) -> jax.Array:
  r"""What part of a Neumann series' limit its terms lack, at least.

  A term that is left of f_y shrinks to :math:`\sigma` of its norm by the next,
  and that one by no more, since norms of powers are log-convex. So all that
  follow add up to at least :math:`1 / (1 - \sigma)` of it.

  Args:
    before: The norm of a term.
    after: That of the next, which is left out.
    sign: Their inner product; terms that alternate lack nothing.
    length: The norm of the sum of the terms.
    cross: What x feels of it: where that is zero, nothing is lacking.
    terms: How many from ``after`` on are not left out.
  """
  sigma = jnp.clip(after / jnp.where(before > 0, before, 1), 0, 1)
  # What is left of converged terms is rounding, which does not shrink.
  found = (sign > 0) & (after > 16 * jnp.finfo(length.dtype).eps * length)
  rest = jnp.where(found, after, 0) * sigma**terms
  whole = rest + (1 - sigma) * length
  some = (whole > 0) & trees.is_nonzero(cross)
  return jnp.where(some, rest / jnp.where(whole > 0, whole, 1), 0)


def feels(along: jax.Array, length: jax.Array, size: jax.Array) -> jax.Array:
  """Whether ``g_yy`` along z is more than nothing, beside ``f_y``.

  At a solution ``z' g_yy z`` is ``z' f_y``, which only a condition number of a
  million makes so small. Where it is nothing, z is as long as its steps were.
  """
  least = 1e-3 * length * size
  # The smallest numbers have no squares; and zero says nothing.
  return (along > least) | (least < 1e5 * jnp.finfo(along.dtype).tiny)


def follow(felt: Any, products: Any, count: jax.Array) -> Any:
  """Means of both products over the last hundred steps."""
  weight = jnp.maximum(1 / (count + 1), 0.01)

  def mean(old, new):
    new = jnp.nan_to_num(new.astype(old.dtype))  # Beyond all: the largest.
    return (old + weight * (new - old)).astype(old.dtype)

  return tuple(map(mean, felt, products))


def is_idle(
  length: jax.Array, reach: jax.Array, felt: Any, count: jax.Array
) -> jax.Array:
  """Whether z still goes where no curvature will stop it, after many steps.

  It does where these have led it about as far as ``f_y`` alone would, or where
  ``z' g_yy z`` is far below ``z' f_y``: at a solution they are the same, and
  with a singular g_yy z grows for ever. What noise makes of z is short.
  """
  grows = (length > 0.05 * reach) & (felt[0] < 0.5 * felt[1])
  far = (length > 0.7 * reach) | grows
  return far & (reach > 0) & (count >= PATIENCE)


def is_convex(along: jax.Array, scale: Any) -> jax.Array:
  """Whether ``z' g_yy z`` is not negative, but for rounding at this scale."""
  return ~(along < -1e-3 * scale)
