"""Rows of the contract table: unnormalized models."""

import jax
import jax.numpy as jnp
import optax

import optlab
from tests.contract import Row
from tests.contract import flat
from tests.contract import rows


def energy(params, x):
  """A Gaussian around the parameters, up to its normalizer."""
  mean = flat(params)
  return x.astype(mean.dtype) @ mean - 0.5 * jnp.sum(x**2, -1).astype(
    mean.dtype
  )


def noise_batch(key, dtype=jnp.float32):
  """Data around 0.5, noise around the origin; both of eight columns."""
  data_key, noise_key = jax.random.split(key)
  data = 0.5 + jax.random.normal(data_key, (16, 8), dtype)
  noise = 1.5 * jax.random.normal(noise_key, (16, 8), dtype)

  def log_prob(x):
    white = x.astype(jnp.promote_types(dtype, jnp.float32)) / 1.5
    return -0.5 * jnp.sum(white**2, -1) - 8 * jnp.log(1.5 * (2 * jnp.pi) ** 0.5)

  return optlab.NoiseBatch(data, noise, log_prob(noise), log_prob(data))


def contexts_batch(key, dtype=jnp.float32):
  """The same rows, each of one of six contexts."""
  contexts = jnp.arange(16, dtype=jnp.int32) % 6
  return noise_batch(key, dtype)._replace(
    contexts=contexts, noise_contexts=contexts[::-1]
  )


def likelihood_row(name, make, hyper, batch=noise_batch, **fields):
  """A row for an estimator over `NoiseBatch`, with SGD behind it."""
  return Row(
    name,
    lambda hyper: (make(hyper), optax.sgd(0.05)),
    hyper,
    batch=batch,
    **fields,
  )


ROWS = [
  likelihood_row('meco', lambda gamma: optlab.meco(energy, gamma), 0.5),
  likelihood_row(
    'meco_ratio_corrected',
    lambda gamma: optlab.meco(energy, gamma, ratio_correction=True),
    0.5,
  ),
  likelihood_row(
    'meco_contexts',
    lambda gamma: optlab.meco(energy, gamma, contexts=6),
    0.5,
    contexts_batch,
  ),
  likelihood_row('nce', lambda nu: optlab.nce(energy, nu), 1.0),
  likelihood_row(
    'ence', lambda clip: optlab.unnormalized.ence(energy, clip), 5.0
  ),
  likelihood_row(
    'contrastive_divergence',
    lambda rate: optlab.contrastive_divergence(energy, rate, 3),
    0.1,
    inner=lambda dtype: (jax.random.key(7), jnp.zeros((16, 8), dtype)),
  ),
  likelihood_row(
    'denoising_score_matching',
    lambda scale: optlab.unnormalized.denoising_score_matching(energy, scale),
    1.0,  # The noise of the value cancels.
    rows,
    inner=lambda dtype: (jax.random.key(7),),
  ),
]
