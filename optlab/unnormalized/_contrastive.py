"""Contrastive divergence: maximum likelihood with samples of the model.

The baseline of `meco` that needs no noise distribution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.unnormalized import _langevin
from optlab.unnormalized import _likelihood


class ContrastiveDivergenceInfo(NamedTuple):
  """Diagnostics of `contrastive_divergence`."""

  acceptance: (
    jax.Array
  )  # shape (), share of proposals accepted at the last step
  rejected: (
    jax.Array
  )  # shape (), int32, rows and chains dropped at the last step
  total_rejected: jax.Array  # shape (), int32
  held: jax.Array  # shape (), bool, whether the step gave no gradient
  total_held: jax.Array  # shape (), int32


class ContrastiveDivergenceState(NamedTuple):
  """State of `contrastive_divergence`."""

  key: jax.Array  # PRNG key
  chains: jax.Array  # shape [chains, ...], where the persistent chains stand
  info: ContrastiveDivergenceInfo


@checks.domains(
  log_density=_likelihood.LOG_DENSITY,
  step_size=checks.POSITIVE,
  num_steps=checks.Integer(),
  restart=checks.Real(low=0.0, high=1.0),
)
def contrastive_divergence(
  log_density: _likelihood.LogDensity,
  step_size: float | jax.Array,
  num_steps: int,
  *,
  persistent: bool = True,
  restart: float | jax.Array = 0.05,
  adjust: bool = False,
  has_aux: bool = False,
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
    has_aux: Whether ``log_density`` returns auxiliary output beside the log
      densities: `Estimate.aux`, of data rows and chains together.

  Returns:
    A `GradientEstimator` over `NoiseBatch`, whose ``init`` takes, after the
    parameters, a PRNG key and the chains' start ``[chains, ...]`` (with
    ``persistent=False``: as many rows as a batch of data). The value is the
    difference of mean log densities of chains and data, no likelihood.

  Raises:
    TypeError: ``log_density`` is not a function, ``step_size`` or ``restart``
      not a real number, ``num_steps`` no integer, or the batch not a
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
  checks.enforce(contrastive_divergence, locals())

  def init(params, key, chains):
    dtype = trees.accumulator_dtype(params)
    return ContrastiveDivergenceState(
      key=key,
      chains=jnp.array(chains, copy=True),
      info=ContrastiveDivergenceInfo(
        acceptance=jnp.zeros((), dtype), **_likelihood.zero_tally()
      ),
    )

  def estimate(params, state, batch):
    _likelihood.check_batch('contrastive_divergence', batch)
    dtype = state.info.acceptance.dtype
    model = _likelihood.with_aux(log_density, has_aux)
    key, restart_key, chain_key = jax.random.split(state.key, 3)
    run = _langevin.langevin(
      lambda rows: model(params, rows)[0],
      chain_key,
      _start(state.chains, batch, restart_key, persistent, restart),
      step_size,
      num_steps,
      adjust=adjust,
    )
    joined = _likelihood.aligned(
      _likelihood.NoiseBatch(batch.data, run.rows, jnp.zeros(run.rows.shape[0]))
    )

    def rule(log_p_data, log_p_chains):
      goods = jnp.isfinite(log_p_data), jnp.isfinite(log_p_chains)
      usable = jnp.any(goods[0]) & jnp.any(goods[1])
      signs = jnp.asarray([-1, 1], dtype)
      cotangents = (
        _likelihood.mean_cotangent(sign, good & usable)
        for sign, good in zip(signs, goods, strict=True)
      )
      value = _likelihood.mean_of(log_p_chains, goods[1]) - _likelihood.mean_of(
        log_p_data, goods[0]
      )
      return cotangents, (value, _likelihood.tally(state.info, goods, ~usable))

    grads, (value, tally), aux = _likelihood.joint_gradient(
      log_density, params, joined, rule, dtype, has_aux
    )
    for name in ('rejected', 'total_rejected'):
      tally[name] += run.rejected
    info = ContrastiveDivergenceInfo(
      acceptance=run.acceptance.astype(dtype), **tally
    )
    state = ContrastiveDivergenceState(key=key, chains=run.rows, info=info)
    return base.Estimate(value, grads, aux=aux), state

  return base.GradientEstimator(init, estimate)


def _start(chains, batch, key, persistent, restart):
  """Where the chains of a step start."""
  if batch.noise.shape[1:] != chains.shape[1:]:
    raise ValueError(
      'contrastive_divergence: chains must have the shape of the rows of'
      f' noise, {batch.noise.shape[1:]}, got {chains.shape[1:]}.'
    )
  num, m = chains.shape[0], batch.noise.shape[0]
  if persistent:
    anew = jax.random.uniform(key, (num,)) < restart
    fresh = jnp.concatenate([batch.noise] * -(-num // m))[:num]
    return trees.where(anew, fresh, chains)
  start = batch.data.astype(chains.dtype)
  if start.shape != chains.shape:
    raise ValueError(
      'contrastive_divergence: without persistent chains, init takes as'
      f' many as a batch of data, {start.shape}, got {chains.shape}.'
    )
  return start
