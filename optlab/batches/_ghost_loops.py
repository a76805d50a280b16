"""Loops on the walk over a jaxpr: layers that take slices of parameters."""

import jax

from optlab.batches import _ghost_values
from optlab.batches._ghost_values import Value


def scan(walker, eqn, values, path, level):
  """Layers in a loop: each takes its slice of stacked parameters."""
  loop = _ghost_values.Loop.of(eqn)
  if walker.plans is None:
    for value in loop.split(values)[2]:
      if not value.view:
        walker.strange |= value.leaves
    if any(v.leaves & (walker.opaque | walker.strange) for v in values):
      walker.loops[path] = None
  if walker.loops.get(path, ()) is None:
    return walker.meet(eqn, values, path, level)
  values = [
    walker.materialize(value, (*path, 'carry', i), level)
    if loop.consts <= i < loop.consts + loop.carry
    else value
    for i, value in enumerate(values)
  ]
  consts, carry, xs = loop.split(values)
  consts = [v._replace(repeated=bool(v.leaves)) for v in consts]
  inner, deeper = loop.jaxpr, (*level, path)

  def body(carry_arrays, x_arrays, has_data):
    inside = list(consts)
    inside += [
      Value(array, data)
      for array, data in zip(carry_arrays, has_data, strict=True)
    ]
    shapes = {}
    for value, array in zip(xs, x_arrays, strict=True):
      if value.leaves:
        (i,) = value.leaves
        shapes[i] = array
        inside.append(_ghost_values.leaf(array, i, path))
      else:
        inside.append(Value(array, value.has_data))
    walker.open(shapes, path)
    outs = walker.walk(inner.jaxpr, inner.consts, inside, path, deeper)
    return [
      walker.materialize(out, (*path, 'out', i), deeper)
      for i, out in enumerate(outs)
    ]

  if walker.plans is None:
    has_data = _settle(walker, loop, carry, xs, body)
    walker.loops[path] = has_data
    outs = [var.aval for var in eqn.outvars]
  else:
    has_data = walker.loops[path]

    def step(carried, slices):
      outs = [out.array for out in body(carried, slices, has_data[0])]
      return outs[: loop.carry], outs[loop.carry :]

    last, stacked = jax.lax.scan(
      step,
      [value.array for value in carry],
      [value.array for value in xs],
      length=loop.length,
      reverse=eqn.params['reverse'],
      unroll=eqn.params['unroll'],
    )
    outs = [*last, *stacked]
  flags = [*has_data[0], *has_data[1]]
  return [Value(out, data) for out, data in zip(outs, flags, strict=True)]


def _settle(walker, loop, carry, xs, body):
  """Which carried and stacked values have data, once nothing changes."""
  has_data = [value.has_data for value in carry]
  carry_avals = [value.array for value in carry]
  slices = [_ghost_values.slice_of(value.array) for value in xs]
  while True:
    before = {leaf: list(found) for leaf, found in walker.meetings.items()}
    outs = [out.has_data for out in body(carry_avals, slices, has_data)]
    now = [a or b for a, b in zip(has_data, outs, strict=False)]
    if now == has_data:
      return now, outs[loop.carry :]
    walker.meetings, has_data = before, now
