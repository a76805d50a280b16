"""Flags: fields of a frozen dataclass, checked wherever it is made.

A program declares its configuration once::

    @dataclasses.dataclass(frozen=True)
    class Config(flags.Config):
      '''What the program does.'''
      l2: float = flags.flag(1e-3, 'Weight of the penalty.', low=0.0)

`launch.run` makes an absl flag of each field.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import numbers
import os
import pathlib
import sys
import traceback
import types
import typing
from typing import Any, ClassVar

# Where and how a run goes: they do not change its numbers, but for rounding.
FREE = (
  'output_dir', 'resume', 'checkpoint_every', 'coordinator', 'process',
  'processes', 'mesh', 'timeout', 'max_seconds',
)  # fmt: skip


MAX_SEEDS = 10_000  # From here on they tune rates.
MAX_COUNT = 2**31 - 1  # A counter on the device has no larger one.


class UserError(Exception):
  """Something the user can mend; shown as one line, without a traceback."""


class InterruptedRun(KeyboardInterrupt):
  """The user asked a run to stop; what it had is on disk."""


def one_line(error: BaseException) -> str:
  """What an error of the user's code says, and where in it that is."""
  text = ' '.join(str(error).split())[:300]
  if isinstance(error, UserError):
    return text
  said = f'{type(error).__name__}: {text}'
  here = pathlib.Path(__file__).parents[1]
  own = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if here not in pathlib.Path(frame.filename).parents
    and not {'site-packages', 'optlab'}
    & set(pathlib.Path(frame.filename).parts)
    and pathlib.Path(frame.filename).is_file()
    and not frame.filename.startswith(sys.base_prefix)
  ]
  if own:
    said += f' ({own[-1].filename}, line {own[-1].lineno})'
  return said


def flag(
  default: Any,
  help_text: str,
  *,
  choices: Sequence[str] | None = None,
  low: float | None = None,
  grows: bool = False,
) -> Any:
  """A field of a configuration that is also a command-line flag.

  Args:
    default: Its default; a tuple makes a comma-separated list.
    help_text: Shown by ``--help``.
    choices: The values allowed, of the flag or of each entry of a list.
    low: The smallest number allowed.
    grows: Whether a run that is resumed may have a larger one: what it changes
      is the seeds or steps that `Session.run` is given, and nothing else of a
      method's run.

  Returns:
    A dataclass field.
  """
  metadata = {
    'help': help_text, 'choices': choices, 'low': low, 'grows': grows,
  }  # fmt: skip
  return dataclasses.field(default=default, metadata=metadata)


def positional(help_text: str) -> Any:
  """A field that takes the arguments which are no flags, at least one."""
  return dataclasses.field(
    default=(), metadata={'help': help_text, 'positional': True}
  )


def value_type(annotation: Any) -> tuple[type, bool]:
  """The type of a flag's value, and whether it is a list."""
  if isinstance(annotation, types.UnionType):  # `float | None`
    annotation = typing.get_args(annotation)[0]
  if typing.get_origin(annotation) is tuple:
    return typing.get_args(annotation)[0], True
  return annotation, False


@functools.cache
def annotations(config_type: type['BareConfig']) -> dict[str, Any]:
  """The types of a configuration's fields."""
  return typing.get_type_hints(config_type)


@dataclasses.dataclass(frozen=True)
class BareConfig:
  """A configuration whose fields are checked against what `flag` allows.

  A notebook may give lists for tuples, paths for names and NumPy's numbers.
  """

  def __post_init__(self):
    for field in dataclasses.fields(self):
      annotation = annotations(type(self))[field.name]
      value = _convert(field, annotation, getattr(self, field.name))
      object.__setattr__(self, field.name, value)
      _check(field, value)
    folder = getattr(self, 'data_dir', '')
    if folder and not pathlib.Path(folder).exists():
      raise UserError(f'--data_dir={folder}: no such folder')


