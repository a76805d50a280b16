"""Penalties learned from validation data, with and without a known answer.

python -m experiments.hyperparameter_optimization [--problem=ridge] ...

``ridge`` (diabetes data) and ``logistic`` (breast cancer data) learn the log of
one penalty; the best one is found beforehand by a line search on the exact
validation loss, and what is reported is the regret against it. ``text`` learns
a log penalty for each group, or each parameter, of a recurrent classifier.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from sklearn import datasets

from experiments import app
from experiments import runner
from experiments import text
from experiments import tuning

# Log penalty before learning.
START = {'ridge': -7.0, 'logistic': 0.0, 'text': -7.0}
# Few rows to train on, so that a penalty helps.
TRAIN_ROWS, VALID_ROWS = 40, 200


@dataclasses.dataclass(frozen=True)
class Config(tuning.Config):
  """Flags."""

  problem: str = app.flag(
    'ridge', 'What is regularized.', choices=('ridge', 'logistic', 'text')
  )
  dataset: str = app.flag('trec', 'Sentences.', choices=text.NAMES)
  min_count: int = app.flag(
    2, 'Words seen less often in training are unknown.', low=1
  )
  cell: str = app.flag('gru', 'Recurrent cell.', choices=('gru', 'lstm'))
  width: int = app.flag(24, 'Width of embedding and state.', low=1)
  max_length: int = app.flag(12, 'Words of a sentence.', low=1)
  precision: str = app.flag(
    'float64', 'Floating point type.', choices=('float32', 'float64')
  )
  per_parameter: bool = app.flag(False, 'A penalty for each parameter.')
  batch: int = app.flag(8, 'Rows of a sample.', low=1)
  steps: int = app.flag(
    4000, 'Steps of bo_rep; the others have as many calls.', low=1
  )
  lower_rate: float = app.flag(0.05, 'Rate of the lower variable.', low=0.0)
  linear_rate: float = app.flag(
    0.05, 'Rate of the linear system and the Neumann series.', low=0.0
  )
  rates: tuple[float, ...] = app.flag(
    (0.01, 0.03, 0.1, 0.3, 1.0), 'Grid of upper rates.', low=0.0
  )


def split(features, targets):
  """Rows to train on, to validate and to test."""
  order = np.random.RandomState(0).permutation(len(targets))
  rows = np.split(order, [TRAIN_ROWS, TRAIN_ROWS + VALID_ROWS])
  features = (features - features.mean(0)) / features.std(0)
  return [(features[part], targets[part]) for part in rows]


def linear_problem(config: Config) -> tuple[tuning.Problem, float, float]:
  """Ridge or logistic regression; the best log penalty and its value."""
  if TRAIN_ROWS % config.batch or VALID_ROWS % config.batch:
    raise app.UserError(
      f'--batch={config.batch}: must divide {TRAIN_ROWS} and {VALID_ROWS} rows'
    )
  ridge = config.problem == 'ridge'
  features: Any
  targets: Any
  if ridge:
    bunch: Any = datasets.load_diabetes()
    features, targets = bunch.data, bunch.target
    targets = (targets - targets.mean()) / targets.std()
  else:
    bunch: Any = datasets.load_breast_cancer()
    features, targets = bunch.data, 2.0 * bunch.target - 1.0
  parts = [
    tuple(np.asarray(leaf, config.precision) for leaf in part)
    for part in split(features, targets)
  ]
  data = dict(zip(('train', 'valid', 'test'), parts, strict=True))

  def loss(y, part):
    features, targets = part
    scores = features @ y
    if ridge:
      return jnp.mean((scores - targets) ** 2) / 2
    return jnp.mean(jax.nn.softplus(-targets * scores))

  def upper(x, y, batch):
    del x
    return loss(y, batch)

  def lower(x, y, batch):
    return loss(y, batch) + 0.5 * jnp.exp(x) * jnp.sum(y**2)

  blocks = (VALID_ROWS // config.batch, TRAIN_ROWS // config.batch)

  def sample(key, data):
    keys = jax.random.split(key)
    return tuple(
      tuning.draw_block(key, data[part], count)
      for key, part, count in zip(keys, ('valid', 'train'), blocks, strict=True)
    )

  def start(key, data):
    del key
    size = data['train'][0].shape[1]
    return jnp.asarray(START[config.problem], config.precision), jnp.zeros(
      size, config.precision
    )

  def solve(x, data):
    """Newton's method: exact for ridge, and converged for logistic."""
    y = jnp.zeros(data['train'][0].shape[1], config.precision)
    g = lambda y: lower(x, y, data['train'])

    def body(y, _):
      step = jnp.linalg.solve(jax.hessian(g)(y), jax.grad(g)(y))
      # Damped far away, where a full step may overshoot.
      return y - step / (1.0 + 0.1 * jnp.linalg.norm(step)), None

    return jax.lax.scan(body, y, length=40)[0]

  @jax.jit
  def value(x):
    return loss(solve(x, data), data['valid'])

  found = scipy.optimize.minimize_scalar(
    lambda x: float(value(jnp.asarray(x, config.precision))),
    bounds=(-12.0, 5.0),
    method='bounded',
    options={'xatol': 1e-6},
  )

  def measure(x, y, data):
    del y
    exact = solve(x, data)
    valid_loss = loss(exact, data['valid'])
    return {
      'valid_loss': valid_loss,
      'regret': jnp.maximum(valid_loss - found.fun, 0.0),
      'test_loss': loss(exact, data['test']),
      'log_penalty': x,
    }

  problem = tuning.Problem(
    upper,
    lower,
    data,
    sample,
    start,
    measure,
    ('regret', 'test_loss', 'log_penalty'),
    blocks=blocks,
  )
  return problem, float(found.x), float(found.fun)


