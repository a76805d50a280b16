"""GNS-Newton beside its peers on one smooth problem: the shared main.

Every solver minimizes the identical objective from the same start until f - f*
is at most the tolerance. Optimizers that are optax transformations run twice:
step by step, for the record's trajectories, and in one compiled loop, whose
wall time the table shows.
"""

from collections.abc import Callable, Sequence
import dataclasses
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab

from ..methods import newton as methods
from ..problems import data as data_lib
from ..problems import smooth
from . import devices
from . import flags
from . import plots
from . import sklearn_solvers
from . import study
from . import tables
from .session import Session

_TIMED_RUNS = 3
_MAX_TIMED_RUNS = 21  # Of a compiled loop, a median that other work spares.
_LONG = 1.0  # Seconds after which no further run is timed.


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags of the three programs."""

  MINUTES = (1, 1)

  curvature: tuple[str, ...] = flags.flag(
    methods.CURVATURES,
    'Curvatures of gns and gns_paper.',
    choices=methods.CURVATURES,
  )
  f_tol: float = flags.flag(1e-8, 'Stop at f - f* <= f_tol.', low=0.0)
  max_steps: int = flags.flag(
    1000, 'The most steps of a solver.', low=1, grows=True
  )


@dataclasses.dataclass(frozen=True)
class RegressionConfig(Config):
  """Flags of logistic and softmax regression."""

  dataset: str = flags.flag(
    'mushrooms',
    'mushrooms, breast_cancer, digits, mnist in data_dir, a LIBSVM or IDX file'
    ' by path or by name in data_dir, or openml:NAME.',
  )
  data_dir: str = flags.flag('', 'Folder with data files.')
  l2: float | None = flags.flag(
    None, 'Weight of |x|^2 / 2; 1 / rows if not given.', low=1e-12
  )
  optimizers: tuple[str, ...] = flags.flag(
    tuple(name for name in methods.OPTIMIZERS if name != 'gns_paper'),
    'Solvers.',
    choices=methods.OPTIMIZERS,
  )


class State(NamedTuple):
  """A trajectory, with the oracle calls so far (int32 scalars)."""

  params: Any
  opt_state: Any
  trials: jax.Array
  gradients: jax.Array
  products: jax.Array
  solves: jax.Array


COUNTS = ('trials', 'gradients', 'products', 'solves')


def _minimize(
  problem: smooth.Problem, method: methods.Method, params, data, **kwargs
) -> optlab.MinimizeResult:
  curvature = None
  if method.curvature is not None:
    factory = method.curvature.factory
    curvature = lambda params: factory(params, data)
  return optlab.minimize(
    lambda params: problem.fun(params, data), params, method.tx,
    curvature=curvature, **kwargs,
  )  # fmt: skip


def _entry(
  problem: smooth.Problem, method: methods.Method, starts: jax.Array
) -> study.Entry:
  """A method of the study; a call is a step, and what it cost is kept."""
  tx = optax.with_extra_args_support(method.tx)

  def start(key, rate, seed, data):
    del key, rate, data
    params = starts[seed]
    zero = jnp.zeros((), jnp.int32)
    return State(params, tx.init(params), zero, zero + 1, zero, zero)

  def step(state, key, rate, data):
    del key, rate
    fun, extras = lambda params: problem.fun(params, data), {}
    if method.curvature is not None:
      extras['curvature'] = method.curvature.factory(state.params, data)
    # Of an accepted trial: a step costs what is counted, and no start anew.
    value, grad = optax.value_and_grad_from_state(fun)(
      state.params, state=state.opt_state
    )
    updates, opt_state = tx.update(
      grad, state.opt_state, state.params, value=value, grad=grad,
      value_fn=fun, **extras,
    )  # fmt: skip
    trials, gradients = method.evaluations(opt_state)
    products, solves = jnp.int32(0), jnp.int32(0)
    if method.curvature is not None:
      total = lambda opt_state: optax.tree.get(opt_state, 'total_products')
      counted = total(opt_state) - total(state.opt_state)
      products = counted + method.curvature.columns
      solves = optax.tree.get(opt_state, 'solves')
    return State(
      optax.apply_updates(state.params, updates), opt_state,
      state.trials + trials, state.gradients + gradients,
      state.products + products, state.solves + solves,
    )  # fmt: skip

  return study.Entry(start, step, 1, tuned=False)


def _suboptimality(problem: smooth.Problem, least: float):
  """``params -> value and f - f*``, in float64 whatever the run's precision."""
  with jax.enable_x64(True):
    wide = smooth.cast(problem, jnp.float64)

  value_and_grad = jax.jit(jax.value_and_grad(problem.fun))

  def evaluate(params) -> dict[str, float]:
    with jax.enable_x64(True):
      value, grad = value_and_grad(
        jnp.asarray(np.asarray(params, np.float64)), wide.data
      )
      return {
        'value': float(value),
        'suboptimality': float(value) - least,
        'grad_norm': float(jnp.linalg.norm(grad)),
      }

  return evaluate


def _time_loop(problem, method, params, target, max_steps):
  """Median seconds of the compiled loop, and seconds to compile it."""

  def loop(params, data, target):
    return _minimize(
      problem, method, params, data, max_steps=max_steps, target_value=target
    )

  began = time.perf_counter()
  compiled = jax.jit(loop).lower(params, problem.data, target).compile()
  compile_seconds = time.perf_counter() - began
  seconds = []
  while len(seconds) < _MAX_TIMED_RUNS and sum(seconds) < _LONG:
    began = time.perf_counter()
    jax.block_until_ready(compiled(params, problem.data, target))
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds), compile_seconds


