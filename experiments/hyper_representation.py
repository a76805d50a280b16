"""A recurrent encoder that makes few-shot tasks easy for a linear head.

python -m experiments.hyper_representation [--data_dir=DIR --dataset=trec]

Each pair of classes is a task. Lower level: one linear head a task, on support
sentences; upper level: the encoder (an embedding and a GRU or LSTM, from
scratch or from word vectors), on query sentences. Reported: loss and accuracy
of the heads on test sentences, and, where the data set has more than two
classes, few-shot accuracy on tasks with a class that training never saw.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .lab import flags
from .lab import launch
from .lab import tuning
from .lab.session import Session
from .problems import data as files
from .problems import encoders
from .problems import text


@dataclasses.dataclass(frozen=True)
class Config(tuning.Config):
  """Flags."""

  QUICK = {
    'methods': ('bo_rep', 'soba'),
    'upper_steps': ('normalized',),
    'steps': 100,
    'seeds': 2,
    'tuning_seeds': 1,
  }
  MINUTES = (1, 8)

  dataset: str = text.dataset_flag()
  min_count: int = text.min_count_flag()
  cell: str = flags.flag('gru', 'Recurrent cell.', choices=('gru', 'lstm'))
  width: int = flags.flag(24, 'Width of embedding and state.', low=1)
  max_length: int = flags.flag(12, 'Words of a sentence.', low=1)
  vectors: str = flags.flag(
    '', 'File of word vectors of that width, "word number ..." a line.'
  )
  batch: int = flags.flag(8, 'Sentences of a class in a sample.', low=1)
  shots: int = flags.flag(10, 'Sentences of a class in a few-shot task.', low=1)
  l2: float = flags.flag(0.1, 'Weight of |y|^2 / 2.', low=1e-12)
  steps: int = flags.flag(
    500, 'Steps of bo_rep; the others have as many calls.', low=1
  )
  inner_lr: float = flags.flag(0.5, 'Rate of the lower variable.', low=0.0)
  dual_lr: float = flags.flag(
    0.5, 'Rate of the linear system and the Neumann series.', low=0.0
  )
  learning_rates: tuple[float, ...] = flags.flag(
    (0.1, 0.3, 1.0, 3.0, 10.0), 'Grid of upper rates.', low=0.0
  )


def read_vectors(path: str, vocabulary: list[str], width: int) -> np.ndarray:
  """Word vectors for a vocabulary; words that the file lacks are random.

  Args:
    path: A text file, a word and its numbers on each line.
    vocabulary: The words by number.
    width: Numbers of a word.

  Returns:
    float32 [words, width].

  Raises:
    UserError: The file can't be read, or a line has another width.
  """
  table = np.random.RandomState(0).normal(size=(len(vocabulary), width))
  table = (table / np.sqrt(width)).astype(np.float32)
  place = {word: i for i, word in enumerate(vocabulary)}
  found = 0
  try:
    content = files.read(pathlib.Path(path)).decode(errors='replace')
  except flags.UserError as error:
    raise flags.UserError(f'--vectors={error}') from error
  lines = content.split('\n')
  for number, line in enumerate(lines, 1):
    word, *numbers = line.split()[:1] + line.split()[1:] or ['']
    if word not in place:
      continue
    try:
      vector = np.array(numbers, np.float32)
    except ValueError as error:
      raise flags.UserError(
        f'--vectors={path}: line {number}: {error}'
      ) from error
    if vector.shape != (width,) or not np.all(np.isfinite(vector)):
      raise flags.UserError(
        f'--vectors={path}: line {number} has {np.sum(np.isfinite(vector))}'
        f' finite numbers, not {width} (--width)'
      )
    table[place[word]] = vector
    found += 1
  if not found:
    raise flags.UserError(
      f'--vectors={path}: has none of the {len(vocabulary)} words of the text'
    )
  return table


def class_table(labels: np.ndarray, classes: list[int]) -> np.ndarray:
  """Row numbers by class, each list repeated to one length.

  Args:
    labels: int [rows].
    classes: The classes wanted.

  Returns:
    int32 [classes, longest].
  """
  return table([np.flatnonzero(labels == c) for c in classes])


def table(rows: list[np.ndarray]) -> np.ndarray:
  """Lists of row numbers, each repeated to one length."""
  longest = max(len(r) for r in rows)
  return np.stack([np.resize(r, longest) for r in rows]).astype(np.int32)


def halves(labels: np.ndarray, classes: list[int]) -> list[np.ndarray]:
  """Two tables of row numbers by class that share no row."""
  rows = [np.flatnonzero(labels == c) for c in classes]
  parts = [np.array_split(r, 2) for r in rows]
  return [table(list(part)) for part in zip(*parts, strict=True)]


def few_shot(config, sentences, support, query, seen, held_out) -> float:
  """Accuracy of ridge heads on few sentences of a class and the held-out one.

  Args:
    config: The flags.
    sentences: The text.
    support: Encoded training sentences.
    query: Encoded test sentences.
    seen: The other classes.
    held_out: The class that training never saw.

  Returns:
    The mean over tasks.
  """
  random, scores = np.random.RandomState(0), []
  labels, signs = sentences.test.labels, np.array([-1.0, 1.0])
  train = sentences.train.labels
  for other in seen * 10:
    pair = (other, held_out)
    rows = [
      random.choice(np.flatnonzero(train == c), config.shots, False)
      for c in pair
    ]
    a = support[np.concatenate(rows)]
    gram = a.T @ a + config.l2 * len(a) * np.eye(a.shape[1])
    head = 0 * a[0]
    if np.all(np.isfinite(a)):
      head = np.linalg.solve(gram, a.T @ np.repeat(signs, config.shots))
    accuracies = [
      np.mean(sign * (query[labels == c] @ head) > 0)
      for c, sign in zip(pair, signs, strict=True)
    ]
    scores.append(np.mean(accuracies))
  return float(np.mean(scores))


def classes(sentences: text.Text) -> tuple[list[int], int | None]:
  """The frequent classes, and the one of them that is held out."""
  counts = np.bincount(sentences.train.labels, minlength=sentences.classes)
  frequent = [c for c in range(sentences.classes) if counts[c] >= 200]
  held_out = frequent[-1] if len(frequent) > 2 else None
  return [c for c in frequent if c != held_out], held_out


def make_encoder(config: Config, vocabulary: list[str]):
  """``init(key) -> x`` and ``encode(x, tokens)``."""
  vectors = None
  if config.vectors:
    vectors = read_vectors(config.vectors, vocabulary, config.width)
  return encoders.functional(
    lambda rngs: encoders.Encoder(
      len(vocabulary), config.width, rngs, cell=config.cell, vectors=vectors
    )
  )


def make_data(sentences: text.Text, seen: list[int]) -> dict[str, Any]:
  """Support and query sentences are different halves of each class."""
  support, query = halves(sentences.train.labels, seen)
  data: dict[str, Any] = {
    'tokens': sentences.train.tokens,
    'support': support,
    'query': query,
  }
  for part in ('valid', 'test'):
    rows = getattr(sentences, part)
    data[part] = rows.tokens, class_table(rows.labels, seen)
  return data


def make_problem(config: Config, sentences: text.Text) -> tuning.Problem:
  """Pairs of classes as tasks; the last frequent class is held out."""
  seen, held_out = classes(sentences)
  fewest = min(np.bincount(sentences.train.labels)[[*seen, held_out or 0]])
  if held_out is not None and config.shots > fewest:
    raise flags.UserError(
      f'--shots={config.shots}: a class has {fewest} training sentences'
    )
  pairs = np.array(list(itertools.combinations(range(len(seen)), 2)))
  init, encode = make_encoder(config, sentences.vocabulary)
  data = make_data(sentences, seen)

  def head_losses(y, features):
    """Of each task's head on ``[classes, sentences, width]``; margins too."""
    signs = jnp.array([-1.0, 1.0], features.dtype)[:, None]
    task = lambda w, b, pair: signs * (features[pair] @ w + b)
    margins = jax.vmap(task)(y['w'], y['b'], jnp.asarray(pairs))
    return jnp.mean(jax.nn.softplus(-margins)), margins

  def features_of(x, tokens):
    flat = tokens.reshape(-1, tokens.shape[-1])
    return encode(x, flat).reshape(*tokens.shape[:-1], -1)

  def upper(x, y, tokens):
    return head_losses(y, features_of(x, tokens))[0]

  def lower(x, y, tokens):
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
    loss = head_losses(y, features_of(x, tokens))[0]
    return loss + 0.5 * config.l2 * squares / len(pairs)

  def sample(key, data):
    def draw(key, table):
      shape = (len(seen), config.batch)
      chosen = jax.random.randint(key, shape, 0, table.shape[1])
      return data['tokens'][jnp.take_along_axis(table, chosen, axis=1)]

    keys = jax.random.split(key)
    return draw(keys[0], data['query']), draw(keys[1], data['support'])

  def start(key, data):
    del data
    x = jax.tree.map(lambda leaf: leaf.astype(config.precision), init(key))
    zeros = lambda *shape: jnp.zeros(shape, config.precision)
    return x, {'w': zeros(len(pairs), config.width), 'b': zeros(len(pairs))}

  def measure(x, y, data):
    values = {}
    for part in ('valid', 'test'):
      tokens, table = data[part]
      loss, margins = head_losses(y, encode(x, tokens)[table])
      values[f'{part}_loss'] = loss
      values[f'{part}_accuracy'] = jnp.mean((margins > 0).astype(loss.dtype))
    return values

  encoded = jax.jit(encode)

  def finish(x, y):
    del y
    if held_out is None:
      return {}
    support, query = (
      np.asarray(encoded(x, part.tokens))
      for part in (sentences.train, sentences.test)
    )
    found = few_shot(config, sentences, support, query, seen, held_out)
    return {'few_shot_accuracy': found}

  reported = ('test_loss', 'test_accuracy')
  if held_out is not None:
    reported += ('few_shot_accuracy',)
  return tuning.Problem(
    upper, lower, data, sample, start, measure, reported, finish=finish
  )


@launch.program
def main(config: Config) -> None:
  """Runs the comparison."""
  sentences = text.load(
    config.dataset, config.data_dir, max_length=config.max_length,
    min_count=config.min_count,
  )  # fmt: skip
  problem = make_problem(config, sentences)
  program = 'hyper_representation'
  with Session(program, config, show='valid_loss') as session:
    rows = tuning.compare(session, config, problem)
    title = f'{sentences.name}, {config.cell} encoder'
    tuning.show(title, problem, rows)
    tuning.draw(session, config, problem.reported[0], program, title)
    print(session.folder)


if __name__ == '__main__':
  launch.run(main, Config)
