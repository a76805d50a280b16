"""A method's compiled piece, on one device or spread over a mesh."""

from collections.abc import Callable
from typing import Any

import jax

from . import checkpoints
from . import devices
from . import memory


class Piece:
  """A function that advances a state, compiled, with the state.

  Attributes:
    state: Where it is.
    collectives: How many exchanges between devices it holds, by kind; ``None``
      without a mesh.
    devices: How many it runs on.
  """

  def __init__(
    self,
    mesh: jax.sharding.Mesh | None,
    advance: Callable[..., Any],
    state: Any,
    data: Any,
    tables: int | None,
  ):
    """Compiles it.

    Args:
      mesh: The devices, or ``None`` for one.
      advance: ``state -> state``, or ``(state, data) -> state``.
      state: Where it starts.
      data: Arrays that do not change, or ``None``.
      tables: Length of the block tables in the state.
    """
    self.collectives: dict[str, int] | None = None
    self.devices = 1 if mesh is None else mesh.size
    self._mesh = mesh
    constants = () if data is None else (data,)
    if mesh is None:
      self.state, self._constants = state, constants
      self._compiled = jax.jit(advance).lower(state, *constants).compile()
      return
    self._like = state
    packed = checkpoints.pack(state)
    layout = devices.layout(packed, mesh, devices.tables(tables))

    def piece(packed, *constants):
      state = checkpoints.unpack(packed, self._like)
      return checkpoints.pack(advance(state, *constants))

    self.state = devices.put(packed, layout)
    self._constants = devices.put(
      constants, devices.layout(constants, mesh, devices.rows)
    )
    with jax.set_mesh(mesh):
      jitted = jax.jit(piece, out_shardings=layout)
      self._compiled = jitted.lower(self.state, *self._constants).compile()
    self.collectives = devices.collectives(self._compiled)

  def needs(self) -> float:
    """Bytes that it takes beside its arguments, on the devices here."""
    here = 1 if self._mesh is None else len(self._mesh.local_devices)
    return here * memory.of_piece(self._compiled)

  def advance(self) -> None:
    """One piece on."""
    self.state = jax.block_until_ready(
      self._compiled(self.state, *self._constants)
    )

  def whole(self, state: Any) -> Any:
    """The state on a device of this process."""
    if self._mesh is None:
      return state
    return checkpoints.unpack(devices.whole(state, self._mesh), self._like)
