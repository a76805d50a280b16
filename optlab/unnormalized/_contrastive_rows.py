"""Which rows the chains of `contrastive_divergence` may stand on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optlab import checks
from optlab.unnormalized import _samplers

Box = tuple[jax.Array, jax.Array] | None
LEAVE = (
  'contrastive_divergence: Langevin chains and others of real numbers leave {};'
  ' pass a sampler that moves on them, such as'
  ' sampler=optlab.unnormalized.gibbs_sampler(values=...), or add uniform noise'
  ' to numbers that were rounded.'
)


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
  if not jnp.issubdtype(data.dtype, jnp.floating):
    raise ValueError(LEAVE.format(f'data of dtype {data.dtype}'))
  found = _lattice(data).found
  if moves.discrete is not None and _is_true(found):
    raise ValueError(LEAVE.format(_kind(data)))
  return found


def check_moved(
  found: jax.Array, data: jax.Array, rows: jax.Array
) -> jax.Array:
  """Whether a sampler that said nothing took rows off such data; raises so."""
  lattice = _lattice(data)
  places = (rows.astype(data.dtype) - lattice.low) / lattice.step
  left = found & jnp.any(jnp.abs(places - jnp.round(places)) > 1e-3)
  if _is_true(left):
    raise ValueError(LEAVE.format(_kind(data)))
  return left


def _is_true(flag):
  return not isinstance(flag, jax.core.Tracer) and bool(flag)


def _kind(data):
  bits = jnp.all((data == 0) | (data == 1))
  return 'data of zeros and ones' if bits else 'data of few or whole numbers'


class _Lattice(NamedTuple):
  """Numbers that are evenly apart."""

  found: jax.Array  # shape (), bool, whether all that vary are on it
  low: jax.Array  # scalar or of a row's shape
  step: jax.Array


def _lattice(data):
  """Whether data are bits, whole numbers, or columns of nine levels at most."""
  eps = jnp.finfo(data.dtype).eps
  finite = jnp.isfinite(data)
  data = jnp.where(finite, data, 0)
  low, high = _ends(jnp.where(finite, data, jnp.nan))
  most = jnp.finfo(data.dtype).max
  second = jnp.min(jnp.where(finite & (data > low), data, most), 0)
  step = jnp.where(high > low, second - low, 1)
  places = jnp.where(finite, (data - low) / step, 0)
  even = jnp.all(jnp.abs(places - jnp.round(places)) < 1e-3, 0)
  even &= (high - low) / step < 8.5
  varied = jnp.any(high > low)
  # Large floats have no fraction.
  whole = jnp.all((data == jnp.round(data)) & (eps * jnp.abs(data) < 1 / 64))
  bits = jnp.all((data == 0) | (data == 1))
  # A few numbers may be whole, or even, by chance.
  found = bits | (whole & (data.size >= 20))
  levels = jnp.all(even | ~(high > low)) & (data.shape[0] >= 20)
  return _Lattice(
    (found | levels) & varied,
    jnp.where(whole, 0, low),
    jnp.where(whole, 1, step),
  )


def _check_discrete(data, values):
  """Whether data have other values, or rows that one column's move leaves."""
  if values is None:
    return jnp.asarray(False)
  known = jnp.asarray(False)
  for value in values:
    known |= data == jnp.asarray(value).astype(data.dtype)
  other = ~jnp.all(known)
  if _is_true(other):
    raise ValueError(
      'contrastive_divergence: data have other values than the sampler moves'
      f' on, {values}; give it theirs, as gibbs_sampler(values=(-1, 1)).'
    )
  bound = jnp.asarray(False)
  if data.ndim == 2 and data.shape[0] >= 20:
    totals = jnp.sum(data.astype(jnp.float32), 1)
    bound = jnp.all(totals == totals[:1]) & jnp.any(data != data[:1])
    if _is_true(bound):
      raise ValueError(
        'contrastive_divergence: all rows of data have one sum, as those of'
        ' one-hot columns and of permutations, and a sampler that changes a'
        ' column alone leaves them; number the categories, and pass'
        ' gibbs_sampler(values=range(k)), or a function that swaps columns.'
      )
  return other | bound
