"""Whether what a run is about to make fits into the memory that is free."""

import contextlib
import math
import os
import pathlib
from typing import Any

import jax

from . import flags
from . import progress

_INFO = pathlib.Path('/proc/meminfo')
_LIMIT = pathlib.Path('/sys/fs/cgroup/memory.max')  # Of a container.


def free() -> float:
  """Bytes that programs may still take; infinite where nobody says."""
  found = math.inf
  with contextlib.suppress(OSError, ValueError, AttributeError):
    found = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  with contextlib.suppress(OSError, ValueError, KeyError):
    lines = [line.split() for line in _INFO.read_text().splitlines()]
    sizes = {line[0]: 1024 * int(line[1]) for line in lines}
    found = sizes['MemAvailable:'] + sizes['SwapFree:']
  with contextlib.suppress(OSError, ValueError):
    found = min(found, int(_LIMIT.read_text()))
  return found


def check(what: str, needed: float) -> None:
  """Says that something takes much of the free memory, or refuses it.

  Args:
    what: What takes the memory.
    needed: Bytes that it takes beside what is there.

  Raises:
    UserError: There are fewer.
  """
  if jax.default_backend() != 'cpu':
    return
  there = free()
  if needed < there / 4:
    return
  said = (
    f'{what} take {needed / 1e9:,.1f} GB of {there / 1e9:,.1f} that are free;'
    ' fewer seeds, rates or blocks take less, or leave it out by --methods'
  )
  if needed > there:
    raise flags.UserError(f'not enough memory: {said}')
  progress.warn(said)


def of_piece(compiled: jax.stages.Compiled) -> float:
  """Bytes that a compiled program takes beside its arguments."""
  found = compiled.memory_analysis()
  if found is None:
    return 0.0
  new = found.output_size_in_bytes - found.alias_size_in_bytes
  return new + found.temp_size_in_bytes


def size(shapes: Any) -> int:
  """Bytes of a tree of arrays, or of their shapes."""
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(shapes)
  )
