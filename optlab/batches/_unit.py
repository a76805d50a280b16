"""Gradients whose squares leave the range of their dtype, in a unit of theirs.

In float32 the square of 1e-22 is 0, and that of 1e22 infinite. A pass over the
batch is repeated with the losses divided by a power of two, until the squares
have digits: as a rule it was the first time.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np

from optlab import _varying
from optlab import trees
from optlab.batches import _windows

_ROUNDS = 3
# Powers of the unit in a moment; 2 in all others.
POWERS = {'sum_sq_diff_inner': 4}


class Found(NamedTuple):
  """What a pass over the batch finds.

  Attributes:
    value: The loss, over the unit.
    grads: Its gradient, over the unit.
    moments: By name, of the gradients over the unit.
    rest: What does not depend on the unit.
  """

  value: Any
  grads: Any
  moments: dict[str, Any]
  rest: Any


class _Carry(NamedTuple):
  unit: Any  # of the next round
  used: Any  # of the last one
  again: Any
  ok: Any
  round: Any
  found: Found


def fitted(
  run: Callable[[jax.Array], Found],
  power: int,
  wide: Any,
  inputs: Any,
  axis: Any,
) -> tuple[Found, jax.Array]:
  """A pass in a unit in which its squares have digits.

  Args:
    run: ``unit -> Found``, with ``sq_norms``, a tree, among the moments.
    power: Of the gradients, in the highest moment.
    wide: The dtype of moments.
    inputs: What ``run`` reads.
    axis: The mapped axis that ``run`` merges over, or ``None``.

  Returns:
    What was found, its value and gradient not over the unit; and the unit.
  """

  def step(carry, found):
    size = _size(found.moments, wide)
    again, ok, unit = _next(carry.unit, size, power, carry.round)
    if not (isinstance(carry.round, int) and carry.round == 0):
      # A number is kept of the first round; of trees the loop holds one.
      value = jnp.where(carry.round == 0, found.value, carry.found.value)
      found = found._replace(value=value)
    return _Carry(unit, carry.unit, again, ok, carry.round + 1, found)

  one = jnp.ones((), wide)
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
    carry = _loop(run, step, one, inputs, axis)
  else:
    carry = _Carry(one, one, True, True, 0, Found((), (), {}, ()))
    carry = step(carry, run(one))
    if isinstance(
      carry.again, jax.core.Tracer
    ):  # Of what the losses close over.
      carry = _loop(run, step, one, inputs, axis)
    else:
      while carry.again:
        carry = step(carry, run(carry.unit))
  found = carry.found
  sq_norms = jax.tree.map(
    lambda sq: jnp.where(carry.ok, sq, jnp.nan), found.moments['sq_norms']
  )
  moments = found.moments | {'sq_norms': sq_norms}
  # Where that of all but nothing overflows over a small unit, it is nothing.
  known = jnp.isfinite(_size(found.moments, wide)) | (carry.used >= 1)
  grads = jax.tree.map(
    lambda leaf: jnp.where(known, leaf * carry.used.astype(leaf.dtype), 0),
    found.grads,
  )
  return found._replace(grads=grads, moments=moments), carry.used


def _loop(run, step, one, inputs, axis):
  """The rounds as a loop of a program, which has the pass once.

  Reverse mode does not pass a loop of unknown length, and need not: the
  derivatives are those of a pass in the unit that was found, a constant.
  """
  axes = set().union(*map(_varying.varies_over, jax.tree.leaves(inputs)))
  axes -= set(axis if isinstance(axis, tuple) else (axis,))
  one = _vary(one, axes)
  closed, shape = jax.make_jaxpr(run, return_shape=True)(one)
  treedef = jax.tree.structure(shape)

  def found_in(consts, unit):
    program = jax_core.ClosedJaxpr(closed.jaxpr, consts)
    return treedef.unflatten(jax_core.jaxpr_as_fun(program)(unit))

  start = [
    _vary(jnp.zeros_like(like), _varying.varies_over(aval))
    for like, aval in zip(jax.tree.leaves(shape), closed.out_avals, strict=True)
  ]
  true = one > 0  # By type different over devices, as the unit is.
  start = _Carry(
    one, one, true, true, jnp.zeros((), jnp.int32), treedef.unflatten(start)
  )

  @jax.custom_jvp
  def rounds(consts):
    def body(carry):
      unit, held = carry.unit, consts
      if not any(map(_varying.varies_over, (unit, *consts))):
        # What a pass gathers or casts stays in it: XLA would move it in front
        # of the loop, and hold it there.
        unit, held = jax.lax.optimization_barrier((unit, held))
      after = step(carry, found_in(held, unit))
      vary = lambda flag: _vary(flag, axes)
      return after._replace(
        unit=vary(after.unit),
        used=vary(after.used),
        again=vary(after.again),
        ok=vary(after.ok),
      )

    return jax.lax.while_loop(lambda carry: carry.again, body, start)

  @rounds.defjvp
  def tangents(primals, tangents):
    carry = rounds(*primals)

    in_unit = lambda consts: found_in(consts, carry.used)
    found = jax.jvp(in_unit, primals, tangents)[1]
    found = found._replace(value=found.value * carry.used)
    still = jax.tree.map(_no_tangent, carry)
    return carry, still._replace(found=found)

  return rounds(closed.consts)


def _no_tangent(leaf):
  if jnp.issubdtype(leaf.dtype, jnp.inexact):
    return jnp.zeros_like(leaf)
  return np.zeros(leaf.shape, jax.dtypes.float0)


def _size(moments, wide):
  """The squared gradient and its deviations, one number for their range."""
  sq_norm = sum(jax.tree.leaves(moments['sq_norms']), jnp.zeros((), wide))
  size = sq_norm + moments.get('sum_sq_diff_norm', 0.0)
  # Of a single example 0 / 0.
  return jnp.where(jnp.isnan(size), sq_norm, size)


def _next(unit, size, power, rounds):
  """Whether to go on, whether the squares have digits, the next unit."""
  info = jnp.finfo(size.dtype)
  least, most = float(info.tiny / info.eps), float(info.max * info.eps)
  known = (size > least) & (size < most)
  root = 2 / power
  inside = (size > least**root) & (size < most**root)
  ok = inside | (size == 0)
  # Nothing but zeros is told from what underflows by a second look.
  done = inside | jnp.isnan(size) | ((size == 0) & (rounds > 0))
  half = jnp.round(jnp.log2(jnp.where(known, size, 1)) / 2)
  exact = jnp.ldexp(jnp.ones_like(size), half.astype(jnp.int32))
  # Steps whose own squares stay in range: other factors of a gradient do not.
  down = 2.0 ** round(0.48 * math.log2(float(info.tiny)))
  up = 2.0 ** round(0.5 * math.log2(float(info.max)))
  factor = jnp.where(known, exact, jnp.where(size <= least, down, up))
  again = ~done & (rounds < _ROUNDS - 1)
  following = unit * factor.astype(unit.dtype)
  # Of which the inverse has digits too.
  following = jnp.clip(following, 4 * float(info.tiny), float(info.max) / 16)
  return again, ok, jnp.where(again, following, unit)


def times(leaf: jax.Array, unit: jax.Array, power: int) -> jax.Array:
  """A moment as it is; zero or infinite where it leaves its range."""
  for _ in range(power):
    leaf = leaf * unit.astype(leaf.dtype)
  return leaf


def plain(moments: dict[str, Any], unit: jax.Array) -> dict[str, Any]:
  """The moments of the gradients themselves, without ``sq_norms``."""

  def moment(name, leaves):
    power = POWERS.get(name, 2)
    return jax.tree.map(lambda leaf: times(leaf, unit, power), leaves)

  return {
    name: moment(name, leaves)
    for name, leaves in moments.items()
    if name != 'sq_norms'
  }


def sq_norms(grads: Any, wide: Any) -> Any:
  """The squared norm of each leaf."""
  return jax.tree.map(lambda leaf: trees.sq_norm(leaf, wide), grads)


def _vary(array, axes):
  for axis in sorted(axes, key=str):
    array = _windows.vary(array, axis)
  return array
