"""SIGINT, SIGTERM, SIGHUP: said at once, obeyed at the next safe place.

While a `Listener` is open the first signal raises `flags.InterruptedRun` where
the program is, unless that is inside of `held`: then it waits for the end of
the row or the checkpoint that is being made. A thread says so the moment the
signal comes, also while the compiler or a compiled step has the main thread,
and ends the process at the second signal.

Where Python ignores what is raised, in a callback of the garbage collector or
of a weak reference, the signal comes once more a moment later.
"""

from collections.abc import Sequence
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from . import flags

# Where there is one: a terminal that was closed, a connection that broke.
_HANGUP = [signal.SIGHUP] if hasattr(signal, 'SIGHUP') else []
SIGNALS = (signal.SIGINT, signal.SIGTERM, *_HANGUP)
STATUS = 130  # Of a program that was asked to stop.
_AGAIN = 0  # In the place of a signal's number: one was ignored.
_open: list['Listener'] = []  # The one that listens, if any.


class Listener:
  """Listens to the signals while it is open.

  Attributes:
    asked: Whether a signal came.
    way_on: What the user is told to do next.
    children: Processes that are stopped with this one.
    listens: Whether signals come here.
  """

  def __init__(self):
    self.asked = False
    self.way_on = 'no record was begun: start it again'
    self.children: list[Any] = []
    self._held = 0
    self.listens = False

  def __enter__(self) -> 'Listener':
    # Signals reach the main thread alone, and one listener is enough.
    if _open or threading.current_thread() is not threading.main_thread():
      return self
    self.listens = True
    _open.append(self)
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    self._old_wakeup = signal.set_wakeup_fd(
      self._writer.fileno(), warn_on_full_buffer=False
    )
    self._old_hook, sys.unraisablehook = sys.unraisablehook, self._ignored
    self._old = {number: signal.getsignal(number) for number in SIGNALS}
    for number in _HANGUP:  # `nohup` says that it is not to be heard.
      if self._old[number] is signal.SIG_IGN:
        del self._old[number]
    for number in self._old:
      signal.signal(number, self._obey)
    self._thread = threading.Thread(target=self._tell, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *unused: Any) -> None:
    if not self.listens:
      return
    self.listens = False
    for number, handler in self._old.items():
      signal.signal(number, handler)
    sys.unraisablehook = self._old_hook
    signal.set_wakeup_fd(self._old_wakeup)
    self._writer.close()  # Ends the thread.
    self._thread.join()
    self._reader.close()
    _open.remove(self)

  def _obey(self, number: int, frame: Any) -> None:
    del frame
    self.asked = True
    for child in self.children:
      child.send_signal(number)
    if not self._held:
      raise flags.InterruptedRun(f'interrupted; {self.way_on}')

  def _ignored(self, unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, flags.InterruptedRun):
      self._writer.send(bytes([_AGAIN]))
    else:
      self._old_hook(unraisable)

  def _tell(self) -> None:
    told, own = False, 0
    while received := self._reader.recv(1):
      if received[0] == _AGAIN:
        own += 1  # What comes of it here is no second signal.
        time.sleep(0.05)  # The callback ends.
        main = threading.main_thread().ident
        if self.listens and main is not None:
          signal.pthread_kill(main, signal.SIGINT)
        continue
      if received[0] not in self._old:
        continue
      if own:
        own -= 1
        continue
      if told and not self.children:
        say(f'interrupted at once; {self.way_on}')
        os._exit(STATUS)
      say(f'stopping (once more to stop at once); {self.way_on}')
      told = True

  @contextlib.contextmanager
  def held(self):
    """What is done inside is done whole; a signal waits for its end."""
    self._held += 1
    try:
      yield
    finally:
      self._held -= 1
    if self.asked and not self._held:
      raise flags.InterruptedRun(f'interrupted; {self.way_on}')


def current() -> Listener | None:
  """The listener that is open, if one is."""
  return _open[-1] if _open else None


def run_child(command: Sequence[str], output: pathlib.Path) -> int:
  """Runs a program to its end, also when signals come: it gets them too.

  Args:
    command: Its command line.
    output: Where its standard output goes.

  Returns:
    Its status.
  """
  with Listener() as own, output.open('w') as file:
    listener = own if own.listens else current() or own
    child = subprocess.Popen(command, stdout=file, start_new_session=True)
    listener.children.append(child)
    with contextlib.suppress(flags.InterruptedRun), listener.held():
      child.wait()
    listener.children.remove(child)
    return child.wait()


def say(message: str) -> None:
  """A line on the standard error, also while something else writes there."""
  with contextlib.suppress(OSError):
    os.write(sys.stderr.fileno(), f'{message}\n'.encode(errors='replace'))
