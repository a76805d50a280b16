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


@pytest.mark.slow
def test_weights_of_mnist_rows_undo_flipped_labels(data_dir):
  """40 % flipped: within a point of training on the right ones alone."""
  folder = data_dir / 'mnist'
  images = read(folder / 't10k-images-idx3-ubyte.gz', 16).reshape(-1, 784)
  images = (images / 255).astype(np.float32)
  labels = read(folder / 't10k-labels-idx1-ubyte.gz', 8).astype(np.int32)
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
  for estimator, steps in ((soba, 0), (bo_rep, 5)):
    learned, weights = accuracy(estimator, lower_steps=steps)
    assert learned > right - 0.01
    assert weights[~flipped].mean() > weights[flipped].mean() + 0.4
