"""Flags into a frozen dataclass, and errors in one line.

A program declares its configuration once::

    @dataclasses.dataclass(frozen=True)
    class Config(app.Config):
      '''What the program does.'''
      l2: float = app.flag(1e-3, 'Weight of the penalty.', low=0.0)

    def main(config): ...

    if __name__ == '__main__':
      app.run(main, Config)

Each field becomes an absl flag. `main` gets the dataclass, so a test or a
notebook calls it without flags.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import math
import pathlib
import sys
import types
import typing
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax

_DEFINE: dict[type, Callable[..., Any]] = {
  str: flags.DEFINE_string,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  bool: flags.DEFINE_bool,
}


class UserError(Exception):
  """Something the user can mend; shown as one line, without a traceback."""


class InterruptedRun(Exception):
  """The user asked a run to stop; what it had is on disk."""


def flag(
  default: Any,
  help_text: str,
  *,
  choices: Sequence[str] | None = None,
  low: float | None = None,
) -> Any:
  """A field of a configuration that is also a command-line flag.

  Args:
    default: Its default; a tuple makes a comma-separated list.
    help_text: Shown by ``--help``.
    choices: The values allowed, of the flag or of each entry of a list.
    low: The smallest number allowed.

  Returns:
    A dataclass field.
  """
  metadata = {'help': help_text, 'choices': choices, 'low': low}
  return dataclasses.field(default=default, metadata=metadata)


def positional(help_text: str) -> Any:
  """A field that takes the arguments which are no flags, at least one."""
  return dataclasses.field(
    default=(), metadata={'help': help_text, 'positional': True}
  )


@dataclasses.dataclass(frozen=True)
class BareConfig:
  """A configuration whose fields are checked against what `flag` allows."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      _check(field, getattr(self, field.name))


@dataclasses.dataclass(frozen=True)
class Config(BareConfig):
  """What every experiment has."""

  output_dir: str = flag('', 'Folder of results; results/PROGRAM if empty.')
  resume: bool = flag(False, 'Go on where a run in output_dir stopped.')
  seeds: int = flag(1, 'Number of seeds, 0 to seeds - 1.', low=1)
  precision: str = flag(
    'float64', 'Floating point type.', choices=('float32', 'float64')
  )
  checkpoint_every: float = flag(
    30.0, 'Seconds of work between checkpoints.', low=0.0
  )


def _check(field: dataclasses.Field, value: Any) -> None:
  """Raises a `UserError` unless the value is one that the flag allows."""
  choices, low = (field.metadata.get(name) for name in ('choices', 'low'))
  name = f'--{field.name}'
  if field.metadata.get('positional'):
    name = field.name
  entries = value if isinstance(value, tuple) else (value,)
  if isinstance(value, tuple) and not value:
    raise UserError(f'{name} is empty: give at least one value')
  for entry in entries:
    if choices is not None and entry not in choices:
      raise UserError(f'{name}={entry}: not one of {", ".join(choices)}')
    if isinstance(entry, float) and math.isnan(entry):
      raise UserError(f'{name}={entry}: not a number')
    if low is not None and entry is not None and entry < low:
      raise UserError(f'{name}={entry}: must be at least {low}')


def _value_type(annotation: Any) -> tuple[type, bool]:
  """The type of a flag's value, and whether it is a list."""
  if isinstance(annotation, types.UnionType):  # `float | None`
    annotation = typing.get_args(annotation)[0]
  if typing.get_origin(annotation) is tuple:
    return typing.get_args(annotation)[0], True
  return annotation, False


def _flag_fields(config_type: type[BareConfig]) -> list[dataclasses.Field]:
  return [
    field
    for field in dataclasses.fields(config_type)
    if not field.metadata.get('positional')
  ]


def _define(config_type: type[BareConfig]) -> None:
  annotations = typing.get_type_hints(config_type)
  for field in _flag_fields(config_type):
    value_type, is_list = _value_type(annotations[field.name])
    help_text = field.metadata['help']
    choices = field.metadata['choices']
    if choices:
      help_text += f' One of: {", ".join(choices)}.'
    if is_list:
      entries: Any = field.default
      default = [str(entry) for entry in entries]
      flags.DEFINE_list(field.name, default, help_text)
    else:
      _DEFINE[value_type](field.name, field.default, help_text)
    # Else --help takes the flags for those of this module, and leaves them out.
    flags.FLAGS.register_key_flag_for_module(
      sys.argv[0], flags.FLAGS[field.name]
    )


