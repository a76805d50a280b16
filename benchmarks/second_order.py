"""A small transformer by GNS-Newton and by Adam: full batches and small ones.

The model reads characters of the Python reference (two layers of width 32, 30
thousand parameters). Full batches are always the same 32 windows of 24
characters; small ones are 32 fresh windows of 4,096. The curvature is the
Gauss-Newton matrix by products, on all of a batch or on a quarter of it, and
there with a preconditioner too. A value with gradient of the batch counts 1, a
product 4/3 of it (a jvp and a vjp are linear parts of two gradients without
their values), a quarter of that where it sees a quarter; all methods end at the
same count. ``loss`` is that of the 32 windows, for small batches that of 256
windows of the training part: at the end of the count, and when the quickest
method's CPU time is spent. The rate of Adam is picked by a seed that is used
for nothing else; GNS-Newton takes at most ten products a step. Shown are the
means of two other seeds.

  python -m benchmarks second_order
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.problems import characters
import optlab
from optlab import newton

LENGTH, ROWS, WATCHED, TRAIN = 24, 32, 256, 4096
BUDGET = 100.0
PRODUCT = 4 / 3
TUNING, SEEDS = (0,), (1, 2)
RATES = (0.001, 0.003, 0.01, 0.03)
PRODUCTS = (10,)
# The rows of the curvature.
METHODS = {
  'adam': 0,
  'gns': ROWS,
  'gns, a quarter': ROWS // 4,
  'gns, a quarter, preconditioned': ROWS // 4,
}


@functools.cache
def problem():
  """The model, and windows to train on."""
  text = characters.load('', LENGTH, 64)
  size = len(text.alphabet) + 1
  model = characters.model(size, LENGTH, 32, 2, 2, 0.0)
  return model, jnp.asarray(text.train[:TRAIN])


def mean_loss(params, rows):
  return jnp.mean(problem()[0].losses(params, rows))


def outputs(params, rows):
  return problem()[0].logits(params, rows[:, :-1])


def cross_entropy(logits, rows):
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
  )


@functools.cache
def adam():
  """A step ``(state, rows, rate) -> state``, and the first state."""
  estimator = optlab.value_and_grad(mean_loss)

  def step(state, rows, rate):
    return optlab.train_step(estimator, optax.adam(rate))(state, rows)[0]

  return jax.jit(step), lambda p: optlab.init(p, estimator, optax.adam(0.1))


@functools.cache
def gns(method, products, fresh):
  """The same; where batches are fresh, their curvature is crude."""
  factory = optlab.gauss_newton(outputs, cross_entropy)
  estimator = optlab.with_curvature(
    optlab.value_and_grad(mean_loss),
    lambda params, rows: factory(params, rows[: METHODS[method]]),
  )
  solver = newton.multishift_cg(max_steps=products)
  if method.endswith('preconditioned'):
    signs = newton.row_norms(jax.random.key(9), samples=2, rounds=1)
    solver = optlab.cg(products, preconditioner=signs)
  rule = newton.measured() if fresh else newton.adaptive()
  tx = optlab.gns_newton(solver, rule=rule)
  step = optlab.train_step(estimator, tx)
  return (
    jax.jit(lambda state, rows, _: step(state, rows)[0]),
    lambda params: optlab.init(params, estimator, tx),
  )


def run(method: str, fresh: bool, setting: float, seed: int) -> np.ndarray:
  """Counts, CPU seconds and losses of a run, a row a step."""
  model, train = problem()
  step, first = adam() if method == 'adam' else gns(method, setting, fresh)
  key = jax.random.key(seed)
  state = first(model.start(key))
  watched = train[: WATCHED if fresh else ROWS]
  jax.block_until_ready(step(state, train[:ROWS], setting))  # Compiles.
  count, seconds, trace = 0.0, 0.0, []
  while count < BUDGET:
    rows = train[:ROWS]
    if fresh:
      chosen = jax.random.fold_in(key, len(trace))
      rows = train[jax.random.randint(chosen, (ROWS,), 0, TRAIN)]
    began = time.process_time()
    state = jax.block_until_ready(step(state, rows, setting))
    seconds += time.process_time() - began
    # The first value and gradient of a batch, which a trial leaves to the next
    # step where that has the same.
    count = float(len(trace) + 1 if fresh or method == 'adam' else 1)
    if method != 'adam':
      info = state.opt_state.info
      part = PRODUCT * METHODS[method] / ROWS
      count += float(info.total_trials + part * info.total_products)
    trace.append((count, seconds, float(_loss(state.params, watched))))
  return np.array(trace)


_loss = jax.jit(mean_loss)


def pick(method: str, fresh: bool) -> float:
  """The setting with the lowest loss on the tuning seed."""
  settings = RATES if method == 'adam' else PRODUCTS
  ends = {s: run(method, fresh, s, TUNING[0])[-1, 2] for s in settings}
  return min(ends, key=lambda s: (not np.isfinite(ends[s]), ends[s]))


def table(fresh: bool) -> None:
  """Prints the lines of full batches, or of fresh ones."""
  runs = {}
  for method in METHODS:
    setting = pick(method, fresh)
    runs[method] = setting, [run(method, fresh, setting, s) for s in SEEDS]
  limit = min(trace[-1, 1] for _, traces in runs.values() for trace in traces)
  for method, (setting, traces) in runs.items():
    inside = [max(1, np.sum(trace[:, 1] <= limit)) for trace in traces]
    values = (
      int(np.mean([len(trace) for trace in traces])),
      np.mean([trace[-1, 1] for trace in traces]),
      np.mean([trace[-1, 2] for trace in traces]),
      np.mean([t[n - 1, 2] for t, n in zip(traces, inside, strict=True)]),
    )
    name = f'{"small" if fresh else "full"}: {method}'
    text = '{:7}{:8.1f}{:9.4f}{:9.4f}'.format(*values)
    print(f'{name:38}{setting:8}{text}', flush=True)


def main() -> None:
  """Prints the table."""
  print(
    f'{"":38}{"setting":>8}{"steps":>7}{"CPU s":>8}{"loss":>9}{"in time":>9}'
  )
  for fresh in (False, True):
    table(fresh)


if __name__ == '__main__':
  main()
