"""Data beside noise: what a noise distribution is, and batches of both."""

import inspect
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from optlab import checks

NOISE = checks.Pair(
  ('sample', 'log_prob'),
  'a distribution such as optlab.unnormalized.gaussian makes',
)


class Noise(Protocol):
  """A normalized distribution that can be drawn from and scored."""

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    """Returns ``num`` draws, shape ``[num, ...]``."""
    ...

  def log_prob(self, rows: jax.Array) -> jax.Array:
    """Returns the exact log density of ``rows``, shape ``[num]``."""
    ...


class Adapted(NamedTuple):
  """A distribution of numpyro, flowjax, distrax or TFP as `Noise`."""

  distribution: Any

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    """Draws ``[num, ...]``, independent."""
    names = inspect.signature(self.distribution.sample).parameters
    name = next(name for name in ('key', 'seed', 'rng_key') if name in names)
    return self.distribution.sample(**{name: key, 'sample_shape': (num,)})

  def log_prob(self, rows: jax.Array) -> jax.Array:
    """Log density, ``[num, ...] -> [num]``."""
    return self.distribution.log_prob(rows)


def as_noise(name: str, noise: Any) -> Noise:
  """The noise, or an `Adapted` distribution of another library.

  Args:
    name: The argument's name, for the message.
    noise: What has ``sample(key, num)``, or a ``sample`` with ``sample_shape``;
      and ``log_prob``.

  Returns:
    A `Noise`.

  Raises:
    TypeError: ``noise`` has no ``sample`` and ``log_prob``.
    ValueError: It is a batch of distributions.
  """
  NOISE.check(name, noise)
  try:
    names = inspect.signature(noise.sample).parameters
  except ValueError:  # Written in another language: it says no names.
    return noise
  if 'sample_shape' not in names:
    return noise
  batch_shape = tuple(getattr(noise, 'batch_shape', ()))
  if batch_shape:
    raise ValueError(
      f'{name} must be one distribution, got a batch of shape {batch_shape}:'
      f' make one event of its columns, as by .to_event({len(batch_shape)}) in'
      ' numpyro or Independent in distrax.'
    )
  return Adapted(noise)


def scores(name: str, noise: Noise, rows: Any) -> jax.Array:
  """The noise's log density of rows; an error unless it is one a row."""
  log_q = noise.log_prob(rows)
  num = jnp.shape(jax.tree.leaves(rows)[0])[0]
  if jnp.shape(log_q) != (num,):
    raise ValueError(
      f'{name}.log_prob must return one number a row, shape {(num,)}, got'
      f' {jnp.shape(log_q)}: sum over the columns.'
    )
  return log_q


def draw(name: str, noise: Noise, key: Any, num: int) -> Any:
  """Draws of the noise; an error unless they are as many as asked for."""
  rows = noise.sample(checks.as_key('key', key), num)
  shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(rows)]
  if not shapes or any(shape[:1] != (num,) for shape in shapes):
    raise ValueError(
      f'{name}.sample(key, {num}) must draw {num} rows, got shapes {shapes}.'
    )
  return rows


def check_kind(name: str, data: Any, draws: Any) -> None:
  """Raises a ``ValueError`` unless data are rows as the noise draws them."""
  shapes = lambda rows: [
    (path, jnp.shape(leaf)[1:])
    for path, leaf in jax.tree.leaves_with_path(rows)
  ]
  if shapes(data) != shapes(draws) or not all(
    jnp.shape(leaf) and jnp.shape(leaf)[0] for leaf in jax.tree.leaves(data)
  ):
    raise ValueError(
      f"{name} must be rows of the noise's kind, at least one, got shapes"
      f' {jax.tree.map(jnp.shape, data)} beside'
      f' {jax.tree.map(jnp.shape, draws)}.'
    )


class NoiseBatch(NamedTuple):
  """Rows of data and of noise, with the noise distribution's log density.

  Attributes:
    data: Array ``[n, ...]``, or a pytree of them.
    noise: Draws of the noise distribution, ``[m, ...]``, same structure.
    noise_log_prob: ``[m]``, the exact log density of ``noise``.
    data_log_prob: ``[n]``, the noise distribution's log density of ``data``;
      `nce` and `ence` need it, `meco` tells by it whether the noise covers the
      data.
    contexts: int ``[n]``, the context of each row of data, for ``meco(...,
      contexts=...)``; what is not below the number of contexts is padding.
    noise_contexts: int ``[m]``, that of each row of noise.
  """

  data: Any
  noise: Any
  noise_log_prob: jax.Array
  data_log_prob: jax.Array | None = None
  contexts: jax.Array | None = None
  noise_contexts: jax.Array | None = None


