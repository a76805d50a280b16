"""Noise distributions: small pure objects with ``sample`` and ``log_prob``.

Each is a NamedTuple of arrays, so it goes through `jax.jit` as an argument: to
refit it (`follow`) recompiles nothing. ``sample(key, num)`` draws independent
rows; ``sample_lattice(key, num)`` draws a randomly shifted low-discrepancy set
pushed through the same map, whose means vary far less in low dimension and are
as unbiased.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import linalg
from jax.scipy import special
import numpy as np

from optlab import base
from optlab import checks


class Gaussian(NamedTuple):
  """A Gaussian with a full covariance; make it with `gaussian`."""

  mean: jax.Array  # shape [d]
  scale: jax.Array  # shape [d, d], lower Cholesky factor of the covariance
  whiten: jax.Array  # shape [d, d], its inverse

  def from_uniform(self, uniform: jax.Array) -> jax.Array:
    """Maps rows of the unit cube ``[num, d]`` to draws."""
    return self.mean + special.ndtri(uniform) @ self.scale.T

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    """Draws ``[num, d]``, independent."""
    shape, dtype = (num, self.mean.shape[0]), self.mean.dtype
    return self.mean + jax.random.normal(key, shape, dtype) @ self.scale.T

  def sample_lattice(self, key: jax.Array, num: int) -> jax.Array:
    """Draws ``[num, d]`` that fill the distribution evenly."""
    size, dtype = self.mean.shape[0], self.mean.dtype
    return self.from_uniform(lattice(key, num, size, dtype))

  def log_prob(self, rows: jax.Array) -> jax.Array:
    """Log density, ``[num, d] -> [num]``."""
    white = (rows - self.mean) @ self.whiten.T
    log_det = jnp.sum(jnp.log(jnp.diagonal(self.scale)))
    return _log_normal(white) - log_det


class GaussianMixture(NamedTuple):
  """A mixture of Gaussians; make it with `gaussian_mixture`."""

  log_weights: jax.Array  # shape [k], normalized
  means: jax.Array  # shape [k, d]
  scales: jax.Array  # shape [k, d, d], lower Cholesky factors
  whitens: jax.Array  # shape [k, d, d], their inverses

  def _component(self, uniform):
    ends = jnp.cumsum(jnp.exp(self.log_weights))
    component = jnp.searchsorted(ends, uniform * ends[-1])
    return jnp.minimum(component, ends.shape[0] - 1)

  def _place(self, component, white):
    # By each, as the density does: a factor a row would be [num, d, d].
    placed = self.means + jnp.einsum('kij,nj->nki', self.scales, white)
    return jnp.take_along_axis(placed, component[:, None, None], 1)[:, 0]

  def from_uniform(self, uniform: jax.Array) -> jax.Array:
    """Maps rows of the unit cube ``[num, d + 1]`` to draws."""
    component = self._component(uniform[:, 0])
    return self._place(component, special.ndtri(uniform[:, 1:]))

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    """Draws ``[num, d]``, independent."""
    which, where = jax.random.split(key)
    size, dtype = self.means.shape[1], self.means.dtype
    component = self._component(jax.random.uniform(which, (num,), dtype))
    return self._place(component, jax.random.normal(where, (num, size), dtype))

  def sample_lattice(self, key: jax.Array, num: int) -> jax.Array:
    """Draws ``[num, d]`` that fill the distribution evenly."""
    size, dtype = self.means.shape[1], self.means.dtype
    return self.from_uniform(lattice(key, num, size + 1, dtype))

  def component_log_prob(self, rows: jax.Array) -> jax.Array:
    """Log of weight times density of each component, ``[num, k]``."""
    centred = rows[:, None, :] - self.means
    white = jnp.einsum('kij,nkj->nki', self.whitens, centred)
    diagonals = jnp.diagonal(self.scales, axis1=-2, axis2=-1)
    log_det = jnp.sum(jnp.log(diagonals), -1)
    return _log_normal(white) - log_det + self.log_weights

  def log_prob(self, rows: jax.Array) -> jax.Array:
    """Log density, ``[num, d] -> [num]``."""
    return special.logsumexp(self.component_log_prob(rows), axis=-1)


def gaussian(mean: base.ArrayLike, covariance: base.ArrayLike) -> Gaussian:
  """A Gaussian from its moments.

  Args:
    mean: ``[d]``.
    covariance: ``[d, d]``, symmetric and positive definite.

  Returns:
    A `Gaussian`.

  Raises:
    TypeError: One of them is not an array of numbers.
    ValueError: The shapes do not match, or the covariance is not symmetric and
      positive definite; traced, its log densities are NaN.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> noise = unnormalized.gaussian(jnp.zeros(2), jnp.eye(2))
    >>> print(f'{noise.log_prob(jnp.zeros((1, 2)))[0]:.3f}')
    -1.838
  """
  mean = checks.as_array('mean', mean)
  covariance = checks.as_array('covariance', covariance)
  if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
    raise ValueError(
      'mean and covariance must have shapes [d] and [d, d], got'
      f' {mean.shape} and {covariance.shape}.'
    )
  checks.check_real('mean', mean, low_open=True, high_open=True)
  scale = _cholesky('covariance', covariance)
  return Gaussian(mean.astype(scale.dtype), scale, inverse(scale))


@checks.domains(inflate=checks.POSITIVE)
def fit_gaussian(
  rows: base.ArrayLike, inflate: float | jax.Array = 1.0
) -> Gaussian:
  """The Gaussian with the mean and covariance of ``rows``.

  Args:
    rows: ``[num, d]``, with more rows than columns.
    inflate: Factor on the covariance, positive; above one for noise that must
      cover the data's tails.

  Returns:
    A `Gaussian`.

  Raises:
    TypeError: ``inflate`` is not a real number.
    ValueError: ``rows`` has not two axes, or spans no volume; ``inflate`` is
      not positive.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> noise = optlab.fit_gaussian(jnp.array([[-1.0], [1.0]]), inflate=4.0)
    >>> print(noise.mean, noise.scale)
    [0.] [[2.]]
  """
  checks.enforce(fit_gaussian, locals())
  rows = checks.as_array('rows', rows)
  if rows.ndim != 2:
    raise ValueError(f'rows must have shape [num, d], got {rows.shape}.')
  if not rows.shape[0]:
    raise ValueError(f'rows must have at least one row, got {rows.shape}.')
  mean = jnp.mean(rows, 0)
  centred = rows - mean
  return gaussian(mean, inflate * centred.T @ centred / rows.shape[0])


@checks.domains(inflate=checks.POSITIVE)
def gaussian_mixture(
  weights: base.ArrayLike,
  means: base.ArrayLike,
  covariances: base.ArrayLike,
  inflate: float | jax.Array = 1.0,
) -> GaussianMixture:
  """A mixture of Gaussians, for example one fitted by scikit-learn.

  Args:
    weights: ``[k]``, positive; they are normalized.
    means: ``[k, d]``.
    covariances: ``[k, d, d]``, symmetric and positive definite.
    inflate: Factor on the covariances.

  Returns:
    A `GaussianMixture`.

  Raises:
    TypeError: ``inflate`` is not a real number.
    ValueError: Shapes do not match, a weight is not positive, or a covariance
      not symmetric and positive definite; traced, log densities are NaN.

  Examples:
    >>> import numpy as np
    >>> from optlab import unnormalized
    >>> from sklearn.mixture import GaussianMixture
    >>> rows = np.random.default_rng(0).normal(size=(500, 2))
    >>> fit = GaussianMixture(2, random_state=0).fit(rows)
    >>> noise = unnormalized.gaussian_mixture(
    ...     fit.weights_, fit.means_, fit.covariances_)
    >>> scores = noise.log_prob(rows.astype(np.float32))
    >>> print(np.allclose(scores, fit.score_samples(rows), atol=1e-4))
    True
  """
  checks.enforce(gaussian_mixture, locals())
  weights = checks.as_array('weights', weights)
  means = checks.as_array('means', means)
  covariances = checks.as_array('covariances', covariances)
  checks.check_positive('weights', weights)
  checks.check_real('means', means, low_open=True, high_open=True)
  if means.ndim != 2 or (
    weights.shape != means.shape[:1]
    or covariances.shape != means.shape + means.shape[1:]
  ):
    raise ValueError(
      'weights, means and covariances must have shapes [k], [k, d] and'
      f' [k, d, d], got {weights.shape}, {means.shape} and'
      f' {covariances.shape}.'
    )
  scales = _cholesky('covariances', inflate * covariances)
  return GaussianMixture(
    jnp.log(weights / jnp.sum(weights)).astype(scales.dtype),
    means.astype(scales.dtype),
    scales,
    inverse(scales),
  )


@checks.domains(num=checks.Integer(), size=checks.Integer())
def lattice(
  key: jax.Array, num: int, size: int, dtype: Any = jnp.float32
) -> jax.Array:
  """A randomly shifted Kronecker lattice in the open unit cube.

  Each row alone is uniform, so means over the rows are unbiased; together they
  are spread evenly, so those means vary less than over independent rows. The
  shift does not depend on ``num``.

  Args:
    key: PRNG key, of the shift.
    num: Rows.
    size: Columns.
    dtype: Floating point type.

  Returns:
    ``[num, size]``, in (0, 1).

  Raises:
    TypeError: A count is not an integer, or ``key`` no PRNG key.
    ValueError: A count is below one.

  References:
    Niederreiter, Random Number Generation and Quasi-Monte Carlo Methods, SIAM
    1992, chapter 3; the generator is the root of :math:`x^{s+1} = x + 1`.
  """
  checks.enforce(lattice, locals())
  root = 2.0
  for _ in range(60):
    root = (1 + root) ** (1 / (size + 1))
  steps = np.mod(np.arange(num)[:, None] * root ** -np.arange(1.0, size + 1), 1)
  shift = jax.random.uniform(checks.as_key('key', key), (size,), dtype)
  # An index in float64 on the host: a product in float32 loses the low bits.
  points = jnp.mod(jnp.asarray(steps, dtype) + shift, 1)
  tiny = jnp.finfo(dtype).eps
  return jnp.clip(points, tiny, 1 - tiny)


def _log_normal(white: jax.Array) -> jax.Array:
  """Log density of the standard Gaussian over the last axis."""
  size = white.shape[-1]
  return -0.5 * jnp.sum(white**2, -1) - 0.5 * size * math.log(2 * math.pi)


def _cholesky(name: str, covariance: jax.Array) -> jax.Array:
  """The factor; of a traced matrix that has none, NaN."""
  # There is no factorization in half precision.
  wide = covariance.astype(jnp.promote_types(covariance.dtype, jnp.float32))
  skew = jnp.max(jnp.abs(wide - jnp.matrix_transpose(wide)))
  skew = skew > 0.01 * jnp.max(jnp.abs(wide))
  scale = jnp.where(skew, jnp.nan, jnp.linalg.cholesky(wide))
  if isinstance(scale, jax.core.Tracer):
    return scale
  if skew:
    raise ValueError(
      f'{name} must be symmetric; of a Cholesky factor L give L @ L.T.'
    )
  if not np.all(np.isfinite(scale)):
    raise ValueError(
      f'{name} must be positive definite; add a small multiple of the identity.'
    )
  return scale


def inverse(scale: jax.Array) -> jax.Array:
  eye = jnp.broadcast_to(
    jnp.eye(scale.shape[-1], dtype=scale.dtype), scale.shape
  )
  return linalg.solve_triangular(scale, eye, lower=True)
