"""MECO beside NCE and eNCE on densities whose answers are known.

Three problems. ``plane``: an MLP energy on six distributions in two dimensions,
scored by the held-out Kullback-Leibler divergence with log Z integrated on a
checked grid. ``mean``: a Gaussian's natural parameter at a distance from where
the noise starts, with noise that follows data and model. ``landscape``: the
population losses of the three methods along the parameter, and their curvature.

  python -m experiments.density_estimation
  python -m experiments.density_estimation --problem=mean --learning_rates=0.05
  python -m experiments.density_estimation --problem=landscape
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy import stats

from experiments import app
from experiments import densities
from experiments import devices
from experiments import plane_noise
from experiments import plot
from experiments import report
from experiments import runner
import optlab

METHODS = ('meco', 'meco_ratio', 'snis', 'nce', 'ence', 'cd')
PROBLEMS = ('plane', 'mean', 'landscape')
# log Z: midpoints, then half spacing, then 1.5 x box; finer where these differ.
BOX, CELLS = 7.0, (200, 400, 800)
CHAIN_STEP_SIZE, CHAIN_STEPS = 0.01, 10  # Contrastive divergence.
PICTURE_CELLS, PICTURE_HALF_WIDTH = 72, 3.2
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags of the program."""

  problem: str = app.flag('plane', 'What to run.', choices=PROBLEMS)
  sets: tuple[str, ...] = app.flag(
    densities.NAMES, 'plane: the distributions.', choices=densities.NAMES
  )
  distances: tuple[float, ...] = app.flag(
    (4.0, 8.0, 16.0), 'mean, landscape: distances of the mean.', low=0.1
  )
  methods: tuple[str, ...] = app.flag(
    ('meco', 'nce'),
    f'Methods, of {", ".join(METHODS)}; snis is meco with gamma=1, meco:0.3'
    ' meco with that gamma, cd contrastive divergence (plane only).',
  )
  noises: tuple[str, ...] = app.flag(
    ('mixture',),
    'plane: noise distributions.',
    choices=plane_noise.NOISES,
  )
  sampling: tuple[str, ...] = app.flag(
    ('lattice',),
    'How noise is drawn; the mean takes the first.',
    choices=('independent', 'lattice'),
  )
  learning_rates: tuple[float, ...] = app.flag(
    (0.01, 0.02, 0.04), 'The grid; every method gets all of it.', low=0.0
  )
  decay: str = app.flag(
    'cosine',
    'Of the learning rate: to zero by a cosine, or as rate / (1 + rate t / 3),'
    ' which averages over all steps where the curvature is one.',
    choices=('cosine', 'inverse'),
  )
  gamma: float = app.flag(0.1, 'Weight of the newest batch in MECO.', low=1e-6)
  steps: int = app.flag(2000, 'Steps.', low=1)
  data_rows: int = app.flag(256, 'Rows of data in a batch.', low=1)
  noise_rows: int = app.flag(256, 'Rows of noise in a batch.', low=1)
  seeds: int = app.flag(5, 'Number of seeds, 0 to seeds - 1.', low=1)
  precision: str = app.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )

  def __post_init__(self):
    super().__post_init__()
    for method in self.methods:
      name, gamma = parse_method(method, self.gamma)
      if name not in METHODS or (':' in method and name != 'meco'):
        raise app.UserError(
          f'--methods={method}: not one of {", ".join(METHODS)} or meco:GAMMA'
        )
      if not 0 < gamma <= 1:
        raise app.UserError(f'{method}, gamma={gamma}: must be in (0, 1]')
      if name == 'cd' and self.problem == 'mean':
        raise app.UserError(
          '--methods=cd: the mean has no chains, leave it out'
        )
    for noise in self.noises:
      if 'lattice' in self.sampling and noise not in plane_noise.WITH_LATTICE:
        raise app.UserError(
          f'--noises={noise} has no lattice: set --sampling=independent'
        )


def parse_method(method: str, gamma: float) -> tuple[str, float]:
  """The name and gamma of ``meco:0.3`` and the like."""
  name, _, number = method.partition(':')
  try:
    return name, float(number) if number else gamma
  except ValueError as error:
    raise app.UserError(f'--methods={method}: {error}') from error


