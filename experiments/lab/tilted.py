"""Small images, the noise fitted to them, and energies on top of that noise.

The model is log p0(x) = log q(x) + f(x): a mixture of Gaussians q, fitted by
scikit-learn, tilted by a network f that starts at zero. The noise is q with a
wide component mixed in; both are fixed, so their log densities of data and of a
pool of draws are computed once, and a training row carries its own.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import mixture as sklearn_mixture

import optlab

from ..problems import data as data_lib
from ..problems import densities
from . import devices
from . import flags
from . import tables
from .session import Session

METHODS = ('meco', 'nce')
POOL = 20_000
LOG_Z_DRAWS = 100_000
WIDE_SHARE, WIDE_INFLATION = 0.05, 2.0


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags of the programs that train energies of images."""

  dataset: str = flags.flag('digits', 'Images.', choices=('digits', 'mnist'))
  data_dir: str = flags.flag('', 'Folder with the IDX files of MNIST.')
  methods: tuple[str, ...] = flags.flag(
    METHODS, 'Energies to train.', choices=METHODS
  )
  steps: int = flags.flag(1000, 'Steps.', low=1, grows=True)
  batch: int = flags.flag(128, 'Rows of data, and of noise, in a batch.', low=1)
  hidden: int = flags.flag(128, 'Width of the energy.', low=1)
  components: int = flags.flag(10, 'Components of the noise.', low=1)
  learning_rate: float = flags.flag(2e-3, 'Of Adam, at the start.', low=0.0)
  weight_decay: float = flags.flag(1e-2, "Of Adam's, decoupled.", low=0.0)
  gamma: float = flags.flag(0.1, 'Weight of the newest batch in MECO.')
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32',)
  )

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.gamma <= 1:
      raise flags.UserError(f'--gamma={self.gamma}: must be in (0, 1]')


class Images(NamedTuple):
  """Pixels around [0, 1], with noise where they were quantized; classes."""

  rows: np.ndarray  # float32 [rows, side * side]
  labels: np.ndarray
  side: int
  levels: int  # Of a pixel's values.


def load(name: str, data_dir: str, seed: int) -> Images:
  """Digits 8x8, or MNIST averaged to 14x14; dequantized.

  Args:
    name: ``digits`` or ``mnist``.
    data_dir: Folder of MNIST's files.
    seed: Of the added noise.

  Returns:
    `Images`.
  """
  dataset = data_lib.load(name, data_dir)
  pixels = data_lib.dense(dataset)
  side, levels = 8, 16
  if name == 'mnist':
    side, levels = 14, 255
    blocks = pixels.reshape(-1, side, 2, side, 2)
    pixels = blocks.mean((2, 4)).reshape(-1, side * side)
  rng = np.random.default_rng(seed)
  # A twentieth of the range at least: flat pixels have no density to learn.
  width = max(1 / levels, 0.05)
  rows = pixels + width * (rng.uniform(size=pixels.shape) - 0.5)
  return Images(rows.astype(np.float32), dataset.labels, side, levels)


class Noise(NamedTuple):
  """The fitted mixture, the noise made of it, and a pool of its draws."""

  fitted: optlab.unnormalized.GaussianMixture
  noise: optlab.unnormalized.GaussianMixture
  pool: jax.Array  # [POOL, columns + 1], the last the fitted log density
  pool_log_prob: jax.Array  # [POOL]


def fit_noise(rows: np.ndarray, components: int, seed: int) -> Noise:
  """Fits the mixture to ``rows`` and fills the pool."""
  fit = sklearn_mixture.GaussianMixture(
    components, reg_covar=1e-3, random_state=seed, max_iter=50
  ).fit(rows)
  mean = rows.mean(0)[None]
  wide = WIDE_INFLATION * np.cov(rows.T)[None]
  wide += 1e-3 * np.eye(rows.shape[1])
  weights, means = np.asarray(fit.weights_), np.asarray(fit.means_)
  covariances = 1.1 * np.asarray(fit.covariances_)
  fitted = optlab.unnormalized.gaussian_mixture(weights, means, covariances)
  noise = optlab.unnormalized.gaussian_mixture(
    np.append((1 - WIDE_SHARE) * weights, WIDE_SHARE),
    np.concatenate([means, mean]),
    np.concatenate([covariances, wide]),
  )
  fitted, noise = jax.tree.map(
    lambda leaf: jnp.asarray(leaf, jnp.float32), (fitted, noise)
  )
  draws = noise.sample(jax.random.key(seed), POOL)
  pool = with_base(fitted, draws)
  return Noise(fitted, noise, pool, _in_chunks(noise.log_prob, draws))


def _in_chunks(function: Any, rows: jax.Array, chunk: int = 1000) -> jax.Array:
  parts = [
    jax.jit(function)(rows[i : i + chunk]) for i in range(0, len(rows), chunk)
  ]
  return jnp.concatenate(parts)


