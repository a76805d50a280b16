r"""GNS-Newton against the paper's numpy, scikit-learn and `optax.lbfgs`.

Every contender minimizes the same objective in float64 from the same start to
``f - f* <= 1e-8``, checked in numpy. Runs are interleaved, one of each in a
round, and ratios are those of one round: their median, other's time / ours.
Compiling and preparing data (sparse index tables) are left out and shown apart.
Of each peer the fastest way is chosen first: scikit-learn's three solvers with
the loosest tolerance that suffices, dense or CSR; numpy with BLAS on dense data
or SciPy on CSR; lbfgs with a memory of 10 or 30, in the same compiled loop, on
dense data, and in a row of its own on our sparse gathers.

    OPTLAB_DATA=FOLDER python -m benchmarks gns

``FOLDER`` holds the LIBSVM files a8a and w8a; without it they are left out.
``OPTLAB_BENCH=mushrooms,digits`` picks problems.
"""

from collections.abc import Callable
import itertools
import os
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
import scipy.sparse
import scipy.special
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from experiments.problems import data as data_lib
import optlab

GAP = 1e-8
ROUNDS = 11
TOLERANCES = [c * 10.0**-e for e in range(2, 9) for c in (1.0, 0.5, 0.2)]


class Contender(NamedTuple):
  """One way to solve a problem: ``run() -> x``, ready to be timed."""

  name: str
  run: Callable[[], np.ndarray]
  prepare_s: float = 0.0  # Compiling, and building index tables.
  note: str = ''


class Case(NamedTuple):
  """A problem: its objective in numpy, its optimum, and who solves it."""

  name: str
  value: Callable[[np.ndarray], float]
  optimum: float
  ours: Contender
  peers: dict[str, list[Contender]]  # The fastest of each list is timed.


def seconds(run):
  start = time.perf_counter()
  x = run()
  return time.perf_counter() - start, x


def compiled(name, fun, data, start, tx, optimum, curvature=None, setup=0.0):
  """A contender in the compiled loop; data are arguments, not constants."""

  @jax.jit
  def solve(data, start):
    bound = None
    if curvature is not None:
      bound = lambda x: curvature(x, data)
    return optlab.minimize(
      lambda x: fun(x, data),
      start,
      tx,
      max_steps=5000,
      target_value=optimum + 0.999 * GAP,
      curvature=bound,
    )

  taken, run = seconds(lambda: jax.block_until_ready(solve(data, start)))
  counts = [f'{int(run.steps)} steps']
  for field in ('total_trials', 'total_products'):
    count = optax.tree.get(run.opt_state, field, None)
    if count is not None:
      counts.append(f'{int(count)} {field.removeprefix("total_")}')
  return Contender(
    name,
    lambda: np.asarray(solve(data, start).params),
    taken + setup,
    ', '.join(counts),
  )


# Logistic regression.


def numpy_paper(features, labels, l2, optimum):
  """The paper's method with BLAS and LAPACK, one pass over the data a trial.

  The upper triangle alone is formed and factorized; margins, weights and value
  of the accepted trial are kept, so that no product is made twice.
  """
  m, d = features.shape
  sparse = scipy.sparse.issparse(features)
  columns = features.T.tocsr() if sparse else np.asfortranarray(features)

  def evaluate(x):
    margins = labels * (features @ x)
    small = np.exp(-np.abs(margins))
    value = np.mean(np.maximum(-margins, 0.0) + np.log1p(small))
    wrong = np.where(margins > 0, small, 1.0) / (1.0 + small)
    grad = (features.T @ (-labels * wrong)) / m + l2 * x
    return value + l2 / 2 * (x @ x), grad, wrong

  def hessian(wrong):
    weights = wrong * (1.0 - wrong) / m
    if sparse:
      scaled = columns.copy()
      scaled.data = scaled.data * weights[scaled.indices]
      matrix = (scaled @ features).toarray()
    else:
      root = columns * np.sqrt(weights)[:, None]
      matrix = scipy.linalg.blas.dsyrk(1.0, root, trans=1)
    matrix[np.diag_indices(d)] += l2
    return matrix

  def run():
    x, gamma = np.zeros(d), 1.0
    value, grad, wrong = evaluate(x)
    while value > optimum + GAP:
      matrix = hessian(wrong)
      norm = np.sqrt(grad @ grad)
      for _ in range(40):
        shift = norm / (gamma + 1e-8)
        shifted = matrix.copy(order='F')
        shifted[np.diag_indices(d)] += shift
        factor, bad = scipy.linalg.lapack.dpotrf(shifted, overwrite_a=1)
        if bad == 0:
          new = x - scipy.linalg.lapack.dpotrs(factor, grad)[0]
          new_value, new_grad, new_wrong = evaluate(new)
          if value - new_value >= new_grad @ new_grad / (8 * shift):
            break
        gamma /= 2
      gamma = max(2 * gamma, 1e-9)
      x, value, grad, wrong = new, new_value, new_grad, new_wrong
    return x

  return Contender(f'numpy {"CSR" if sparse else "dense"}', run)


