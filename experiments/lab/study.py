"""What every comparison does alike: tuning, lanes, statistics.

A problem makes an `Entry` of a method's name. Each method is tuned on seeds
that are used for nothing else, over one grid of learning rates that goes on
while the best one is at its edge, and over the search space of its own
arguments; and it then runs on the reported seeds, the same for all, to an equal
budget of oracle calls.
"""

from collections.abc import Callable, Iterable, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from . import flags
from . import record
from .session import Session

TUNING_SEED = 10_000
EXTENSIONS = 2  # How often a grid is continued, by its own length.
PIECES = 20  # Evaluations of a run.


class Entry(NamedTuple):
  """A method on a problem.

  Attributes:
    start: ``(key, rate) -> state``.
    step: ``(state, key, rate) -> state``.
    calls: ``(state before, state after) -> calls`` of the step between, in the
      problem's unit.
    tuned: Whether it has a learning rate.
    variants: What is tuned in its place, by name, if it has a search space.
  """

  start: Callable[..., Any]
  step: Callable[..., Any]
  calls: Callable[[Any, Any], Any]
  tuned: bool = True
  variants: dict[str, 'Entry'] | None = None


class Problem(NamedTuple):
  """What is compared.

  Attributes:
    entry: ``method -> Entry``; raises `flags.UserError` for a name it lacks.
    methods: The default methods.
    learning_rates: The default grid of rates.
    budget: The default budget of calls.
    unit: What a call is.
    measure: ``state -> dict`` of scalars: ``tuning``, which rates are picked
      by, and ``value``, which is reported; less is better.
    value: What the value is.
    target: The value that counts as solved, or ``None``.
  """

  entry: Callable[[str], Entry]
  methods: tuple[str, ...]
  learning_rates: tuple[float, ...]
  budget: float
  unit: str
  measure: Callable[[Any], dict[str, jax.Array]]
  value: str
  target: float | None = None


class Plan(NamedTuple):
  """How a problem is studied.

  Attributes:
    name: The problem's name, in the record.
    problem: The problem.
    budget: Oracle calls of a run.
    learning_rates: Where the grid begins; one alone is not tuned.
    seeds: Number of reported seeds.
    tuning_seeds: Number of seeds that pick the rates; 0 takes defaults.
    target: What counts as solved, or ``None``.
  """

  name: str
  problem: Problem
  budget: float
  learning_rates: tuple[float, ...]
  seeds: int
  tuning_seeds: int
  target: float | None


class Lane(NamedTuple):
  """One seed at one rate."""

  state: Any
  key: jax.Array
  rate: jax.Array
  steps: jax.Array
  calls: jax.Array
  least: jax.Array  # The least value so far, at the looks.
  reached: jax.Array  # Calls at the first look at or below the target.


def run(
  session: Session,
  plan: Plan,
  entry: Entry,
  label: str,
  lanes: list[tuple[int, float]],
  **fields: Any,
) -> list[dict]:
  """Runs lanes of (seed, rate) to the budget; their last rows.

  Args:
    session: The open session.
    plan: The plan.
    entry: The method.
    label: Its name in the record.
    lanes: Pairs of a seed and a rate.
    **fields: More fields of its rows.

  Returns:
    The last row of each lane.
  """
  seeds = tuple(seed for seed, _ in lanes)
  rates = np.array([rate for _, rate in lanes])
  target = -np.inf if plan.target is None else plan.target

  def look(lane, values):
    value = jnp.asarray(values['value'], lane.least.dtype)
    now = (value <= target) & jnp.isinf(lane.reached)
    return lane._replace(
      least=jnp.fmin(lane.least, value),
      reached=jnp.where(now, lane.calls, lane.reached),
    )

  def start(seed, rate):
    start_key, key = jax.random.split(jax.random.key(seed))
    state = entry.start(start_key, rate)
    zero, infinite = jnp.zeros(()), jnp.full((), jnp.inf)
    lane = Lane(
      state, key, rate, jnp.zeros((), jnp.int32), zero, infinite, infinite
    )
    return look(lane, plan.problem.measure(state))

  def advance_lane(lane, due):
    def step(lane):
      key = jax.random.fold_in(lane.key, lane.steps)
      state = entry.step(lane.state, key, lane.rate)
      calls = lane.calls + entry.calls(lane.state, state)
      calls = jnp.asarray(calls, lane.calls.dtype)
      return lane._replace(state=state, steps=lane.steps + 1, calls=calls)

    # A step that costs nothing, as of a method that stands still, is one call.
    def at_least_one(lane):
      new = step(lane)
      return new._replace(calls=jnp.maximum(new.calls, lane.calls + 1e-3))

    lane = jax.lax.while_loop(lambda lane: lane.calls < due, at_least_one, lane)
    return look(lane, plan.problem.measure(lane.state))

  def advance(carry):
    piece, lanes = carry
    due = (piece + 1) * (plan.budget / PIECES)
    # One lane after the other: each takes as many steps as it needs.
    return piece + 1, jax.lax.map(lambda lane: advance_lane(lane, due), lanes)

  measure = jax.jit(lambda states: jax.lax.map(plan.problem.measure, states))

  def evaluate(carry):
    lanes = carry[1]
    values = jax.device_get(measure(lanes.state))
    counts = jax.device_get({
      'updates': lanes.steps, 'calls': lanes.calls, 'reached': lanes.reached,
    })  # fmt: skip
    return {**values, **counts, 'learning_rate': rates}

  # Also the start one after the other: not all functions can be batched.
  begin = jax.jit(lambda *args: jax.lax.map(lambda lane: start(*lane), args))(
    jnp.asarray(seeds), jnp.asarray(rates, float)
  )
  session.run(
    label, (jnp.zeros(()), begin), advance, evaluate, steps=PIECES,
    seeds=seeds, problem=plan.name, **fields,
  )  # fmt: skip
  return last(session.rows, label)