class Lane(NamedTuple):
  """One seed at one learning rate."""

  train: optlab.TrainState
  key: jax.Array
  learning_rate: jax.Array
  noise: Any  # What the noise distribution has adapted to, or None.
  ess: jax.Array  # Sum of the effective sample sizes of a piece.


def estimator_and_start(
  method: str, log_density: Callable, params: Any, log_z: float, gamma: float
) -> tuple[optlab.GradientEstimator, Any, Callable[[Any], Any]]:
  """An estimator, its starting parameters, and how to find the model's."""
  method, gamma = parse_method(method, gamma)
  if method == 'cd':
    estimator = optlab.contrastive_divergence(
      log_density, CHAIN_STEP_SIZE, CHAIN_STEPS
    )
    return estimator, params, lambda params: params
  if method in ('nce', 'ence'):
    make = getattr(optlab, method)
    start = optlab.NceParams(params, jnp.asarray(log_z, float))
    estimator = make(optlab.with_log_normalizer(log_density))
    return estimator, start, lambda params: params.model
  estimator = optlab.meco(
    log_density,
    1.0 if method == 'snis' else gamma,
    ratio_correction=method == 'meco_ratio',
  )
  return estimator, params, lambda params: params


def optimizer(
  method: str, learning_rate: Any, config: Config, adam: bool
) -> optax.GradientTransformation:
  """Adam, SGD, or for eNCE normalized descent, with a decaying rate."""
  decay: optax.Schedule = optax.cosine_decay_schedule(1.0, config.steps)
  if config.decay == 'inverse':
    decay = lambda count: 1 / (1 + learning_rate * count / 3)
  if adam:
    direction = optax.scale_by_adam()
  elif method == 'ence':
    direction = optlab.normalized_descent(-1.0)
  else:
    direction = optax.identity()
  return optax.chain(
    direction, optax.scale_by_schedule(decay), optax.scale(-learning_rate)
  )


def ess_of(state: Any) -> jax.Array:
  """The effective sample size that MECO reports; NCE has none."""
  found = optax.tree.get(state, 'ess', None)
  return jnp.asarray(jnp.nan if found is None else found)


# The plane.


def _grid_points(half_width: float, cells: int) -> jax.Array:
  side = (np.arange(cells) + 0.5) / cells * 2 * half_width - half_width
  points = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
  return jnp.asarray(points, float)


def run_plane(session: runner.Session, config: Config) -> None:
  """Trains every method on every set, all lanes of one in one program."""
  for name, kind, sampling, method in itertools.product(
    config.sets, config.noises, config.sampling, config.methods
  ):
    _run_plane_method(session, config, name, kind, sampling, method)


