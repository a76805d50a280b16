"""Ways to solve the problems of `benchmarks.gns`: tuned recipes, and peers."""

from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from sklearn.linear_model import LogisticRegression

from experiments.problems import smooth
import optlab

GAP = 1e-8
MAX_STEPS = 20_000
SLOW = 3.0  # Seconds of a run, after which no other tolerance is tried.
TOLERANCES = [c * 10.0**-e for e in range(2, 9) for c in (1.0, 0.3)]


class Way(NamedTuple):
  """One way to solve a problem: ``run() -> x``, ready to be timed."""

  name: str
  run: Callable[[], np.ndarray]
  prepare_s: float = 0.0  # Compiling.
  note: str = ''
  run_s: float = 0.0  # The first run, compiling apart.
  x: Any = None  # Where it ended.


def seconds(run):
  """How long it takes, and what it returns."""
  start = time.perf_counter()
  x = run()
  return time.perf_counter() - start, x


def compiled(name, problem, tx, least, factory=None, data=None) -> Way:
  """`minimize` in the compiled loop; data are arguments, not constants."""
  data = problem.data if data is None else data

  @jax.jit
  def solve(data, start):
    return optlab.minimize(
      problem.fun, start, tx, args=(data,), curvature=factory,
      max_steps=MAX_STEPS, target_value=least + 0.999 * GAP,
    )  # fmt: skip

  start = jnp.asarray(problem.start(0))
  prepare_s, ready = seconds(lambda: solve.lower(data, start).compile())
  run_s, run = seconds(lambda: jax.block_until_ready(ready(data, start)))
  counts = run.counts
  note = f'{run.steps} steps, {counts.values} values, {counts.products} Hv'
  params = lambda: np.asarray(ready(data, start).params)
  return Way(name, params, prepare_s, note, run_s, np.asarray(run.params))


def tuned(problem: smooth.Problem, least: float) -> list[Way]:
  """Recipes that a user would have to find, problem by problem."""
  found = []
  factory = problem.curvatures['gauss_newton'].factory
  for name, tx in (
    ('products', optlab.gns_newton(metric=problem.metric)),
    ('products, no metric', optlab.gns_newton()),
    ('products, measured', optlab.gns_newton(rule=optlab.newton.measured())),
    ('products, cg', optlab.gns_newton(optlab.cg())),
  ):
    if problem.metric is not None or name != 'products, no metric':
      found.append(compiled(name, problem, tx, least, factory))
  exact = problem.curvatures['exact']
  if exact.columns:  # The formed matrix without LAPACK and its threads.
    tx = optlab.gns_newton(optlab.lanczos())
    found.append(compiled('matrix, lanczos', problem, tx, least, exact.factory))
  if len(problem.data) > 2:  # Curvature from half of the rows, drawn once.
    features, labels, l2 = problem.regression
    rows = len(labels)
    drawn = np.random.RandomState(0).permutation(rows)[: rows // 2]
    picked = np.sort(drawn)
    half = optlab.sparse_matrix(
      scipy.sparse.csr_matrix(features)[picked], gram=True
    )
    part = half, jnp.asarray(np.asarray(labels, np.float64)[picked])
    loss = lambda u, data: jnp.mean(jax.nn.softplus(-data[1] * u))
    own = optlab.linear_gauss_newton(
      lambda data: data[0], loss, l2, jnp.float32
    )
    data = (*problem.data, part)
    tx = optlab.gns_newton(rule=optlab.newton.measured())
    thinned = lambda x, data: own(x, data[-1])
    found.append(compiled('half the rows', problem, tx, least, thinned, data))
  return found


def lbfgs(problem: smooth.Problem, least: float) -> list[Way]:
  """`optax.lbfgs`, on our products and on the dense data."""
  stores = {'': problem.data}
  if len(problem.data) > 2:
    stores[' dense'] = problem.data[2], problem.data[1]
  return [
    compiled(
      f'lbfgs({memory}){kind}', problem, optax.lbfgs(memory_size=memory),
      least, None, data,
    )
    for kind, data in stores.items()
    for memory in (10, 30)
  ]  # fmt: skip


def sklearn(problem: smooth.Problem, least: float, value) -> list[Way]:
  """Each solver and storage at the loosest tolerance that reaches the gap."""
  features, labels, l2 = problem.regression
  rows = len(labels)
  size = problem.start(0).size
  stores: list[Any] = [features]
  if scipy.sparse.issparse(features) and rows * features.shape[1] < 5e6:
    stores.append(features.toarray())
  found = []
  for solver in ('lbfgs', 'newton-cg', 'newton-cholesky'):
    if solver == 'newton-cholesky' and size > smooth.DENSE_LIMIT:
      continue
    tolerances = list(TOLERANCES)
    for store in stores:
      for tol in tolerances:
        model = LogisticRegression(
          C=1 / (rows * l2), fit_intercept=False, solver=solver, tol=tol,
          max_iter=3000,
        )  # fmt: skip
        run = lambda model=model, store=store: coefficients(
          model.fit(store, labels)
        )
        taken, x = seconds(run)
        if value(x) - least <= GAP:
          kind = 'CSR' if scipy.sparse.issparse(store) else 'dense'
          found.append(
            Way(f'{solver} {kind}', run, 0.0, f'tol {tol:g}', taken, x)
          )
          # The other storage needs about the same tolerance.
          tolerances = [t for t in tolerances if t <= 1.5 * tol]
          break
        if taken > SLOW and found:
          break
  return found


def coefficients(model):
  return model.coef_[0] if len(model.coef_) == 1 else model.coef_.T
