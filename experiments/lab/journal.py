"""The record of a run as it is made: begun, gone on with, cut back.

Only the first process's stays; every other process writes one of its own, with
the same rows, that goes when it ends.
"""

from collections.abc import Iterable
import dataclasses
import pathlib
import pickle
import tempfile
from typing import Any

import jax

from . import devices
from . import flags
from . import folders
from . import progress
from . import record
from . import resuming


class Journal:
  """A record and the folder that it lies in, kept from other runs.

  Attributes:
    folder: Where the results go.
    rows: All rows of the record so far.
    earlier: The rows of each record that this one continues, oldest first.
    id: That of the record.
  """

  def __init__(self, program: str, config: flags.Config, **header: Any):
    """Begins a record, or goes on with one.

    Args:
      program: The program's name.
      config: Its configuration.
      **header: More fields for the first row.

    Raises:
      UserError: There is nothing to resume, or it is another run; the folder
        holds a run that was not finished, or another run writes there.
    """
    self.rows: list[dict] = []
    self.earlier: list[list[dict]] = []
    self._noted: dict[str, Any] = {}
    self._lock = None
    if devices.is_first():
      self.folder = folders.choose(program, config.output_dir, config.resume)
      if config.resume and not (self.folder / record.NAME).exists():
        raise flags.UserError(f'--resume: no run in {self.folder}')
      self._lock = folders.Lock(self.folder)
    else:
      self._scratch = tempfile.TemporaryDirectory()
      self.folder = pathlib.Path(self._scratch.name)
    self._path = self.folder / record.NAME
    first = record.header(program, dataclasses.asdict(config), **header)
    first['identity'] = resuming.identity(config)
    try:
      if config.resume and devices.is_first() and self._path.stat().st_size:
        self._resume(first, config)
      elif devices.is_first() or not config.resume:
        resuming.make_room(self.folder)
        record.begin(self._path, first)
      self._writer = record.Writer(self._path)
      if config.resume:
        self._share()
    except BaseException:
      self.release()
      raise
    self.id = record.read(self._path)[0].get('id')
    if devices.is_first():
      folders.point(self.folder)

  def _resume(self, first: dict, config: flags.Config) -> None:
    """Goes on with the record."""
    old, rows = record.read(self._path)
    grown, self._noted = resuming.compare(self.folder, old, rows, first, config)
    for name, (was, now) in self._noted.items():
      progress.warn(
        f'--resume: {name} was {was}, is {now}: what comes is made with it'
      )
    names = first['earlier'] = resuming.earlier(old)
    self.earlier = [record.read(self.folder / name)[1] for name in names]
    lost = resuming.damaged(rows)
    if lost:
      progress.warn(
        f'--resume: {lost}: what is whole is kept, the rest made again'
      )
    if grown or lost:
      aside = resuming.copy_aside(self._path)
      first['earlier'] = [*names, aside]
      try:
        record.begin(self._path, first)
      except flags.UserError:  # What was there is there still.
        (self.folder / aside).unlink()
        raise
      self.earlier.append(rows)
      rows = []
    else:
      ended = bool(rows) and rows[-1]['kind'] == 'end'  # Not any more.
      record.cut_to_lines(self._path, less=int(ended))
      rows = rows[: len(rows) - ended]
    self.rows = rows

  def _share(self) -> None:
    """Gives every process the record of the first."""
    if jax.process_count() == 1:
      return
    content = devices.from_first(
      self._path.read_bytes() if devices.is_first() else b''
    )
    self.earlier = pickle.loads(devices.from_first(pickle.dumps(self.earlier)))
    if not devices.is_first():
      self._writer.close()
      self._path.write_bytes(content)
      self._writer = record.Writer(self._path)
      _, self.rows = record.read(self._path)

  def release(self) -> None:
    """Lets other runs write in the folder."""
    if self._lock is not None:
      self._lock.release()

  def close(self) -> None:
    """Ends the writing."""
    self._writer.close()

  def sync(self) -> None:
    """Waits until all rows are on the disk."""
    self._writer.sync()

  def write(self, kind: str, **fields: Any) -> dict:
    """Adds a row, and returns it in plain form."""
    if self._noted and kind != 'end':
      noted, self._noted = self._noted, {}
      self.write('resumed', changed=noted)
    self.rows.append(self._writer.write(kind, **fields))
    return self.rows[-1]

  def copy(self, rows: Iterable[dict]) -> None:
    """Adds rows of an earlier record."""
    for row in rows:
      self.rows.append(self._writer.write(**row))

  def drop(self, method: str, seeds: tuple[int, ...], *kinds: str) -> None:
    """Takes the rows of a method and its seeds out of the record."""
    kept = [
      row
      for row in self.rows
      if row['kind'] not in kinds
      or row.get('method') != method
      or (row.get('seed') not in seeds and row.get('seeds') != list(seeds))
    ]
    if len(kept) == len(self.rows):
      return
    self._writer.close()
    record.rewrite(self._path, kept)
    self._writer = record.Writer(self._path)
    self.rows = kept

  def cut_to(self, rows: int) -> None:
    """Drops the rows that came after a checkpoint."""
    self._writer.truncate(record.size_of(self._path, rows))
    _, self.rows = record.read(self._path)
    self._share()
