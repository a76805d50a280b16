"""Coupled compositions against the plain mini-batch, at equal samples.

A softmax over many classes of which a step sees few, and average precision on
unbalanced rows (a8a where OPTLAB_DATA is set, else rows of its shape). Each
method has the best of one grid of rates, chosen on its own seed, and three more
seeds. A rate of one of the tracker is the mini-batch itself.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import metrics

from experiments.lab import tables
from experiments.problems import data
import optlab

FCCOBatch = optlab.multi_block.FCCOBatch
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (1, 2, 3)


def run(estimator, tx, params, table, batch_of, steps, seed):
  """The parameters after a run."""
  train_step = optlab.train_step(estimator, tx)

  def step(state, key):
    return train_step(state, batch_of(key))

  state = optlab.init(params, estimator, tx, *table)
  keys = jax.random.split(jax.random.key(seed), steps)
  return jax.lax.scan(step, state, keys)[0].params


def contest(methods, start, batch_of, steps, measure):
  """Rows of a table: the method, its rate, the median and range over seeds."""
  rows = []
  for name, (estimator, table) in methods.items():

    @jax.jit
    def final(rate, seed, estimator=estimator, table=table):
      return run(
        estimator, optax.adam(rate), start, table, batch_of, steps, seed
      )

    scores = [measure(final(rate, 0)) for rate in RATES]
    best = RATES[int(np.nanargmin(scores))]
    values = [measure(final(best, seed)) for seed in SEEDS]
    rows.append((name, best, np.median(values), min(values), max(values)))
  return rows


# A softmax over ten thousand classes.


def softmax(classes=10_000, rows=50_000, width=8, sampled=512, drawn=16):
  """Cross-entropy of all rows; a step sees few rows and few classes.

  The labels are drawn from a softmax that is far from certain: where rows can
  be learned by heart, a mini-batch loses nothing by its bias.
  """
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (rows, width))
  truth = jax.random.normal(keys[1], (classes, width))
  labels = jax.random.categorical(keys[2], x @ truth.T)
  start = jnp.zeros((classes, width))
  others = classes - 1

  def inner(w, batch):
    """The logarithm of the mean of e^(s_k - s_y) over classes k but y."""
    x, label, chosen = batch
    scores = x @ w[chosen].T - jnp.sum(x * w[label], 1)[:, None]
    is_label = chosen == label[:, None]
    scores = jnp.where(is_label, -jnp.inf, scores)
    count = jnp.sum(~is_label, axis=1)
    return jax.nn.logsumexp(scores, axis=1) - jnp.log(count)

  def outer(log_u, _):
    return jax.nn.softplus(log_u + jnp.log(others))

  def batch_of(key):
    keys = jax.random.split(key)
    blocks = optlab.sample_blocks(keys[0], rows, sampled)
    chosen = jax.random.randint(keys[1], (drawn,), 0, classes)
    return FCCOBatch(blocks, (x[blocks], labels[blocks], chosen))

  def fcco(tracker):
    estimator = optlab.multi_block.fcco(inner, outer, rows, tracker=tracker)
    return estimator, (jnp.zeros(rows),)

  log_average = optlab.multi_block.track_log_average
  methods = {
    'mini-batch': fcco(log_average(1.0)),
    'fcco, average .1': fcco(log_average(0.1)),
    'fcco, mirror 1': fcco(optlab.multi_block.track_mirror(1.0)),
  }
  measure = jax.jit(
    lambda w: jnp.mean(
      jax.lax.map(
        lambda part: optax.softmax_cross_entropy_with_integer_labels(
          part[0] @ w.T, part[1]
        ),
        (x, labels),
        batch_size=1000,
      )
    )
  )
  return methods, start, batch_of, lambda w: float(measure(w))


# Average precision.


def precision(drawn=16, sampled=16):
  """A smooth average precision of few positive rows: one block for each.

  The precision at positive row i is E_j [y_j l_ij] / E_j l_ij, with the squared
  hinge l_ij of how far row j is above it.
  """
  folder = os.environ.get('OPTLAB_DATA')
  if folder:
    dataset = data.load('a8a', folder)
    x, y = data.dense(dataset).astype(np.float32), data.signs(dataset) > 0
    # Unbalanced: one positive row in eight stays.
    keep = ~y | (np.cumsum(y) % 8 == 0)
    x, y = x[keep], y[keep]
  else:
    random = np.random.default_rng(0)
    x = (random.random((8_000, 123)) < 0.11).astype(np.float32)
    score = x @ random.normal(size=123) + 2.0 * random.normal(size=8_000)
    y = score > np.quantile(score, 0.95)
  test = np.arange(len(x)) % 3 == 0
  train_x, train_y = jnp.asarray(x[~test]), jnp.asarray(y[~test])
  positives = jnp.asarray(np.flatnonzero(y[~test]), jnp.int32)
  count = len(positives)
  start = jnp.zeros(x.shape[1])

  def inner(w, batch):
    row, others, is_positive = batch
    gap = 1.0 - (row @ w)[:, None] + (others @ w)[None, :]
    hinge = jnp.maximum(gap, 0.0) ** 2
    return jnp.stack(
      [jnp.mean(hinge * is_positive, 1), jnp.mean(hinge, 1)], axis=1
    )

  def outer(u, _):
    return -u[0] / jnp.maximum(u[1], 1e-6)

  def batch_of(key):
    keys = jax.random.split(key, 3)
    blocks = optlab.sample_blocks(keys[0], count, sampled)
    others = jax.random.randint(keys[1], (drawn,), 0, len(train_x))
    index = positives[blocks]
    return FCCOBatch(blocks, (train_x[index], train_x[others], train_y[others]))

  def fcco(tracker):
    estimator = optlab.multi_block.fcco(inner, outer, count, tracker=tracker)
    return estimator, (jnp.ones((count, 2)),)

  def cross_entropy(w, batch):
    # Half of the rows positive, as many rows as the others see.
    row, others, is_positive = batch.inner
    labels = jnp.concatenate([jnp.ones(len(row)), 1.0 * is_positive])
    logits = jnp.concatenate([row, others]) @ w
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))

  average = optlab.multi_block.track_average
  methods = {
    'cross-entropy': (optlab.value_and_grad(cross_entropy), ()),
    'mini-batch': fcco(average(1.0)),
    'fcco, average .1': fcco(average(0.1)),
    'fcco, average .01': fcco(average(0.01)),
    'fcco, msvr .1': fcco(optlab.multi_block.track_msvr(0.1)),
  }

  def measure(w):
    return 1.0 - metrics.average_precision_score(y[test], x[test] @ w)

  return methods, start, batch_of, measure


def main():
  columns = 'method', 'rate', 'median', 'least', 'most'
  for name, problem, steps in (
    ('cross-entropy, 10,000 classes, 16 seen in a step', softmax, 3000),
    ('1 - average precision on test rows, 16 seen in a step', precision, 3000),
  ):
    methods, start, batch_of, measure = problem()
    rows = contest(methods, start, batch_of, steps, measure)
    tables.show(name, columns, rows)


if __name__ == '__main__':
  main()
