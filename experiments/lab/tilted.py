"""Energies on top of a noise that was fitted to small images.

The model is log p0(x) = log q(x) + f(x): a mixture of Gaussians q, fitted by
scikit-learn, tilted by a network f that starts at zero.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab

from ..problems import densities
from ..problems import small_images
from . import devices
from . import flags
from . import study
from . import tables

METHODS = ('meco', 'nce')
LOG_Z_DRAWS = 100_000


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags of the programs that train energies of images."""

  dataset: str = flags.flag(
    'digits',
    'Images: 8x8, 14x14 or 28x28.',
    choices=('digits', 'mnist', 'mnist28'),
  )
  data_dir: str = flags.flag('', 'Folder with the IDX files of MNIST.')
  methods: tuple[str, ...] = flags.flag(
    METHODS, 'Energies to train.', choices=METHODS
  )
  steps: int = flags.flag(1000, 'Steps.', low=1)
  batch: int = flags.flag(128, 'Rows of data, and of noise, in a batch.', low=1)
  hidden: int = flags.flag(128, 'Width of the energy.', low=1)
  components: int = flags.flag(10, 'Components of the noise.', low=1)
  learning_rates: tuple[float, ...] = flags.flag(
    (5e-4, 2e-3, 8e-3), 'Grid of rates of Adam, at the start.', low=0.0
  )
  tuning_seeds: int = flags.flag(
    1, 'Splits that pick rates; 0 takes the first rate.', low=0, grows=True
  )
  weight_decay: float = flags.flag(1e-2, "Of Adam's, decoupled.", low=0.0)
  gamma: float = flags.flag(0.1, 'Weight of the newest batch in MECO.')
  score: str = flags.flag(
    'importance', 'How log Z is found.', choices=('importance', 'smc')
  )
  particles: int = flags.flag(64, 'Of each of three runs of SMC.', low=2)
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32',)
  )

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.gamma <= 1:
      raise flags.UserError(f'--gamma={self.gamma}: must be in (0, 1]')


def init_energy(key: jax.Array, columns: int, hidden: int) -> Any:
  """A network whose output starts at zero."""
  layers = densities.init_mlp(key, (columns, hidden, hidden, 1))
  weight, bias = layers[-1]
  return [*layers[:-1], (0.0 * weight, bias)]


def tilt(params: Any, pixels: jax.Array) -> jax.Array:
  """The network f, on pixels spread to [-1, 1]; bounded, so p0 is normal."""
  hidden = 2 * pixels - 1
  for weight, bias in params[:-1]:
    hidden = jax.nn.silu(hidden @ weight + bias)
  weight, bias = params[-1]
  raw = (hidden @ weight + bias)[..., 0]
  return 20 * jnp.tanh(raw / 20)


def log_density(params: Any, rows: jax.Array) -> jax.Array:
  """The model on rows that carry their fitted log density."""
  return tilt(params, rows[..., :-1]) + rows[..., -1]


class State(NamedTuple):
  """One lane."""

  train: optlab.TrainState
  place: jax.Array  # Of its seed's data.
  ess: jax.Array


class Data(NamedTuple):
  """Of each seed, those that pick rates last, along a leading axis."""

  rows: jax.Array  # [seeds, rows, columns + 1]
  log_q: jax.Array  # [seeds, rows], the noise's log density of them
  held: jax.Array  # [seeds, held rows, columns + 1]
  noise: small_images.Noise


def seeds(config: Config) -> tuple[int, ...]:
  """Those that are reported, and those that pick rates."""
  first = study.TUNING_SEED
  return (*range(config.seeds), *range(first, first + config.tuning_seeds))


def particles(config: Config) -> int | None:
  """Of a score by tempering; ``None`` where it is by importance sampling."""
  return config.particles if config.score == 'smc' else None


def model_of(params: Any) -> Any:
  """The energy's parameters, without what NCE learns beside."""
  normalized = isinstance(params, optlab.unnormalized.NceParams)
  return params.model if normalized else params


