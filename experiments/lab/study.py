"""What every comparison does alike: tuning, lanes, equal budgets.

A problem makes an `Entry` of a method's name. Each method is tuned on seeds
that are used for nothing else, over one grid of learning rates that goes on
while the best one is at its edge, and over the search space of its own
arguments; and it then runs on the reported seeds, the same for all, to an equal
budget of oracle calls. What is said of the numbers is in `verdicts`.
"""

from collections.abc import Callable, Sequence
import math
import sys
from typing import Any, NamedTuple

import numpy as np

from . import entries
from . import flags
from . import searching
from . import verdicts
from .session import Session
from .verdicts import last

TUNING_SEED = flags.MAX_SEEDS

# What programs take from here.
Entry, Problem, Plan = entries.Entry, entries.Problem, entries.Plan
Program, Found = entries.Program, searching.Found
program, run, steps_of = entries.program, entries.run, entries.steps_of
search, PIECES, TUNING_PIECES = (
  searching.search, entries.PIECES, entries.TUNING_PIECES,
)  # fmt: skip


class Choice(NamedTuple):
  """What tuning found: a variant of a method, and its rates.

  Attributes:
    variant: Its name.
    entry: It.
    program: Its functions.
    found: The learning rate, and how it was found.
    inner_lr: The rate of the lower level, or ``None``.
  """

  variant: str
  entry: Entry
  program: Program
  found: Found
  inner_lr: float | None

  @property
  def rates(self) -> Any:
    """What a lane has."""
    rate = self.found.rate
    return rate if self.inner_lr is None else (rate, self.inner_lr)


def tune(session: Session, plan: Plan, method: str) -> Choice:
  """The variant and rate of the least value, a median over tuning seeds.

  Args:
    session: The open session.
    plan: The plan.
    method: The method.

  Returns:
    The `Choice`.
  """
  entry = plan.problem.entry(method)
  tuned = entry.tuned or entry.variants or plan.problem.inner_lrs
  if not tuned:  # There is nothing to pick.
    return _untuned(plan, method, entry)
  if entry.variants and not plan.tuning_seeds:
    raise flags.UserError(
      f'--methods={method}: a search space, which --tuning_seeds=0 does not'
      ' search'
    )
  variants = entry.variants or {method: entry}
  found = [
    _tune_rate(session, plan, name, variant)
    for name, variant in variants.items()
  ]
  return min(found, key=lambda choice: choice.found.values[choice.found.rate])


def _choose(session: Session, plan: Plan, method: str) -> Choice:
  """Tunes on what is held for that, and makes what is reported."""
  if plan.held is None:
    return tune(session, plan, method)
  budget = plan.held.budget
  found = tune(session, plan._replace(problem=plan.held, budget=budget), method)
  entry = plan.problem.entry(found.variant)
  return found._replace(entry=entry, program=program(plan, entry))


def _tune_rate(session, plan: Plan, name: str, entry: Entry) -> Choice:
  rates = sorted(plan.learning_rates) if entry.tuned else [1.0]
  inner = plan.problem.inner_lrs
  if plan.tuning_seeds == 0:
    return _untuned(plan, name, entry)
  made = program(plan, entry)
  best: dict[float, float | None] = {}

  def measure(new, grid):
    label = f'{plan.label(name)}: tuning, grid {grid}'
    grid = [(rate, lower) for rate in new for lower in inner] if inner else new
    # A run for each seed: with as many rates as seeds in the runs that are
    # reported, nothing is compiled for them again.
    for seed in range(TUNING_SEED, TUNING_SEED + plan.tuning_seeds):
      lanes = [(seed, rates) for rates in grid]
      run(session, plan, made, label, lanes, algorithm=name)
    values: dict[float, dict[float | None, list[float]]] = {}
    for row in last(session.rows, label):
      own = values.setdefault(row['learning_rate'], {})
      value = math.inf if math.isnan(row['tuning']) else row['tuning']
      own.setdefault(row.get('inner_lr'), []).append(value)
    for rate, own in values.items():
      best[rate] = min(own, key=lambda lower: np.median(own[lower]))
      yield from ((rate, value) for value in own[best[rate]])

  found = search(rates, measure)
  return Choice(name, entry, made, found, best[found.rate])


