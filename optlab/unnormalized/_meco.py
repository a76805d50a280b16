"""MECO: maximum likelihood of unnormalized models, without their normalizer.

Reference: Jiang, Qin, Wu, Chen, Yang, Zhang, "Learning Unnormalized Statistical
Models via Compositional Optimization", ICML 2023,
https://arxiv.org/abs/2306.07485
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import special

from optlab import base
from optlab import checks
from optlab import trees
from optlab.unnormalized import _alike
from optlab.unnormalized import _coverage
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch
from optlab.unnormalized import _trackers


class MecoInfo(NamedTuple):
  """Diagnostics of `meco`."""

  ess: jax.Array  # shape (), effective sample size of noise for the model
  coverage: _coverage.Coverage
  rejected: jax.Array  # shape (), int32, rows dropped at the last step
  total_rejected: jax.Array  # shape (), int32
  # Shape (), bool, whether the step left the tracker alone, or had no gradient
  # that is finite, and gave zeros.
  held: jax.Array
  total_held: jax.Array  # shape (), int32


class MecoState(NamedTuple):
  """State of `meco`; the floats are float32, or wider where params are."""

  step: jax.Array  # shape (), int32, steps so far
  # Shape (), or (contexts,): log u, the tracked log of E_q[p0 / q], and the
  # total weight of the moving average so far.
  log_normalizer: jax.Array
  weight: jax.Array
  previous: Any  # params of the step before, or None without ratio correction
  alike: Any  # what tells the normalizers of a context apart, or None
  info: MecoInfo


@checks.domains(
  log_density=_likelihood.LOG_DENSITY,
  gamma=checks.FRACTION._replace(schedule=True),
  contexts=checks.Integer(optional=True),
)
def meco(
  log_density: _likelihood.LogDensity,
  gamma: base.ScalarOrSchedule = 0.1,
  *,
  ratio_correction: bool = False,
  debias: bool = True,
  contexts: int | None = None,
  has_aux: bool = False,
) -> base.GradientEstimator:
  r"""Compositional estimate of the log-likelihood's gradient.

  For a model that is known up to its normalizer, and a noise distribution that
  can be sampled and scored. Choose it over `nce` where the noise is far from
  the data: the likelihood keeps its curvature there, and the logistic loss does
  not. Choose it over ``gamma=1`` (self-normalized importance sampling) where
  the noise rows of a batch are few.

  With :math:`w_j = p_0(\theta, z_j) / q(z_j)`, everything in the log domain,

  .. math::
    \gamma_t &= \gamma / (1 - (1 - \gamma)^t) \\
    u_t &= (1 - \gamma_t)\, u_{t-1}\, e^{D_t}
      + \gamma_t \tfrac{1}{m} \sum_j w_j \\
    g_t &= -\tfrac{1}{n} \sum_i \nabla \log p_0(\theta, x_i)
      + \tfrac{1}{m} \sum_j \tfrac{w_j}{u_t} \nabla \log p_0(\theta, z_j)

  and :math:`D_t = 0`, or with ``ratio_correction`` the change of the logarithm
  of the batch's mean weight from the previous parameters to these.

  Args:
    log_density: The model, ``(params, rows) -> [rows]``, up to a constant, of
      each row alone: no statistics of the batch.
    gamma: Weight of the newest batch in the inner moving average, in (0, 1], or
      a schedule of it.
    ratio_correction: Whether to remove the tracker's lag behind a moving
      normalizer (STORM in the log domain). For noise batches with an effective
      sample size of 50 and more and ``gamma`` of 0.1 and more; it diverges with
      few noise rows.
    debias: Whether to correct the first steps of the average. Without it the
      first batch counts like the past, from then on ``gamma`` is used as it is.
    contexts: How many contexts (classes, queries, rows) a conditional model
      has; each gets a tracker, and batches name theirs (`conditional_batch`),
      from zero: numbered from one, the last of them would count as padding.
      ``None`` is for a model with one normalizer.
    has_aux: Whether ``log_density`` returns auxiliary output beside the log
      densities: `Estimate.aux`, of data and noise rows together.

  Returns:
    A `GradientEstimator` over `NoiseBatch`. Its value is the tracked negative
    log-likelihood, for watching only: score a model with `log_partition`.
    ``optlab.report(state)`` lists ``log_normalizer`` and, under ``info``,
    ``ess``, ``rejected``, ``held`` and their totals, and, under
    ``info/coverage``, whether the noise reaches the data: where it does not,
    nothing else looks wrong.

  Raises:
    TypeError: ``log_density`` is not a function, ``gamma`` neither a real
      number nor a schedule, ``contexts`` or what the batch names not integers,
      or the batch not a `NoiseBatch`.
    ValueError: ``gamma`` is not in (0, 1], or ``contexts`` below one or beside
      ``ratio_correction``; the batch has no rows, shapes that do not match, one
      array in data and noise, or contexts where ``meco`` has none, and none
      where it has.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> log_density = lambda mean, x: mean * x[:, 0] - x[:, 0] ** 2 / 2
    >>> noise = optlab.fit_gaussian(jnp.array([[-2.0], [2.0]]))
    >>> data = 1.0 + jax.random.normal(jax.random.key(0), (256, 1))
    >>> estimator, tx = optlab.meco(log_density), optax.sgd(0.1)
    >>> state = optlab.init(jnp.zeros(()), estimator, tx)
    >>> step = optlab.train_step(estimator, tx)
    >>> def advance(state, key):
    ...   return step(state, optlab.noise_batch(noise, key, data, 256))
    >>> keys = jax.random.split(jax.random.key(1), 100)
    >>> state, values = jax.jit(jax.lax.scan, static_argnums=0)(
    ...     advance, state, keys)
    >>> print(abs(state.params - data.mean()) < 0.1)
    True

  References:
    Jiang et al., `Learning Unnormalized Statistical Models via Compositional
    Optimization <https://arxiv.org/abs/2306.07485>`_, ICML 2023

  Notes:
    Departures from the paper: the average lives in the log domain, so that no
    model over- or underflows; it is debiased, so that it needs no starting
    value; and it takes in the batch before it is used, so that the noise
    coefficients sum to at most :math:`1 / \gamma_t`. The outer moving average
    of the paper is optax's (``optax.ema``, or Adam).

    Lag: while log Z rises by r a step, the noise term is too large by
    :math:`(1 - (1 - \gamma) e^{-r}) / \gamma`. Lower the learning rate, raise
    ``gamma``, or set ``ratio_correction``.

    Bad rows: a row whose log density is NaN or +inf, or whose noise density is
    zero, is dropped and counted, and the result is that of the batch without
    it; so is a row of data outside the model's support. Noise outside the
    model's support has weight zero. A batch without any weight leaves the
    tracker alone and gives no noise term; one without a good row of noise or of
    data, or whose gradient is not finite, gives a zero gradient.

    Bits and counts beside noise that has a density are no error, but
    ``info.coverage.discrete`` says so, and ``warning``: give them discrete
    noise, such as `bernoulli`; to whole numbers that stand for a quantity, ages
    or pixels from 0 to 255, add `jax.random.uniform` noise, a level wide.

    A conditional model p(y given x) has a normalizer for every x, and one
    tracker is the log of their mean: where data and noise share a column of
    distinct numbers, row by row or in another order, the step is held, its
    value is NaN, and ``info.coverage.conditional`` says so. Noise beside x of
    other rows of the data set looks like that of a joint model, and is not
    seen: name the contexts. With ``contexts`` the update above is
    made for each context that the noise of the batch names, the likelihood is
    the mean over the rows of data, and other contexts are left alone. A row of
    data without a good row of noise of its context, or of a context without any
    weight so far, is dropped and counted. A tracker does not follow between
    visits: where contexts are seldom seen raise ``gamma``; where they never
    come again, ``gamma=1`` with the row's number in the batch as its context.
    ``info.ess`` is then the mean over the contexts seen. Rows of one context
    whose normalizers differ are bent as those of one tracker are: where the
    noise of several rows of a context stands beside them, as
    `conditional_batch` lays it, ``info.coverage.conditional`` says so from the
    fiftieth step on, and ``warning``.

    Cost per step: one gradient over n + m rows, as for `nce`; with
    ``ratio_correction`` also one forward pass over m rows and a copy of the
    parameters.

    Against `nce` with the same fixed noise do not expect more than a tie: with
    independent noise rows in proportion to data, the asymptotic variance of NCE
    is never above that of Monte Carlo maximum likelihood (`Riou-Durand, Chopin
    <https://doi.org/10.1214/18-EJS1485>`_, 2018). What helps both is noise
    closer to the data and ``sample_lattice``, to which that theorem does not
    apply. With an effective sample size of half the batch, ``gamma=1`` does as
    well.
  """
  checks.enforce(meco, locals())
  if contexts is not None and ratio_correction:
    raise ValueError(
      'meco: contexts and ratio_correction do not go together, the correction'
      " reaches back one step and not to a context's last visit; drop"
      ' ratio_correction, and raise gamma where contexts are seldom visited.'
    )

  def init(params):
    checks.check_real_params('params', params)
    dtype = trees.accumulator_dtype(params)
    shape = () if contexts is None else (contexts,)
    return MecoState(
      step=jnp.zeros((), jnp.int32),
      log_normalizer=jnp.zeros(shape, dtype),
      weight=jnp.zeros(shape, dtype),
      # A copy: params and state may both be donated.
      previous=trees.own(params) if ratio_correction else None,
      alike=None if contexts is None else _alike.start(dtype),
      info=MecoInfo(
        ess=jnp.zeros((), dtype),
        coverage=_coverage.unknown(dtype),
        **_likelihood.zero_tally(),
      ),
    )

  def estimate(params, state, batch):
    n, m = _noise_batch.check_batch('meco', batch)
    if contexts is None:
      _coverage.check_apart('meco', batch)
      _trackers.refuse('meco', batch, 'give meco the number of contexts.')
    else:
      _trackers.check('meco', batch, n, m)
    batch = _likelihood.aligned(batch)
    conditional = jnp.zeros((), bool)
    if contexts is None:
      conditional = _coverage.is_conditional(batch)
    dtype = state.log_normalizer.dtype
    log_q = batch.noise_log_prob.astype(dtype)
    gamma_now = gamma(state.step) if callable(gamma) else gamma
    rate = _trackers.Rate(jnp.asarray(gamma_now, dtype), debias)
    log_p_before = None
    if ratio_correction:
      model = _likelihood.with_aux(log_density, has_aux)
      log_p_before = model(state.previous, batch.noise)[0].astype(dtype)

    def rule(log_p_data, log_p_noise, model_dtype):
      noise_good = _likelihood.good_noise(log_p_noise, log_q) & ~conditional
      log_w = jnp.where(noise_good, log_p_noise - log_q, -jnp.inf)
      drift = jnp.zeros((), dtype)
      if ratio_correction:
        drift = _drift(log_w, log_p_before, log_q, noise_good)
      rows = (log_p_data, log_w, noise_good)
      if contexts is None:
        new = _trackers.one(state, rate, *rows, drift)
      else:
        new = _trackers.many(state, rate, *rows, batch)
      mixed = conditional
      if contexts is not None:
        mixed = _alike.differ(new.alike)
      coverage = _coverage.coverage(
        batch, log_p_data, new.data_good, noise_good, mixed, model_dtype
      )
      new_state = _advanced(state, new, coverage)
      value = jnp.where(conditional, jnp.nan, new.value)
      return new.cotangents, (value, new_state)

    (grads, fine), (value, state), aux = _likelihood.joint_gradient(
      log_density, params, batch, rule, dtype, has_aux
    )
    state = state._replace(info=_likelihood.held_unless(fine, state.info))
    if ratio_correction:
      state = state._replace(previous=params)
    return base.Estimate(value, grads, aux=aux), state

  return base.GradientEstimator(init, estimate)


def _advanced(state, new, coverage):
  """The state after a step, but for the parameters before."""
  return MecoState(
    step=state.step + 1,
    log_normalizer=new.log_normalizer,
    weight=new.weight,
    previous=None,
    alike=new.alike,
    info=MecoInfo(
      ess=new.ess,
      coverage=coverage,
      **_likelihood.tally(state.info, new.goods, new.held),
    ),
  )


def _drift(log_w, log_p_before, log_q, noise_good):
  """The change of log g from the previous parameters, on rows good at both."""
  both = noise_good & _likelihood.good_noise(log_p_before, log_q)
  drift = special.logsumexp(
    jnp.where(both, log_w, -jnp.inf)
  ) - special.logsumexp(jnp.where(both, log_p_before - log_q, -jnp.inf))
  return jnp.where(jnp.isfinite(drift), drift, 0)
