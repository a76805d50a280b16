"""What a run that goes on shares with what was there, and what it does not."""

from collections.abc import Iterable
import dataclasses
import json
import pathlib
import shutil
from typing import Any, NamedTuple

from . import flags
from . import folders
from . import record


def identity(config: flags.Config) -> dict[str, Any]:
  """The flags that a run's numbers depend on, as JSON has them."""
  values = dataclasses.asdict(config)
  for name in flags.FREE:
    values.pop(name, None)
  return json.loads(json.dumps(values))


def growing(config: flags.Config) -> set[str]:
  """The flags of which a run that goes on may have more."""
  return {
    field.name
    for field in dataclasses.fields(config)
    if field.metadata.get('grows')
  }


def fixed(config: flags.Config) -> dict[str, Any]:
  """The flags that a run and one that goes on have alike."""
  more = growing(config)
  return {k: v for k, v in identity(config).items() if k not in more}


def compare(
  folder: pathlib.Path,
  old: dict,
  rows: Iterable[dict],
  new: dict,
  may_grow: set[str],
) -> tuple[bool, dict[str, Any]]:
  """Compares the run in a folder with the one that wants to go on.

  Args:
    folder: The folder.
    old: The header that is there.
    rows: The rows that are there.
    new: The header that would be written now.
    may_grow: Flags that may be larger than they were.

  Returns:
    Whether a flag such as ``--seeds`` is larger; and versions, devices or a
    mesh that were others, with which the numbers may differ by rounding.

  Raises:
    UserError: They are not one run.
  """
  if old['program'] != new['program']:
    raise flags.UserError(f'--resume: {folder} holds a run of {old["program"]}')
  theirs = {k: v for k, v in old['identity'].items() if k not in flags.FREE}
  ours = new['identity']
  changed = [
    name
    for name in sorted(theirs.keys() | ours.keys())
    if theirs.get(name) != ours.get(name)
  ]
  bad = [
    f'--{name} was {_flag(theirs.get(name))}, is {_flag(ours.get(name))}'
    for name in changed
    if name not in may_grow or not _larger(ours.get(name), theirs.get(name))
  ]
  if bad:
    more = ', '.join(f'--{name}' for name in sorted(may_grow))
    raise flags.UserError(
      f'--resume: the run in {folder} has another configuration:'
      f' {"; ".join(bad)}; give its own flags (there may be more of {more}), or'
      ' begin anew in another --output_dir'
    )
  was, now = _surroundings(old), _surroundings(new)
  for row in rows:
    if row['kind'] == 'resumed':
      was |= {name: pair[1] for name, pair in row['changed'].items()}
  noted = {
    name: (was.get(name), now.get(name))
    for name in was | now
    if was.get(name) != now.get(name)
  }
  return bool(changed), noted


def _flag(value: Any) -> str:
  return ','.join(map(str, value)) if isinstance(value, list) else str(value)


def _larger(now: Any, was: Any) -> bool:
  try:
    return now > was
  except TypeError:
    return False


def _surroundings(header: dict) -> dict[str, Any]:
  return header['versions'] | {
    'device': header.get('device'),
    '--mesh': header['config'].get('mesh') or 'one device',
  }


class Part(NamedTuple):
  """What a record has of one run of a method."""

  rows: list[dict[str, Any]]
  done: dict[str, Any] | None

  def all_rows(self) -> list[dict[str, Any]]:
    """The rows, and that of its end."""
    return self.rows + ([self.done] if self.done else [])

  def is_whole(self, steps: int, every: int) -> bool:
    """Whether it is the run that is asked for."""
    if self.done is None:
      return False
    asked = self.done.get('of', self.done['steps'])
    return (asked, self.done.get('every', every)) == (steps, every)

  def is_shorter(self, steps: int, every: int) -> bool:
    """Whether it is such a run, over fewer steps."""
    if self.done is None:
      return False
    asked = self.done.get('of', self.done['steps'])
    return asked < steps and self.done.get('every') == every


def part(rows: Iterable[dict], method: str, seeds: tuple[int, ...]) -> Part:
  """The part of a method and its seeds."""
  mine = [row for row in rows if row.get('method') == method]
  done = record.select(mine, 'done', seeds=list(seeds))
  return Part(
    [row for row in mine if row['kind'] == 'eval' and row['seed'] in seeds],
    done[-1] if done else None,
  )


def copy_aside(path: pathlib.Path) -> str:
  """Copies a record to another name, and returns that."""
  free = folders.free_name(path.parent, path.stem, path.suffix)
  shutil.copy2(path, free)
  return free.name


def make_room(folder: pathlib.Path) -> None:
  """Sets a finished run aside, whole; an unfinished one is refused.

  Args:
    folder: Where another run begins.

  Raises:
    UserError: There is a run that was not finished.
  """
  path = folder / record.NAME
  if not path.exists():
    return
  try:
    header, rows = record.read(path)
    finished = bool(rows) and rows[-1]['kind'] == 'end'
    what = f'a run of {header["program"]} that was not finished'
  except flags.UserError as error:
    finished, what = False, f'a record that cannot be read ({error})'
  if not finished:
    raise flags.UserError(
      f'--output_dir={folder}: holds {what}; go on with it by --resume, or give'
      ' another --output_dir'
    )
  aside = folders.free_name(folder, path.stem, path.suffix)
  path.rename(aside)
  checkpoints = folder / 'checkpoints'
  if checkpoints.exists():
    checkpoints.rename(
      folder / f'checkpoints{aside.stem.removeprefix("record")}'
    )
