"""Bilevel estimators: overhead of a step, memory, and a finite-sum quadratic.

python -m benchmarks bilevel
"""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.lab import tables
from experiments.methods import bilevel
from experiments.problems import encoders
import optlab

WIDTH, LENGTH, WORDS, ROWS, LOWER_STEPS, PERIOD = 64, 24, 4000, 64, 5, 2
LOWER_RATE, LINEAR_RATE, RATE, BETA, L2 = 0.1, 0.1, 0.03, 0.9, 0.1


def rnn_task():
  """GRU encoder above, linear head below, random sentences."""
  init, encode = encoders.functional(
    lambda rngs: encoders.Encoder(WORDS, WIDTH, rngs)
  )

  def loss(x, y, batch):
    tokens, labels = batch
    margins = labels * (encode(x, tokens) @ y['w'] + y['b'])
    return jnp.mean(jax.nn.softplus(-margins))

  def lower(x, y, batch):
    penalty = 0.5 * L2 * (jnp.sum(y['w'] ** 2) + y['b'] ** 2)
    return loss(x, y, batch) + penalty

  random = np.random.RandomState(0)

  def sample(*shape):
    tokens = random.randint(2, WORDS, (*shape, ROWS, LENGTH))
    labels = random.choice([-1.0, 1.0], (*shape, ROWS))
    return tokens.astype(np.int32), labels.astype(np.float32)

  def batch():
    return jax.device_put(
      optlab.BilevelBatch(sample(), sample(), sample(LOWER_STEPS))
    )

  x = jax.jit(init)(jax.random.key(0))
  y = {'w': jnp.zeros(WIDTH), 'b': jnp.zeros(())}
  return loss, lower, batch, x, y


def hand_written(upper, lower, x, y):
  """The same mathematics for one user: no checks, counts or other options."""

  def lower_round(x, y, inner):
    def body(y, sample):
      grads = jax.grad(lower, argnums=1)(x, y, sample)
      y = jax.tree.map(lambda a, g: a - LOWER_RATE * g, y, grads)
      return y, y

    _, path = jax.lax.scan(body, y, inner)
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), path)

  def step(state, batch):
    t, x, y, z, m = state
    y = jax.lax.cond(
      (t > 0) & (t % PERIOD == 0),
      lower_round,
      lambda x, y, inner: y,
      x,
      y,
      batch.step_samples,
    )
    value, (f_x, f_y) = jax.value_and_grad(upper, argnums=(0, 1))(
      x, y, batch.upper
    )
    _, vjp = jax.vjp(
      lambda x, y: jax.grad(lower, argnums=1)(x, y, batch.lower), x, y
    )
    cross, hessian_z = vjp(z)
    z = jax.tree.map(
      lambda z, h, f: z - LINEAR_RATE * (h - f), z, hessian_z, f_y
    )
    m = jax.tree.map(
      lambda m, f, c: BETA * m + (1 - BETA) * (f - c), m, f_x, cross
    )
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(m)))
    x = jax.tree.map(lambda a, b: a - RATE * b / norm, x, m)
    return (t + 1, x, y, z, m), value

  zeros = functools.partial(jax.tree.map, jnp.zeros_like)
  copy = functools.partial(jax.tree.map, jnp.copy)
  return (jnp.int32(0), copy(x), copy(y), zeros(y), zeros(x)), step


def compiled(step, state, batch):
  """The step with its state donated, and the seconds to compile it."""
  began = time.perf_counter()
  function = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
  return function, time.perf_counter() - began


def step_overhead(pairs: int = 150) -> None:
  """One bo_rep step against the hand-written one, interleaved."""
  upper, lower, make_batch, x, y = rnn_task()
  estimator = optlab.bo_rep(
    upper,
    lower,
    optax.sgd(LOWER_RATE),
    LINEAR_RATE,
    period=PERIOD,
    lower_steps=LOWER_STEPS,
  )
  tx = optlab.normalized_momentum(RATE, BETA)
  theirs, their_step = hand_written(upper, lower, x, y)
  ours = optlab.init(jax.tree.map(jnp.copy, x), estimator, tx, y)
  batches = [make_batch() for _ in range(4)]
  our_step = optlab.train_step(estimator, tx)
  our_run, our_compile = compiled(our_step, ours, batches[0])
  their_run, their_compile = compiled(their_step, theirs, batches[0])

  def timed(run, state, batch):
    began = time.perf_counter()
    state, value = jax.block_until_ready(run(state, batch))
    return state, value, time.perf_counter() - began

  times, gap = [], 0.0
  for i in range(pairs):
    batch = batches[i % len(batches)]
    # Who goes first alternates, and not in step with the lower rounds.
    if i // PERIOD % 2:
      ours, value, a = timed(our_run, ours, batch)
      theirs, other, b = timed(their_run, theirs, batch)
    else:
      theirs, other, b = timed(their_run, theirs, batch)
      ours, value, a = timed(our_run, ours, batch)
    times.append((a, b))
    gap = max(gap, abs(float(value - other)))
  times = np.array(times[10:])
  rounds = np.arange(10, pairs) % PERIOD == 0
  rows = []
  for name, chosen in (
    ('with a lower round', rounds),
    ('without', ~rounds),
    ('all', rounds | ~rounds),
  ):
    a, b = np.median(times[chosen], axis=0)
    ratio = np.median(times[chosen, 0] / times[chosen, 1])
    rows.append((name, 1e3 * a, 1e3 * b, f'{ratio:.3f}'))
  tables.show(
    f'bo_rep step, GRU of width {WIDTH}, {ROWS} sentences of {LENGTH} words;'
    f' values agree to {gap:.1e}; compiled in {our_compile:.1f} s and'
    f' {their_compile:.1f} s',
    ('steps', 'bo_rep ms', 'hand-written ms', 'ratio of pairs, median'),
    rows,
  )
  jitted = jax.jit(our_step)
  state = optlab.init(x, estimator, tx, y)
  for batch in batches:
    state, _ = jitted(state, batch)
  print(f'programs compiled in {len(batches)} calls: {jitted._cache_size()}')


