"""Operations of the walked program, run one by one or several as one.

Models repeat themselves: what one block does, the next does with other numbers.
Equal stretches are put into one function, which is traced, mapped and
linearized once and then copied; that takes a third off the time of tracing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import numpy as np


class _Identity(NamedTuple):
  """Stands for an equation where a value without data is made to meet it."""

  name: str = 'identity'


IDENTITY = _Identity()


def run(eqn: Any, arrays: Sequence[Any]) -> list[Any]:
  """The results of an equation."""
  if eqn is IDENTITY:
    return list(arrays)
  bound = eqn.primitive.get_bind_params(eqn.params)
  # Before jax 0.10 the functions that a primitive calls come apart.
  functions, params = bound if isinstance(bound, tuple) else ((), bound)
  out = eqn.primitive.bind(*functions, *arrays, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


def signature(eqn: Any) -> Any:
  """What tells an operation from others, its operands apart."""
  if eqn is IDENTITY:
    return eqn
  return eqn.primitive, tuple(sorted(eqn.params.items()))


class Programs:
  """Functions by what they do; lives for one trace."""

  def __init__(self) -> None:
    self.made: dict[Any, Any] = {}

  def of(self, key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same as another of this key, and is cached."""
    try:
      if key not in self.made:
        self.made[key] = jax.jit(function, inline=True)
    except TypeError:  # A parameter of an operation that has no hash.
      return function
    return self.made[key]


class Stretch:
  """Operations that wait until one of their results is asked for."""

  def __init__(self, programs: Programs) -> None:
    self.programs = programs
    self.eqns: list[Any] = []

  def run(self, read: Callable[[Any], Any], wanted: Any) -> dict[Any, Any]:
    """The results that are ``wanted`` of all operations, by variable.

    Args:
      read: ``variable -> array``, for what the operations take.
      wanted: Whether a variable is read later.
    """
    eqns, self.eqns = self.eqns, []
    inner: dict[Any, int] = {}
    outer: dict[Any, int] = {}
    wires: list[Any] = []
    for eqn in eqns:
      wires.append(tuple(_wire(atom, inner, outer) for atom in eqn.invars))
      for var in eqn.outvars:
        inner[var] = len(inner)
    results = [var for var in inner if wanted(var)]

    def function(*arrays):
      made: list[Any] = []
      for eqn, wire in zip(eqns, wires, strict=True):
        operands = [
          (arrays if place == 'outer' else made)[at]
          if place != 'literal'
          else atom.val
          for (place, at), atom in zip(wire, eqn.invars, strict=True)
        ]
        made += run(eqn, operands)
      return [made[inner[var]] for var in results]

    key = (
      tuple(zip(map(signature, eqns), wires, strict=True)),
      tuple(inner[var] for var in results),
    )
    arrays = self.programs.of(key, function)(*map(read, outer))
    return dict(zip(results, arrays, strict=True))


def _wire(atom: Any, inner: Any, outer: Any) -> tuple[str, Any]:
  """Where an operand comes from."""
  if isinstance(atom, jax_core.Literal):
    value = np.asarray(atom.val)
    return 'literal', (str(atom.aval), value.tobytes())
  if atom in inner:
    return 'inner', inner[atom]
  return 'outer', outer.setdefault(atom, len(outer))


def last_reads(jaxpr: Any) -> dict[Any, int]:
  """The place of the last equation that reads a variable."""
  reads: dict[Any, int] = {}
  for i, eqn in enumerate(jaxpr.eqns):
    reads.update((atom, i) for atom in eqn.invars if _is_var(atom))
  reads.update(
    (atom, len(jaxpr.eqns)) for atom in jaxpr.outvars if _is_var(atom)
  )
  return reads


def _is_var(atom):
  return not isinstance(atom, jax_core.Literal)
