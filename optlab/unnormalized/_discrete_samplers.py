"""Samplers on bits, spins and categories."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optlab import checks
from optlab import trees
from optlab.unnormalized import _langevin
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _samplers

BITS = (0.0, 1.0)


@checks.domains(num_sweeps=checks.Integer())
def gibbs_sampler(
  num_sweeps: int = 1, values: Sequence[float] = BITS
) -> _samplers.Sampler:
  """Draws every column in turn given all others: for bits, spins, categories.

  Args:
    num_sweeps: Passes over the columns in a call.
    values: What a column may be: ``(-1, 1)`` for spins, ``range(k)`` for the
      numbers of k categories.

  Returns:
    A `Sampler` over rows ``[chains, columns]``, floating or not.

  Raises:
    TypeError: ``num_sweeps`` is not an integer, or ``values`` are no numbers.
    ValueError: ``num_sweeps`` is below one, or there are not two different
      values and more.

  References:
    Geman, Geman, `Stochastic relaxation, Gibbs distributions
    <https://doi.org/10.1109/TPAMI.1984.4767596>`_, PAMI 1984

  Notes:
    Cost: as many evaluations of the model as columns, a sweep; of k values
    each as many as ``k - 1`` columns.
  """
  checks.enforce(gibbs_sampler, locals())
  values = _values(values)

  def step(log_density, key, rows, state):
    def draw(carry, inputs):
      rows, log_p = carry
      column, key = inputs
      others = [
        rows.at[:, column].set(_after(rows[:, column], values, shift))
        for shift in range(1, len(values))
      ]
      log_p_others = [
        log_density(there).astype(log_p.dtype) for there in others
      ]
      if len(others) == 1:
        uniform = jax.random.uniform(key, log_p.shape, log_p.dtype)
        accept = uniform < jax.nn.sigmoid(log_p_others[0] - log_p)
        choice = accept.astype(jnp.int32)
      else:
        # No weight where the model has none to compare.
        logits = jnp.stack([log_p, *log_p_others])
        logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
        choice = jax.random.categorical(key, logits, 0)
      for i, there in enumerate(zip(others, log_p_others, strict=True), 1):
        carry = trees.where(choice == i, there, carry)
      bad = sum(
        jnp.sum(jnp.isnan(there) | (there == jnp.inf)) for there in log_p_others
      )
      return carry, (jnp.mean((choice > 0).astype(log_p.dtype)), bad)

    _check_columns(rows)
    log_p = log_density(rows)
    _likelihood.check_rows(log_p, rows.shape[0])
    log_p = log_p.astype(jnp.promote_types(jnp.float32, log_p.dtype))
    columns = jnp.tile(jnp.arange(rows.shape[1]), num_sweeps)
    keys = jax.random.split(key, columns.size)
    (rows, _), (moved, bad) = jax.lax.scan(draw, (rows, log_p), (columns, keys))
    rejected = jnp.sum(bad).astype(jnp.int32)
    return _samplers.Moved(rows, state, jnp.mean(moved), rejected)

  return _samplers.Sampler(lambda rows: (), step, True, values)


def _values(values):
  """The values, at least two and different, as numbers."""
  try:
    found = tuple(float(value) for value in values)
  except (TypeError, ValueError):
    raise TypeError(
      f'values must be the numbers that a column may be, got {values!r}.'
    ) from None
  if len(set(found)) != len(found) or len(found) < 2:
    raise ValueError(
      f'values must be two different numbers or more, got {values!r}.'
    )
  return found


def _after(column, values, shift):
  """The value so many places after that of each entry, in a round."""
  moved = column
  for i, value in enumerate(values):
    here, there = (
      jnp.asarray(number).astype(column.dtype)
      for number in (value, values[(i + shift) % len(values)])
    )
    moved = jnp.where(column == here, there, moved)
  return moved


@checks.domains(step_size=checks.POSITIVE, num_steps=checks.Integer())
def discrete_langevin_sampler(
  step_size: float | jax.Array = 0.2, num_steps: int = 10
) -> _samplers.Sampler:
  r"""Langevin steps on bits: all are proposed at once, by the gradient.

  .. math:: P(\text{flip } i) = \sigma\bigl(\tfrac12 (1 - 2 x_i)\,
    \partial_i \log p_0(x) - \tfrac{1}{2 \epsilon}\bigr)

  with a Metropolis test. Choose it over `gibbs_sampler` where columns are many.

  Args:
    step_size: :math:`\epsilon`; larger flips more.
    num_steps: Steps of a call.

  Returns:
    A `Sampler` over floating rows of zeros and ones.

  Raises:
    TypeError: An argument is not a real number or no integer.
    ValueError: ``step_size`` is not positive, or ``num_steps`` below one.

  References:
    Zhang, Liu, Liu, `A Langevin-like Sampler for Discrete Distributions
    <https://arxiv.org/abs/2206.09914>`_, ICML 2022
  """
  checks.enforce(discrete_langevin_sampler, locals())

  def step(log_density, key, rows, state):
    _check_columns(rows)

    def score(rows):
      log_p, slope = _langevin.score(log_density, rows)
      return log_p, 0.5 * (1 - 2 * rows) * slope

    def log_flip(logit, flipped):
      logit = logit - 0.5 / jnp.asarray(step_size, logit.dtype)
      terms = jax.nn.log_sigmoid(jnp.where(flipped, logit, -logit))
      return jnp.sum(terms, -1).astype(jnp.float32)

    def move(carry, key):
      rows, log_p, logit = carry
      flip_key, test_key = jax.random.split(key)
      chance = jax.nn.sigmoid(logit - 0.5 / step_size)
      flipped = jax.random.uniform(flip_key, rows.shape) < chance
      there = jnp.where(flipped, 1 - rows, rows)
      log_p_there, back = score(there)
      log_ratio = log_p_there - log_p
      log_ratio += log_flip(back, flipped) - log_flip(logit, flipped)
      accept = jnp.log(jax.random.uniform(test_key, log_p.shape)) < log_ratio
      carry = trees.where(accept, (there, log_p_there, back), carry)
      bad = jnp.sum(jnp.isnan(log_ratio))
      return carry, (jnp.mean(accept.astype(jnp.float32)), bad)

    start = (rows, *score(rows))
    (rows, _, _), (accepted, bad) = jax.lax.scan(
      move, start, jax.random.split(key, num_steps)
    )
    return _samplers.Moved(
      rows, state, jnp.mean(accepted), jnp.sum(bad).astype(jnp.int32)
    )

  return _samplers.Sampler(lambda rows: (), step, True, BITS)


def _check_columns(rows):
  if rows.ndim != 2:
    raise ValueError(
      f'chains of bits must have shape [chains, columns], got {rows.shape}.'
    )
