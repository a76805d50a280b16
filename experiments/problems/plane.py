"""A density in the plane, learned with noise: a problem of the study."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optlab

from ..lab import devices
from ..lab import flags
from ..lab import study
from ..methods import unnormalized
from . import densities
from . import plane_noise

# log Z: midpoints, then half spacing, then 1.5 x box; finer where these differ.
BOX, CELLS = 7.0, (200, 400, 800)
AVERAGE = 0.02  # Weight of a step in the effective sample size shown.


class State(NamedTuple):
  """One lane."""

  train: optlab.TrainState
  place: jax.Array  # Of its seed's data.
  noise: Any  # What the noise distribution has adapted to, or None.
  ess: jax.Array  # Average of the last steps.


def problem(
  config: unnormalized.Config,
  name: str,
  kind: str = 'mixture',
  sampling: str = 'lattice',
  *,
  watched: bool = False,
) -> study.Problem:
  """Held-out divergence from a distribution, by the flags of the program.

  Args:
    config: The flags.
    name: The distribution.
    kind: Its noise, of `plane_noise.NOISES`.
    sampling: ``independent`` or ``lattice``.
    watched: Whether the divergence is taken at every look, not at the end.

  Returns:
    The problem. Each seed has data and noise of its own, those that pick the
    rates too; of seeds beyond those of the flags those of the last.
  """
  # Those that pick the rates from the end, so that a run may have more seeds.
  tuning = [study.TUNING_SEED + i for i in range(config.tuning_seeds)]
  seeds = (*range(config.seeds), *reversed(tuning))
  data = plane_noise.plane(name, kind, seeds)
  rows = config.data_rows + config.noise_rows

  @functools.partial(jax.jit, static_argnums=2)
  def score(params, place, cells):
    model = functools.partial(densities.log_density, params)
    corner = np.full(2, BOX)
    log_z = optlab.unnormalized.grid_log_partition(
      model, -corner, corner, cells
    )
    mean = jnp.mean(model(data.test[place]))
    return {
      'value': data.negative_entropy[place] + log_z.value - mean,
      'spacing_error': log_z.spacing_error,
      'box_error': log_z.box_error,
    }

  def measure(state, _):
    if not watched:
      return {'ess': state.ess}
    params = unnormalized.model_params(state.train.params)
    value = score(params, state.place, CELLS[0])['value']
    return {'tuning': value, 'value': value}

  def finish(state, seed):
    del seed
    params, cells, values = unnormalized.model_params(state.train.params), 0, {}
    for cells in CELLS:  # A sharp density needs a fine grid.
      values = jax.device_get(score(params, state.place, cells))
      if np.isfinite(values['value']):
        break
    return values | {'cells': cells, 'tuning': values['value']}

  return study.Problem(
    lambda method: _entry(config, data, kind, sampling, method),
    config.methods, config.learning_rates, rows * config.steps,
    'rows of data and noise', measure, 'held-out divergence, nats',
    finish=None if watched else finish,
  )  # fmt: skip


def _entry(
  config: unnormalized.Config, data: Any, kind: str, sampling: str, method: str
) -> study.Entry:
  """A method on these sets; the noise may adapt to the model."""
  if unnormalized.parse_method(method, 1.0)[0] not in unnormalized.METHODS:
    raise flags.UserError(
      f'--methods={method}: not one of {", ".join(unnormalized.METHODS)}'
    )

  def parts(rate, key):
    estimator, params = unnormalized.estimator_and_start(
      method, densities.log_density, densities.init_mlp(key),
      math.log(8 * math.pi), config.gamma,
    )  # fmt: skip
    return estimator, unnormalized.optimizer(method, rate, config), params

  def start(key, rate, seed, _):
    own = jnp.minimum(seed - study.TUNING_SEED, config.tuning_seeds - 1)
    place = jnp.minimum(seed, config.seeds - 1)
    place = jnp.where(own < 0, place, -1 - own)
    noise = jax.tree.map(lambda leaf: leaf[place], data.noise)
    keys = jax.random.split(key, 3)
    estimator, tx, params = parts(rate, keys[0])
    chains = ()
    if method == 'cd':
      chains = keys[1], noise.sample(keys[2], config.noise_rows)
    train = optlab.init(params, estimator, tx, *chains)
    adapting = noise if kind == 'adaptive' else None
    return State(train, place, adapting, jnp.full((), jnp.nan))

  def step(state, key, rate, _):
    estimator, tx, _ = parts(rate, key)
    fixed = jax.tree.map(lambda leaf: leaf[state.place], data.noise)
    noise = fixed if state.noise is None else state.noise
    draw = noise.sample if sampling == 'independent' else noise.sample_lattice
    row_key, noise_key = jax.random.split(key)
    shape = (config.data_rows,)
    index = jax.random.randint(row_key, shape, 0, data.train.shape[1])
    picked = data.train[state.place, index]
    drawn = draw(noise_key, config.noise_rows)
    batch = optlab.NoiseBatch(
      picked,
      drawn,
      noise.log_prob(drawn),
      data.noise_of_train[state.place, index]
      if state.noise is None
      else noise.log_prob(picked),
    )
    adapting = state.noise
    if adapting is not None:
      model = unnormalized.model_params(state.train.params)
      log_p = densities.log_density(model, drawn)
      adapting = plane_noise.adapt(noise, drawn, log_p - batch.noise_log_prob)
    train, _ = optlab.train_step(estimator, tx)(
      state.train, devices.split(batch)
    )
    found = jnp.asarray(unnormalized.ess_of(train.estimator_state), float)
    ess = state.ess + AVERAGE * (found - state.ess)
    ess = jnp.where(jnp.isnan(state.ess), found, ess)
    return State(train, state.place, adapting, ess)

  return study.Entry(start, step, config.data_rows + config.noise_rows)
