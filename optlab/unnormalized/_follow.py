"""Noise that follows data, or the model by weighted rows."""

import jax
import jax.numpy as jnp

from optlab import checks
from optlab.unnormalized import _noise


@checks.domains(
  noise=checks.Pair(_noise.Gaussian._fields, 'a Gaussian'),
  rate=checks.Real(low=0.0, high=1.0),
  floor=checks.POSITIVE,
)
def follow(
  noise: _noise.Gaussian,
  rows: jax.Array,
  rate: float | jax.Array,
  log_weights: jax.Array | None = None,
  floor: float | jax.Array = 1e-3,
) -> _noise.Gaussian:
  r"""Moves a Gaussian towards the moments of ``rows``: adaptive noise.

  With a batch of data it follows the data; with noise rows and their
  importance weights ``log_density(params, noise) - noise_log_prob`` it follows
  the model. Call it between steps inside the same compiled function.

  .. math::
    \mu &\leftarrow \mu + \rho\,(\bar x_w - \mu) \\
    \Sigma &\leftarrow (1 - \rho)\,\Sigma
      + \rho\, \mathrm{Cov}_w(x) + \rho\,(1 - \rho)(\bar x_w - \mu)(\cdot)^\top

  Args:
    noise: The Gaussian.
    rows: ``[num, d]``.
    rate: The step :math:`\rho`, in [0, 1].
    log_weights: ``[num]``, their importance weights; ``None`` weighs alike.
    floor: The smallest standard deviation, added in quadrature.

  Returns:
    A `Gaussian`; ``noise`` itself where no weight is finite.

  Raises:
    TypeError: ``rate`` or ``floor`` is not a real number, or ``noise`` not a
      `Gaussian`.
    ValueError: ``rate`` is not in [0, 1], or ``floor`` not positive.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> noise = unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
    >>> noise = unnormalized.follow(noise, jnp.array([[3.0], [5.0]]), rate=0.5)
    >>> print(f'{noise.mean[0]:.1f} {noise.scale[0, 0]:.2f}')
    2.0 2.24
  """
  checks.enforce(follow, locals())
  if jnp.shape(rows)[1:] != noise.mean.shape:
    raise ValueError(
      f'rows must have shape [num, {noise.mean.shape[0]}], as the noise has,'
      f' got {jnp.shape(rows)}.'
    )
  dtype = noise.mean.dtype
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
  rows = jnp.where(finite[:, None], rows, noise.mean).astype(dtype)

  mean = weights @ rows
  centred = rows - mean
  covariance = (weights[:, None] * centred).T @ centred
  step = mean - noise.mean
  blended = (
    (1 - rate) * noise.scale @ noise.scale.T
    + rate * covariance
    + rate * (1 - rate) * jnp.outer(step, step)
    + rate * floor**2 * jnp.eye(step.shape[0], dtype=dtype)
  )
  scale = jnp.linalg.cholesky(blended)
  usable &= jnp.all(jnp.isfinite(scale))
  moved = _noise.Gaussian(
    (noise.mean + rate * step).astype(dtype),
    scale.astype(dtype),
    _noise.inverse(scale).astype(dtype),
  )
  return jax.tree.map(
    lambda new, old: jnp.where(usable, new, old), moved, noise
  )
