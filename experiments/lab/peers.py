"""Several processes of one run: how they meet, and what is said if one is gone.

JAX ends a process from its C++ side, with pages of text, when another one dies
at the wrong moment. So the program runs in a child, and its parent turns that
into one line and a status of 1.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import typing

import jax

from . import devices
from . import flags
from . import stopping

_CHILD = 'OPTLAB_CHILD'
# How a line of C++ begins: severity, date, time.
_NATIVE = re.compile(r'([EF]\d{4} \d\d:\d\d:\d\d\.|\*\*\* |Fatal Python error)')
# And one of the runtime's in Python: the status, in capitals.
_STATUS = re.compile(r'[A-Z_]+: ')
_QUIET = {'TF_CPP_MIN_LOG_LEVEL': '3', 'GRPC_VERBOSITY': 'NONE'}


def connect(config: devices.Config) -> None:
  """Joins the other processes; only the first prints from now on.

  Args:
    config: The program's configuration.

  Raises:
    UserError: The flags do not fit together, or not all processes come.
  """
  place = config.coordinator
  if not place:
    if config.processes > 1:
      raise flags.UserError(
        f'--processes={config.processes} needs --coordinator=HOST:PORT'
      )
    return
  if not config.mesh:
    raise flags.UserError('--coordinator needs --mesh, as in --mesh=data=2')
  late = (
    f'--coordinator={place}: after --timeout={config.timeout} seconds not all'
    f' of the {config.processes} processes have met there; start each with the'
    ' same flags but --process'
  )
  # JAX itself would abort after its own time; this is before it.
  timer = threading.Timer(config.timeout, leave, (f'error: {late}', 1))
  timer.daemon = True
  waits = {
    'initialization_timeout': config.timeout + 60,
    'heartbeat_timeout_seconds': max(config.timeout, 10),
  }
  if place != 'auto':
    _check_place(place, config)
  timer.start()
  try:
    if place == 'auto':
      jax.distributed.initialize(**waits)
    else:
      jax.distributed.initialize(
        place, config.processes, config.process, **waits
      )
    jax.devices()  # They tell each other what they have.
  except ValueError as error:
    raise flags.UserError(
      f'--coordinator={place}: {" ".join(str(error).split())}'
    ) from error
  except RuntimeError as error:
    raise flags.UserError(late) from error
  finally:
    timer.cancel()
  if not devices.is_first():
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


def _check_place(place: str, config: devices.Config) -> None:
  """Raises a `UserError` where nobody can meet at HOST:PORT."""
  if config.process >= config.processes:
    raise flags.UserError(
      f'--process={config.process}: must be below'
      f' --processes={config.processes}'
    )
  host, _, port = place.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise flags.UserError(
      f'--coordinator={place}: is not HOST:PORT, as in localhost:1234'
    )
  try:
    socket.getaddrinfo(host.strip('[]'), int(port))
    if config.process == 0:
      with socket.create_server(('', int(port))):
        pass
  except OSError as error:
    raise flags.UserError(
      f'--coordinator={place}: {error.strerror or error}'
    ) from error


@contextlib.contextmanager
def together():
  """Around the work: of several processes, an error in one ends this one."""
  try:
    yield
  except (flags.UserError, flags.InterruptedRun) as error:
    if jax.process_count() == 1:
      raise
    if isinstance(error, flags.InterruptedRun):
      leave(str(error), stopping.STATUS)
    leave(f'error: {error}', 1)
  # An exchange of arrays turns the runtime's errors into `ValueError`.
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
    if jax.process_count() == 1 or not _is_of_peers(error):
      raise
    leave(_gone(), 1)


def _is_of_peers(error: Exception) -> bool:
  """Whether it is an exchange that failed, and not this process's own."""
  runtime = isinstance(error, jax.errors.JaxRuntimeError)
  if not (runtime or _STATUS.match(str(error))):
    return False
  words = ('gloo', 'connection', 'coordination', 'unavailable', 'nccl', 'peer')
  text = str(error).lower()
  return any(word in text for word in (*words, 'deadline', 'barrier'))


def _gone() -> str:
  listener = stopping.current()
  way_on = 'start all of them again'
  if listener is not None and '--resume' in listener.way_on:
    way_on = f'{listener.way_on}, in every process'
  return f'error: another process of this run is gone; {way_on}'


def leave(message: str, status: int) -> typing.NoReturn:
  """Ends the process without waiting, as `sys.exit` would.

  For the others; and for the runtime's threads, which may be at work and then
  crash in the interpreter's own end.

  Args:
    message: What is said.
    status: Of the process.
  """
  stopping.say(message)
  with contextlib.suppress(OSError):
    sys.stdout.flush()
  os._exit(status)


def supervise(arguments: list[str]) -> None:
  """Runs the program in a child, if it has a coordinator; returns in the child.

  Args:
    arguments: The program's flags.
  """
  given = any(
    re.match(r'--?coordinator(=.+|$)', argument) for argument in arguments
  )
  if not given:
    return
  if _CHILD in os.environ:
    parent = int(os.environ.pop(_CHILD))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    return
  theirs, ours = os.pipe()
  child = subprocess.Popen(
    [sys.executable, *sys.orig_argv[1:]],
    env=os.environ | _QUIET | {_CHILD: str(theirs)},
    stderr=subprocess.PIPE,
    pass_fds=(theirs,),
    start_new_session=True,  # A control-C comes by way of the parent, once.
  )
  os.close(theirs)
  for number in stopping.SIGNALS:
    signal.signal(number, lambda number, _: child.send_signal(number))
  noise: list[str] = []
  for raw in child.stderr or []:
    line = raw.decode(errors='replace')
    if noise or _NATIVE.match(line):
      noise.append(line)
    else:
      sys.stderr.write(line)
      sys.stderr.flush()
  status = child.wait()
  os.close(ours)
  if status in (0, 1, stopping.STATUS):
    sys.stderr.write(''.join(noise) if status == 0 else '')
    sys.exit(status)
  sys.stderr.write(
    f'error: this process was ended from outside or by JAX (status {status}),'
    ' most likely because another process of the run is gone; go on with'
    ' --resume in every process\n'
  )
  sys.exit(1)


def _end_with(parent: int) -> None:
  """Ends this process when nobody holds the other end of its parent's pipe."""
  os.read(parent, 1)
  os._exit(1)
