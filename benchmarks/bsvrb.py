"""BSVRB against vectorized numpy of the same mathematics, and against m.

The peer takes both points in one batched product, writes rows in place, keeps
the lazy form of the stale steps, and has no loop over rows or blocks and no
cross matrix. Set OPTLAB_DATA to run on a8a; without it, rows of its shape.
"""

import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.lab import tables
from experiments.problems import scaled_logistic as logistic
import optlab

NUM_BLOCKS, SAMPLED, ROWS, L2 = 100, 10, 32, 1e-5
STEP_SIZE, ALPHA, BETA, RATE = 0.1, 0.1, 0.1, 10.0
REPEATS = 9


class NumpyV2:
  """BSVRB v2 on the weighted logistic losses."""

  def __init__(self, split, scales, dtype):
    self.train = split.train.astype(dtype)
    self.validation = split.validation.astype(dtype)
    self.inverse = (1 / scales).astype(dtype)
    m, d = len(scales), self.train.shape[1]
    self.p = self.p_before = np.zeros(len(self.train), dtype)
    self.w, self.s, self.v, self.u = np.zeros((4, m, d), dtype)
    self.touched, self.seen = np.zeros(m, int), np.zeros(m, bool)
    self.step_number, self.z, self.dtype = 0, None, np.dtype(dtype).type

  def step(self, blocks, rows, validation_rows):
    real = self.dtype
    m, count, size = len(self.w), len(blocks), rows.shape[1]
    tau = real(STEP_SIZE * count / m)
    alpha, beta = real(ALPHA), real(BETA)
    gamma = real((m - count) / (count * (1 - ALPHA)) + 1 - ALPHA)
    a = self.train.take(rows, 0)
    b = self.validation.take(validation_rows, 0)
    inverse = self.inverse[blocks][:, None, None]
    s, u = self.s[blocks], self.u[blocks]
    age = (self.step_number - self.touched[blocks])[:, None]
    now, before = tau * age.astype(real), tau * np.maximum(age - 1, 0)
    before = before.astype(real)
    w, v = self.w[blocks], self.v[blocks]
    # Both points, of w and of v, are four columns of one product.
    w = np.stack([w - now * s, w - before * s], -1)
    v = np.stack([v - now * u, v - before * u], -1)
    products = (a @ np.concatenate([w, v], -1)) * inverse
    z, q = products[..., :2], products[..., 2:]
    z_upper = (b @ w) * inverse
    weight = np.stack([self.p[rows], self.p_before[rows]], -1)
    weight = 1 / (1 + np.exp(-weight))
    r = 1 / (1 + np.exp(z))
    scaled = inverse / real(size)
    curved = r * (1 - r) * q
    columns = np.concatenate([-weight * r, weight * curved], -1) * scaled
    gradients = a.transpose(0, 2, 1) @ columns
    lower = gradients[..., :2] + real(L2) * w
    upper = b.transpose(0, 2, 1) @ (-scaled / (1 + np.exp(z_upper)))
    residual = gradients[..., 2:] + real(L2) * v - upper
    value = np.mean(np.logaddexp(0, -z_upper[..., 0]))
    # d_xy g v, to be taken off.
    cross = weight * (1 - weight) * r * q / real(-size * count)
    flat, n = rows.ravel(), len(self.p)
    g_now, g_before = (
      -np.bincount(flat, cross[..., i].ravel(), n).astype(real) for i in (0, 1)
    )
    if self.z is None:
      self.z = g_now
    else:
      self.z = (1 - beta) * (self.z - g_before) + g_now
    first = ~self.seen[blocks][:, None]
    for table, old, new in ((self.s, s, lower), (self.u, u, residual)):
      drift = gamma * (new[..., 0] - new[..., 1])
      moved = (1 - alpha) * old + alpha * new[..., 0] + drift
      table[blocks] = np.where(first, new[..., 0], moved)
    self.w[blocks], self.v[blocks] = w[..., 0], v[..., 0]
    self.touched[blocks], self.seen[blocks] = self.step_number, True
    self.step_number += 1
    self.p_before, self.p = self.p, self.p - real(RATE) * self.z
    return value


def load():
  random = np.random.default_rng(0)
  folder = os.environ.get('OPTLAB_DATA')
  if folder:
    split = logistic.load('a8a', folder, random=random)
  else:
    split = logistic.synthetic(22_696, 123, random)
  return split, logistic.scales(NUM_BLOCKS, random), folder is not None


def indices(split, steps):
  random = np.random.default_rng(1)
  blocks = [random.permutation(NUM_BLOCKS)[:SAMPLED] for _ in range(steps)]
  shape = steps, SAMPLED, ROWS
  rows = random.integers(0, len(split.train), shape)
  validation = random.integers(0, len(split.validation), shape)
  return tuple(
    array.astype(np.int32) for array in (np.stack(blocks), rows, validation)
  )