def sklearn_solvers(features, labels, l2, optimum, value):
  """Each solver and storage at the loosest tolerance that reaches the gap."""
  rows = features.shape[0]
  stores = [scipy.sparse.csr_matrix(features)]
  if rows * features.shape[1] < 5e6:
    stores.append(stores[0].toarray())
  found = []
  for solver in ('lbfgs', 'newton-cg', 'newton-cholesky'):
    tolerances = list(TOLERANCES)
    for store in stores:
      for tol in tolerances:
        model = LogisticRegression(
          C=1 / (rows * l2),
          fit_intercept=False,
          solver=solver,
          tol=tol,
          max_iter=3000,
        )
        run = lambda model=model, store=store: coefficients(
          model.fit(store, labels)
        )
        if value(run()) - optimum <= GAP:
          kind = 'CSR' if scipy.sparse.issparse(store) else 'dense'
          found.append(Contender(f'{solver} {kind}', run, note=f'tol {tol:g}'))
          # The other storage needs about the same tolerance.
          tolerances = [t for t in tolerances if t <= 1.5 * tol]
          break
  return found


def coefficients(model):
  return model.coef_[0] if len(model.coef_) == 1 else model.coef_.T


def logistic(name, folder):
  dataset = data_lib.load(name, folder)
  labels = data_lib.signs(dataset)
  features = scipy.sparse.csr_matrix(dataset.features)
  rows, d = features.shape
  l2 = 1.0 / rows

  def value(x):
    margins = labels * (features @ x)
    return np.mean(np.logaddexp(0.0, -margins)) + l2 / 2 * (x @ x)

  def loss(outputs, data):
    return jnp.mean(jax.nn.softplus(-data['labels'] * outputs))

  def fun(x, data):
    return loss(data['features'] @ x, data) + l2 / 2 * jnp.vdot(x, x)

  inputs = lambda data: data['inputs']
  targets = jnp.asarray(labels)
  taken, gathered = seconds(lambda: optlab.sparse_matrix(features, gram=True))
  _, plain = seconds(lambda: optlab.sparse_matrix(features))
  filled = jnp.asarray(features.toarray())
  dense = {
    'features': filled,
    'inputs': filled.astype(jnp.float32),
    'labels': targets,
  }
  sparse = {'features': gathered, 'inputs': gathered, 'labels': targets}
  mixed = {'features': filled, 'inputs': gathered, 'labels': targets}
  start = jnp.zeros(d)
  exact = optlab.linear_gauss_newton(inputs, loss, l2)
  narrow = optlab.linear_gauss_newton(inputs, loss, l2, jnp.float32)
  best = jax.jit(
    lambda data: optlab.minimize(
      lambda x: fun(x, data),
      start,
      optlab.gns_newton(),
      max_steps=60,
      grad_tol=1e-12,
      stall_steps=3,
      curvature=lambda x: exact(x, data),
    )
  )(sparse)
  optimum = min(float(value(np.asarray(best.params))), float(best.value))
  tx = optlab.gns_newton()
  ours = [
    compiled('gram float32', fun, dense, start, tx, optimum, narrow),
    compiled('gathers', fun, sparse, start, tx, optimum, narrow, taken),
    compiled('gathered gram', fun, mixed, start, tx, optimum, narrow, taken),
  ]
  # Curvature from a part of the rows, drawn once; the objective as gathers, or
  # dense where the data stay in the cache.
  order = np.random.RandomState(0).permutation(rows)
  objectives = {'gathers': plain}
  if rows * d < 2e6:
    objectives['dense'] = filled
  for part in (0.6, 0.5, 0.25, 0.125):
    picked = np.sort(order[: int(part * rows)])
    setup, some = seconds(
      lambda picked=picked: optlab.sparse_matrix(features[picked], gram=True)
    )
    thinned = lambda x, data: narrow(x, data['inputs'])
    for (kind, matrix), rule in itertools.product(
      objectives.items(), ('hold', 'measured')
    ):
      data = {
        'features': matrix,
        'inputs': {'inputs': some, 'labels': targets[picked]},
        'labels': targets,
      }
      ours.append(
        compiled(
          f'{kind}, {part:g} of the rows, {rule}',
          fun,
          data,
          start,
          optlab.gns_newton(rule=getattr(optlab.newton, rule)()),
          optimum,
          thinned,
          setup,
        )
      )
  # Products alone, in the norm of the root of the Hessian's diagonal at zero.
  squares = np.asarray(features.multiply(features).mean(axis=0)).ravel()
  metric = jnp.sqrt(jnp.asarray(squares) / 4 + l2)
  hessian = optlab.hessian(fun)
  products = lambda x, data: _narrow(hessian, x, data)
  plain_sparse = {'features': plain, 'labels': targets}
  for kind, solver in (('lanczos', optlab.lanczos(40)), ('cg', optlab.cg())):
    ours.append(
      compiled(
        f'products, {kind}',
        fun,
        plain_sparse,
        start,
        optlab.gns_newton(solver, metric=metric),
        optimum,
        products,
      )
    )
  lbfgs = {
    peer: [
      compiled(
        f'lbfgs({memory})',
        fun,
        {'features': matrix, 'labels': targets},
        start,
        optax.lbfgs(memory_size=memory),
        optimum,
      )
      for memory in (10, 30)
    ]
    for peer, matrix in (
      ('optax.lbfgs', filled),
      ('optax.lbfgs, our gathers', plain),
    )
  }
  return Case(
    name,
    value,
    optimum,
    fastest(ours),
    {
      'numpy, the paper': [
        numpy_paper(features, labels, l2, optimum),
        numpy_paper(features.toarray(), labels, l2, optimum),
      ],
      'scikit-learn': sklearn_solvers(features, labels, l2, optimum, value),
      **lbfgs,
    },
  )


