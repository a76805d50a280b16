"""Whether noise can tell a likelihood of the data: what no weight shows.

Where the noise misses part of the data the weights look perfect, and the model
goes where no noise would contradict it. What shows it is the noise's density at
the data.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import trees
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch


class Coverage(NamedTuple):
  """How well the noise of a batch covers its data.

  Attributes:
    data_log_prob: Mean log density of the noise at the data that it can reach.
    data_ess: Effective number of data rows when they are weighed by noise over
      model: small where the two hardly overlap.
    missed: Share of the data where the noise is thinner than at each of its own
      rows; -1 where the batch has no ``data_log_prob``.
    warning: Whether so much is missed that the likelihood cannot be trusted, or
      one of the two below is true, or the log densities are so large, by a
      constant say, that their digits are no longer told apart.
    conditional: Whether data and noise share a column of distinct numbers, or
      rows of one context have normalizers that differ.
    discrete: Whether data are whole numbers, bits say, and noise none at all: a
      density is fitted where there is none.
  """

  data_log_prob: jax.Array  # shape ()
  data_ess: jax.Array  # shape ()
  missed: jax.Array  # shape ()
  warning: jax.Array  # shape (), bool
  conditional: jax.Array  # shape (), bool
  discrete: jax.Array  # shape (), bool


def unknown(dtype: Any) -> Coverage:
  """What is known without the noise's density at the data."""
  return Coverage(
    data_log_prob=jnp.zeros((), dtype),
    data_ess=jnp.zeros((), dtype),
    missed=jnp.full((), -1, dtype),
    warning=jnp.zeros((), bool),
    conditional=jnp.zeros((), bool),
    discrete=jnp.zeros((), bool),
  )


def coverage(
  batch: _noise_batch.NoiseBatch,
  log_p_data: jax.Array,
  data_good: jax.Array,
  noise_good: jax.Array,
  conditional: jax.Array,
  model_dtype: Any,
) -> Coverage:
  """The coverage of a batch, whose rows are good or not."""
  dtype = log_p_data.dtype
  discrete = is_discrete(batch)
  known = {'conditional': conditional, 'discrete': discrete}
  eps = max(jnp.finfo(kind).eps for kind in (dtype, model_dtype))
  warning = conditional | discrete
  warning |= _without_digits(log_p_data, data_good, eps)
  if batch.data_log_prob is None:
    return unknown(dtype)._replace(warning=warning, **known)
  log_q = batch.data_log_prob.astype(dtype)
  reached = data_good & jnp.isfinite(log_q)
  log_v = jnp.where(reached, log_q - log_p_data, -jnp.inf)
  thinnest = jnp.min(
    jnp.where(noise_good, batch.noise_log_prob.astype(dtype), jnp.inf)
  )
  thin = (log_q < thinnest) | ~(log_q > -jnp.inf)
  _, scaled = _likelihood.over_largest(log_v)
  # One sum for all: each is a kernel, and over devices a collective.
  rows = jnp.where(reached, log_q, 0), reached, thin & data_good
  rows = [row.astype(dtype) for row in (*rows, scaled, scaled**2)]
  log_qs, reaches, thins, total, squares = jnp.sum(jnp.stack(rows), 1)
  missed = thins / _likelihood.num_good(data_good, dtype)
  # Of as many draws of the noise itself this share may be missed by chance.
  chance = 3 / noise_good.size
  return Coverage(
    data_log_prob=log_qs / jnp.maximum(reaches, 1),
    data_ess=total**2 / jnp.maximum(squares, jnp.finfo(dtype).tiny),
    missed=missed,
    warning=warning | (missed > 0.05 + chance),
    **known,
  )


def _without_digits(log_p, good, eps):
  """Whether log densities are so large that a tenth is lost in rounding."""
  smallest = jnp.min(jnp.where(good, jnp.abs(log_p), jnp.inf))
  return jnp.any(good) & (eps * smallest > 0.1)


