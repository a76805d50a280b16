"""Starts a program: flags into its configuration, and errors in one line.

A program ends with::

    @launch.program
    def main(config): ...

    if __name__ == '__main__':
      launch.run(main, Config)

`main` gets the dataclass, so a test or a notebook calls it without flags.
"""

from collections.abc import Callable, Sequence
import dataclasses
import errno
import functools
import io
import os
import sys
import typing
from typing import Any

from absl import app
from absl import flags as absl_flags
from absl import logging
import jax
import jax.numpy as jnp

from . import devices
from . import flags
from . import peers
from . import record
from . import repeating
from . import session
from . import stopping

_DEFINE: dict[type, Callable[..., Any]] = {
  str: absl_flags.DEFINE_string,
  int: absl_flags.DEFINE_integer,
  float: absl_flags.DEFINE_float,
  bool: absl_flags.DEFINE_bool,
}


# Errors without a file's name: those of a write are the standard output's.
_OF_WRITING = (
  errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EBADF, errno.EAGAIN, errno.ENXIO,
)  # fmt: skip


def _split(text: str) -> list[str]:
  """The entries of a list: commas within parentheses are theirs."""
  entries, depth = [''], 0
  for letter in text:
    depth += (letter in '([{') - (letter in ')]}')
    if letter == ',' and depth == 0:
      entries.append('')
    else:
      entries[-1] += letter
  return [entry.strip() for entry in entries] if text.strip() else []


def _flag_fields(
  config_type: type[flags.BareConfig],
) -> list[dataclasses.Field]:
  return [
    field
    for field in dataclasses.fields(config_type)
    if not field.metadata.get('positional')
  ]


def _define(config_type: type[flags.BareConfig]) -> None:
  annotations = flags.annotations(config_type)
  for field in _flag_fields(config_type):
    value_type, is_list = flags.value_type(annotations[field.name])
    help_text = field.metadata['help']
    choices = field.metadata['choices']
    if choices:
      help_text += f' One of: {", ".join(choices)}.'
    if is_list:
      entries: Any = field.default
      default = ','.join(str(entry) for entry in entries)
      help_text += ' (a comma separated list)'
      absl_flags.DEFINE_string(field.name, default, help_text)
    else:
      _DEFINE[value_type](field.name, field.default, help_text)
    # Else --help takes the flags for those of this module, and leaves them out.
    absl_flags.FLAGS.register_key_flag_for_module(
      sys.argv[0], absl_flags.FLAGS[field.name]
    )


def _from_flags(
  config_type: type[flags.BareConfig], arguments: Sequence[str]
) -> flags.BareConfig:
  annotations = flags.annotations(config_type)
  values: dict[str, Any] = {
    field.name: tuple(arguments)
    for field in dataclasses.fields(config_type)
    if field.metadata.get('positional')
  }
  if arguments and not values:
    raise flags.UserError(
      f'unexpected argument {arguments[0]}: flags begin with --'
    )
  for field in _flag_fields(config_type):
    value: Any = absl_flags.FLAGS[field.name].value
    value_type, is_list = flags.value_type(annotations[field.name])
    if is_list:
      try:
        value = tuple(value_type(entry) for entry in _split(value))
      except ValueError as error:
        raise flags.UserError(f'--{field.name}={value}: {error}') from error
    values[field.name] = value
  return config_type(**values)


def _fail(message: str) -> typing.NoReturn:
  stopping.say(f'error: {message}')
  sys.exit(1)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    try:
      return absl_flags.FLAGS(argv)
    finally:  # After --help too.
      sys.stdout.flush()
  except absl_flags.Error as error:
    _fail(' '.join(str(error).split()))
  except OSError as error:
    said = _of_output(error)
    if isinstance(error, BrokenPipeError):  # Who reads the help has enough.
      sys.exit()
    _fail(said)


def _of_output(error: OSError) -> str:
  """What is said of an output that cannot be written; no more goes there."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  if isinstance(error, BrokenPipeError):  # As of `| head`.
    return 'nobody reads the standard output'
  what, said = error.filename, error.strerror or str(error)
  if what is None and error.errno in _OF_WRITING:
    what = 'standard output'
  return f'{what}: {said}' if what else said


def program(main: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """Gives a ``main(config)`` the precision of its configuration.

  Args:
    main: The program.

  Returns:
    The same, wherever it is called from: a test or a notebook, too.
  """

  @functools.wraps(main)
  def precise(config):
    with jax.enable_x64(config.precision == 'float64'):
      return main(config)

  return precise


def run(
  main: Callable[[Any], Any], config_type: type[flags.BareConfig]
) -> None:
  """Runs a program: parses its flags, calls ``main(config)``, and exits.

  Args:
    main: The program.
    config_type: Its configuration, a subclass of `flags.BareConfig`.
  """
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is None:  # Closed, as by some schedulers.
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
    elif isinstance(stream, io.TextIOWrapper):
      # Names of folders may have letters that the terminal lacks.
      stream.reconfigure(errors='backslashreplace')
  if issubclass(config_type, devices.Config):
    peers.supervise(sys.argv[1:])
  _define(config_type)
  if issubclass(config_type, flags.Config):
    absl_flags.DEFINE_string(
      'repeat',
      '',
      'A record that is run again, with its flags; --output_dir counts too.',
    )
    absl_flags.FLAGS.register_key_flag_for_module(
      sys.argv[0], absl_flags.FLAGS['repeat']
    )

  def guarded(argv):
    logging.set_verbosity(logging.WARNING)
    listener = stopping.Listener()
    try:
      with listener:
        _run(main, config_type, argv)
        sys.stdout.flush()
    except OSError as error:
      # What is still to be written there would fail once more at the exit.
      _fail(f'{_of_output(error)}; {listener.way_on}')
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      said = ' '.join(str(error).split())
      if not isinstance(error, MemoryError) and 'RESOURCE_EXH' not in said:
        raise
      _fail(f'not enough memory: {said[:150]}; {listener.way_on}')
    except flags.UserError as error:
      _fail(str(error))
    except flags.InterruptedRun as stopped:
      peers.leave(str(stopped), stopping.STATUS)

  app.run(guarded, flags_parser=_parse)


def _run(main, config_type, argv) -> None:
  """Runs a program, once or to repeat a record."""
  header, earlier = {}, None
  config = _from_flags(config_type, argv[1:])
  if isinstance(config, flags.Config) and absl_flags.FLAGS['repeat'].present:
    if not absl_flags.FLAGS.repeat:
      raise flags.UserError('--repeat is empty: give a record')
    header, earlier = record.read(os.path.expanduser(absl_flags.FLAGS.repeat))
    config = repeating.config_of(config_type, header)
  before = bool(jnp.result_type(float) == jnp.float64)
  if isinstance(config, flags.Config):
    jax.config.update('jax_enable_x64', config.precision == 'float64')
  try:
    if isinstance(config, devices.Config):
      peers.connect(config)
    if earlier is not None:
      repeating.say_what_differs(header, config)
    with peers.together():
      main(config)
  finally:  # Whoever called this in a process of their own has theirs back.
    jax.config.update('jax_enable_x64', before)
  folder = session.last_folder()
  if earlier is not None and folder is not None and devices.is_first():
    repeating.check(earlier, record.read(folder)[1])
