r"""GNS-Newton, as it is by default, against scikit-learn and `optax.lbfgs`.

The problems are those of the demo (`experiments.problems`) with the recipe of
its row ``gns, exact``, the same on every one of them. Recipes tuned for a
problem, the fastest of a few, stand in rows of their own, and so does the
fastest way of each peer: scikit-learn's three solvers with the loosest
tolerance that suffices, dense or CSR; lbfgs with a memory of 10 or 30, on the
dense data or on our products. All minimize the same objective in float64 from
the same start to ``f - f* <= 1e-8``, which is checked. Runs are interleaved,
one of each in a round, and ratios are those of one round: their median, other's
time / ours. Compiling is left out and shown apart.

    OPTLAB_DATA=FOLDER python -m benchmarks gns

``FOLDER`` holds MNIST and the LIBSVM files a8a and w8a; without it they are
left out. ``OPTLAB_BENCH=mushrooms,digits`` picks problems; ``lse`` is the
paper's LogSumExp with 1,000 unknowns, whose runs take many seconds each: two of
a way that is shown, one of the others.
"""

from collections.abc import Callable
import os
import statistics
import sys
import time
import warnings

import jax
import jax.numpy as jnp
from sklearn.exceptions import ConvergenceWarning

from benchmarks import _gns_ways as ways
from experiments.methods import newton as methods
from experiments.problems import data as data_lib
from experiments.problems import regressions
from experiments.problems import smooth

ROUNDS = 11
ENOUGH = 8.0  # Seconds of timed runs, after which no further round begins.
ROWS = 10_000  # Of MNIST.
# Name -> data set, ridge (None is 1 / rows), whether it is in OPTLAB_DATA.
REGRESSIONS = {
  'mushrooms': ('mushrooms', None, False),
  'mushrooms, 1e-6': ('mushrooms', 1e-6, False),
  'breast_cancer': ('breast_cancer', None, False),
  'breast_cancer, 1e-6': ('breast_cancer', 1e-6, False),
  'digits': ('digits', None, False),
  'digits, 1e-6': ('digits', 1e-6, False),
  'a8a': ('a8a_training', None, True),
  'a8a, 1e-6': ('a8a_training', 1e-6, True),
  'w8a': ('w8a_training', None, True),
  'w8a, 1e-6': ('w8a_training', 1e-6, True),
  'mnist': ('mnist', None, True),
}


def regression(name: str, folder: str) -> smooth.Problem:
  """A problem of the demo."""
  source, l2, _ = REGRESSIONS[name]
  dataset = data_lib.load(source, folder)
  if len(dataset.labels) > ROWS and source == 'mnist':
    dataset = dataset._replace(
      features=dataset.features[:ROWS], labels=dataset.labels[:ROWS]
    )
  make = (
    regressions.logistic if len(dataset.classes) == 2 else (regressions.softmax)
  )
  return make(dataset, 1.0 / len(dataset.labels) if l2 is None else l2)


PROBLEMS = {
  'lse': lambda: smooth.log_sum_exp(1000, 1000),
  'chebyshev': lambda: smooth.equations('chebyshev', 4, 1000),
}


def timed_in_turn(found: dict[str, ways.Way], rounds: int):
  """The seconds of each way, which run in turn, by name."""
  times = {name: [] for name in found}
  began = time.perf_counter()
  for turn in range(rounds):
    if turn and time.perf_counter() - began > ENOUGH:
      break
    for name, way in found.items():
      # The threads of BLAS spin for a while after a call, on cores that the
      # next one needs; after the pause, runs warm caches and clock.
      time.sleep(0.1)
      warm = time.perf_counter() + 0.05
      if way.run_s < 1.0 and (
        turn == 0 or statistics.median(times[name]) < 0.05
      ):
        way.run()
        while time.perf_counter() < warm:
          way.run()
      times[name].append(ways.seconds(way.run)[0])
  return times


