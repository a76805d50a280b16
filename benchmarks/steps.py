"""One step of every method, with its roofline: on a CPU, a GPU or a TPU.

The floor of a step is the longer of two times: the bytes that the compiled
program accesses over the bandwidth of a large copy, and its operations over the
rate of a large float32 matrix product, both measured first, in the same run.
``share`` is the floor over the time: near 1, nothing is left to gain but a
program that moves less. Bytes and operations are XLA's own counts, which take
each loop once; a step with loops therefore shows a floor that is too low.

  python -m benchmarks steps
"""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab

ROUNDS = 15
WIDTHS = {'cpu': 512}  # Elsewhere 4096.
BATCH, FEATURES, CLASSES = 256, 256, 10
BLOCKS, SAMPLED, SIZE = 4096, 64, 128


def network(key, width):
  sizes = (FEATURES, width, width, CLASSES)
  keys = jax.random.split(key, len(sizes) - 1)
  return [
    jax.random.normal(k, shape) / np.sqrt(shape[0])
    for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)
  ]


def predict(params, x):
  for matrix in params[:-1]:
    x = jnp.tanh(x @ matrix)
  return x @ params[-1]


def losses(params, batch):
  return optax.softmax_cross_entropy_with_integer_labels(
    predict(params, batch[0]), batch[1]
  )


def mean_loss(params, batch):
  return jnp.mean(losses(params, batch))


def make_batch(key):
  return (
    jax.random.normal(key, (BATCH, FEATURES)),
    jax.random.randint(key, (BATCH,), 0, CLASSES),
  )


def plain(tx, estimator=None):
  """A method on the network."""

  def make(width):
    estimate = estimator or optlab.value_and_grad(mean_loss)
    state = optlab.init(network(jax.random.key(0), width), estimate, tx)
    return optlab.train_step(estimate, tx), state, make_batch(jax.random.key(1))

  return make


def newton(curvature, solver=None):
  """GNS-Newton on logistic regression with as many features as the network."""

  def make(width):
    del width
    x, labels = make_batch(jax.random.key(1))
    batch = x, jnp.where(labels < CLASSES // 2, 1.0, -1.0)

    def loss(w, batch):
      margin = batch[1] * (batch[0] @ w)
      return jnp.mean(jax.nn.softplus(-margin)) + 1e-3 * jnp.sum(w**2)

    estimate = optlab.with_curvature(
      optlab.value_and_grad(loss), curvature(loss)
    )
    tx = optlab.gns_newton(solver)
    state = optlab.init(jnp.zeros(FEATURES), estimate, tx)
    return optlab.train_step(estimate, tx), state, batch

  return make


def bilevel(make_estimator, steps=1):
  """Weights of the classes above, the network below."""

  def upper(x, y, batch):
    del x
    return mean_loss(y, batch)

  def lower(x, y, batch):
    weights = jax.nn.softmax(x)[batch[1]]
    ridge = sum(jnp.sum(leaf**2) for leaf in y)
    return jnp.sum(weights * losses(y, batch)) + 1e-3 * ridge

  def make(width):
    estimator, tx = make_estimator(upper, lower), optax.adam(1e-2)
    batch = make_batch(jax.random.key(1))
    samples = ()
    if steps:
      samples = jax.tree.map(lambda leaf: jnp.stack([leaf] * steps), batch)
    state = optlab.init(
      jnp.zeros(CLASSES), estimator, tx, network(jax.random.key(0), width)
    )
    return (
      optlab.train_step(estimator, tx),
      state,
      optlab.BilevelBatch(batch, batch, samples),
    )

  return make


def blocks(width):
  """Least squares in each of many blocks."""
  del width
  estimator = optlab.bsvrb(
    lambda x, y, target: 0.5 * jnp.sum((y - target) ** 2),
    lambda x, y, rows: 0.5 * jnp.mean((rows @ (y - x)) ** 2),
    BLOCKS,
  )
  tx = optax.adam(1e-2)
  state = optlab.init(jnp.zeros(SIZE), estimator, tx, jnp.zeros((BLOCKS, SIZE)))
  key = jax.random.key(0)
  batch = optlab.BlockBatch(
    optlab.sample_blocks(key, BLOCKS, SAMPLED),
    upper=jax.random.normal(key, (SAMPLED, SIZE)),
    lower=jax.random.normal(key, (SAMPLED, 64, SIZE)),
  )
  return optlab.train_step(estimator, tx), state, batch


def unnormalized(make_estimator, log_normalizer=False):
  """An energy of the network's size, on Gaussian noise."""

  def energy(params, rows):
    return predict(params, rows)[:, 0] - 0.5 * jnp.sum(rows**2, -1)

  def make(width):
    params, tx = network(jax.random.key(0), width), optax.adam(1e-2)
    if log_normalizer:
      params = optlab.unnormalized.NceParams(params, jnp.zeros(()))
      density = optlab.unnormalized.with_log_normalizer(energy)
    else:
      density = energy
    estimator = make_estimator(density)
    noise = optlab.unnormalized.gaussian(
      jnp.zeros(FEATURES), 1.5 * jnp.eye(FEATURES)
    )
    data = jax.random.normal(jax.random.key(1), (BATCH, FEATURES))
    batch = optlab.noise_batch(noise, jax.random.key(2), data, BATCH, True)
    state = optlab.init(params, estimator, tx)
    return optlab.train_step(estimator, tx), state, batch

  return make


def growing(route):
  tx = optlab.adadagrad(1e-2, optlab.norm_test(0.5), 8, BATCH)
  return plain(tx, optlab.per_example(losses, route))


SGD = optax.sgd(1e-2)
METHODS = {
  'optax.adam': plain(optax.adam(1e-3)),
  'diffgrad': plain(optlab.diffgrad(1e-3)),
  'adagrad_norm': plain(optlab.adagrad_norm(1.0)),
  'normalized_momentum': plain(optlab.normalized_momentum(1e-2)),
  'with_storm': plain(
    SGD, optlab.with_storm(optlab.value_and_grad(mean_loss), 0.1)
  ),
  'adadagrad, ghost': growing(optlab.ghost_norms),
  'optax.lbfgs': plain(optax.lbfgs()),
  'gns, dense': newton(lambda loss: optlab.dense(optlab.hessian(loss))),
  'gns, lanczos': newton(optlab.hessian, optlab.lanczos()),
  'soba': bilevel(lambda f, g: optlab.soba(f, g, SGD, 1e-2), 0),
  'bo_rep': bilevel(lambda f, g: optlab.bo_rep(f, g, SGD, 1e-2), 5),
  'stocbio': bilevel(lambda f, g: optlab.stocbio(f, g, SGD, 1e-2), 5),
  'unrolled': bilevel(lambda f, g: optlab.unrolled(f, g, SGD), 5),
  'bsvrb': blocks,
  'nce': unnormalized(optlab.nce, log_normalizer=True),
  'meco': unnormalized(optlab.meco),
}


def median_ms(call):
  call()  # Warm.
  seconds = []
  for _ in range(ROUNDS):
    began = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - began)
  return 1e3 * float(np.median(seconds))


