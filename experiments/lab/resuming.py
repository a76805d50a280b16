"""What a run that goes on shares with what was there, and what it does not."""

from collections.abc import Iterable, Sequence
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
  config: flags.Config,
) -> tuple[bool, dict[str, Any]]:
  """Compares the run in a folder with the one that wants to go on.

  Args:
    folder: The folder.
    old: The header that is there.
    rows: The rows that are there.
    new: The header that would be written now.
    config: The configuration now.

  Returns:
    Whether a flag such as ``--seeds`` is larger; and versions, devices or a
    mesh that were others, with which the numbers may differ by rounding, and
    flags that came later and have their defaults.

  Raises:
    UserError: They are not one run.
  """
  if old['program'] != new['program']:
    raise flags.UserError(f'--resume: {folder} holds a run of {old["program"]}')
  theirs = {k: v for k, v in old['identity'].items() if k not in flags.FREE}
  ours, may_grow = new['identity'], growing(config)
  plain = identity(type(config)(quick=config.quick))
  later = {
    name: value
    for name, value in ours.items()
    if name not in theirs and plain[name] == value
  }
  theirs |= later
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
      was |= {name: _now(pair) for name, pair in row['changed'].items()}
  now |= {f'--{name}': value for name, value in later.items()}
  noted = {
    name: (was.get(name), now.get(name))
    for name in was | now
    if was.get(name) != now.get(name)
  }
  return bool(changed), noted


def _now(pair: Any) -> Any:
  """Of a pair of what was and is; a record may be damaged."""
  return pair[1] if isinstance(pair, list) and len(pair) == 2 else pair


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
    return self.asked(every) == steps

  def is_shorter(self, steps: int, every: int) -> bool:
    """Whether it is such a run, over fewer steps."""
    asked = self.asked(every)
    return asked is not None and asked < steps

  def reaches(self, step: int, every: int, seeds: Sequence[int]) -> bool:
    """Whether its rows are those up to a step: none lost or there twice."""
    looks = range(0, step + 1, every)
    if len(looks) * len(seeds) != len(self.rows):
      return False
    expected = [(look, seed) for look in looks for seed in seeds]
    found = [(row['step'], row['seed']) for row in self.rows]
    forms = [_form(row) for row in self.rows]
    # The last look may have more fields than those before it.
    alike = all(
      forms[0] <= form == forms[i - i % len(seeds)]
      for i, form in enumerate(forms)
    )
    return found == expected and alike

  def asked(self, every: int) -> int | None:
    """Its steps, if it came to its end and its rows are all there."""
    done = self.done
    if done is None or every < 1 or done.get('every', every) != every:
      return None
    asked = done.get('of', done['steps'])  # Older records have none.
    there = self.reaches(done['steps'], every, done['seeds'])
    return asked if there and isinstance(asked, int) else None


def _form(row: dict[str, Any]) -> set[tuple[str, bool]]:
  """Which fields a row has, and which of them are numbers."""
  return {
    (name, isinstance(value, (int, float)))
    for name, value in row.items()
    if name != 'collectives'  # On a mesh alone.
  }


def part(rows: Iterable[dict], method: str, seeds: tuple[int, ...]) -> Part:
  """The part of a method and its seeds."""
  mine = [row for row in rows if row.get('method') == method]
  done = record.select(mine, 'done', seeds=list(seeds))
  return Part(
    [row for row in mine if row['kind'] == 'eval' and row['seed'] in seeds],
    done[-1] if done else None,
  )


