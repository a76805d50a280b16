"""A step of MECO beside a step of NCE, paired, on the plane's MLP.

Both in their leanest form: fixed noise, so that its log density of the data
(which NCE alone needs) is computed once, and drawn outside the timed loop. A
second table adds what a user writes when nothing is precomputed. A third sets
optlab's NCE beside the plain loss differentiated by JAX, to see what the
bookkeeping of bad rows costs both.

  python -m benchmarks meco
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax

from experiments.lab import tables
from experiments.problems import densities
import optlab

ROWS = 256
STEPS = 200
PAIRS = 41


def plain_nce(params, batch):
  """What a user writes without optlab."""
  model = lambda x: (
    densities.log_density(params.model, x) - params.log_normalizer
  )
  both = model(jnp.concatenate([batch.data, batch.noise]))
  n = batch.data.shape[0]
  h_data = both[:n] - batch.data_log_prob
  h_noise = both[n:] - batch.noise_log_prob
  losses = jax.nn.softplus(-h_data).mean() + jax.nn.softplus(h_noise).mean()
  return losses


def setup():
  key = jax.random.key(0)
  rows = densities.distribution('pinwheel').sample(key, ROWS)
  noise = optlab.fit_gaussian(rows, inflate=1.5)
  batch = optlab.noise_batch(noise, jax.random.key(1), rows, ROWS, True)
  mlp = densities.init_mlp(jax.random.key(2))
  return noise, batch, mlp, optlab.unnormalized.NceParams(mlp, jnp.zeros(()))


def looped(estimator, params, batch, draw=None):
  """``STEPS`` training steps in one compiled program, and its first call."""
  tx = optax.adam(1e-3)
  step = optlab.train_step(estimator, tx)
  state = optlab.init(params, estimator, tx)

  def body(state, key):
    return step(state, batch if draw is None else draw(key))

  keys = jax.random.split(jax.random.key(3), STEPS)
  run = jax.jit(lambda state: jax.lax.scan(body, state, keys))
  began = time.perf_counter()
  compiled = run.lower(state).compile()
  compile_seconds = time.perf_counter() - began

  def timed():
    began = time.perf_counter()
    (_, values) = jax.block_until_ready(compiled(state))
    return (time.perf_counter() - began) / STEPS, values

  timed()
  return timed, compile_seconds


def paired(first, second):
  """Median times and the median of the ratios second / first."""
  times = ([], [])
  for pair in range(PAIRS):
    order = (0, 1) if pair % 2 else (1, 0)
    for which in order:
      seconds, values = (first, second)[which]()
      assert jnp.all(jnp.isfinite(values))
      times[which].append(seconds)
  ratios = [b / a for a, b in zip(*times, strict=True)]
  return (
    *(1e3 * statistics.median(part) for part in times),
    statistics.median(ratios),
    min(ratios),
    max(ratios),
  )


def main() -> None:
  """Prints the ratios."""
  noise, batch, mlp, nce_params = setup()
  model = optlab.unnormalized.with_log_normalizer(densities.log_density)
  draws = {
    'MECO': lambda key: optlab.noise_batch(noise, key, batch.data, ROWS),
    'NCE': lambda key: optlab.noise_batch(noise, key, batch.data, ROWS, True),
  }
  meco, nce = optlab.meco(densities.log_density), optlab.nce(model)
  plain = optlab.value_and_grad(plain_nce)
  runs = {
    'MECO': looped(meco, mlp, batch),
    'MECO ratio-corrected': looped(
      optlab.meco(densities.log_density, ratio_correction=True), mlp, batch
    ),
    'NCE': looped(nce, nce_params, batch),
    'NCE, plain loss': looped(plain, nce_params, batch),
    'MECO, noise drawn': looped(meco, mlp, batch, draws['MECO']),
    'NCE, noise drawn and data scored': looped(
      nce, nce_params, batch, draws['NCE']
    ),
  }
  # The same numbers: optlab's NCE and the plain loss.
  ours, theirs = runs['NCE'][0]()[1], runs['NCE, plain loss'][0]()[1]
  assert jnp.allclose(ours, theirs, rtol=1e-3), (ours[-1], theirs[-1])
  pairs = [
    ('MECO', 'NCE'),
    ('MECO', 'NCE, plain loss'),
    ('MECO, noise drawn', 'NCE, noise drawn and data scored'),
    ('MECO', 'MECO ratio-corrected'),
    ('NCE', 'NCE, plain loss'),
  ]
  tables.show(
    f'Milliseconds a step, {ROWS} + {ROWS} rows, MLP 2-64-64-64-1, Adam;'
    f' medians of {PAIRS} pairs of {STEPS} steps; ratio = peer / ours',
    ['ours', 'peer', 'ours ms', 'peer ms', 'ratio', 'low', 'high'],
    [
      [ours, peer, *paired(runs[ours][0], runs[peer][0])]
      for ours, peer in pairs
    ],
  )
  tables.show(
    'Compilation, seconds',
    ['program', 'seconds'],
    [[name, seconds] for name, (_, seconds) in runs.items()],
  )


if __name__ == '__main__':
  main()