def ceilings():
  """Gigabytes a second of a copy, gigaflops of a matrix product."""
  big = jax.default_backend() != 'cpu'
  carried = [jnp.ones((2**28 if big else 2**25,))]
  copy = jax.jit(lambda x: x + 1.0, donate_argnums=0)  # No fresh pages.

  def move():
    carried[0] = jax.block_until_ready(copy(carried[0]))

  ms = median_ms(move)
  bandwidth = 2 * carried[0].nbytes / ms / 1e6
  side = 8192 if big else 2048
  matrix = jax.random.normal(jax.random.key(0), (side, side))
  product = jax.jit(jnp.dot)
  ms = median_ms(lambda: jax.block_until_ready(product(matrix, matrix)))
  return bandwidth, 2 * side**3 / ms / 1e6


def measure(make, width):
  """Milliseconds, operations and bytes of a step."""
  step, state, batch = make(width)
  compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
  cost = compiled.cost_analysis() or {}
  carried = [jax.tree.map(jnp.array, state)]  # optax.lbfgs shares buffers.

  def call():
    carried[0], value = compiled(carried[0], batch)
    jax.block_until_ready((carried[0], value))

  ms = median_ms(call)
  return ms, cost.get('flops', np.nan), cost.get('bytes accessed', np.nan)


def main():
  device = jax.devices()[0]
  width = WIDTHS.get(device.platform, 4096)
  bandwidth, rate = ceilings()
  print(f'{device.device_kind}, jax {jax.__version__}, network width {width}')
  print(
    f'copy {bandwidth:.0f} GB/s, float32 matrix product'
    f' {rate / 1e3:.2f} TFLOP/s'
  )
  if device.platform == 'cpu':
    print('No accelerator is at hand: this table is of the CPU.')
  print(
    f'{"step":20} {"ms":>8} {"/ adam":>7} {"GFLOP":>8} {"MB":>8}'
    f' {"floor ms":>9} {"share":>6} {"bound":>6}'
  )
  reference = None
  for name, make in METHODS.items():
    ms, flops, moved = measure(make, width)
    reference = reference or ms
    arithmetic, traffic = flops / rate / 1e6, moved / bandwidth / 1e6
    floor = max(arithmetic, traffic)
    print(
      f'{name:20} {ms:8.3f} {ms / reference:7.2f} {flops / 1e9:8.2f}'
      f' {moved / 1e6:8.1f} {floor:9.3f} {floor / ms:6.2f}'
      f' {"bytes" if traffic > arithmetic else "flops":>6}',
      flush=True,
    )


if __name__ == '__main__':
  main()
