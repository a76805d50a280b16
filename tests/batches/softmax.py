"""A small softmax regression, whose losses are by example."""

import numpy as np
import optax

N = 40


def losses(params, batch):
  x, y = batch
  return optax.softmax_cross_entropy_with_integer_labels(x @ params['w'], y)


def dataset():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(N, 4)).astype(np.float32)
  labels = np.argmax(x[:, :3] + 0.5 * rng.normal(size=(N, 3)), 1)
  return x, labels.astype(np.int32)
