"""Programs that run one problem with many methods; see the README."""

import os
import signal
import sys
from typing import Any

# Before JAX is loaded: XLA's "Very slow compile?" says nothing to a user, whom
# `lab.progress` tells what takes long. Its errors come as exceptions too.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


def leave_if_asked() -> None:
  """Ends in one line at a signal until the program listens: JAX loads first."""
  for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
    number = getattr(signal, name, None)
    if number and signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, _leave)


def _leave(number: int, frame: Any) -> None:
  del number, frame
  os.write(
    2,
    b'interrupted; no run was begun or is under way: start it again'
    b' unless its record is whole\n',
  )
  os._exit(130)


if sys.argv[:1] == ['-m']:  # As `python -m experiments.NAME` begins.
  leave_if_asked()