def _run_plane_method(session, config, name, kind, sampling, method) -> None:
  label = f'{name}/{kind}/{sampling}/{method}'
  if session.select('surface', method=label):
    return
  data = plane_noise.plane(name, kind, config.seeds)
  rates = jnp.repeat(jnp.asarray(config.learning_rates), config.seeds)
  seeds = jnp.tile(jnp.arange(config.seeds), len(config.learning_rates))

  def parts(learning_rate, key):
    estimator, params, model_of = estimator_and_start(
      method,
      densities.log_density,
      densities.init_mlp(key),
      math.log(8 * math.pi),
      config.gamma,
    )
    tx = optimizer(method, learning_rate, config, adam=True)
    return estimator, tx, params, model_of

  def begin(seed, learning_rate):
    init_key, key = jax.random.split(jax.random.key(seed))
    estimator, tx, params, _ = parts(learning_rate, init_key)
    noise = jax.tree.map(lambda leaf: leaf[seed], data.noise)
    chains = ()
    if method == 'cd':
      chain_key, draw_key, key = jax.random.split(key, 3)
      chains = chain_key, noise.sample(draw_key, config.noise_rows)
    state = optlab.init(params, estimator, tx, *chains)
    adapting = noise if kind == 'adaptive' else None
    return Lane(state, key, learning_rate, adapting, jnp.zeros(()))

  every = math.gcd(config.steps, 100)

  def advance_lane(args):
    lane, seed = args
    estimator, tx, _, model_of = parts(lane.learning_rate, lane.key)
    step = optlab.train_step(estimator, tx)
    rows, log_q = data.train[seed], data.noise_of_train[seed]
    fixed = jax.tree.map(lambda leaf: leaf[seed], data.noise)

    def body(carry, _):
      state, key, adapting, ess = carry
      noise = fixed if adapting is None else adapting
      draw = noise.sample if sampling == 'independent' else noise.sample_lattice
      key, row_key, noise_key = jax.random.split(key, 3)
      index = jax.random.randint(row_key, (config.data_rows,), 0, rows.shape[0])
      drawn = draw(noise_key, config.noise_rows)
      batch = optlab.NoiseBatch(
        rows[index],
        drawn,
        noise.log_prob(drawn),
        log_q[index] if adapting is None else noise.log_prob(rows[index]),
      )
      if adapting is not None:
        log_p = densities.log_density(model_of(state.params), drawn)
        adapting = plane_noise.adapt(noise, drawn, log_p - batch.noise_log_prob)
      state, _ = step(state, devices.split(batch))
      return (state, key, adapting, ess + ess_of(state.estimator_state)), None

    carry = (lane.train, lane.key, lane.noise, jnp.zeros(()))
    (state, key, adapting, ess), _ = jax.lax.scan(body, carry, length=every)
    return Lane(state, key, lane.learning_rate, adapting, ess)

  # One lane after the other: on a CPU faster than batched small matrices.
  advance = lambda lanes: jax.lax.map(advance_lane, (lanes, seeds))

  @functools.partial(jax.jit, static_argnums=2)
  def score(lane, seed, cells):
    model_of = parts(lane.learning_rate, lane.key)[-1]
    model = functools.partial(
      densities.log_density, model_of(lane.train.params)
    )
    corner = np.full(2, BOX)
    log_z = optlab.grid_log_partition(model, -corner, corner, cells)
    kl = data.negative_entropy[seed] - jnp.mean(model(data.test[seed]))
    return {
      'kl': kl + log_z.value,
      'spacing_error': log_z.spacing_error,
      'box_error': log_z.box_error,
    }

  def evaluate(lanes):
    step = int(lanes.train.step[0])
    return {
      'learning_rate': lanes.learning_rate,
      'ess': lanes.ess / every if step else np.full(len(seeds), np.nan),
      'gradients': step,
      'samples': step * (config.data_rows + config.noise_rows),
    }

  lanes = session.run(
    label,
    jax.jit(jax.vmap(begin))(seeds, rates),
    advance,
    evaluate,
    steps=config.steps,
    every=every,
    seeds=tuple(int(seed) for seed in seeds),
    show='ess',
    keep_state=True,
    set=name,
    noise=kind,
    sampling=sampling,
    algorithm=method,
  )
  for i, seed in enumerate(seeds):
    lane = jax.tree.map(lambda leaf, i=i: leaf[i], lanes)
    where = {
      'method': label, 'seed': int(seed),
      'learning_rate': float(lane.learning_rate),
    }  # fmt: skip
    if session.select('score', **where):
      continue
    for cells in CELLS:  # A sharp density needs a fine grid.
      values = score(lane, seed, cells)
      if jnp.isfinite(values['kl']):
        break
    session.write('score', **where, cells=cells, **values)
  best = best_rate(session.rows, label)
  lane = config.learning_rates.index(best) * config.seeds
  model_of = parts(best, jax.random.key(0))[-1]
  params = model_of(jax.tree.map(lambda leaf: leaf[lane], lanes.train.params))
  points = _grid_points(PICTURE_HALF_WIDTH, PICTURE_CELLS)
  session.write(
    'surface',
    method=label,
    set=name,
    algorithm=method,
    learning_rate=best,
    log_density=np.round(densities.log_density(params, points), 2),
  )


def final_kls(
  rows: Sequence[dict], label: str
) -> dict[float, dict[int, float]]:
  """Held-out divergence by learning rate and seed."""
  found: dict[float, dict[int, float]] = {}
  for row in rows:
    if row['kind'] == 'score' and row['method'] == label:
      rate = float(f'{row["learning_rate"]:.6g}')
      found.setdefault(rate, {})[row['seed']] = row['kl']
  return found


