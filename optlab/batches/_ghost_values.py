"""What is known of a value of the walked program, and what follows from it.

Where parameters meet the data, what is known of the two says how the norm of
the gradient comes about.
"""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp

from optlab.batches import _ghost_norms
from optlab.batches._ghost_norms import Kind
from optlab.batches._ghost_programs import IDENTITY


class View(NamedTuple):
  """A value that holds the numbers of a leaf, or of a box of it, once each.

  Attributes:
    axes: The leaf's axis for each axis of the value, -1 where it is an axis of
      length 1 of its own; ``None`` where the numbers were reshaped.
    box: ``(start, stop)`` for each axis of the leaf; ``None`` for all of it.
  """

  axes: tuple[int, ...] | None
  box: tuple[tuple[int, int], ...] | None = None


class Node(NamedTuple):
  """An operation on parameters alone, to be done again where they meet data."""

  eqn: Any
  operands: tuple[Any, ...]


class Value(NamedTuple):
  """A number of the walked program, and how it comes from the parameters.

  Attributes:
    array: What it is; its shape and dtype while looking.
    has_data: Whether it depends on the example.
    leaves: The parameter arrays that it depends on without having met the
      data; those that it met the data with are accounted for.
    view: How it holds the numbers of its leaf, or ``None``.
    frame: Path of the loop whose slice of a stacked leaf it is.
    repeated: Whether every round of a loop sees the same.
    node: The operation that made it of leaves; ``None`` for a leaf itself.
    index: Which of the results of that operation.
  """

  array: Any
  has_data: bool = False
  leaves: frozenset[int] = frozenset()
  view: View | None = None
  frame: tuple[Any, ...] = ()
  repeated: bool = False
  node: Node | None = None
  index: int = 0


class Meeting(NamedTuple):
  """Where a leaf meets the data."""

  path: tuple[Any, ...]
  level: tuple[Any, ...]
  frame: tuple[Any, ...]
  repeated: bool
  kind: Kind | None
  view: View | None


class Plan(NamedTuple):
  """How the norm of a leaf's gradient comes about.

  Attributes:
    kind: 'direct', each meeting's own norm; 'pairs', with the products of each
      two; or 'sum', the gradient itself, added up over the meetings.
    frame: Where it is added up: everywhere, or in a loop for each slice.
    shape: Of the leaf, or of a slice.
    meetings: In the order of the program.
  """

  kind: str
  frame: tuple[Any, ...]
  meetings: tuple[Meeting, ...]


def leaf(array: Any, index: int, frame: tuple[Any, ...] = ()) -> Value:
  """The value of a parameter array itself, or of a loop's slice of it."""
  axes = tuple(range(len(array.shape)))
  return Value(array, False, frozenset((index,)), View(axes), frame)


def views(eqn: Any, values: Sequence[Value]) -> list[View | None]:
  """How the results hold the numbers of a leaf."""
  nothing: list[View | None] = [None] * len(eqn.outvars)
  view = values[0].view
  if len(values) != 1 or view is None:
    return nothing
  name, params = eqn.primitive.name, eqn.params
  before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  if name in ('copy', 'convert_element_type', 'sharding_constraint'):
    return [view]
  if name == 'transpose':
    axes = view.axes and tuple(view.axes[i] for i in params['permutation'])
    return [view._replace(axes=axes)]
  if name == 'rev':
    return [view._replace(axes=None)]
  if name in ('reshape', 'squeeze', 'expand_dims', 'broadcast_in_dim'):
    if math.prod(before) != math.prod(after):
      return nothing
    return [view._replace(axes=_same_axes(view.axes, before, after))]
  raw = view.axes == tuple(range(len(before)))
  start = [low for low, _ in view.box] if view.box else [0] * len(before)
  if name == 'slice' and raw and not any(
    step != 1 for step in params['strides'] or ()
  ):  # fmt: skip
    limits = zip(
      start, params['start_indices'], params['limit_indices'], strict=True
    )
    box = tuple((at + low, at + high) for at, low, high in limits)
    return [view._replace(box=box)]
  if name == 'split' and raw:
    ends = [0, *itertools.accumulate(map(int, params['sizes']))]
    whole = [(at, at + size) for at, size in zip(start, before, strict=True)]
    found: list[View | None] = []
    for low, high in itertools.pairwise(ends):
      box = list(whole)
      at = start[params['axis']]
      box[params['axis']] = (at + low, at + high)
      found.append(view._replace(box=tuple(box)))
    return found
  return nothing


