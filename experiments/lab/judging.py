"""What the rules on claims are made of: verdicts, ends, intervals."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import record
from . import verdicts

HOLDS, PARTLY, NOT, NOT_RUN = 'holds', 'partly', 'not', 'not run'
Rows = list[dict]


class Claim(NamedTuple):
  """A claim of a paper, and the rule by which a run decides it."""

  paper: str
  claim: str
  run: str
  judge: Callable[[Rows], tuple[str, str]]  # (number, verdict)


def ends(rows: Rows, method: str, field: str) -> np.ndarray:
  """A field at the end of a method's runs, one a seed; not a number is inf."""
  values = [row[field] for row in verdicts.last(rows, method)]
  return np.nan_to_num(np.array(values, float), nan=np.inf, posinf=np.inf)


def median(rows: Rows, method: str, field: str) -> float:
  """Over the seeds, at the end."""
  return float(np.median(ends(rows, method, field)))


def summary(rows: Rows, **fields: str) -> dict:
  """The last summary with these fields."""
  return record.select(rows, 'summary', **fields)[-1]


def against(
  rows: Rows, ours: str, peer: str, field: str, *, more: bool = False
) -> verdicts.Paired:
  """How much worse a peer is by seed; where one diverged, by its sign."""
  sign = -1.0 if more else 1.0
  mine, theirs = (ends(rows, name, field) for name in (ours, peer))
  with np.errstate(invalid='ignore'):
    gaps = sign * (theirs - mine)
  found = verdicts.paired(gaps)
  if found.said != '-':
    return found
  said = 'worse' if np.all(gaps > 0) else 'tie'
  return found._replace(said='better' if np.all(gaps < 0) else said)


def interval(found: verdicts.Paired, scale: float = 1.0) -> str:
  """The interval of a difference, for a row of the table."""
  if not np.isfinite(found.low):
    return found.said
  return f'{scale * found.low:+.2g} to {scale * found.high:+.2g}'


def gap_of(row: dict) -> verdicts.Paired:
  """The difference that a summary holds."""
  fields = ('gap', 'gap_low', 'gap_high', 'verdict')
  return verdicts.Paired(*(row[name] for name in fields))


def all_worse(said: list[str]) -> str:
  """The verdict on a claim that all peers are worse."""
  return grade(
    all(word == 'worse' for word in said),
    'better' not in said and 'worse' in said,
  )


def grade(holds: bool, partly: bool = False) -> str:
  """The verdict of a rule."""
  return HOLDS if holds else PARTLY if partly else NOT