def best_rate(rows: Sequence[dict], label: str) -> float:
  """The learning rate with the lowest median; refused figures are worst."""
  kls = final_kls(rows, label)
  return min(
    kls,
    key=lambda rate: np.median(
      np.nan_to_num(list(kls[rate].values()), nan=math.inf)
    ),
  )


def verdict(differences: Sequence[float] | np.ndarray) -> tuple[str, str]:
  """A paired t test at 95 %: the interval of the mean, and what it says.

  A win is the first method's.
  A tie is an interval that holds zero, no proof that the two are equal: read
  the interval's width beside it.
  """
  values = np.asarray(differences)
  if len(values) < 2 or not np.all(np.isfinite(values)):
    return '-', '-'
  error = np.std(values, ddof=1) / math.sqrt(len(values))
  half = float(stats.t.ppf(0.975, len(values) - 1)) * error
  low, high = np.mean(values) - half, np.mean(values) + half
  said = 'win' if low > 0 else 'loss' if high < 0 else 'tie'
  return f'{low:+.1e} to {high:+.1e}', said


def report_plane(rows: Sequence[dict], config: Config) -> None:
  """Two tables: each method at its best rate, paired by seed; and the grid."""
  summary, grid = [], []
  for name, kind, sampling in itertools.product(
    config.sets, config.noises, config.sampling
  ):
    first: dict[int, float] = {}
    for method in config.methods:
      label = f'{name}/{kind}/{sampling}/{method}'
      kls = final_kls(rows, label)
      best = best_rate(rows, label)
      mine = kls[best]
      where = f'{name}, {kind}, {sampling}'
      grid.append(
        [where, method] + [np.median(list(kls[rate].values())) for rate in kls]
      )
      paired = ['-'] * 4
      if not first:
        first = mine
      else:
        pairs = [mine[seed] - first[seed] for seed in first]
        wins = f'{sum(pair > 0 for pair in pairs)} of {len(pairs)}'
        paired = [wins, float(np.median(pairs)), *verdict(pairs)]
      values = list(mine.values())
      middle = [float(f(values)) for f in (np.median, np.min, np.max)]
      summary.append([where, method, best, *middle, *paired])
  report.show(
    f'Held-out divergence in nats, {config.seeds} seeds, {config.steps} steps,'
    f' each at its best learning rate; differences to {config.methods[0]},'
    ' paired by seed, its win, tie or loss by a t test at 95 %',
    [
      'set, noise, sampling', 'method', 'rate', 'median', 'low', 'high',
      f'{config.methods[0]} wins', 'median difference', '95 % of the mean',
      'verdict',
    ],
    summary,
  )  # fmt: skip
  report.show(
    'Median divergence by learning rate',
    ['set, noise, sampling', 'method']
    + [f'{rate:g}' for rate in config.learning_rates],
    grid,
  )


