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
import math
import pathlib
import pickle
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import checkpoints
from . import devices
from . import flags
from . import journal
from . import memory
from . import pieces
from . import progress
from . import record
from . import resuming
from . import stopping

_opened: list[pathlib.Path] = []


def last_folder() -> pathlib.Path | None:
  """The folder of the session that was opened last."""
  return _opened[-1] if _opened else None


class Session:
  """One run of a program, with its record and its checkpoints.

  Attributes:
    folder: Where the results go.
  """

  def __init__(self, program: str, config: flags.Config, **header: Any):
    """Opens or resumes a run.

    Args:
      program: Its name; results go to ``results/PROGRAM/NUMBER`` by default.
      config: Its configuration.
      **header: More fields for the record's first row.

    Raises:
      UserError: There is nothing to resume, or it is another run; the folder
        holds a run that was not finished, or another run writes there; floating
        point numbers are not those of the configuration.
    """
    _check_precision(config)
    self._config = config
    self._mesh = devices.make_mesh(getattr(config, 'mesh', ''))
    self._several = jax.process_count() > 1
    self._again = False  # Whether rows are made that the record has.
    self._listener = stopping.Listener()
    self._until = time.monotonic() + (config.max_seconds or math.inf)
    self._fixed = resuming.fixed(config)
    self._journal = journal.Journal(program, config, **header)
    self.folder = self._journal.folder
    self._checkpoints = self.folder / 'checkpoints'
    _opened.append(self.folder)
    progress.warn(f'{program}: {config.expected()}results go to {self.folder}')

  @property
  def rows(self) -> list[dict]:
    """All rows of the record so far."""
    return self._journal.rows

  def __enter__(self) -> 'Session':
    self._stack = contextlib.ExitStack()
    self._stack.callback(self._journal.release)
    self._watch = self._stack.enter_context(progress.Watch())
    listener = self._stack.enter_context(stopping.Listener())
    if not listener.listens:  # The program listens already.
      listener = stopping.current() or listener
    self._listener = listener
    listener.way_on = 'go on with --resume'
    if devices.is_first():
      listener.way_on = (
        f'the record is in {self.folder}, go on with --resume'
        f' --output_dir={self.folder}'
      )
    if self._several:  # They stop together, between two pieces.
      self._stack.enter_context(listener.held())
    return self

  def __exit__(self, kind: Any, *unused: Any) -> None:
    with self._stack:
      if kind is None and not self._listener.asked:
        self.write('end')
        self._listener.way_on = f'the record is whole, in {self.folder}'
      self._journal.close()

  def write(self, kind: str, **fields: Any) -> None:
    """Adds a row to the record, once: a resumed run does not repeat it."""
    row = {'kind': kind, **record.plain(fields)}
    # In plain form, in which NaN equals NaN.
    if row in map(record.plain, self.select(kind)):
      return
    self._write(kind, **fields)

  def _write(self, kind: str, **fields: Any) -> dict:
    if self._again:
      return {'kind': kind, **record.plain(fields)}
    with self._listener.held():
      return self._journal.write(kind, **fields)

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
    prefix: bool = False,
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
      show: The field shown beside the progress.
      keep_state: Save the last state, so that a resumed run gets it back where
        the method is done already.
      prefix: Whether a run over fewer steps is the beginning of this one: no
        schedule in it ends with ``steps``. A longer run then goes on at its
        end, and else from the start.
      tables: Length of the block tables in the state, the second axis of each;
        a mesh splits them over its ``blocks``.
      **fields: More fields for each row.

    Returns:
      The last state (``None`` where the method was done before this run and
      ``keep_state`` is false).

    Raises:
      UserError: ``steps`` is not a multiple of ``every``.
      InterruptedRun: On SIGINT or SIGTERM, or after ``--max_seconds``, after a
        checkpoint.
    """
    if steps % every:
      raise flags.UserError(f'{steps} steps are not a multiple of {every}')
    task = _Task(
      method, seeds, steps, every, stop, show, keep_state, prefix,
      self._checkpoints / checkpoints.folder_name(method, seeds),
    )  # fmt: skip
    found, step, seconds = self._find(task, state)
    if step is None:
      return found
    self._watch.doing = f'{method}, compiling'
    began = time.perf_counter()
    with self._listener.held():  # The compiler may not survive an exception.
      piece = pieces.Piece(self._mesh, advance, found, data, tables)
    compile_seconds = time.perf_counter() - began
    del state, found  # A large one has no room for its start.
    copied = memory.size(piece.state)  # To be looked at, or saved.
    needs = piece.needs() + copied
    memory.check(f'{method}: steps, beside the state,', needs)
    if piece.collectives is not None:
      fields['collectives'] = piece.collectives
      if piece.devices > 1 and not piece.collectives:
        progress.warn(
          f'{method}: no exchange between devices, each does the whole work;'
          ' the numbers of rows and of blocks must be multiples of --mesh'
        )

    def measure(state, step, seconds):
      values = {
        name: np.asarray(value) for name, value in evaluate(state).items()
      }
      at = lambda value, i: value[i] if value.ndim else value
      return [
        self._write(
          'eval', method=method, seed=seed, step=step, seconds=seconds,
          **{name: at(value, i) for name, value in values.items()}, **fields,
        )
        for i, seed in enumerate(seeds)
      ]  # fmt: skip

    with self._listener.held():
      try:
        return self._advance(
          task, piece, measure, step, seconds, compile_seconds
        )
      finally:
        self._again = False
        self._watch.doing = f'what comes after {method}'

  def _find(self, task: '_Task', state: Any) -> tuple[Any, int | None, float]:
    """Where a method goes on: its state, step and seconds so far.

    Args:
      task: The method.
      state: Where it starts.

    Returns:
      All three; of a method that is done its last state, or ``None``, and no
      step.
    """
    part = resuming.part(self.rows, task.method, task.seeds)
    if not part.rows:
      part = self._replay(task)
    whole = part.is_whole(task.steps, task.every)
    if whole and not task.keep_state:
      return None, None, 0.0
    goes_on = task.prefix and part.is_shorter(task.steps, task.every)
    if part.done is None or whole or goes_on:
      found, meta = self._restore(task, state, part)
      if found is not None and whole:
        return found, None, 0.0
      if found is not None:
        if goes_on:
          self._journal.drop(task.method, task.seeds, 'done')
        else:
          self._journal.cut_to(meta['rows'])
        return found, meta['step'], meta['seconds']
    if whole:  # What is lost is its last state: the record has its rows.
      self._again = True
      return state, 0, 0.0
    # The record and the checkpoints are another run's, or not to be read.
    self._journal.drop(task.method, task.seeds, 'eval', 'done')
    if devices.is_first():
      checkpoints.remove(task.folder)
    return state, 0, 0.0

  def _replay(self, task: '_Task') -> resuming.Part:
    """Copies what the newest record that this one continues has of a method."""
    for rows in reversed(self._journal.earlier):
      part = resuming.part(rows, task.method, task.seeds)
      whole = part.is_whole(task.steps, task.every)
      if whole or (task.prefix and part.is_shorter(task.steps, task.every)):
        with self._listener.held():
          self._journal.copy(part.all_rows() if whole else part.rows)
        return part
    return resuming.Part([], None)

  def _advance(self, task, piece, measure, step, seconds, compile_seconds):
    """Goes on to the last step, and returns its state."""
    result = piece.whole(piece.state)
    latest = self.rows[-len(task.seeds) :]
    self._watch.doing = f'{task.method}, from step {step}'
    if step == 0:
      latest = measure(result, step, seconds)
    saved = time.perf_counter()
    with progress.Progress(task.method, task.steps, step) as bar:
      ended = task.stop is not None and task.stop(latest)
      while step < task.steps and not ended:
        self._watch.doing = f'{task.method}, from step {step}'
        began = time.perf_counter()
        piece.advance()
        seconds += time.perf_counter() - began
        step += task.every
        result = piece.whole(piece.state)
        latest = measure(result, step, seconds)
        ended, due, interrupted = devices.any_of(
          task.stop is not None and task.stop(latest),
          time.perf_counter() - saved >= self._config.checkpoint_every,
          self._listener.asked or time.monotonic() >= self._until,
        )
        shown = [row[task.show] for row in latest if task.show in row]
        text = f'{task.show} {np.median(shown):.4g}' if shown else ''
        bar.update(step, text, ended=ended or step == task.steps)
        if due or interrupted:
          self._save(task, result, step, seconds)
          saved = time.perf_counter()
        if interrupted:
          why = 'interrupted'
          if not self._listener.asked:
            why = f'--max_seconds={self._config.max_seconds:g} ended'
          raise flags.InterruptedRun(
            f'{why} at step {step} of {task.method}; {self._listener.way_on}'
          )
    if task.keep_state or task.prefix:
      self._save(task, result, step, seconds)
    self._write(
      'done', method=task.method, seeds=list(task.seeds),
      compile_seconds=compile_seconds, steps=step, of=task.steps,
      every=task.every,
    )  # fmt: skip
    if devices.is_first() and not (task.keep_state or task.prefix):
      checkpoints.remove(task.folder)
    return result

  def _save(self, task: '_Task', state: Any, step: int, seconds: float) -> None:
    if devices.is_first():
      meta = {
        'step': step, 'seconds': seconds, 'rows': len(self.rows),
        'steps': task.steps, 'every': task.every, 'fixed': self._fixed,
        'id': self._journal.id,
      }  # fmt: skip
      self._journal.sync()  # A checkpoint that is ahead of it is not used.
      checkpoints.save(task.folder, state, step, meta)

  def _restore(self, task: '_Task', state: Any, part: resuming.Part) -> Any:
    """The newest checkpoint that can be read and fits, or ``None``."""

    def unfit(meta):
      if meta['fixed'] != self._fixed:
        return 'it belongs to another configuration'
      if part.done is None and meta['id'] != self._journal.id:
        return 'it belongs to another record'
      return resuming.unfit(
        meta, part, self.rows, task.method, task.seeds, task.steps, task.every
      )

    def read():
      # Threads that are left by an exception would tell of it at length.
      with self._listener.held():
        return checkpoints.read(task.folder, state, unfit, progress.warn)

    if not self._several:
      return read()
    found, meta = read() if devices.is_first() else (None, {})
    packed, meta = pickle.loads(
      devices.from_first(pickle.dumps((checkpoints.stored(found), meta)))
    )
    if packed is None:
      return None, meta
    return checkpoints.unpack(packed, state), meta


class _Task(NamedTuple):
  """What `Session.run` was asked for; see there."""

  method: str
  seeds: tuple[int, ...]
  steps: int
  every: int
  stop: Callable[[list[dict]], bool] | None
  show: str
  keep_state: bool
  prefix: bool
  folder: pathlib.Path  # Of its checkpoints.


def _check_precision(config: flags.Config) -> None:
  """Raises a `UserError` where the record would lie about the precision."""
  found = str(jnp.result_type(float))
  if found != config.precision:
    raise flags.UserError(
      f'--precision={config.precision}, but numbers are {found} here: call the'
      " program's main, which sets it, or wrap this in jax.enable_x64("
      f'{config.precision == "float64"})'
    )
