"""AdaGrad with a batch that grows."""

from collections.abc import Callable

import jax
import optax

from optlab import base
from optlab import checks
from optlab.batches._growth import SIZE
from optlab.batches._growth import TEST
from optlab.batches._growth import grow_batch
from optlab.batches._statistics import Test


@checks.domains(
  learning_rate=checks.LEARNING_RATE,
  test=TEST,
  batch_size=SIZE,
  max_batch_size=SIZE,
  initial_accumulator_value=checks.NON_NEGATIVE,
  eps=checks.NON_NEGATIVE,
)
def adadagrad(
  learning_rate: base.ScalarOrSchedule,
  test: Test | Callable[..., jax.Array],
  batch_size: int | jax.Array,
  max_batch_size: int | jax.Array,
  *,
  initial_accumulator_value: float | jax.Array = 0.1,
  eps: float | jax.Array = 1e-7,
  test_interval: int | jax.Array = 1,
  growth_cap: float | jax.Array | None = None,
  multiple_of: int | jax.Array = 1,
) -> optax.GradientTransformationExtraArgs:
  """AdaGrad with a batch that grows: ``chain(grow_batch, optax.adagrad)``.

  Args:
    learning_rate: Number, scalar array or optax schedule.
    test: What requests a size, for example ``norm_test(0.5)``.
    batch_size: The first size, at least 2.
    max_batch_size: The largest size.
    initial_accumulator_value: See `optax.adagrad`.
    eps: See `optax.adagrad`.
    test_interval: See `grow_batch`.
    growth_cap: See `grow_batch`.
    multiple_of: See `grow_batch`.

  Returns:
    An optax transformation; `next_size` reads the next size from its state.

  Raises:
    TypeError: As `grow_batch`.
    ValueError: As `grow_batch`.

  References:
    Lau, Liu, Kolar, *AdAdaGrad*, 2024, https://arxiv.org/abs/2402.11215
  """
  checks.enforce(adadagrad, locals())
  return optax.chain(
    grow_batch(
      test,
      batch_size,
      max_batch_size,
      test_interval=test_interval,
      growth_cap=growth_cap,
      multiple_of=multiple_of,
    ),
    optax.adagrad(learning_rate, initial_accumulator_value, eps),
  )