def draw_plane(rows: Sequence[dict], config: Config, folder: Any) -> list[str]:
  """Densities beside data, energy surfaces, and ESS over training."""
  surfaces = [row for row in rows if row['kind'] == 'surface']
  methods = list(dict.fromkeys(row['algorithm'] for row in surfaces))
  sets = list(dict.fromkeys(row['set'] for row in surfaces))
  extent = (-PICTURE_HALF_WIDTH, PICTURE_HALF_WIDTH) * 2
  for picture in ('densities', 'energies'):
    figure, panels = plt.subplots(
      len(methods) + 1,
      len(sets),
      figsize=(2.2 * len(sets), 2.2 * (len(methods) + 1)),
      squeeze=False,
      layout='constrained',
    )
    for axes in panels.flat:
      axes.set(xticks=[], yticks=[])
    for i, name in enumerate(sets):
      distribution = densities.distribution(name)
      points = distribution.sample(jax.random.key(0), 4000)
      panels[0, i].scatter(*np.asarray(points).T, s=0.4, lw=0, color='k')
      panels[0, i].set(
        xlim=extent[:2], ylim=extent[:2], title=name, aspect='equal'
      )
      for j, method in enumerate(methods):
        chosen = [
          row
          for row in surfaces
          if row['set'] == name and row['algorithm'] == method
        ]
        if not chosen:
          continue
        surface = np.asarray(chosen[-1]['log_density'])
        surface = surface.reshape(PICTURE_CELLS, PICTURE_CELLS)
        surface = surface - surface.max()
        shown = np.exp(surface) if picture == 'densities' else -surface
        panels[j + 1, i].imshow(
          shown,
          origin='lower',
          extent=extent,
          cmap='magma' if picture == 'densities' else 'viridis',
          vmin=0,
          vmax=None if picture == 'densities' else 12,
        )
    for axes, text in zip(panels[:, 0], ['data', *methods], strict=True):
      axes.set_ylabel(text)
    what = 'density' if picture == 'densities' else 'energy, clipped at 12 nats'
    plot.save(
      figure,
      folder / f'{picture}.png',
      title=f'model {what}, seed 0, best learning rate',
    )
  pictures = ['densities.png', 'energies.png']
  figure, panels = plt.subplots(
    1,
    len(sets),
    figsize=(2.6 * len(sets), 3.2),
    squeeze=False,
    sharey=True,
    layout='constrained',
  )
  for axes, name in zip(panels[0], sets, strict=True):
    for label in plot.methods([row for row in rows if row.get('set') == name]):
      xs, middle, low, high = plot.curves(rows, label, 'step', 'ess')
      shown = np.isfinite(middle)
      if not np.any(shown):
        continue
      part = label.removeprefix(f'{name}/')
      axes.plot(xs[shown], middle[shown] / config.noise_rows, label=part)
      low, high = (end[shown] / config.noise_rows for end in (low, high))
      axes.fill_between(xs[shown], low, high, alpha=0.15)
    axes.set(title=name, xlabel='steps', ylim=(0, 1))
  panels[0, 0].set_ylabel('effective sample size / noise rows')
  handles, labels = panels[0, 0].get_legend_handles_labels()
  if not handles:
    plt.close(figure)
    return pictures
  figure.legend(handles, labels, loc='outside lower center', ncols=4)
  title = 'median and range over seeds and learning rates'
  plot.save(figure, folder / 'ess.png', title=title)
  return [*pictures, 'ess.png']


# A Gaussian's mean far away.


def natural(theta: jax.Array, rows: jax.Array) -> jax.Array:
  """N(theta, 1) by its natural parameter: its log Z is theta^2 / 2."""
  return theta * rows[:, 0] - rows[:, 0] ** 2 / 2


class Bridge(NamedTuple):
  """Noise that starts as N(0, 1): a part follows the model, one the data."""

  of_model: optlab.noise.Gaussian
  of_data: optlab.noise.Gaussian
  start: optlab.noise.Gaussian

  def mixture(self) -> optlab.noise.GaussianMixture:
    parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *self)
    weights = jnp.log(jnp.asarray([0.45, 0.45, 0.1], float))
    return optlab.noise.GaussianMixture(weights, *parts)

  def adapt(self, theta: jax.Array, batch: optlab.NoiseBatch) -> 'Bridge':
    log_w = natural(theta, batch.noise) - batch.noise_log_prob
    return self._replace(
      of_model=optlab.follow(self.of_model, batch.noise, 0.5, log_w, floor=0.3),
      of_data=optlab.follow(self.of_data, batch.data, 0.1),
    )