def _from_flags(
  config_type: type[BareConfig], arguments: Sequence[str]
) -> BareConfig:
  annotations = typing.get_type_hints(config_type)
  values: dict[str, Any] = {
    field.name: tuple(arguments)
    for field in dataclasses.fields(config_type)
    if field.metadata.get('positional')
  }
  if arguments and not values:
    raise UserError(f'unexpected argument {arguments[0]}: flags begin with --')
  for field in _flag_fields(config_type):
    value: Any = flags.FLAGS[field.name].value
    value_type, is_list = _value_type(annotations[field.name])
    if is_list:
      try:
        value = tuple(value_type(entry) for entry in value)
      except ValueError as error:
        raise UserError(f'--{field.name}={",".join(value)}: {error}') from error
    values[field.name] = value
  return config_type(**values)


def _repeated(config_type: type[BareConfig], header: dict) -> BareConfig:
  """The configuration of a record; only --output_dir is taken from the flags.

  Args:
    config_type: The program's configuration.
    header: First row of the record.

  Returns:
    The configuration.

  Raises:
    UserError: The record is of another program, or of other flags.
  """
  program = pathlib.Path(sys.argv[0]).stem
  if header['program'] != program:
    raise UserError(
      f'--repeat: the record is of {header["program"]}, this is {program}'
    )
  names = {field.name for field in dataclasses.fields(config_type)}
  if names != set(header['config']):
    changed = ', '.join(sorted(names ^ set(header['config'])))
    raise UserError(f'--repeat: the program has other flags now: {changed}')
  values = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in header['config'].items()
  }
  values |= {'output_dir': flags.FLAGS.output_dir, 'resume': False}
  return config_type(**values)


def _check_repeated(rows: list[dict], again: list[dict]) -> None:
  """Raises a `UserError` unless two runs have the same numbers."""
  for i, (row, new) in enumerate(zip(rows, again, strict=False)):
    # As text, in which NaN equals NaN.
    changed = [
      key
      for key in row | new
      if json.dumps(row.get(key)) != json.dumps(new.get(key))
    ]
    if changed:
      key = changed[0]
      raise UserError(
        f'--repeat: row {i + 2} differs: {key} was {row.get(key)}, is'
        f' {new.get(key)}'
      )
  if len(rows) != len(again):
    raise UserError(
      f'--repeat: there were {len(rows)} rows, there are {len(again)}'
    )
  print(f'repeated: {len(rows)} rows with the same numbers')


def _fail(message: str) -> typing.NoReturn:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(1)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _fail(' '.join(str(error).split()))


def run(main: Callable[[Any], Any], config_type: type[BareConfig]) -> None:
  """Runs a program: parses its flags, calls ``main(config)``, and exits.

  Args:
    main: The program.
    config_type: Its configuration, a subclass of `BareConfig`.
  """
  from experiments import devices  # They import this module.
  from experiments import record

  _define(config_type)
  has_record = issubclass(config_type, Config)
  if has_record:
    flags.DEFINE_string(
      'repeat',
      '',
      'A record that is run again, with its flags; --output_dir counts too.',
    )
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS['repeat'])

  def guarded(argv):
    logging.set_verbosity(logging.WARNING)
    try:
      header, earlier = {}, None
      if has_record and flags.FLAGS.repeat:
        header, earlier = record.read(flags.FLAGS.repeat)
        config = _repeated(config_type, header)
        now = record.versions()
        for name, version in header['versions'].items():
          if now.get(name) != version:
            print(
              f'--repeat: {name} was {version}, is {now.get(name)}',
              file=sys.stderr,
            )
      else:
        config = _from_flags(config_type, argv[1:])
      if isinstance(config, Config):
        jax.config.update('jax_enable_x64', config.precision == 'float64')
      if isinstance(config, devices.Config):
        devices.connect(config)
      main(config)
      if earlier is not None:
        folder = flags.FLAGS.output_dir or f'results/{header["program"]}'
        rows = record.read(folder)[1]
        _check_repeated(
          record.without_times(earlier), record.without_times(rows)
        )
    except UserError as error:
      _fail(str(error))
    except InterruptedRun as stopped:
      print(stopped, file=sys.stderr)
      sys.exit(130)
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      sys.exit(130)

  app.run(guarded, flags_parser=_parse)