def digits():
  dataset = data_lib.load('digits')
  features, labels = data_lib.dense(dataset), dataset.labels
  rows = len(labels)
  l2 = 1.0 / rows

  def value(x):
    outputs = features @ x
    picked = outputs[np.arange(rows), labels]
    return np.mean(
      scipy.special.logsumexp(outputs, axis=1) - picked
    ) + l2 / 2 * np.vdot(x, x)

  def fun(x, data):
    outputs = data[0] @ x
    picked = jnp.sum(outputs * data[1], axis=1)
    losses = jax.nn.logsumexp(outputs, axis=1) - picked
    return jnp.mean(losses) + l2 / 2 * jnp.vdot(x, x)

  data = jnp.asarray(features), jax.nn.one_hot(labels, 10, dtype=jnp.float64)
  start = jnp.zeros((features.shape[1], 10))
  hessian = optlab.hessian(fun)
  best = jax.jit(
    lambda data: optlab.minimize(
      lambda x: fun(x, data),
      start,
      optlab.gns_newton(optlab.lanczos(400, rtol=1e-6)),
      max_steps=40,
      grad_tol=1e-11,
      stall_steps=3,
      curvature=lambda x: hessian(x, data),
    )
  )(data)
  optimum = min(float(value(np.asarray(best.params))), float(best.value))
  narrowed = lambda x, data: _narrow(hessian, x, data)
  # The norm of the root of the Hessian's diagonal at zero.
  root = jnp.sqrt(0.09 * jnp.mean(data[0] ** 2, axis=0) + l2)
  root = jnp.broadcast_to(root[:, None], start.shape)
  ours = [
    compiled(name, fun, data, start, tx, optimum, factory)
    for name, tx, factory in (
      ('lanczos', optlab.gns_newton(), hessian),
      ('cg float32', optlab.gns_newton(optlab.cg()), narrowed),
      ('lanczos float32', optlab.gns_newton(optlab.lanczos(60)), narrowed),
      (
        'lanczos float32, metric',
        optlab.gns_newton(optlab.lanczos(60), metric=root),
        narrowed,
      ),
    )
  ]
  return Case(
    'digits softmax',
    value,
    optimum,
    fastest(ours),
    {
      'scikit-learn': sklearn_solvers(features, labels, l2, optimum, value),
      'optax.lbfgs': [
        compiled(
          f'lbfgs({memory})',
          fun,
          data,
          start,
          optax.lbfgs(memory_size=memory),
          optimum,
        )
        for memory in (10, 30)
      ],
    },
  )


