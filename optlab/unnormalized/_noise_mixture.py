"""Mixtures of noise distributions of any kind."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import special

from optlab import base
from optlab import checks
from optlab.unnormalized import _noise_batch


class Mixture(NamedTuple):
  """A mixture of any distributions; make it with `mixture` or `defensive`."""

  log_weights: jax.Array  # shape [k], normalized
  components: tuple[Any, ...]

  def _choose(self, component, draws):
    def leaf(*leaves):
      stacked = jnp.stack(leaves)
      return stacked[component, jnp.arange(stacked.shape[1])]

    for i, other in enumerate(draws[1:], 1):
      checks.check_same_tree(
        f'a draw of components[{i}]', other, 'one of components[0]', draws[0]
      )
    return jax.tree.map(leaf, *draws)

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    """Draws ``[num, ...]``, independent; costs a draw of every component."""
    which, *keys = jax.random.split(key, len(self.components) + 1)
    component = jax.random.categorical(which, self.log_weights, shape=(num,))
    draws = [
      part.sample(part_key, num)
      for part, part_key in zip(self.components, keys, strict=True)
    ]
    return self._choose(component, draws)

  def log_prob(self, rows: jax.Array) -> jax.Array:
    """Log density, ``[num, d] -> [num]``."""
    parts = jnp.stack(
      [
        _noise_batch.scores(f'components[{i}]', part, rows)
        for i, part in enumerate(self.components)
      ]
    )
    return special.logsumexp(parts + self.log_weights[:, None], axis=0)


def mixture(weights: base.ArrayLike, *components: Any) -> Mixture:
  """A mixture of distributions of any kind.

  Args:
    weights: ``[k]``, positive; they are normalized.
    *components: k distributions over the same space.

  Returns:
    A `Mixture`.

  Raises:
    TypeError: A component has no ``sample`` and ``log_prob``.
    ValueError: There are not as many weights as components, or one is not
      positive; a component is a batch of distributions, or draws rows of
      another structure.
  """
  weights = checks.as_array('weights', weights)
  checks.check_positive('weights', weights)
  if not components or weights.shape != (len(components),):
    raise ValueError(
      f'weights must have shape ({len(components)},), one a component, got'
      f' {weights.shape}.'
    )
  components = tuple(
    _noise_batch.as_noise(f'components[{i}]', component)
    for i, component in enumerate(components)
  )
  return Mixture(jnp.log(weights / jnp.sum(weights)), components)


@checks.domains(
  noise=_noise_batch.NOISE, wide=_noise_batch.NOISE, weight=checks.OPEN_FRACTION
)
def defensive(
  noise: Any, wide: Any, weight: float | jax.Array = 0.1
) -> Mixture:
  """Mixes in a wide component, so that no importance weight explodes.

  Args:
    noise: A distribution that fits the data.
    wide: One that is never far too small, such as an inflated Gaussian.
    weight: The share of ``wide``, in (0, 1).

  Returns:
    A `Mixture`.

  Raises:
    TypeError: A distribution has no ``sample`` and ``log_prob``, or ``weight``
      is not a real number.
    ValueError: ``weight`` is not in (0, 1).

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> narrow = unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
    >>> noise = unnormalized.defensive(
    ...     narrow, unnormalized.gaussian(jnp.zeros(1), 100 * jnp.eye(1)))
    >>> print(noise.log_prob(jnp.array([[9.0]])) > -6)
    [ True]
  """
  checks.enforce(defensive, locals())
  weight = jnp.asarray(weight, jnp.float32)
  return mixture(jnp.stack([1 - weight, weight]), noise, wide)
