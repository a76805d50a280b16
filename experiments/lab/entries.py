"""What is compared, and its runs: a lane for each seed and rate."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import memory
from .session import Session

PIECES, TUNING_PIECES = 20, 5  # Looks at a run.


class Entry(NamedTuple):
  """A method on a problem.

  Attributes:
    start: ``(key, rate, seed, data) -> state``; of a problem with inner rates
      the rate is an array of both.
    step: ``(state, key, rate, data) -> state``.
    calls: Oracle calls of a step in the problem's unit: a number, or ``(state
      before, state after) -> calls`` of the step between.
    tuned: Whether it has a learning rate.
    variants: What is tuned in its place, by name, if it has a search space.
    spent: Oracle calls of the start.
  """

  start: Callable[..., Any]
  step: Callable[..., Any]
  calls: float | Callable[[Any, Any], Any]
  tuned: bool = True
  variants: dict[str, 'Entry'] | None = None
  spent: float = 0.0


class Problem(NamedTuple):
  """What is compared.

  Attributes:
    entry: ``method -> Entry``; raises `flags.UserError` for a name it lacks.
    methods: The default methods.
    learning_rates: The default grid of rates.
    budget: The default budget of calls.
    unit: What a call is.
    measure: ``(state, data) -> dict`` of scalars, at every look; with
      ``tuning``, which rates are picked by, less is better, and ``value``,
      which is reported.
    value: What the value is.
    target: The value that counts as solved, or ``None``.
    more: Whether more of the value is better.
    reported: Other fields of the table.
    look: ``(state, seed) -> dict`` of numbers, on the host, at every look.
    finish: The same, once at the end of what is reported; of tuning too if
      ``measure`` has no ``tuning``.
    data: Arrays that ``start``, ``step`` and ``measure`` are given.
    batched: Whether lanes are computed together, where their steps cost alike;
      else one after the other.
    tables: Length of the block tables in a state, see `Session.run`.
    inner_lrs: Rates of the lower level; each learning rate is tried with all of
      them, and has the one that it likes best.
  """

  entry: Callable[[str], Entry]
  methods: tuple[str, ...]
  learning_rates: tuple[float, ...]
  budget: float
  unit: str
  measure: Callable[..., dict[str, Any]]
  value: str
  target: float | None = None
  more: bool = False
  reported: tuple[str, ...] = ()
  look: Callable[..., dict[str, Any]] | None = None
  finish: Callable[..., dict[str, Any]] | None = None
  data: Any = None
  batched: bool = False
  tables: int | None = None
  inner_lrs: tuple[float, ...] = ()


class Plan(NamedTuple):
  """How a problem is studied.

  Attributes:
    name: The problem's name, in the record; empty if there is but one.
    problem: The problem.
    budget: Oracle calls of a run.
    learning_rates: Where the grid begins; one alone is not tuned.
    seeds: Number of reported seeds.
    tuning_seeds: Number of seeds that pick the rates; 0 takes defaults.
    target: What counts as solved, or ``None``.
    pieces: Looks at a run.
    stop: Given the rows of a look, whether to end there; a longer budget, with
      as many more looks, then goes on.
    held: The problem that rates are picked on, if that is another one.
  """

  name: str
  problem: Problem
  budget: float
  learning_rates: tuple[float, ...]
  seeds: int
  tuning_seeds: int
  target: float | None = None
  pieces: int = PIECES
  stop: Callable[[list[dict]], bool] | None = None
  held: Problem | None = None

  def label(self, method: str) -> str:
    """A method's name in the record."""
    return f'{self.name}: {method}' if self.name else method


class Lane(NamedTuple):
  """One seed at one rate."""

  state: Any
  key: jax.Array
  rate: jax.Array
  steps: jax.Array
  calls: jax.Array
  reached: jax.Array  # Calls at the first look at or below the target.
  values: dict[str, jax.Array]  # At the last look.


class Program(NamedTuple):
  """A method's functions of lanes: compiled once for tuning and for report."""

  start: Callable[..., Any]  # (seeds, rates, data)
  advance: Callable[..., Any]  # ((budget done, of a piece, lanes), data)


