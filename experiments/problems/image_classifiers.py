"""Models and batch rules of the image classification experiment."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import model_selection

from ..lab import flags
from . import data as data_lib


class Images(NamedTuple):
  """A data set of images, split.

  Attributes:
    train: Images [rows, side, side, 1] and int32 labels [rows].
    held: The same, of what is held out.
    name: What that is for: ``test`` or ``valid``.
    classes: Number of classes.
  """

  train: tuple[np.ndarray, np.ndarray]
  held: tuple[np.ndarray, np.ndarray]
  name: str
  classes: int


def hold_out(
  images: np.ndarray, labels: np.ndarray, size: int, name: str, classes: int
) -> Images:
  """Splits images, always in the same way, with equal shares of the labels.

  Args:
    images: Images [rows, side, side, 1].
    labels: int32 labels [rows].
    size: Images held out.
    name: What they are for: ``test`` or ``valid``.
    classes: Number of classes.

  Returns:
    The `Images`.

  Raises:
    UserError: There are too few.
  """
  if not classes <= size <= len(images) - classes:
    raise flags.UserError(
      f'--{name}_size={size}: must leave an image of each of the {classes}'
      f' classes on both sides, of {len(images)} images'
    )
  parts = model_selection.train_test_split(
    images, labels, test_size=size, random_state=0, stratify=labels
  )
  return Images((parts[0], parts[2]), (parts[1], parts[3]), name, classes)


def load(name: str, data_dir: str, test_size: int, dtype: Any) -> Images:
  """Loads and splits a data set of square images.

  Args:
    name: See `data.load`.
    data_dir: Folder with data files.
    test_size: Images held out, see `hold_out`.
    dtype: Floating point type of the pixels.

  Returns:
    The `Images`.

  Raises:
    UserError: The rows are no square images, or too few.
  """
  dataset = data_lib.load(name, data_dir)
  rows = data_lib.dense(dataset)
  side = round(rows.shape[1] ** 0.5)
  if side * side != rows.shape[1]:
    raise flags.UserError(
      f'--dataset={name}: rows of {rows.shape[1]} columns are no square images'
    )
  images = rows.reshape(-1, side, side, 1).astype(dtype)
  labels = dataset.labels.astype(np.int32)
  return hold_out(images, labels, test_size, 'test', len(dataset.classes))


class Logistic(nnx.Module):
  """Multinomial logistic regression on the pixels."""

  def __init__(self, side: int, classes: int, **kwargs: Any):
    self.dense = nnx.Linear(side * side, classes, **kwargs)

  def __call__(self, x):
    return self.dense(x.reshape(len(x), -1))


class Perceptron(nnx.Module):
  """One hidden layer of 64."""

  def __init__(self, side: int, classes: int, **kwargs: Any):
    self.hidden = nnx.Linear(side * side, 64, **kwargs)
    self.dense = nnx.Linear(64, classes, **kwargs)

  def __call__(self, x):
    return self.dense(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class PatchConv(nnx.Module):
  """A 3 x 3 convolution as a matrix product on patches.

  XLA on CPUs runs `lax.conv` inside a loop many times slower than outside.
  """

  def __init__(self, features_in: int, features_out: int, **kwargs: Any):
    self.dense = nnx.Linear(9 * features_in, features_out, **kwargs)

  def __call__(self, x):
    height, width = x.shape[1] - 2, x.shape[2] - 2
    shifts = [
      x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    ]
    return self.dense(jnp.concatenate(shifts, -1))


class Convolutional(nnx.Module):
  """Two convolutions with pooling, and a dense layer."""

  def __init__(self, side: int, classes: int, **kwargs: Any):
    self.first = PatchConv(1, 8, **kwargs)
    self.second = PatchConv(8, 16, **kwargs)
    shrunk = ((side - 2) // 2 - 2) if side > 12 else (side - 4)
    self.shrink = side > 12
    self.dense = nnx.Linear((shrunk // 2) ** 2 * 16, classes, **kwargs)

  def __call__(self, x):
    x = nnx.relu(self.first(x))
    if self.shrink:
      x = _pool(x)
    x = _pool(nnx.relu(self.second(x)))
    return self.dense(x.reshape(len(x), -1))


def _pool(x):
  """Means of 2 x 2 squares."""
  height, width = x.shape[1] // 2, x.shape[2] // 2
  x = x[:, : 2 * height, : 2 * width]
  return x.reshape(len(x), height, 2, width, 2, -1).mean((2, 4))


MODELS = {'logistic': Logistic, 'mlp': Perceptron, 'cnn': Convolutional}


class Model(NamedTuple):
  """A flax model as pure functions of plain dictionaries.

  Attributes:
    start: ``seed or key -> params``.
    losses: ``(params, (images, labels)) -> (n,)`` cross entropies.
    logits: ``(params, images) -> [n, classes]``.
  """

  start: Callable[[int | jax.Array], Any]
  losses: Callable[[Any, Any], jax.Array]
  logits: Callable[[Any, jax.Array], jax.Array]


def model(name: str, side: int, classes: int, dtype: Any) -> Model:
  """Makes a model by name.

  Args:
    name: A key of `MODELS`.
    side: Pixels of a side.
    classes: Number of classes.
    dtype: Floating point type of the parameters.

  Returns:
    A `Model`.
  """

  def make(seed):
    rngs = nnx.Rngs(seed)
    return MODELS[name](side, classes, rngs=rngs, param_dtype=dtype)

  graph, like, rest = nnx.split(make(0), nnx.Param, ...)

  def logits(params, images):
    state = jax.tree.unflatten(
      jax.tree.structure(like), jax.tree.leaves(params)
    )
    return nnx.merge(graph, state, rest)(images)

  def losses(params, examples):
    images, labels = examples
    return optax.softmax_cross_entropy_with_integer_labels(
      logits(params, images), labels
    )

  def start(seed):
    return nnx.to_pure_dict(nnx.split(make(seed), nnx.Param, ...)[1])

  return Model(start, losses, logits)