@dataclasses.dataclass(frozen=True)
class Config(BareConfig):
  """What every experiment has.

  Attributes:
    QUICK: What ``--quick`` puts in the place of defaults, by the flag's name.
      A flag that was given another value than its default keeps it.
    MINUTES: Those that a run takes on two cores, with ``--quick`` and with the
      defaults, measured or reckoned from smaller runs.
  """

  QUICK: ClassVar[dict[str, Any]] = {}
  MINUTES: ClassVar[tuple[float, float] | None] = None

  quick: bool = flag(False, 'A budget of one to two minutes: a first look.')

  output_dir: str = flag(
    '', 'Folder of results; the next results/PROGRAM/NUMBER if empty.'
  )
  resume: bool = flag(
    False, 'Go on where the run in output_dir, or else the last one, stopped.'
  )
  seeds: int = flag(1, 'Number of seeds, 0 to seeds - 1.', low=1, grows=True)
  precision: str = flag(
    'float64', 'Floating point type.', choices=('float32', 'float64')
  )
  checkpoint_every: float = flag(
    30.0, 'Seconds of work between checkpoints.', low=0.0
  )
  max_seconds: float = flag(
    0.0,
    'Stop at the first row after so many (0: never); --resume goes on.',
    low=0.0,
  )

  def __post_init__(self):
    if self.quick:
      for field in dataclasses.fields(self):
        given = getattr(self, field.name)
        if field.name in self.QUICK and given == field.default:
          object.__setattr__(self, field.name, self.QUICK[field.name])
    super().__post_init__()
    if self.seeds > MAX_SEEDS:
      raise UserError(
        f'--seeds={self.seeds}: must be at most {MAX_SEEDS:,}; those above tune'
      )

  def is_default(self, *but: str) -> bool:
    """Whether no flag is given but these and those of where and how."""
    plain = type(self)(quick=self.quick)
    return all(
      getattr(self, field.name) == getattr(plain, field.name)
      for field in dataclasses.fields(self)
      if field.name not in (*FREE, *but)
    )

  def minutes(self) -> tuple[float, float] | None:
    """`MINUTES` of these flags, or ``None`` where nobody knows."""
    return self.MINUTES if self.is_default() else None

  def expected(self) -> str:
    """What a run takes, as the first line says it."""

    def told(count):
      unit = 'minute' if count < 90 else 'hour'
      count = count if count < 90 else round(count / 60, 1)
      return f'about {count:g} {unit}{"s" * (count != 1)}'

    if self.MINUTES is None:
      return ''
    known = self.minutes()
    if known is None:
      return (
        'what these flags take is not known (the defaults'
        f' {told(self.MINUTES[1])} on two cores); '
      )
    quick, whole = map(told, known)
    if self.quick:
      return f'{quick} on two cores; '
    return f'{whole} on two cores, with --quick {quick}; '


def _name(field: dataclasses.Field) -> str:
  return field.name if field.metadata.get('positional') else f'--{field.name}'


# What a value of each type may be made of, and what it is called.
_KINDS: dict[type, tuple[type | tuple[type, ...], str]] = {
  str: ((str, os.PathLike), 'a text'),
  bool: (bool, 'true or false'),
  int: (numbers.Integral, 'a whole number'),
  float: (numbers.Real, 'a number'),
}


def _convert(field: dataclasses.Field, annotation: Any, value: Any) -> Any:
  """The value as the field's type has it, or a `UserError`."""
  kind, is_list = value_type(annotation)
  if value is None and isinstance(annotation, types.UnionType):
    return None
  sources, said = _KINDS[kind]

  def convert(entry):
    wrong = isinstance(entry, bool) and kind is not bool
    if wrong or not isinstance(entry, sources):
      raise UserError(f'{_name(field)}={entry!r}: is not {said}')
    if kind is not str:
      return kind(entry)
    # No shell does it behind `--output_dir=`.
    text = os.fspath(entry)
    return os.path.expanduser(text) if text.startswith('~') else text

  if not is_list:
    return convert(value)
  if not isinstance(value, (tuple, list)):
    raise UserError(
      f'{_name(field)}={value!r}: is not a list, as in [{value!r}]'
    )
  return tuple(map(convert, value))


def _check(field: dataclasses.Field, value: Any) -> None:
  """Raises a `UserError` unless the value is one that the flag allows."""
  choices, low = (field.metadata.get(name) for name in ('choices', 'low'))
  name = _name(field)
  entries = value if isinstance(value, tuple) else (value,)
  if isinstance(value, tuple) and not value:
    raise UserError(f'{name} is empty: give at least one value')
  twice = [entry for entry in entries if entries.count(entry) > 1]
  if twice and not field.metadata.get('positional'):
    raise UserError(f'{name}: {twice[0]} is there twice')
  for entry in entries:
    if choices is not None and entry not in choices:
      allowed = ', '.join(filter(None, choices))
      raise UserError(f'{name}={entry}: not one of {allowed}')
    if isinstance(entry, float) and not math.isfinite(entry):
      raise UserError(f'{name}={entry}: not a finite number')
    if low is not None and entry is not None and entry < low:
      raise UserError(f'{name}={entry}: must be at least {low}')
    if isinstance(entry, int) and abs(entry) > MAX_COUNT:
      raise UserError(f'{name}={entry}: must be at most {MAX_COUNT:,}')