def unfit(
  meta: dict[str, Any],
  part_of: Part,
  rows: Sequence[dict],
  method: str,
  seeds: tuple[int, ...],
  steps: int,
  every: int,
) -> str | None:
  """Why a checkpoint is not that of a run that goes on, or ``None``.

  Args:
    meta: What was stored beside it.
    part_of: What the record has of the method.
    rows: All of the record's rows.
    method: The method.
    seeds: Its seeds.
    steps: The steps that are asked for.
    every: The steps from one row to the next.
  """
  if part_of.done is not None:
    wrong = meta['step'] != part_of.done['steps']
    return 'it is not the end of the run' if wrong else None
  if (meta['steps'], meta['every']) != (steps, every):
    return 'it belongs to a run over other steps'
  if meta['rows'] > len(rows):
    return 'it is ahead of the record'
  there = part(rows[: meta['rows']], method, seeds)
  fits = there.reaches(meta['step'], every, seeds)
  return None if fits else 'rows before it are lost or damaged'


def damaged(rows: Iterable[dict]) -> str:
  """What is wrong with rows that are whole lines each, or nothing.

  Args:
    rows: The rows of a record.

  Returns:
    A method of which rows are lost, or what is there twice.
  """
  seen: set[str] = set()
  methods: dict[Any, list[dict]] = {}
  for row in rows:
    methods.setdefault(str(row.get('method')), []).append(row)
    text = json.dumps(row)
    if text in seen and row['kind'] != 'resumed':
      return f'a row of kind {row["kind"]} is there twice'
    seen.add(text)
  for method, own in methods.items():
    for done in record.select(own, 'done'):
      found = part(own, method, tuple(done['seeds']))
      every = done.get('every')
      if 'every' not in done:  # An older record.
        continue
      if not isinstance(every, int) or found.asked(every) is None:
        return f'rows of {method} are lost or damaged'
  return ''


def earlier(header: dict) -> list[str]:
  """The records that this one continues, with fewer seeds or steps."""
  names = header.get('earlier', [])
  if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise flags.UserError(f'--resume: {names} are no names of earlier records')
  return names


def copy_aside(path: pathlib.Path) -> str:
  """Copies a record to another name, whole or not at all; returns the name."""
  free = folders.free_name(path.parent, path.stem, path.suffix)
  try:
    shutil.copy2(path, free)
  except OSError as error:
    free.unlink(missing_ok=True)
    raise flags.UserError(f'{free}: {error.strerror or error}') from error
  return free.name


def make_room(folder: pathlib.Path) -> None:
  """Sets a finished run aside, whole; an unfinished one is refused.

  Not one that ended before its first row, by a flag that was refused or a power
  cut that left an empty file: there is nothing to go on with.

  Args:
    folder: Where another run begins.

  Raises:
    UserError: There is a run that was not finished, or one that cannot be set
      aside.
  """
  path = folder / record.NAME
  if not path.exists() or not path.stat().st_size:
    return
  try:
    header, rows = record.read(path)
  except flags.UserError as error:
    raise flags.UserError(
      f'--output_dir={folder}: holds a record that cannot be read: {error};'
      ' mend it, or give another --output_dir'
    ) from error
  if not rows and not header.get('earlier'):
    return
  if not rows or rows[-1]['kind'] != 'end':
    raise flags.UserError(
      f'--output_dir={folder}: holds a run of {header["program"]} that was not'
      ' finished; go on with it by --resume, or give another --output_dir'
    )
  number = 1
  while any((folder / name).exists() for name in _aside(number)):
    number += 1
  record_to, checkpoints_to = (folder / name for name in _aside(number))
  checkpoints = folder / 'checkpoints'
  try:
    if checkpoints.exists():
      checkpoints.rename(checkpoints_to)
    try:
      path.rename(record_to)
    except OSError:  # Both or none.
      if checkpoints_to.exists():
        checkpoints_to.rename(checkpoints)
      raise
  except OSError as error:
    raise flags.UserError(
      f'--output_dir={folder}: the run that is there cannot be set aside:'
      f' {error.strerror or error}; give another --output_dir'
    ) from error


def _aside(number: int) -> tuple[str, str]:
  """Names of a record and of its checkpoints where others follow."""
  return f'record.{number}.jsonl', f'checkpoints.{number}'