def _narrow(factory, x, data):
  """The products of a factory in float32."""
  narrow = lambda tree: jax.tree.map(
    lambda leaf: (
      leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf
    ),
    tree,
  )
  operator = factory(narrow(x), narrow(data))
  return lambda v: operator(narrow(v)).astype(x.dtype)


# The paper's synthetic problems, against lbfgs.


def log_sum_exp():
  n = 1000
  rng = np.random.RandomState(3124)
  matrix = (rng.rand(n, n) * 2 - 1).T
  offset = rng.rand(n) * 2 - 1
  matrix = matrix - scipy.special.softmax(-offset) @ matrix
  value = lambda x: float(scipy.special.logsumexp(matrix @ x - offset))
  optimum = value(np.zeros(n))
  fun = lambda x, data: jax.nn.logsumexp(data[0] @ x - data[1])
  data = jnp.asarray(matrix), jnp.asarray(offset)

  # The norm of the paper, B = A^T A, as a change of variables, which the peer
  # may use as well; making it is part of the preparation. Centred, A has rank
  # n - 1, hence the ridge.
  def whiten():
    gram = matrix.T @ matrix
    gram[np.diag_indices(n)] += 1e-6 * np.trace(gram) / n
    lower = np.linalg.cholesky(gram)
    white = scipy.linalg.solve_triangular(lower, matrix.T, lower=True).T
    return lower, white

  setup, (lower, white) = seconds(whiten)
  start = jnp.ones(n)
  data_white = jnp.asarray(white), jnp.asarray(offset)
  start_white = jnp.asarray(lower.T @ np.ones(n))
  hessian = optlab.hessian(fun)
  back = lambda z: scipy.linalg.solve_triangular(lower.T, z)
  unwhite = lambda c: c._replace(run=lambda: back(c.run()))
  ours, peers = [], []
  narrowed = lambda x, data: _narrow(hessian, x, data)
  for name, solver, rule in (
    ('lanczos', optlab.lanczos(60), optlab.newton.hold()),
    ('cg', optlab.cg(rtol=0.5), optlab.newton.hold()),
    ('lanczos, measured', optlab.lanczos(60), optlab.newton.measured()),
    ('cg, measured', optlab.cg(rtol=0.5), optlab.newton.measured()),
  ):
    tx = optlab.gns_newton(solver, rule=rule)
    ours.append(
      unwhite(
        compiled(
          f'whitened {name}, float32',
          fun, data_white, start_white, tx, optimum, narrowed, setup,
        )
      )
    )  # fmt: skip
  for memory in (10, 30):
    tx = optax.lbfgs(memory_size=memory)
    peers.append(compiled(f'lbfgs({memory})', fun, data, start, tx, optimum))
    peers.append(
      unwhite(
        compiled(
          f'whitened lbfgs({memory})',
          fun, data_white, start_white, tx, optimum, None, setup,
        )
      )
    )  # fmt: skip
  return Case(
    'LogSumExp n=1000', value, optimum, fastest(ours), {'optax.lbfgs': peers}
  )


