"""The record of a run: JSON lines, from which every table and picture is made.

The first line has ``kind`` "run": the program, its configuration, versions,
device. The others have a ``kind`` of their own: "eval" for a measurement
(method, seed, step, oracle calls so far, seconds, values), "summary" for a
method's final row, "done" for a finished method, and what a program adds.
"""

from collections.abc import Iterable
import datetime
import importlib.metadata
import json
import math
import pathlib
import platform
from typing import Any

import jax
import numpy as np

from . import flags

# Oracle calls, counted from the start of a method, in the order of the tables.
ORACLES = ('samples', 'gradients', 'products', 'solves')
_PACKAGES = (
  'optlab',
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
  found = {'python': platform.python_version()}
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
    'program': program,
    'config': plain(config),
    'versions': versions(),
    'device': f'{len(devices)} x {devices[0].device_kind}',
    'started': datetime.datetime.now(datetime.UTC).isoformat(
      timespec='seconds'
    ),
    **fields,
  }


class Writer:
  """Appends rows to a record; each is on disk before the next begins."""

  def __init__(self, path: pathlib.Path):
    self._file = path.open('ab')

  def write(self, kind: str, **fields: Any) -> dict[str, Any]:
    """Appends a row and returns it."""
    row = {'kind': kind, **plain(fields)}
    self._file.write(json.dumps(row).encode() + b'\n')
    self._file.flush()
    return _revive(row)

  @property
  def size(self) -> int:
    """Bytes written, a place that `truncate` can go back to."""
    return self._file.tell()

  def truncate(self, size: int) -> None:
    """Drops what was written after ``size`` bytes."""
    self._file.truncate(size)
    self._file.seek(size)

  def close(self) -> None:
    self._file.close()


def read(path: str | pathlib.Path) -> tuple[dict[str, Any], list[dict]]:
  """Reads a record; a last line cut short by a crash is dropped.

  Args:
    path: The file, or the folder that holds ``record.jsonl``.

  Returns:
    The header and the other rows.

  Raises:
    UserError: There is no such file, or it is no record.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / 'record.jsonl'
  try:
    text = path.read_text()
  except OSError as error:
    raise flags.UserError(f'{path}: {error.strerror}') from error
  rows = []
  lines = text.split('\n')
  for number, line in enumerate(lines[:-1], 1):
    try:
      rows.append(_revive(json.loads(line)))
    except (json.JSONDecodeError, AttributeError) as error:
      raise flags.UserError(f'{path}: line {number} is not JSON') from error
  if not rows or rows[0].get('kind') != 'run':
    raise flags.UserError(f'{path}: not a record, its first line is no run')
  return rows[0], rows[1:]


def select(rows: Iterable[dict], kind: str, **fields: Any) -> list[dict]:
  """The rows of one kind whose fields have the given values."""
  return [
    row
    for row in rows
    if row['kind'] == kind
    and all(row.get(key) == value for key, value in fields.items())
  ]
