"""Which examples the numbers of a program depend on, read from the program.

The axis of the examples is followed from operation to operation. What is told
of a number is one of these:

- nothing of the data is in it (`NONE`);
- an axis, an integer: its i-th row is of example i alone;
- `Part`: the same of a range of the examples;
- `SOME`: it is of examples that are not told apart by an axis;
- `Mixed`: each example has others in it;
- `UNKNOWN`: none of these can be said.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend import core as jax_core

from optlab.batches import _ghost_values
from optlab.batches._dependence_rules import NONE
from optlab.batches._dependence_rules import SOME
from optlab.batches._dependence_rules import UNKNOWN
from optlab.batches._dependence_rules import Mixed
from optlab.batches._dependence_rules import Part
from optlab.batches._dependence_rules import rule_of

_CALLS = frozenset((
  'jit', 'pjit', 'closed_call', 'core_call', 'remat2', 'checkpoint',
  'custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr',
))  # fmt: skip
# Which put pieces together: of several examples, not each of all.
_PIECES = ('concatenate', 'dynamic_update_slice', 'pad')


def mixed_by(jaxpr: Any, params: int, examples: int) -> str | None:
  """The operation by which the first result has several examples in each row.

  Args:
    jaxpr: The program of the losses, one a row.
    params: How many of its arguments, the first ones, are parameters.
    examples: How many, the last ones, have the examples on their first axis.

  Returns:
    Its name, or ``None`` where nothing of the kind was found.
  """
  found = _walk(jaxpr, [NONE] * params + [0] * examples)[0]
  return found.by if isinstance(found, Mixed) else None


def _walk(jaxpr, inputs):
  env: dict[Any, Any] = dict.fromkeys(jaxpr.constvars, NONE)
  env |= dict(zip(jaxpr.invars, inputs, strict=True))
  read = lambda atom: NONE if isinstance(atom, jax_core.Literal) else env[atom]
  for eqn in jaxpr.eqns:
    outs = _equation(eqn, [read(atom) for atom in eqn.invars])
    env |= dict(zip(eqn.outvars, outs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn, states):
  """What is told of each result."""
  count = len(eqn.outvars)
  name = eqn.primitive.name
  if all(state == NONE for state in states):
    return [NONE] * count
  if name in _CALLS:
    inner = eqn.params.get('jaxpr', eqn.params.get('call_jaxpr'))
    inner = getattr(inner, 'jaxpr', inner)
    if inner is not None and len(inner.invars) == len(states):
      return _walk(inner, states)
  if name in _LOOPS:
    return _LOOPS[name](eqn, states)
  for state in states:
    if isinstance(state, Mixed):
      return [state] * count
  found = _found(eqn, states)
  found = [int(s) if hasattr(s, '__index__') else s for s in found]
  if len(found) != count:
    found = found * count
  if count == 1 and found[0] == UNKNOWN and eqn.outvars[0].aval.size == 1:
    return [SOME]
  return found


def _found(eqn, states):
  name = eqn.primitive.name
  kinds = {state for state in states if state != NONE}
  pieces = name in _PIECES or name.startswith('scatter')
  if UNKNOWN in kinds or (SOME in kinds and pieces):
    return [UNKNOWN]
  if kinds == {SOME}:
    return [SOME]
  parts = {state for state in kinds if isinstance(state, Part)}
  if SOME in kinds:
    # Each row of a result has its own example and some in it.
    return [UNKNOWN if parts else Mixed(name)]
  if not parts:
    return rule_of(eqn)(eqn, states)
  if name == 'concatenate':
    return [_joined(eqn, states)]
  if len(kinds) > 1:
    return [UNKNOWN]
  (part,) = parts
  found = rule_of(eqn)(
    eqn, [part.axis if state != NONE else NONE for state in states]
  )
  if part.stop - part.start == 1 and found == [UNKNOWN]:
    return [SOME]  # A single example, whose axis is gone.
  wrap = lambda state: SOME if isinstance(state, Mixed) else state
  return [
    part._replace(axis=int(state))
    if hasattr(state, '__index__')
    else wrap(state)
    for state in found
  ]


def _is_axis(state):
  return isinstance(state, int)


def _joined(eqn, states):
  """Ranges of examples, again in their order or not."""
  axis = eqn.params['dimension']
  size = eqn.outvars[0].aval.shape[axis]
  if not all(isinstance(s, Part) and s.axis == axis for s in states):
    return UNKNOWN
  at = states[0].start
  for state in states:
    if state.start != at:
      return SOME
    at = state.stop
  return axis if at - states[0].start == states[0].count == size else UNKNOWN


def _join(a, b):
  """What is told of a number that is either."""
  if b in (a, NONE):
    return a
  if a == NONE:
    return b
  for state in (a, b):
    if isinstance(state, Mixed):
      return state
  return UNKNOWN


def _settled(carry: Sequence[Any], body: Any) -> list[Any]:
  """What is told of carried values in every round."""
  carry = list(carry)
  while True:
    now = [_join(a, b) for a, b in zip(carry, body(carry), strict=True)]
    if now == carry:
      return carry
    carry = now


def _scan(eqn, states):
  loop = _ghost_values.Loop.of(eqn)
  consts, carry, xs = loop.split(states)
  slices = [_slice(state) for state in xs]
  body = lambda carry, slices: _walk(
    loop.jaxpr.jaxpr, [*consts, *carry, *slices]
  )
  first = lambda slices: lambda carry: body(carry, slices)[: loop.carry]
  carry = _settled(carry, first(slices))
  stacked = body(carry, slices)[loop.carry :]
  if not any(_passed(state) for state in xs):
    return [*carry, *map(_stack, stacked)]
  # A round an example: what its results have from the rounds before.
  others = [
    NONE if _passed(state) else kept
    for state, kept in zip(xs, slices, strict=True)
  ]
  before = body(carry, others)[loop.carry :]
  outs: list[Any] = []
  for state, kept in zip(stacked, before, strict=True):
    if state == SOME:
      outs.append(0 if kept == NONE else Mixed('scan'))
    else:
      outs.append(_stack(state))
  return [*carry, *outs]


def _passed(state):
  return state == 0 and _is_axis(state)


def _slice(state):
  """Of a round, where the first axis is passed over."""
  if isinstance(state, Part):
    return state._replace(axis=state.axis - 1) if state.axis else SOME
  if _is_axis(state):
    return state - 1 if state else SOME
  return state


def _stack(state):
  """Of the results of all rounds."""
  if isinstance(state, Part):
    return state._replace(axis=state.axis + 1)
  return state + 1 if _is_axis(state) else state


def _while(eqn, states):
  """Whether it goes on is not followed: of mapped loops, any of them does."""
  params = eqn.params
  if 'body_nconsts' not in params:
    return [UNKNOWN] * len(eqn.outvars)
  first = params['cond_nconsts']
  start = first + params['body_nconsts']
  consts, body = states[first:start], params['body_jaxpr']
  body = getattr(body, 'jaxpr', body)
  return _settled(states[start:], lambda carry: _walk(body, [*consts, *carry]))


def _cond(eqn, states):
  index, *operands = states
  outs: list[Any] = [NONE] * len(eqn.outvars)
  for branch in eqn.params['branches']:
    found = _walk(getattr(branch, 'jaxpr', branch), operands)
    outs = list(map(_join, outs, found))
  if index == NONE:
    return outs
  if index == UNKNOWN:
    return [UNKNOWN] * len(outs)
  by = index if isinstance(index, Mixed) else Mixed('cond')
  return [SOME if state in (NONE, SOME) else by for state in outs]


_LOOPS = {'scan': _scan, 'while': _while, 'cond': _cond}
