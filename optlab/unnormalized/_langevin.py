"""Langevin chains on a density that is known up to its normalizer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optlab import checks
from optlab import trees
from optlab.unnormalized import _likelihood


class LangevinResult(NamedTuple):
  """Where the chains of `langevin` stand.

  Attributes:
    rows: ``[chains, ...]``.
    acceptance: Scalar, the share of proposals accepted; one without
      ``adjust``.
    rejected: int32, chains that turned non-finite and were set back to where
      they had been a step before, summed over the steps.
  """

  rows: jax.Array
  acceptance: jax.Array
  rejected: jax.Array


@checks.domains(
  log_density=_likelihood.LOG_DENSITY_OF_ROWS,
  step_size=checks.POSITIVE,
  num_steps=checks.Integer(),
)
def langevin(
  log_density: Callable[[jax.Array], jax.Array],
  key: jax.Array,
  rows: jax.Array,
  step_size: float | jax.Array,
  num_steps: int,
  *,
  adjust: bool = True,
) -> LangevinResult:
  r"""Runs Langevin chains on a density known up to its normalizer.

  .. math::
    x' = x + \tfrac{\epsilon}{2} \nabla \log p_0(x) + \sqrt{\epsilon}\, \xi,
    \quad \xi \sim N(0, I)

  With ``adjust`` each proposal passes a Metropolis test (MALA), and the chains
  have the model as their stationary distribution for any step size; without,
  they are biased by it (ULA).

  Args:
    log_density: The model at its parameters, ``rows -> [rows]``.
    key: PRNG key.
    rows: Where the chains start, ``[chains, ...]``.
    step_size: :math:`\epsilon`, positive.
    num_steps: Steps, a Python integer.
    adjust: Whether to correct by Metropolis tests.

  Returns:
    A `LangevinResult`.

  Raises:
    TypeError: ``log_density`` is not a function, ``step_size`` not a real
      number, ``num_steps`` no integer, or ``rows`` are not floating.
    ValueError: ``step_size`` is not positive, or ``num_steps`` below one.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> result = unnormalized.langevin(
    ...     lambda x: -jnp.sum(x ** 2, -1) / 2, jax.random.key(0),
    ...     jnp.full((1000, 1), 5.0), step_size=0.5, num_steps=50)
    >>> print(f'{abs(result.rows.mean()):.0f} {result.rows.std():.1f}')
    0 1.0

  References:
    Roberts, Tweedie, `Exponential convergence of Langevin distributions
    <https://doi.org/10.2307/3318418>`_, Bernoulli 1996

  Notes:
    Cost per step: one gradient of the model with respect to its rows.
  """
  checks.enforce(langevin, locals())
  dtype = getattr(rows, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'rows must be a floating array, got {type(rows).__name__} of dtype'
      f' {dtype}.'
    )
  step_size = jnp.asarray(step_size, rows.dtype)

  def step(chains, key):
    return _step(log_density, chains, key, step_size, adjust)

  log_p, slope = _score(log_density, rows)
  start = _Chains(rows, log_p, jnp.where(jnp.isfinite(slope), slope, 0))
  chains, (acceptance, rejected) = jax.lax.scan(
    step, start, jax.random.split(key, num_steps)
  )
  return LangevinResult(
    chains.rows, jnp.mean(acceptance), jnp.sum(rejected).astype(jnp.int32)
  )


class _Chains(NamedTuple):
  rows: jax.Array  # shape [chains, ...]
  log_p: jax.Array  # shape [chains], float32 or wider
  slope: jax.Array  # the gradient of log_p with respect to rows


def _score(log_density, rows):
  """Log density of the rows, and its gradient with respect to them."""

  def total(rows):
    log_p = log_density(rows)
    _likelihood.check_rows(log_p, rows.shape[0])
    return jnp.sum(log_p), log_p

  slope, log_p = jax.grad(total, has_aux=True)(rows)
  return log_p.astype(trees.accumulator_dtype(rows)), slope.astype(rows.dtype)


def _log_proposal(to, start, slope, step_size):
  """Log density of a proposal, up to what is the same in both directions."""
  wide = trees.accumulator_dtype(start)
  gap = (to - start - 0.5 * step_size * slope).astype(wide)
  axes = tuple(range(1, start.ndim))
  return -jnp.sum(gap**2, axes) / (2 * step_size.astype(wide))


def _step(log_density, chains, key, step_size, adjust):
  """A step of all chains, its acceptance, and how many turned non-finite."""
  here, log_p, slope = chains
  move_key, test_key = jax.random.split(key)
  kick = jax.random.normal(move_key, here.shape, here.dtype)
  there = here + 0.5 * step_size * slope + jnp.sqrt(step_size) * kick
  moved = _Chains(there, *_score(log_density, there))
  finite = jnp.isfinite(moved.log_p) & jnp.all(
    jnp.isfinite(moved.slope), tuple(range(1, here.ndim))
  )
  accept = finite
  if adjust:
    log_ratio = (
      moved.log_p
      - log_p
      + _log_proposal(here, there, moved.slope, step_size)
      - _log_proposal(there, here, slope, step_size)
    )
    uniform = jax.random.uniform(test_key, log_p.shape, log_p.dtype)
    # A chain that starts outside the support takes the first way in.
    lost = ~jnp.isfinite(log_p)
    accept = finite & ((jnp.log(uniform) < log_ratio) | lost)
  acceptance = jnp.mean(accept.astype(log_p.dtype))
  rejected = jnp.sum(~finite).astype(jnp.int32)
  return trees.where(accept, moved, chains), (acceptance, rejected)
