"""Noise-contrastive estimation and its exponential-loss variant.

What MECO is compared with, in the same form: estimators over `NoiseBatch`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.unnormalized import _alike
from optlab.unnormalized import _balance
from optlab.unnormalized import _coverage
from optlab.unnormalized import _learned_normalizer
from optlab.unnormalized import _likelihood


class NceInfo(NamedTuple):
  """Diagnostics of `nce` and `ence`."""

  rejected: jax.Array  # shape (), int32, rows dropped at the last step
  total_rejected: jax.Array  # shape (), int32
  held: jax.Array  # shape (), bool, whether the step gave no gradient
  total_held: jax.Array  # shape (), int32
  # Shape (), bool, whether data and noise share a column of distinct numbers,
  # or rows of one context have normalizers that differ.
  conditional: jax.Array
  # Shape (), bool, whether data are whole numbers and noise none at all.
  discrete: jax.Array
  # Shape (), the derivative by a constant beside the log density over the sum
  # of both its sides, -1 to 1, each a mean over 100 steps: near zero once the
  # normalizer is learned, and far from it for good where the model has none.
  imbalance: jax.Array
  warning: jax.Array  # shape (), bool, whether it is far, or `conditional`


class NceState(NamedTuple):
  """State of `nce` and `ence`; the next step needs none of it."""

  balance: _balance.Balance
  alike: Any  # what tells the normalizers of a context apart, or None
  info: NceInfo


@checks.domains(
  log_density=_likelihood.LOG_DENSITY,
  nu=checks.POSITIVE._replace(optional=True),
  contexts=checks.Integer(optional=True),
)
def nce(
  log_density: _likelihood.LogDensity,
  nu: float | jax.Array | None = None,
  *,
  contexts: int | None = None,
  has_aux: bool = False,
) -> base.GradientEstimator:
  r"""Noise-contrastive estimation: classify data against noise.

  The usual way to train an unnormalized model, and robust: each row's share of
  the gradient is bounded. Its curvature dies with the overlap of noise and
  data, where `meco` keeps that of the likelihood.

  .. math::
    h(x) &= \log p(\theta, x) - \log q(x) - \log \nu \\
    L(\theta) &= \tfrac{1}{n} \sum_i \mathrm{softplus}(-h(x_i))
      + \tfrac{\nu}{m} \sum_j \mathrm{softplus}(h(z_j))

  Args:
    log_density: The model with its learned normalizer, ``(params, rows) ->
      [rows]``: `with_log_normalizer`, unless the model has a bias of its own.
    nu: Weight of noise against data, positive; ``None`` takes m / n.
    contexts: How many contexts a conditional model has. Each has a normalizer
      in `NceParams`, of shape ``[contexts]``, which is subtracted here: then
      ``log_density`` is the model alone, and batches name their contexts
      (`conditional_batch`).
    has_aux: Whether ``log_density`` returns auxiliary output beside the log
      densities: `Estimate.aux`, of data and noise rows together.

  Returns:
    A `GradientEstimator` over `NoiseBatch` with ``data_log_prob``.

  Raises:
    TypeError: ``log_density`` is not a function, ``nu`` not a real number,
      ``contexts`` or what the batch names not integers, the batch not a
      `NoiseBatch`, or with ``contexts`` the parameters not `NceParams`.
    ValueError: ``nu`` is not positive, or ``contexts`` below one; the batch has
      no rows, shapes that do not match, no ``data_log_prob``, one array in data
      and noise, or contexts where there are none, and none where there are.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> from optlab import unnormalized
    >>> log_density = lambda mean, x: mean * x[:, 0] - x[:, 0] ** 2 / 2
    >>> noise = optlab.fit_gaussian(jnp.array([[-2.0], [2.0]]))
    >>> data = 1.0 + jax.random.normal(jax.random.key(0), (256, 1))
    >>> estimator, tx = optlab.nce(
    ...     unnormalized.with_log_normalizer(log_density)), optax.adam(0.05)
    >>> params = unnormalized.NceParams(jnp.zeros(()), jnp.zeros(()))
    >>> state = optlab.init(params, estimator, tx)
    >>> step = optlab.train_step(estimator, tx)
    >>> def advance(state, key):
    ...   return step(state, optlab.noise_batch(noise, key, data, 256, True))
    >>> keys = jax.random.split(jax.random.key(1), 200)
    >>> state, values = jax.jit(jax.lax.scan, static_argnums=0)(
    ...     advance, state, keys)
    >>> print(abs(state.params.model - data.mean()) < 0.1)
    True

  References:
    Gutmann, Hyvärinen, `Noise-contrastive estimation
    <https://proceedings.mlr.press/v9/gutmann10a.html>`_, AISTATS 2010

  Notes:
    Bad rows as in `meco`; a row of data where the noise has no density counts,
    its term is exactly zero. A batch without a good row of data or of noise,
    or whose gradient is not finite, gives a zero gradient and counts in
    ``info.total_held``. Cost per step: one gradient over n + m rows, and the
    noise's log density on data as well.

    A model without a normalizer, or a bias, cannot lose its mass: it is bent
    until that is one, and its shape is wrong (a mean of 1 is found as 0.25).
    ``info.warning`` says so from the hundredth step on, as long as a constant
    beside the log density would lower the loss (``info.imbalance``); a
    normalizer that is not learned yet looks alike.

    Bits and counts beside noise that has a density are no error, but
    ``info.discrete`` says so: give them discrete noise, such as `bernoulli`, or
    add uniform noise to numbers that were rounded, as for `meco`.

    A conditional model p(y given x) has a normalizer for every x. With
    `NceParams` and no ``contexts`` there is one, and where data and noise share
    a column of numbers that differ, row by row, the step is held, its value is
    NaN, and ``info.conditional`` says so. A model whose normalizers are part of
    it goes without `NceParams`. With ``contexts`` rows whose context is out of
    range are padding; the normalizer of a context that is seldom seen is the
    one it was started with, nearly.
  """
  checks.enforce(nce, locals())

  def rule(h_data, h_noise, nu):
    h_data, h_noise = h_data - jnp.log(nu), h_noise - jnp.log(nu)
    return (
      (jax.nn.softplus(-h_data), nu * jax.nn.softplus(h_noise)),
      (-jax.nn.sigmoid(-h_data), nu * jax.nn.sigmoid(h_noise)),
    )

  return _contrastive('nce', log_density, rule, nu, contexts, has_aux)


@checks.domains(
  log_density=_likelihood.LOG_DENSITY,
  max_exponent=checks.Real(low=0.0, low_open=True),
  contexts=checks.Integer(optional=True),
)
def ence(
  log_density: _likelihood.LogDensity,
  max_exponent: float | jax.Array = 40.0,
  *,
  contexts: int | None = None,
  has_aux: bool = False,
) -> base.GradientEstimator:
  r"""NCE with the exponential loss, for normalized gradient descent.

  Better conditioned than `nce` for exponential families under normalized
  gradient descent (``optlab.normalized_momentum``); the gradient itself varies
  over many orders of magnitude, plain SGD on it is hopeless.

  .. math::
    h(x) &= \log p(\theta, x) - \log q(x) \\
    L(\theta) &= \tfrac{1}{2n} \sum_i e^{-h(x_i) / 2}
      + \tfrac{1}{2m} \sum_j e^{h(z_j) / 2}

  Args:
    log_density: The model with its learned normalizer, ``(params, rows) ->
      [rows]``: `with_log_normalizer`, unless the model has a bias of its own.
    max_exponent: Exponents are clipped from above to this; the gradient of a
      clipped row keeps its direction.
    contexts: As in `nce`.
    has_aux: As in `nce`.

  Returns:
    A `GradientEstimator` over `NoiseBatch` with ``data_log_prob``.

  Raises:
    TypeError: ``log_density`` is not a function, ``max_exponent`` not a real
      number, or as for `nce`.
    ValueError: ``max_exponent`` is not positive, or as for `nce`.

  Examples:
    >>> import jax, jax.numpy as jnp, optlab
    >>> from optlab import unnormalized
    >>> log_density = lambda mean, x: mean * x[:, 0] - x[:, 0] ** 2 / 2
    >>> noise = optlab.fit_gaussian(jnp.array([[-1.0], [1.0]]))
    >>> batch = optlab.noise_batch(
    ...     noise, jax.random.key(0), jnp.ones((4, 1)), 4, score_data=True)
    >>> estimator = unnormalized.ence(
    ...     unnormalized.with_log_normalizer(log_density))
    >>> params = unnormalized.NceParams(
    ...     jnp.zeros(()), 0.5 * jnp.log(2 * jnp.pi))
    >>> estimate, _ = estimator.estimate(params, estimator.init(params), batch)
    >>> print(f'{estimate.value:.2f}')
    1.00

  References:
    Liu, Rosenfeld, Ravikumar, Risteski, `Analyzing and Improving the
    Optimization Landscape of Noise-Contrastive Estimation
    <https://arxiv.org/abs/2110.11271>`_, ICLR 2022

  Notes:
    Bad rows, conditional models, ``info.warning`` and cost as in `nce`.
  """
  checks.enforce(ence, locals())

  def rule(h_data, h_noise, nu):
    del nu
    data = 0.5 * jnp.exp(jnp.minimum(-0.5 * h_data, max_exponent))
    noise = 0.5 * jnp.exp(jnp.minimum(0.5 * h_noise, max_exponent))
    return (data, noise), (-0.5 * data, 0.5 * noise)

  return _contrastive('ence', log_density, rule, None, contexts, has_aux)


def _contrastive(
  method: str,
  log_density: _likelihood.LogDensity,
  rule: Callable[..., tuple],
  nu: float | jax.Array | None,
  contexts: int | None,
  has_aux: bool,
) -> base.GradientEstimator:
  """The estimator of a loss that is a sum over rows of a function of h."""
  model = log_density
  if contexts is not None:
    model = _learned_normalizer.with_log_normalizers(log_density, has_aux)

  def init(params):
    checks.check_real_params('params', params)
    tally = _likelihood.zero_tally()
    flags = ('conditional', 'discrete', 'warning')
    flags = {name: jnp.zeros((), bool) for name in flags}
    dtype = trees.accumulator_dtype(params)
    info = NceInfo(imbalance=jnp.zeros((), dtype), **flags, **tally)
    alike = None if contexts is None else _alike.start(dtype)
    return NceState(_balance.start(dtype), alike, info)

  def estimate(params, state, batch):
    n, m = _learned_normalizer.check(method, params, batch, contexts)
    batch = _likelihood.aligned(batch)
    dtype = trees.accumulator_dtype(params)
    ratio = jnp.asarray(m / n if nu is None else nu, dtype)
    log_q_data = jnp.asarray(batch.data_log_prob, dtype)
    log_q_noise = batch.noise_log_prob.astype(dtype)
    conditional = jnp.zeros((), bool)
    discrete = _coverage.is_discrete(batch)
    named = jnp.ones(n, bool), jnp.ones(m, bool)
    plain = batch
    if contexts is not None:
      batch, named = _learned_normalizer.beside(batch, contexts)
    elif isinstance(params, _learned_normalizer.NceParams):
      conditional = _coverage.is_conditional(batch)

    def joint_rule(log_p_data, log_p_noise, unused):
      del unused
      # Where the noise has no density a row of data is told for certain: its
      # term is zero, and counts.
      data_good = jnp.isfinite(log_p_data) & (log_q_data < jnp.inf)
      noise_good = _likelihood.good_noise(log_p_noise, log_q_noise)
      h_data = jnp.where(data_good, log_p_data - log_q_data, 0)
      h_noise = jnp.where(noise_good, log_p_noise - log_q_noise, -jnp.inf)
      losses, slopes = rule(h_data, h_noise, ratio)
      rejected = (data_good | ~named[0], noise_good | ~named[1])
      good = (data_good & named[0], noise_good & named[1])
      usable = jnp.any(good[0]) & jnp.any(good[1]) & ~conditional
      good = (good[0] & usable, good[1] & usable)
      value = sum(map(_likelihood.mean_of, losses, good))
      value = jnp.where(conditional, jnp.nan, value)
      cotangents = map(_likelihood.mean_cotangent, slopes, good)
      pulls = tuple(map(_likelihood.mean_of, slopes, good))
      balance = _balance.follow(state.balance, -pulls[0], pulls[1], usable)
      imbalance, far = _balance.judge(balance)
      alike, mixed = None, conditional
      if contexts is not None:
        alike = _alike.follow(state.alike, plain, contexts, h_noise, noise_good)
        mixed = _alike.differ(alike)
      info = NceInfo(
        conditional=mixed, discrete=discrete, imbalance=imbalance,
        warning=far | mixed,
        **_likelihood.tally(state.info, rejected, ~usable),
      )  # fmt: skip
      return cotangents, (value, NceState(balance, alike, info))

    (grads, fine), (value, state), aux = _likelihood.joint_gradient(
      model, params, batch, joint_rule, dtype, has_aux
    )
    state = state._replace(info=_likelihood.held_unless(fine, state.info))
    return base.Estimate(value, grads, aux=aux), state

  return base.GradientEstimator(init, estimate)
