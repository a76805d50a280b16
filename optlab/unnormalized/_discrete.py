"""Noise on bits and categories, and products of noise on several leaves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import checks
from optlab.unnormalized import _noise_batch


class Bernoulli(NamedTuple):
  """Independent bits; make it with `bernoulli`."""

  rates: jax.Array  # shape [d], the probabilities of a one

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    """Draws ``[num, d]`` of zeros and ones, in the dtype of the rates."""
    shape = (num, *self.rates.shape)
    uniform = jax.random.uniform(key, shape, self.rates.dtype)
    return (uniform < self.rates).astype(self.rates.dtype)

  def log_prob(self, rows: jax.Array) -> jax.Array:
    """Log probability, ``[num, d] -> [num]``; -inf where a row is no bits."""
    chance = jnp.where(rows == 1, self.rates, 1 - self.rates)
    chance = jnp.where((rows == 0) | (rows == 1), chance, 0)
    return jnp.sum(jnp.log(chance), -1)


class Categorical(NamedTuple):
  """Independent categories; make it with `categorical`."""

  log_weights: jax.Array  # shape [d, k], normalized

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    """Draws ``[num, d]`` of int32 in [0, k)."""
    shape = (num, self.log_weights.shape[0])
    return jax.random.categorical(key, self.log_weights, shape=shape).astype(
      jnp.int32
    )

  def log_prob(self, rows: jax.Array) -> jax.Array:
    """Log probability, ``[num, d] -> [num]``; -inf where out of range."""
    rows = jnp.asarray(rows)
    size = self.log_weights.shape[1]
    index = rows.astype(jnp.int32)
    inside = (index == rows) & (index >= 0) & (index < size)
    columns = jnp.arange(self.log_weights.shape[0])
    terms = self.log_weights[columns, jnp.clip(index, 0, size - 1)]
    return jnp.sum(jnp.where(inside, terms, -jnp.inf), -1)


class Product(NamedTuple):
  """Independent noise on the parts of a row; make it with `product`."""

  parts: dict[str, Any]

  def sample(self, key: jax.Array, num: int) -> dict[str, Any]:
    """Draws of every part, by its name."""
    keys = jax.random.split(key, len(self.parts))
    return {
      name: part.sample(key, num)
      for key, (name, part) in zip(keys, self.parts.items(), strict=True)
    }

  def log_prob(self, rows: dict[str, Any]) -> jax.Array:
    """The sum of the parts' log densities, ``[num]``."""
    terms = [
      _noise_batch.scores(name, part, rows[name])
      for name, part in self.parts.items()
    ]
    return jnp.sum(jnp.stack(terms), 0)


def bernoulli(rates: jax.typing.ArrayLike) -> Bernoulli:
  """Independent bits.

  Args:
    rates: ``[d]``, the probability of a one in each column, in (0, 1): the
      data's means, pulled away from the ends.

  Returns:
    A `Bernoulli`.

  Raises:
    TypeError: ``rates`` are no numbers.
    ValueError: They have not one axis, or one is not in (0, 1).

  Examples:
    >>> import jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> noise = unnormalized.bernoulli([0.5, 0.25])
    >>> print(jnp.exp(noise.log_prob(jnp.array([[1.0, 1.0]]))))
    [0.125]
  """
  rates = checks.as_array('rates', rates)
  if rates.ndim != 1:
    raise ValueError(f'rates must have shape [d], got {rates.shape}.')
  checks.OPEN_FRACTION.check('rates', rates)
  return Bernoulli(rates.astype(jnp.promote_types(rates.dtype, jnp.float32)))


def categorical(weights: jax.typing.ArrayLike) -> Categorical:
  """Independent categories.

  Args:
    weights: ``[d, k]``, positive, of the k categories in each column; they are
      normalized.

  Returns:
    A `Categorical`.

  Raises:
    TypeError: ``weights`` are no numbers.
    ValueError: They have not two axes, or one is not positive.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> noise = unnormalized.categorical([[1.0, 3.0], [1.0, 1.0]])
    >>> print(jnp.exp(noise.log_prob(jnp.array([[1, 0]]))))
    [0.375]
  """
  weights = checks.as_array('weights', weights)
  if weights.ndim != 2:
    raise ValueError(f'weights must have shape [d, k], got {weights.shape}.')
  checks.check_positive('weights', weights)
  return Categorical(jnp.log(weights / jnp.sum(weights, 1, keepdims=True)))


def product(**parts: Any) -> Product:
  """Independent noise on the parts of a row: discrete and continuous ones, say.

  Args:
    **parts: A distribution for each name; rows are dicts of those names.

  Returns:
    A `Product`.

  Raises:
    TypeError: A part has no ``sample`` and ``log_prob``.
    ValueError: There is none, or one is a batch of distributions.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> noise = unnormalized.product(
    ...     x=unnormalized.gaussian(jnp.zeros(2), jnp.eye(2)),
    ...     label=unnormalized.categorical([[1.0, 1.0, 1.0]]))
    >>> rows = noise.sample(jax.random.key(0), 4)
    >>> print(rows['x'].shape, rows['label'].dtype, noise.log_prob(rows).shape)
    (4, 2) int32 (4,)
  """
  if not parts:
    raise ValueError('product needs at least one part, got none.')
  return Product(
    {name: _noise_batch.as_noise(name, part) for name, part in parts.items()}
  )
