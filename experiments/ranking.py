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
The data are synthetic: relevance from 0 to 4 by a hidden nonlinear score with
noise. A pointwise (squared error) and a listwise (softmax cross entropy) loss
have the same model, queries a step, rates and steps.
"""

import dataclasses
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

METHODS = ('bsvrb_v1', 'bsvrb_v2', 'pointwise', 'listwise')
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
  MINUTES = (1, None)

  queries: int = flags.flag(200, 'Training queries, m.', low=1)
  documents: int = flags.flag(40, 'Documents of a query, n.', low=2)
  features: int = flags.flag(20, 'Features of a document.', low=2)
  hidden: int = flags.flag(16, 'Hidden units of the model.', low=1)
  noise: float = flags.flag(0.5, 'Noise of the relevance.', low=0.0)
  blocks: int = flags.flag(20, 'Queries sampled in a step, I.', low=1)
  top: int = flags.flag(10, 'K of the thresholds.', low=1)
  steps: int = flags.flag(2000, 'Steps of the runs.', low=20)
  warm_fraction: float = flags.flag(
    0.5, 'Part of the steps in which BSVRB trains listwise.', low=0.0
  )
  looks: int = flags.flag(20, 'Evaluations of a run.', low=1)
  learning_rates: tuple[float, ...] = flags.flag(
    (0.001, 0.003, 0.01, 0.03), 'Grid of rates of Adam.', low=0.0
  )
  tuning_seeds: int = flags.flag(2, 'Seeds that pick rates.', low=1, grows=True)
  inner_lr: float = flags.flag(
    0.3, 'Step of a threshold between two visits.', low=0.0
  )
  smoothness: float = flags.flag(0.1, 'Smoothness of a threshold.', low=1e-6)
  steepness: float = flags.flag(2.0, 'Steepness of the selection.', low=0.0)
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


def entry(config: Config, name: str) -> study.Entry:
  """A method: BSVRB trains listwise at first, as the listwise loss does."""
  bilevel = name.startswith('bsvrb')
  warm_steps = int(config.warm_fraction * config.steps) if bilevel else 0
  m = config.queries
  loss = getattr(queries, 'pointwise' if name == 'pointwise' else 'listwise')
  plain = optlab.value_and_grad(
    lambda params, batch: jnp.mean(
      jax.vmap(loss, (None, 0))(params, batch.upper)
    )
  )
  table = multi_block.methods(floor=config.convexity)
  method = table[name if bilevel else 'bsvrb_v2']
  estimator = method.make(*queries.levels(config), m, config.inner_lr)

  def start(key, rate, *_):
    params, tx = queries.init_model(config, key), optax.adam(rate)
    thresholds = jnp.zeros(m, params['bias'].dtype)
    return State(
      optlab.init(params, plain, tx),
      optlab.init(params, estimator, tx, thresholds),
    )

  def step(state, key, rate, train_queries):
    tx = optax.adam(rate)
    blocks = optlab.sample_blocks(key, m, config.blocks)
    chosen = jax.tree.map(lambda leaf: leaf[blocks], train_queries)
    batch = optlab.BlockBatch(blocks, chosen, chosen)
    done = state.train.step if bilevel else state.warm.step
    is_warm = (done < warm_steps) | (not bilevel)
    either = lambda a, b: jax.tree.map(
      lambda a, b: jnp.where(is_warm, a, b), a, b
    )
    warm, _ = optlab.train_step(plain, tx)(state.warm, batch)
    # In the warm phase the thresholds follow the scores, and no more.
    train = state.train._replace(
      params=either(state.warm.params, state.train.params)
    )
    if bilevel:
      train, _ = optlab.train_step(estimator, tx)(train, batch)
    warm = either(warm, state.warm)
    train = train._replace(params=either(warm.params, train.params))
    at_switch = done + 1 == warm_steps
    fresh = jax.tree.map(
      lambda a, b: jnp.where(at_switch, a, b), tx.init(train.params),
      train.opt_state,
    )  # fmt: skip
    return State(warm, train._replace(opt_state=fresh))

  return study.Entry(start, step, config.blocks)


def problem(config: Config) -> study.Problem:
  """The synthetic queries; rates by validation NDCG@10, test NDCG shown."""
  data = queries.synthesize(config)

  def measure(state, _):
    values = {
      f'{part}{cut}': queries.ndcg(state.train.params, part_of, cut)
      for part, part_of in (
        ('validation', data.validation), ('ndcg', data.test),
      )
      for cut in CUTS
    }  # fmt: skip
    own = {'tuning': -values['validation10'], 'value': values['ndcg10']}
    return values | own

  return study.Problem(
    lambda name: entry(config, name), config.methods, config.learning_rates,
    config.steps * config.blocks, 'queries', measure, 'test NDCG@10', more=True,
    reported=('ndcg5',), data=data.train, batched=True, tables=config.queries,
  )  # fmt: skip


def draw(rows: list[dict], path, title: str) -> None:
  """Test NDCG at both cuts against queries seen."""
  figure, panels = plt.subplots(1, len(CUTS), figsize=(10.0, 4.0))
  for axes, cut in zip(panels, CUTS, strict=True):
    plots.draw_lines(
      axes, [('', rows)], 'calls', f'ndcg{cut}', log_x=False, log_y=False,
      keep=lambda method: 'tuning' not in method,
    )  # fmt: skip
    axes.set_xlabel('queries seen')
    axes.set_ylabel(f'test NDCG@{cut}')
  panels[0].legend(fontsize=8)
  plots.save(figure, path, title=title)


@launch.program
def main(config: Config) -> None:
  """Compares the methods, prints the table and draws the picture."""
  if config.blocks > config.queries:
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
      f'{config.queries} queries of {config.documents} documents, K ='
      f' {config.top}, {config.steps} steps, {config.seeds} seeds',
      made.value, rows, reported=made.reported,
    )  # fmt: skip
    path = session.folder / 'ranking.png'
    draw(session.rows, path, f'ranking, {config.queries} queries')
    print(path)


if __name__ == '__main__':
  launch.run(main, Config)