def text_problem(config: Config) -> tuning.Problem:
  """A recurrent classifier, all of it in the lower level."""
  sentences = text.load(
    config.dataset, config.data_dir, max_length=config.max_length,
    min_count=config.min_count,
  )  # fmt: skip
  if config.precision != 'float32':
    raise app.UserError(
      '--problem=text needs --precision=float32: the cells carry float32'
    )
  init, encode = text.functional(
    lambda rngs: text.Encoder(
      len(sentences.vocabulary), config.width, rngs, cell=config.cell
    )
  )
  half = len(sentences.valid.labels) // 2
  data = {
    'train': tuple(sentences.train),
    'upper': tuple(part[:half] for part in sentences.valid),
    'valid': tuple(part[half:] for part in sentences.valid),
    'test': tuple(sentences.test),
  }

  def losses(y, batch):
    tokens, labels = batch
    scores = encode(y['encoder'], tokens) @ y['head']
    correct = jnp.argmax(scores, axis=1) == labels
    return optax.softmax_cross_entropy_with_integer_labels(
      scores, labels
    ), correct

  def upper(x, y, batch):
    del x
    return jnp.mean(losses(y, batch)[0])

  def lower(x, y, batch):
    penalties = jax.tree.map(
      lambda log, leaf: jnp.sum(jnp.exp(log) * leaf**2), x, y
    )
    penalty = 0.5 * sum(jax.tree.leaves(penalties))
    return jnp.mean(losses(y, batch)[0]) + penalty

  def sample(key, data):
    def draw(key, part):
      rows = jax.random.randint(key, (config.batch,), 0, len(part[1]))
      return jax.tree.map(lambda leaf: leaf[rows], part)

    keys = jax.random.split(key)
    return draw(keys[0], data['upper']), draw(keys[1], data['train'])

  def start(key, data):
    del data
    shape = (config.width, sentences.classes)
    y = {'encoder': init(key), 'head': jnp.zeros(shape)}
    y = jax.tree.map(lambda leaf: leaf.astype(config.precision), y)
    x = jax.tree.map(
      lambda leaf: jnp.full(
        leaf.shape if config.per_parameter else (),
        START[config.problem],
        leaf.dtype,
      ),
      y,
    )
    return x, y

  def measure(x, y, data):
    del x
    values = {}
    for part in ('valid', 'test'):
      loss, correct = losses(y, data[part])
      values[f'{part}_loss'] = jnp.mean(loss)
      values[f'{part}_accuracy'] = jnp.mean(correct.astype(loss.dtype))
    return values

  return tuning.Problem(
    upper, lower, data, sample, start, measure, ('test_loss', 'test_accuracy')
  )


def main(config: Config) -> None:
  """Runs the comparison."""
  program = 'hyperparameter_optimization'
  with runner.Session(program, config, show='valid_loss') as session:
    if config.problem == 'text':
      problem = text_problem(config)
      title = f'{config.dataset}, penalties of a {config.cell} classifier'
    else:
      problem, best, least = linear_problem(config)
      session.write('answer', log_penalty=best, valid_loss=least)
      title = (
        f'{config.problem}: the best log penalty is {best:.3f}, with validation'
        f' loss {least:.5f}'
      )
    rows = tuning.compare(session, config, problem)
    tuning.show(title, problem, rows)
    tuning.draw(session, config, problem.reported[0], program)
    print(session.folder)


if __name__ == '__main__':
  app.run(main, Config)
