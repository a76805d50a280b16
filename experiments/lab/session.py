"""Long work in short pieces: progress, checkpoints, resume, interruption.

A program opens a `Session` and gives it its methods one after the other. Each
is a state and a compiled function that advances it by one piece; between the
pieces the session evaluates, records, shows progress and checkpoints. A run
that was killed and resumed writes the numbers of the run that was not killed:
all that a piece depends on is in the state, and the record is cut back to the
checkpoint before it goes on. With a mesh the pieces run on many devices, and
all else on the first of each process; only the first process's files stay.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich import console as rich_console
from rich import progress as rich_progress

from . import devices
from . import flags
from . import record

# Flags that do not change the numbers of a run.
_NOT_IDENTITY = (
  'output_dir', 'resume', 'checkpoint_every', 'coordinator', 'process',
)  # fmt: skip
_SAVE_ERRORS = (OSError, ValueError, KeyError, TypeError, FileNotFoundError)


def _identity(config: flags.Config) -> dict[str, Any]:
  values = dataclasses.asdict(config)
  for name in _NOT_IDENTITY:
    values.pop(name, None)
  return json.loads(json.dumps(values))


def _pack(state: Any) -> Any:
  """Typed keys as their numbers: what orbax stores."""
  return jax.tree.map(
    lambda leaf: (
      jax.random.key_data(leaf)
      if isinstance(leaf, jax.Array)
      and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      else leaf
    ),
    state,
  )


def _stored(state: Any) -> Any:
  """What a checkpoint holds: of several processes the first writes alone."""
  packed = _pack(state)
  return packed if jax.process_count() == 1 else jax.device_get(packed)


def _unpack(packed: Any, like: Any) -> Any:
  def unpack(leaf, like):
    is_key = isinstance(like, jax.Array) and jax.dtypes.issubdtype(
      like.dtype, jax.dtypes.prng_key
    )
    if is_key:
      return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))
    return leaf

  return jax.tree.map(unpack, packed, like)


def _spread(mesh, advance, state, constants, tables):
  """Compiles a piece for a mesh, and puts the state and the data on it.

  Args:
    mesh: The devices.
    advance: As in `Session.run`.
    state: Where it starts.
    constants: The data, or nothing.
    tables: As in `Session.run`.

  Returns:
    The compiled piece, the state and the data on the mesh, and what makes of
    such a state one on a device of this process.
  """
  packed = _pack(state)
  layout = devices.layout(packed, mesh, devices.tables(tables))

  def piece(packed, *constants):
    return _pack(advance(_unpack(packed, state), *constants))

  start = devices.put(packed, layout)
  constants = devices.put(
    constants, devices.layout(constants, mesh, devices.rows)
  )
  with jax.set_mesh(mesh):
    lowered = jax.jit(piece, out_shardings=layout).lower(start, *constants)
  whole = lambda packed: _unpack(devices.whole(packed, mesh), state)
  return lowered.compile(), start, constants, whole


class Session:
  """One run of a program, with its record and its checkpoints.

  Attributes:
    folder: Where the results go.
    rows: All rows of the record so far.
  """

  def __init__(self, program: str, config: flags.Config, **header: Any):
    """Opens or resumes a run.

    Args:
      program: Its name; results go to ``results/PROGRAM`` by default.
      config: Its configuration.
      **header: More fields for the record's first row.

    Raises:
      UserError: There is nothing to resume, or it has another configuration.
    """
    self._identity = _identity(config)
    self._every = config.checkpoint_every
    self._mesh = devices.make_mesh(getattr(config, 'mesh', ''))
    self._several = jax.process_count() > 1
    folder = config.output_dir or f'results/{program}'
    if not devices.is_first():
      self._scratch = tempfile.TemporaryDirectory()
      folder = self._scratch.name
    self.folder = pathlib.Path(folder).absolute()
    self._checkpoints = self.folder / 'checkpoints'
    self._path = self.folder / 'record.jsonl'
    self.rows: list[dict] = []
    self._interrupted = False
    if not config.resume:
      self._begin(program, config, header)
    elif devices.is_first():
      self._resume(program)
    self._writer = record.Writer(self._path)
    if config.resume:
      self._share_record()

  def _begin(self, program, config, header) -> None:
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise flags.UserError(
        f'--output_dir={self.folder}: {error.strerror}'
      ) from error
    if self._path.exists():  # An earlier record is kept under another name.
      number = 1
      while (self.folder / f'record.{number}.jsonl').exists():
        number += 1
      self._path.rename(self.folder / f'record.{number}.jsonl')
    shutil.rmtree(self._checkpoints, ignore_errors=True)
    first = record.header(program, dataclasses.asdict(config), **header)
    first['identity'] = self._identity
    temporary = self._path.with_suffix('.tmp')
    temporary.write_text(json.dumps(first) + '\n')
    temporary.rename(self._path)

  def _resume(self, program) -> None:
    if not self._path.exists():
      raise flags.UserError(f'--resume: no run in {self.folder}')
    first, rows = record.read(self._path)
    if first['program'] != program:
      raise flags.UserError(
        f'--resume: {self.folder} holds a run of {first["program"]}'
      )
    theirs, ours = first['identity'], self._identity
    changed = [
      f'--{name} was {theirs.get(name)}, is {ours.get(name)}'
      for name in sorted(theirs.keys() | ours.keys())
      if theirs.get(name) != ours.get(name)
    ]
    if changed:
      raise flags.UserError(
        f'--resume: the run in {self.folder} has another configuration:'
        f' {"; ".join(changed)}'
      )
    now = record.versions()
    changed = [
      f'{name} was {version}, is {now.get(name)}'
      for name, version in first['versions'].items()
      if now.get(name) != version
    ]
    if changed:
      raise flags.UserError(
        f'--resume: the run in {self.folder} was made by other versions:'
        f' {"; ".join(changed)}'
      )
    # A line cut short by a crash goes; `run` cuts further, to a checkpoint.
    size = self._path.read_bytes().rfind(b'\n') + 1
    with self._path.open('ab') as file:
      file.truncate(size)
    self.rows = rows

  def _share_record(self) -> None:
    """Gives every process the record of the first."""
    if not self._several:
      return
    content = devices.from_first(
      self._path.read_bytes() if devices.is_first() else b''
    )
    if not devices.is_first():
      self._writer.close()
      self._path.write_bytes(content)
      self._writer = record.Writer(self._path)
      _, self.rows = record.read(self._path)

  def __enter__(self) -> 'Session':
    self._old_handler = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(ValueError):  # Not the main thread.
      signal.signal(signal.SIGINT, self._interrupt)
    return self

  def __exit__(self, *unused: Any) -> None:
    with contextlib.suppress(ValueError):
      signal.signal(signal.SIGINT, self._old_handler)
    self._writer.close()

  def _interrupt(self, signum, frame) -> None:
    if self._interrupted:  # The second time at once.
      raise KeyboardInterrupt
    self._interrupted = True

  def write(self, kind: str, **fields: Any) -> None:
    """Adds a row to the record, once: a resumed run does not repeat it."""
    row = {'kind': kind, **record.plain(fields)}
    # In plain form, in which NaN equals NaN.
    if row in map(record.plain, self.select(kind)):
      return
    self.rows.append(self._writer.write(kind, **fields))

  def select(self, kind: str, **fields: Any) -> list[dict]:
    """The rows of one kind with the given fields."""
    return record.select(self.rows, kind, **fields)

  def run(
    self,
    method: str,
    state: Any,
    advance: Callable[..., Any],
    evaluate: Callable[[Any], dict[str, Any]],
    *,
    steps: int,
    every: int = 1,
    seeds: tuple[int, ...] = (0,),
    data: Any = None,
    stop: Callable[[list[dict]], bool] | None = None,
    show: str = 'value',
    keep_state: bool = False,
    tables: int | None = None,
    **fields: Any,
  ) -> Any:
    """Runs one method from its start, or from where it stopped.

    Args:
      method: Its name in the record; it runs once for the same seeds.
      state: Where it starts, a pytree of arrays that holds all that it needs
        (parameters, optimizer, data position, keys).
      advance: ``state -> state``, ``every`` steps on. Compiled here; the time
        for that is recorded apart.
      evaluate: ``state -> dict`` of what to record: numbers, or arrays with
        one entry a seed.
      steps: Steps in all, a multiple of ``every``.
      every: Steps from one evaluation to the next.
      seeds: The seeds that the state's leading axis stands for; one row each.
      data: Arrays that do not change; ``advance(state, data)`` then takes them
        as arguments instead of compiling them in.
      stop: Given the latest rows, one a seed, whether to end early.
      show: The field shown beside the progress bar.
      keep_state: Save the last state, so that a resumed run gets it back where
        the method is done already.
      tables: Length of the block tables in the state, the second axis of each;
        a mesh splits them over its ``blocks``.
      **fields: More fields for each row.

    Returns:
      The last state (``None`` where the method was done before this run and
      ``keep_state`` is false).

    Raises:
      UserError: ``steps`` is not a multiple of ``every``.
      InterruptedRun: On SIGINT, after a checkpoint.
    """
    if steps % every:
      raise flags.UserError(f'{steps} steps are not a multiple of {every}')
    folder = self._checkpoints / _folder_name(method, seeds)
    done = self.select('done', method=method, seeds=list(seeds))
    if done:
      return self._restore(folder, state)[0] if keep_state else None

    step, seconds = 0, 0.0
    restored, meta = self._restore(folder, state)
    if restored is not None:
      state, step, seconds = restored, meta['step'], meta['seconds']
    self._cut_back(method, seeds, meta.get('size'))

    began = time.perf_counter()
    constants = () if data is None else (data,)
    whole = lambda state: state
    if self._mesh is None:
      compiled = jax.jit(advance).lower(state, *constants).compile()
    else:
      compiled, state, constants, whole = _spread(
        self._mesh, advance, state, constants, tables
      )
      fields['collectives'] = devices.collectives(compiled)
      if self._mesh.size > 1 and not fields['collectives']:
        _warn(
          f'{method}: no exchange between devices, each does the whole work;'
          ' the numbers of rows and of blocks must be multiples of --mesh'
        )
    compile_seconds = time.perf_counter() - began

    def measure(state):
      values = {
        name: np.asarray(value) for name, value in evaluate(state).items()
      }
      return [
        self._writer.write(
          'eval',
          method=method,
          seed=seed,
          step=step,
          seconds=seconds,
          **{
            name: value[i] if value.ndim else value
            for name, value in values.items()
          },
          **fields,
        )
        for i, seed in enumerate(seeds)
      ]

    result = whole(state)
    if step == 0:
      self.rows += measure(result)
    latest = self.rows[-len(seeds) :]
    saved = time.perf_counter()
    with _progress() as bar:
      task = bar.add_task(method, total=steps, completed=step, value='')
      ended = stop is not None and stop(latest)
      while step < steps and not ended:
        began = time.perf_counter()
        state = jax.block_until_ready(compiled(state, *constants))
        seconds += time.perf_counter() - began
        step += every
        result = whole(state)
        latest = measure(result)
        self.rows += latest
        shown = [row[show] for row in latest if show in row]
        text = f'{show} {np.median(shown):.4g}' if shown else ''
        bar.update(task, completed=step, value=text)
        ended, due, interrupted = devices.any_of(
          stop is not None and stop(latest),
          time.perf_counter() - saved >= self._every,
          self._interrupted,
        )
        if due or interrupted:
          self._save(folder, result, step, seconds)
          saved = time.perf_counter()
        if interrupted:
          raise flags.InterruptedRun(
            f'interrupted at step {step} of {method}; the record is in'
            f' {self.folder}, go on with --resume'
          )
    if keep_state:
      self._save(folder, result, step, seconds)
    self.write(
      'done',
      method=method,
      seeds=list(seeds),
      compile_seconds=compile_seconds,
      steps=step,
    )
    if not keep_state:
      shutil.rmtree(folder, ignore_errors=True)
    return result

  def _cut_back(self, method: str, seeds, size: int | None) -> None:
    """Drops the rows of a method that came after its checkpoint."""
    if size is None:  # No checkpoint: drop all of them.
      kept = [
        row
        for row in self.rows
        if not (
          row['kind'] == 'eval'
          and row['method'] == method
          and row['seed'] in seeds
        )
      ]
      if len(kept) == len(self.rows):
        return
      first = self._path.read_text().split('\n', 1)[0]
      lines = [first] + [json.dumps(record.plain(row)) for row in kept]
      self._writer.close()
      temporary = self._path.with_suffix('.tmp')
      temporary.write_text('\n'.join(lines) + '\n')
      temporary.rename(self._path)
      self._writer = record.Writer(self._path)
    else:
      self._writer.truncate(size)
    _, self.rows = record.read(self._path)
    self._share_record()

  def _save(self, folder, state, step, seconds) -> None:
    if not devices.is_first():
      return
    meta = {
      'step': step,
      'seconds': seconds,
      'size': self._writer.size,
      'identity': self._identity,
    }
    with _manager(folder) as manager:
      if step in manager.all_steps():
        return
      manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_stored(state)),
          meta=ocp.args.JsonSave(meta),
        ),
      )

  def _restore(self, folder, state) -> tuple[Any, dict[str, Any]]:
    """The newest checkpoint that can be read, or ``None``."""
    if not self._several:
      return self._read(folder, state)
    found, meta = None, {}
    if devices.is_first():
      found, meta = self._read(folder, state)
    packed, meta = pickle.loads(
      devices.from_first(pickle.dumps((_stored(found), meta)))
    )
    return (None if packed is None else _unpack(packed, state)), meta

  def _read(self, folder, state) -> tuple[Any, dict[str, Any]]:
    if not folder.exists():
      return None, {}
    packed = _stored(state)
    with _manager(folder) as manager:
      for step in sorted(manager.all_steps(), reverse=True):
        try:
          found = manager.restore(
            step,
            args=ocp.args.Composite(
              state=ocp.args.StandardRestore(packed),
              meta=ocp.args.JsonRestore(),
            ),
          )
          meta = found['meta']
          if meta['identity'] != self._identity:
            raise ValueError('it belongs to another configuration')
          if meta['size'] > self._writer.size:
            raise ValueError('it is ahead of the record')
          return _unpack(found['state'], state), meta
        except _SAVE_ERRORS as error:
          reason = ' '.join(str(error).split())[:200]
          _warn(f'checkpoint {folder.name}/{step} is not used: {reason}')
    return None, {}


def _warn(message: str) -> None:
  if devices.is_first():
    print(message, file=sys.stderr)


def _folder_name(method: str, seeds: tuple[int, ...]) -> str:
  """A file name for a method and its seeds, unlike that of any other."""
  plain = re.sub(r'[^A-Za-z0-9._-]', '_', method)
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


def _progress() -> rich_progress.Progress:
  return rich_progress.Progress(
    rich_progress.TextColumn('{task.description}'),
    rich_progress.BarColumn(),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TimeRemainingColumn(),
    rich_progress.TextColumn('{task.fields[value]}'),
    console=rich_console.Console(stderr=True),
    transient=True,
    disable=not devices.is_first(),
  )
