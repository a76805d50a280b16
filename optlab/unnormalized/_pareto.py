"""How heavy the tail of importance weights is: the k-hat of Vehtari et al.

Reference: Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto Smoothed Importance
Sampling", JMLR 2024, https://arxiv.org/abs/1507.02646; the fit is that of
Zhang, Stephens, "A New and Efficient Estimation Method for the Generalized
Pareto Distribution", Technometrics 2009, with their prior of ten points at 1/2.
"""

import math

import jax
import jax.numpy as jnp


def k_hat(log_weights: jax.Array) -> jax.Array:
  """The tail index of weights given by their logarithms, finite or -inf.

  Moments of the weights below ``1 / k`` exist. Minus infinity where the tail
  is flat, and infinity where there are too few weights to tell.
  """
  num = log_weights.shape[0]
  tail = math.ceil(min(0.2 * num, 3 * math.sqrt(num)))
  if tail < 5:
    return jnp.full((), jnp.inf, log_weights.dtype)
  top, _ = jax.lax.top_k(log_weights, tail + 1)
  scaled = jnp.exp(top - jnp.where(top[0] > -jnp.inf, top[0], 0))
  excess = (scaled[:-1] - scaled[-1])[::-1]
  flat = excess[-1] <= 8 * jnp.finfo(excess.dtype).eps
  k = _fit(jnp.where(flat, jnp.linspace(0, 1, tail), excess))
  return jnp.where(flat, -jnp.inf, k)


def largest_ok(num: int) -> float:
  """The k-hat up to which ``num`` draws give a usable mean."""
  return min(0.7, 1 - 1 / math.log10(max(num, 2)))


def _fit(excess):
  """The shape of a generalized Pareto distribution of ascending rows."""
  n = excess.shape[0]
  grid = 30 + int(math.sqrt(n))
  quartile = excess[int(n / 4 + 0.5) - 1]
  # Weights of few values repeat: then the mean stands for the quartile.
  quartile = jnp.where(quartile > 0, quartile, jnp.mean(excess))
  steps = jnp.sqrt(grid / (jnp.arange(1, grid + 1, dtype=excess.dtype) - 0.5))
  theta = 1 / excess[-1] + (1 - steps) / (3 * quartile)
  shape_at = lambda theta: jnp.mean(jnp.log1p(-theta * excess))
  shapes = jax.vmap(shape_at)(theta)
  likelihood = n * (jnp.log(-theta / shapes) - shapes - 1)
  mean_theta = jnp.sum(jax.nn.softmax(likelihood) * theta)
  return (n * shape_at(mean_theta) + 5) / (n + 10)
