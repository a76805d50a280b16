"""Contrastive divergence: maximum likelihood with samples of the model.

The baseline of `meco` that needs no noise distribution.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.unnormalized import _contrastive_rows
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch
from optlab.unnormalized import _samplers
from optlab.unnormalized import _trackers


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
  restarted: jax.Array  # shape (), int32, chains that started anew
  total_restarted: jax.Array  # shape (), int32


class ContrastiveDivergenceState(NamedTuple):
  """State of `contrastive_divergence`."""

  key: jax.Array  # PRNG key
  chains: jax.Array  # shape [chains, ...], where the persistent chains stand
  stray: (
    jax.Array
  )  # shape [chains], bool, which are outside the model's support
  sampler_state: Any  # the sampler's memory: the step size, say
  info: ContrastiveDivergenceInfo


@checks.domains(
  log_density=_likelihood.LOG_DENSITY,
  step_size=checks.POSITIVE,
  num_steps=checks.Integer(),
  restart=checks.Real(low=0.0, high=1.0),
)
def contrastive_divergence(
  log_density: _likelihood.LogDensity,
  step_size: float | jax.Array = 0.1,
  num_steps: int = 10,
  *,
  sampler: _samplers.Sampler | Callable[..., jax.Array] | None = None,
  persistent: bool = True,
  restart: float | jax.Array = 0.05,
  box: tuple[base.ArrayLike, base.ArrayLike] | None = None,
  adjust: bool = True,
  has_aux: bool = False,
) -> base.GradientEstimator:
  r"""The likelihood's gradient with samples of the model from short chains.

  For models whose noise distribution nobody can write down: nothing but the
  model is needed. Its samples are biased by the shortness of the chains, and
  no value tells how well the model fits.

  .. math::
    g = -\tfrac{1}{n} \sum_i \nabla \log p_0(\theta, x_i)
      + \tfrac{1}{c} \sum_j \nabla \log p_0(\theta, y_j)

  with :math:`y_j` the ends of chains: persistent ones, which go on where they
  stood, or ones that start at the data of each batch.

  Args:
    log_density: The model, ``(params, rows) -> [rows]``, up to a constant.
    step_size: Of the Langevin chains, at the start: it follows their
      acceptance.
    num_steps: Langevin steps per training step, a Python integer.
    sampler: What moves the chains: `langevin_sampler`, `hmc_sampler`,
      `kernel_sampler` of any kernel of blackjax, or a function ``(log_density,
      key, rows) -> rows``. ``None`` is ``langevin_sampler(step_size, num_steps,
      adjust=adjust)``. Bits, spins and counts need a discrete one, such as
      `gibbs_sampler`.
    persistent: Whether chains go on; else they start at the batch's data.
    restart: Probability that a persistent chain starts anew at a noise row.
    box: ``(low, high)``, numbers or arrays of a row's shape: the model is its
      density within, and zero elsewhere; rows of data outside are dropped and
      counted.
    adjust: Whether to use Metropolis tests; without, samples are biased.
    has_aux: Whether ``log_density`` returns auxiliary output beside the log
      densities: `Estimate.aux`, of data rows and chains together.

  Returns:
    A `GradientEstimator` over `NoiseBatch`, whose ``init`` takes, after the
    parameters, a PRNG key and the chains' start ``[chains, ...]`` (with
    ``persistent=False``: as many rows as a batch of data). The value is the
    difference of mean log densities of chains and data, no likelihood.

  Raises:
    TypeError: ``log_density`` is not a function, ``step_size`` or ``restart``
      not a real number, ``num_steps`` no integer, ``sampler`` or ``box`` none,
      or the batch not a `NoiseBatch`.
    ValueError: ``step_size`` is not positive, ``num_steps`` below one,
      ``restart`` not in [0, 1], or ``box`` empty; the batch has no rows, rows
      that are no array, shapes that do not match, or values that the sampler
      does not move on.

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
    chain outside the model's support, outside ``box``, or without one ten times
    further out than data and noise; it starts anew at the next step. Langevin
    chains clip their gradients (``max_drift`` of `langevin_sampler`); clip that
    of the parameters by optax. Data of bits, spins, levels or whole numbers
    with chains of real numbers, or other values than a discrete sampler moves
    on: the step is held and its value NaN, where the error cannot be raised
    (under ``jit``): add uniform noise, a level wide, to numbers that were
    rounded. One such column beside others is not seen. A chain that
    starts anew counts at once, and must cross from well to well within
    ``num_steps``: raise it where wells are apart. Cost per step: ``num_steps``
    gradients with respect to rows, and one over data and chains together.
  """
  checks.enforce(contrastive_divergence, locals())
  if sampler is None:
    target = 0.57 if adjust else 0.98
    sampler = _samplers.langevin_sampler(
      step_size, num_steps, adjust=adjust, target_acceptance=target
    )
  moves = _samplers.as_sampler('sampler', sampler)
  box = _contrastive_rows.as_box(box)

  def init(params, key, chains):
    checks.check_real_params('params', params)
    checks.check_arrays('chains', chains)
    if not all(jnp.shape(leaf)[:1] > (0,) for leaf in jax.tree.leaves(chains)):
      raise ValueError(
        'chains must have one leading axis of at least one chain, got shapes'
        f' {jax.tree.map(jnp.shape, chains)}.'
      )
    dtype = trees.accumulator_dtype(params)
    return ContrastiveDivergenceState(
      key=checks.as_key('key', key),
      chains=trees.own(chains),
      stray=jnp.zeros(jnp.shape(jax.tree.leaves(chains)[0])[:1], bool),
      sampler_state=moves.init(chains),
      info=ContrastiveDivergenceInfo(
        acceptance=jnp.zeros((), dtype),
        restarted=jnp.zeros((), jnp.int32),
        total_restarted=jnp.zeros((), jnp.int32),
        **_likelihood.zero_tally(),
      ),
    )

  def estimate(params, state, batch):
    _noise_batch.check_batch('contrastive_divergence', batch)
    _trackers.refuse(
      'contrastive_divergence', batch, 'its chains would move from one context'
      ' to another; use meco with contexts.'
    )  # fmt: skip
    _contrastive_rows.check_arrays(batch)
    dtype = state.info.acceptance.dtype
    model = _likelihood.with_aux(log_density, has_aux)
    key, restart_key, chain_key = jax.random.split(state.key, 3)
    refused = _contrastive_rows.check_values(batch.data, moves)
    near = _contrastive_rows.near(batch, box)
    start, restarted = _start(
      state, batch, restart_key, restart if persistent else None, near
    )
    run = moves.step(
      _contrastive_rows.within(box, lambda rows: model(params, rows)[0]),
      chain_key,
      start,
      state.sampler_state,
    )
    if moves.discrete is None:
      refused = _contrastive_rows.check_moved(refused, batch.data, run.rows)
    inside = near(batch.data) | (box is None), near(run.rows)
    rule = _rule(state.info, inside, refused, dtype)
    joined = _likelihood.aligned(
      _noise_batch.NoiseBatch(batch.data, run.rows, jnp.zeros(len(run.rows)))
    )
    (grads, fine), (value, stray, tally), aux = _likelihood.joint_gradient(
      log_density, params, joined, rule, dtype, has_aux
    )
    info = _info(state.info, tally, run, restarted, box)
    info = _likelihood.held_unless(fine, info)
    state = ContrastiveDivergenceState(key, run.rows, stray, run.state, info)
    return base.Estimate(value, grads, aux=aux), state

  return base.GradientEstimator(init, estimate)


def _info(info, tally, run, restarted, box):
  """The diagnostics after a step."""
  if box is None:  # Else a proposal may be out of the box, which is no fault.
    for name in ('rejected', 'total_rejected'):
      tally[name] += run.rejected
  return ContrastiveDivergenceInfo(
    acceptance=run.acceptance.astype(info.acceptance.dtype),
    restarted=restarted,
    total_restarted=info.total_restarted + restarted,
    **tally,
  )


def _rule(info, near, refused, dtype):
  """How much each row counts: data against chains that are not far out."""

  def rule(log_p_data, log_p_chains, unused):
    del unused
    goods = jnp.isfinite(log_p_data) & near[0], jnp.isfinite(log_p_chains)
    stray = ~goods[1]
    goods = goods[0], goods[1] & near[1]
    usable = jnp.any(goods[0]) & jnp.any(goods[1]) & ~refused
    signs = jnp.asarray([-1, 1], dtype)
    cotangents = (
      _likelihood.mean_cotangent(sign, good & usable)
      for sign, good in zip(signs, goods, strict=True)
    )
    value = _likelihood.mean_of(log_p_chains, goods[1]) - _likelihood.mean_of(
      log_p_data, goods[0]
    )
    value = jnp.where(refused, jnp.nan, value)
    return cotangents, (value, stray, _likelihood.tally(info, goods, ~usable))

  return rule


def _start(state, batch, key, restart, near):
  """Where the chains of a step start, and how many start anew."""
  chains = state.chains
  if batch.noise.shape[1:] != chains.shape[1:]:
    raise ValueError(
      'contrastive_divergence: chains must have the shape of the rows of'
      f' noise, {batch.noise.shape[1:]}, got {chains.shape[1:]}.'
    )
  num, m = chains.shape[0], batch.noise.shape[0]
  if restart is not None:
    anew = jax.random.uniform(key, (num,)) < restart
    anew |= state.stray | ~near(chains)
    fresh = jnp.concatenate([batch.noise] * -(-num // m))[:num]
    restarted = jnp.sum(anew).astype(jnp.int32)
    return trees.where(anew, fresh.astype(chains.dtype), chains), restarted
  start = batch.data.astype(chains.dtype)
  if start.shape != chains.shape:
    raise ValueError(
      'contrastive_divergence: without persistent chains, init takes as'
      f' many as a batch of data, {start.shape}, got {chains.shape}.'
    )
  return start, jnp.zeros((), jnp.int32)
