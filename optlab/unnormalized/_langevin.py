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
  max_drift=checks.POSITIVE,
)
def langevin(
  log_density: Callable[[jax.Array], jax.Array],
  key: jax.Array,
  rows: jax.Array,
  step_size: float | jax.Array,
  num_steps: int,
  *,
  adjust: bool = True,
  max_drift: float | jax.Array = 3.0,
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
    step_size: :math:`\epsilon`, positive; or an array of them that broadcasts
      to ``rows``, one a column, say.
    num_steps: Steps, a Python integer.
    adjust: Whether to correct by Metropolis tests.
    max_drift: The gradient is clipped so that a step's drift is at most this
      many kicks long.

  Returns:
    A `LangevinResult`.

  Raises:
    TypeError: ``log_density`` is not a function, ``step_size`` not a real
      number, ``num_steps`` no integer, ``key`` no PRNG key, or ``rows`` are
      not floating.
    ValueError: ``step_size`` or ``max_drift`` is not positive, ``step_size``
      does not fit ``rows``, or ``num_steps`` is below one.

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
    The clip counts in the tests too, which stay exact: an unstable chain walks
    where it would explode. Cost per step: one gradient of
    the model with respect to its rows.
  """
  checks.enforce(langevin, locals())
  run = chains(
    log_density,
    checks.as_key('key', key),
    rows,
    step_size,
    num_steps,
    adjust=adjust,
    max_drift=max_drift,
  )
  return LangevinResult(run.rows, run.acceptance, run.rejected)


class Run(NamedTuple):
  """What chains did."""

  rows: jax.Array  # shape [chains, ...]
  acceptance: jax.Array  # shape (), the share of proposals accepted
  probability: jax.Array  # shape (), with which a test would accept, on average
  rejected: jax.Array  # shape (), int32, proposals that were not finite


def chains(
  log_density: Callable[[jax.Array], jax.Array],
  key: jax.Array,
  rows: jax.Array,
  step_size: float | jax.Array,
  num_steps: int,
  *,
  adjust: bool,
  max_drift: float | jax.Array = 3.0,
) -> Run:
  """Runs chains, see `langevin`."""
  check_floating(rows)
  step_size = jnp.asarray(step_size, rows.dtype)
  try:
    fits = jnp.broadcast_shapes(step_size.shape, rows.shape) == rows.shape
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(
      'step_size must be a number, or an array that broadcasts to rows,'
      f' {rows.shape}, got shape {step_size.shape}.'
    )

  def step(carry, key):
    return _step(log_density, carry, key, (step_size, max_drift), adjust)

  log_p, slope = score(log_density, rows)
  start = _Chains(rows, log_p, jnp.where(jnp.isfinite(slope), slope, 0))
  last, (acceptance, probability, rejected) = jax.lax.scan(
    step, start, jax.random.split(key, num_steps)
  )
  return Run(
    last.rows,
    jnp.mean(acceptance),
    jnp.mean(probability),
    jnp.sum(rejected).astype(jnp.int32),
  )


class _Chains(NamedTuple):
  rows: jax.Array  # shape [chains, ...]
  log_p: jax.Array  # shape [chains], float32 or wider
  slope: jax.Array  # the gradient of log_p with respect to rows


def check_floating(rows):
  """Raises a ``TypeError`` unless rows are an array with a derivative."""
  dtype = getattr(rows, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'rows must be a floating array, got {type(rows).__name__} of dtype'
      f' {dtype}: convert them, or move them by gibbs_sampler.'
    )


def score(log_density, rows):
  """Log density of the rows, and its gradient with respect to them."""
  check_floating(rows)

  def total(rows):
    log_p = log_density(rows)
    _likelihood.check_rows(log_p, rows.shape[0])
    return jnp.sum(log_p), log_p

  slope, log_p = jax.grad(total, has_aux=True)(rows)
  return log_p.astype(trees.accumulator_dtype(rows)), slope.astype(rows.dtype)


def _drift(slope, length_of):
  """Half a step along the slope, and never longer than so many kicks."""
  step_size, max_drift = length_of
  axes = tuple(range(1, slope.ndim))
  drift = 0.5 * step_size * slope
  top = jnp.max(jnp.abs(drift), axes, keepdims=True, initial=0)
  unit = drift / jnp.where(top > 0, top, 1)  # Squares do not overflow.
  length = top * jnp.sqrt(jnp.sum(unit**2, axes, keepdims=True))
  kick = jnp.sqrt(
    jnp.sum(jnp.broadcast_to(step_size, slope.shape), axes, keepdims=True)
  )
  most = jnp.asarray(max_drift, slope.dtype) * kick
  return jnp.where(length <= most, drift, unit * (most * top / length))


def _log_proposal(to, start, slope, length_of):
  """Log density of a proposal, up to what is the same in both directions."""
  wide = trees.accumulator_dtype(start)
  gap = (to - start - _drift(slope, length_of)).astype(wide)
  axes = tuple(range(1, start.ndim))
  return -jnp.sum(gap**2 / (2 * length_of[0].astype(wide)), axes)


def _step(log_density, chains, key, length_of, adjust):
  """A step of all chains, its acceptance, and how many turned non-finite."""
  here, log_p, slope = chains
  move_key, test_key = jax.random.split(key)
  kick = jax.random.normal(move_key, here.shape, here.dtype)
  there = here + _drift(slope, length_of) + jnp.sqrt(length_of[0]) * kick
  moved = _Chains(there, *score(log_density, there))
  finite = jnp.isfinite(moved.log_p) & jnp.all(
    jnp.isfinite(moved.slope), tuple(range(1, here.ndim))
  )
  log_ratio = (
    moved.log_p
    - log_p
    + _log_proposal(here, there, moved.slope, length_of)
    - _log_proposal(there, here, slope, length_of)
  )
  # A chain that starts outside the support takes the first way in.
  log_ratio = jnp.where(jnp.isfinite(log_p), log_ratio, 0)
  probability = jnp.where(finite, jnp.exp(jnp.minimum(log_ratio, 0)), 0)
  accept = finite
  if adjust:
    uniform = jax.random.uniform(test_key, log_p.shape, log_p.dtype)
    accept = finite & (uniform < probability)
  return trees.where(accept, moved, chains), (
    jnp.mean(accept.astype(log_p.dtype)),
    jnp.mean(probability),
    jnp.sum(~finite).astype(jnp.int32),
  )
