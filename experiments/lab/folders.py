"""Where a run writes: a folder of its own, that no other run writes to.

And how it reads: a file that is there, a pipe that somebody writes to.
"""

import contextlib
import datetime
import errno
import os
import pathlib
import socket

try:
  import fcntl
except ImportError:  # Not on this system: runs are not kept apart.
  fcntl = None

from . import flags

RESULTS = pathlib.Path('results')
LATEST = 'latest'


def content(path: pathlib.Path) -> bytes:
  """What is in a file, or comes by a pipe.

  Args:
    path: Its name. A pipe that nobody writes to is empty: it is not waited for.

  Returns:
    All of it.

  Raises:
    UserError: It cannot be read, or is a device: some have no end.
  """
  try:
    # A pipe without a writer would keep the program in `open`, for ever.
    number = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0))
    with open(number, 'rb') as file:
      if path.is_char_device():
        raise flags.UserError(f'{path}: a device, no file')
      if hasattr(os, 'O_NONBLOCK'):
        os.set_blocking(number, True)
      return file.read()
  except OSError as error:
    raise flags.UserError(f'{path}: {error.strerror or error}') from error


def latest(home: pathlib.Path) -> pathlib.Path | None:
  """The folder of a program's last run, or ``None``."""
  if (home / LATEST).is_dir():
    return (home / LATEST).resolve()
  numbers = _numbers(home)
  return home / str(max(numbers)) if numbers else None


def choose(program: str, output_dir: str, resume: bool) -> pathlib.Path:
  """The folder of a run, which is there when this returns.

  Args:
    program: The program's name.
    output_dir: The folder, or nothing for the next ``results/PROGRAM/NUMBER``.
    resume: Whether it is one that was begun.

  Returns:
    An absolute path.

  Raises:
    UserError: There is no run to resume, or the folder cannot be made.
  """
  try:
    pathlib.Path.cwd()
  except OSError as error:
    raise flags.UserError(
      'the working directory is not there any more: change to another'
    ) from error
  if output_dir and resume:
    return pathlib.Path(output_dir).absolute()
  home = (RESULTS / program).absolute()
  if resume:
    found = latest(home)
    if found is None:
      raise flags.UserError(
        f'--resume: no run in {home}; name its folder by --output_dir'
      )
    return found
  folder = pathlib.Path(output_dir).absolute() if output_dir else home
  name = str(folder)
  if '\0' in name or name != name.encode(errors='replace').decode():
    # Checkpoints are named in UTF-8.
    raise flags.UserError(f'--output_dir={name!a}: its name is no text')
  try:
    folder.mkdir(parents=True, exist_ok=True)
    return folder if output_dir else _next(home)
  except FileExistsError as error:
    raise flags.UserError(
      f'--output_dir={folder}: is there, and is no folder'
    ) from error
  except OSError as error:
    raise flags.UserError(f'--output_dir={folder}: {error.strerror}') from error


def _numbers(home: pathlib.Path) -> list[int]:
  if not home.is_dir():
    return []
  return [int(path.name) for path in home.iterdir() if path.name.isdecimal()]


def _next(home: pathlib.Path) -> pathlib.Path:
  number = max(_numbers(home), default=0)
  while True:  # Two runs may begin at once: one of them makes the folder.
    number += 1
    with contextlib.suppress(FileExistsError):
      (home / str(number)).mkdir()
      return home / str(number)


def point(folder: pathlib.Path) -> None:
  """Lets ``latest`` beside a numbered folder point to it."""
  if not folder.name.isdecimal() or folder.parent.parent.name != RESULTS.name:
    return
  link = folder.parent / f'.{LATEST}.{os.getpid()}'
  with contextlib.suppress(OSError):  # A system without links.
    link.symlink_to(folder.name)
    try:
      link.replace(folder.parent / LATEST)
    except OSError:
      link.unlink()


def free_name(
  folder: pathlib.Path, stem: str, suffix: str = ''
) -> pathlib.Path:
  """The first of STEM.1SUFFIX, STEM.2SUFFIX ... that is not there."""
  number = 1
  while (folder / f'{stem}.{number}{suffix}').exists():
    number += 1
  return folder / f'{stem}.{number}{suffix}'


class Lock:
  """Keeps other runs out of a folder, until it is released or its process ends.

  Raises:
    UserError: Another run has it.
  """

  def __init__(self, folder: pathlib.Path):
    self._file = None
    if fcntl is None:
      return
    path = folder / '.lock'
    try:
      # Unbuffered: what a full disk refuses is not tried again at the end.
      file = path.open('a+b', buffering=0)
    except OSError as error:
      raise flags.UserError(
        f'--output_dir={folder}: {error.strerror or error}'
      ) from error
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      file.seek(0)
      holder = file.read().decode(errors='replace').strip()
      file.close()
      if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
        return  # A file system without locks.
      raise flags.UserError(
        f'--output_dir={folder}: another run is writing there ({holder}); wait'
        ' for its end, or give another --output_dir'
      ) from error
    self._file = file
    with contextlib.suppress(OSError):  # A full disk; the lock holds.
      now = datetime.datetime.now().isoformat(' ', 'seconds')
      file.truncate(0)
      who = f'process {os.getpid()} on {socket.gethostname()} since {now}\n'
      file.write(who.encode())

  def release(self) -> None:
    """Lets others in."""
    if self._file is not None:
      self._file.close()
      self._file = None
