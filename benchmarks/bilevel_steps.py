"""A step of soba and of saba against hand-written ones, in CPU time and counts.

python -m benchmarks bilevel_steps

Two problems of 100 unknowns below and 10 above, batches of 64: rank-one
curvatures, where a step is as cheap as its bookkeeping, and the dense ones of
benchopt/benchmark_bilevel. The hand-written step has the better of a reverse
pass over the gradient (the benchmark's own way) and a forward one. Long scans
in turn; the least CPU time of each, so that a busy machine does not matter.
"""

import collections
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import bilevel
from experiments.lab import tables
import optlab

SIZE, BLOCKS, RATE, UPPER_RATE = 64, 16, 0.02, 0.005


def rank_one():
  """The level, its data in blocks, and the length of a scan."""
  random = np.random.RandomState(0)
  part = lambda: bilevel.make_quadratic(SIZE * BLOCKS, 100, 10, 0.1, random)
  return bilevel.level, (part(), part()), 4000


def dense():
  random = np.random.RandomState(0)

  def part():
    n = SIZE * BLOCKS
    a, c = 0.5 * random.randn(n, 1, 100), 0.3 * random.randn(n, 1, 10)
    leaves = (
      a.transpose(0, 2, 1) @ a, c.transpose(0, 2, 1) @ c,
      0.1 * random.randn(n, 10, 100), random.randn(n, 100),
    )  # fmt: skip
    return tuple(np.asarray(leaf, np.float32) for leaf in leaves)

  def level(x, y, data):
    one = lambda a, c, b, d: (
      0.5 * y @ (a @ y) + 0.5 * x @ (c @ x) + x @ b @ y + d @ y
    )
    return jnp.mean(jax.vmap(one)(*data))

  return level, (part(), part()), 200


def hand_written(level, memory, forward):
  """A step of soba, or with a memory of saba, for one user."""

  def look(x, y, z, data):
    both = lambda y: jax.grad(level, (0, 1))(x, y, data)
    if forward:
      (_, g_y), (cross, product) = jax.jvp(both, (y,), (z,))
      return g_y, cross, product
    g_y, vjp = jax.vjp(lambda x, y: jax.grad(level, 1)(x, y, data), x, y)
    cross, product = vjp(z)
    return g_y, cross, product

  def recall(part, fresh, index):
    table, mean = part
    change = jax.tree.map(lambda t, new: new - t[index], table, fresh)
    found = jax.tree.map(jnp.add, change, mean)
    table = jax.tree.map(lambda t, new: t.at[index].set(new), table, fresh)
    mean = jax.tree.map(lambda m, c: m + c / BLOCKS, mean, change)
    return found, (table, mean)

  def step(state, index, up, low):
    (x, y, z), parts = state
    value, above = jax.value_and_grad(level, (0, 1))(x, y, up)
    below = look(x, y, z, low)
    if memory:
      above, upper = recall(parts[0], above, index[0])
      below, lower = recall(parts[1], below, index[1])
      parts = upper, lower
    (f_x, f_y), (g_y, cross, product) = above, below
    point = (
      x - UPPER_RATE * (f_x - cross), y - RATE * g_y,
      z - RATE * (product - f_y),
    )  # fmt: skip
    return (point, parts), value

  empty = lambda *sizes: tuple(
    tuple(jnp.zeros((*rows, size)) for size in sizes)
    for rows in ((BLOCKS,), ())
  )
  point = jnp.full(10, -2.0), jnp.zeros(100), jnp.zeros(100)
  parts = (empty(10, 100), empty(100, 10, 100)) if memory else ()
  return (point, parts), step


def ours(level, memory):
  levels = level, level, optax.sgd(RATE), RATE
  estimator = optlab.soba(*levels)
  if memory:
    estimator = optlab.saba(*levels, upper_blocks=BLOCKS, lower_blocks=BLOCKS)
  tx = optax.sgd(UPPER_RATE)
  train_step = optlab.train_step(estimator, tx)

  def step(state, index, up, low):
    if memory:
      block = optlab.bilevel.IndexedBatch
      up, low = block(index[0], up), block(index[1], low)
    return train_step(state, optlab.BilevelBatch(up, low))

  start = optlab.init(jnp.full(10, -2.0), estimator, tx, jnp.zeros(100))
  return start, step


def scanned(start, step, data, length):
  """The compiled scan."""

  def run(state, data):
    def body(state, t):
      index = (t * 7) % BLOCKS, (t * 11 + 3) % BLOCKS
      up, low = (
        jax.tree.map(
          lambda leaf, i=i: jax.lax.dynamic_slice_in_dim(leaf, i * SIZE, SIZE),
          part,
        )
        for part, i in zip(data, index, strict=True)
      )
      return step(state, index, up, low)

    return jax.lax.scan(body, state, jnp.arange(length))

  return jax.jit(run, donate_argnums=0).lower(start, data).compile()


def launches(program):
  """Kernels of the scan's body."""
  parts = re.split(r'\n(?=%|ENTRY)', program.as_text())
  kinds = r'= \S+ (fusion|dot|copy|conditional|while|reduce)\('
  return max(len(re.findall(kinds, part)) for part in parts)


def main(rounds: int = 7) -> None:
  rows = []
  for problem, (level, data, length) in (
    ('rank one', rank_one()), ('dense', dense()),
  ):  # fmt: skip
    data = jax.device_put(data)
    for name in ('soba', 'saba'):
      memory, times = name == 'saba', collections.defaultdict(list)
      made = {
        'ours': ours(level, memory),
        'reverse': hand_written(level, memory, False),
        'forward': hand_written(level, memory, True),
      }
      programs = {
        key: scanned(*each, data, length) for key, each in made.items()
      }
      for turn in range(rounds):
        for key in sorted(made, reverse=bool(turn % 2)):
          state = jax.block_until_ready(jax.tree.map(jnp.copy, made[key][0]))
          began = time.process_time()
          jax.block_until_ready(programs[key](state, data))
          times[key].append(1e6 * (time.process_time() - began) / length)
      least = {key: min(times[key]) for key in made}
      best = min(('reverse', 'forward'), key=least.get)
      rows.append((
        f'{problem}, {name}', least['ours'], least['reverse'],
        least['forward'], f'{least["ours"] / least["reverse"]:.2f}',
        f'{least["ours"] / least[best]:.2f}', launches(programs['ours']),
        launches(programs[best]),
      ))  # fmt: skip
  tables.show(
    'CPU microseconds a step; hand-written with a reverse and a forward pass',
    ('step', 'ours', 'reverse', 'forward', 'ratio', 'best', 'kernels', 'its'),
    rows,
  )


if __name__ == '__main__':
  main()