def fastest(found: list[ways.Way]) -> ways.Way:
  """The one with the least median time, of runs of seconds that of one."""
  first = min(found, key=lambda way: way.run_s)
  if first.run_s > ways.SLOW:
    return first
  by_name = {way.name: way for way in found if way.run_s <= 3 * first.run_s}
  times = timed_in_turn(by_name, 3)
  return by_name[min(times, key=lambda name: statistics.median(times[name]))]


def measure(name: str, problem: smooth.Problem) -> list[tuple[float, str]]:
  """Rows ``(ratio, text)`` of the table, after the rounds of one problem."""
  problem = smooth.cast(problem, jnp.float64)
  least = smooth.least_value(problem)
  fun = jax.jit(problem.fun)
  value = lambda x: float(fun(jnp.asarray(x), problem.data))
  (default,) = methods.methods(('gns',), ('exact',), problem)
  assert default.curvature is not None
  ours = ways.compiled(
    'default', problem, default.tx, least, default.curvature.factory
  )
  peers = {'optax.lbfgs': ways.lbfgs(problem, least)}
  if problem.regression is not None:
    peers['scikit-learn'] = ways.sklearn(problem, least, value)
  peers['ours, tuned'] = ways.tuned(problem, least)
  gap = lambda way: value(way.x) - least
  chosen = {}
  for kind, found in peers.items():
    # One that ends before it is there is timed where no other gets there.
    there = [way for way in found if gap(way) <= 1.001 * ways.GAP]
    chosen[kind] = fastest(there or found)
  contenders = {'ours': ours, **chosen}
  gaps = {kind: gap(way) for kind, way in contenders.items()}
  times = timed_in_turn(contenders, ROUNDS)
  mine = statistics.median(times['ours'])
  rows = []
  for kind, way in chosen.items():
    pairs = zip(times[kind], times['ours'], strict=True)
    ratio = statistics.median(theirs / own for theirs, own in pairs)
    text = (
      f'{name:20} {kind:13} {ratio:7.2f}'
      f' {1e3 * statistics.median(times[kind]):9.1f} {1e3 * mine:8.1f}'
      f' {way.prepare_s:6.2f} {ours.prepare_s:6.2f}  {way.name} {way.note}'
    )
    for who in (kind, 'ours'):
      if not gaps[who] <= 1.001 * ways.GAP:
        text += f' [{who} ends {gaps[who]:.0e} above f*]'
    rows.append((ratio, text))
  # As they come: a problem can take minutes.
  print(f'{name}: ours {ours.note}', file=sys.stderr)
  for _, text in rows:
    print(text, file=sys.stderr, flush=True)
  return rows


def main() -> None:
  """Prints the table, the losing ratios first."""
  warnings.simplefilter('ignore', ConvergenceWarning)
  folder = os.environ.get('OPTLAB_DATA', '')
  cases: dict[str, Callable[[], smooth.Problem]] = {}
  for name, (_, _, needs_folder) in REGRESSIONS.items():
    if folder or not needs_folder:
      cases[name] = lambda name=name: regression(name, folder)
  cases |= PROBLEMS
  if not folder:
    print('OPTLAB_DATA is unset: a8a, w8a and MNIST are left out')
  picked = os.environ.get('OPTLAB_BENCH', '')
  chosen = picked.split(',') if picked else list(cases)
  kind = lambda case: case.split(',')[0]
  unknown = set(chosen) - set(cases)
  if unknown:
    sys.exit(f'error: no problem {unknown}; there are {", ".join(cases)}')
  rows = []
  with jax.enable_x64(True):
    for name, make in cases.items():
      if name in chosen or kind(name) in chosen:
        rows += measure(name, make())
  print(
    f'{"problem":20} {"other":13} {"ratio":>7} {"other ms":>9} {"ours ms":>8}'
    f' {"other":>6} {"ours":>6}  fastest way of the other\n'
    f'{"":60} {"compile, s":>13}'
  )
  for _, text in sorted(rows):
    print(text)


if __name__ == '__main__':
  main()
