"""Which training sentences have wrong labels: a weight for each, learned.

python -m experiments.hyper_cleaning [--data_dir=DIR --dataset=trec]

Upper level: the weights' logits, against clean validation sentences. Lower
level: a classifier of bags of words, trained on the weighted sentences, of
which a share has flipped labels. Reported: the AUROC of the weights, and the
test accuracy of the classifier fitted to convergence with them, beside those
fitted to all sentences and to the clean ones.
"""

import dataclasses
from typing import NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import exceptions
from sklearn import linear_model
from sklearn import metrics

from .lab import flags
from .lab import launch
from .lab import tables
from .lab import tuning
from .lab.session import Session
from .problems import text

REPORTED = ('test_loss', 'test_accuracy', 'auroc', 'refitted_accuracy')


@dataclasses.dataclass(frozen=True)
class Config(tuning.Config):
  """Flags."""

  QUICK = {
    'flipped': (0.4,),
    'methods': ('bo_rep', 'soba'),
    'upper_steps': ('normalized',),
    'steps': 500,
    'seeds': 2,
    'tuning_seeds': 1,
  }
  MINUTES = (1, 45)

  dataset: str = text.dataset_flag()
  min_count: int = text.min_count_flag()
  flipped: tuple[float, ...] = flags.flag(
    (0.1, 0.2, 0.3, 0.4), 'Shares of flipped labels.', low=0.0
  )
  clean: int = flags.flag(
    1024, 'Training sentences kept clean, for the upper level.', low=1
  )
  l2: float = flags.flag(3e-4, 'Weight of |y|^2 / 2.', low=1e-12)
  batch: int = flags.flag(128, 'Sentences of a sample.', low=1)
  learning_rates: tuple[float, ...] = flags.flag(
    (0.1, 1.0, 10.0, 1e3, 1e5), 'Grid of upper rates.', low=0.0
  )
  inner_lr: float = flags.flag(2.0, 'Rate of the lower variable.', low=0.0)
  dual_lr: float = flags.flag(
    2.0, 'Rate of the linear system and the Neumann series.', low=0.0
  )
  steps: int = flags.flag(
    1500, 'Steps of bo_rep; the others have as many calls.', low=1
  )


def fit(config, features, labels, weights) -> linear_model.LogisticRegression:
  """The lower level solved to convergence."""
  model = linear_model.LogisticRegression(
    C=1.0 / (config.l2 * len(labels)), fit_intercept=False, max_iter=500
  )
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', exceptions.ConvergenceWarning)
    return model.fit(features, labels, sample_weight=weights)


class Rows(NamedTuple):
  """The sentences by what they are for, as bags of words."""

  train: text.Bags
  noisy: np.ndarray  # Labels to train on.
  flipped: np.ndarray  # Which of them are wrong.
  upper: text.Bags
  upper_labels: np.ndarray
  valid: text.Bags
  test: text.Bags
  blocks: tuple[int, int]  # Upper and lower.


def split(config: Config, sentences: text.Text, share: float) -> Rows:
  """Clean sentences train the weights; those for validation pick the rates."""
  count, labels = config.clean, sentences.train.labels
  if 2 * count > len(labels):
    raise flags.UserError(
      f'--clean={count}: more than half of the {len(labels)} training sentences'
    )
  if count % config.batch:
    raise flags.UserError(
      f'--clean={count}: must be a multiple of --batch={config.batch}'
    )
  blocks = count // config.batch, (len(labels) - count) // config.batch
  rows = slice(count, count + blocks[1] * config.batch)
  noisy, flipped = text.flip(labels[rows], sentences.classes, share, seed=0)
  bags, valid, test = (
    text.bags_of_words(getattr(sentences, part).tokens)
    for part in ('train', 'valid', 'test')
  )
  train = text.Bags(*(part[rows] for part in bags))
  upper = text.Bags(*(part[:count] for part in bags))
  return Rows(train, noisy, flipped, upper, labels[:count], valid, test, blocks)


def refitted(config: Config, sentences: text.Text, rows: Rows):
  """``(bags, labels, weights) -> accuracy`` of a classifier fitted anew."""
  size = len(sentences.vocabulary)

  def accuracy(bags, labels, weights=None):
    model = fit(config, bags.matrix(size), labels, weights)
    return float(model.score(rows.test.matrix(size), sentences.test.labels))

  return accuracy


