r"""Sizes from the gradient noise scale, and from a schedule.

McCandlish, Kaplan, Amodei et al., *An Empirical Model of Large-Batch Training*,
2018, https://arxiv.org/abs/1812.06162.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab import checks
from optlab import trees
from optlab.batches import _statistics
from optlab.batches._statistics import AveragesState
from optlab.batches._statistics import Test


class NoiseScaleInfo(NamedTuple):
  """Diagnostics of `noise_scale`."""

  noise_scale: jax.Array  # shape (), NaN where noise is all that is known
  layers: Any  # the same for each array of the parameters, or ``()``


class NoiseScaleState(NamedTuple):
  """State of `noise_scale`."""

  moments: AveragesState
  info: NoiseScaleInfo


@checks.domains(eta=checks.POSITIVE, decay=checks.OPEN_FRACTION)
def noise_scale(
  eta: float | jax.Array = 1.0,
  *,
  decay: float | jax.Array = 0.99,
  layers: bool = False,
  mask: Any = None,
) -> Test:
  r"""The batch whose noise is ``eta`` times the gradient, from averages.

  .. math:: r = \frac{1}{\eta^2}\,
    \frac{\overline{V}}{\overline{\|g\|^2 - V / b}}

  with both moments unbiased for any batch of size b, and averaged over steps:
  on one batch their ratio is noise. `report` lists the noise scale, so that any
  training loop can log it.

  Args:
    eta: Positive; 1 requests the noise scale itself.
    decay: Of the averages, in (0, 1).
    layers: Whether to keep a noise scale for each array of the parameters too.
    mask: Tree of bools, a prefix of the parameters: which arrays count, for
      example those of the norm layers alone (Gray et al. 2024); ``None`` for
      all.

  Returns:
    A test that takes ``sum_sq_diff_norm`` and ``sample_size``; with ``layers``
    or a ``mask``, ``sum_sq_diff_norms`` or ``sum_sq_diff_grads``. Where the
    averaged squared gradient is not above 0 it keeps the size.

  Raises:
    TypeError: ``eta`` or ``decay`` is not a real number; in ``init``, ``mask``
      holds something else than bools.
    ValueError: ``eta`` is not a finite number above 0, or ``decay`` outside
      (0, 1); in ``init``, ``mask`` is no prefix of the parameters or keeps
      none.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> rule = optlab.grow_batch(optlab.batches.noise_scale(), 8, 4096)
    >>> grads = jnp.ones(4)
    >>> moments = {'sum_sq_diff_norm': 140.0, 'sample_size': 8}
    >>> _, state = rule.update(grads, rule.init(grads), **moments)
    >>> print(state.test.info.noise_scale)  # 20 / (4 - 20 / 8)
    13.333333

  References:
    McCandlish, Kaplan, Amodei et al., *An Empirical Model of Large-Batch
    Training*, 2018, https://arxiv.org/abs/1812.06162; Gray, Samaga, Hestness,
    Soboleva et al., *Normalization Layer Per-Example Gradients are Sufficient
    to Predict Gradient Noise Scale in Transformers*, 2024.

  Notes:
    Cost: scalars. In d dimensions with a true scale B far above b, the relative
    error after T steps is about :math:`(B / b) \sqrt{2 / (d T)}` with
    :math:`T \le 2 / (1 - decay)`: small batches need long averages.
  """
  checks.enforce(noise_scale, locals())
  by_leaf = layers or mask is not None

  def zeros(params):
    zero = jnp.zeros((), _statistics.real(params))
    return jax.tree.map(lambda leaf: zero, params) if by_leaf else zero

  def init(params):
    _check_mask(mask, params)
    zero = jnp.zeros((), _statistics.real(params))
    return trees.own(
      NoiseScaleState(
        _statistics.no_averages(
          {'grad_sq': zeros(params), 'trace': zeros(params)}, zero.dtype
        ),
        NoiseScaleInfo(zero, zeros(params) if layers else ()),
      )
    )

  def update(grads, state, **extras):
    fresh = _moments(grads, extras, by_leaf)
    averages, moments = _statistics.average(state.moments, fresh, decay, extras)
    each = jax.tree.map(
      lambda trace, sq: trace / _statistics.above_zero(sq),
      averages['trace'],
      averages['grad_sq'],
    )
    total = {name: _total(tree, mask) for name, tree in averages.items()}
    scale = total['trace'] / _statistics.above_zero(total['grad_sq'])
    info = NoiseScaleInfo(scale, each if layers else ())
    return scale / jnp.asarray(eta, scale.dtype) ** 2, NoiseScaleState(
      moments, info
    )

  return Test(init, update, scaled=True)


def _total(tree: Any, mask: Any) -> Any:
  return sum(jax.tree.leaves(tree) if mask is None else _kept(tree, mask))


def _kept(tree: Any, mask: Any) -> list[Any]:
  """The leaves that a mask keeps."""
  chosen = jax.tree.map(
    lambda keep, part: jax.tree.leaves(part) if keep else [], mask, tree
  )
  return jax.tree.leaves(chosen)


def _check_mask(mask, params):
  """Raises unless a mask says of each array whether it counts, and one does."""
  if mask is None:
    return
  for path, keep in jax.tree.leaves_with_path(mask):
    if not isinstance(keep, (bool, np.bool_)):
      raise TypeError(
        f'mask{jax.tree_util.keystr(path)} must be a bool, got {keep!r} of type'
        f' {type(keep).__name__}: give a tree of True and False, of a function'
        ' of the parameters its value.'
      )
  try:
    kept = _kept(params, mask)
  except ValueError as error:
    raise ValueError(
      'mask must be a prefix of the parameters, got'
      f' {jax.tree.structure(mask)} for {jax.tree.structure(params)}.'
    ) from error
  if not kept:
    raise ValueError(
      f'mask must keep at least one array, got {mask}, by which no gradient is'
      ' left to have a noise scale.'
    )


def _moments(grads, extras, by_leaf):
  """Unbiased squared gradient and trace, of all or of each array."""
  if not by_leaf:
    sq, trace = _statistics.trace_of(grads, 'noise_scale', extras)
    return {'grad_sq': _statistics.unbiased(sq, trace, extras), 'trace': trace}
  wide, extras = _statistics.real(grads), _statistics.scaled(extras)
  totals = extras.get('sum_sq_diff_norms')
  if totals is None and extras.get('sum_sq_diff_grads') is not None:
    totals = jax.tree.map(jnp.sum, extras['sum_sq_diff_grads'])
  checks.require_extra(
    'noise_scale by layers',
    'per_example(losses, ghost_norms, layers=True)',
    sum_sq_diff_norms=totals,
    sample_size=extras.get('sample_size'),
  )
  trace = jax.tree.map(
    lambda total: _statistics.variance(
      jnp.asarray(total, wide), _statistics.size_of(extras)
    ),
    totals,
  )
  sq_norms = extras.get('sq_norms')
  if sq_norms is None:
    sq_norms = jax.tree.map(lambda g: trees.sq_norm(g, wide), grads)
  grad_sq = jax.tree.map(
    lambda sq, t: _statistics.unbiased(sq, t, extras), sq_norms, trace
  )
  return {'grad_sq': grad_sq, 'trace': trace}


@checks.domains(
  schedule=checks.Function('samples -> size'), unit=checks.POSITIVE
)
def size_schedule(schedule: optax.Schedule, *, unit: Any = 1.0) -> Test:
  """Sizes by the samples seen: ramps, doublings, any optax schedule.

  Args:
    schedule: ``samples -> size``, such as ``optax.linear_schedule(8, 512,
      50_000)``, or for a doubling every 10,000 samples
      ``optax.exponential_decay(8, 10_000, 2.0, staircase=True)``.
    unit: What an example counts, for example its tokens.

  Returns:
    A test for `grow_batch`, by which a schedule that falls keeps the size.

  Raises:
    TypeError: ``schedule`` is not a function, or ``unit`` not a real number.
    ValueError: ``unit`` is not a finite number above 0.

  Examples:
    >>> import jax.numpy as jnp, optax, optlab
    >>> ramp = optlab.batches.size_schedule(optax.linear_schedule(8, 64, 100))
    >>> rule = optlab.grow_batch(ramp, 8, 64)
    >>> state = rule.init(jnp.ones(2))
    >>> for _ in range(3):
    ...   _, state = rule.update(jnp.ones(2), state)
    ...   print(state.batch_size)
    13
    20
    31

  Notes:
    In `optax.MultiSteps` of k steps the rule sees the last of k batches, and
    counts its examples alone: ``unit=k`` counts them all.
  """
  checks.enforce(size_schedule, locals())

  def update(grads, state, *, samples, batch_size, sample_size=None, **extras):
    del grads, extras
    # The request is that of the next step.
    seen = batch_size if sample_size is None else sample_size
    size = schedule((samples + seen) * unit)
    _statistics.check_size('schedule must return', size)
    return size, state

  return Test(lambda params: (), update)
