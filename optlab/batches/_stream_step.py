"""A training step for batches that are never on the device at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import losses as loss_lib
from optlab import training
from optlab import trees
from optlab.batches import _unit
from optlab.batches._growth import next_size
from optlab.batches._growth import rules_of
from optlab.batches._stream import Stream

_SUMS = 'sum_sq_diff_grads', 'sum_sq_diff_norms', 'sum_sq_diff_norm'
_SCALED = 'scaled_moments'


class _Total(NamedTuple):
  """What the parts of a batch amount to, the gradient in wide dtypes."""

  estimate: base.Estimate
  estimator_state: Any


@checks.domains(
  estimator=checks.ESTIMATOR,
  tx=checks.TRANSFORMATION,
  batch_size=checks.Integer(optional=True),
)
def stream_step(
  estimator: base.GradientEstimator,
  tx: optax.GradientTransformation,
  *,
  batch_size: int | None = None,
) -> Callable[[training.TrainState, Stream], tuple[training.TrainState, Any]]:
  r"""A training step on as many examples of a stream as a rule asks for.

  It takes them in microbatches, whose moments are merged exactly, and so needs
  the memory of one. Three programs are compiled for all sizes: one begins a
  batch, one adds a microbatch, one takes the step. This function jits them
  itself; where it raises, the state that it was given stands.

  Args:
    estimator: From `per_example`.
    tx: Any optax transformation; where it has no `grow_batch`, pass
      ``batch_size``.
    batch_size: A constant size; ``None`` reads `next_size` of the state.

  Returns:
    ``step(state, stream) -> (state, value)``, with a `TrainState`, as
    `train_step`.

  Raises:
    TypeError: ``estimator`` is not a `GradientEstimator`, ``tx`` not an optax
      transformation, or ``batch_size`` not an integer.
    ValueError: Neither ``tx`` nor the argument gives a batch size; in the step,
      the estimator makes what cannot be merged (inner products need the mean
      gradient of the whole batch: see `host_loader`) or is not `per_example`
      itself, without another around it.

  Examples:
    >>> import jax, jax.numpy as jnp, numpy as np, optlab
    >>> losses = lambda x, rows: (rows @ x - 1.0) ** 2
    >>> estimator = optlab.per_example(losses, optlab.ghost_norms)
    >>> tx = optlab.adadagrad(0.1, optlab.norm_test(0.8), 8, 100)
    >>> rng = np.random.default_rng(0)
    >>> source = (rng.normal(size=3).astype('f') for _ in range(1000))
    >>> stream = optlab.batches.stream(source, 16, batched=False)
    >>> state = optlab.init(jnp.zeros(3), estimator, tx)
    >>> step = optlab.batches.stream_step(estimator, tx)
    >>> for _ in range(3):
    ...   size = int(optlab.batches.next_size(state))
    ...   state, value = step(state, stream)
    ...   print(size, f'{value:.2f}')
    8 1.00
    97 1.00
    100 1.00

  Notes:
    Line searches see no ``value_fn``. Random losses get the keys of an
    example's place in its microbatch, another key for each microbatch: other
    numbers than those of `growing_step`. Gradients of bfloat16 parameters are
    rounded once a microbatch.
  """
  checks.enforce(stream_step, locals())

  def part(params, estimator_state, batch, first):
    state = estimator_state
    if isinstance(state, loss_lib.LossState) and not isinstance(
      state.key, tuple
    ):
      state = state._replace(key=jax.random.fold_in(state.key, first))
    elif not isinstance(state, (loss_lib.LossState, optax.EmptyState)):
      raise ValueError(
        'estimator must be that of per_example itself, got one with a'
        f' {type(state).__name__}, which would see each part of a batch as a'
        ' batch of its own: hold steps that are not finite by'
        ' optax.apply_if_finite.'
      )
    estimate, after = estimator.estimate(params, state, batch)
    if isinstance(after, loss_lib.LossState):
      # One step for all parts, whose model state goes from one to the next.
      after = after._replace(step=estimator_state.step, key=estimator_state.key)
    return _Total(_mergeable(estimate), after)

  def empty(params, estimator_state, batch):
    shapes = jax.eval_shape(part, params, estimator_state, batch, 0)
    zeros = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.estimate
    )
    return _Total(zeros, estimator_state)

  def add(params, total, batch, first):
    new = part(params, total.estimator_state, batch, first)
    return _Total(_merge(total.estimate, new.estimate), new.estimator_state)

  def finish(state, total):
    estimate = _finished(total.estimate, state.params)
    after = total.estimator_state
    if isinstance(after, loss_lib.LossState):
      after = after._replace(step=after.step + 1)
    given = base.GradientEstimator(
      estimator.init, lambda params, state, batch: (estimate, after)
    )
    return training.train_step(given, tx)(state, None)

  empty_, add_ = jax.jit(empty), jax.jit(add, donate_argnums=1)
  finish_ = jax.jit(finish)

  def step(state, stream):
    size = batch_size
    if size is None and rules_of(state.opt_state):
      size = int(next_size(state.opt_state))
    if size is None:
      raise ValueError(
        'stream_step needs a batch size: put grow_batch into tx, or pass'
        ' batch_size.'
      )
    parts = -(-size // stream.microbatch_size)
    total = None
    for first in range(parts):
      # Of equal sizes: one of a few examples would know little of its noise.
      batch = stream.take((size + first) // parts)
      if total is None:
        total = empty_(state.params, state.estimator_state, batch)
      total = add_(state.params, total, batch, first)
    return finish_(state, total)

  return step


def _mergeable(estimate):
  """The estimate with a wide gradient; an error where parts can't be merged."""
  extras = dict(estimate.extras)
  extras.pop('value_fn', None)
  other = sorted(set(extras) - {*_SUMS, _SCALED, 'sample_size'})
  if other or 'sample_size' not in extras:
    raise ValueError(
      'estimator must be per_example(losses, ...) without inner products, whose'
      ' parts of a batch can be merged, got'
      + (f' the extra arguments {", ".join(other)}:' if other else ' another:')
      + ' take batches at once from host_loader, or keep the data on the device'
      ' by growing_step.'
    )
  kept = {'sample_size': extras['sample_size']}
  if _SCALED in extras:
    alone = extras['sample_size'] <= 1
    moments = {k: v for k, v in extras[_SCALED].items() if k != 'sq_norms'}
    for name in set(moments) & set(_SUMS):  # Of one example 0 / 0, for 0.
      moments[name] = jax.tree.map(
        lambda leaf: jnp.where(alone, 0.0, leaf), moments[name]
      )
    kept[_SCALED] = moments
  wide = lambda leaf: leaf.astype(trees.accumulator_dtype(leaf))
  grads = jax.tree.map(wide, estimate.grads)
  return estimate._replace(grads=grads, extras=kept)


