"""Weak scaling: as many rows (or blocks) for each device, on 1 to 8 devices.

The devices are virtual ones of this machine's CPU, and one of them already uses
all cores. So the rows a second of n devices over those of one are at best about
1, and show what splitting costs; real devices would multiply them by n. What
the compiled step exchanges is counted from its text.

  python -m benchmarks scale
"""

import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax

from benchmarks import _devices
from experiments.lab import devices
from experiments.lab import tables
from experiments.problems import densities
import optlab

ROWS, FEATURES, BLOCKS, SAMPLED = 16384, 64, 16384, 1024
STEPS, REPEATS = 5, 7
COUNTS = (1, 2, 4, 8)


def regression(count):
  """Rows of a linear model, and a loss an example."""
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (ROWS * count, FEATURES))
  y = jnp.sign(jax.random.normal(keys[1], (ROWS * count,)))
  losses = lambda w, batch: jax.nn.softplus(-batch[1] * (batch[0] @ w))
  return (x, y), losses, jnp.zeros(FEATURES)


def gns(count):
  batch, losses, start = regression(count)
  mean = lambda w, batch: jnp.mean(losses(w, batch)) + 1e-3 * jnp.sum(w**2)
  estimator = optlab.with_curvature(
    optlab.value_and_grad(mean), optlab.hessian(mean)
  )
  tx = optlab.gns_newton()
  return optlab.train_step(estimator, tx), optlab.init(
    start, estimator, tx
  ), batch, None  # fmt: skip


def first_order(tx):
  def problem(count):
    batch, losses, start = regression(count)
    estimator = optlab.per_example(losses, optlab.ghost_norms)
    return optlab.train_step(estimator, tx), optlab.init(
      start, estimator, tx
    ), batch, None  # fmt: skip

  return problem


def bo_rep(count):
  batch, losses, start = regression(count)
  lower = lambda x, y, batch: (
    jnp.mean(losses(y, batch)) + jnp.sum(jnp.exp(x) * y**2)
  )
  upper = lambda x, y, batch: jnp.mean(losses(y, batch))
  estimator = optlab.bo_rep(upper, lower, optax.sgd(0.1), 0.1)
  tx = optlab.normalized_momentum(0.01)
  state = optlab.init(jnp.zeros(FEATURES), estimator, tx, start)
  inner = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), batch)
  batch = optlab.BilevelBatch(batch, batch, inner)
  return optlab.train_step(estimator, tx), state, batch, None


def bsvrb(count):
  upper = lambda x, y, target: 0.5 * jnp.sum((y - target) ** 2)
  lower = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2) + 0.1 * jnp.sum(y**4)
  blocks = BLOCKS * count
  estimator = optlab.bsvrb(upper, lower, blocks, inner_lr=0.1)
  tx = optax.sgd(0.05)
  tables = jnp.zeros((blocks, FEATURES))
  state = optlab.init(jnp.zeros(FEATURES), estimator, tx, tables)
  chosen = optlab.sample_blocks(jax.random.key(1), blocks, SAMPLED)
  batch = optlab.BlockBatch(chosen, jnp.ones((SAMPLED, FEATURES)))
  return optlab.train_step(estimator, tx), state, batch, blocks


def meco(count):
  rows = densities.distribution('pinwheel').sample(
    jax.random.key(0), ROWS * count
  )
  noise = optlab.fit_gaussian(rows, inflate=1.5)
  batch = optlab.noise_batch(noise, jax.random.key(1), rows, ROWS * count, True)
  estimator, tx = optlab.meco(densities.log_density), optax.adam(1e-3)
  state = optlab.init(densities.init_mlp(jax.random.key(2)), estimator, tx)
  return optlab.train_step(estimator, tx), state, batch, None


PROBLEMS = {
  'gns_newton, dense Hessian': gns,
  'diffgrad': first_order(optlab.diffgrad(1e-3)),
  'adagrad_norm with ghost norms': first_order(optlab.adagrad_norm(0.1)),
  'bo_rep': bo_rep,
  'bsvrb v2, tables over blocks': bsvrb,
  'meco': meco,
}


def measure(make, count):
  """Median milliseconds of a step, and what its program exchanges."""
  step, state, batch, tables = make(count)
  mesh = devices.make_mesh(f'{"blocks" if tables else "data"}={count}')

  def lane(leaf):
    over = tables and leaf.ndim and leaf.shape[0] == tables
    return jax.P('blocks') if over else jax.P()

  layout = devices.layout(state, mesh, lane)
  spec = lambda leaf: (
    jax.P(*[None] * leaf.shape.index(ROWS * count), 'data')
    if ROWS * count in leaf.shape
    else jax.P()
  )
  state = devices.put(state, layout)
  batch = devices.put(batch, devices.layout(batch, mesh, spec))
  with jax.set_mesh(mesh):
    once = jax.jit(
      lambda state, batch: step(state, batch)[0],
      out_shardings=layout,
      donate_argnums=0,
    )
    compiled = once.lower(state, batch).compile()
  times = []
  for _ in range(REPEATS):
    began = time.perf_counter()
    for _ in range(STEPS):
      state = compiled(state, batch)
    jax.block_until_ready(state)
    times.append((time.perf_counter() - began) / STEPS)
  return 1e3 * statistics.median(times), devices.collectives(compiled)


def table():
  lines = []
  for name, make in PROBLEMS.items():
    alone = None
    for count in COUNTS:
      milliseconds, exchanged = measure(make, count)
      alone = alone or milliseconds
      kinds = _devices.KINDS.items()
      said = ' '.join(f'{exchanged[k]} {v}' for k, v in kinds if k in exchanged)
      lines.append(
        (name, count, milliseconds, alone * count / milliseconds, said or '-')
      )
  tables.show(
    f'weak scaling, {ROWS} rows or {BLOCKS} blocks a device',
    ('step', 'devices', 'ms', 'throughput', 'collectives'),
    lines,
  )


def main():
  """The number of devices is settled before JAX starts: in a new process."""
  flags = f'--xla_force_host_platform_device_count={max(COUNTS)}'
  subprocess.run(
    [sys.executable, '-c', 'from benchmarks import scale; scale.table()'],
    env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
    check=True,
  )


if __name__ == '__main__':
  main()