def problem(
  config: Config,
  parts: Sequence[tuple[np.ndarray, np.ndarray, small_images.Noise]],
) -> study.Plan:
  """Training of energies on splits of images, as the study has it.

  Args:
    config: The flags.
    parts: Training rows, held-out rows and noise of each of `seeds`.

  Returns:
    The plan. Rates are picked by the held-out likelihood of other splits, with
    log Z by the draws of the noise.
  """
  fewest = min(len(held) for _, held, _ in parts)
  stack = lambda *leaves: jnp.stack(leaves)

  def one(rows, held, noise):
    based = lambda rows: small_images.with_base(noise.fitted, rows)
    log_q = noise.noise.log_prob(jnp.asarray(rows))
    return Data(based(rows), log_q, based(held[:fewest]), noise)

  data = jax.tree.map(stack, *(one(*part) for part in parts))

  def measure(state, data):
    params = model_of(state.train.params)
    held, pool, log_prob = jax.tree.map(
      lambda leaf: leaf[state.place],
      (data.held, data.noise.pool, data.noise.pool_log_prob),
    )
    weights = log_density(params, pool) - log_prob
    log_z = jax.nn.logsumexp(weights) - math.log(len(weights))
    nll = log_z - jnp.mean(log_density(params, held))
    return {'tuning': nll, 'value': nll, 'ess': state.ess}

  own = study.Problem(
    lambda method: _entry(config, method, data.rows.shape[-1] - 1),
    config.methods, config.learning_rates, config.steps, 'steps', measure,
    'held-out nats, log Z by the noise', data=data,
  )  # fmt: skip
  return study.Plan(
    '', own, config.steps, config.learning_rates, config.seeds,
    config.tuning_seeds,
  )  # fmt: skip


def _entry(config: Config, method: str, columns: int) -> study.Entry:
  estimator = optlab.meco(log_density, config.gamma)
  if method == 'nce':
    estimator = optlab.nce(optlab.unnormalized.with_log_normalizer(log_density))

  def tx(rate):
    decay = optax.cosine_decay_schedule(1.0, config.steps)
    return optax.chain(
      optax.clip_by_global_norm(10.0),
      optax.adamw(
        lambda count: rate * decay(count), weight_decay=config.weight_decay
      ),
    )

  def start(key, rate, seed, data):
    params = init_energy(key, columns, config.hidden)
    if method == 'nce':
      params = optlab.unnormalized.NceParams(params, jnp.zeros(()))
    tuning = seed - study.TUNING_SEED
    place = jnp.where(tuning < 0, seed, config.seeds + tuning)
    return State(optlab.init(params, estimator, tx(rate)), place, jnp.zeros(()))

  def step(state, key, rate, data):
    row_key, noise_key = jax.random.split(key)
    shape, place = (config.batch,), state.place
    index = jax.random.randint(row_key, shape, 0, data.rows.shape[1])
    drawn = jax.random.randint(noise_key, shape, 0, data.noise.pool.shape[1])
    batch = optlab.NoiseBatch(
      data.rows[place, index], data.noise.pool[place, drawn],
      data.noise.pool_log_prob[place, drawn], data.log_q[place, index],
    )  # fmt: skip
    train, _ = optlab.train_step(estimator, tx(rate))(
      state.train, devices.split(batch)
    )
    found = optax.tree.get(train.estimator_state, 'ess', jnp.nan)
    return State(train, place, jnp.asarray(found, jnp.float32))

  return study.Entry(start, step, 1)


def held_out_nll(
  params: Any,
  noise: small_images.Noise,
  test: jax.Array,
  seed: int,
  particles: int | None = None,
) -> dict:
  """Negative log-likelihood of ``test``, or NaN where log Z is refused.

  log Z is estimated twice, with the noise and with one whose wide component is
  ten times as likely, and both must agree; or by so many tempered particles,
  that go from the fitted mixture to the model and from ``test`` back.
  """
  log_z, found = (
    _by_importance(params, noise, seed)
    if particles is None
    else _by_tempering(params, noise, test, seed, particles)
  )
  model = functools.partial(_tilted, params, noise)
  return found | {
    'nll': log_z - jnp.mean(small_images.in_chunks(model, test)),
    'q_nll': -jnp.mean(noise.fitted.log_prob(test)),
  }