def unrolled_memory() -> None:
  """Temporary memory of one unrolled step against the number of lower steps."""
  upper, lower, make_batch, x, y = rnn_task()
  single = make_batch()
  rows = []
  for steps in (1, 4, 16, 64):
    inner = jax.tree.map(
      lambda leaf, n=steps: jnp.repeat(leaf[:1], n, axis=0),
      single.step_samples,
    )
    batch = single._replace(step_samples=inner)
    sizes = []
    for checkpoint in (False, True):
      estimator = optlab.unrolled(
        upper,
        lower,
        optax.sgd(LOWER_RATE),
        lower_steps=steps,
        checkpoint=checkpoint,
      )
      state = estimator.init(x, y)
      program = jax.jit(estimator.estimate).lower(x, state, batch).compile()
      sizes.append(program.memory_analysis().temp_size_in_bytes / 2**20)
    rows.append((steps, *sizes, f'{sizes[0] / sizes[1]:.1f}'))
  tables.show(
    'unrolled: temporary memory of a step, MiB',
    ('lower steps', 'checkpoint=False', 'checkpoint=True', 'ratio'),
    rows,
  )


class Quadratic(NamedTuple):
  """One level: rank-one curvatures, a rank-one cross term, a linear term.

  ``(a'y)^2 / 2 + (u'y)(v'x) + b'y``, for the upper level with
  ``(c'x)^2 / 2 + d'x`` too; the leading axis is of samples.
  """

  a: np.ndarray
  u: np.ndarray
  v: np.ndarray
  b: np.ndarray
  c: np.ndarray
  d: np.ndarray


def make_quadratic(samples, y_size, x_size, mu, random) -> Quadratic:
  def correlated(size):
    basis, _ = np.linalg.qr(random.normal(size=(size, size)))
    root = basis * np.sqrt(np.logspace(np.log10(mu), 0, size))
    return random.normal(size=(samples, size)) @ root.T

  # Cross terms have mean `mix / 10`: v is u seen through `mix`, and noise.
  mix = random.normal(size=(y_size, x_size)) / np.sqrt(y_size)
  u = random.normal(size=(samples, y_size))
  v = 0.1 * (u @ mix + 0.1 * random.normal(size=(samples, x_size)))
  return Quadratic(
    *(
      np.asarray(leaf, np.float32)
      for leaf in (
        correlated(y_size),
        u,
        v,
        random.normal(size=(samples, y_size)),
        correlated(x_size),
        random.normal(size=(samples, x_size)),
      )
    )
  )


def level(x, y, data: Quadratic):
  """The mean over the samples."""
  value = 0.5 * (data.a @ y) ** 2 + (data.u @ y) * (data.v @ x) + data.b @ y
  return jnp.mean(value + 0.5 * (data.c @ x) ** 2 + data.d @ x)


def squared_gradient(lower: Quadratic, upper: Quadratic):
  """``x -> |grad F(x)|^2`` in closed form, in float64."""
  n, m = len(lower.a), len(upper.a)
  lower, upper = (
    Quadratic(*(leaf.astype(np.float64) for leaf in part))
    for part in (lower, upper)
  )
  hessian, cross = lower.a.T @ lower.a / n, lower.u.T @ lower.v / n
  g_yy, g_yx = upper.a.T @ upper.a / m, upper.u.T @ upper.v / m
  g_xx = upper.c.T @ upper.c / m

  def evaluate(x):
    x = np.asarray(x, np.float64)
    if not np.all(np.isfinite(x)):
      return np.inf
    y = -np.linalg.solve(hessian, cross @ x + lower.b.mean(0))
    f_y = g_yy @ y + g_yx @ x + upper.b.mean(0)
    f_x = g_xx @ x + g_yx.T @ y + upper.d.mean(0)
    return float(np.sum((f_x - cross.T @ np.linalg.solve(hessian, f_y)) ** 2))

  return evaluate


