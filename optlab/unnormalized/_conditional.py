"""Batches for conditional models: noise beside each row, of its context."""

from typing import Any

import jax
import jax.numpy as jnp

from optlab import checks
from optlab.unnormalized import _noise_batch


@checks.domains(noise=_noise_batch.NOISE, num=checks.Integer())
def conditional_batch(
  noise: _noise_batch.Noise,
  key: jax.Array,
  conditions: Any,
  data: jax.Array,
  contexts: jax.Array,
  num: int,
) -> _noise_batch.NoiseBatch:
  """Draws noise beside each row of data, for ``meco(..., contexts=...)``.

  For a model of y given x, ``(params, (x, y)) -> [rows]``, and noise for y.

  Args:
    noise: The noise distribution of y, the same for every x; see `noise_batch`.
      One that depends on x is for a `NoiseBatch` of your own.
    key: PRNG key.
    conditions: x, array ``[n, ...]`` or a pytree of them.
    data: y, array ``[n, ...]``.
    contexts: int ``[n]``, which context each x is. All x of one context have
      one normalizer: number those apart that have not (`meco` and `nce` warn).
    num: Rows of noise for each row of data, a Python integer.

  Returns:
    A `NoiseBatch` whose rows are pairs (x, y), with n rows of data and
    ``n * num`` of noise. Rows of one context share their noise.

  Raises:
    TypeError: ``num`` or ``contexts`` are not integers, ``key`` is no PRNG key,
      or ``noise`` has no ``sample`` and ``log_prob``.
    ValueError: ``num`` is below one, ``noise`` a batch of distributions or of
      another shape than ``data``, or ``conditions``, ``data`` and ``contexts``
      have not one leading axis of one length.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> from optlab import unnormalized
    >>> # y given x is N(theta x, e^x): its normalizer varies with x.
    >>> x = jnp.linspace(-1.0, 1.0, 50)
    >>> y = x + jnp.exp(x / 2) * jax.random.normal(jax.random.key(0), (50,))
    >>> model = lambda theta, rows: -(
    ...     rows[1][:, 0] - theta * rows[0])**2 / 2 / jnp.exp(rows[0])
    >>> noise = optlab.fit_gaussian(y[:, None], inflate=2.0)
    >>> estimator, tx = optlab.meco(model, contexts=50), optax.adam(0.03)
    >>> state = optlab.init(jnp.zeros(()), estimator, tx)
    >>> step = optlab.train_step(estimator, tx)
    >>> def advance(state, key):
    ...   return step(state, unnormalized.conditional_batch(
    ...       noise, key, x, y[:, None], jnp.arange(50), 8))
    >>> keys = jax.random.split(jax.random.key(1), 300)
    >>> state, _ = jax.jit(jax.lax.scan, static_argnums=0)(
    ...     advance, state, keys)
    >>> mle = jnp.sum(x * y / jnp.exp(x)) / jnp.sum(x * x / jnp.exp(x))
    >>> print(abs(state.params - mle) < 0.1)
    True
  """
  checks.enforce(conditional_batch, locals())
  noise = _noise_batch.as_noise('noise', noise)
  contexts = checks.as_array('contexts', contexts)
  if not jnp.issubdtype(contexts.dtype, jnp.integer):
    raise TypeError(
      f'contexts must be integers, got dtype {contexts.dtype}: number the'
      ' contexts from zero.'
    )
  n = _rows_of({'conditions': conditions, 'data': data, 'contexts': contexts})
  repeat = lambda leaf: jnp.repeat(jnp.asarray(leaf), num, axis=0)
  rows = _noise_batch.draw('noise', noise, key, n * num)
  _noise_batch.check_kind('data', data, rows)
  return _noise_batch.NoiseBatch(
    data=(conditions, data),
    noise=(jax.tree.map(repeat, conditions), rows),
    noise_log_prob=_noise_batch.scores('noise', noise, rows),
    data_log_prob=_noise_batch.scores('noise', noise, data),
    contexts=contexts,
    noise_contexts=repeat(contexts),
  )


def _rows_of(parts):
  """The length of all parts; raises a ``ValueError`` unless it is one."""
  shapes = {name: jax.tree.map(jnp.shape, part) for name, part in parts.items()}
  leading = {
    jnp.shape(leaf)[:1]
    for part in parts.values()
    for leaf in jax.tree.leaves(part)
  }
  if (
    len(leading) != 1
    or leading <= {(), (0,)}
    or (jnp.ndim(parts['contexts']) != 1)
  ):
    raise ValueError(
      'conditions, data and contexts must have one leading axis of one length,'
      f' contexts no other, got shapes {shapes}.'
    )
  return leading.pop()[0]
