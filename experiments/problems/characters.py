"""Characters or subwords of a text, and a small transformer that reads them.

The default text needs no file: the reference of the Python language as Python
itself carries it, half a million characters of English.
"""

from collections.abc import Callable
import pathlib
import pydoc_data.topics
import re
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..lab import flags
from . import data

MAX_CHARACTERS = 255  # The rest of the alphabet counts as one.
OTHER = '\ufffd'


class Text(NamedTuple):
  """Windows of a text; the characters or subwords by number.

  Attributes:
    name: Of its source.
    train: int32 [windows, length + 1].
    valid: For choosing rates.
    test: For what is reported.
    alphabet: The characters, `OTHER` for all others, and the subwords.
  """

  name: str
  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray
  alphabet: tuple[str, ...]


def read(data_dir: str) -> tuple[str, str]:
  """A name, and the text: of a file, of all files of a folder, or Python's."""
  if not data_dir:
    topics = pydoc_data.topics.topics
    return 'the Python reference', '\n'.join(topics[k] for k in sorted(topics))
  path = pathlib.Path(data_dir)
  files = sorted(path.rglob('*')) if path.is_dir() else [path]
  parts = []
  for file in files:
    if not file.is_file():
      continue
    raw = data.read(file)
    try:
      parts.append(raw.decode())
    except UnicodeDecodeError:
      parts.append(raw.decode('iso-8859-1'))
  if not parts:
    raise flags.UserError(f'--data_dir={data_dir}: no file, nor one in it')
  return path.name, '\n'.join(parts)


def join_pairs(
  codes: np.ndarray, counts: np.ndarray, alphabet: list[str], size: int
) -> np.ndarray:
  """Byte-pair encoding: joins the commonest pair until there are so many codes.

  Sennrich, Haddow, Birch, *Neural Machine Translation of Rare Words with
  Subword Units*, 2016, https://arxiv.org/abs/1508.07909.

  Args:
    codes: Words, one after the other, -1 behind each.
    counts: How often the word of each code occurs.
    alphabet: What the codes stand for, to which the pairs are added.
    size: Its length at the end; less where no pair occurs twice.

  Returns:
    The codes of the same words.
  """
  while len(alphabet) < size:
    first, second = codes[:-1], codes[1:]
    inside = (first >= 0) & (second >= 0)
    pairs = np.bincount((first * size + second)[inside], counts[:-1][inside])
    if not len(pairs) or np.max(pairs) < 2:
      break
    a, b = divmod(int(np.argmax(pairs)), size)
    at = np.flatnonzero((first == a) & (second == b))
    if a == b:  # From the left, where they overlap.
      place = np.arange(len(at))
      begins = np.append(True, np.diff(at) > 1)
      begun = np.maximum.accumulate(np.where(begins, place, 0))
      at = at[(place - begun) % 2 == 0]
    codes = codes.copy()
    codes[at] = len(alphabet)
    codes, counts = np.delete(codes, at + 1), np.delete(counts, at + 1)
    alphabet.append(alphabet[a] + alphabet[b])
  return codes


def encode(text: str, subwords: int) -> tuple[np.ndarray, tuple[str, ...]]:
  """A text by numbers, and what they stand for.

  Args:
    text: The text.
    subwords: How many numbers there are; 0 for characters alone. Pairs are
      learned from the first half, of which nothing is held out.

  Returns:
    Numbers, and the alphabet of `Text`.
  """
  seen, counts = np.unique(np.array(list(text)), return_counts=True)
  common = np.sort(seen[np.argsort(-counts, kind='stable')[:MAX_CHARACTERS]])
  alphabet = [*map(str, common), OTHER]
  number = {letter: i for i, letter in enumerate(alphabet)}
  spell = lambda word: [number.get(letter, len(common)) for letter in word]
  if not subwords:
    return np.array(spell(text)), tuple(alphabet)
  parts = re.findall(r' ?\S+|\s', text)
  words, places = np.unique(parts, return_inverse=True)
  begun = np.cumsum([len(part) for part in parts]) <= len(text) // 2
  often = np.bincount(places[begun], minlength=len(words))
  spelled = [[*spell(word), -1] for word in words]
  codes = join_pairs(
    np.concatenate(spelled), np.repeat(often, [len(word) for word in spelled]),
    alphabet, subwords,
  )  # fmt: skip
  each = np.split(codes, np.flatnonzero(codes < 0) + 1)
  return np.concatenate([each[i][:-1] for i in places]), tuple(alphabet)