def _study(problem: smooth.Problem, config: Config, named, evaluate):
  """The problem as one of the study, and how it is studied."""

  def look(state, seed):
    del seed
    calls = state.gradients + state.products
    return evaluate(state.params) | {'calls': calls}

  def stop(rows):
    ended = rows[0]['suboptimality'] <= config.f_tol
    return ended or not np.isfinite(rows[0]['value'])

  dtype = jnp.dtype(config.precision)
  starts = jnp.stack(
    [jnp.asarray(problem.start(seed), dtype) for seed in range(config.seeds)]
  )
  own = study.Problem(
    lambda name: _entry(problem, named[name], starts), tuple(named), (1.0,),
    config.max_steps, 'steps',
    lambda state, _: {name: getattr(state, name) for name in COUNTS},
    'f - f*', look=look, data=problem.data,
  )  # fmt: skip
  return study.Plan(
    '', own, config.max_steps, own.learning_rates, config.seeds, 0,
    pieces=config.max_steps, stop=stop,
  )  # fmt: skip


def _run_optax(session, problem, method, plan, config, seed, least) -> None:
  """Trajectory and time of one optax transformation."""
  program = study.program(plan, plan.problem.entry(method.name))
  lanes = [(seed, 1.0)]
  study.run(
    session, plan, program, method.name, lanes, reported=True,
    show='suboptimality',
  )  # fmt: skip
  last = session.select('eval', method=method.name, seed=seed)[-1]
  if session.select('summary', method=method.name, seed=seed):
    return
  params = jnp.asarray(problem.start(seed), jnp.dtype(config.precision))
  target = jnp.asarray(least + config.f_tol, params.dtype)
  seconds, compile_seconds = _time_loop(
    problem, method, params, target, max(last['step'], 1)
  )
  own = {
    'kind': 'summary',
    'reached': last['suboptimality'] <= config.f_tol,
    'seconds': seconds,
    'seconds_with_compilation': seconds + compile_seconds,
  }
  session.write(
    **{name: value for name, value in last.items() if name not in own},
    **own,
  )


def compare(
  program: str,
  problem: smooth.Problem,
  config: Config,
  optimizers: Sequence[str],
) -> Session:
  """Runs the optimizers on a problem; writes the record, table and picture.

  Args:
    program: The program's name.
    problem: The problem, in float64.
    config: The program's configuration.
    optimizers: Names from `methods.OPTIMIZERS`.

  Returns:
    The session, for its rows.
  """
  cast = smooth.cast(problem, jnp.dtype(config.precision))
  least = smooth.least_value(problem)
  evaluate = _suboptimality(problem, least)
  header = {'problem': problem.name, 'least': least, 'show': 'suboptimality'}
  named = {
    method.name: method
    for method in methods.methods(optimizers, config.curvature, cast)
  }
  plan = _study(cast, config, named, evaluate)
  with Session(program, config, **header) as session:
    for seed in range(config.seeds):
      for method in named.values():
        _run_optax(session, cast, method, plan, config, seed, least)
      for solver in methods.SKLEARN:
        wanted = f'sklearn_{solver.replace("-", "_")}' in optimizers
        if wanted and problem.regression is not None:
          sklearn_solvers.run(session, problem, solver, seed, config, evaluate)
  _report(problem, config, session, least)
  picture = session.folder / 'suboptimality.png'
  plots.draw(
    [('', {'program': problem.name, 'config': {}}, session.rows)],
    picture, x=('calls', 'seconds'), y='suboptimality',
  )  # fmt: skip
  print(f'record:  {session.folder / "record.jsonl"}\npicture: {picture}')
  return session


def _report(problem, config, session, least) -> None:
  columns = (
    'method', 'steps', 'trials', 'grads', 'Hv', 'solves', 'f - f*', 'ms',
    'ms+compile',
  )  # fmt: skip
  summaries = session.select('summary')
  rows = []
  for name in dict.fromkeys(row['method'] for row in summaries):
    chosen = [row for row in summaries if row['method'] == name]
    middle = lambda key, chosen=chosen: float(
      np.median([row[key] for row in chosen])
    )
    reached = all(row['reached'] for row in chosen)
    rows.append([
      name if reached else f'{name} (not reached)',
      *(middle(key) for key in (
        'step', 'trials', 'gradients', 'products', 'solves', 'suboptimality')),
      1e3 * middle('seconds'), 1e3 * middle('seconds_with_compilation'),
    ])  # fmt: skip
  seeds = f', median of {config.seeds} starts' if config.seeds > 1 else ''
  tables.show(
    f'{problem.name}, {config.precision}{seeds}:\nuntil f - f* <='
    f' {config.f_tol:g}, where f* = {least:.10g}',
    columns, rows,
  )  # fmt: skip


def regress(
  program: str,
  make: Callable[[data_lib.Dataset, float], smooth.Problem],
  config: RegressionConfig,
) -> None:
  """Loads the data, and compares the solvers on it.

  Args:
    program: The program's name.
    make: ``(dataset, l2) -> problem``.
    config: The program's configuration.
  """
  dataset = data_lib.load(config.dataset, config.data_dir)
  data_lib.check_range(dataset, config.precision)
  l2 = 1.0 / len(dataset.labels) if config.l2 is None else config.l2
  compare(program, make(dataset, l2), config, config.optimizers)