def run_mean(session: runner.Session, config: Config) -> None:
  """Trains every method at every distance, with adaptive noise."""
  rates = jnp.repeat(jnp.asarray(config.learning_rates), config.seeds)
  seeds = tuple(range(config.seeds)) * len(config.learning_rates)
  every = math.gcd(config.steps, 50)
  for distance, method in itertools.product(config.distances, config.methods):

    def parts(learning_rate, method=method):
      estimator, params, model_of = estimator_and_start(
        method, natural, jnp.zeros(()), HALF_LOG_2PI, config.gamma
      )
      tx = optimizer(method, learning_rate, config, adam=False)
      return estimator, tx, params, model_of

    def begin(seed, learning_rate, parts=parts):
      estimator, tx, params, _ = parts(learning_rate)
      standard = optlab.gaussian(jnp.zeros(1), jnp.eye(1))
      return Lane(
        optlab.init(params, estimator, tx),
        jax.random.key(seed),
        learning_rate,
        Bridge(standard, standard, standard),
        jnp.zeros(()),
      )

    def advance_lane(lane, parts=parts, distance=distance):
      estimator, tx, _, model_of = parts(lane.learning_rate)
      step = optlab.train_step(estimator, tx)

      def body(carry, _):
        state, key, bridge, _ = carry
        key, row_key, noise_key = jax.random.split(key, 3)
        data = distance + jax.random.normal(row_key, (config.data_rows, 1))
        noise = bridge.mixture()
        lattice = config.sampling[0] == 'lattice'
        draw = noise.sample_lattice if lattice else noise.sample
        drawn = draw(noise_key, config.noise_rows)
        batch = optlab.NoiseBatch(
          data, drawn, noise.log_prob(drawn), noise.log_prob(data)
        )
        bridge = bridge.adapt(model_of(state.params), batch)
        state, _ = step(state, batch)
        ess = jnp.asarray(ess_of(state.estimator_state), float)
        return (state, key, bridge, ess), None

      carry = (lane.train, lane.key, lane.noise, lane.ess)
      (state, key, bridge, ess), _ = jax.lax.scan(body, carry, length=every)
      return Lane(state, key, lane.learning_rate, bridge, ess)

    def evaluate(lanes, parts=parts, distance=distance):
      model_of = parts(0.0)[-1]
      theta = model_of(lanes.train.params)
      step = int(lanes.train.step[0])
      return {
        'learning_rate': lanes.learning_rate,
        'theta': theta,
        'error': jnp.abs(theta - distance),
        'ess': lanes.ess,
        'gradients': step,
        'samples': step * (config.data_rows + config.noise_rows),
      }

    session.run(
      f'distance {distance:g}: {method}',
      jax.jit(jax.vmap(begin))(jnp.asarray(seeds), rates),
      jax.vmap(advance_lane),
      evaluate,
      steps=config.steps,
      every=every,
      seeds=seeds,
      show='error',
      distance=distance,
      algorithm=method,
    )


def report_mean(rows: Sequence[dict], config: Config) -> None:
  """Error of the last parameter, at the learning rate that did best."""
  table = []
  for distance, method in itertools.product(config.distances, config.methods):
    by_rate: dict[float, list[float]] = {}
    for row in rows:
      key = [row.get(name) for name in ('step', 'distance', 'algorithm')]
      if row['kind'] == 'eval' and key == [config.steps, distance, method]:
        rate = float(f'{row["learning_rate"]:.6g}')
        by_rate.setdefault(rate, []).append(row['error'])
    finite = lambda errors: np.nan_to_num(errors, nan=math.inf).tolist()
    best = min(
      by_rate, key=lambda rate, by=by_rate: np.median(finite(by[rate]))
    )
    errors = finite(by_rate[best])
    table.append([
      f'{distance:g}', method, best,
      float(np.median(errors)), min(errors), max(errors),
    ])  # fmt: skip
  report.show(
    f'|theta - mean| after {config.steps} steps, {config.seeds} seeds, natural'
    ' parametrization, adaptive noise from N(0, 1)',
    ['distance', 'method', 'rate', 'median', 'low', 'high'],
    table,
  )


def draw_mean(rows: Sequence[dict], config: Config, folder: Any) -> list[str]:
  """The error over training, a panel a distance."""
  figure, panels = plt.subplots(
    1,
    len(config.distances),
    figsize=(4.2 * len(config.distances), 3.6),
    squeeze=False,
    sharey=True,
    layout='constrained',
  )
  for axes, distance in zip(panels[0], config.distances, strict=True):
    mine = [row for row in rows if row.get('distance') == distance]
    plot.draw_lines(
      axes, [('', mine)], 'step', 'error', log_x=False, floor=1e-4
    )
    axes.set(title=f'distance {distance:g}', ylabel='|theta - mean|')
    axes.legend(fontsize=6)
    axes.label_outer()
  plot.save(figure, folder / 'mean.png')
  return ['mean.png']


# Population losses.


