"""A loss's word on where its examples lie, told to a loss of one example.

A model may pin the axis of its examples to an axis of a mesh
(`jax.lax.with_sharding_constraint`). Of one example that axis has length 1: the
word is moved to the axis that the examples are mapped over.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jax_core


def moved(closed: Any) -> tuple[Any, Any]:
  """A program without words on the axis of its one example.

  Args:
    closed: The program of a loss of one example.

  Returns:
    The program, and the axis of a mesh that it spreads its examples over, for
    ``spmd_axis_name`` of `jax.vmap`; ``None`` where it names none, or several.
  """
  found: set[Any] = set()
  jaxpr = _moved(closed.jaxpr, found)
  if not found:
    return closed, None
  axis = found.pop() if len(found) == 1 else None
  return closed.replace(jaxpr=jaxpr), axis


def one_by_one(
  loss: Callable[..., Any], params: Any, examples: Any
) -> tuple[Callable[..., Any], Any]:
  """The same of a function ``(params, example) -> scalar``."""
  one = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), examples
  )
  closed = jax.make_jaxpr(loss)(params, one)
  found, axis = moved(closed)
  if found is closed:
    return loss, None
  flat = jax_core.jaxpr_as_fun(found)
  return lambda *args: flat(*jax.tree.leaves(args))[0], axis


def pins(closed: Any) -> bool:
  """Whether a program says where arrays lie."""
  return _pins(closed.jaxpr)


def _pins(jaxpr):
  return any(
    eqn.primitive.name == 'sharding_constraint'
    or any(map(_pins, _inner(eqn.params)))
    for eqn in jaxpr.eqns
  )


def _inner(params):
  """The programs that an equation calls."""
  for part in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
    if _is_jaxpr(part):
      yield getattr(part, 'jaxpr', part)


def _is_jaxpr(part):
  return isinstance(part, (jax_core.Jaxpr, jax_core.ClosedJaxpr))


def _has_jaxpr(value):
  return isinstance(value, tuple) and any(map(_is_jaxpr, value))


def _moved(jaxpr, found):
  if not _pins(jaxpr):
    return jaxpr
  return jaxpr.replace(eqns=[_equation(eqn, found) for eqn in jaxpr.eqns])


def _equation(eqn, found):
  if eqn.primitive.name == 'sharding_constraint':
    sharding = eqn.params['sharding']
    spec = getattr(sharding, 'spec', None)
    shape = eqn.invars[0].aval.shape
    if not spec or not shape or shape[0] != 1 or spec[0] is None:
      return eqn
    found.add(spec[0])
    rest = sharding.update(spec=jax.P(None, *spec[1:]))
    return eqn.replace(params=eqn.params | {'sharding': rest})

  def part(value):
    if isinstance(value, jax_core.ClosedJaxpr):
      return value.replace(jaxpr=_moved(value.jaxpr, found))
    return _moved(value, found) if isinstance(value, jax_core.Jaxpr) else value

  params = {
    name: tuple(map(part, value)) if _has_jaxpr(value) else part(value)
    for name, value in eqn.params.items()
  }
  return eqn.replace(params=params)
