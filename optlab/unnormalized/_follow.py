"""Noise that follows data, or the model by weighted rows."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from optlab import checks
from optlab.unnormalized import _flow
from optlab.unnormalized import _noise
from optlab.unnormalized import _noise_mixture

Followed = TypeVar(
  'Followed', _noise.Gaussian, _noise.GaussianMixture, _noise_mixture.Mixture
)
KINDS = (_noise.Gaussian, _noise.GaussianMixture)


@checks.domains(
  rate=checks.Real(low=0.0, high=1.0),
  floor=checks.POSITIVE,
)
def follow(
  noise: Followed,
  rows: jax.Array,
  rate: float | jax.Array,
  log_weights: jax.Array | None = None,
  floor: float | jax.Array = 1e-3,
) -> Followed:
  r"""Moves noise towards ``rows``: adaptive noise.

  With a batch of data it follows the data; with noise rows and their
  importance weights ``log_density(params, noise) - noise_log_prob`` it follows
  the model. Call it between steps inside the same compiled function.

  .. math::
    \mu &\leftarrow \mu + \rho\,(\bar x_w - \mu) \\
    \Sigma &\leftarrow (1 - \rho)\,\Sigma
      + \rho\, \mathrm{Cov}_w(x) + \rho\,(1 - \rho)(\bar x_w - \mu)(\cdot)^\top

  for a Gaussian. A mixture of Gaussians with weights :math:`\pi_k` takes the
  step of online expectation maximization: each component moves so by the rows'
  weights times its share :math:`r_k` of them, with :math:`R_k = \sum w r_k`,

  .. math::
    \rho_k = \rho R_k / \pi_k', \quad
    \pi_k \leftarrow \pi_k' = (1 - \rho)\, \pi_k + \rho R_k

  and by less where few rows carry its weight, so that it does not collapse on
  them. Of a `Mixture`, such as `defensive` makes, the first component follows,
  and the others and the weights stay.

  Args:
    noise: A `Gaussian`, a `GaussianMixture`, or a `Mixture` that has one of
      them first. A `Flow` is refitted by `fit_flow`.
    rows: ``[num, d]``.
    rate: The step :math:`\rho`, in [0, 1].
    log_weights: ``[num]``, their importance weights; ``None`` weighs alike.
    floor: The smallest standard deviation, added in quadrature.

  Returns:
    Noise of the same kind and shapes; ``noise`` itself where no weight is
    finite.

  Raises:
    TypeError: ``rate`` or ``floor`` is not a real number, or ``noise`` is of
      no kind that follows.
    ValueError: ``rate`` is not in [0, 1], or ``floor`` not positive; rows or
      weights have other shapes.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> noise = unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
    >>> noise = unnormalized.follow(noise, jnp.array([[3.0], [5.0]]), rate=0.5)
    >>> print(f'{noise.mean[0]:.1f} {noise.scale[0, 0]:.2f}')
    2.0 2.24

  References:
    Cappé, Moulines, `On-line expectation-maximization algorithm for latent data
    models <https://arxiv.org/abs/0712.4273>`_, JRSS B 2009
  """
  checks.enforce(follow, locals())
  if isinstance(noise, _noise_mixture.Mixture):
    first = follow(noise.components[0], rows, rate, log_weights, floor)
    return noise._replace(components=(first, *noise.components[1:]))
  if not isinstance(noise, KINDS):
    remedy = ''
    if isinstance(noise, _flow.Flow):
      remedy = ' Refit a flow by fit_flow(flow, ..., log_weights=).'
    raise TypeError(
      'noise must be a Gaussian, a GaussianMixture, or a Mixture of one of them'
      f' first, got {type(noise).__name__}.{remedy}'
    )
  rows, weights, usable = _weighed(noise, rows, log_weights)
  if isinstance(noise, _noise.Gaussian):
    moved = _noise.Gaussian(
      *_moments(noise.mean, noise.scale, rows, weights, rate, floor)
    )
  else:
    moved = _mixture(noise, rows, weights, rate, floor)
  usable &= jnp.all(
    jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(moved)])
  )
  return jax.tree.map(
    lambda new, old: jnp.where(usable, new, old), moved, noise
  )


def _weighed(noise: Any, rows: Any, log_weights: Any) -> tuple:
  """Rows that are finite, their weights, and whether there are any."""
  middle = noise.mean if isinstance(noise, KINDS[0]) else noise.means[0]
  shape = jnp.shape(rows)
  if len(shape) != 2 or shape[1:] != middle.shape or not shape[0]:
    raise ValueError(
      f'rows must have shape [num, {middle.shape[0]}] with num at least 1, as'
      f' the noise has, got {shape}.'
    )
  dtype = middle.dtype
  rows = jnp.asarray(rows)
  if log_weights is None:
    log_weights = jnp.zeros(rows.shape[:1], dtype)
  if jnp.shape(log_weights) != jnp.shape(rows)[:1]:
    raise ValueError(
      f'log_weights must have shape {jnp.shape(rows)[:1]}, one a row, got'
      f' {jnp.shape(log_weights)}.'
    )
  finite = jnp.all(jnp.isfinite(rows), -1) & (log_weights < jnp.inf)
  log_weights = jnp.where(finite, log_weights, -jnp.inf)
  top = jnp.max(log_weights)
  usable = top > -jnp.inf
  weights = jnp.exp(log_weights - jnp.where(usable, top, 0))
  weights = (weights / jnp.maximum(jnp.sum(weights), 1e-30)).astype(dtype)
  rows = jnp.where(finite[:, None], rows, middle).astype(dtype)
  return rows, weights, usable


def _moments(old_mean, old_scale, rows, weights, rate, floor):
  """Mean, Cholesky factor and its inverse of a Gaussian after its step."""
  dtype = old_mean.dtype
  mean = weights @ rows
  centred = rows - mean
  covariance = (weights[:, None] * centred).T @ centred
  step = mean - old_mean
  blended = (
    (1 - rate) * old_scale @ old_scale.T
    + rate * covariance
    + rate * (1 - rate) * jnp.outer(step, step)
    + rate * floor**2 * jnp.eye(step.shape[0], dtype=dtype)
  )
  scale = jnp.linalg.cholesky(blended)
  return (
    (old_mean + rate * step).astype(dtype),
    scale.astype(dtype),
    _noise.inverse(scale).astype(dtype),
  )


def _mixture(noise, rows, weights, rate, floor):
  """A step of online expectation maximization."""
  share = jax.nn.softmax(noise.component_log_prob(rows), -1)
  parts = weights[:, None] * share
  total = jnp.sum(parts, 0)
  own = parts / jnp.maximum(total, 1e-30)
  old = jnp.exp(noise.log_weights)
  new = (1 - rate) * old + rate * total
  ess = 1 / jnp.maximum(jnp.sum(own**2, 0), 1e-30)
  # A covariance of d columns from fewer rows than that is none.
  trust = ess / (ess + rows.shape[1] + 1)
  rates = rate * total / jnp.maximum(new, 1e-30) * trust
  means, scales, whitens = jax.vmap(_moments, (0, 0, None, 1, 0, None))(
    noise.means, noise.scales, rows, own, rates.astype(rows.dtype), floor
  )
  # A component that has lost its weight can still win it back.
  new = jnp.maximum(new, 1e-4 / new.size)
  log_weights = jnp.log(new / jnp.sum(new)).astype(noise.log_weights.dtype)
  return _noise.GaussianMixture(log_weights, means, scales, whitens)
