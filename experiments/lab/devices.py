"""Many devices and hosts: one mesh, two axes, the same programs.

``--mesh=data=4,blocks=2`` spreads a run over eight devices. The axis ``data``
splits the rows of the data and of each batch, ``blocks`` the tables of a
multi-block method; parameters are on every device. The compiled program is the
one of a single device, split by the compiler, so its numbers differ by rounding
only. On several hosts each runs the same command with ``--coordinator`` and its
own ``--process``; the first writes the results.
"""

from collections.abc import Callable
import dataclasses
import re
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from . import flags

AXES = ('data', 'blocks')
COLLECTIVES = (
  'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
  'collective-permute',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  """A program that runs on one device or on many."""

  mesh: str = flags.flag(
    '', 'Devices along each axis, as in data=4,blocks=2; one device if empty.'
  )
  coordinator: str = flags.flag(
    '', 'HOST:PORT of process 0; "auto" on a cluster that tells it.'
  )
  processes: int = flags.flag(1, 'Processes in all, with --coordinator.', low=1)
  process: int = flags.flag(0, 'Number of this process, from 0.', low=0)
  timeout: int = flags.flag(
    60, 'Seconds that processes wait for each other.', low=1
  )


def is_first() -> bool:
  """Whether this process writes the results."""
  return jax.process_index() == 0


def make_mesh(text: str) -> jax.sharding.Mesh | None:
  """The mesh of ``--mesh``, or ``None`` for one device.

  Args:
    text: Axes and sizes, as in ``data=4,blocks=2``.

  Returns:
    A mesh with all of `AXES`; those that are not named have one device.

  Raises:
    UserError: The text is malformed, or asks for devices that there are not.
  """
  if not text:
    return None
  sizes = dict.fromkeys(AXES, 1)
  for entry in text.split(','):
    match = re.fullmatch(r'(\w+)=([1-9]\d*)', entry)
    if match is None or match[1] not in AXES:
      raise flags.UserError(
        f'--mesh={text}: {entry!r} is not data=N or blocks=N'
      )
    sizes[match[1]] = int(match[2])
  count, there = int(np.prod(list(sizes.values()))), jax.device_count()
  if count > there or (jax.process_count() > 1 and count != there):
    raise flags.UserError(
      f'--mesh={text}: {count} devices, this run has {there}; for N devices of'
      ' a CPU set XLA_FLAGS=--xla_force_host_platform_device_count=N'
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    devices=jax.devices()[:count],
  )


def split(tree: Any, dim: int = 0) -> Any:
  """Spreads the rows of a batch over ``data``, inside a compiled step.

  Args:
    tree: Arrays; those without so many axes, or whose rows ``data`` does not
      divide, stay whole.
    dim: The axis of the rows; that of a batch of blocks is 1.

  Returns:
    The same numbers; the same tree where there is no mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape['data'] == 1:
    return tree

  def place(leaf):
    if jnp.ndim(leaf) <= dim or leaf.shape[dim] % mesh.shape['data']:
      return leaf
    spec = jax.P(*[None] * dim, 'data')
    return jax.lax.with_sharding_constraint(leaf, spec)

  return jax.tree.map(place, tree)


def layout(
  tree: Any, mesh: jax.sharding.Mesh, spec: Callable[[Any], jax.P]
) -> Any:
  """Where each array goes: as ``spec`` says, or whole where it won't divide."""

  def place(leaf):
    sharding = jax.NamedSharding(mesh, spec(leaf))
    try:
      sharding.shard_shape(leaf.shape)
    except ValueError:
      return jax.NamedSharding(mesh, jax.P())
    return sharding

  return jax.tree.map(place, tree)


def rows(leaf: Any) -> jax.P:
  """The rows of the data."""
  return jax.P('data') if leaf.ndim else jax.P()


def tables(num_blocks: int | None) -> Callable[[Any], jax.P]:
  """The tables of a state whose leading axis is that of the lanes."""

  def spec(leaf):
    table = num_blocks and leaf.ndim > 1 and leaf.shape[1] == num_blocks
    return jax.P(None, 'blocks') if table else jax.P()

  return spec


def put(tree: Any, layout: Any) -> Any:
  """Puts arrays that every process has, where the layout says."""
  return jax.tree.map(
    lambda leaf, sharding: jax.make_array_from_callback(
      np.shape(leaf), sharding, np.asarray(leaf).__getitem__
    ),
    tree,
    layout,
  )


def whole(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """A copy on this process's first device."""
  everywhere = jax.NamedSharding(mesh, jax.P())
  tree = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
  return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
  """How many exchanges between devices a compiled program holds, by kind."""
  text = compiled.as_text() or ''
  found = {
    name: len(re.findall(rf'= .*\b{name}(?:-start)?\(', text))
    for name in COLLECTIVES
  }
  return {name: count for name, count in found.items() if count}


def any_of(*flags: bool) -> tuple[bool, ...]:
  """Each flag, if it holds in any process."""
  if jax.process_count() == 1:
    return flags
  found = multihost_utils.process_allgather(np.array(flags))
  return tuple(bool(flag) for flag in found.any(0))


def from_first(data: bytes) -> bytes:
  """The first process's bytes, in every process."""
  if jax.process_count() == 1:
    return data
  send = multihost_utils.broadcast_one_to_all
  size = int(send(np.array(len(data))))
  buffer = np.zeros(size, np.uint8)
  if is_first():
    buffer[:] = np.frombuffer(data, np.uint8)
  return np.asarray(send(buffer)).astype(np.uint8).tobytes()
