"""States of methods on disk, by orbax; typed keys as their numbers."""

import contextlib
import hashlib
import pathlib
import re
import shutil
from typing import Any

from absl import logging
import jax
import orbax.checkpoint as ocp

from . import flags

_ERRORS = (OSError, ValueError, KeyError, TypeError)


def pack(state: Any) -> Any:
  """Typed keys as their numbers: what orbax stores."""
  return jax.tree.map(
    lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state
  )


def stored(state: Any) -> Any:
  """What a checkpoint holds: of several processes the first writes alone."""
  packed = pack(state)
  return packed if jax.process_count() == 1 else jax.device_get(packed)


def unpack(packed: Any, like: Any) -> Any:
  """The state of which `pack` made this; ``like`` has its keys."""
  return jax.tree.map(
    lambda leaf, like: (
      jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))
      if _is_key(like)
      else leaf
    ),
    packed,
    like,
  )


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )


def folder_name(method: str, seeds: tuple[int, ...]) -> str:
  """A file name for a method and its seeds, unlike that of any other."""
  plain = re.sub(r'[^A-Za-z0-9._-]', '_', method)[:100]
  digest = hashlib.sha256(f'{method} {seeds}'.encode()).hexdigest()
  return f'{plain}-{digest[:8]}'


@contextlib.contextmanager
def _manager(folder: pathlib.Path):
  folder.mkdir(parents=True, exist_ok=True)
  alone = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix='first'
  )
  options = ocp.CheckpointManagerOptions(
    max_to_keep=2,
    create=False,
    enable_async_checkpointing=False,
    multiprocessing_options=alone,
  )
  manager = ocp.CheckpointManager(folder, options=options)
  try:
    yield manager
  finally:
    manager.close()


@contextlib.contextmanager
def _quiet():
  """What orbax logs of a damaged file is said in a line of our own."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def save(folder: pathlib.Path, state: Any, step: int, meta: dict) -> None:
  """Writes a state whole, or not at all.

  Args:
    folder: Of the method.
    state: Any state.
    step: Its step; one that is there stays.
    meta: What belongs to it, as JSON takes it.

  Raises:
    UserError: It cannot be written.
  """
  try:
    with _manager(folder) as manager:
      if step in manager.all_steps():
        return
      manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(stored(state)),
          meta=ocp.args.JsonSave(meta),
        ),
      )
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise flags.UserError(
      f'{folder}: no checkpoint could be written: {brief(reason)}; the record'
      ' is whole up to here, mend that and go on with --resume'
    ) from error


def read(folder: pathlib.Path, state: Any, fits: Any, say: Any) -> Any:
  """The newest state that can be read and fits.

  Args:
    folder: Of the method.
    state: What it looks like.
    fits: ``meta -> reason`` for not using it, or nothing.
    say: Told of each that is not used.

  Returns:
    The state and its meta, or ``None`` and nothing.
  """
  if not folder.exists():
    return None, {}
  packed = stored(state)
  with _quiet(), _manager(folder) as manager:
    for step in sorted(manager.all_steps(), reverse=True):
      try:
        found = manager.restore(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardRestore(packed),
            meta=ocp.args.JsonRestore(),
          ),
        )
        reason = fits(found['meta'])
        if not reason:
          return unpack(found['state'], state), found['meta']
      except _ERRORS as error:
        reason = error
      say(f'checkpoint {folder.name}/{step} is not used: {brief(reason)}')
  return None, {}


def remove(folder: pathlib.Path) -> None:
  """Removes a method's checkpoints."""
  shutil.rmtree(folder, ignore_errors=True)


def brief(reason: Any) -> str:
  """A message in one line."""
  return ' '.join(str(reason).split())[:200]