def load(data_dir: str, length: int, held: int, subwords: int = 0) -> Text:
  """Cuts a text into windows that do not overlap.

  Args:
    data_dir: A text file, a folder of such, or nothing for Python's reference.
    length: Characters or subwords that are predicted in a window.
    held: Windows of the validation part, and of the test part, which are
      contiguous stretches before the end and at the end.
    subwords: How many there are, the characters among them; 0 for these alone.

  Returns:
    A `Text`.

  Raises:
    UserError: There is no such text, or too little of it.
  """
  name, text = read(data_dir)
  codes, alphabet = encode(text, subwords)
  windows = len(codes) // (length + 1)
  if windows < 4 * held:
    raise flags.UserError(
      f'--data_dir={data_dir}: {windows} windows of {length}'
      f' {"subwords" if subwords else "characters"}, and {4 * held} are needed'
      f' to hold {held} out twice'
    )
  rows = codes[: windows * (length + 1)].reshape(windows, length + 1)
  train, valid, test = np.split(rows.astype(np.int32), [-2 * held, -held])
  return Text(name, train, valid, test, alphabet)


class Block(nnx.Module):
  """Attention to what came before, and a perceptron."""

  def __init__(self, width: int, heads: int, dropout: float, rngs: nnx.Rngs):
    dense = lambda n, m: nnx.Linear(n, m, use_bias=False, rngs=rngs)
    self.before = nnx.RMSNorm(width, rngs=rngs)
    self.between = nnx.RMSNorm(width, rngs=rngs)
    self.mix = dense(width, 3 * width)
    self.out = dense(width, width)
    self.up = dense(width, 4 * width)
    self.down = dense(4 * width, width)
    self.dropout = nnx.Dropout(dropout)
    self.heads = heads

  def __call__(self, x, keys=None):
    split = lambda z: z.reshape(*z.shape[:2], self.heads, -1)
    query, key, value = map(split, jnp.split(self.mix(self.before(x)), 3, -1))
    seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + self.drop(self.out(seen.reshape(x.shape)), keys, 0)
    hidden = jax.nn.gelu(self.up(self.between(x)))
    return x + self.drop(self.down(hidden), keys, 1)

  def drop(self, x, keys, place):
    """With a mask of its own for each row, from the row's key."""
    if keys is None:
      return x
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, place)
    return jax.vmap(lambda row, key: self.dropout(row, rngs=key))(x, keys)


class Transformer(nnx.Module):
  """A decoder; the embedding is its last layer too."""

  def __init__(self, size, length, width, layers, heads, dropout, rngs):
    self.embed = nnx.Embed(size, width, rngs=rngs)
    self.place = nnx.Embed(length, width, rngs=rngs)
    self.last = nnx.RMSNorm(width, rngs=rngs)

    @nnx.vmap
    def stack(key):
      return Block(width, heads, dropout, nnx.Rngs(key))

    self.layers = layers
    self.blocks = stack(jax.random.split(rngs.params(), layers))

  def __call__(self, rows, keys=None):
    x = self.embed(rows) + self.place(jnp.arange(rows.shape[1]))
    if keys is not None:  # One a layer and row.
      keys = jax.vmap(lambda key: jax.random.split(key, self.layers), 0, 1)(
        keys
      )

    @nnx.scan(
      in_axes=(nnx.Carry, 0, None if keys is None else 0), out_axes=nnx.Carry
    )
    def run(x, block, keys):
      return block(x, keys)

    return self.embed.attend(self.last(run(x, self.blocks, keys)))


class Model(NamedTuple):
  """A transformer as functions.

  Attributes:
    start: ``key -> params``.
    logits: ``(params, letters, keys) -> (n, length, alphabet)``.
    losses: ``(params, rows, keys) -> (n,)``, with dropout where there are keys;
      the mean over the characters of a row, in nats.
  """

  start: Callable[[jax.Array], Any]
  logits: Callable[..., jax.Array]
  losses: Callable[..., jax.Array]


def model(
  size: int, length: int, width: int, layers: int, heads: int, dropout: float
) -> Model:
  """Makes a `Model`."""

  def build(key):
    return Transformer(
      size, length, width, layers, heads, dropout, nnx.Rngs(key)
    )

  graph, _ = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))

  def start(key):
    return nnx.split(build(key))[1]

  def logits(params, letters, keys=None):
    return nnx.merge(graph, params)(letters, keys)

  def losses(params, rows, keys=None):
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(
        logits(params, rows[:, :-1], keys), rows[:, 1:]
      ),
      -1,
    )

  return Model(start, logits, losses)
