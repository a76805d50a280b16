r"""Running estimates of a moving quantity, one of them or a table of many.

A *tracker* follows a quantity that is only seen through samples. Three rules
share one form: with the fresh sample evaluated at the current point (``now``)
and, for the same sample, at the previous one (``before``),

.. math::
  q \leftarrow (1 - \alpha)\, q + \alpha\, h(\text{now})
    + \gamma\, (h(\text{now}) - h(\text{before})).

`ema` has :math:`\gamma = 0`, `storm` has :math:`\gamma = 1 - \alpha`, and
`msvr` is for one row of a table that is only visited now and then and has a
larger :math:`\gamma`. Each works on a pytree, or, given ``blocks``, on the rows
of a *block table*: a pytree whose leaves have a leading axis of blocks. A row
costs what it costs, not what the table costs: the table is written in place
where its buffer is donated. How ``blocks`` name rows: see `optlab.tables`.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from optlab import checks
from optlab import tables

__all__ = [
  'ema',
  'msvr',
  'msvr_gamma',
  'storm',
]

Tree = TypeVar('Tree')  # A pytree of arrays.
UNIT = checks.Real(low=0.0, high=1.0)
RATE = checks.OPEN_FRACTION._replace(remedy='0.1 is a stable start.')


@checks.domains(rate=UNIT)
def ema(
  tracker: Tree,
  now: Tree,
  rate: float | jax.Array,
  *,
  blocks: jax.Array | None = None,
) -> Tree:
  r"""Exponential moving average.

  Choose it where the quantity is not evaluated at the previous point: it lags
  behind what moves, which `storm` and `msvr` correct.

  .. math:: q \leftarrow (1 - \alpha)\, q + \alpha\, h(\text{now})

  Args:
    tracker: Pytree of arrays; with ``blocks``, a block table with leading axis
      ``num_blocks``.
    now: The fresh sample, like ``tracker``; with ``blocks``, its rows, with the
      leading axis of ``blocks``.
    rate: Scalar :math:`\alpha` in [0, 1].
    blocks: int array of shape ``(sampled,)``, the rows to update, or ``None``
      for the whole tree.

  Returns:
    The tracker after the update, with its own dtypes.

  Raises:
    TypeError: ``blocks`` are not integers, or ``rate`` not a real number.
    ValueError: ``rate`` is outside [0, 1], or a block index is negative.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> print(optlab.tracking.ema(jnp.zeros(2), jnp.ones(2), 0.25))
    [0.25 0.25]
  """
  checks.enforce(ema, locals())
  return _update(tracker, now, now, rate, 0.0, blocks)


@checks.domains(beta=UNIT)
def storm(
  tracker: Tree,
  now: Tree,
  before: Tree,
  beta: float | jax.Array,
  *,
  blocks: jax.Array | None = None,
) -> Tree:
  r"""Recursive momentum: a moving average that follows what moves.

  Choose it for a quantity that is sampled every step. Without noise it is
  exact, however fast the point moves.

  .. math::
    q \leftarrow (1 - \beta)\, (q - h(\text{before})) + h(\text{now})

  Args:
    tracker: Pytree of arrays, or a block table, see `ema`.
    now: The fresh sample at the current point.
    before: The same sample at the previous point, like ``now``.
    beta: Scalar :math:`\beta` in [0, 1]; 1 forgets the past.
    blocks: int array of shape ``(sampled,)``, the rows to update, or ``None``.

  Returns:
    The tracker after the update, with its own dtypes.

  Raises:
    TypeError: ``blocks`` are not integers, or ``beta`` not a real number.
    ValueError: ``beta`` is outside [0, 1], or a block index is negative.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> x = jnp.ones(2)
    >>> print(optlab.tracking.storm(x, jnp.full(2, 3.0), x, 0.1))
    [3. 3.]

  References:
    Cutkosky, Orabona, `Momentum-based variance reduction in non-convex SGD
    <https://arxiv.org/abs/1905.10018>`_, NeurIPS 2019.
  """
  checks.enforce(storm, locals())
  return _update(tracker, now, before, beta, 1.0 - beta, blocks)


@checks.domains(alpha=RATE, gamma=checks.NON_NEGATIVE._replace(optional=True))
def msvr(
  tracker: Tree,
  now: Tree,
  before: Tree,
  alpha: float | jax.Array,
  gamma: float | jax.Array | None = None,
  *,
  blocks: jax.Array | None = None,
) -> Tree:
  r"""Multi-block variance reduction: `storm` for rows that are rarely visited.

  Choose it for a table of which each step samples some rows: a row that is
  visited with probability :math:`p` stands in for the :math:`1/p` steps in
  which it is not, so that its correction is that much larger.

  .. math::
    q_i \leftarrow (1 - \alpha)\, q_i + \alpha\, h_i(\text{now})
      + \gamma\, (h_i(\text{now}) - h_i(\text{before}))

  Args:
    tracker: Pytree of arrays, or a block table, see `ema`.
    now: The fresh samples at the current point.
    before: The same samples at the previous point (of the last step, not of
      the row's last visit), like ``now``.
    alpha: Scalar :math:`\alpha` in (0, 1).
    gamma: Scalar :math:`\gamma`; ``None`` is `msvr_gamma` with the distinct
      rows among ``blocks``, or ``1 - alpha``, which is `storm`, without
      ``blocks``.
    blocks: int array of shape ``(sampled,)``, the rows to update, or ``None``.

  Returns:
    The tracker after the update, with its own dtypes.

  Raises:
    TypeError: ``blocks`` are not integers, or a rate not a real number.
    ValueError: ``alpha`` is outside (0, 1), a block index is negative, or
      there are more ``blocks`` than rows.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> table = optlab.tracking.msvr(
    ...     jnp.ones(4), jnp.array([3.0]), jnp.array([2.0]), 0.5, gamma=1.0,
    ...     blocks=jnp.array([2]))
    >>> print(table)
    [1. 1. 3. 1.]

  References:
    Jiang, Li, Wang, Zhang, Yang, `Multi-block-single-probe variance reduced
    estimator for coupled compositional optimization
    <https://arxiv.org/abs/2207.08540>`_, NeurIPS 2022.
  """
  checks.enforce(msvr, locals())
  if gamma is None:
    if blocks is None:
      gamma = 1.0 - alpha
    else:
      num_blocks = tables.num_blocks_of(tracker)
      sampled = jnp.sum(tables.distinct_blocks(blocks, num_blocks))
      gamma = msvr_gamma(num_blocks, sampled, alpha)
  return _update(tracker, now, before, alpha, gamma, blocks)


@checks.domains(num_blocks=checks.Integer(), alpha=RATE)
def msvr_gamma(
  num_blocks: int, sampled: int | jax.Array, alpha: float | jax.Array
) -> Any:
  r"""The :math:`\gamma` at which the cross term of the error of MSVR vanishes.

  .. math::
    \gamma = \frac{m - I}{I\, (1 - \alpha)} + 1 - \alpha

  Args:
    num_blocks: The number of blocks :math:`m`.
    sampled: How many distinct blocks :math:`I` a step samples; may be traced.
    alpha: Scalar :math:`\alpha` in (0, 1).

  Returns:
    Scalar; ``1 - alpha``, plain `storm`, where every block is sampled.

  Raises:
    TypeError: A count is not an integer, or ``alpha`` not a real number.
    ValueError: A count is below one, or ``alpha`` is outside (0, 1).
  """
  checks.enforce(msvr_gamma, locals())
  is_array = isinstance(sampled, jax.Array)
  checks.check_int('sampled', sampled, 0 if is_array else 1, traced=True)
  # An empty batch updates no row; it must only not divide by zero.
  sampled = jnp.maximum(sampled, 1) if is_array else sampled
  return (num_blocks - sampled) / sampled / (1.0 - alpha) + (1.0 - alpha)


def _update(tracker, now, before, alpha, gamma, blocks):
  def blend(name, old):
    checks.check_same_tree('now', now, name, old)
    checks.check_same_tree('before', before, name, old)
    return jax.tree.map(leaf, old, now, before)

  def leaf(old, now, before):
    dtype = old.dtype
    a, g = jnp.asarray(alpha, dtype), jnp.asarray(gamma, dtype)
    now, before = jnp.asarray(now, dtype), jnp.asarray(before, dtype)
    return (1 - a) * old + a * now + g * (now - before)

  tracker = jax.tree.map(jnp.asarray, tracker)
  checks.check_floating(
    'tracker', tracker, 'An average of integers stands still.'
  )
  if blocks is None:
    return blend('tracker', tracker)
  use = tables.distinct_blocks(blocks, tables.num_blocks_of(tracker))
  rows = blend('tracker[blocks]', tables.gather_rows(tracker, blocks))
  return tables.scatter_rows(tracker, rows, blocks, use)
