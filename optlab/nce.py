"""Noise-contrastive estimation and its exponential-loss variant.

What MECO is compared with, in the same form: estimators over `NoiseBatch`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import noise_batch


class NceParams(NamedTuple):
  """A model's parameters beside the log-normalizer that is learned with them.

  Attributes:
    model: The parameters of ``log_density``.
    log_normalizer: Scalar; start it at an estimate of log Z if there is one.
  """

  model: base.Params
  log_normalizer: jax.Array


class NceState(NamedTuple):
  """State of `nce` and `ence`."""

  rejected: jax.Array  # shape (), int32, rows dropped at the last step
  held: jax.Array  # shape (), int32, steps that gave no gradient


def nce(
  log_density: noise_batch.LogDensity,
  nu: float | jax.Array | None = None,
) -> base.GradientEstimator:
  r"""Noise-contrastive estimation: classify data against noise.

  The usual way to train an unnormalized model, and robust: each row's share of
  the gradient is bounded. Its curvature dies with the overlap of noise and
  data, where `meco` keeps that of the likelihood.

  .. math::
    h(x) &= \log p_0(\theta, x) - c - \log q(x) - \log \nu \\
    L(\theta, c) &= \tfrac{1}{n} \sum_i \mathrm{softplus}(-h(x_i))
      + \tfrac{\nu}{m} \sum_j \mathrm{softplus}(h(z_j))

  Args:
    log_density: The model, ``(params, rows) -> [rows]``, up to a constant.
    nu: Weight of noise against data, positive; ``None`` takes m / n.

  Returns:
    A `GradientEstimator` over `NoiseBatch` (with ``data_log_prob``) whose
    parameters are `NceParams`.

  Raises:
    TypeError: ``log_density`` is not a function, the batch not a `NoiseBatch`
      or the parameters not `NceParams`.
    ValueError: ``nu`` is not positive; the batch has no rows, or shapes that do
      not match, or no ``data_log_prob``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> log_density = lambda mean, x: mean * x[:, 0] - x[:, 0] ** 2 / 2
    >>> noise = optlab.fit_gaussian(jnp.array([[-2.0], [2.0]]))
    >>> data = 1.0 + jax.random.normal(jax.random.key(0), (256, 1))
    >>> estimator, tx = optlab.nce(log_density), optax.adam(0.05)
    >>> params = optlab.NceParams(jnp.zeros(()), jnp.zeros(()))
    >>> state = optlab.init(params, estimator, tx)
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for key in jax.random.split(jax.random.key(1), 200):
    ...   batch = optlab.noise_batch(noise, key, data, 256, score_data=True)
    ...   state, value = step(state, batch)
    >>> print(f'{state.params.model - data.mean():.1f}')
    0.0

  References:
    Gutmann, Hyvärinen, `Noise-contrastive estimation
    <https://proceedings.mlr.press/v9/gutmann10a.html>`_, AISTATS 2010

  Notes:
    Bad rows as in `meco`; a batch without a good row of data or of noise gives
    a zero gradient and counts in ``held``. Cost per step: one gradient over
    n + m rows, and the noise's log density on data as well.
  """
  base.check_callable('log_density', log_density, '(params, rows) -> [rows]')
  if nu is not None:
    base.check_positive('nu', nu)

  def rule(h_data, h_noise, nu):
    h_data, h_noise = h_data - jnp.log(nu), h_noise - jnp.log(nu)
    return (
      (jax.nn.softplus(-h_data), nu * jax.nn.softplus(h_noise)),
      (-jax.nn.sigmoid(-h_data), nu * jax.nn.sigmoid(h_noise)),
    )

  return _contrastive('nce', log_density, rule, nu)


def ence(
  log_density: noise_batch.LogDensity,
  max_exponent: float | jax.Array = 40.0,
) -> base.GradientEstimator:
  r"""NCE with the exponential loss, for normalized gradient descent.

  Better conditioned than `nce` for exponential families under normalized
  gradient descent (``optlab.normalized_descent``); the gradient itself varies
  over many orders of magnitude, plain SGD on it is hopeless.

  .. math::
    h(x) &= \log p_0(\theta, x) - c - \log q(x) \\
    L(\theta, c) &= \tfrac{1}{2n} \sum_i e^{-h(x_i) / 2}
      + \tfrac{1}{2m} \sum_j e^{h(z_j) / 2}

  Args:
    log_density: The model, ``(params, rows) -> [rows]``, up to a constant.
    max_exponent: Exponents are clipped from above to this; the gradient of a
      clipped row keeps its direction.

  Returns:
    A `GradientEstimator` over `NoiseBatch` (with ``data_log_prob``) whose
    parameters are `NceParams`.

  Raises:
    TypeError: ``log_density`` is not a function, the batch not a `NoiseBatch`
      or the parameters not `NceParams`.
    ValueError: ``max_exponent`` is not positive; the batch has no rows, or
      shapes that do not match, or no ``data_log_prob``.

  Examples:
    >>> import jax, jax.numpy as jnp, optlab
    >>> log_density = lambda mean, x: mean * x[:, 0] - x[:, 0] ** 2 / 2
    >>> noise = optlab.fit_gaussian(jnp.array([[-1.0], [1.0]]))
    >>> batch = optlab.noise_batch(
    ...     noise, jax.random.key(0), jnp.ones((4, 1)), 4, score_data=True)
    >>> estimator = optlab.ence(log_density)
    >>> params = optlab.NceParams(jnp.zeros(()), 0.5 * jnp.log(2 * jnp.pi))
    >>> estimate, _ = estimator.estimate(params, estimator.init(params), batch)
    >>> print(f'{estimate.value:.2f}')
    1.00

  References:
    Liu, Rosenfeld, Ravikumar, Risteski, `Analyzing and Improving the
    Optimization Landscape of Noise-Contrastive Estimation
    <https://arxiv.org/abs/2110.11271>`_, ICLR 2022

  Notes:
    Bad rows and cost as in `nce`.
  """
  base.check_callable('log_density', log_density, '(params, rows) -> [rows]')
  base.check_real('max_exponent', max_exponent, low=0.0, low_open=True)

  def rule(h_data, h_noise, nu):
    del nu
    data = 0.5 * jnp.exp(jnp.minimum(-0.5 * h_data, max_exponent))
    noise = 0.5 * jnp.exp(jnp.minimum(0.5 * h_noise, max_exponent))
    return (data, noise), (-0.5 * data, 0.5 * noise)

  return _contrastive('ence', log_density, rule, None)


def _contrastive(
  method: str,
  log_density: noise_batch.LogDensity,
  rule: Callable[..., tuple],
  nu: float | jax.Array | None,
) -> base.GradientEstimator:
  """The estimator of a loss that is a sum over rows of a function of h."""

  def init(params):
    if not isinstance(params, NceParams):
      raise TypeError(
        f'{method} learns the log-normalizer: its parameters are'
        ' NceParams(model, log_normalizer), got'
        f' {type(params).__name__}.'
      )
    if jnp.shape(params.log_normalizer):
      raise ValueError(
        f'{method}: log_normalizer must be a scalar, got shape'
        f' {jnp.shape(params.log_normalizer)}.'
      )
    return NceState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  def estimate(params, state, batch):
    n, m = noise_batch.check_batch(method, batch, needs_data_log_prob=True)
    dtype = base.accumulator_dtype(params)
    ratio = jnp.asarray(m / n if nu is None else nu, dtype)
    data_shift, noise_shift = (
      params.log_normalizer.astype(dtype) + log_q.astype(dtype)
      for log_q in (batch.data_log_prob, batch.noise_log_prob)
    )

    def joint_rule(log_p_data, log_p_noise):
      data_good = jnp.isfinite(log_p_data) & jnp.isfinite(data_shift)
      # log p0 = -inf is a good row of noise, with share zero.
      noise_good = (log_p_noise < jnp.inf) & jnp.isfinite(noise_shift)
      usable = jnp.any(data_good) & jnp.any(noise_good)
      h_data = jnp.where(data_good, log_p_data - data_shift, 0)
      h_noise = jnp.where(noise_good, log_p_noise - noise_shift, -jnp.inf)
      losses, slopes = rule(h_data, h_noise, ratio)
      goods = (data_good & usable, noise_good & usable)
      value = sum(map(noise_batch.mean_of, losses, goods))
      cotangents = [
        jnp.where(good, slope, 0)
        / jnp.maximum(jnp.sum(good), 1).astype(dtype)
        for slope, good in zip(slopes, goods, strict=True)
      ]
      rejected = jnp.sum(~data_good) + jnp.sum(~noise_good)
      new_state = NceState(
        rejected=rejected.astype(jnp.int32),
        held=state.held + (~usable).astype(jnp.int32),
      )
      return *cotangents, (value, cotangents, new_state)

    grads, (value, cotangents, state) = noise_batch.joint_gradient(
      log_density, params.model, batch, joint_rule, dtype
    )
    grad_log_normalizer = -sum(map(jnp.sum, cotangents))
    return base.Estimate(
      value,
      NceParams(
        grads, grad_log_normalizer.astype(params.log_normalizer.dtype)
      ),
    ), state

  return base.GradientEstimator(init, estimate)
