"""Which rows the chains of `contrastive_divergence` may stand on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab import checks
from optlab.unnormalized import _samplers

Box = tuple[jax.Array, jax.Array] | None


def as_box(box: Any) -> Box:
  """The corners of a box as arrays; raises unless there is room between."""
  if box is None:
    return None
  if not isinstance(box, (tuple, list)) or len(box) != 2:
    raise TypeError(
      f'box must be a pair (low, high), got {box!r} of type'
      f' {type(box).__name__}.'
    )
  low, high = (
    checks.as_array(name, end)
    for name, end in zip(('box[0]', 'box[1]'), box, strict=True)
  )
  traced = isinstance(low, jax.core.Tracer) or isinstance(high, jax.core.Tracer)
  if not traced and not np.all(low < high):  # NaN is not.
    raise ValueError(f'box must have low below high, got {box!r}.')
  return low, high


def check_arrays(batch: Any) -> None:
  """Raises a ``ValueError`` unless rows are one array: chains move in it."""
  if not hasattr(batch.data, 'dtype'):
    raise ValueError(
      'contrastive_divergence moves rows that are one array, got a'
      f' {type(batch.data).__name__}: join the leaves, and take them apart in'
      ' the model.'
    )


def _inside(box, rows):
  inside = (rows >= box[0]) & (rows <= box[1])
  return jnp.all(inside, tuple(range(1, rows.ndim)))


def within(
  box: Box, log_density: _samplers.LogDensityOfRows
) -> _samplers.LogDensityOfRows:
  """The log density, minus infinity outside the box."""
  if box is None:
    return log_density

  def restricted(rows):
    return jnp.where(_inside(box, rows), log_density(rows), -jnp.inf)

  return restricted


def near(batch: Any, box: Box) -> Callable[[jax.Array], jax.Array]:
  """Tells rows in the box, or not ten times further out than a batch's."""
  if box is not None:
    for corner in box:
      shape = batch.noise.shape[1:]
      if corner.shape not in ((), shape):
        raise ValueError(
          "contrastive_divergence: box must have numbers or arrays of a row's"
          f' shape, {shape}, got shape {corner.shape}.'
        )
    return lambda rows: _inside(box, rows)
  rows = (1 * batch.data, 1 * batch.noise)  # Bools as numbers.
  # A row that is not finite is dropped, and says nothing of the others.
  low, high = _ends(rows[0])
  low, high = (
    pick(end, other)
    for pick, end, other in zip(
      (jnp.minimum, jnp.maximum), (low, high), _ends(rows[1]), strict=True
    )
  )
  middle, reach = (low + high) / 2, 10 * (high - low)

  def near_enough(rows):
    axes = tuple(range(1, rows.ndim))
    # NaN is not near; without a spread everything is.
    inside = (jnp.abs(rows - middle) <= reach) | (reach == 0)
    return jnp.all(inside, axes)

  return near_enough


def _ends(rows):
  """The least and the largest of each column, of finite numbers."""
  if not jnp.issubdtype(rows.dtype, jnp.floating):
    return jnp.min(rows, 0), jnp.max(rows, 0)
  good, most = jnp.isfinite(rows), jnp.finfo(rows.dtype).max
  low = jnp.min(jnp.where(good, rows, most), 0)
  high = jnp.max(jnp.where(good, rows, -most), 0)
  return low, high


def check_values(data: jax.Array, moves: _samplers.Sampler) -> jax.Array:
  """Whether the sampler cannot move on such data; raises where it can tell."""
  if moves.discrete:
    return _check_discrete(data, moves.values)
  remedy = (
    'contrastive_divergence: Langevin chains leave {}; pass a sampler that'
    ' moves on them, such as sampler=optlab.unnormalized.gibbs_sampler().'
  )
  if not jnp.issubdtype(data.dtype, jnp.floating):
    raise ValueError(remedy.format(f'data of dtype {data.dtype}'))
  zero, one = data == 0, data == 1
  bits = jnp.all(zero | one) & jnp.any(zero) & jnp.any(one)
  if not isinstance(bits, jax.core.Tracer) and bits:
    raise ValueError(remedy.format('data of zeros and ones'))
  return bits


def _check_discrete(data, values):
  """Whether data have other values, or are one-hot."""
  if values is None:
    return jnp.asarray(False)
  known = jnp.asarray(False)
  for value in values:
    known |= data == jnp.asarray(value).astype(data.dtype)
  other = ~jnp.all(known)
  if not isinstance(other, jax.core.Tracer) and other:
    raise ValueError(
      'contrastive_divergence: data have other values than the sampler moves'
      f' on, {values}; give it theirs, as gibbs_sampler(values=(-1, 1)).'
    )
  one_hot = jnp.asarray(False)
  if values == (0.0, 1.0) and data.ndim == 2 and data.shape[0] >= 20:
    totals = jnp.sum(data.astype(jnp.float32), 1)
    alike = jnp.all(totals == totals[:1])
    one_hot = alike & jnp.any(data != data[:1])
    if not isinstance(one_hot, jax.core.Tracer) and one_hot:
      raise ValueError(
        'contrastive_divergence: all rows of data have one sum, as those of'
        ' one-hot columns, and a sampler that flips bits leaves them; number'
        ' the categories, and pass gibbs_sampler(values=range(k)).'
      )
  return other | one_hot