def _merge(a, b):
  """The estimate of two parts of a batch (Chan et al. 1983)."""
  sizes = a.extras['sample_size'], b.extras['sample_size']
  wide = jnp.finfo(trees.accumulator_dtype(a.grads)).dtype
  count = sizes[0] + sizes[1]
  share = sizes[1].astype(wide) / jnp.maximum(count, 1).astype(wide)
  weight = sizes[0].astype(wide) * share
  mean = lambda x, y: (x + share.astype(_real(x)) * (y - x)).astype(x.dtype)
  extras = {'sample_size': count}
  if _SCALED in a.extras:
    delta = jax.tree.map(jnp.subtract, b.grads, a.grads)
    extras[_SCALED] = _merged(
      a.extras[_SCALED], b.extras[_SCALED], delta, weight
    )
  return base.Estimate(
    mean(a.value, b.value),
    jax.tree.map(mean, a.grads, b.grads),
    extras,
    jax.tree.map(mean, a.aux, b.aux),
  )


def _merged(a, b, delta, weight):
  """The moments of two parts, in the larger of their units."""
  unit = jnp.maximum(a['unit'], b['unit'])
  spread = jax.tree.map(
    lambda d: weight * jnp.square(jnp.abs(d) / unit.astype(_real(d))), delta
  )
  norms = jax.tree.map(jnp.sum, spread)
  between = {
    'sum_sq_diff_grads': spread,
    'sum_sq_diff_norms': norms,
    'sum_sq_diff_norm': sum(jax.tree.leaves(norms)),
  }
  moments = {'unit': unit}
  for name in set(a) & set(_SUMS):
    x, y = (
      jax.tree.map(
        lambda leaf, part=part: _unit.times(leaf, part['unit'] / unit, 2),
        part[name],
      )
      for part in (a, b)
    )
    moments[name] = jax.tree.map(
      lambda x, y, rest: (x + y + rest).astype(x.dtype), x, y, between[name]
    )
  return moments


def _finished(estimate, params):
  """The estimate of a whole batch, as `per_example` would give it."""
  extras = dict(estimate.extras)
  if _SCALED in extras:
    moments = dict(extras[_SCALED])
    unit = moments.pop('unit')
    extras |= _unit.plain(moments, unit)
    scaled = jax.tree.map(lambda g: g / unit.astype(_real(g)), estimate.grads)
    moments['sq_norms'] = _unit.sq_norms(scaled, unit.dtype)
    extras[_SCALED] = moments | {'unit': unit}
  grads = trees.cast_like(estimate.grads, params)
  return estimate._replace(grads=grads, extras=extras)


def _real(leaf):
  return jnp.finfo(leaf.dtype).dtype