class Banded(NamedTuple):
  """A tridiagonal symmetric matrix and a rank-one term."""

  diagonal: jax.Array
  off: jax.Array
  vector: jax.Array

  def __call__(self, v):
    rest = jnp.append(self.off * v[1:], 0.0)
    rest += jnp.append(0.0, self.off * v[:-1])
    return self.diagonal * v + rest + self.vector * jnp.vdot(self.vector, v)


def banded_solver(operator, b, shift):
  """A solver as a user would write it for the structure of a problem."""
  del shift
  zero = jnp.zeros(1, b.dtype)
  lower = jnp.concatenate([zero, operator.off])
  upper = jnp.concatenate([operator.off, zero])
  both = jnp.stack([b, operator.vector], axis=1)

  def solve(shift):
    x, y = jax.lax.linalg.tridiagonal_solve(
      lower, operator.diagonal + shift, upper, both
    ).T
    x -= y * (operator.vector @ x) / (1.0 + operator.vector @ y)
    return x, jnp.all(jnp.isfinite(x)) & (b @ x > 0)

  return solve


def chebyshev():
  n, p = 1000, 4
  start = np.random.RandomState(3124).rand(n)

  def system(x, data, np=jnp):
    del data
    return np.concatenate([(1 - x[:1]) / 2, x[1:] - (2 * x[:-1] ** 2 - 1)])

  outer = lambda u, data: jnp.vdot(u, u) ** (p / 2) / p
  fun = lambda x, data: outer(system(x, data), data)
  value = lambda x: float(np.sum(system(x, (), np) ** 2) ** (p / 2) / p)
  factory = optlab.gauss_newton(system, outer)

  def banded(x, data):
    """The same matrix by its bands: |u|^2 J^T J + 2 (J^T u)(J^T u)^T."""
    u, pull = jax.vjp(lambda x: system(x, data), x)
    square = jnp.vdot(u, u)
    slope = -4.0 * x[:-1]  # J is bidiagonal: [-1/2; slope_i, 1].
    first = jnp.ones_like(x).at[0].set(-0.5)
    diagonal = first**2 + jnp.append(slope**2, 0.0)
    return Banded(square * diagonal, square * slope, jnp.sqrt(2.0) * pull(u)[0])

  ours = [
    compiled(
      name, fun, (), jnp.asarray(start), optlab.gns_newton(solver), 0.0, matrix
    )
    for name, solver, matrix in (
      ('lanczos', optlab.lanczos(40), factory),
      ('cg', optlab.cg(), factory),
      ('cg 0.5', optlab.cg(rtol=0.5), factory),
      ('banded solver', banded_solver, banded),
    )
  ]
  peers = [
    compiled(
      f'lbfgs({memory})',
      fun,
      (),
      jnp.asarray(start),
      optax.lbfgs(memory_size=memory),
      0.0,
    )
    for memory in (10, 30)
  ]
  return Case(
    'Chebyshev n=1000, p=4', value, 0.0, fastest(ours), {'optax.lbfgs': peers}
  )


# Timing.


def timed_in_turn(contenders, rounds):
  """The seconds of each contender, which run in turn, by name."""
  times = {name: [] for name in contenders}
  for _ in range(rounds):
    for name, contender in contenders.items():
      # The threads of BLAS spin for a while after a call, on cores that the
      # next contender needs; after the pause, runs warm caches and clock.
      time.sleep(0.1)
      warm = time.perf_counter() + 0.05
      contender.run()
      while time.perf_counter() < warm:
        contender.run()
      times[name].append(seconds(contender.run)[0])
  return times


def fastest(contenders):
  """The one with the least median time."""
  by_name = {contender.name: contender for contender in contenders}
  times = timed_in_turn(by_name, 5)
  return by_name[min(times, key=lambda name: statistics.median(times[name]))]