def _untuned(plan: Plan, name: str, entry: Entry) -> Choice:
  """The method with the first rates."""
  rate = plan.learning_rates[0] if entry.tuned else 1.0
  found = Found(rate, {rate: 0.0}, edge=False)
  inner = plan.problem.inner_lrs
  lower = inner[0] if inner else None
  return Choice(name, entry, program(plan, entry), found, lower)


def study(
  session: Session,
  plan: Plan,
  methods: Sequence[str],
  after: Callable[[str, Choice, Any], None] | None = None,
  *,
  skip: bool = False,
) -> list[dict]:
  """Tunes and runs every method on a problem.

  Args:
    session: The open session.
    plan: The plan.
    methods: The methods; the first is the one that others are compared with.
    after: Called with a method, its `Choice` and the last states of the lanes
      that are reported.
    skip: Whether to go on without a method that does not run here.

  Returns:
    A summary row a method, which is in the record too.

  Raises:
    UserError: A method does not run here.
  """
  first: list[dict] = []
  rows = []
  for method in methods:
    try:
      choice = _choose(session, plan, method)
      lanes = [(seed, choice.rates) for seed in range(plan.seeds)]
      found = run(
        session, plan, choice.program, plan.label(method), lanes,
        reported=True, keep_state=after is not None, algorithm=method,
      )  # fmt: skip
    except NOT_RUNNING as error:
      said = _said(method, plan.name, error)
      if skip:
        session.write('skipped', problem=plan.name, method=method, reason=said)
        print(said, file=sys.stderr)
        continue
      raise flags.UserError(said) from error
    if after is not None:
      after(method, choice, found[-1].state)
    ends = last(session.rows, plan.label(method))
    first = first or ends
    row = {
      'problem': plan.name,
      'method': method,
      'variant': choice.variant,
      'learning_rate': choice.found.rate if choice.entry.tuned else None,
      'inner_lr': choice.inner_lr,
      'edge': choice.found.edge,
      'tuning': choice.found.values[choice.found.rate],
      **verdicts.summary(
        ends,
        first,
        'value',
        more=plan.problem.more,
        small=verdicts.rounding(session.rows, plan.label(method), 'value'),
      ),
      'reached': float(np.median([end['reached'] for end in ends])),
      'updates': int(np.median([end['updates'] for end in ends])),
      'calls': float(np.median([end['calls'] for end in ends])),
      'seconds': float(np.median([end['seconds'] for end in ends])),
    }
    if first is ends:
      row['verdict'] = '-'
    for name in plan.problem.reported:
      row |= verdicts.spread(ends, name)
    session.write('summary', **row)
    rows.append(row)
  return rows


def check_methods(
  problem: Problem, methods: Sequence[str], *, skip: bool = False
) -> None:
  """Raises a `UserError` before work begins for a name that is not known.

  Args:
    problem: The problem.
    methods: The methods.
    skip: Whether one that is known and does not run here is no error.
  """
  for method in methods:
    try:
      problem.entry(method)
    except flags.UserError:
      raise
    except (Exception, SystemExit) as error:  # Of a user's method.
      if not skip:
        raise flags.UserError(_said(method, '', error)) from error
  if len(set(methods)) < len(methods):
    raise flags.UserError(f'--methods={",".join(methods)}: one is there twice')


# How a method says that it does not run on a problem.
NOT_RUNNING = (
  TypeError, ValueError, NotImplementedError, LookupError, AttributeError,
)  # fmt: skip


def _said(method: str, name: str, error: BaseException) -> str:
  problem = name or 'this problem'
  return f'{method} does not run on {problem}: {flags.one_line(error)}'
