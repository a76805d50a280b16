"""The taps, where parameters meet the data.

A tap is an identity on the results of an operation in which parameters meet the
data. Its reverse rule knows the cotangents of the results, and with them the
gradient of one example that this meeting contributes.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optlab import trees
from optlab.batches import _ghost_norms
from optlab.batches import _ghost_values
from optlab.batches._ghost_programs import IDENTITY
from optlab.batches._ghost_programs import run
from optlab.batches._ghost_programs import signature
from optlab.batches._ghost_values import Value


def _program(values, used):
  """Makes operands again from leaves.

  Args:
    values: The operands of a meeting.
    used: The leaves that they come from.

  Returns:
    ``(leaves, constants) -> those operands that come from leaves``, what tells
    it from others, the constants, and the leaves.
  """
  eqns, steps, places, constants = [], [], {}, []
  leaves = [None] * len(used)

  def visit(value):
    if not value.leaves:
      constants.append(value.array)
      return 'constant', len(constants) - 1, 0
    if value.node is None:
      (index,) = value.leaves
      leaves[used.index(index)] = value.array
      return 'leaf', used.index(index), 0
    if id(value.node) not in places:
      operands = tuple(visit(operand) for operand in value.node.operands)
      eqns.append(value.node.eqn)
      steps.append((signature(value.node.eqn), operands))
      places[id(value.node)] = len(steps) - 1
    return 'step', places[id(value.node)], value.index

  wanted = tuple(visit(value) for value in values if value.leaves)

  def function(leaves, constants):
    results: list[Any] = []

    def read(operand):
      what, where, index = operand
      if what == 'step':
        return results[where][index]
      return (leaves if what == 'leaf' else constants)[where]

    for eqn, (_, operands) in zip(eqns, steps, strict=True):
      results.append(run(eqn, [read(operand) for operand in operands]))
    return [read(operand) for operand in wanted]

  return function, (tuple(steps), wanted), constants, leaves


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


def _identity(static, outs, residuals, carriers):
  """Identity on ``outs``, and zeros for the messages."""
  del residuals
  # Of every example its own, as the carriers are.
  messages = [
    jnp.broadcast_to(carriers[0] * 0, shape) for shape in static.messages
  ]
  return outs, messages


_tap = jax.custom_vjp(_identity, nondiff_argnums=(0,))


def _tap_forward(static, outs, residuals, carriers):
  return _identity(static, outs, residuals, carriers), residuals


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

  def __init__(self, wide, plans, slots, programs):
    self.wide, self.plans, self.slots = wide, plans, slots
    self.programs = programs
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
    kind = _ghost_values.kind_of(eqn, values) if len(used) == 1 else None
    if kind is not None and self.plans[used[0]].kind != 'sum':
      outs = self._factored(kind, values, outs, used[0], path)
    else:
      outs = self._any(eqn, values, outs, used)
    return [Value(out, True) for out in outs]

  def _any(self, eqn, values, outs, used):
    """The gradients of all leaves that meet the data here, one by one."""
    remade, steps, constants, leaves = _program(values, used)
    # A sum needs no operands: those would be kept until the reverse pass.
    linear = eqn is not IDENTITY and eqn.primitive.name in ('add', 'sub')
    shapes = [(jnp.shape(v.array), jnp.result_type(v.array)) for v in values]
    others = [v.array for v in values if not v.leaves and not linear]
    from_leaf = tuple(bool(v.leaves) for v in values)
    kinds = tuple(self.plans[i].kind for i in used)
    wide = self.wide

    def gradients(others, constants, leaves, cotangents):
      def meet(leaves):
        made, rest = iter(remade(leaves, constants)), iter(others)
        arrays = [
          next(made) if mine else jnp.zeros(*shape) if linear else next(rest)
          for mine, shape in zip(from_leaf, shapes, strict=True)
        ]
        return run(eqn, arrays)

      grads = jax.vjp(meet, leaves)[1](cotangents)[0]
      return [
        grad if kind == 'sum' else trees.sq_norm(grad, wide)
        for grad, kind in zip(grads, kinds, strict=True)
      ]

    key = signature(eqn), steps, from_leaf, kinds
    if linear:  # The shapes of what it does not read.
      key = *key, tuple(shapes)
    gradients = self.programs.of(key, gradients)

    def backward(residuals, cotangents, messages):
      del messages
      return gradients(*residuals, cotangents)

    carriers = [
      self.sums[i] if kind == 'sum' else self.slots[i]
      for i, kind in zip(used, kinds, strict=True)
    ]
    residuals = (others, constants, leaves)
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

    kinds = tuple(meeting.kind for meeting in earlier)

    def norms(data, before, cotangents, messages):
      factors = kind.factors(data, cotangents[0])
      total = _ghost_norms.sq_norm(kind, factors, wide)
      for message in zip(messages[::2], messages[1::2], strict=True):
        total += _ghost_norms.product(kind, factors, message, wide)
      told = [
        part
        for other, its_data in zip(kinds, before, strict=True)
        for part in _ghost_norms.message(kind, factors, other, its_data, wide)
      ]
      return [total.astype(wide), *told]

    norms = self.programs.of((kind, kinds), norms)

    def backward(residuals, cotangents, messages):
      return norms(*residuals, cotangents, messages)

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
