"""The walk over a jaxpr that finds where parameters meet the data.

One walker goes over the loss of an example twice. The first time it only
looks: its values have shapes and no numbers, and it writes down every meeting.
From that follows a `Plan` for each array of the parameters. The second time it
computes, and taps each meeting by the plan.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jax_core

from optlab.batches import _along
from optlab.batches import _ghost_loops as loops
from optlab.batches import _ghost_programs as programs
from optlab.batches import _ghost_taps as taps
from optlab.batches import _ghost_values
from optlab.batches._ghost_values import Meeting
from optlab.batches._ghost_values import Node
from optlab.batches._ghost_values import Value

_CALLS = frozenset(('jit', 'pjit', 'closed_call', 'core_call'))
_REMAT = frozenset(('remat2', 'checkpoint'))


def tap(
  loss: Callable[..., Any], params: Any, example: Any, wide: Any
) -> tuple[Callable[..., Any], Any]:
  """A loss of one example with norms in the cotangents of a last argument.

  Args:
    loss: ``(params, example) -> scalar``.
    params: The parameters.
    example: An example, for its shapes.
    wide: The dtype of norms.

  Returns:
    ``(params, example, slots) -> scalar``, with a scalar of ``slots`` for each
    leaf of ``params``; and the axis of a mesh that the loss spreads its
    examples over, or ``None``.
  """
  closed, along = _along.moved(jax.make_jaxpr(loss)(params, example))
  leaves, treedef = jax.tree.flatten(params)
  shapes = [leaf.aval for leaf in closed.jaxpr.invars[: len(leaves)]]
  plans, found = _plan(closed, len(leaves), wide)
  del leaves

  def tapped(params, example, slots):
    leaves = treedef.flatten_up_to(params)
    slots = treedef.flatten_up_to(slots)
    walker = Walker(wide, plans, found, slots)
    walker.open(shapes, ())
    arrays = [*leaves, *jax.tree.leaves(example)]
    return walker.loss(closed, arrays, len(leaves)).array

  return tapped, along


def _plan(closed, count, wide):
  """What to do with each leaf, and which values of loops have data."""
  opaque = frozenset()
  while True:
    walker = Walker(wide, opaque=opaque)
    avals = [var.aval for var in closed.jaxpr.invars]
    walker.loss(closed, avals, count)
    plans, strange = {}, set(walker.strange)
    for leaf, meetings in walker.meetings.items():
      if len({meeting.frame for meeting in meetings}) > 1:
        strange.add(leaf)
      else:
        plans[leaf] = _ghost_values.plan(avals[leaf], meetings)
    if strange <= opaque:
      return plans, walker.loops
    opaque |= strange


class Walker:
  """Runs a jaxpr on `Value`s; lives for one trace.

  Attributes:
    plans: By leaf; ``None`` while looking.
    meetings: By leaf, what was found while looking.
    strange: Leaves that a loop does not take slice by slice.
    loops: By path of a loop, which of its carried and of its stacked results
      have data; ``None`` where it is met as one operation.
  """

  def __init__(self, wide, plans=None, loops=None, slots=(), opaque=()):
    self.wide, self.plans, self.slots = wide, plans, slots
    self.loops = {} if loops is None else loops
    self.opaque = frozenset(opaque)
    self.meetings: dict[int, list[Meeting]] = {}
    self.strange: set[int] = set()
    self.programs = programs.Programs()
    self.taps = taps.Taps(wide, plans, slots, self.programs)

  def open(self, shapes, frame):
    """Makes what meetings add up in, for the leaves of a frame."""
    if self.plans is not None:
      for leaf, plan in self.plans.items():
        if plan.kind == 'sum' and plan.frame == frame:
          self.taps.open(leaf, shapes[leaf])

  def loss(self, closed, arrays, count):
    """The value of the loss; a part without data is met at the end."""
    inputs = [
      _ghost_values.leaf(array, i) for i, array in enumerate(arrays[:count])
    ]
    inputs += [Value(array, True) for array in arrays[count:]]
    (out,) = self.walk(closed.jaxpr, closed.consts, inputs, (), ())
    return self.materialize(out, ('loss',), ())

  def walk(self, jaxpr, consts, inputs, path, level):
    """All equations; ``level`` names the loops and checkpoints around."""
    env = dict(zip(jaxpr.constvars, map(Value, consts), strict=True))
    env |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
      if isinstance(atom, jax_core.Literal):
        return Value(atom.val)
      return env[atom]

    stretch = programs.Stretch(self.programs)
    last = programs.last_reads(jaxpr)

    def settle(values, atoms, i):
      """The same values, with arrays."""
      if all(value.array is not None for value in values):
        return values
      arrays = stretch.run(
        lambda var: env[var].array, lambda var: last.get(var, -1) >= i
      )
      env.update((v, env[v]._replace(array=a)) for v, a in arrays.items())
      return [read(atom) for atom in atoms]

    for i, eqn in enumerate(jaxpr.eqns):
      values = [read(atom) for atom in eqn.invars]
      if self.waits(eqn, values):
        stretch.eqns.append(eqn)
        has_data = any(value.has_data for value in values)
        outs = [Value(None, has_data)] * len(eqn.outvars)
      else:
        values = settle(values, eqn.invars, i)
        outs = self.equation(eqn, values, (*path, i), level)
      env |= dict(zip(eqn.outvars, outs, strict=True))
    outs = [read(atom) for atom in jaxpr.outvars]
    return settle(outs, jaxpr.outvars, len(jaxpr.eqns))

  def waits(self, eqn, values):
    """Whether it may run later, together with others."""
    return (
      self.plans is not None
      and not eqn.effects
      and eqn.primitive.name != 'sharding_constraint'
      and not any(value.leaves for value in values)
    )

  def run(self, eqn, arrays):
    if eqn is programs.IDENTITY:
      return list(arrays)
    if self.plans is None:
      return [var.aval for var in eqn.outvars]
    return self.programs.of(
      programs.signature(eqn), lambda *arrays: programs.run(eqn, arrays)
    )(*arrays)

  def equation(self, eqn, values, path, level):
    used = frozenset().union(*(value.leaves for value in values))
    has_data = any(value.has_data for value in values)
    name = eqn.primitive.name
    if not used:
      outs = self.run(eqn, [value.array for value in values])
      return [Value(out, has_data) for out in outs]
    if name in _CALLS:
      inner = eqn.params.get('jaxpr', eqn.params.get('call_jaxpr'))
      consts = getattr(inner, 'consts', ())
      return self.walk(
        getattr(inner, 'jaxpr', inner), consts, values, path, level
      )
    if not has_data:
      return self.parameters_only(eqn, values, used)
    if name in _REMAT:
      return self.remat(eqn, values, path, level)
    if name == 'scan':
      return loops.scan(self, eqn, values, path, level)
    return self.meet(eqn, values, path, level)

  def parameters_only(self, eqn, values, used):
    """An operation before the data is met: redone where it is met."""
    node = Node(eqn, tuple(values))
    outs = self.run(eqn, [value.array for value in values])
    views = _ghost_values.views(eqn, values)
    repeated = any(value.repeated for value in values)
    frames = {value.frame for value in values if value.leaves}
    if len(frames) > 1:  # Of a loop's slices and of the world around it.
      self.strange |= used
    return [
      Value(out, False, used, view, frames.copy().pop(), repeated, node, index)
      for index, (out, view) in enumerate(zip(outs, views, strict=True))
    ]

  def meet(self, eqn, values, path, level):
    used = sorted(frozenset().union(*(value.leaves for value in values)))
    outs = self.run(eqn, [value.array for value in values])
    if self.plans is not None:
      return self.taps.tap(eqn, values, outs, used, path)
    for leaf in used:
      found = [value for value in values if leaf in value.leaves]
      kind = _ghost_values.kind_of(eqn, values) if len(used) == 1 else None
      frames = {value.frame for value in found}
      if len(frames) > 1:
        self.strange.add(leaf)
      view = found[0].view if len(found) == 1 else None
      self.meetings.setdefault(leaf, []).append(
        Meeting(
          path,
          level,
          found[0].frame,
          any(value.repeated for value in found),
          kind,
          view,
        )
      )
    return [Value(out, True) for out in outs]

  def materialize(self, value, path, level):
    """Lets a value without data meet it, in an identity."""
    if not value.leaves:
      return value
    return self.meet(programs.IDENTITY, [value], path, level)[0]

  def remat(self, eqn, values, path, level):
    """A checkpointed part stays one."""
    inner = eqn.params['jaxpr']
    found = []

    def part(arrays):
      inside = [
        value._replace(array=array)
        for value, array in zip(values, arrays, strict=True)
      ]
      outs = self.walk(inner, (), inside, path, (*level, path))
      outs = [
        self.materialize(out, (*path, 'out', i), (*level, path))
        for i, out in enumerate(outs)
      ]
      found[:] = [out.has_data for out in outs]
      return [out.array for out in outs]

    arrays = [value.array for value in values]
    if self.plans is None:
      outs = part(arrays)
    else:
      outs = jax.checkpoint(
        part,
        policy=eqn.params['policy'],
        prevent_cse=eqn.params['prevent_cse'],
      )(arrays)
    return [
      Value(out, has_data) for out, has_data in zip(outs, found, strict=True)
    ]
