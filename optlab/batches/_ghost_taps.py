"""What is known of a value, what to do where it meets the data, and the taps.

A tap is an identity on the results of an operation in which parameters meet the
data. Its reverse rule knows the cotangents of the results, and with them the
gradient of one example that this meeting contributes.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optlab import trees
from optlab.batches import _ghost_norms
from optlab.batches._ghost_norms import Kind


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


class _Identity(NamedTuple):
  """Stands for an equation where a value without data is made to meet it."""

  name: str = 'identity'


IDENTITY = _Identity()


def leaf(array: Any, index: int, frame: tuple[Any, ...] = ()) -> Value:
  """The value of a parameter array itself, or of a loop's slice of it."""
  axes = tuple(range(len(array.shape)))
  return Value(array, False, frozenset((index,)), View(axes), frame)


def run(eqn: Any, arrays: Sequence[Any]) -> list[Any]:
  """The results of an equation."""
  if eqn is IDENTITY:
    return list(arrays)
  bound = eqn.primitive.get_bind_params(eqn.params)
  # Before jax 0.10 the functions that a primitive calls come apart.
  functions, params = bound if isinstance(bound, tuple) else ((), bound)
  out = eqn.primitive.bind(*functions, *arrays, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


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
      jaxpr = jax.extend.core.ClosedJaxpr(jaxpr, ())
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


def _program(values):
  """Makes operands again from leaves: ``(function, constants, leaves)``.

  ``function(leaves, constants)`` returns the operands that come from leaves.
  """
  steps, places, constants, bases = [], {}, [], {}

  def visit(value):
    if not value.leaves:
      constants.append(value.array)
      return 'constant', len(constants) - 1, 0
    if value.node is None:
      (index,) = value.leaves
      bases[index] = value.array
      return 'leaf', index, 0
    if id(value.node) not in places:
      operands = [visit(operand) for operand in value.node.operands]
      steps.append((value.node.eqn, operands))
      places[id(value.node)] = len(steps) - 1
    return 'step', places[id(value.node)], value.index

  wanted = [visit(value) for value in values if value.leaves]

  def function(leaves, constants):
    results = []

    def read(operand):
      what, where, index = operand
      if what == 'step':
        return results[where][index]
      return (leaves if what == 'leaf' else constants)[where]

    for eqn, operands in steps:
      results.append(run(eqn, [read(operand) for operand in operands]))
    return [read(operand) for operand in wanted]

  return function, constants, bases


class _Static(NamedTuple):
  """What a tap is, apart from its arrays.

  Attributes:
    backward: ``(residuals, cotangents of results, of messages) -> cotangents of
      the carriers``.
    messages: Shapes of the additional results, whose cotangents carry to this
      tap what a later one knows.
    first: Whether the norm is made before the cotangents go on, so that what it
      takes is given back by then.
  """

  backward: Callable[..., Any]
  messages: tuple[tuple[int, ...], ...] = ()
  first: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(static, outs, residuals, carriers):
  """Identity on ``outs``, and zeros for the messages."""
  del residuals
  # Of every example its own, as the carriers are.
  messages = [
    jnp.broadcast_to(carriers[0] * 0, shape) for shape in static.messages
  ]
  return outs, messages


def _tap_forward(static, outs, residuals, carriers):
  return _tap(static, outs, residuals, carriers), residuals


def _tap_backward(static, residuals, cotangents):
  outs, messages = cotangents
  told = static.backward(residuals, outs, messages)
  if static.first:
    outs, told = lax.optimization_barrier((outs, told))
  return outs, None, told


_tap.defvjp(_tap_forward, _tap_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _source(shape, slot):
  """Zeros, whose cotangent's squared norm is that of the slot."""
  return jnp.broadcast_to((slot * 0).astype(shape.dtype), shape.shape)


_source.defvjp(
  lambda shape, slot: (_source(shape, slot), slot),
  lambda shape, slot, cotangent: (trees.sq_norm(cotangent, slot.dtype),),
)


class Taps:
  """Puts taps on results; lives for one trace."""

  def __init__(self, wide, plans, slots):
    self.wide, self.plans, self.slots = wide, plans, slots
    self.sums: dict[int, Any] = {}
    self.messages: dict[Any, Any] = {}
    self.known: dict[Any, Any] = {}

  def open(self, leaf: int, shape: Any) -> None:
    """Makes what the meetings of a leaf add their gradients up in."""
    dtype = jax.dtypes.canonicalize_dtype(shape.dtype)
    self.sums[leaf] = _source(
      jax.ShapeDtypeStruct(shape.shape, dtype), self.slots[leaf]
    )

  def tap(
    self, eqn: Any, values: Sequence[Value], outs: list, used: list, path: Any
  ) -> list[Value]:
    """The results of a meeting, tapped."""
    if eqn is IDENTITY:
      zero = self.slots[used[0]] * 0
      outs = [out + zero.astype(out.dtype) for out in outs]
    kind = kind_of(eqn, values) if len(used) == 1 else None
    if kind is not None and self.plans[used[0]].kind != 'sum':
      outs = self._factored(kind, values, outs, used[0], path)
    else:
      outs = self._any(eqn, values, outs, used)
    return [Value(out, True) for out in outs]

  def _any(self, eqn, values, outs, used):
    """The gradients of all leaves that meet the data here, one by one."""
    program, constants, bases = _program(values)
    # A sum needs no operands: those would be kept until the reverse pass.
    linear = eqn is not IDENTITY and eqn.primitive.name in ('add', 'sub')
    shapes = [(jnp.shape(v.array), jnp.result_type(v.array)) for v in values]
    others = [v.array for v in values if not v.leaves and not linear]
    from_leaf = [bool(v.leaves) for v in values]
    kinds = [self.plans[i].kind for i in used]
    wide = self.wide

    def backward(residuals, cotangents, messages):
      del messages
      others, constants, leaves = residuals

      def meet(chosen):
        made, rest = iter(program(chosen, constants)), iter(others)
        arrays = [
          next(made) if mine else jnp.zeros(*shape) if linear else next(rest)
          for mine, shape in zip(from_leaf, shapes, strict=True)
        ]
        return run(eqn, arrays)

      grads = jax.vjp(meet, leaves)[1](cotangents)[0]
      return [
        grads[i] if kind == 'sum' else trees.sq_norm(grads[i], wide)
        for i, kind in zip(used, kinds, strict=True)
      ]

    carriers = [
      self.sums[i] if kind == 'sum' else self.slots[i]
      for i, kind in zip(used, kinds, strict=True)
    ]
    residuals = (others, constants, bases)
    return _tap(_Static(backward), outs, residuals, carriers)[0]

  def _factored(self, kind, values, outs, leaf, path):
    """A dense layer or an embedding, from the factors of its gradient."""
    plan, wide = self.plans[leaf], self.wide
    side = 0 if values[0].leaves else 1
    data = values[1 - side].array
    earlier, later = (), ()
    if plan.kind == 'pairs':
      at = [meeting.path for meeting in plan.meetings].index(path)
      earlier = plan.meetings[:at]
      later = plan.meetings[at + 1 :]
      self.known[leaf, path] = data
    sizes = kind.sizes

    def backward(residuals, cotangents, messages):
      data, before = residuals
      factors = kind.factors(data, cotangents[0])
      total = _ghost_norms.sq_norm(kind, factors, wide)
      for message in zip(messages[::2], messages[1::2], strict=True):
        total += _ghost_norms.product(kind, factors, message, wide)
      told = [
        part
        for meeting, its_data in zip(earlier, before, strict=True)
        for part in _ghost_norms.message(
          kind, factors, meeting.kind, its_data, wide
        )
      ]
      return [total.astype(wide), *told]

    shapes = []
    for meeting in later:
      shapes.append((meeting.kind.positions, kind.positions))
      shapes.append((meeting.kind.positions, sizes[1 - kind.axis]))
    carriers = [self.slots[leaf]]
    for meeting in earlier:
      carriers += self.messages[leaf, meeting.path, path]
    before = [self.known[leaf, meeting.path] for meeting in earlier]
    outs, messages = _tap(
      _Static(backward, tuple(shapes), first=True),
      outs,
      (data, before),
      carriers,
    )
    for i, meeting in enumerate(later):
      self.messages[leaf, path, meeting.path] = messages[2 * i : 2 * i + 2]
    return outs
