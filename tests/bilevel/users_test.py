"""Bilevel problems as users have them, on real data."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

ROWS, CLEAN, STEPS, SAMPLE = 5000, 1000, 1500, 200
RATE = optax.cosine_decay_schedule(0.5, STEPS)


def read(path, offset):
  with gzip.open(path) as file:
    return np.frombuffer(file.read(), np.uint8, offset=offset)


def network(y, rows):
  return jnp.tanh(rows @ y['first'] + y['bias']) @ y['last']


def losses(y, rows, labels):
  scores = network(y, rows)
  return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def upper(x, y, batch):
  return jnp.mean(losses(y, *batch))


def lower(x, y, batch):
  """A weight for each row, and an indefinite Hessian."""
  index, rows, labels = batch
  weights = jax.nn.sigmoid(x[index])
  penalty = 2e-4 * optax.tree.norm(y, squared=True)
  return jnp.mean(weights * losses(y, rows, labels)) + penalty


def mnist(folder):
  images = read(folder / 'mnist/t10k-images-idx3-ubyte.gz', 16)
  images = (images.reshape(-1, 784) / 255).astype(np.float32)
  labels = read(folder / 'mnist/t10k-labels-idx1-ubyte.gz', 8)
  return images, labels.astype(np.int32)


@pytest.mark.slow
def test_weights_of_mnist_rows_undo_flipped_labels(data_dir):
  """40 % flipped: within a point of training on the right ones alone."""
  images, labels = mnist(data_dir)
  random = np.random.default_rng(0)
  flipped = random.random(ROWS) < 0.4
  noisy = labels[:ROWS].copy()
  noisy[flipped] += random.integers(1, 10, flipped.sum())
  noisy = jnp.asarray(noisy % 10)
  valid, rest = slice(ROWS, ROWS + CLEAN), slice(ROWS + CLEAN, None)
  images, labels = jnp.asarray(images), jnp.asarray(labels)

  def draw(key):
    keys = jax.random.split(key)
    index = jax.random.randint(keys[0], (SAMPLE,), 0, ROWS)
    clean = jax.random.randint(keys[1], (SAMPLE,), 0, CLEAN)
    below = index, images[index], noisy[index]
    return below, (images[valid][clean], labels[valid][clean])

  keys = jax.random.split(jax.random.key(1))
  y = {
    'first': jax.random.normal(keys[0], (784, 32)) / 28.0,
    'bias': jnp.zeros(32),
    'last': jax.random.normal(keys[1], (32, 10)) / 5.7,
  }

  def accuracy(estimator, x=None, lower_steps=0):
    tx = optax.sgd(0.0) if x is not None else optax.adam(0.1)
    step = optlab.train_step(estimator, tx)

    def advance(state, key):
      below, above = draw(key)
      fresh = ()
      if lower_steps:
        keys = jax.random.split(jax.random.fold_in(key, 1), lower_steps)
        fresh = jax.vmap(lambda key: draw(key)[0])(keys)
      return step(state, optlab.BilevelBatch(above, below, fresh))

    start = jnp.zeros(ROWS) if x is None else x
    state = optlab.init(start, estimator, tx, y)
    keys = jax.random.split(jax.random.key(2), STEPS)
    state, _ = jax.jit(lambda s: jax.lax.scan(advance, s, keys))(state)
    scores = network(state.estimator_state.inner, images[rest])
    right = jnp.mean(jnp.argmax(scores, 1) == labels[rest])
    return float(right), np.asarray(jax.nn.sigmoid(state.params))

  levels = upper, lower, optax.sgd(RATE), 0.1
  soba = optlab.soba(*levels, damping=0.1)
  right = accuracy(soba, jnp.where(jnp.asarray(flipped), -20.0, 20.0))[0]
  equal = accuracy(soba, jnp.zeros(ROWS))[0]
  assert equal < right - 0.03
  bo_rep = optlab.bo_rep(*levels, damping=0.1)
  implicit = optlab.implicit(*levels[:3], damping=0.1, max_steps=10)
  unrolled = optlab.unrolled(*levels[:3])
  f2sa = optlab.bilevel.f2sa(*levels[:3], 1.0)
  for estimator, steps in (
    (soba, 0),
    (bo_rep, 5),
    (implicit, 5),
    (unrolled, 5),
    (f2sa, 5),
  ):
    learned, weights = accuracy(estimator, lower_steps=steps)
    assert learned > right - 0.01
    assert weights[~flipped].mean() > weights[flipped].mean() + 0.4


@pytest.mark.slow
def test_twenty_images_stand_for_mnist(data_dir):
  """Where the lower level lags, the value flatters and `ok` is false."""
  images, labels = mnist(data_dir)
  first = [
    np.flatnonzero(labels[:ROWS] == k)[i] for i in (0, 1) for k in range(10)
  ]
  start, few = jnp.asarray(images[first]), jnp.arange(20) % 10
  images, labels = jnp.asarray(images), jnp.asarray(labels)

  def cross_entropy(y, rows, labels):
    scores = rows @ y
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return jnp.mean(losses)

  def upper(x, y, batch):
    return cross_entropy(y, *batch)

  def lower(x, y, batch):
    return cross_entropy(y, x, few) + 5e-4 * jnp.sum(y**2)

  solve = jax.jit(optlab.argmin(lower))

  def accuracy(x):
    """Of a classifier that is trained on the twenty alone, to the end."""
    scores = images[ROWS:] @ solve(x, jnp.zeros((784, 10))).inner
    return jnp.mean(jnp.argmax(scores, 1) == labels[ROWS:])

  def train(estimator, steps):
    tx = optax.adam(optax.cosine_decay_schedule(0.01, steps))
    step = optlab.train_step(estimator, tx)

    def advance(state, key):
      index = jax.random.randint(key, (256,), 0, ROWS)
      sample = images[index], labels[index]
      return step(state, optlab.BilevelBatch(sample, None))

    state = optlab.init(start, estimator, tx, jnp.zeros((784, 10)))
    keys = jax.random.split(jax.random.key(0), steps)
    state, values = jax.jit(lambda s: jax.lax.scan(advance, s, keys))(state)
    good = 1 - state.estimator_state.info.total_not_ok / steps
    return jnp.mean(values[-50:]), accuracy(state.params), good

  assert accuracy(start) < 0.65
  run = optax.sgd(0.3)
  cold = optlab.unrolled(upper, lower, run, lower_steps=30, warm=False)
  implicit = optlab.implicit(upper, lower, run, lower_steps=10, max_steps=20)
  for estimator in (cold, implicit):
    _, right, good = train(estimator, 600)
    assert right > 0.84
    assert good == 1
  slow = optlab.soba(upper, lower, optax.sgd(0.05), 0.05)
  value, right, good = train(slow, 1500)
  assert value < 0.6
  assert right < 0.4
  assert good < 0.25
