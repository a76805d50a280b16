r"""Top-K ranking: the selection threshold of each query is a lower problem.

python -m experiments.ranking [--top=5] [--steps=2000] ...

.. math::
  g_q(x, \lambda) &= \tfrac{K}{n} \lambda + \tfrac{\mu}{2} \lambda^2
    + \tfrac{\epsilon}{n} \textstyle\sum_i
      \log(1 + e^{(h_i - \lambda) / \epsilon}) \\
  f_q(x, \lambda) &= -\tfrac{1}{Z_q} \textstyle\sum_i
    \sigma(\kappa (h_i - \lambda))\, \frac{2^{y_i} - 1}{\log_2(1 + r_i)}

The minimizer of :math:`g_q` parts the K best scores :math:`h` of a query from
the others, :math:`r_i` is a smooth rank, and so :math:`f_q` is a smooth NDCG@K.
A pointwise (squared error), a listwise (softmax cross entropy) and a pairwise
loss (LambdaRank) have the same model, queries a step, grid of rates and steps,
and all begin at the same point: where the listwise loss has led in the first
half of the steps. ``--dataset`` is

  plain     grades from a network of one layer with noise of one size, which is
            what a squared error is made for
  skewed    few good documents, noise that grows with the score, a model that is
            too small
  movielens MovieLens 100k, users as queries, two towers; read from --data_dir
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import optlab

from .lab import devices
from .lab import flags
from .lab import launch
from .lab import plots
from .lab import study
from .lab import verdicts
from .lab.session import Session
from .methods import multi_block
from .problems import queries
from .problems import ratings

LOSSES = {
  'pointwise': queries.pointwise,
  'listwise': queries.listwise,
  'lambdarank': queries.lambdarank,
}
METHODS = ('bsvrb_v1', 'bsvrb_v2', *LOSSES)
DATA = {
  'plain': queries.plain,
  'skewed': queries.skewed,
  'movielens': ratings.load,
}
CUTS = (5, 10)


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  """Flags."""

  QUICK = {
    'methods': ('bsvrb_v2', 'pointwise'),
    'queries': 60,
    'steps': 400,
    'seeds': 2,
    'tuning_seeds': 1,
    'looks': 10,
  }
  MINUTES = (1, 5)

  dataset: str = flags.flag('plain', 'The queries.', choices=tuple(DATA))
  data_dir: str = flags.flag('', 'Folder with the files of movielens.')
  queries: int = flags.flag(200, 'Training queries, m, of drawn data.', low=1)
  documents: int = flags.flag(
    40, 'Documents of a query in a step, n, at the most.', low=2
  )
  features: int = flags.flag(20, 'Features of a document.', low=2)
  hidden: int = flags.flag(
    0, 'Hidden units of the model; 0: 16 of plain, 2 of skewed data.', low=0
  )
  noise: float = flags.flag(0.5, 'Noise of the relevance.', low=0.0)
  blocks: int = flags.flag(20, 'Queries sampled in a step, I.', low=1)
  top: int = flags.flag(10, 'K of the thresholds.', low=1)
  steps: int = flags.flag(2000, 'Steps of the runs.', low=20)
  warm: str = flags.flag(
    'listwise', 'Loss of the first steps of all.', choices=tuple(LOSSES)
  )
  warm_fraction: float = flags.flag(0.5, 'Their part of the steps.', low=0.0)
  warm_lr: float = flags.flag(0.01, 'Their rate.', low=0.0)
  looks: int = flags.flag(20, 'Evaluations of a run.', low=1)
  learning_rates: tuple[float, ...] = flags.flag(
    (0.0003, 0.001, 0.003, 0.01), 'Grid of rates of Adam.', low=0.0
  )
  weight_decays: tuple[float, ...] = flags.flag(
    (0.0,), 'Grid of decays; the first is that of the warm steps.', low=0.0
  )
  tuning_seeds: int = flags.flag(2, 'Seeds that pick rates.', low=1, grows=True)
  inner_lr: float = flags.flag(
    0.3, 'Step of a threshold between two visits.', low=0.0
  )
  smoothness: float = flags.flag(0.1, 'Smoothness of a threshold.', low=1e-6)
  steepness: tuple[float, ...] = flags.flag(
    (2.0, 15.0), 'Grid of how steep the selection is.', low=0.0
  )
  floor: float = flags.flag(0.1, 'Least curvature in v1.', low=1e-6)
  convexity: float = flags.flag(0.01, 'Penalty of a threshold.', low=0.0)
  methods: tuple[str, ...] = flags.flag(METHODS, 'Methods.', choices=METHODS)
  seeds: int = flags.flag(5, 'Number of seeds.', low=1, grows=True)
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )


class State(NamedTuple):
  """State of one lane."""

  warm: optlab.TrainState
  train: optlab.TrainState


def of_loss(loss, model: queries.Model) -> optlab.GradientEstimator:
  """The gradient of a loss of scores, a mean over queries."""

  def mean(params, batch):
    return jnp.mean(
      jax.vmap(lambda q: loss(model.scores(params, q.features), q))(batch.upper)
    )

  return optlab.value_and_grad(mean)


def entry(
  config: Config, model: queries.Model, m: int, name: str,
  decay: float, steepness: float,
) -> study.Entry:  # fmt: skip
  """A variant of a method: the steps of the warm loss, then its own."""
  warm_steps = int(config.warm_fraction * config.steps)
  plain = of_loss(LOSSES[config.warm], model)
  warm_tx = optax.adamw(config.warm_lr, weight_decay=config.weight_decays[0])
  if name in LOSSES:
    estimator = of_loss(LOSSES[name], model)
  else:
    table = multi_block.methods(floor=config.floor)
    levels = queries.levels(config, model.scores, steepness)
    estimator = table[name].make(*levels, m, config.inner_lr)

  def start(key, rate, seed, train_queries):
    del seed
    params, tx = model.init(key), optax.adamw(rate, weight_decay=decay)
    table = jnp.zeros(m, train_queries.relevance.dtype)
    tables = () if name in LOSSES else (table,)
    return State(
      optlab.init(params, plain, warm_tx),
      optlab.init(params, estimator, tx, *tables),
    )

  def step(state, key, rate, train_queries):
    tx = optax.adamw(rate, weight_decay=decay)
    blocks = optlab.sample_blocks(key, m, config.blocks)
    chosen = queries.drawn(
      jax.random.fold_in(key, 1),
      jax.tree.map(lambda leaf: leaf[blocks], train_queries),
      config.documents,
    )
    batch = optlab.BlockBatch(blocks, chosen, chosen)
    is_warm = state.warm.step < warm_steps
    either = lambda a, b: jax.tree.map(
      lambda a, b: jnp.where(is_warm, a, b), a, b
    )
    warm, _ = optlab.train_step(plain, warm_tx)(state.warm, batch)
    warm = either(warm, state.warm)
    # In the warm phase the thresholds follow the scores, and no more.
    train, _ = optlab.train_step(estimator, tx)(
      state.train._replace(
        params=either(state.warm.params, state.train.params)
      ),
      batch,
    )
    kept = state.train._replace(
      params=warm.params, estimator_state=train.estimator_state
    )
    return State(warm, either(kept, train))

  return study.Entry(start, step, config.blocks)


def problem(config: Config) -> study.Problem:
  """The queries; rates by validation NDCG@10, test NDCG shown."""
  data, model = DATA[config.dataset](config)
  m = len(data.train.count)

  def measure(state, _):
    values = {}
    for part in ('validation', 'test'):
      own = getattr(data, part)
      scores = model.scores(state.train.params, own.features)
      for cut in CUTS:
        values[f'{part}{cut}'] = queries.ndcg(scores, own, cut)
    values |= {f'ndcg{cut}': values.pop(f'test{cut}') for cut in CUTS}
    own = {'tuning': -values['validation10'], 'value': values['ndcg10']}
    return values | own

  def make(name):
    steep = config.steepness[:1] if name in LOSSES else config.steepness
    grid = list(itertools.product(config.weight_decays, steep))

    def variant(decay, steepness):
      parts = [name]
      parts += [f'decay {decay:g}'] if len(config.weight_decays) > 1 else []
      parts += [f'steep {steepness:g}'] if len(steep) > 1 else []
      return ', '.join(parts)

    entries = {
      variant(*pair): entry(config, model, m, name, *pair) for pair in grid
    }
    if len(entries) == 1:
      return next(iter(entries.values()))
    return next(iter(entries.values()))._replace(variants=entries)

  return study.Problem(
    make, config.methods, config.learning_rates,
    config.steps * config.blocks, 'queries', measure, 'test NDCG@10', more=True,
    reported=('ndcg5',), data=data.train, batched=True, tables=m,
  )  # fmt: skip


def draw(rows: list[dict], path, title: str) -> None:
  """Test NDCG at both cuts against queries seen."""
  figure, panels = plt.subplots(1, len(CUTS), figsize=(10.0, 4.0))
  for axes, cut in zip(panels, CUTS, strict=True):
    plots.draw_lines(
      axes, [('', rows)], 'calls', f'ndcg{cut}', log_x=False, log_y=False,
      keep=plots.reported,
    )  # fmt: skip
    axes.set_xlabel('queries seen')
    axes.set_ylabel(f'test NDCG@{cut}')
  panels[0].legend(fontsize=8)
  plots.save(figure, path, title=title)


@launch.program
def main(config: Config) -> None:
  """Compares the methods, prints the table and draws the picture."""
  if config.dataset != 'movielens' and config.blocks > config.queries:
    raise flags.UserError(
      f'--blocks={config.blocks}: more than --queries={config.queries}'
    )
  if config.top >= config.documents:
    raise flags.UserError(
      f'--top={config.top}: must be below --documents={config.documents}'
    )
  if config.warm_fraction > 1.0:
    raise flags.UserError('--warm_fraction is a fraction, at most 1')
  made = problem(config)
  plan = study.Plan(
    '', made, made.budget, config.learning_rates, config.seeds,
    config.tuning_seeds, pieces=config.looks,
  )  # fmt: skip
  with Session('ranking', config) as session:
    rows = study.study(session, plan, config.methods)
    verdicts.show(
      f'{config.dataset}, {made.tables} queries, {config.documents} documents a'
      f' step, K = {config.top}, {config.steps} steps, {config.seeds} seeds',
      made.value, rows, reported=made.reported,
    )  # fmt: skip
    path = session.folder / 'ranking.png'
    draw(session.rows, path, f'ranking, {config.dataset} queries')
    print(path)


if __name__ == '__main__':
  launch.run(main, Config)