def program(plan: Plan, entry: Entry) -> Program:
  """The functions that start lanes, and advance them from look to look."""
  problem, calls = plan.problem, entry.calls
  sign = -1.0 if problem.more else 1.0
  target = -np.inf if plan.target is None else sign * plan.target
  together = problem.batched and not callable(calls)

  def each(function, *lanes):
    if together:
      return jax.vmap(function)(*lanes)
    # One after the other: each takes as many steps as it needs, and not all
    # functions can be batched.
    return jax.lax.map(lambda lane: function(*lane), lanes)

  def look(lane, data):
    values = problem.measure(lane.state, data)
    value = sign * jnp.asarray(values.get('value', jnp.inf), float)
    now = (value <= target) & jnp.isinf(lane.reached)
    reached = jnp.where(now, lane.calls, lane.reached)
    return lane._replace(values=values, reached=reached)

  def start(seeds, rates, data=None):
    def one(seed, rate):
      start_key, key = jax.random.split(jax.random.key(seed))
      state = entry.start(start_key, rate, seed, data)
      # Floats: calls of a step may be an average.
      spent, infinite = (
        jnp.full((), number, float) for number in (entry.spent, jnp.inf)
      )
      zero = jnp.zeros((), jnp.int32)
      return look(Lane(state, key, rate, zero, spent, infinite, {}), data)

    return each(one, seeds, rates)

  def step(lane, data):
    key = jax.random.fold_in(lane.key, lane.steps)
    state = entry.step(lane.state, key, lane.rate, data)
    cost = calls(lane.state, state) if callable(calls) else calls
    # What stands still asks for nothing: a step costs a call at least, or the
    # lane would never come to its end.
    if callable(calls):
      cost = jnp.maximum(cost, 1)
    total = jnp.asarray(lane.calls + cost, lane.calls.dtype)
    return lane._replace(state=state, steps=lane.steps + 1, calls=total)

  def advance(carry, data=None):
    done, piece, lanes = carry
    due = done + piece
    if callable(calls):
      run = lambda lane: jax.lax.while_loop(
        lambda lane: lane.calls < due, lambda lane: step(lane, data), lane
      )
    else:
      # The same for all lanes.
      until = jnp.ceil((due - entry.spent) / calls - 1e-3).astype(jnp.int32)
      count = jnp.maximum(until - lanes.steps[0], 0)
      run = lambda lane: jax.lax.fori_loop(
        0, count, lambda _, lane: step(lane, data), lane
      )
    return due, piece, each(lambda lane: look(run(lane), data), lanes)

  # It runs once: what it takes is to compile it.
  quickly = {'xla_backend_optimization_level': 0}
  return Program(jax.jit(start, compiler_options=quickly), advance)


def steps_of(budget: float, calls: float, spent: float = 0.0) -> int:
  """Steps of constant cost that a budget allows: where a schedule ends."""
  return max(1, math.ceil((budget - spent) / calls - 1e-3))


def run(
  session: Session,
  plan: Plan,
  program: Program,
  label: str,
  lanes: list[tuple[int, Any]],
  *,
  reported: bool = False,
  keep_state: bool = False,
  **fields: Any,
) -> Any:
  """Runs lanes to the budget, and records them.

  Args:
    session: The open session.
    plan: The plan.
    program: The method's.
    label: Its name in the record.
    lanes: Pairs of a seed and its rates.
    reported: Whether these are the runs that are reported.
    keep_state: See `Session.run`.
    **fields: More fields of its rows.

  Returns:
    What `Session.run` returns.
  """
  problem = plan.problem
  seeds = tuple(seed for seed, _ in lanes)
  rates = np.array([rate for _, rate in lanes])

  def evaluate(carry):
    done, piece, lanes = carry
    values = jax.device_get(lanes.values)
    # Budgets are sums of pieces, and may miss it by their rounding.
    ended = done + piece / 2 > plan.budget
    looks = [problem.look]
    if ended and (reported or 'tuning' not in values):
      looks.append(problem.finish)
    for look in filter(None, looks):
      found = [
        look(jax.tree.map(lambda leaf, i=i: leaf[i], lanes.state), s)
        for i, s in enumerate(seeds)
      ]
      values |= {
        name: np.array([each[name] for each in found]) for name in found[0]
      }
    counts = jax.device_get({
      'updates': lanes.steps, 'calls': lanes.calls, 'reached': lanes.reached,
    })  # fmt: skip
    used = {'learning_rate': rates}
    if rates.ndim > 1:
      used = {'learning_rate': rates[:, 0], 'inner_lr': rates[:, 1]}
    return {**counts, **used, **values}

  data = () if problem.data is None else (problem.data,)
  arguments = jnp.asarray(seeds), jnp.asarray(rates, float), *data
  # Before a piece and after it.
  states = 2 * memory.size(jax.eval_shape(program.start, *arguments))
  memory.check(f'{label}: states of {len(seeds)} seeds and rates', states)
  pieces = plan.pieces if reported else min(plan.pieces, TUNING_PIECES)
  if plan.name:
    fields['problem'] = plan.name

  def begin():
    piece = jnp.full((), plan.budget / pieces)
    return jnp.zeros(()), piece, program.start(*arguments)

  # Nobody keeps the first state, which may be large.
  return session.run(
    label, begin(), program.advance, evaluate, steps=pieces, seeds=seeds,
    data=problem.data, tables=problem.tables, keep_state=keep_state,
    stop=plan.stop, prefix=plan.stop is not None, **fields,
  )  # fmt: skip