def _tilted(params, noise, rows):
  return tilt(params, rows) + noise.fitted.log_prob(rows)


@jax.jit  # Compiled once: the arrays of models and noises are alike.
def _estimate(params, noise, proposal, key):
  return optlab.log_partition(
    functools.partial(_tilted, params, noise), proposal, key,
    num=LOG_Z_DRAWS, chunk=2000,
  )  # fmt: skip


def _by_importance(params, noise, seed):
  """Log Z, and what is recorded of it."""
  share = jnp.log(jnp.asarray(10 * small_images.WIDE_SHARE))
  weights = noise.noise.log_weights
  rest = jax.nn.log_softmax(weights[:-1]) + jnp.log1p(-jnp.exp(share))
  wider = noise.noise._replace(log_weights=jnp.append(rest, share))
  first, second = (
    _estimate(params, noise, proposal, jax.random.key(1000 + 2 * seed + i))
    for i, proposal in enumerate((noise.noise, wider))
  )
  agree = bool(optlab.unnormalized.agree(first, second))
  return (first.value if agree else jnp.nan), {
    'standard_error': first.standard_error,
    'log_z_ess': first.ess,
    'largest_share': first.largest_share,
    'agree': agree,
  }


class White(NamedTuple):
  """The fitted mixture in coordinates where its whole is white.

  Chains have one step size, and pixels have many.
  """

  fitted: optlab.unnormalized.GaussianMixture
  mean: jax.Array
  scale: jax.Array  # Of the whole, lower triangular.

  def rows(self, white: jax.Array) -> jax.Array:
    return self.mean + white @ self.scale.T

  def white(self, rows: jax.Array) -> jax.Array:
    return jax.scipy.linalg.solve_triangular(
      self.scale, (rows - self.mean).T, lower=True
    ).T

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    return self.white(self.fitted.sample(key, num))

  def log_prob(self, white: jax.Array) -> jax.Array:
    log_det = jnp.sum(jnp.log(jnp.diagonal(self.scale)))
    return self.fitted.log_prob(self.rows(white)) + log_det


def whitened(noise: small_images.Noise) -> White:
  """The coordinates for a noise: by the moments of its mixture."""
  fitted = noise.fitted
  weights = jnp.exp(fitted.log_weights)
  mean = weights @ fitted.means
  gaps = fitted.means - mean
  covariance = jnp.einsum(
    'k,kij,klj->il', weights, fitted.scales, fitted.scales
  )
  covariance += jnp.einsum('k,ki,kj->ij', weights, gaps, gaps)
  return White(fitted, mean, jnp.linalg.cholesky(covariance))


@functools.partial(jax.jit, static_argnames='particles')
def _temper(params, space, rows, key, particles):
  method = optlab.unnormalized.tempered_smc(particles, repeats=3, num_steps=5)
  return optlab.log_partition(
    lambda white: tilt(params, space.rows(white)) + space.log_prob(white),
    space, key, method=method, data=space.white(rows),
  )  # fmt: skip


def _by_tempering(params, noise, test, seed, particles):
  """Log Z, and what is recorded of it."""
  key = jax.random.key(1000 + seed)
  found = _temper(params, whitened(noise), test, key, particles)
  return found.value, {
    'standard_error': found.standard_error,
    'second': found.second,
    'data_gap': found.data_gap,
    'log_z_ess': found.ess,
    'largest_share': found.largest_share,
    'agree': bool(found.ok),
  }


def show_likelihoods(scores: Sequence[dict]) -> None:
  """A table of held-out likelihoods, each with its standard error."""
  tables.show(
    'Held-out negative log-likelihood in nats; a dash where log Z is refused',
    ['method', 'seed', 'NLL', 'standard error', 'NLL of q', 'ESS', 'share'],
    [
      [
        row['method'],
        row['seed'],
        f'{row["nll"]:.3f}' if np.isfinite(row['nll']) else '-',
        row['standard_error'],
        f'{row["q_nll"]:.3f}',
        float(round(row['log_z_ess'])),
        row['largest_share'],
      ]
      for row in scores
    ],
  )
