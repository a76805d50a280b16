"""Kernels of blackjax as samplers."""

from collections.abc import Callable
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.unnormalized import _langevin
from optlab.unnormalized import _samplers


def blackjax(user: str, *modules: str) -> tuple[Any, ...]:
  """Modules of blackjax, or an error that names it and who needs it."""
  try:
    return tuple(importlib.import_module(name) for name in modules)
  except ImportError as error:
    raise ImportError(
      f'{user} samples by blackjax, which is not installed: pip install'
      " blackjax, or optlab with its extra 'scores'."
    ) from error


@checks.domains(
  make=checks.Function('log density of one row -> kernel with init and step'),
  num_steps=checks.Integer(),
  step_size=checks.POSITIVE._replace(optional=True),
  target_acceptance=checks.OPEN_FRACTION,
)
def kernel_sampler(
  make: Callable[..., Any],
  num_steps: int,
  *,
  step_size: float | jax.Array | None = None,
  target_acceptance: float | jax.Array = 0.65,
  discrete: bool = False,
) -> _samplers.Sampler:
  """A kernel of blackjax, or one of its form, on every chain.

  Args:
    make: From the log density of one row to the kernel, for example
      ``lambda log_p: blackjax.hmc(log_p, 0.1, jnp.ones(2), 10)``; with
      ``step_size`` from that and the step size of now,
      ``lambda log_p, step_size: blackjax.mala(log_p, step_size)``.
    num_steps: Steps of a call.
    step_size: At the start; its logarithm then moves by a fifth of what the
      acceptance is above its target, after every step. ``None``: the kernel has
      its own.
    target_acceptance: For ``step_size``: .57 for MALA, .65 to .8 for HMC.
    discrete: Whether it moves on bits.

  Returns:
    A `Sampler`.

  Raises:
    TypeError: ``make`` is not a function, ``num_steps`` no integer, or another
      argument not a real number.
    ValueError: ``num_steps`` is below one, ``step_size`` not positive, or
      ``target_acceptance`` not in (0, 1).

  Examples:
    >>> import blackjax, jax, jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> sampler = unnormalized.kernel_sampler(
    ...     blackjax.mala, 100, step_size=10.0, target_acceptance=0.57)
    >>> rows = jnp.full((1000, 1), 3.0)
    >>> moved = sampler.step(lambda x: -x[:, 0]**2 / 2, jax.random.key(0),
    ...     rows, sampler.init(rows))
    >>> print(f'{moved.rows.std():.1f}, steps of {jnp.exp(moved.state):.0f}')
    1.0, steps of 2
  """
  checks.enforce(kernel_sampler, locals())
  adapted = step_size is not None

  def init(rows):
    if not adapted:
      return ()
    dtype = trees.accumulator_dtype(rows)
    return jnp.zeros((), dtype) + jnp.log(jnp.asarray(step_size, dtype))

  def step(log_density, key, rows, state):
    if not discrete:
      _langevin.check_floating(rows)
    log_p = lambda row: log_density(row[None])[0]
    kernel_at = lambda log_step: (
      make(log_p, jnp.exp(log_step)) if adapted else make(log_p)
    )

    def move(carry, key):
      chains, log_step = carry
      kernel = kernel_at(log_step)
      keys = jax.random.split(key, rows.shape[0])
      chains, info = jax.vmap(kernel.step)(keys, chains)
      accepted = getattr(info, 'acceptance_rate', jnp.ones(rows.shape[0]))
      mean = jnp.mean(jnp.where(jnp.isnan(accepted), 0, accepted))
      if adapted:
        log_step = log_step + 0.2 * (mean - target_acceptance)
        log_step = jnp.clip(log_step, -30, 30).astype(state.dtype)
      return (chains, log_step), mean

    (chains, state), accepted = jax.lax.scan(
      move,
      (jax.vmap(kernel_at(state).init)(rows), state),
      jax.random.split(key, num_steps),
    )
    bad = ~jnp.isfinite(chains.logdensity)
    moved = trees.where(bad, rows, chains.position)
    return _samplers.Moved(
      moved, state, jnp.mean(accepted), jnp.sum(bad).astype(jnp.int32)
    )

  return _samplers.Sampler(init, step, discrete)


@checks.domains(
  step_size=checks.POSITIVE,
  num_steps=checks.Integer(),
  num_leaps=checks.Integer(),
  scale=checks.POSITIVE,
  target_acceptance=checks.OPEN_FRACTION,
)
def hmc_sampler(
  step_size: float | jax.Array = 0.1,
  num_steps: int = 1,
  num_leaps: int = 10,
  *,
  scale: base.ArrayLike = 1.0,
  target_acceptance: float | jax.Array = 0.65,
) -> _samplers.Sampler:
  """Hamiltonian Monte Carlo of blackjax, whose step size follows the model.

  Choose it over `langevin_sampler` where chains have far to go: in many columns
  that are of one scale, or that ``scale`` brings to one.

  Args:
    step_size: Of a leap at the start, in units of ``scale``.
    num_steps: Steps of a call, each of ``num_leaps`` leaps.
    num_leaps: Leaps of a step, as many gradients.
    scale: The spread of a row, a number or an array of a row's shape.
    target_acceptance: What the step size is adapted to.

  Returns:
    A `Sampler` over floating rows.

  Raises:
    ImportError: Where it moves, if blackjax is not installed.
    TypeError: An argument is not a real number or no integer.
    ValueError: A number is not positive, a count below one, or
      ``target_acceptance`` not in (0, 1).

  References:
    Neal, `MCMC using Hamiltonian dynamics <https://arxiv.org/abs/1206.1901>`_,
    2011; `blackjax <https://github.com/blackjax-devs/blackjax>`_
  """
  checks.enforce(hmc_sampler, locals())

  def made(rows):
    _langevin.check_floating(rows)
    spread = jnp.broadcast_to(jnp.asarray(scale, rows.dtype), rows.shape[1:])
    metric = spread.reshape(-1) ** 2

    def make(log_p, step_size):
      (library,) = blackjax('hmc_sampler', 'blackjax')
      return library.hmc(log_p, step_size, metric, num_leaps)

    return kernel_sampler(
      make,
      num_steps,
      step_size=step_size,
      target_acceptance=target_acceptance,
    )

  return _samplers.Sampler(
    lambda rows: made(rows).init(rows),
    lambda log_density, key, rows, state: made(rows).step(
      log_density, key, rows, state
    ),
  )