def baselines(config: Config, sentences: text.Text, rows: Rows) -> dict:
  """Test accuracy of the same classifier without cleaning."""
  accuracy, clean = refitted(config, sentences, rows), ~rows.flipped
  kept = text.Bags(*(part[clean] for part in rows.train))
  return {
    'all': accuracy(rows.train, rows.noisy),
    'clean': accuracy(kept, rows.noisy[clean]),
    'upper_only': accuracy(rows.upper, rows.upper_labels),
  }


def make_problem(
  config: Config, sentences: text.Text, rows: Rows
) -> tuning.Problem:
  """The problem at one share of flipped labels."""
  noisy, flipped = rows.noisy, rows.flipped
  data = {
    'train': (np.arange(len(noisy)), rows.train, noisy),
    'upper': (rows.upper, rows.upper_labels),
    'valid': (rows.valid, sentences.valid.labels),
    'test': (rows.test, sentences.test.labels),
  }

  def scores(y, bags):
    return jnp.einsum('rl,rlc->rc', bags.values, y[bags.columns])

  def cross_entropy(y, bags, labels):
    return optax.softmax_cross_entropy_with_integer_labels(
      scores(y, bags), labels
    )

  def upper(x, y, batch):
    del x
    return jnp.mean(cross_entropy(y, *batch))

  def lower(x, y, batch):
    places, bags, labels = batch
    weights = jax.nn.sigmoid(x[places])
    losses = jnp.mean(weights * cross_entropy(y, bags, labels))
    return losses + 0.5 * config.l2 * jnp.sum(y**2)

  def sample(key, data):
    keys = jax.random.split(key)
    return (
      tuning.draw_block(keys[0], data['upper'], rows.blocks[0]),
      tuning.draw_block(keys[1], data['train'], rows.blocks[1]),
    )

  def start(key, data):
    del key
    zeros = lambda *shape: jnp.zeros(shape, config.precision)
    return zeros(len(noisy)), zeros(
      len(sentences.vocabulary), sentences.classes
    )

  def measure(x, y, data):
    del x
    correct = jnp.argmax(scores(y, data['test'][0]), 1) == data['test'][1]
    return {
      'valid_loss': jnp.mean(cross_entropy(y, *data['valid'])),
      'test_loss': jnp.mean(cross_entropy(y, *data['test'])),
      'test_accuracy': jnp.mean(correct.astype(y.dtype)),
    }

  accuracy = refitted(config, sentences, rows)

  def finish(x, y):
    del y
    weights = 1.0 / (1.0 + np.exp(-np.clip(x.astype(np.float64), -50.0, 50.0)))
    found = 0 < flipped.sum() < len(flipped) and np.all(np.isfinite(weights))
    # Of mean one, so that the penalty weighs what it does in the baselines.
    scaled = (weights + 1e-12) / np.mean(weights + 1e-12)
    return {
      'auroc': float(metrics.roc_auc_score(~flipped, weights))
      if found
      else float('nan'),
      'refitted_accuracy': accuracy(rows.train, noisy, scaled),
    }

  return tuning.Problem(
    upper, lower, data, sample, start, measure, REPORTED, finish=finish,
    blocks=rows.blocks,
  )  # fmt: skip


@launch.program
def main(config: Config) -> None:
  """Runs the comparison at every share of flipped labels."""
  sentences = text.load(
    config.dataset, config.data_dir, min_count=config.min_count
  )
  for share in config.flipped:
    if share >= 1.0:
      raise flags.UserError(f'--flipped={share}: must be below 1')
  with Session('hyper_cleaning', config, show='valid_loss') as session:
    for share in config.flipped:
      parts = split(config, sentences, share)
      problem = make_problem(config, sentences, parts)
      without = baselines(config, sentences, parts)
      session.write('baseline', flipped=share, **without)
      rows = tuning.compare(session, config, problem, f'{share:.0%} flipped')
      title = f'{sentences.name}, {share:.0%} of the labels flipped'
      tuning.show(title, problem, rows)
      tables.show(
        'Test accuracy of the same classifier without cleaning',
        ('trained on', 'accuracy'),
        [
          ('all sentences', without['all']),
          ('the clean ones', without['clean']),
          ('those of the upper level', without['upper_only']),
        ],
      )
    tuning.draw(session, config, REPORTED[0], 'hyper_cleaning', sentences.name)
    print(session.folder)


if __name__ == '__main__':
  launch.run(main, Config)
