"""Rows of the contract table: many lower problems."""

import functools

import jax
import jax.numpy as jnp
import optax

import optlab
from tests.contract import Row
from tests.contract import flat


def block_lower(params, y, batch):
  residual = y - flat(params)
  return 0.5 * jnp.sum(residual**2) + 0.0 * jnp.sum(batch.astype(y.dtype) * y)


def block_upper(params, y, batch):
  residual = batch.astype(y.dtype) @ y - 1.0
  return 0.5 * jnp.mean(residual**2) + 0.05 * jnp.sum(y**2)


def block_batch(key, dtype=jnp.float32, paired=False):
  """Three blocks of four, and padding."""
  blocks = jnp.append(jax.random.permutation(key, 4)[:3], 4)
  data = jax.random.normal(key, (4, 16, 8), dtype), jnp.ones((4, 8), dtype)
  if paired:
    return optlab.multi_block.PairedBlockBatch(blocks, *data, blocks)
  return optlab.BlockBatch(blocks, *data)


def block_row(name, estimator, **kwargs):
  """A row for a multi-block estimator, made from ``hyper -> estimator``."""
  return Row(
    name,
    lambda rate: (estimator(rate), optax.sgd(0.1)),
    0.5,
    batch=functools.partial(block_batch, **kwargs),
    inner=lambda dtype: (jnp.full((4, 8), 2.0, dtype),),
    shard=False,  # Tables are sharded; see bsvrb_test.
  )


BLOCK_LEVELS = block_upper, block_lower, 4


def composition_batch(key, dtype=jnp.float32):
  """Three blocks of four, and padding; rows of eight for each."""
  blocks = jnp.append(jax.random.permutation(key, 4)[:3], 4)
  return optlab.multi_block.FCCOBatch(
    blocks, jax.random.normal(key, (4, 16, 8), dtype)
  )


def composition_inner(params, batch):
  """Logarithms of means of exponentials of squared residuals."""
  x = flat(params)
  residual = batch.astype(x.dtype) @ x - 1.0
  return jnp.log(jnp.mean(jnp.exp(0.1 * residual**2), axis=1))


def composition_row(name, tracker):
  return Row(
    name,
    lambda rate: (
      optlab.multi_block.fcco(
        composition_inner, lambda u, batch: 5.0 * u, 4, tracker=tracker(rate)
      ),
      optax.sgd(0.1),
    ),
    0.5,
    batch=composition_batch,
    inner=lambda dtype: (jnp.zeros(4, dtype),),
    shard=False,
  )


ROWS = [
  block_row('bsvrb', lambda rate: optlab.bsvrb(*BLOCK_LEVELS, inner_lr=rate)),
  block_row(
    'bsvrb_v1',
    lambda rate: optlab.bsvrb(
      *BLOCK_LEVELS, inner_lr=rate, dual=optlab.multi_block.track_hessians()
    ),
  ),
  block_row(
    'rsvrb',
    lambda rate: optlab.multi_block.rsvrb(
      *BLOCK_LEVELS, inner_lr=rate, beta=0.5, floor=0.5
    ),
    paired=True,
  ),
  composition_row('fcco', optlab.multi_block.track_msvr),
  composition_row('fcco_log', optlab.multi_block.track_log_average),
  composition_row('fcco_mirror', optlab.multi_block.track_mirror),
]
