"""Samplers for `contrastive_divergence`: what moves the chains.

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
from optlab.unnormalized import _likelihood

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
    discrete: Whether it moves on integers, or on numbers that are 0 or 1.
  """

  init: Callable[[jax.Array], Any]
  step: Callable[[LogDensityOfRows, jax.Array, jax.Array, Any], Moved]
  discrete: bool = False


SAMPLER = checks.Pair(
  ('init', 'step'),
  'a Sampler such as optlab.unnormalized.langevin_sampler makes',
)


@checks.domains(
  step_size=checks.POSITIVE,
  num_steps=checks.Integer(),
  target_acceptance=checks.OPEN_FRACTION._replace(optional=True),
)
def langevin_sampler(
  step_size: float | jax.Array,
  num_steps: int = 10,
  *,
  adjust: bool = True,
  target_acceptance: float | jax.Array | None = 0.57,
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

  Returns:
    A `Sampler`.

  Raises:
    TypeError: An argument is not a real number or no integer.
    ValueError: ``step_size`` is not positive, ``num_steps`` below one, or
      ``target_acceptance`` not in (0, 1).

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
      log_density, key, rows, jnp.exp(log_step), num_steps, adjust=adjust
    )
    if target_acceptance is not None:
      change = 0.2 * (run.probability - target_acceptance)
      # Far enough for any scale; without tests no longer than was asked for.
      most = 30 if adjust else jnp.log(step_size)
      log_step = jnp.clip(log_step + change, -30, most).astype(log_step.dtype)
    return Moved(run.rows, log_step, run.acceptance, run.rejected)

  return Sampler(init, step)


@checks.domains(num_sweeps=checks.Integer())
def gibbs_sampler(num_sweeps: int = 1) -> Sampler:
  """Draws every bit in turn given all others: for rows of zeros and ones.

  Args:
    num_sweeps: Passes over the columns in a call.

  Returns:
    A `Sampler` over rows ``[chains, columns]``.

  Raises:
    TypeError: ``num_sweeps`` is not an integer.
    ValueError: ``num_sweeps`` is below one.

  References:
    Geman, Geman, `Stochastic relaxation, Gibbs distributions
    <https://doi.org/10.1109/TPAMI.1984.4767596>`_, PAMI 1984

  Notes:
    Cost: as many evaluations of the model as columns, a sweep.
  """
  checks.enforce(gibbs_sampler, locals())

  def step(log_density, key, rows, state):
    def flip(carry, inputs):
      rows, log_p = carry
      column, key = inputs
      there = rows.at[:, column].set(1 - rows[:, column])
      log_p_there = log_density(there).astype(log_p.dtype)
      uniform = jax.random.uniform(key, log_p.shape, log_p.dtype)
      accept = uniform < jax.nn.sigmoid(log_p_there - log_p)
      carry = trees.where(accept, (there, log_p_there), (rows, log_p))
      bad = jnp.sum(jnp.isnan(log_p_there) | (log_p_there == jnp.inf))
      return carry, (jnp.mean(accept.astype(log_p.dtype)), bad)

    _check_bits(rows)
    log_p = log_density(rows)
    _likelihood.check_rows(log_p, rows.shape[0])
    log_p = log_p.astype(jnp.promote_types(jnp.float32, log_p.dtype))
    columns = jnp.tile(jnp.arange(rows.shape[1]), num_sweeps)
    keys = jax.random.split(key, columns.size)
    (rows, _), (moved, bad) = jax.lax.scan(flip, (rows, log_p), (columns, keys))
    rejected = jnp.sum(bad).astype(jnp.int32)
    return Moved(rows, state, jnp.mean(moved), rejected)

  return Sampler(lambda rows: (), step, discrete=True)


@checks.domains(step_size=checks.POSITIVE, num_steps=checks.Integer())
def discrete_langevin_sampler(
  step_size: float | jax.Array = 0.2, num_steps: int = 10
) -> Sampler:
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
    _check_bits(rows)

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
    return Moved(
      rows, state, jnp.mean(accepted), jnp.sum(bad).astype(jnp.int32)
    )

  return Sampler(lambda rows: (), step, discrete=True)


@checks.domains(
  make=checks.Function('log density of one row -> kernel with init and step'),
  num_steps=checks.Integer(),
)
def kernel_sampler(
  make: Callable[[Callable[[jax.Array], jax.Array]], Any],
  num_steps: int,
  *,
  discrete: bool = False,
) -> Sampler:
  """A kernel of blackjax, or one of its form, on every chain.

  Args:
    make: From the log density of one row to the kernel, for example
      ``lambda log_p: blackjax.hmc(log_p, 0.1, jnp.ones(2), 10)``.
    num_steps: Steps of a call.
    discrete: Whether it moves on bits.

  Returns:
    A `Sampler`.

  Raises:
    TypeError: ``make`` is not a function, or ``num_steps`` no integer.
    ValueError: ``num_steps`` is below one.
  """
  checks.enforce(kernel_sampler, locals())

  def step(log_density, key, rows, state):
    kernel = make(lambda row: log_density(row[None])[0])

    def move(chains, key):
      keys = jax.random.split(key, rows.shape[0])
      chains, info = jax.vmap(kernel.step)(keys, chains)
      accepted = getattr(info, 'acceptance_rate', jnp.ones(rows.shape[0]))
      return chains, jnp.mean(accepted)

    chains, accepted = jax.lax.scan(
      move, jax.vmap(kernel.init)(rows), jax.random.split(key, num_steps)
    )
    bad = ~jnp.isfinite(chains.logdensity)
    moved = trees.where(bad, rows, chains.position)
    return Moved(
      moved, state, jnp.mean(accepted), jnp.sum(bad).astype(jnp.int32)
    )

  return Sampler(lambda rows: (), step, discrete)


def _check_bits(rows):
  if rows.ndim != 2:
    raise ValueError(
      f'chains of bits must have shape [chains, columns], got {rows.shape}.'
    )