def ours(split, scales, dtype, **system):
  """The compiled run over stacked indices, and the state that it starts at."""
  levels = logistic.Levels(L2)
  estimator = optlab.bsvrb(
    levels.upper, levels.lower, NUM_BLOCKS,
    inner_lr=STEP_SIZE, alpha=ALPHA, beta=BETA, **system,
  )  # fmt: skip
  tx = optax.sgd(RATE)
  train_step = optlab.train_step(estimator, tx)
  train, validation, scale = (
    jnp.asarray(array, dtype) for array in (*split[:2], scales)
  )

  def step(state, index):
    blocks, rows, validation_rows = index
    batch = optlab.BlockBatch(
      blocks,
      (logistic.pick(validation, validation_rows), scale[blocks]),
      (logistic.pick(train, rows), rows, scale[blocks]),
    )
    return train_step(state, batch)

  def start():
    p = jnp.zeros(len(split.train), dtype)
    w = jnp.zeros((NUM_BLOCKS, split.train.shape[1]), dtype)
    return optlab.init(p, estimator, tx, w)

  return jax.jit(functools.partial(jax.lax.scan, step)), start


def timed(fun):
  began = time.perf_counter()
  result = jax.block_until_ready(fun())
  return time.perf_counter() - began, result


def against_numpy(split, scales, dtype, table):
  """The same numbers over 50 steps; then paired times of 200."""
  index = indices(split, 200)
  run, start = ours(split, scales, dtype)
  short = tuple(array[:50] for array in index)
  state, values = run(start(), short)
  peer = NumpyV2(split, scales, dtype)
  peer_values = [peer.step(*step) for step in zip(*short, strict=True)]
  apart = max(
    np.abs(np.asarray(values) - peer_values).max(),
    np.abs(np.asarray(state.params) - peer.p).max(),
  )
  allowed = 1e-10 if dtype == 'float64' else 1e-3
  assert apart < allowed, f'{dtype}: the numbers differ by {apart}'
  compile_seconds, compiled = timed(lambda: run.lower(start(), index).compile())
  ratios, mine, theirs = [], [], []
  for _ in range(REPEATS):
    state = jax.block_until_ready(start())
    mine.append(timed(lambda s=state: compiled(s, index))[0] / 200)
    peer = NumpyV2(split, scales, dtype)
    steps = list(zip(*index, strict=True))
    began = time.perf_counter()
    for step in steps:
      peer.step(*step)
    theirs.append((time.perf_counter() - began) / 200)
    ratios.append(theirs[-1] / mine[-1])
  table.append((
    f'v2 {dtype}', statistics.median(mine) * 1e6,
    statistics.median(theirs) * 1e6, statistics.median(ratios),
    compile_seconds, f'{apart:.0e}',
  ))  # fmt: skip


def v1(split, scales, dtype, table):
  index = indices(split, 20)
  dual = optlab.multi_block.track_hessians(1e-3)
  run, start = ours(split, scales, dtype, dual=dual, damping=1e-2)
  compile_seconds, compiled = timed(lambda: run.lower(start(), index).compile())
  times = []
  for _ in range(5):
    state = jax.block_until_ready(start())
    times.append(timed(lambda s=state: compiled(s, index))[0] / 20)
  mine = statistics.median(times) * 1e6
  table.append((f'v1 {dtype}', mine, None, None, compile_seconds, ''))


def against_num_blocks():
  """Time of a donated step and bytes of state, with the tables 1,000 fold."""
  dim, counts = 16, (100, 1_000, 10_000, 100_000)
  runs = {}
  for m in counts:
    estimator = optlab.bsvrb(
      lambda x, y, t: 0.5 * jnp.sum((y - t) ** 2),
      lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2),
      m,
    )
    tx = optax.sgd(0.01)
    x = jnp.zeros(dim)
    state = optlab.init(x, estimator, tx, jnp.zeros((m, dim)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    train_step = optlab.train_step(estimator, tx)

    def step(state, key, m=m, train_step=train_step):
      blocks = optlab.sample_blocks(key, m, SAMPLED)
      batch = optlab.BlockBatch(blocks, jnp.ones((SAMPLED, dim)))
      return train_step(state, batch)

    run = jax.jit(step, donate_argnums=0)
    # The caller's x is part of the state, and is donated with it.
    state, _ = run(state, jax.random.key(0))
    runs[m] = [run, state, size, []]
  keys = list(jax.random.split(jax.random.key(1), 200))
  for _ in range(REPEATS):
    for entry in runs.values():
      run, state = entry[:2]
      jax.block_until_ready(state)
      began = time.perf_counter()
      for key in keys:
        state, _ = run(state, key)
      jax.block_until_ready(state)
      entry[3].append((time.perf_counter() - began) / len(keys))
      entry[1] = state
  base = statistics.median(runs[counts[0]][3])
  tables.show(
    f'a donated step against m, I = {SAMPLED}',
    ('m', 'us a step', 'ratio to m = 100', 'bytes of state', 'bytes / m'),
    [
      (
        f'{m:,}', statistics.median(times) * 1e6,
        statistics.median(times) / base, size, size / m,
      )
      for m, (_, _, size, times) in runs.items()
    ],
  )  # fmt: skip


def main():
  split, scales, real = load()
  table = []
  for dtype in ('float64', 'float32'):
    with jax.enable_x64(dtype == 'float64'):
      against_numpy(split, scales, dtype, table)
      v1(split, scales, dtype, table)
  name = 'a8a' if real else "synthetic rows of a8a's shape"
  tables.show(
    f'{name}, m = {NUM_BLOCKS}, I = {SAMPLED}, B = {ROWS}: one iteration'
    ' against vectorized numpy',
    ('method', 'us', 'numpy us', 'ratio', 'compile s', 'numbers apart'),
    table,
  )
  against_num_blocks()


if __name__ == '__main__':
  main()
