"""Denoising score matching: an unnormalized model without noise to draw from.

Reference: Vincent, "A Connection Between Score Matching and Denoising
Autoencoders", Neural Computation 2011, https://doi.org/10.1162/NECO_a_00142
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch


class DenoisingScoreMatchingInfo(NamedTuple):
  """Diagnostics of `denoising_score_matching`."""

  rejected: jax.Array  # shape (), int32, rows dropped at the last step
  total_rejected: jax.Array  # shape (), int32
  held: jax.Array  # shape (), bool, whether the step gave no gradient
  total_held: jax.Array  # shape (), int32


class DenoisingScoreMatchingState(NamedTuple):
  """State of `denoising_score_matching`."""

  key: jax.Array  # shape (), PRNG key
  info: DenoisingScoreMatchingInfo


@checks.domains(
  log_density=_likelihood.LOG_DENSITY, noise_scale=checks.POSITIVE
)
def denoising_score_matching(
  log_density: _likelihood.LogDensity, noise_scale: float | jax.Array
) -> base.GradientEstimator:
  r"""Matches the model's score to that of the data under small noise.

  No normalizer and no noise distribution are needed: choose it over `meco` and
  `nce` where none covers the data. The model it finds is that of the data with
  noise added, wider than they are; and the score does not see how mass is
  shared among parts that hardly touch.

  .. math::
    L(\theta) = \tfrac{1}{2n} \sum_i \bigl|
      \sigma \nabla_x \log p_0(\theta, x_i + \sigma \epsilon_i) + \epsilon_i
    \bigr|^2, \quad \epsilon_i \sim N(0, I)

  Args:
    log_density: The model, ``(params, rows) -> [rows]``, up to a constant, with
      a derivative in the rows, each of its own row alone.
    noise_scale: :math:`\sigma`, positive: as small as the gradient's variance,
      which grows as it falls, allows.

  Returns:
    A `GradientEstimator` over rows of data ``[n, ...]``, whose ``init`` takes a
    PRNG key after the parameters.

  Raises:
    TypeError: ``log_density`` is not a function, ``noise_scale`` not a real
      number, or the rows are not a floating array.
    ValueError: ``noise_scale`` is not positive, there are no rows, or
      ``log_density`` does not return one number a row.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> from optlab import unnormalized
    >>> log_density = lambda mean, x: mean * x[:, 0] - x[:, 0] ** 2 / 2
    >>> data = 1.0 + jax.random.normal(jax.random.key(0), (256, 1))
    >>> estimator = unnormalized.denoising_score_matching(log_density, 0.3)
    >>> tx = optax.adam(0.03)
    >>> state = optlab.init(jnp.zeros(()), estimator, tx, jax.random.key(1))
    >>> step = optlab.train_step(estimator, tx)
    >>> state, values = jax.jit(jax.lax.scan, static_argnums=(0, 3))(
    ...     lambda state, _: step(state, data), state, None, 300)
    >>> print(abs(state.params - data.mean()) < 0.1)
    True

  References:
    Vincent, `A Connection Between Score Matching and Denoising Autoencoders
    <https://doi.org/10.1162/NECO_a_00142>`_, Neural Computation 2011

  Notes:
    A row whose loss is not finite is dropped and counted; without a good row
    the gradient is zero. Cost: a gradient through the gradient in the rows,
    two to three times that of the model's, and no noise rows.
  """
  checks.enforce(denoising_score_matching, locals())

  def init(params, key):
    checks.check_real_params('params', params)
    return DenoisingScoreMatchingState(
      key=checks.as_key('key', key),
      info=DenoisingScoreMatchingInfo(**_likelihood.zero_tally()),
    )

  def loss(params, rows):
    scale = jnp.asarray(noise_scale, rows[0].dtype)
    moved, epsilon = rows[0] + scale * rows[1], rows[1]
    log_p, pullback = jax.vjp(lambda x: log_density(params, x), moved)
    _likelihood.check_rows(log_p, moved.shape[0])
    (score,) = pullback(jnp.ones_like(log_p))
    axes = tuple(range(1, moved.ndim))
    losses = 0.5 * jnp.sum((scale * score + epsilon) ** 2, axes)
    # Where the model is constant or NaN its derivative may still be a number.
    # So it may where a scale that is traced is none.
    known = jnp.isfinite(log_p) & jnp.all(scale > 0)
    return jnp.where(known, losses, jnp.nan)

  def estimate(params, state, batch):
    batch = _checked(batch)
    dtype = trees.accumulator_dtype(params)
    key, noise_key = jax.random.split(state.key)
    epsilon = jax.random.normal(noise_key, batch.shape, batch.dtype)
    joined = _likelihood.aligned(
      _noise_batch.NoiseBatch(
        data=(batch, epsilon),
        noise=(batch[:0], epsilon[:0]),
        noise_log_prob=jnp.zeros(0, dtype),
      )
    )

    def rule(losses, none, unused):
      del unused
      good = jnp.isfinite(losses)
      tally = _likelihood.tally(state.info, (good,), ~jnp.any(good))
      value = _likelihood.mean_of(losses, good)
      one = jnp.ones((), dtype)
      return (_likelihood.mean_cotangent(one, good), none), (value, tally)

    (grads, fine), (value, tally), _ = _likelihood.joint_gradient(
      loss, params, joined, rule, dtype
    )
    info = DenoisingScoreMatchingInfo(**tally)
    info = _likelihood.held_unless(fine, info)
    return base.Estimate(value, grads), DenoisingScoreMatchingState(key, info)

  return base.GradientEstimator(init, estimate)


def _checked(rows: Any) -> jax.Array:
  dtype = getattr(rows, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      'denoising_score_matching takes rows of data, a floating array, got'
      f' {type(rows).__name__} of dtype {dtype}: it adds noise to them, which'
      ' discrete rows do not bear.'
    )
  if not rows.ndim or not rows.size:
    raise ValueError(
      'denoising_score_matching needs rows, one leading axis of at least one,'
      f' got shape {rows.shape}.'
    )
  return jnp.asarray(rows)
