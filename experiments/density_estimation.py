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

from collections.abc import Sequence
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optlab

from .lab import devices
from .lab import flags
from .lab import launch
from .lab import plots
from .lab import study
from .lab import tables
from .lab.session import Session
from .methods import unnormalized
from .problems import densities
from .problems import distant_mean
from .problems import loss_landscapes
from .problems import plane_noise

# log Z: midpoints, then half spacing, then 1.5 x box; finer where these differ.
BOX, CELLS = 7.0, (200, 400, 800)
PICTURE_CELLS, PICTURE_HALF_WIDTH = 72, 3.2

Config = unnormalized.Config


def _grid_points(half_width: float, cells: int) -> jax.Array:
  side = (np.arange(cells) + 0.5) / cells * 2 * half_width - half_width
  points = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
  return jnp.asarray(points, float)


def run_plane(session: Session, config: Config) -> None:
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
    estimator, params, model_of = unnormalized.estimator_and_start(
      method,
      densities.log_density,
      densities.init_mlp(key),
      math.log(8 * math.pi),
      config.gamma,
    )
    tx = unnormalized.optimizer(method, learning_rate, config)
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
    return unnormalized.Lane(state, key, learning_rate, adapting, jnp.zeros(()))

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
      return (
        state,
        key,
        adapting,
        ess + unnormalized.ess_of(state.estimator_state),
      ), None

    carry = (lane.train, lane.key, lane.noise, jnp.zeros(()))
    (state, key, adapting, ess), _ = jax.lax.scan(body, carry, length=every)
    return unnormalized.Lane(state, key, lane.learning_rate, adapting, ess)

  # One lane after the other: on a CPU faster than batched small matrices.
  advance = lambda lanes: jax.lax.map(advance_lane, (lanes, seeds))

  @functools.partial(jax.jit, static_argnums=2)
  def score(lane, seed, cells):
    model_of = parts(lane.learning_rate, lane.key)[-1]
    model = functools.partial(
      densities.log_density, model_of(lane.train.params)
    )
    corner = np.full(2, BOX)
    log_z = optlab.unnormalized.grid_log_partition(
      model, -corner, corner, cells
    )
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
    cells, values = 0, {}
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
  """The interval of the mean difference, and what it says of the first method.

  A tie is an interval that holds zero, no proof that the two are equal: read
  the interval's width beside it.
  """
  found = study.paired(differences)
  if found.said == '-':
    return '-', '-'
  said = {'worse': 'win', 'better': 'loss', 'tie': 'tie'}[found.said]
  return f'{found.low:+.1e} to {found.high:+.1e}', said


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
  tables.show(
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
  tables.show(
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
    plots.save(
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
    for label in plots.methods([row for row in rows if row.get('set') == name]):
      xs, middle, low, high = plots.curves(rows, label, 'step', 'ess')
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
  plots.save(figure, folder / 'ess.png', title=title)
  return [*pictures, 'ess.png']


@launch.program
def main(config: Config) -> None:
  """Runs one problem, prints its tables and draws its pictures."""
  if config.problem == 'landscape' and config.precision != 'float64':
    raise flags.UserError(
      '--problem=landscape needs --precision=float64: the curvature falls to'
      ' 1e-17'
    )
  parts = {
    'plane': (run_plane, report_plane, draw_plane),
    'mean': (distant_mean.run, distant_mean.show, distant_mean.draw),
    'landscape': (
      loss_landscapes.run,
      loss_landscapes.show,
      loss_landscapes.draw,
    ),
  }
  run, show, draw = parts[config.problem]
  with Session('density_estimation', config, show='ess') as session:
    run(session, config)
  show(session.rows, config)
  pictures = draw(session.rows, config, session.folder)
  print(f'record:  {session.folder / "record.jsonl"}')
  for picture in pictures:
    print(f'picture: {session.folder / picture}')


if __name__ == '__main__':
  launch.run(main, Config)
