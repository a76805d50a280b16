"""Pairs of a context and a label, of ten thousand: synthetic, and next words.

The normalizer of p(label given context) varies with the context, which is what
trackers of their own are for.
"""

import os
from typing import NamedTuple

import numpy as np

from ..lab import flags
from . import text

LABELS, CONTEXTS, WIDTH = 10_000, 500, 6
ROWS = 400_000
HELD_OUT = 1000


class Pairs(NamedTuple):
  """Rows of a context and a label.

  Attributes:
    train: int32 ``[rows, 2]``, context and label.
    valid: For choosing rates.
    test: For what is reported.
    contexts: Number of contexts.
    labels: Number of labels.
  """

  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray
  contexts: int
  labels: int


def synthetic() -> Pairs:
  """Labels drawn from a softmax that is sharp in some contexts, flat in others.

  The logits are inner products of Gaussian vectors; those of the contexts are
  of lengths from a half to four, so that log Z varies by several nats.
  """
  random = np.random.default_rng(0)
  of_labels = random.normal(size=(LABELS, WIDTH))
  of_contexts = random.normal(size=(CONTEXTS, WIDTH)) / np.sqrt(WIDTH)
  logits = np.linspace(0.5, 4.0, CONTEXTS)[:, None] * of_contexts @ of_labels.T
  share = np.exp(logits - logits.max(1, keepdims=True))
  ends = np.cumsum(share, 1) / share.sum(1, keepdims=True)

  def draw(rows):
    context = random.integers(0, CONTEXTS, rows)
    place = random.random(rows)
    label = [
      np.searchsorted(ends[c], u) for c, u in zip(context, place, strict=True)
    ]
    pairs = np.stack([context, np.minimum(label, LABELS - 1)], 1)
    return pairs.astype(np.int32)

  return Pairs(draw(ROWS), draw(HELD_OUT), draw(HELD_OUT), CONTEXTS, LABELS)


def next_words(name: str = 'mr') -> Pairs:
  """A word and the one after it; the words are contexts and labels."""
  folder = os.environ.get('OPTLAB_DATA', '')
  if not folder:
    raise flags.UserError(
      '--problem=next_word: set OPTLAB_DATA to a folder with the sentences'
      f' ({", ".join(stem for stem in text.FILES[name] if stem)})'
    )
  data = text.load(name, folder)

  def pairs(part):
    tokens = part.tokens
    pairs = np.stack([tokens[:, :-1], tokens[:, 1:]], -1).reshape(-1, 2)
    return pairs[(pairs != text.PAD).all(1)].astype(np.int32)

  size = len(data.vocabulary)
  valid, test = (pairs(part)[:HELD_OUT] for part in (data.valid, data.test))
  return Pairs(pairs(data.train), valid, test, size, size)
