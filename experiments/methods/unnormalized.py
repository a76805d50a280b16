"""What the programs of unnormalized models share: flags, estimators, lanes."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import optlab

from ..lab import devices
from ..lab import flags
from ..problems import densities
from ..problems import plane_noise

METHODS = ('meco', 'meco_ratio', 'snis', 'nce', 'ence', 'cd')
PROBLEMS = ('plane', 'mean', 'landscape')
CHAIN_STEP_SIZE, CHAIN_STEPS = 0.01, 10  # Contrastive divergence.
OPTIMIZERS = {
  'adam': optax.scale_by_adam,
  'amsgrad': optax.scale_by_amsgrad,
  'diffgrad': optlab.first_order.scale_by_diffgrad,
  'momentum': lambda: optax.trace(0.9),
  'normalized': lambda: optax.chain(
    optlab.normalized_momentum(1.0, beta=0.0), optax.scale(-1.0)
  ),
  'sgd': optax.identity,
}
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags of the program."""

  QUICK = {
    'sets': ('8gaussians', 'moons'),
    'distances': (4.0, 16.0),
    'learning_rates': (0.01, 0.03),
    'steps': 400,
    'seeds': 2,
    'tuning_seeds': 1,
  }
  MINUTES = (1, 8)

  problem: str = flags.flag('plane', 'What to run.', choices=PROBLEMS)
  sets: tuple[str, ...] = flags.flag(
    densities.NAMES, 'plane: the distributions.', choices=densities.NAMES
  )
  distances: tuple[float, ...] = flags.flag(
    (4.0, 8.0, 16.0), 'mean, landscape: distances of the mean.', low=0.1
  )
  methods: tuple[str, ...] = flags.flag(
    ('meco', 'nce'),
    f'Methods, of {", ".join(METHODS)}; snis is meco with gamma=1, meco:0.3'
    ' meco with that gamma, cd contrastive divergence (plane only).',
  )
  noises: tuple[str, ...] = flags.flag(
    ('mixture',),
    'plane: noise distributions.',
    choices=plane_noise.NOISES,
  )
  sampling: tuple[str, ...] = flags.flag(
    ('lattice',),
    'How noise is drawn; the mean takes the first.',
    choices=('independent', 'lattice'),
  )
  learning_rates: tuple[float, ...] = flags.flag(
    (0.01, 0.02, 0.04),
    'Where the grid begins; every method gets all of it.',
    low=0.0,
  )
  optimizer: str = flags.flag(
    'auto',
    'What takes the gradients; auto is adam in the plane, and for the mean sgd,'
    ' or normalized descent for eNCE.',
    choices=('auto', *OPTIMIZERS),
  )
  decay: str = flags.flag(
    'cosine',
    'Of the learning rate: to zero by a cosine, or as rate / (1 + rate t / 3),'
    ' which averages over all steps where the curvature is one.',
    choices=('cosine', 'inverse'),
  )
  gamma: float = flags.flag(
    0.1, 'Weight of the newest batch in MECO.', low=1e-6
  )
  steps: int = flags.flag(2000, 'Steps.', low=1)
  data_rows: int = flags.flag(256, 'Rows of data in a batch.', low=1)
  noise_rows: int = flags.flag(256, 'Rows of noise in a batch.', low=1)
  seeds: int = flags.flag(
    5, 'Number of seeds, 0 to seeds - 1.', low=1, grows=True
  )
  tuning_seeds: int = flags.flag(
    2, 'Seeds that pick rates, with data of their own.', low=1, grows=True
  )
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )

  def __post_init__(self):
    super().__post_init__()
    for method in self.methods:
      name, gamma = parse_method(method, self.gamma)
      if name not in METHODS or (':' in method and name != 'meco'):
        raise flags.UserError(
          f'--methods={method}: not one of {", ".join(METHODS)} or meco:GAMMA'
        )
      if not 0 < gamma <= 1:
        raise flags.UserError(f'{method}, gamma={gamma}: must be in (0, 1]')
      if name == 'cd' and self.problem == 'mean':
        raise flags.UserError(
          '--methods=cd: the mean has no chains, leave it out'
        )
    for noise in self.noises:
      if 'lattice' in self.sampling and noise not in plane_noise.WITH_LATTICE:
        raise flags.UserError(
          f'--noises={noise} has no lattice: set --sampling=independent'
        )


def parse_method(method: str, gamma: float) -> tuple[str, float]:
  """The name and gamma of ``meco:0.3`` and the like."""
  name, _, number = method.partition(':')
  try:
    return name, float(number) if number else gamma
  except ValueError as error:
    raise flags.UserError(f'--methods={method}: {error}') from error


def estimator_and_start(
  method: str, log_density: Callable, params: Any, log_z: float, gamma: float
) -> tuple[optlab.GradientEstimator, Any]:
  """An estimator, and its starting parameters."""
  method, gamma = parse_method(method, gamma)
  if method == 'cd':
    estimator = optlab.contrastive_divergence(
      log_density, CHAIN_STEP_SIZE, CHAIN_STEPS
    )
    return estimator, params
  if method in ('nce', 'ence'):
    make = getattr(optlab.unnormalized, method)
    start = optlab.unnormalized.NceParams(params, jnp.asarray(log_z, float))
    return make(optlab.unnormalized.with_log_normalizer(log_density)), start
  estimator = optlab.meco(
    log_density,
    1.0 if method == 'snis' else gamma,
    ratio_correction=method == 'meco_ratio',
  )
  return estimator, params


def model_params(params: Any) -> Any:
  """The model's parameters, of a method that has a normalizer or has none."""
  if isinstance(params, optlab.unnormalized.NceParams):
    return params.model
  return params


def optimizer(
  method: str, learning_rate: Any, config: Config
) -> optax.GradientTransformation:
  """The optimizer of the flag, with a decaying learning rate."""
  decay: optax.Schedule = optax.cosine_decay_schedule(1.0, config.steps)
  if config.decay == 'inverse':
    decay = lambda count: 1 / (1 + learning_rate * count / 3)
  name = config.optimizer
  if name == 'auto':
    if config.problem == 'plane':
      name = 'adam'
    else:
      name = 'normalized' if method == 'ence' else 'sgd'
  return optax.chain(
    OPTIMIZERS[name](),
    optax.scale_by_schedule(decay),
    optax.scale(-learning_rate),
  )


def ess_of(state: Any) -> jax.Array:
  """The effective sample size that MECO reports; NCE has none."""
  found = optax.tree.get(state, 'ess', None)
  return jnp.asarray(jnp.nan if found is None else found)


def panels(config: Config, **options: Any) -> tuple[Any, Any]:
  """A figure with a panel for each distance of the mean."""
  count = len(config.distances)
  figure, axes = plt.subplots(
    1, count, figsize=(4.2 * count, 3.6), squeeze=False, layout='constrained',
    **options,
  )  # fmt: skip
  return figure, axes[0]
