r"""AdAdaGrad: batches that grow where the gradient drowns in its noise.

Lau, Liu, Kolar, *AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient
Methods*, 2024, https://arxiv.org/abs/2402.11215.

`grow_batch` is a transformation that only watches: it rounds up what a test
requests, never lets the batch shrink, and keeps the next size in its state.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import checks
from optlab import trees
from optlab.batches import _group
from optlab.batches import _sizes
from optlab.batches import _statistics
from optlab.batches._statistics import Test


class GrowBatchInfo(NamedTuple):
  """Diagnostics of `grow_batch`."""

  requested_size: jax.Array  # shape (), float, what the last test asked for


class GrowBatchState(NamedTuple):
  """State of `grow_batch`."""

  step: jax.Array  # shape (), int32, steps seen
  # Shape (2,), int32: examples seen, in units of 2^30, and the rest of them.
  samples: jax.Array
  batch_size: jax.Array  # shape (), int32, the size of the next batch
  max_batch_size: jax.Array  # shape (), int32, which `growing_init` checks
  test: Any  # what the test remembers
  info: GrowBatchInfo


class _TestDomain(NamedTuple):
  """A `Test`, or a function without memory."""

  optional: bool = False

  def check(self, name: str, value: Any) -> None:
    """Raises unless ``value`` is in the domain."""
    if not isinstance(value, Test):
      checks.check_callable(
        name,
        value,
        '(grads, **extras) -> size, or a test such as optlab.norm_test(0.5)',
      )


TEST = _TestDomain()
SIZE = checks.Integer(2, 'The variance of one example is undefined.', True)


@checks.domains(
  test=TEST,
  batch_size=SIZE,
  max_batch_size=SIZE,
  test_interval=checks.Integer(traced=True),
  growth_cap=checks.Real(
    low=1.0,
    low_open=True,
    remedy='It is the factor by which a batch may grow; None for no cap.',
    optional=True,
  ),
  multiple_of=checks.Integer(traced=True),
)
def grow_batch(
  test: Test | Callable[..., jax.Array],
  batch_size: int | jax.Array,
  max_batch_size: int | jax.Array,
  *,
  test_interval: int | jax.Array = 1,
  growth_cap: float | jax.Array | None = None,
  multiple_of: int | jax.Array = 1,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the size of the next batch; lets updates pass as they are.

  .. math:: b \leftarrow \max(b, \min(b_{\max}, \lceil r \rceil))

  where the test requests :math:`r` from the gradients that this step has seen.
  Put it in front of any optimizer by `optax.chain`; whoever makes the batches
  asks `next_size`, as `growing_step` does.

  Args:
    test: What requests a size, for example ``norm_test(0.5)``, a `Test`; or a
      function ``(grads, **extras) -> size`` of the gradient and the step's
      extra arguments.
    batch_size: The first size, at least 2: one example has no variance.
    max_batch_size: The largest size, for example the number of examples.
    test_interval: Tests on every so many steps only.
    growth_cap: At most this factor a test, above 1, but at least one example;
      ``None`` for no cap.
    multiple_of: Rounds sizes up to multiples of this, for batches that are
      split over so many devices; divides ``batch_size`` and ``max_batch_size``.

  Returns:
    An optax transformation with `GrowBatchState`.

  Raises:
    TypeError: ``test`` is not a function, or a size not an integer.
    ValueError: ``batch_size`` is below 2 or above ``max_batch_size``,
      ``growth_cap`` not above 1, or a size no multiple of ``multiple_of``; in
      ``update``, ``test`` requests an array of sizes.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> losses = lambda x, rows: (rows @ x - 1.0) ** 2
    >>> estimator = optlab.per_example(losses, optlab.ghost_norms)
    >>> tx = optax.chain(
    ...     optlab.grow_batch(optlab.norm_test(0.5), 8, 100), optax.sgd(0.1))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> state = optlab.init(jnp.zeros(3), estimator, tx)
    >>> rows = jax.random.normal(jax.random.key(0), (100, 3))
    >>> for _ in range(3):
    ...   size = int(optlab.batches.next_size(state))
    ...   state, value = step(state, rows[:size])
    ...   print(size, f'{value:.2f}')
    8 1.00
    33 0.92
    100 1.00

  References:
    Lau, Liu, Kolar, *AdAdaGrad: Adaptive Batch Size Schemes for Adaptive
    Gradient Methods*, 2024, https://arxiv.org/abs/2402.11215

  Notes:
    The tests of optlab compare the moments with the mean gradient that they
    were made around, be it 1e-30 or 1e30 in float32 (``scaled_moments``). Any
    other reads the extra argument ``grad`` where there is one (`train_step`
    always gives it), and else the updates.

    Where `optax.masked` or `optax.partition` hides some parameters and there is
    no ``grad``, it tests those it sees, with their own moments: they need
    `vmap_grads`, or ``layers=True`` in `per_example`.

    Under `optax.MultiSteps` every k-th batch is tested, by the moments of that
    batch alone; the size is that of one batch, not of the k together. There is
    no need for it in `growing_step`, which accumulates microbatches itself.

    A request that is not a number (a NaN in the gradients, one example only)
    and moments that overflow keep the size. A mean gradient of exactly 0 with
    variance requests the maximum.

    The authors' code sums inner-product variances per array (0.25 to 6.2 times
    the true one), and biases accumulated and data-parallel variances by about
    ``1 + 1/m``; here they are those of the whole vector, and exact.

    Cost: scalars. What the moments cost depends on the route, see
    `per_example`.

    Tune a constant batch first: docs/reproduced.md says how often it was as
    good or better.
  """
  checks.enforce(grow_batch, locals())
  _sizes.check_sizes(batch_size, max_batch_size, multiple_of)
  if not isinstance(test, Test):
    test = _statistics.from_function(test)
    told = lambda state: {}
  else:
    told = lambda state: {
      'step': state.step,
      'samples': _sizes.samples_seen(
        state.samples, state.info.requested_size.dtype
      ),
      'batch_size': state.batch_size,
    }

  def init_fn(params):
    checks.check_params('params', params)
    real = jnp.finfo(trees.accumulator_dtype(params)).dtype
    return GrowBatchState(
      step=jnp.zeros((), jnp.int32),
      samples=jnp.zeros(2, jnp.int32),
      # Copies: the state may be donated.
      batch_size=jnp.array(batch_size, jnp.int32),
      max_batch_size=jnp.array(max_batch_size, jnp.int32),
      test=test.init(params),
      info=GrowBatchInfo(requested_size=jnp.zeros((), real)),
    )

  def update_fn(updates, state, params=None, *, grad=None, **extra_args):
    del params
    extras = extra_args | told(state)
    requested, memory = _ask(test, updates, grad, state, extras)
    seen = extra_args.get('sample_size', state.batch_size)
    limit = jnp.asarray(max_batch_size, jnp.int32)
    size = _sizes.next_size(
      requested, state.batch_size, limit, growth_cap, multiple_of
    )
    tested = (state.step % jnp.asarray(test_interval, jnp.int32)) == 0
    last = state.info.requested_size
    return updates, GrowBatchState(
      step=jnp.asarray(optax.safe_increment(state.step)),
      samples=_sizes.add_samples(state.samples, seen),
      batch_size=jnp.where(tested, size, state.batch_size).astype(jnp.int32),
      max_batch_size=limit,
      test=memory,
      info=GrowBatchInfo(jnp.where(tested, requested, last)),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def next_size(state: Any) -> jax.Array:
  """The size of the next batch, wherever in a state a rule keeps it.

  Args:
    state: The state of a transformation with a `grow_batch`, or any state that
      holds one, such as a `GrowingState`.

  Returns:
    int32 scalar; the largest where several rules ask.

  Raises:
    ValueError: There is no `grow_batch` in it.

  Examples:
    >>> import jax.numpy as jnp, optax, optlab
    >>> rule = optlab.grow_batch(optlab.norm_test(0.5), 8, 100)
    >>> state = optax.chain(rule, optax.adam(0.1)).init(jnp.zeros(3))
    >>> print(optlab.batches.next_size(state))
    8
  """
  rules = rules_of(state)
  if not rules:
    raise ValueError(
      f'state must hold a GrowBatchState, got {type(state).__name__} without'
      ' one: put grow_batch into the optimizer.'
    )
  return functools.reduce(jnp.maximum, [rule.batch_size for rule in rules])


def rules_of(state: Any) -> list[GrowBatchState]:
  """The states of all rules in a state."""
  is_rule = lambda node: isinstance(node, GrowBatchState)
  return list(filter(is_rule, jax.tree.leaves(state, is_leaf=is_rule)))


def _ask(test, updates, grad, state, extras):
  """What a test requests of this step, NaN for nothing, and its memory."""
  unknown: list[str] = []
  if grad is None and _group.is_part(updates):
    extras, unknown = _group.own_moments(updates, extras)
  elif grad is not None and _group.is_part(state.test):
    raise ValueError(
      'grow_batch sees a part of the parameters, and its test remembers them'
      ' one by one, but is given the gradient of all: leave out grad=..., or'
      ' put it before optax.masked or optax.partition.'
    )
  grads = updates if grad is None else grad
  try:
    requested, memory = test.update(grads, state.test, **extras)
  except ValueError as error:
    if not unknown:
      raise
    raise ValueError(
      f'grow_batch sees a part of the parameters, but {", ".join(unknown)} is'
      ' of all of them. Pass grad=..., the gradient of all, to update, as'
      ' train_step does; or, for the size that this part alone asks for, the'
      ' moments of per_example(losses, vmap_grads) or per_example(...,'
      ' layers=True).'
    ) from error
  finite = _is_finite(grads, extras, test.scaled)
  _statistics.check_size('test must request', requested)
  requested = jnp.asarray(requested, state.info.requested_size.dtype)
  return (
    jnp.where(finite, requested, jnp.nan),
    trees.where(finite, memory, state.test),
  )


def _is_finite(grads, extras, scaled):
  """Moments that overflowed say nothing; only a / 0 may be infinite."""
  wide = jnp.finfo(trees.accumulator_dtype(grads)).dtype
  extras = _statistics.scaled(extras) if scaled else extras
  sq_norms = extras.get('sq_norms')
  if sq_norms is None:
    sq_norms = [trees.sq_norm(grads, wide)]
  finite = jnp.isfinite(sum(jax.tree.leaves(sq_norms), jnp.zeros((), wide)))
  for name in ('sum_sq_diff_norm', 'sum_sq_diff_inner'):
    if extras.get(name) is not None:
      finite &= jnp.isfinite(extras[name])
  return finite
