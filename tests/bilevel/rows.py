"""Rows of the contract table: bilevel estimators."""

import jax
import jax.numpy as jnp
import optax

import optlab
from tests.contract import Row
from tests.contract import flat
from tests.contract import loss
from tests.contract import rows


def bilevel_upper(x, y, batch):
  """Mild in both levels; ``y*`` is linear in x."""
  return loss(x, batch) + 0.1 * jnp.mean(jnp.cosh(y))


def bilevel_lower(x, y, batch):
  """Strongly convex in y: least squares to a linear function of x."""
  batch = batch.astype(y.dtype)
  fit = batch[..., :4] @ y - batch @ flat(x).astype(y.dtype)
  return 0.5 * jnp.mean(fit**2) + 0.1 * jnp.sum(y**2)


def bilevel_batch(steps):
  """Two lower samples and ``steps`` fresh ones, of sixteen rows each."""

  def batch(key, dtype=jnp.float32):
    data = rows(key, dtype)
    fresh = jnp.stack([data] * steps)
    return optlab.BilevelBatch(upper=data, lower=data, step_samples=fresh)

  return batch


def bilevel_shard(batch):
  """Samples are spread; steps and block numbers are not."""
  spread = lambda leaf: jax.P('data') if leaf.ndim else jax.P()
  return optlab.BilevelBatch(
    upper=jax.tree.map(spread, batch.upper),
    lower=jax.tree.map(spread, batch.lower),
    step_samples=jax.tree.map(
      lambda leaf: jax.P(None, 'data'), batch.step_samples
    ),
  )


def bilevel_row(name, make, *, steps=2, rest=lambda: (), **fields):
  """A row for a hypergradient estimator, with plain gradient descent above."""

  def inner(dtype):
    start = jnp.full((4,), 0.25, dtype)
    return (start, *rest())

  return Row(
    name,
    lambda hyper: (make(hyper), optax.sgd(0.1)),
    0.1,
    batch=fields.pop('batch', bilevel_batch(steps)),
    inner=inner,
    shard=bilevel_shard,
    **fields,
  )


def indexed_batch(key, dtype=jnp.float32):
  """One block of two, by the first draw's sign."""
  data = rows(key, dtype)
  block = optlab.bilevel.IndexedBatch((data[0, 0] > 0).astype(jnp.int32), data)
  return optlab.BilevelBatch(upper=block, lower=block)


LEVELS = (bilevel_upper, bilevel_lower)


def with_state(level, part):
  """A level that counts its steps, and whose loss a key scales a little."""

  def objective(x, y, seen, batch, key):
    scale = 1.0 + 0.01 * jax.random.uniform(key, (), jnp.float32)
    value = level(x, y, batch)
    return value * scale.astype(value.dtype), seen[part] + 1

  return objective


FULL = bilevel_batch(1)(jax.random.key(3))

ROWS = [
  bilevel_row(
    'bo_rep',
    lambda rate: optlab.bo_rep(
      *LEVELS, optax.sgd(rate), rate, lower_steps=2, radius=1.0, dual_radius=9.0
    ),
  ),
  bilevel_row('soba', lambda rate: optlab.soba(*LEVELS, optax.sgd(rate), rate)),
  bilevel_row(
    'saba',
    lambda rate: optlab.saba(
      *LEVELS, optax.sgd(rate), rate, upper_blocks=2, lower_blocks=2
    ),
    batch=indexed_batch,
  ),
  bilevel_row(
    'stocbio',
    lambda rate: optlab.stocbio(*LEVELS, optax.adam(rate), rate, lower_steps=2),
  ),
  bilevel_row(
    'ttsa',
    lambda rate: optlab.bilevel.ttsa(*LEVELS, optax.sgd(rate), rate),
    steps=1,
    rest=lambda: (jax.random.key(7),),
  ),
  bilevel_row(
    'with_models',
    lambda rate: optlab.bilevel.with_models(
      lambda f, g: optlab.soba(f, g, optax.sgd(rate), rate, has_aux=True),
      with_state(bilevel_upper, 0),
      with_state(bilevel_lower, 1),
      has_state=True,
      has_key=True,
    ),
    rest=lambda: (
      (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
      jax.random.key(7),
    ),
  ),
  bilevel_row(
    'implicit',
    lambda rate: optlab.implicit(*LEVELS, optax.sgd(rate), lower_steps=2),
  ),
  bilevel_row(
    'unrolled',
    lambda rate: optlab.unrolled(*LEVELS, optax.sgd(rate), lower_steps=2),
  ),
  bilevel_row(
    'srba',
    lambda rate: optlab.bilevel.srba(
      *LEVELS, optax.sgd(rate), rate, FULL, period=3
    ),
  ),
  bilevel_row(
    'mrbo',
    lambda rate: optlab.bilevel.mrbo(*LEVELS, optax.sgd(rate), rate),
  ),
  bilevel_row(
    'f2sa',
    # f is mild in y: of a larger penalty float32 sees the shift to 1e-4 only.
    lambda rate: optlab.bilevel.f2sa(
      *LEVELS, optax.sgd(rate), 0.1, lower_steps=2
    ),
  ),
  bilevel_row(
    'with_storm',
    lambda beta: optlab.with_storm(
      optlab.soba(*LEVELS, optax.sgd(0.1), 0.1), beta
    ),
  ),
]