def _same_axes(axes, before, after):
  """The leaf's axes after axes of length 1 came or went."""
  if axes is None:
    return None
  kept = [axis for axis, size in zip(axes, before, strict=True) if size != 1]
  if [size for size in before if size != 1] != [s for s in after if s != 1]:
    return None
  rest = iter(kept)
  return tuple(-1 if size == 1 else next(rest) for size in after)


def kind_of(eqn: Any, values: Sequence[Value]) -> Kind | None:
  """A dense layer or an embedding, if it is one."""
  if eqn is IDENTITY or eqn.primitive.name not in ('dot_general', 'gather'):
    return None
  side = 0 if values[0].leaves else 1
  view = values[side].view
  if view is None or values[1 - side].leaves:
    return None
  if eqn.primitive.name == 'gather':
    return _ghost_norms.embedding(eqn, view.axes) if side == 0 else None
  return _ghost_norms.dense(eqn, side, view.axes)


def plan(aval: Any, meetings: Sequence[Meeting]) -> Plan:
  """What to do with a leaf that meets the data so."""
  made = functools.partial(
    Plan, frame=meetings[0].frame, meetings=tuple(meetings)
  )
  if any(meeting.repeated for meeting in meetings):
    return made('sum')
  if len(meetings) == 1 or _are_disjoint(meetings):
    return made('direct')
  shape = aval.shape[1:] if meetings[0].frame else aval.shape
  kinds = [
    meeting.kind
    for meeting in meetings
    if meeting.kind is not None
    and meeting.kind.axis is not None
    and meeting.view is not None
    and meeting.view.box is None
    and meeting.level == meetings[0].level
  ]
  fit = len(kinds) == len(meetings)
  fit = fit and jnp.issubdtype(aval.dtype, jnp.floating) and len(shape) == 2
  if not fit:
    return made('sum')
  numbers = 0
  for first, second in itertools.combinations(kinds, 2):
    if second.is_gather and first.axis == 1:
      return made('sum')
    numbers += second.positions * (first.positions + shape[1 - first.axis])
  return made('pairs' if numbers < math.prod(shape) else 'sum')


def _are_disjoint(meetings):
  boxes = [meeting.view and meeting.view.box for meeting in meetings]
  if not all(boxes):
    return False
  return all(
    any(
      low >= other_high or other_low >= high
      for (low, high), (other_low, other_high) in zip(a, b, strict=True)
    )
    for a, b in itertools.combinations(boxes, 2)
  )


class Loop(NamedTuple):
  """What a scan of the program says of itself, in every version of jax."""

  jaxpr: Any
  consts: int
  carry: int
  length: int

  @classmethod
  def of(cls, eqn: Any) -> 'Loop':
    """Reads an equation."""
    params = eqn.params
    if 'num_carry' in params:
      consts, carry = params['num_consts'], params['num_carry']
    else:
      # From jax 0.12 on: trees of what goes in, one a kind.
      parts = params['ft_in'].unpack()
      consts, carry = (len(list(part)) for part in parts[:2])
    jaxpr = params['jaxpr']
    if not hasattr(jaxpr, 'consts'):
      jaxpr = jax_core.ClosedJaxpr(jaxpr, ())
    return cls(jaxpr, consts, carry, params['length'])

  def split(self, values: Sequence[Any]) -> tuple[list, list, list]:
    """Constants, carried values, and stacked ones."""
    end = self.consts + self.carry
    return (
      list(values[: self.consts]),
      list(values[self.consts : end]),
      list(values[end:]),
    )


def slice_of(aval: Any) -> jax.ShapeDtypeStruct:
  """What a round of a loop sees of a stacked value."""
  return jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)