def with_base(fitted: Any, rows: jax.typing.ArrayLike) -> jax.Array:
  """Rows with a last column that holds the fitted log density."""
  pixels = jnp.asarray(rows)
  base = _in_chunks(fitted.log_prob, pixels)
  return jnp.concatenate([pixels, base[:, None]], 1)


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


class Lane(NamedTuple):
  """One seed."""

  train: optlab.TrainState
  key: jax.Array
  ess: jax.Array


def train(
  session: Session,
  method: str,
  config: Any,
  data: jax.Array,
  noises: Noise,
  hidden: int,
  log_q_data: jax.Array,
) -> Any:
  """Trains one method on every seed.

  Args:
    session: The run.
    method: One of `METHODS`.
    config: A `Config`.
    data: ``[seeds, rows, columns + 1]``.
    noises: With a leading axis of seeds.
    hidden: Width of the network.
    log_q_data: ``[seeds, rows]``, the noise's log density of ``data``.

  Returns:
    The energies' parameters, with a leading axis of seeds.
  """
  decay = optax.cosine_decay_schedule(config.learning_rate, config.steps)
  tx = optax.chain(
    optax.clip_by_global_norm(10.0),
    optax.adamw(decay, weight_decay=config.weight_decay),
  )
  if method == 'nce':
    estimator = optlab.nce(optlab.unnormalized.with_log_normalizer(log_density))
  else:
    estimator = optlab.meco(log_density, config.gamma)
  model_of = lambda params: params.model if method == 'nce' else params
  step = optlab.train_step(estimator, tx)
  every = math.gcd(config.steps, 100)

  def begin(seed):
    init_key, key = jax.random.split(jax.random.key(seed))
    params = init_energy(init_key, data.shape[-1] - 1, hidden)
    if method == 'nce':
      params = optlab.unnormalized.NceParams(params, jnp.zeros(()))
    return Lane(optlab.init(params, estimator, tx), key, jnp.zeros(()))

  def advance_lane(args):
    lane, rows, log_q, pool, pool_log_prob = args

    def body(carry, _):
      state, key, ess = carry
      key, row_key, noise_key = jax.random.split(key, 3)
      index = jax.random.randint(row_key, (config.batch,), 0, rows.shape[0])
      drawn = jax.random.randint(noise_key, (config.batch,), 0, POOL)
      batch = optlab.NoiseBatch(
        rows[index], pool[drawn], pool_log_prob[drawn], log_q[index]
      )
      state, _ = step(state, devices.split(batch))
      found = optax.tree.get(state.estimator_state, 'ess', None)
      ess += jnp.asarray(jnp.nan if found is None else found, jnp.float32)
      return (state, key, ess), None

    carry = (lane.train, lane.key, jnp.zeros(()))
    carry, _ = jax.lax.scan(body, carry, length=every)
    return Lane(*carry)

  def evaluate(lanes):
    done = int(lanes.train.step[0])
    return {
      'ess': lanes.ess / every / config.batch if done else jnp.nan,
      'gradients': done,
      'samples': 2 * done * config.batch,
    }

  lanes = session.run(
    method,
    jax.vmap(begin)(jnp.arange(config.seeds)),
    lambda lanes: jax.lax.map(
      advance_lane,
      (lanes, data, log_q_data, noises.pool, noises.pool_log_prob),
    ),
    evaluate,
    steps=config.steps,
    every=every,
    seeds=tuple(range(config.seeds)),
    show='ess',
    keep_state=True,
  )
  return model_of(lanes.train.params)


def held_out_nll(params: Any, noise: Noise, test: jax.Array, seed: int) -> dict:
  """Negative log-likelihood of ``test``, or NaN where log Z is refused.

  log Z is estimated twice, with the noise and with one whose wide component is
  ten times as likely, and both must agree.
  """

  def model(rows):
    return tilt(params, rows) + noise.fitted.log_prob(rows)

  share = jnp.log(jnp.asarray(10 * WIDE_SHARE))
  weights = noise.noise.log_weights
  rest = jax.nn.log_softmax(weights[:-1]) + jnp.log1p(-jnp.exp(share))
  wider = noise.noise._replace(log_weights=jnp.append(rest, share))
  first, second = (
    jax.jit(
      lambda q, key: optlab.log_partition(
        model, q, key, num=LOG_Z_DRAWS, chunk=2000
      )
    )(q, jax.random.key(1000 + 2 * seed + i))
    for i, q in enumerate((noise.noise, wider))
  )
  agree = bool(optlab.unnormalized.agree(first, second))
  log_z = first.value if agree else jnp.nan
  return {
    'nll': log_z - jnp.mean(_in_chunks(model, test)),
    'standard_error': first.standard_error,
    'log_z_ess': first.ess,
    'largest_share': first.largest_share,
    'agree': agree,
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
