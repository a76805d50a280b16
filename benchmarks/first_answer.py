"""Time to the first answer, compiling included, in fresh processes.

Logistic regression, 569 rows of 30 columns, in float64 to a gradient of 1e-6:
`minimize` with `gns_newton` (dense Hessian) and `optax.lbfgs`, and scipy's
trust-exact on a compiled objective. ``plain`` compiles by XLA's older emitters,
``quick`` without optimization as well; ``jax.jit`` takes both as
``compiler_options``. Processes run in turn; printed are medians of the seconds
from the first line after the imports to the answer, of CPU time, and of a
second run's milliseconds.
"""

import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import optlab

PLAIN = {'xla_cpu_use_fusion_emitters': False}
QUICK = {**PLAIN, 'xla_backend_optimization_level': 0}
WAYS = {
  'gns': ('gns', None),
  'gns, plain': ('gns', PLAIN),
  'gns, quick': ('gns', QUICK),
  'optax.lbfgs': ('lbfgs', None),
  'optax.lbfgs, quick': ('lbfgs', QUICK),
  'scipy trust-exact': ('scipy', None),
}
ROUNDS = 7


def solver(kind, options):
  """``start -> params``, nothing compiled yet."""
  rng = np.random.default_rng(0)
  features = jnp.asarray(rng.normal(size=(569, 30)))
  signs = jnp.asarray(np.sign(rng.normal(size=569)))
  fun = lambda x: (
    jnp.mean(jax.nn.softplus(-signs * (features @ x))) + 0.5e-3 * x @ x
  )
  if kind == 'scipy':
    both, hessian = jax.jit(jax.value_and_grad(fun)), jax.jit(jax.hessian(fun))
    return lambda start: scipy.optimize.minimize(
      lambda x: tuple(map(np.asarray, both(x))), start, jac=True,
      hess=lambda x: np.asarray(hessian(x)), method='trust-exact',
      options={'gtol': 1e-6},
    ).x  # fmt: skip
  tx, curvature = optax.lbfgs(), None
  if kind == 'gns':
    tx, curvature = optlab.gns_newton(), optlab.dense(optlab.hessian(fun))
  return jax.jit(
    lambda start: (
      optlab.minimize(
        fun, start, tx, curvature=curvature, max_steps=100, grad_tol=1e-6
      ).params
    ),
    compiler_options=options,
  )


def measure(way: str) -> None:
  """Prints seconds, CPU seconds and milliseconds of this process."""
  jax.config.update('jax_enable_x64', True)
  began, cpu = time.perf_counter(), time.process_time()
  solve = solver(*WAYS[way])
  start = np.zeros(30)
  jax.block_until_ready(solve(start))
  first = time.perf_counter() - began, time.process_time() - cpu
  began = time.perf_counter()
  jax.block_until_ready(solve(start))
  print(json.dumps((*first, 1e3 * (time.perf_counter() - began))))


def main() -> None:
  """Prints the table."""
  found = {way: [] for way in WAYS}
  for _ in range(ROUNDS):
    for way, rows in found.items():
      code = f'from benchmarks import first_answer as f; f.measure({way!r})'
      run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, check=True, text=True
      )
      rows.append(json.loads(run.stdout.splitlines()[-1]))
  print(f'{"":20}{"seconds":>10}{"CPU":>10}{"then, ms":>10}')
  for way, rows in found.items():
    medians = map(statistics.median, zip(*rows, strict=True))
    print(f'{way:20}' + ''.join(f'{x:10.2f}' for x in medians), flush=True)


if __name__ == '__main__':
  main()