@checks.domains(noise=NOISE, num=checks.Integer())
def noise_batch(
  noise: Noise,
  key: jax.Array,
  data: jax.Array,
  num: int,
  score_data: bool = True,
) -> NoiseBatch:
  """Draws noise beside a batch of data.

  Args:
    noise: The noise distribution: one of this module, of numpyro, flowjax,
      distrax or TFP, or anything with ``sample(key, num)`` and ``log_prob``.
    key: PRNG key.
    data: ``[n, ...]``.
    num: How many rows of noise, a Python integer.
    score_data: Whether to evaluate the noise's log density on ``data``. Without
      it `nce` and `ence` do not work, and `meco` does not see what the noise
      misses.

  Returns:
    A `NoiseBatch`.

  Raises:
    TypeError: ``num`` is not an integer, ``key`` no PRNG key, or ``noise`` has
      no ``sample`` and ``log_prob``.
    ValueError: ``num`` is below one, or ``noise`` a batch of distributions, or
      it draws another number of rows; ``data`` are none, or of another shape
      than those that it draws.

  Examples:
    >>> import jax, jax.numpy as jnp, optlab
    >>> noise = optlab.fit_gaussian(jnp.array([[-1.0], [1.0]]))
    >>> key, data = jax.random.key(0), jnp.ones((4, 1))
    >>> batch = optlab.noise_batch(noise, key, data, 8)
    >>> print(batch.noise.shape, batch.noise_log_prob.shape)
    (8, 1) (8,)
  """
  checks.enforce(noise_batch, locals())
  noise = as_noise('noise', noise)
  rows = draw('noise', noise, key, num)
  check_kind('data', data, rows)
  return NoiseBatch(
    data=data,
    noise=rows,
    noise_log_prob=scores('noise', noise, rows),
    data_log_prob=scores('noise', noise, data) if score_data else None,
  )


def check_batch(
  method: str, batch: NoiseBatch, needs_data_log_prob: bool = False
) -> tuple[int, int]:
  """Raises unless the shapes of ``batch`` match; returns ``(n, m)``.

  Args:
    method: The estimator's name, for the message.
    batch: The batch.
    needs_data_log_prob: Whether ``batch.data_log_prob`` must be there.

  Returns:
    The number of data rows and of noise rows.

  Raises:
    TypeError: ``batch`` is not a `NoiseBatch`.
    ValueError: A part is empty, missing, or of another length.
  """
  if not isinstance(batch, NoiseBatch):
    raise TypeError(
      f'{method} takes a NoiseBatch, got {type(batch).__name__}: build one with'
      ' optlab.noise_batch(noise, key, data, num).'
    )
  if jax.tree.structure(batch.data) != jax.tree.structure(batch.noise):
    raise ValueError(
      f'{method}: data and noise must have one structure, got'
      f' {jax.tree.structure(batch.data)} and'
      f' {jax.tree.structure(batch.noise)}.'
    )
  n, m = (
    _num_rows(method, name, getattr(batch, name)) for name in ('data', 'noise')
  )
  for data, noise in zip(
    jax.tree.leaves(batch.data), jax.tree.leaves(batch.noise), strict=True
  ):
    if jnp.shape(data)[1:] != jnp.shape(noise)[1:]:
      raise ValueError(
        f'{method}: rows of data and noise must have one shape, got'
        f' {jnp.shape(data)[1:]} and {jnp.shape(noise)[1:]}.'
      )
  _check_scores(method, 'noise_log_prob', batch.noise_log_prob, m)
  if needs_data_log_prob or batch.data_log_prob is not None:
    _check_scores(method, 'data_log_prob', batch.data_log_prob, n)
  return n, m


def _num_rows(method, name, rows):
  leaves = jax.tree.leaves(rows)
  lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in leaves}
  if len(lengths) != 1 or 0 in lengths:
    raise ValueError(
      f'{method}: {name} must have one leading axis of at least one row, got'
      f' shapes {[jnp.shape(leaf) for leaf in leaves]}.'
    )
  return lengths.pop()


def _check_scores(method, name, scores, size):
  if scores is None:
    raise ValueError(
      f'{method} needs {name}: build the batch with'
      ' optlab.noise_batch(..., score_data=True).'
    )
  if not hasattr(scores, 'dtype'):
    raise TypeError(
      f'{method}: {name} must be an array, got {type(scores).__name__};'
      ' convert it with jnp.asarray.'
    )
  if jnp.shape(scores) != (size,):
    raise ValueError(
      f'{method}: {name} must have shape {(size,)}, got {jnp.shape(scores)}.'
    )
