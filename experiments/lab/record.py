"""The record of a run: JSON lines, from which every table and picture is made.

The first line has ``kind`` "run": the program, its configuration, versions,
device. The others have a ``kind`` of their own: "eval" for a measurement
(method, seed, step, oracle calls so far, seconds, values), "summary" for a
method's final row, "done" for a finished method, "resumed" where versions,
devices or the mesh are others from here on, "end" for a finished run, and what
a program adds.
"""

import codecs
from collections.abc import Iterable
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from typing import Any
import uuid

import jax
import numpy as np

import optlab

from . import flags
from . import folders

NAME = 'record.jsonl'
# Oracle calls, counted from the start of a method, in the order of the tables.
ORACLES = ('samples', 'gradients', 'products', 'solves')
_PACKAGES = (
  'jax',
  'jaxlib',
  'optax',
  'flax',
  'numpy',
  'scikit-learn',
)
_NON_FINITE = {'nan': math.nan, 'inf': math.inf, '-inf': -math.inf}


def plain(value: Any) -> Any:
  """JSON has no arrays and no NaN: lists, and names for what is not finite."""
  if isinstance(value, dict):
    return {str(key): plain(entry) for key, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(entry) for entry in value]
  if isinstance(value, (jax.Array, np.ndarray, np.generic)):
    return plain(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def _revive(row: dict[str, Any]) -> dict[str, Any]:
  return {
    key: _NON_FINITE.get(value, value) if isinstance(value, str) else value
    for key, value in row.items()
  }


def without_times(rows: Iterable[dict]) -> list[dict]:
  """The rows less their seconds: what is the same whenever a run is made."""
  return [
    {key: value for key, value in row.items() if 'seconds' not in key}
    for row in rows
  ]


def versions() -> dict[str, str]:
  """Versions of what the numbers depend on."""
  # Its distribution has another name, and may not be installed.
  found = {'python': platform.python_version(), 'optlab': optlab.__version__}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def header(program: str, config: dict[str, Any], **fields: Any) -> dict:
  """The first row of a record."""
  devices = jax.devices()
  return {
    'kind': 'run',
    'id': uuid.uuid4().hex[:12],
    'program': program,
    'config': plain(config),
    'versions': versions(),
    'device': f'{len(devices)} x {devices[0].device_kind}',
    'started': datetime.datetime.now(datetime.UTC).isoformat(
      timespec='seconds'
    ),
    **fields,
  }


def _line(row: dict) -> bytes:
  return json.dumps(plain(row)).encode() + b'\n'


def begin(path: pathlib.Path, first: dict) -> None:
  """Writes a record that has its header alone, in place of what is there."""
  _replace(path, [first])


def rewrite(path: pathlib.Path, rows: list[dict]) -> None:
  """Writes these rows after the header that is there, in place of the others.

  Args:
    path: The record.
    rows: Its rows.
  """
  _replace(path, [read(path)[0], *rows])


def _replace(path: pathlib.Path, rows: list[dict]) -> None:
  temporary = path.with_suffix('.tmp')
  try:
    with temporary.open('wb') as file:
      file.write(b''.join(map(_line, rows)))
      file.flush()
      os.fsync(file)  # Else a power cut may leave a new name without content.
    temporary.replace(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise flags.UserError(f'{path}: {error.strerror}') from error


def cut_to_lines(path: pathlib.Path, *, less: int = 0) -> None:
  """Cuts off a last line that was cut short, and so many whole ones."""
  content = path.read_bytes()
  size = content.rfind(b'\n') + 1
  for _ in range(less):
    size = content.rfind(b'\n', 0, size - 1) + 1
  if size < len(content):
    with path.open('r+b') as file:
      file.truncate(size)


def size_of(path: pathlib.Path, rows: int) -> int:
  """Bytes of the header and so many rows after it."""
  lines = path.read_bytes().split(b'\n')
  return sum(len(line) + 1 for line in lines[: rows + 1])


class Writer:
  """Appends rows to a record; each is in the file before the next begins."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    try:
      self._file = path.open('ab', buffering=0)
    except OSError as error:
      raise flags.UserError(f'{path}: {error.strerror}') from error

  def write(self, kind: str, **fields: Any) -> dict[str, Any]:
    """Appends a row and returns it.

    Args:
      kind: Its kind.
      **fields: The rest of it.

    Returns:
      The row as `read` gives it.

    Raises:
      UserError: It cannot be written; nothing of it is in the file. Or the
        file was removed, and what is written is lost.
    """
    self._check_there()
    row = {'kind': kind, **plain(fields)}
    line, size = _line(row), self.size
    try:
      while line:
        line = line[self._file.write(line) :]
    except OSError as error:
      with contextlib.suppress(OSError):
        self.truncate(size)
      raise flags.UserError(
        f'{self._path}: {error.strerror}; what is there is whole, mend that and'
        ' go on with --resume'
      ) from error
    return _revive(row)

  def _check_there(self) -> None:
    if not self._path.exists():
      raise flags.UserError(
        f'{self._path}: was removed or renamed while the run wrote there;'
        ' put it back and go on with --resume, or begin anew'
      )

  @property
  def size(self) -> int:
    """Bytes written, a place that `truncate` can go back to."""
    return self._file.seek(0, os.SEEK_END)

  def sync(self) -> None:
    """Puts what was written on the disk, where a power cut leaves it."""
    self._check_there()  # A checkpoint would make its folder again.
    with contextlib.suppress(OSError):  # Not every file system can.
      os.fsync(self._file)

  def truncate(self, size: int) -> None:
    """Drops what was written after ``size`` bytes."""
    self._file.truncate(size)

  def close(self) -> None:
    self._file.close()


# What each kind of row has, that tables and pictures rely on.
_FIELDS: dict[str, dict[str, Any]] = {
  'run': {'program': str, 'config': dict, 'versions': dict, 'identity': dict},
  'eval': {'method': str, 'seed': int, 'step': int},
  'done': {'method': str, 'seeds': list, 'steps': int},
  'resumed': {'changed': dict},
}


def read(path: str | pathlib.Path) -> tuple[dict[str, Any], list[dict]]:
  """Reads a record; a last line cut short by a crash is dropped.

  Args:
    path: The file, the folder that holds ``record.jsonl``, or the one that
      holds the numbered folders of a program's runs, for the latest of them.

  Returns:
    The header and the other rows.

  Raises:
    UserError: There is no such file, or it is no record.
  """
  path = pathlib.Path(path)
  if path.is_dir() and path.name != NAME:
    inside = path if (path / NAME).exists() else folders.latest(path)
    path = (inside or path) / NAME
  content = folders.content(path).removeprefix(codecs.BOM_UTF8)
  lines = content.split(b'\n')[:-1]
  rows = [_parse(path, i, line) for i, line in enumerate(lines, 1)]
  if not rows:
    raise flags.UserError(f'{path}: not a record, it has no whole line')
  return rows[0], rows[1:]


def _parse(path: pathlib.Path, number: int, line: bytes) -> dict:
  """A line as a row that has what a row of its kind must have."""

  def bad(what):
    cut = '' if number == 1 else '; up to the line before it is whole'
    return flags.UserError(f'{path}: line {number} {what}{cut}')

  try:
    row = json.loads(line.decode())
  except UnicodeDecodeError as error:
    raise bad(
      f'has a byte that is no text, {line[error.start]:#04x}'
    ) from error
  except (ValueError, RecursionError) as error:
    raise bad('is not JSON') from error
  if not isinstance(row, dict) or not isinstance(row.get('kind'), str):
    raise bad('is no row: it has no kind')
  if (number == 1) != (row['kind'] == 'run'):
    reason = (
      'its first line is no run'
      if number == 1
      else (f'line {number} begins another')
    )
    raise flags.UserError(f'{path}: not a record, {reason}')
  for name, form in _FIELDS.get(row['kind'], {}).items():
    if not isinstance(row.get(name), form):
      raise bad(f'is a row of kind {row["kind"]} without {name}')
  return _revive(row)


def select(rows: Iterable[dict], kind: str, **fields: Any) -> list[dict]:
  """The rows of one kind whose fields have the given values."""
  return [
    row
    for row in rows
    if row['kind'] == kind
    and all(row.get(key) == value for key, value in fields.items())
  ]