def measure(case):
  """Rows ``(ratio, text)`` of the table, after the rounds of one case."""
  peers = {name: fastest(ways) for name, ways in case.peers.items()}
  contenders = {'ours': case.ours, **peers}
  for name, contender in contenders.items():
    gap = case.value(contender.run()) - case.optimum
    if not gap <= 1.001 * GAP:
      raise RuntimeError(f'{case.name}: {name} ends {gap:.1e} above f*')
  times = timed_in_turn(contenders, ROUNDS)
  ours = statistics.median(times['ours'])
  rows = []
  for name, peer in peers.items():
    pairs = zip(times[name], times['ours'], strict=True)
    ratio = statistics.median(theirs / mine for theirs, mine in pairs)
    rows.append(
      (
        ratio,
        f'{case.name:22} {name:24} {ratio:7.2f}'
        f' {1e3 * statistics.median(times[name]):9.1f} {1e3 * ours:9.1f}'
        f' {peer.prepare_s:7.2f} {case.ours.prepare_s:7.2f}'
        f'  {peer.name} {peer.note} | {case.ours.name} {case.ours.note}',
      )
    )
  return rows


def first_step_seconds():
  """Tracing and compiling one step on mushrooms, in a process that is warm."""
  dataset = data_lib.load('mushrooms')
  features = jnp.asarray(data_lib.dense(dataset))
  labels = jnp.asarray(data_lib.signs(dataset))
  l2 = 1.0 / len(labels)
  loss = lambda u, batch: jnp.mean(jax.nn.softplus(-batch[1] * u))
  fun = lambda x, batch: loss(batch[0] @ x, batch) + l2 / 2 * jnp.vdot(x, x)
  results = {}
  for name, factory in (
    ('gram', optlab.linear_gauss_newton(lambda batch: batch[0], loss, l2)),
    ('matrix-free', optlab.hessian(fun)),
  ):
    estimator = optlab.with_curvature(optlab.value_and_grad(fun), factory)
    tx = optlab.gns_newton()
    state = optlab.init(jnp.zeros(features.shape[1]), estimator, tx)
    step = jax.jit(optlab.train_step(estimator, tx))
    results[name], _ = seconds(
      lambda step=step, state=state: jax.block_until_ready(
        step(state, (features, labels))
      )
    )
  return results


def import_ratio(tries=5):
  """Time of ``import optlab`` over ``import optax``, in fresh processes."""
  times = {'optlab': [], 'optax': []}
  for _ in range(tries):
    for name, taken in times.items():
      run = lambda name=name: subprocess.run(
        [sys.executable, '-c', f'import {name}'], check=True
      )
      taken.append(seconds(run)[0])
  return statistics.median(
    a / b for a, b in zip(times['optlab'], times['optax'], strict=True)
  )


def main() -> None:
  """Prints the table, the losing ratios first."""
  warnings.simplefilter('ignore', ConvergenceWarning)
  folder = os.environ.get('OPTLAB_DATA', '')
  cases: dict[str, Callable[[], Any]] = {
    'mushrooms': lambda: logistic('mushrooms', folder),
    'digits': digits,
    'lse': log_sum_exp,
    'chebyshev': chebyshev,
  }
  if folder:
    cases['a8a'] = lambda: logistic('a8a_training', folder)
    cases['w8a'] = lambda: logistic('w8a_training', folder)
  else:
    print('OPTLAB_DATA is unset: a8a and w8a are left out')
  chosen = os.environ.get('OPTLAB_BENCH', ','.join(cases)).split(',')
  rows = []
  with jax.enable_x64(True):
    for name in chosen:
      if name not in cases:
        sys.exit(f'error: no problem {name}; there are {", ".join(cases)}')
      print(f'{name} ...', file=sys.stderr, flush=True)
      rows += measure(cases[name]())
    print(
      f'{"problem":22} {"peer":24} {"ratio":>7} {"peer ms":>9} {"ours ms":>9}'
      f' {"peer":>7} {"ours":>7}  fastest way of the peer | of ours'
    )
    print(f'{"":74} {"prepare and compile, s":>15}')
    for _, text in sorted(rows):
      print(text)
    for name, taken in first_step_seconds().items():
      print(
        f'first step on mushrooms, {name}: {taken:.2f} s to compile and run'
      )
  print(f'import optlab / import optax: {import_ratio():.2f}')


if __name__ == '__main__':
  main()
