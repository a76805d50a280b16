"""Coupled compositions against the plain mini-batch, at equal samples.

Three problems, ``python -m benchmarks.fcco softmax precision contrastive``, all
if none is named, with ``quick`` a fifth of the steps on three seeds: a softmax
over many classes of which a step sees few; average precision on unbalanced
rows; contrastive learning from small batches, judged by a linear probe.
OPTLAB_DATA names a folder with a8a, w8a and MNIST; without it
rows of a8a's shape and digits take their place.

Each method has the best of one grid of rates, which goes on past its edges, on
a seed of its own, a cosine decay, and five more seeds. A rate of one of the
tracker is the mini-batch itself; differences are within the seeds, with an
interval of 95 %.
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import linear_model
from sklearn import metrics

from experiments.lab import searching
from experiments.lab import tables
from experiments.lab import verdicts
from experiments.problems import data
from experiments.problems import small_images
import optlab

FCCOBatch = optlab.multi_block.FCCOBatch
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (1, 2, 3, 4, 5)
QUICK = 5  # So many times fewer steps, and fewer seeds, where quick is asked.
FOLDER = os.environ.get('OPTLAB_DATA', '')


def run(estimator, table, batch_of, start, steps, rate, seed):
  """The parameters after a run."""
  tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
  train_step = optlab.train_step(estimator, tx)

  def step(state, key):
    return train_step(state, batch_of(key))

  state = optlab.init(start, estimator, tx, *table)
  keys = jax.random.split(jax.random.key(seed), steps)
  return jax.lax.scan(step, state, keys)[0].params


def contest(title, methods, start, steps, measure, quick):
  """A table of the methods, their rates, medians, and gaps to the first."""
  rows, first = [], None
  seeds = SEEDS[:3] if quick else SEEDS
  steps = steps // QUICK if quick else steps
  for name, (estimator, table, batch_of) in methods.items():
    final = jax.jit(
      functools.partial(run, estimator, table, batch_of, start, steps)
    )
    found = searching.search(
      RATES,
      lambda rates, _, final=final: [(r, measure(final(r, 0))) for r in rates],
    )
    values = np.array([measure(final(found.rate, seed)) for seed in seeds])
    first = values if first is None else first
    gap = verdicts.paired(values - first)
    rows.append((
      name, f'{found.rate:g}{" *" if found.edge else ""}', np.median(values),
      values.min(), values.max(),
      '-' if name == next(iter(methods)) else f'{gap.low:+.4f} to'
      f' {gap.high:+.4f}', gap.said,
    ))  # fmt: skip
  columns = 'method', 'rate', 'median', 'least', 'most', 'gap, 95 %', 'verdict'
  tables.show(f'{title}, {steps} steps', columns, rows)


# A softmax over ten thousand classes.


def softmax(
  classes=10_000, rows=50_000, width=8, sampled=512, drawn=16, steps=3000,
  quick=False,
):  # fmt: skip
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
    return estimator, (jnp.zeros(rows),), batch_of

  log_average = optlab.multi_block.track_log_average
  methods = {
    'fcco, average .1': fcco(log_average(0.1)),
    'mini-batch': fcco(log_average(1.0)),
    'fcco, mirror 1': fcco(optlab.multi_block.track_mirror(1.0)),
  }

  @jax.jit
  def measure(w):
    # A fifth of the rows: all would take as long as the run.
    loss = optax.softmax_cross_entropy_with_integer_labels
    return jnp.mean(
      jax.lax.map(
        lambda part: loss(part[0] @ w.T, part[1]),
        (x[: rows // 5], labels[: rows // 5]),
        batch_size=1000,
      )
    )

  contest(
    f'cross-entropy, {classes:,} classes, {drawn} seen in a step'
    f' (the truth {measure(truth):.3f})',
    methods, start, steps, lambda w: float(measure(w)), quick,
  )  # fmt: skip


# Average precision.


def unbalanced(name):
  """Rows and which are positive, few of them."""
  if not FOLDER:
    random = np.random.default_rng(0)
    x = (random.random((8_000, 123)) < 0.11).astype(np.float32)
    score = x @ random.normal(size=123) + 2.0 * random.normal(size=8_000)
    return x, score > np.quantile(score, 0.95)
  dataset = data.load(name, FOLDER)
  x, y = data.dense(dataset).astype(np.float32), data.signs(dataset) > 0
  if name == 'a8a':  # One positive row in eight stays.
    keep = ~y | (np.cumsum(y) % 8 == 0)
    x, y = x[keep], y[keep]
  return x, y


def precision(drawn=16, sampled=16, steps=3000, quick=False):
  """On a8a and w8a."""
  for name in ('a8a', 'w8a') if FOLDER else ('drawn',):
    average_precision(name, *unbalanced(name), drawn, sampled, steps, quick)


def average_precision(name, x, y, drawn, sampled, steps, quick):
  """A smooth average precision of few positive rows: one block for each.

  The precision at positive row i is E_j [y_j l_ij] / E_j l_ij, with the squared
  hinge l_ij of how far row j is above it.
  """
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
    return estimator, (jnp.ones((count, 2)),), batch_of

  def cross_entropy(w, batch):
    # Half of the rows positive, as many rows as the others see.
    row, others, is_positive = batch.inner
    labels = jnp.concatenate([jnp.ones(len(row)), 1.0 * is_positive])
    logits = jnp.concatenate([row, others]) @ w
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))

  average = optlab.multi_block.track_average
  methods = {
    'fcco, average .1': fcco(average(0.1)),
    'mini-batch': fcco(average(1.0)),
    'cross-entropy': (optlab.value_and_grad(cross_entropy), (), batch_of),
    'fcco, average .01': fcco(average(0.01)),
    'fcco, msvr .1': fcco(optlab.multi_block.track_msvr(0.1)),
  }

  def measure(w):
    return 1.0 - metrics.average_precision_score(y[test], x[test] @ w)

  contest(
    f'{name}, {y.mean():.1%} positive: 1 - average precision on test rows,'
    f' {sampled} + {drawn} rows a step',
    methods, start, steps, measure, quick,
  )  # fmt: skip


# Contrastive learning.


def contrastive(
  rows=2000, batch=16, width=64, temperature=0.2, steps=4000, quick=False
):
  """SogCLR beside InfoNCE: an image is a block, its negatives are few."""
  name = 'mnist' if FOLDER else 'digits'
  images = small_images.load(name, FOLDER, 0)
  pixels, labels, side = images.rows, images.labels, images.side
  rows = min(rows, len(pixels) // 2)
  train, edge = jnp.asarray(pixels[:rows]), 2 * side // 14
  start = [
    jax.random.normal(key, (a, b)) * (2 / a) ** 0.5
    for key, a, b in zip(
      jax.random.split(jax.random.key(0), 3),
      (side * side, 4 * width, width),
      (4 * width, width, width // 2),
      strict=True,
    )
  ]

  def represent(weights, x):
    hidden = jax.nn.relu(x @ weights[0])
    return jax.nn.relu(hidden @ weights[1])

  def view(key, row):
    """The image moved by a few pixels, with noise and another contrast."""
    keys = jax.random.split(key, 3)
    image = jnp.pad(row.reshape(side, side), edge)
    corner = jax.random.randint(keys[0], (2,), 0, 2 * edge + 1)
    image = jax.lax.dynamic_slice(image, corner, (side, side)).ravel()
    noise = 0.2 * jax.random.normal(keys[1], image.shape)
    return image * jax.random.uniform(keys[2], (), minval=0.5) + noise

  def inner(weights, views):
    """The logarithm of the mean of e^((s_ij - s_ii) / t) over others j."""
    z = represent(weights, views) @ weights[2]
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    scores = jnp.einsum('aid,bjd->iajb', z, z) / temperature
    own = jnp.sum(z[0] * z[1], -1) / temperature
    count = views.shape[1]
    same = jnp.eye(count, dtype=bool)[:, None, :, None]
    scores = jnp.where(same, -jnp.inf, scores - own[:, None, None, None])
    total = jax.nn.logsumexp(scores, axis=(1, 2, 3))
    return total - jnp.log(4.0 * (count - 1))

  def batch_of(count):
    def make(key):
      keys = jax.random.split(key, 3)
      blocks = optlab.sample_blocks(keys[0], rows, count)
      views = [
        jax.vmap(view)(jax.random.split(key, count), train[blocks])
        for key in keys[1:]
      ]
      return FCCOBatch(blocks, jnp.stack(views))

    return make

  def method(rate, count, outer):
    estimator = optlab.multi_block.fcco(
      inner, outer, rows, tracker=optlab.multi_block.track_log_average(rate)
    )
    return estimator, (jnp.zeros(rows),), batch_of(count)

  def alone(log_u, _):
    return log_u

  def info_nce(count):
    # The positive pair stands in the denominator, beside the others.
    others = jnp.log(2.0 * (count - 1))
    return method(1.0, count, lambda log_u, _: jax.nn.softplus(log_u + others))

  methods = {
    'SogCLR, average .1': method(0.1, batch, alone),
    'SogCLR, average .5': method(0.5, batch, alone),
    'mini-batch': method(1.0, batch, alone),
    'InfoNCE': info_nce(batch),
    f'InfoNCE, {8 * batch} rows a step': info_nce(8 * batch),
  }

  def measure(weights):
    seen = np.asarray(represent(weights, jnp.asarray(pixels)))
    probe = linear_model.RidgeClassifier(1.0).fit(seen[:rows], labels[:rows])
    return 1.0 - probe.score(seen[rows:], labels[rows:])

  contest(
    f'{name}: error of a linear probe, {rows:,} images, {batch} a step (not'
    f' trained {measure(start):.4f})',
    methods, start, steps, measure, quick,
  )  # fmt: skip


PROBLEMS = {
  'softmax': softmax,
  'precision': precision,
  'contrastive': contrastive,
}


def main(names=()):
  """Runs the problems named, or all; `quick` among them shortens all."""
  quick = 'quick' in names
  for name in [name for name in names if name != 'quick'] or PROBLEMS:
    PROBLEMS[name](quick=quick)


if __name__ == '__main__':
  main(sys.argv[1:])
