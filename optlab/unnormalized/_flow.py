"""A small normalizing flow, trained in JAX: noise where Gaussians fit badly.

RealNVP: each layer scales and shifts one half of the columns by a function of
the other half, so that the density stays exact both ways.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import checks
from optlab import trees


class Flow(NamedTuple):
  """A RealNVP flow on a standardized space; make it with `init_flow`."""

  mean: jax.Array  # shape [d], of the data
  scale: jax.Array  # shape [d], of the data
  masks: jax.Array  # shape [layers, d], one where a layer keeps the column
  inner: jax.Array  # shape [layers, d, hidden]
  inner_bias: jax.Array  # shape [layers, hidden]
  outer: jax.Array  # shape [layers, hidden, 2 d]
  outer_bias: jax.Array  # shape [layers, 2 d]

  def _layers(self):
    return self[2:]

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    """Draws ``[num, d]``, independent."""
    shape, dtype = (num, self.mean.shape[0]), self.mean.dtype

    def layer(rows, weights):
      log_scale, shift = _coupling(rows, *weights)
      return rows * jnp.exp(log_scale) + shift, None

    rows = jax.random.normal(key, shape, dtype)
    rows, _ = jax.lax.scan(layer, rows, self._layers())
    return rows * self.scale + self.mean

  def log_prob(self, rows: jax.Array) -> jax.Array:
    """Log density, ``[num, d] -> [num]``."""
    rows = jnp.asarray(rows)

    def layer(carry, weights):
      rows, log_det = carry
      log_scale, shift = _coupling(rows, *weights)
      rows = (rows - shift) * jnp.exp(-log_scale)
      return (rows, log_det - jnp.sum(log_scale, -1)), None

    rows = (rows - self.mean) / self.scale
    log_det = jnp.broadcast_to(-jnp.sum(jnp.log(self.scale)), rows.shape[:1])
    (rows, log_det), _ = jax.lax.scan(
      layer, (rows, log_det), self._layers(), reverse=True
    )
    size = rows.shape[-1]
    base_log_prob = -0.5 * jnp.sum(rows**2, -1)
    return base_log_prob - 0.5 * size * math.log(2 * math.pi) + log_det


def _coupling(rows, mask, inner, inner_bias, outer, outer_bias):
  """Log scale, bounded, and shift of the columns that the mask frees."""
  hidden = jnp.tanh((rows * mask) @ inner + inner_bias)
  log_scale, shift = jnp.split(hidden @ outer + outer_bias, 2, -1)
  return 2 * jnp.tanh(log_scale / 2) * (1 - mask), shift * (1 - mask)


@checks.domains(num_layers=checks.Integer(), hidden=checks.Integer())
def init_flow(
  key: jax.Array, rows: jax.Array, num_layers: int = 6, hidden: int = 64
) -> Flow:
  """A flow that starts as the diagonal Gaussian of ``rows``.

  Args:
    key: PRNG key.
    rows: Data ``[num, d]``, d at least two, for mean and scale.
    num_layers: Coupling layers.
    hidden: Width of their one hidden layer.

  Returns:
    A `Flow`.

  Raises:
    TypeError: A count is not an integer.
    ValueError: ``rows`` has not two axes or only one column.
  """
  checks.enforce(init_flow, locals())
  shape = jnp.shape(rows)
  if len(shape) != 2 or shape[1] < 2 or shape[0] < 1:
    raise ValueError(
      'rows must have shape [num, d] with num at least 1 and d at least 2, got'
      f' {shape}.'
    )
  checks.check_real('rows', rows, low_open=True, high_open=True)
  # Integers have no moments, and in half precision the fit overflows.
  rows = jnp.asarray(rows)
  rows = rows.astype(trees.accumulator_dtype(rows))
  size, dtype = rows.shape[1], rows.dtype
  mask_key, inner_key = jax.random.split(key)
  # Every other layer frees what the one before kept.
  order = jnp.stack(
    [
      jax.random.permutation(mask_key_, size) < size // 2
      for mask_key_ in jax.random.split(mask_key, (num_layers + 1) // 2)
    ]
  )
  masks = jnp.stack([order, ~order], 1).reshape(-1, size)[:num_layers]
  inner = jax.random.normal(inner_key, (num_layers, size, hidden), dtype)
  return Flow(
    mean=jnp.mean(rows, 0),
    scale=jnp.std(rows, 0) + jnp.asarray(1e-2, dtype),
    masks=masks.astype(dtype),
    inner=inner * jnp.sqrt(2 / size).astype(dtype),
    inner_bias=jnp.zeros((num_layers, hidden), dtype),
    outer=jnp.zeros((num_layers, hidden, 2 * size), dtype),
    outer_bias=jnp.zeros((num_layers, 2 * size), dtype),
  )


@checks.domains(
  num_steps=checks.Integer(),
  batch_size=checks.Integer(),
  learning_rate=checks.NON_NEGATIVE,
  jitter=checks.NON_NEGATIVE,
)
def fit_flow(
  flow: Flow,
  key: jax.Array,
  rows: jax.Array,
  num_steps: int,
  *,
  batch_size: int = 256,
  learning_rate: float | jax.Array = 2e-3,
  jitter: float | jax.Array = 0.0,
  log_weights: jax.Array | None = None,
) -> tuple[Flow, jax.Array]:
  """Trains a flow by maximum likelihood; again later to refit it.

  Args:
    flow: Where to start, from `init_flow` or an earlier fit.
    key: PRNG key.
    rows: Data ``[num, d]``.
    num_steps: Adam steps with a cosine decay.
    batch_size: Rows a step, drawn with replacement.
    learning_rate: At the start.
    jitter: Standard deviation of noise added to the rows, so that the flow
      stays wider than the data.
    log_weights: ``[num]``, importance weights of the rows: with noise rows and
      ``log_density(params, noise) - noise_log_prob`` the flow follows the
      model. Rows that are not finite then must weigh -inf or NaN; where none
      weighs anything the flow stays. ``None`` weighs alike.

  Returns:
    The flow, and the loss of each step.

  Raises:
    TypeError: A count is not an integer, or a rate not a real number.
    ValueError: ``num_steps`` or ``batch_size`` is below one, a rate negative,
      ``rows`` have another width than the flow, or are not finite, or there is
      not one weight a row.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> x = jax.random.normal(jax.random.key(0), (1000, 1))
    >>> rows = jnp.concatenate([x, x ** 2], 1)
    >>> flow = unnormalized.init_flow(jax.random.key(1), rows, 4, 16)
    >>> flow, losses = unnormalized.fit_flow(flow, jax.random.key(2), rows, 200)
    >>> print(losses[-1] < losses[0])
    True

  References:
    Dinh, Sohl-Dickstein, Bengio, `Density estimation using Real NVP
    <https://arxiv.org/abs/1605.08803>`_, ICLR 2017

  Notes:
    The returned flow has the arrays' shapes of the one given, so a refit
    recompiles nothing. Mix it with a wide component (`defensive`).
  """
  checks.enforce(fit_flow, locals())
  checks.check_fields('flow', flow, Flow._fields, 'a Flow that init_flow makes')
  if jnp.shape(rows)[1:] != flow.mean.shape or not jnp.shape(rows)[0]:
    raise ValueError(
      f'rows must have shape [num, {flow.mean.shape[0]}] with num at least 1,'
      f' as the flow has, got {jnp.shape(rows)}.'
    )
  if log_weights is None:
    checks.check_real('rows', rows, low_open=True, high_open=True)
  rows = jnp.asarray(rows, flow.mean.dtype)
  usable, ends = jnp.asarray(True), None
  if log_weights is not None:
    rows, ends, usable = _weighed(rows, log_weights)
  schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
  tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))
  fixed, weights = flow[:3], flow[3:]

  def loss(weights, batch):
    return -jnp.mean(Flow(*fixed, *weights).log_prob(batch))

  def step(carry, key):
    weights, opt_state = carry
    row_key, jitter_key = jax.random.split(key)
    if ends is None:
      index = jax.random.randint(row_key, (batch_size,), 0, rows.shape[0])
    else:
      uniform = jax.random.uniform(row_key, (batch_size,), ends.dtype)
      index = jnp.searchsorted(ends, uniform * ends[-1], side='right')
      index = jnp.minimum(index, rows.shape[0] - 1)
    batch = rows[index]
    batch += jitter * jax.random.normal(jitter_key, batch.shape, batch.dtype)
    value, grads = jax.value_and_grad(loss)(weights, batch)
    updates, opt_state = tx.update(grads, opt_state, weights)
    return (optax.apply_updates(weights, updates), opt_state), value

  carry, losses = jax.lax.scan(
    step, (weights, tx.init(weights)), jax.random.split(key, num_steps)
  )
  fitted = jax.tree.map(
    lambda new, old: jnp.where(usable, new, old), carry[0], weights
  )
  return Flow(*fixed, *fitted), losses


def _weighed(rows, log_weights):
  """Finite rows, their weights summed up, and whether any weighs something."""
  log_weights = jnp.asarray(log_weights)
  if log_weights.shape != rows.shape[:1]:
    raise ValueError(
      f'log_weights must have shape {rows.shape[:1]}, one a row, got'
      f' {log_weights.shape}.'
    )
  good = (log_weights < jnp.inf) & jnp.all(jnp.isfinite(rows), 1)  # NaN is not.
  log_weights = jnp.where(good, log_weights, -jnp.inf)
  usable = jnp.any(log_weights > -jnp.inf)
  rows = jnp.where(good[:, None], rows, 0)
  weights = jax.nn.softmax(jnp.where(usable, log_weights, 0))
  return rows, jnp.cumsum(weights), usable
