"""Samplers: what moves the chains of training and the particles of scores.

A sampler is a pair of functions, as those of blackjax are, with a memory of its
own beside the rows: the step size that it adapts, say.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.unnormalized import _langevin

LogDensityOfRows = Callable[[base.ArrayTree], jax.Array]


class Moved(NamedTuple):
  """What a sampler did.

  Attributes:
    rows: Where the chains stand, ``[chains, ...]``.
    state: The sampler's memory.
    acceptance: Scalar, the share of proposals accepted; one where none are
      tested.
    rejected: int32, proposals that were not finite.
  """

  rows: jax.Array
  state: Any
  acceptance: jax.Array
  rejected: jax.Array


class Sampler(NamedTuple):
  """A pair of pure functions that moves chains.

  Attributes:
    init: ``rows -> state``.
    step: ``(log_density, key, rows, state) -> Moved``, with ``log_density``
      the model at its parameters, ``rows -> [rows]``.
    discrete: Whether it moves on integers, or on numbers that are 0 or 1;
      ``None`` where that is not known.
    values: The values that a column may take, if it moves on these alone.
  """

  init: Callable[[jax.Array], Any]
  step: Callable[[LogDensityOfRows, jax.Array, jax.Array, Any], Moved]
  discrete: bool | None = False
  values: tuple[float, ...] | None = None


def as_sampler(name: str, sampler: Any) -> Sampler:
  """The sampler, or a function ``(log_density, key, rows) -> rows`` as one.

  Args:
    name: The argument's name, for the message.
    sampler: A `Sampler` or a function.

  Returns:
    A `Sampler`; a function moves floating rows, and tests nothing that is
    known of.

  Raises:
    TypeError: It is neither; a kernel of blackjax, say.
  """
  if isinstance(sampler, Sampler):
    return sampler
  if hasattr(sampler, 'step') or not callable(sampler):
    raise TypeError(
      f'{name} must be a Sampler such as optlab.unnormalized.langevin_sampler'
      ' makes, or a function (log_density, key, rows) -> rows, got'
      f' {type(sampler).__name__}: make one of a kernel of blackjax by'
      ' optlab.unnormalized.kernel_sampler.'
    )

  def step(log_density, key, rows, state):
    moved = sampler(log_density, key, rows)
    checks.check_same_tree(f'what {name} returns', moved, 'rows', rows)
    if not jnp.issubdtype(moved.dtype, jnp.floating):
      raise TypeError(
        f'what {name} returns must be floating rows, got dtype {moved.dtype}:'
        ' return them in the dtype of rows.'
      )
    moved = moved.astype(rows.dtype)
    bad = ~jnp.isfinite(moved).reshape(rows.shape[0], -1).all(1)
    return Moved(
      trees.where(bad, rows, moved),
      state,
      jnp.ones((), trees.accumulator_dtype(rows)),
      jnp.sum(bad).astype(jnp.int32),
    )

  return Sampler(lambda rows: (), step, None)


@checks.domains(
  step_size=checks.POSITIVE,
  num_steps=checks.Integer(),
  target_acceptance=checks.OPEN_FRACTION._replace(optional=True),
  max_drift=checks.POSITIVE,
)
def langevin_sampler(
  step_size: float | jax.Array,
  num_steps: int = 10,
  *,
  adjust: bool = True,
  target_acceptance: float | jax.Array | None = 0.57,
  max_drift: float | jax.Array = 3.0,
) -> Sampler:
  r"""`langevin` chains whose step size follows the model.

  .. math:: \log \epsilon \leftarrow \log \epsilon + 0.2\, (a - a^*)

  after every call, with the mean probability :math:`a` that a Metropolis test
  accepts.

  Args:
    step_size: At the start, a scalar.
    num_steps: Steps of a call.
    adjust: Whether to use the tests; without them the chains are biased, and
      the target should be near one, and steps only get shorter.
    target_acceptance: :math:`a^*`; ``None`` keeps the step size.
    max_drift: As in `langevin`.

  Returns:
    A `Sampler`.

  Raises:
    TypeError: An argument is not a real number or no integer.
    ValueError: ``step_size`` or ``max_drift`` is not positive, ``num_steps``
      below one, or ``target_acceptance`` not in (0, 1).

  References:
    Roberts, Rosenthal, `Optimal scaling of discrete approximations to Langevin
    diffusions <https://doi.org/10.1111/1467-9868.00123>`_, JRSS B 1998
  """
  checks.enforce(langevin_sampler, locals())

  def init(rows):
    dtype = trees.accumulator_dtype(rows)
    return jnp.zeros((), dtype) + jnp.log(jnp.asarray(step_size, dtype))

  def step(log_density, key, rows, log_step):
    run = _langevin.chains(
      log_density,
      key,
      rows,
      jnp.exp(log_step),
      num_steps,
      adjust=adjust,
      max_drift=max_drift,
    )
    if target_acceptance is not None:
      change = 0.2 * (run.probability - target_acceptance)
      # Far enough for any scale; without tests no longer than was asked for.
      most = 30 if adjust else jnp.log(step_size)
      log_step = jnp.clip(log_step + change, -30, most).astype(log_step.dtype)
    return Moved(run.rows, log_step, run.acceptance, run.rejected)

  return Sampler(init, step)
