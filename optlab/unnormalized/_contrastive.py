"""Langevin sampling of a model, and contrastive divergence built on it.

The baseline of `meco` that needs no noise distribution, and the sampler that
shows what a trained model looks like.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
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
    TypeError: ``log_density`` is not a function.
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
  checks.check_callable('log_density', log_density, 'rows -> [rows]')
  checks.check_positive('step_size', step_size)
  checks.check_int('num_steps', num_steps, 1)
  dtype = getattr(rows, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'rows must be a floating array, got {type(rows).__name__} of dtype'
      f' {dtype}.'
    )
  step_size = jnp.asarray(step_size, rows.dtype)
  wide = trees.accumulator_dtype(rows)

  def score(rows):
    def total(rows):
      log_p = log_density(rows)
      _likelihood.check_rows(log_p, rows.shape[0])
      return jnp.sum(log_p), log_p

    slope, log_p = jax.grad(total, has_aux=True)(rows)
    return log_p.astype(wide), slope.astype(rows.dtype)

  def per_row(mask):
    return mask.reshape(mask.shape + (1,) * (rows.ndim - 1))

  def log_proposal(to, start, slope):
    gap = (to - start - 0.5 * step_size * slope).astype(wide)
    axes = tuple(range(1, rows.ndim))
    return -jnp.sum(gap**2, axes) / (2 * step_size.astype(wide))

  def step(carry, key):
    here, log_p, slope = carry
    move_key, test_key = jax.random.split(key)
    kick = jax.random.normal(move_key, here.shape, here.dtype)
    there = here + 0.5 * step_size * slope + jnp.sqrt(step_size) * kick
    log_p_there, slope_there = score(there)
    log_ratio = jnp.zeros_like(log_p)
    if adjust:
      log_ratio = (
        log_p_there
        - log_p
        + log_proposal(here, there, slope_there)
        - log_proposal(there, here, slope)
      )
    finite = jnp.isfinite(log_p_there) & jnp.all(
      jnp.isfinite(slope_there), tuple(range(1, rows.ndim))
    )
    uniform = jax.random.uniform(test_key, log_p.shape, wide)
    # A chain that starts outside the support takes the first way in.
    lost = ~jnp.isfinite(log_p)
    accept = finite & ((jnp.log(uniform) < log_ratio) | lost)
    if not adjust:
      accept = finite
    carry = (
      jnp.where(per_row(accept), there, here),
      jnp.where(accept, log_p_there, log_p),
      jnp.where(per_row(accept), slope_there, slope),
    )
    count = jnp.sum(~finite).astype(jnp.int32)
    return carry, (jnp.mean(accept.astype(wide)), count)

  log_p, slope = score(rows)
  slope = jnp.where(jnp.isfinite(slope), slope, 0)
  (rows, _, _), (acceptance, rejected) = jax.lax.scan(
    step, (rows, log_p, slope), jax.random.split(key, num_steps)
  )
  return LangevinResult(
    rows, jnp.mean(acceptance), jnp.sum(rejected).astype(jnp.int32)
  )


class ContrastiveDivergenceState(NamedTuple):
  """State of `contrastive_divergence`."""

  key: jax.Array  # PRNG key
  chains: jax.Array  # shape [chains, ...], where the persistent chains stand
  acceptance: jax.Array  # shape (), share of proposals accepted last step
  rejected: jax.Array  # shape (), int32, rows dropped at the last step


def contrastive_divergence(
  log_density: _likelihood.LogDensity,
  step_size: float | jax.Array,
  num_steps: int,
  *,
  persistent: bool = True,
  restart: float | jax.Array = 0.05,
  adjust: bool = False,
) -> base.GradientEstimator:
  r"""The likelihood's gradient with samples of the model from short chains.

  For models whose noise distribution nobody can write down: nothing but the
  model is needed. Its samples are biased by the shortness of the chains, and
  no value tells how well the model fits.

  .. math::
    g = -\tfrac{1}{n} \sum_i \nabla \log p_0(\theta, x_i)
      + \tfrac{1}{c} \sum_j \nabla \log p_0(\theta, y_j)

  with :math:`y_j` the ends of Langevin chains: persistent ones, which go on
  where they stood, or ones that start at the data of each batch.

  Args:
    log_density: The model, ``(params, rows) -> [rows]``, up to a constant.
    step_size: Of `langevin`, positive.
    num_steps: Langevin steps per training step, a Python integer.
    persistent: Whether chains go on; else they start at the batch's data.
    restart: Probability that a persistent chain starts anew at a noise row.
    adjust: Whether to use Metropolis tests.

  Returns:
    A `GradientEstimator` over `NoiseBatch`, whose ``init`` takes, after the
    parameters, a PRNG key and the chains' start ``[chains, ...]`` (with
    ``persistent=False``: as many rows as a batch of data). The value is the
    difference of mean log densities of chains and data, no likelihood.

  Raises:
    TypeError: ``log_density`` is not a function, or the batch not a
      `NoiseBatch`.
    ValueError: ``step_size`` is not positive, ``num_steps`` below one, or
      ``restart`` not in [0, 1]; the batch has no rows, or shapes that do not
      match.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> from optlab import unnormalized
    >>> log_density = lambda mean, x: mean * x[:, 0] - x[:, 0] ** 2 / 2
    >>> noise = unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
    >>> data = 1.0 + jax.random.normal(jax.random.key(0), (256, 1))
    >>> batch = optlab.noise_batch(noise, jax.random.key(1), data, 256)
    >>> estimator = optlab.contrastive_divergence(log_density, 0.2, 10)
    >>> tx = optax.sgd(0.1)
    >>> state = optlab.init(
    ...     jnp.zeros(()), estimator, tx, jax.random.key(2), batch.noise)
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(100):
    ...   state, value = step(state, batch)
    >>> print(abs(state.params - data.mean()) < 0.1)
    True

  References:
    Hinton, `Training Products of Experts by Minimizing Contrastive Divergence
    <https://doi.org/10.1162/089976602760128018>`_, Neural Computation 2002;
    Tieleman, `Training Restricted Boltzmann Machines using Approximations to
    the Likelihood Gradient <https://doi.org/10.1145/1390156.1390290>`_, ICML
    2008; restarts as in Du, Mordatch, `Implicit Generation and Modeling with
    Energy-Based Models <https://arxiv.org/abs/1903.08689>`_, NeurIPS 2019

  Notes:
    A data row whose log density is not finite is dropped and counted; so is a
    chain outside the model's support. Cost per step: ``num_steps`` gradients
    with respect to rows, and one over data and chains together.
  """
  checks.check_callable('log_density', log_density, '(params, rows) -> [rows]')
  checks.check_positive('step_size', step_size)
  checks.check_int('num_steps', num_steps, 1)
  checks.check_real('restart', restart, low=0.0, high=1.0)

  def init(params, key, chains):
    dtype = trees.accumulator_dtype(params)
    return ContrastiveDivergenceState(
      key=key,
      chains=jnp.array(chains, copy=True),
      acceptance=jnp.zeros((), dtype),
      rejected=jnp.zeros((), jnp.int32),
    )

  def estimate(params, state, batch):
    _, m = _likelihood.check_batch('contrastive_divergence', batch)
    dtype = state.acceptance.dtype
    key, restart_key, chain_key = jax.random.split(state.key, 3)
    if batch.noise.shape[1:] != state.chains.shape[1:]:
      raise ValueError(
        'contrastive_divergence: chains must have the shape of the rows of'
        f' noise, {batch.noise.shape[1:]}, got {state.chains.shape[1:]}.'
      )
    if persistent:
      num = state.chains.shape[0]
      anew = jax.random.uniform(restart_key, (num,)) < restart
      fresh = jnp.concatenate([batch.noise] * -(-num // m))[:num]
      mask = anew.reshape((num,) + (1,) * (state.chains.ndim - 1))
      start = jnp.where(mask, fresh.astype(state.chains.dtype), state.chains)
    else:
      start = batch.data.astype(state.chains.dtype)
      if start.shape != state.chains.shape:
        raise ValueError(
          'contrastive_divergence: without persistent chains, init takes as'
          f' many as a batch of data, {start.shape}, got'
          f' {state.chains.shape}.'
        )
    run = langevin(
      lambda rows: log_density(params, rows),
      chain_key,
      start,
      step_size,
      num_steps,
      adjust=adjust,
    )
    joined = _likelihood.NoiseBatch(
      batch.data, run.rows, jnp.zeros(run.rows.shape[0])
    )

    def rule(log_p_data, log_p_chains):
      goods = (jnp.isfinite(log_p_data), jnp.isfinite(log_p_chains))
      usable = jnp.any(goods[0]) & jnp.any(goods[1])
      signs = (-1.0, 1.0)
      cotangents = [
        (good & usable).astype(dtype)
        * sign
        / jnp.maximum(jnp.sum(good), 1).astype(dtype)
        for sign, good in zip(signs, goods, strict=True)
      ]
      value = _likelihood.mean_of(log_p_chains, goods[1]) - _likelihood.mean_of(
        log_p_data, goods[0]
      )
      rejected = jnp.sum(~goods[0]) + jnp.sum(~goods[1])
      return cotangents[0], cotangents[1], (value, rejected.astype(jnp.int32))

    grads, (value, rejected) = _likelihood.joint_gradient(
      log_density, params, joined, rule, dtype
    )
    state = ContrastiveDivergenceState(
      key=key,
      chains=run.rows,
      acceptance=run.acceptance.astype(dtype),
      rejected=rejected + run.rejected,
    )
    return base.Estimate(value, grads), state

  return base.GradientEstimator(init, estimate)
