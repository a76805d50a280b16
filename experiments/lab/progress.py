"""How far a method is: a bar on a terminal, lines elsewhere; and warnings."""

import contextlib
import os
import sys
import threading
import time
from typing import Any

from rich import console as rich_console
from rich import progress as rich_progress

from . import devices

LOG_EVERY = 10.0  # Seconds from one line to the next.
SILENT = 30.0  # Seconds after which what takes long is said.


class Progress:
  """Of one method."""

  def __init__(self, method: str, total: int, completed: int):
    self._method, self._total, self._first = method, total, completed
    self._began = self._logged = time.perf_counter()
    self._silent = not devices.is_first()
    self._bar: Any = None

  def __enter__(self) -> 'Progress':
    if not self._silent and sys.stderr.isatty():
      self._bar = rich_progress.Progress(
        rich_progress.TextColumn('{task.description}'),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn('{task.fields[value]}'),
        console=rich_console.Console(stderr=True),
        transient=True,
      )
      self._task = self._bar.add_task(
        self._method, total=self._total, completed=self._first, value=''
      )
      self._bar.start()
    return self

  def __exit__(self, *unused: Any) -> None:
    if self._bar is not None:
      self._bar.stop()

  def update(self, step: int, value: str, *, ended: bool = False) -> None:
    """Shows a step and its value.

    Args:
      step: The step.
      value: What is shown beside it.
      ended: Whether it is the last one.
    """
    if self._silent:
      return
    if self._bar is not None:
      self._bar.update(self._task, completed=step, value=value)
      return
    now = time.perf_counter()
    if not ended and now - self._logged < LOG_EVERY:
      return
    self._logged, spent = now, now - self._began
    time_text = f'{spent:.0f} s'
    if not ended:
      left = spent / (step - self._first) * (self._total - step)
      time_text += f', {left:.0f} s left'
    parts = [f'step {step} of {self._total}', value, time_text]
    text = ', '.join(part for part in parts if part)
    warn(f'{self._method}: {text}')


class Watch:
  """Says what takes long where no other line comes: compiling, mostly.

  Attributes:
    doing: What is done now.
  """

  def __init__(self):
    self.doing = 'what comes before the first method'
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._tell, daemon=True)

  def __enter__(self) -> 'Watch':
    self._thread.start()
    return self

  def __exit__(self, *unused: Any) -> None:
    self._ended.set()
    self._thread.join()

  def _tell(self) -> None:
    told, since, due = '', 0.0, SILENT
    while not self._ended.wait(min(SILENT, 1.0)):
      now = time.perf_counter()
      if self.doing != told:
        told, since, due = self.doing, now, SILENT
      elif now - since >= due:
        with contextlib.suppress(OSError):
          warn(f'{told}: {now - since:.0f} s so far')
        due *= 2


def warn(message: str) -> None:
  """Says something beside the results, once for all processes."""
  if not devices.is_first():
    return
  try:
    print(message, file=sys.stderr, flush=True)
  except BrokenPipeError:  # Nobody reads: see `launch`.
    raise
  except OSError:  # A full disk, say: what is said there ends no run.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