def check_apart(method: str, batch: _noise_batch.NoiseBatch) -> None:
  """Raises a ``ValueError`` if one leaf is part of data and of noise.

  Args:
    method: For the message.
    batch: Data and noise, checked.
  """
  leaves = jax.tree.leaves_with_path(batch.data)
  for (path, data), noise in zip(
    leaves, jax.tree.leaves(batch.noise), strict=True
  ):
    if data is noise and len(leaves) > 1:
      name = jax.tree_util.keystr(path)
      raise ValueError(
        f'{method}: data{name} and noise{name} are one array, so the model is'
        ' conditional on it, with a normalizer for each of its rows; one'
        ' tracker cannot follow them.'
      )


def _is_float(rows):
  return jnp.issubdtype(rows.dtype, jnp.floating)


def is_conditional(batch: _noise_batch.NoiseBatch) -> jax.Array:
  """Whether rows of noise repeat a column of the data, row by row.

  Args:
    batch: Data and noise, checked and aligned.

  Returns:
    bool scalar; noise may hold each row of data several times. Columns count
    that hold distinct numbers, or numbers that differ in twenty rows from each
    of the first three, which independent noise does not repeat by chance; of
    distinct numbers also those that noise repeats in another order. Noise that
    is the data as a whole is no condition.
  """
  shared, every = jnp.asarray(False), jnp.asarray(True)
  for data, noise in zip(
    jax.tree.leaves(batch.data), jax.tree.leaves(batch.noise), strict=True
  ):
    n, m = data.shape[0], noise.shape[0]
    if n < 3 or m % n:
      every = jnp.asarray(False)
      continue
    telling, distinct = jnp.asarray(True), jnp.asarray(n >= 20)
    for i in range(3):  # Sums, because rows of a sharded axis have no index.
      pick = trees.where(jnp.arange(n) == i, data, jnp.zeros_like(data))
      alike = jnp.sum(data == jnp.sum(pick, 0, data.dtype), 0)
      single = (alike == 1) & _is_float(data)
      distinct &= single
      telling &= single | (n - alike >= 20)
    repeated = jnp.all(data == noise[:n], 0) | jnp.all(
      data == noise[:: m // n], 0
    )
    shared |= jnp.any(telling & repeated)
    if _is_float(data) and _is_float(noise):
      shuffled = m // n * _sum_of(data) == _sum_of(noise)
      shared |= jnp.any(distinct & shuffled)
    every &= jnp.all(repeated)
  return shared & ~every


def is_discrete(batch: _noise_batch.NoiseBatch) -> jax.Array:
  """Whether a part of the data is whole numbers, and none of the noise's is."""
  found = jnp.asarray(False)
  for data, noise in zip(
    jax.tree.leaves(batch.data), jax.tree.leaves(batch.noise), strict=True
  ):
    if _is_float(noise) and data.size >= 20:
      data = data.astype(noise.dtype)
      # Sums alone: one all-reduce of rows that are split over devices.
      dtype = jnp.promote_types(data.dtype, jnp.float32)
      other = jnp.sum(data != jnp.round(data), dtype=dtype)
      other += jnp.sum(noise == jnp.round(noise), dtype=dtype)
      first = jnp.sum(data, dtype=dtype)
      second = data.size * jnp.sum(data.astype(dtype) ** 2)
      varied = second - first**2 > 1e-6 * second
      found |= varied & (other == 0)
  return found


def _sum_of(rows: jax.Array) -> jax.Array:
  """A checksum of each column that does not tell the order of its rows."""
  # Of doubles half of the digits are enough.
  bits = jax.lax.bitcast_convert_type(rows.astype(jnp.float32), jnp.uint32)
  # A hash, because sums of bits alone agree by chance.
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
  bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
  return jnp.sum(bits ^ (bits >> 16), 0, jnp.uint32)