def last(rows: Iterable[dict], method: str) -> list[dict]:
  """The rows of a method's last evaluation."""
  found = record.select(rows, 'eval', method=method)
  step = max((row['step'] for row in found), default=0)
  return [row for row in found if row['step'] == step]


def continued(rates: list[float], best: float, count: int) -> list[float]:
  """So many rates beyond the edge that ``best`` is at; none if it is inside."""
  if len(rates) < 2 or best not in (rates[0], rates[-1]):
    return []
  edge, inside = rates[:2] if best == rates[0] else rates[:-3:-1]
  # Three digits, so that powers of ten and the like stay what they are.
  return [
    float(f'{edge * (edge / inside) ** k:.3g}') for k in range(1, count + 1)
  ]


class Found(NamedTuple):
  """What a search found.

  Attributes:
    rate: The best rate.
    values: The median value of each rate, by rate, sorted.
    edge: Whether it is at an edge of all that were tried.
  """

  rate: float
  values: dict[float, float]
  edge: bool


def search(
  rates: Sequence[float],
  measure: Callable[[list[float], int], Iterable[tuple[float, float]]],
) -> Found:
  """The rate of the least value, of a grid that goes on past its edges.

  Args:
    rates: The first grid.
    measure: ``(rates, number of the grid) -> pairs`` of a rate and a value, one
      for each tuning seed. What is not a number counts as infinite.

  Returns:
    `Found`, by medians over the seeds; of equal ones the least rate.
  """
  tried: dict[float, list[float]] = {}
  best, new = rates[0], sorted(rates)
  medians: dict[float, float] = {}
  for grid in range(1 + EXTENSIONS):
    for rate, value in measure(new, grid):
      tried.setdefault(rate, []).append(
        math.inf if math.isnan(value) else value
      )
    medians = {rate: float(np.median(tried[rate])) for rate in sorted(tried)}
    best = min(medians, key=lambda rate: medians[rate])
    new = continued(list(medians), best, len(rates))
    if not new:
      break
  edge = len(medians) > 1 and best in (min(medians), max(medians))
  return Found(best, medians, edge)


class Choice(NamedTuple):
  """What tuning found: a variant of a method, and its learning rate."""

  variant: str
  entry: Entry
  rate: float
  value: float
  edge: bool


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
  variants = entry.variants or {method: entry}
  found = [
    _tune_rate(session, plan, name, variant)
    for name, variant in variants.items()
  ]
  return min(found, key=lambda choice: choice.value)


def _tune_rate(session, plan: Plan, name: str, entry: Entry) -> Choice:
  rates = sorted(plan.learning_rates) if entry.tuned else [1.0]
  if plan.tuning_seeds == 0:
    return Choice(name, entry, rates[0], 0.0, False)

  def measure(new, grid):
    label = f'{plan.name}: {name}: tuning, grid {grid}'
    # A run for each seed: with as many rates as seeds in the runs that are
    # reported, nothing is compiled for them again.
    for seed in range(TUNING_SEED, TUNING_SEED + plan.tuning_seeds):
      lanes = [(seed, rate) for rate in new]
      run(session, plan, entry, label, lanes, algorithm=name)
    rows = last(session.rows, label)
    return [(row['learning_rate'], row['tuning']) for row in rows]

  found = search(rates, measure)
  return Choice(name, entry, found.rate, found.values[found.rate], found.edge)