def run_landscape(session: runner.Session, config: Config) -> None:
  """The three losses along theta, with the normalizer at its optimum."""
  for distance in config.distances:
    # Wide enough for both distributions and the overlap between them.
    x = jnp.linspace(-12.0, distance + 12.0, 6001)
    width = x[1] - x[0]
    log_data = -((x - distance) ** 2) / 2 - HALF_LOG_2PI
    log_noise = -(x**2) / 2 - HALF_LOG_2PI
    log_q = log_noise + jnp.log(width)
    p, q = jnp.exp(log_data) * width, jnp.exp(log_q)

    def log_ratio(vector, x=x, log_noise=log_noise):
      theta, log_z = vector
      return theta * x - x**2 / 2 - log_z - log_noise

    def likelihood(vector, p=p, x=x):
      theta, _ = vector
      return theta**2 / 2 + HALF_LOG_2PI - p @ (theta * x - x**2 / 2)

    def nce(vector, p=p, q=q, log_ratio=log_ratio):
      h = log_ratio(vector)
      return p @ jax.nn.softplus(-h) + q @ jax.nn.softplus(h)

    def ence(vector, p=p, log_q=log_q, log_ratio=log_ratio):
      # exp(+-h/2) overflows where the other factor underflows.
      h = log_ratio(vector)
      log_p = jnp.log(jnp.maximum(p, 1e-300))
      noise_term = jnp.sum(jnp.exp(log_q + h / 2))
      return 0.5 * (jnp.sum(jnp.exp(log_p - h / 2)) + noise_term)

    optimum = jnp.asarray([distance, distance**2 / 2 + HALF_LOG_2PI])
    thetas = jnp.linspace(0.0, 1.5 * distance, 121)
    vectors = jnp.stack([thetas, thetas**2 / 2 + HALF_LOG_2PI], 1)
    for name, loss in (
      ('likelihood', likelihood),
      ('nce', nce),
      ('ence', ence),
    ):
      hessian = np.asarray(jax.hessian(loss)(optimum))
      curvature = hessian[0, 0]
      if name != 'likelihood':
        curvature -= hessian[0, 1] ** 2 / hessian[1, 1]
      session.write(
        'landscape',
        distance=distance,
        loss=name,
        curvature=float(curvature),
        theta=thetas,
        value=jax.jit(jax.vmap(loss))(vectors),
      )


def report_landscape(rows: Sequence[dict], config: Config) -> None:
  """The curvature in theta at the optimum, normalizer profiled out."""
  report.show(
    'Curvature of the population loss in theta at its optimum, q = N(0, 1)',
    ['distance', 'likelihood', 'nce', 'ence'],
    [
      [f'{distance:g}']
      + [
        f'{row["curvature"]:.3g}'
        for row in rows
        if row['kind'] == 'landscape' and row['distance'] == distance
      ]
      for distance in config.distances
    ],
  )


def draw_landscape(
  rows: Sequence[dict], config: Config, folder: Any
) -> list[str]:
  """The losses above their minimum, a panel a distance."""
  figure, panels = plt.subplots(
    1,
    len(config.distances),
    figsize=(4.2 * len(config.distances), 3.6),
    squeeze=False,
    layout='constrained',
  )
  for axes, distance in zip(panels[0], config.distances, strict=True):
    for row in rows:
      if row['kind'] == 'landscape' and row['distance'] == distance:
        value = np.asarray(row['value']) - np.min(row['value'])
        axes.plot(row['theta'], np.maximum(value, 1e-16), label=row['loss'])
    axes.set(
      yscale='log',
      xlabel='theta',
      ylabel='loss - least loss',
      title=f'mean {distance:g}, noise N(0, 1)',
    )
    axes.axvline(distance, color='k', lw=0.5)
    axes.legend()
  plot.save(figure, folder / 'landscape.png')
  return ['landscape.png']


def main(config: Config) -> None:
  """Runs one problem, prints its tables and draws its pictures."""
  if config.problem == 'landscape' and config.precision != 'float64':
    raise app.UserError(
      '--problem=landscape needs --precision=float64: the curvature falls to'
      ' 1e-17'
    )
  parts = {
    'plane': (run_plane, report_plane, draw_plane),
    'mean': (run_mean, report_mean, draw_mean),
    'landscape': (run_landscape, report_landscape, draw_landscape),
  }
  run, show, draw = parts[config.problem]
  with runner.Session('density_estimation', config, show='ess') as session:
    run(session, config)
  show(session.rows, config)
  pictures = draw(session.rows, config, session.folder)
  print(f'record:  {session.folder / "record.jsonl"}')
  for picture in pictures:
    print(f'picture: {session.folder / picture}')


if __name__ == '__main__':
  app.run(main, Config)
