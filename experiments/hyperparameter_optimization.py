"""Penalties learned from validation data, with and without a known answer.

python -m experiments.hyperparameter_optimization [--problem=ridge] ...

``ridge`` (diabetes data) and ``logistic`` (breast cancer data) learn the log of
one penalty; the best one is found beforehand by a line search on the exact
validation loss, and what is reported is the regret against it. ``text`` learns
a log penalty for each group, or each parameter, of a recurrent classifier.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from .lab import flags
from .lab import launch
from .lab import tuning
from .lab.session import Session
from .problems import encoders
from .problems import penalties
from .problems import text

# Log penalty before learning.
START = -7.0


@dataclasses.dataclass(frozen=True)
class Config(tuning.Config):
  """Flags."""

  QUICK = {
    'methods': ('bo_rep', 'soba', 'stocbio'),
    'steps': 1000,
    'seeds': 2,
    'tuning_seeds': 1,
  }
  MINUTES = (1, 3)

  problem: str = flags.flag(
    'ridge', 'What is regularized.', choices=('ridge', 'logistic', 'text')
  )
  dataset: str = text.dataset_flag()
  min_count: int = text.min_count_flag()
  cell: str = flags.flag('gru', 'Recurrent cell.', choices=('gru', 'lstm'))
  width: int = flags.flag(24, 'Width of embedding and state.', low=1)
  max_length: int = flags.flag(12, 'Words of a sentence.', low=1)
  precision: str = flags.flag(
    'float64', 'Floating point type.', choices=('float32', 'float64')
  )
  per_parameter: bool = flags.flag(False, 'A penalty for each parameter.')
  batch: int = flags.flag(8, 'Rows of a sample.', low=1)
  steps: int = flags.flag(
    4000, 'Steps of bo_rep; the others have as many calls.', low=1
  )
  inner_lr: float = flags.flag(0.05, 'Rate of the lower variable.', low=0.0)
  dual_lr: float = flags.flag(
    0.05, 'Rate of the linear system and the Neumann series.', low=0.0
  )
  learning_rates: tuple[float, ...] = flags.flag(
    (0.01, 0.03, 0.1, 0.3, 1.0), 'Grid of upper rates.', low=0.0
  )


def _parts(sentences: text.Text) -> dict[str, tuple]:
  """Rows of the two levels, to pick rates by, and to report."""
  half = len(sentences.valid.labels) // 2
  return {
    'train': tuple(sentences.train),
    'upper': tuple(part[:half] for part in sentences.valid),
    'valid': tuple(part[half:] for part in sentences.valid),
    'test': tuple(sentences.test),
  }


def text_problem(config: Config) -> tuning.Problem:
  """A recurrent classifier, all of it in the lower level."""
  sentences = text.load(
    config.dataset, config.data_dir, max_length=config.max_length,
    min_count=config.min_count,
  )  # fmt: skip
  if config.precision != 'float32':
    raise flags.UserError(
      '--problem=text needs --precision=float32: the cells carry float32'
    )
  init, encode = encoders.functional(
    lambda rngs: encoders.Encoder(
      len(sentences.vocabulary), config.width, rngs, cell=config.cell
    )
  )

  def losses(y, batch):
    tokens, labels = batch
    scores = encode(y['encoder'], tokens) @ y['head']
    correct = jnp.argmax(scores, axis=1) == labels
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return loss, correct

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
    like = lambda leaf: leaf.shape if config.per_parameter else ()
    full = lambda leaf: jnp.full(like(leaf), START, leaf.dtype)
    return jax.tree.map(full, y), y

  def measure(x, y, data):
    del x
    values = {}
    for part in ('valid', 'test'):
      loss, correct = losses(y, data[part])
      values[f'{part}_loss'] = jnp.mean(loss)
      values[f'{part}_accuracy'] = jnp.mean(correct.astype(loss.dtype))
    return values

  return tuning.Problem(
    upper, lower, _parts(sentences), sample, start, measure,
    ('test_loss', 'test_accuracy'),
  )  # fmt: skip


@launch.program
def main(config: Config) -> None:
  """Runs the comparison."""
  program = 'hyperparameter_optimization'
  with Session(program, config, show='valid_loss') as session:
    if config.problem == 'text':
      problem = text_problem(config)
      title = f'{config.dataset} text, penalties of a {config.cell} classifier'
    else:
      problem, best, least = penalties.linear(
        config.problem, config.batch, config.precision
      )
      session.write('answer', log_penalty=best, valid_loss=least)
      title = (
        f'{config.problem}: the best log penalty is {best:.3f}, with validation'
        f' loss {least:.5f}'
      )
    rows = tuning.compare(session, config, problem)
    tuning.show(title, problem, rows)
    tuning.draw(session, config, problem.reported[0], program, config.problem)
    print(session.folder)


if __name__ == '__main__':
  launch.run(main, Config)