class Paired(NamedTuple):
  """Differences within the seeds: their mean, an interval, and what it says.

  A tie is an interval that holds zero, and no proof that the two are equal.
  """

  mean: float
  low: float
  high: float
  said: str


def paired(differences: Sequence[float] | np.ndarray) -> Paired:
  """The mean of differences with its 95 % interval, by Student's t.

  Args:
    differences: Of a method from the first one, by seed; more is worse.

  Returns:
    `Paired`, which says ``better``, ``worse`` or ``tie``, and nothing of fewer
    than two seeds or of numbers that are not finite.
  """
  values = np.asarray(differences, float)
  if len(values) < 2 or not np.all(np.isfinite(values)):
    mean = float(np.mean(values)) if len(values) else math.nan
    return Paired(mean, math.nan, math.nan, '-')
  mean = float(np.mean(values))
  error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
  half = float(stats.t.ppf(0.975, len(values) - 1)) * error
  low, high = mean - half, mean + half
  # What is below the rounding of the values is no difference.
  small = 1e-12 * float(np.max(np.abs(values), initial=0.0))
  said = 'worse' if low > small else 'better' if high < -small else 'tie'
  return Paired(mean, low, high, said)


def study(session: Session, plan: Plan, methods: Sequence[str]) -> list[dict]:
  """Tunes and runs every method on a problem.

  Args:
    session: The open session.
    plan: The plan.
    methods: The methods; the first is the one that others are compared with.

  Returns:
    A summary row a method, which is in the record too.
  """
  reference: np.ndarray | None = None
  rows = []
  for method in methods:
    try:
      choice = tune(session, plan, method)
      lanes = [(seed, choice.rate) for seed in range(plan.seeds)]
      label = f'{plan.name}: {method}'
      ends = run(session, plan, choice.entry, label, lanes, algorithm=method)
    except (TypeError, ValueError, NotImplementedError) as error:
      reason = ' '.join(str(error).split())[:300]
      raise flags.UserError(
        f'{method} does not run on {plan.name}: {reason}'
      ) from error
    values = np.array([row['value'] for row in ends])
    values[np.isnan(values)] = np.inf
    reference = values if reference is None else reference
    with np.errstate(invalid='ignore'):
      gaps = paired(values - reference)
    reached = np.array([row['reached'] for row in ends])
    row = {
      'problem': plan.name,
      'method': method,
      'variant': choice.variant,
      'learning_rate': choice.rate if choice.entry.tuned else None,
      'edge': choice.edge,
      'median': float(np.median(values)),
      'low': float(np.min(values)),
      'high': float(np.max(values)),
      'gap': gaps.mean,
      'gap_low': gaps.low,
      'gap_high': gaps.high,
      'verdict': '-' if method == methods[0] else gaps.said,
      'wins': int(np.sum(values < reference)),
      'losses': int(np.sum(values > reference)),
      'reached': float(np.median(reached)),
      'reached_share': float(np.mean(np.isfinite(reached))),
      'updates': int(np.median([row['updates'] for row in ends])),
      'calls': float(np.median([row['calls'] for row in ends])),
    }
    session.write('summary', **row)
    rows.append(row)
  return rows


def profile(
  rows: Iterable[dict], methods: Sequence[str]
) -> dict[str, np.ndarray]:
  """How many times the calls of the best a method takes to the target.

  Args:
    rows: Summary rows of several problems.
    methods: The methods.

  Returns:
    By method one ratio a problem, at least 1, sorted; infinite where it does
    not get there. The share of those below tau is its performance profile
    (Dolan and More, 2002).
  """
  calls: dict[str, dict[str, float]] = {}
  for row in rows:
    calls.setdefault(row['problem'], {})[row['method']] = row['reached']
  found: dict[str, list[float]] = {method: [] for method in methods}
  for by_method in calls.values():
    best = min(by_method.values())
    for method in methods:
      own = by_method.get(method, math.inf)
      solved = math.isfinite(own) and math.isfinite(best)
      # A start that is at the target already took nothing.
      found[method].append(
        max(own, 1.0) / max(best, 1.0) if solved else math.inf
      )
  return {method: np.sort(ratios) for method, ratios in found.items()}


def check_methods(problem: Problem, methods: Sequence[str]) -> None:
  """Raises a `UserError` before work begins for a name that is not known."""
  for method in methods:
    problem.entry(method)
  if len(set(methods)) < len(methods):
    raise flags.UserError(f'--methods={",".join(methods)}: one is there twice')