LOWER_RATES = (0.1, 0.3, 1.0, 3.0)
UPPER_RATES = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Estimator, upper step, and whether its gradient is tracked by STORM.
VARIANTS = (
  ('soba', 'plain', False),
  ('soba', 'plain', True),
  ('soba', 'normalized', False),
  ('saba', 'plain', False),
  ('saba', 'plain', True),
  ('stocbio', 'plain', False),
  ('stocbio', 'plain', True),
  ('bo_rep', 'normalized', False),
  ('bo_rep', 'normalized', True),
  ('bo_rep', 'plain', False),
  ('bo_rep', 'plain', True),
)


def marked(rate: float, grid: tuple[float, ...]) -> str:
  return f'{rate:g}' + (' (edge)' if rate in (grid[0], grid[-1]) else '')


def finite_sum_quadratic(
  samples: int = 2**15,
  budget: int = 2**20,
  size: int = 64,
  variants: tuple = VARIANTS,
) -> None:
  """Squared gradient norm after equal samples, best of one grid each."""
  random = np.random.RandomState(0)
  lower = make_quadratic(samples, 100, 10, 0.01, random)
  upper = make_quadratic(1024, 100, 10, 0.01, random)
  metric = squared_gradient(lower, upper)
  data = jax.device_put(
    jax.tree.map(
      lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), (lower, upper)
    )
  )
  lower_blocks, upper_blocks = samples // size, 1024 // size
  grid = np.array(
    [
      (lower_rate, upper_rate, cosine)
      for lower_rate in LOWER_RATES
      for upper_rate in UPPER_RATES
      for cosine in (0.0, 1.0)
    ]
  )
  table = bilevel.methods(5, 5, blocks=(upper_blocks, lower_blocks))
  rows = []
  start = metric(np.full(10, -2.0))
  for name, upper_step, storm in variants:
    inner, indexed = table[name].step_samples, table[name].indexed
    rounds = 1 / PERIOD if name == 'bo_rep' else 1
    steps = int(budget / (size * (2 + inner * rounds)))

    def make(rates, name=name, upper_step=upper_step, storm=storm, steps=steps):
      lower_rate, upper_rate, cosine = rates
      optimizer = optax.sgd(lower_rate)
      estimator = table[name].make(level, level, optimizer, lower_rate)
      if storm:
        estimator = optlab.with_storm(estimator, 0.1)
      rate = bilevel.schedule(upper_rate, cosine > 0, steps)
      beta = 0.0 if storm else 0.9
      return estimator, bilevel.upper_step(upper_step, rate, beta)

    def run(rates, seed, data, make=make, inner=inner, indexed=indexed,
            steps=steps):  # fmt: skip
      step = optlab.train_step(*make(rates))
      lower_data, upper_data = data
      key = jax.random.key(seed)

      def body(state, t):
        # Blocks depend on the seed alone, so all rates share them.
        keys = jax.random.split(jax.random.fold_in(key, t))
        i = jax.random.randint(keys[0], (1 + inner,), 0, lower_blocks)
        j = jax.random.randint(keys[1], (), 0, upper_blocks)
        take = lambda part, k: jax.tree.map(lambda leaf: leaf[k], part)
        up, low = take(upper_data, j), take(lower_data, i[0])
        if indexed:
          up, low = (
            optlab.bilevel.IndexedBatch(j, up),
            optlab.bilevel.IndexedBatch(i[0], low),
          )
        rest = take(lower_data, i[1:]) if inner else ()
        return step(state, optlab.BilevelBatch(up, low, rest))[0], None

      state = optlab.init(jnp.full(10, -2.0), *make(rates), jnp.zeros(100))
      return jax.lax.scan(body, state, jnp.arange(steps))[0].params

    # All rates together, but tables of a memory one by one: they stay in place.
    lanes = 1 if indexed else len(grid)
    tune = jax.jit(
      lambda rates, data, run=run, lanes=lanes: jax.lax.map(
        lambda rate: run(rate, 100, data), rates, batch_size=lanes
      )
    )
    tuned = tune(jnp.asarray(grid, jnp.float32), data)
    scores = [metric(x) for x in np.asarray(tuned)]
    best = grid[int(np.argmin(scores))]
    repeat = jax.jit(jax.vmap(run, (None, 0, None)))
    ends = repeat(jnp.asarray(best, jnp.float32), jnp.arange(5), data)
    finals = [metric(x) for x in np.asarray(ends)]
    rows.append(
      (
        f'{name}, {upper_step}' + (', STORM' if storm else ''),
        steps,
        marked(best[0], LOWER_RATES),
        marked(best[1], UPPER_RATES),
        'cosine' if best[2] else 'constant',
        f'{np.median(finals):.2e}',
        f'{np.min(finals):.1e} to {np.max(finals):.1e}',
      )
    )
  tables.show(
    f'finite sums of {samples} quadratics, {budget} samples each; squared'
    f' gradient norm, {start:.1e} at the start, 5 seeds',
    ('method', 'steps', 'lower', 'upper', 'schedule', 'median', 'range'),
    rows,
  )


def main() -> None:
  step_overhead()
  unrolled_memory()
  finite_sum_quadratic()


if __name__ == '__main__':
  main()
