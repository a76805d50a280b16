r"""Learning rates that follow the batch, and the samples seen.

Meterez, Morwani, Kwun et al., *Seesaw: Accelerating Training by Balancing
Learning Rate and Batch Size Scheduling*, 2025,
https://arxiv.org/abs/2510.14717.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab.batches._sizes import add_samples


class BatchRateState(NamedTuple):
  """State of a `batch_learning_rate`."""

  # Shape (2,), int32: examples seen, in units of 2^30, and the rest of them.
  samples: jax.Array


class BatchRate(NamedTuple):
  """A stateful schedule of optax, for `optax.inject_hyperparams`.

  Attributes:
    init: ``() -> state``.
    update: ``(state, **extras) -> state``, of the steps before the next.
    rate: ``(state, **extras) -> rate`` of this step; calling it is the same.
  """

  init: Callable[[], BatchRateState]
  update: Callable[..., BatchRateState]
  rate: Callable[..., Any]

  def __call__(self, state: BatchRateState, **extra_args: Any) -> Any:
    """The rate of this step."""
    return self.rate(state, **extra_args)


@checks.domains(
  learning_rate=checks.LEARNING_RATE,
  batch_size=checks.Integer(traced=True, optional=True),
  power=checks.Real(low_open=True, high_open=True),
  unit=checks.POSITIVE,
)
def batch_learning_rate(
  learning_rate: base.ScalarOrSchedule,
  batch_size: int | jax.Array | None = None,
  *,
  power: float | jax.Array = 0.5,
  unit: float | jax.Array = 1.0,
) -> BatchRate:
  r"""A learning rate from the size of the batch and the samples seen.

  .. math:: \alpha = s(n) \, (b / b_0)^p

  after n samples, at a batch of b. Where the batch grows, the number of steps
  is not known beforehand: schedules are of samples. With the root (p = 1/2)
  Adam and its kin, with p = 1 SGD keep the noise of their steps, until the
  batch is large.

  Args:
    learning_rate: A number, or ``samples -> rate``, any optax schedule.
    batch_size: The size :math:`b_0` that ``learning_rate`` belongs to; ``None``
      leaves the batch out, a schedule by samples alone.
    power: The exponent p.
    unit: What an example counts in the schedule, for example its tokens.

  Returns:
    A stateful schedule, for every optimizer by `optax.inject_hyperparams`; as
    the last link of a chain in place of `optax.scale_by_schedule` by
    ``optax.inject_hyperparams(optax.scale_by_learning_rate)(...)``.

  Raises:
    TypeError: An argument is not a number; ``learning_rate`` neither that nor a
      schedule; in the step, it is a plain schedule of an optimizer.
    ValueError: ``learning_rate`` is negative, ``batch_size`` below 1, ``power``
      or ``unit`` not finite, or ``unit`` not above 0; in the step, no
      ``sample_size`` among the extra arguments.

  Examples:
    Seesaw: where a schedule halves the rate, it doubles the batch and divides
    the rate by the root of 2; past the largest batch it halves the rate.

    >>> import jax.numpy as jnp, optax, optlab
    >>> halved = optax.exponential_decay(0.1, 1000, 0.5, staircase=True)
    >>> sizes = optlab.batches.size_schedule(lambda n: 8 * 0.1 / halved(n))
    >>> rate = optlab.batches.batch_learning_rate(halved, 8)
    >>> tx = optax.chain(
    ...     optlab.grow_batch(sizes, 8, 16),
    ...     optax.inject_hyperparams(optax.adam)(rate))
    >>> x = jnp.zeros(2)
    >>> state, samples = tx.init(x), 0
    >>> while samples < 3000:
    ...   size = optlab.batches.next_size(state)
    ...   _, state = tx.update(jnp.ones(2), state, x, sample_size=size)
    ...   if samples % 1000 < size:
    ...     print(size, state[1].hyperparams['learning_rate'])
    ...   samples += int(size)
    8 0.1
    16 0.07071068
    16 0.03535534

  References:
    Meterez, Morwani, Kwun et al., *Seesaw*, 2025,
    https://arxiv.org/abs/2510.14717; Malladi, Lyu, Panigrahi, Arora, *On the
    SDEs and Scaling Rules for Adaptive Gradient Algorithms*, 2022,
    https://arxiv.org/abs/2205.10287.

  Notes:
    In `optax.MultiSteps` of k steps it sees the last of the batches that make a
    step, and counts its examples alone: ``unit=k`` counts them all.
  """
  checks.enforce(batch_learning_rate, locals())

  def init():
    return BatchRateState(jnp.zeros(2, jnp.int32))

  def update(state, *, sample_size=None, **extra_args):
    del extra_args
    checks.require_extra(
      'batch_learning_rate', 'per_example(losses, ...)', sample_size=sample_size
    )
    return BatchRateState(add_samples(state.samples, sample_size))

  def rate(state, *, sample_size=None, **extra_args):
    del extra_args
    if not isinstance(state, BatchRateState):
      raise TypeError(
        'batch_learning_rate must be given to an optimizer by'
        ' optax.inject_hyperparams, which keeps its state and tells it the size'
        f' of the batch, got the step of a plain schedule, {state!r}.'
      )
    # Weak types: the optimizer's parameters give the dtype.
    value = learning_rate
    if callable(value):
      samples = state.samples[0] * 2.0**30 + state.samples[1]
      value = value(samples * unit)
    if batch_size is None or sample_size is None:  # None before the first step.
      return value
    size = jnp.asarray(sample_size, jnp.int32) * 1.0
    return value * (size / (batch_size * 1.0)) ** power

  return BatchRate(init, update, rate)
