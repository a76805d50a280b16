"""A record that is run again: its flags, and whether the numbers are equal."""

import dataclasses
import json
import pathlib
import sys

from absl import flags as absl_flags

from . import devices
from . import flags
from . import record

# What --repeat takes from the command line: where it writes and how its
# processes meet. How far it goes is the record's, not that of a clock.
_BESIDE = ('output_dir', 'coordinator', 'process', 'processes', 'timeout')


def config_of(
  config_type: type[flags.BareConfig], header: dict
) -> flags.BareConfig:
  """The configuration of a record, but for what the flags may give beside it.

  Args:
    config_type: The program's configuration.
    header: First row of the record.

  Returns:
    The configuration.

  Raises:
    UserError: The record is of another program, or has flags that this one
      does not have any more; or there are flags beside it.
  """
  program = pathlib.Path(sys.argv[0]).stem
  if header['program'] != program:
    raise flags.UserError(
      f'--repeat: the record is of {header["program"]}, this is {program}'
    )
  names = {field.name for field in dataclasses.fields(config_type)}
  old = header['config']
  unknown = sorted(old.keys() - names - set(flags.FREE))
  if unknown:
    raise flags.UserError(
      f'--repeat: the program has no flag {", ".join(unknown)} any more'
    )
  beside = [
    f'--{name}={absl_flags.FLAGS[name].value}'
    for name in sorted(names - set(_BESIDE))
    if absl_flags.FLAGS[name].present
  ]
  if beside:
    raise flags.UserError(
      f'--repeat takes the flags of the record, not {" ".join(beside)}: leave'
      ' them out, or leave out --repeat to run with other ones'
    )
  values = {name: old[name] for name in names & old.keys()}
  values |= {'resume': False, 'max_seconds': 0.0}
  values |= {n: absl_flags.FLAGS[n].value for n in names & set(_BESIDE)}
  return config_type(**values)


def say_what_differs(header: dict, config: flags.BareConfig) -> None:
  """Names flags that came later, and other versions, of a repeated record."""
  lines = [
    f'the record has no {field.name}, which is {getattr(config, field.name)}'
    for field in dataclasses.fields(config)
    if field.name not in (*flags.FREE, *header['config'])
  ]
  now = record.versions()
  lines += [
    f'{name} was {version}, is {now.get(name)}'
    for name, version in header['versions'].items()
    if now.get(name) != version
  ]
  if devices.is_first():
    for line in lines:
      print(f'--repeat: {line}', file=sys.stderr)


def check(rows: list[dict], again: list[dict]) -> None:
  """Raises a `flags.UserError` unless two runs have the same numbers."""
  rows, again = (
    [row for row in record.without_times(part) if row['kind'] != 'resumed']
    for part in (rows, again)
  )
  for i, (row, new) in enumerate(zip(rows, again, strict=False)):
    # As text, in which NaN equals NaN.
    changed = [
      key
      for key in row | new
      if json.dumps(row.get(key)) != json.dumps(new.get(key))
    ]
    if changed:
      key = changed[0]
      raise flags.UserError(
        f'--repeat: row {i + 2} differs: {key} was {row.get(key)}, is'
        f' {new.get(key)}'
      )
  text = f'repeated: {len(rows)} rows with the same numbers'
  if len(rows) != len(again):
    ended = bool(rows) and rows[-1]['kind'] == 'end'
    if ended or len(rows) > len(again):
      raise flags.UserError(
        f'--repeat: there were {len(rows)} rows, there are {len(again)}'
      )
    text += f'; that run was not finished, this one has {len(again)}'
  print(text)
