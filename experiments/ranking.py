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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
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


class Queries(NamedTuple):
  """Documents and relevance of queries."""

  features: jax.Array  # shape (queries, documents, features)
  relevance: jax.Array  # shape (queries, documents), 0 to 4


class Data(NamedTuple):
  """Queries for training, for tuning, and for the report."""

  train: Queries
  validation: Queries
  test: Queries


def synthesize(config: Config) -> Data:
  """Draws the queries and grades their documents by fixed quantiles."""
  random = np.random.default_rng(0)
  mix = random.normal(size=(config.features, 8)) / np.sqrt(config.features)
  out = random.normal(size=8)

  def queries(count):
    shift = random.normal(size=(count, 1, config.features))
    x = random.normal(size=(count, config.documents, config.features))
    x = x + 0.5 * shift
    score = np.tanh(2.0 * x @ mix) @ out
    score = score + config.noise * random.normal(size=score.shape)
    grades = np.searchsorted(np.quantile(score, (0.6, 0.8, 0.9, 0.96)), score)
    return Queries(
      jnp.asarray(x, config.precision),
      jnp.asarray(grades, config.precision),
    )

  return Data(queries(config.queries), queries(200), queries(500))


def init_model(config: Config, key: jax.Array) -> dict[str, jax.Array]:
  """Parameters of a network with one hidden layer."""
  first, second = jax.random.split(key)
  shape = config.features, config.hidden
  dtype = jnp.dtype(config.precision)
  return {
    'hidden': jax.random.normal(first, shape, dtype) / np.sqrt(shape[0]),
    'bias': jnp.zeros(config.hidden, dtype),
    'out': jax.random.normal(second, shape[1:], dtype) / np.sqrt(shape[1]),
  }


def scores(params: Any, features: jax.Array) -> jax.Array:
  """One score a document."""
  hidden = jnp.tanh(features @ params['hidden'] + params['bias'])
  return hidden @ params['out']


def gains(relevance: jax.Array) -> jax.Array:
  """The gain of each grade."""
  return 2.0**relevance - 1.0


def best_dcg(relevance: jax.Array, top: int) -> jax.Array:
  """DCG@K of the best order, at least a tiny number."""
  order = jnp.sort(gains(relevance), axis=-1)[..., ::-1][..., :top]
  discount = jnp.log2(2.0 + jnp.arange(order.shape[-1], dtype=order.dtype))
  return jnp.maximum(jnp.sum(order / discount, -1), 1e-6)


def ndcg(params: Any, queries: Queries, top: int) -> jax.Array:
  """Mean NDCG@K."""
  order = jnp.argsort(-scores(params, queries.features), axis=-1)[:, :top]
  gain = jnp.take_along_axis(gains(queries.relevance), order, -1)
  discount = jnp.log2(2.0 + jnp.arange(gain.shape[-1], dtype=gain.dtype))
  dcg = jnp.sum(gain / discount, -1)
  return jnp.mean(dcg / best_dcg(queries.relevance, top))


def levels(config: Config):
  """The two levels of one query."""

  def lower(params, threshold, query):
    score = scores(params, query.features)
    smooth = config.smoothness
    above = jnp.mean(jax.nn.softplus((score - threshold) / smooth))
    return (
      config.top / config.documents * threshold
      + 0.5 * config.convexity * threshold**2
      + smooth * above
    )

  def upper(params, threshold, query):
    score = scores(params, query.features)
    margin = jnp.maximum(score[None, :] - score[:, None] + 1.0, 0.0)
    rank = jnp.sum(margin**2, -1)  # A document counts itself: at least 1.
    selected = jax.nn.sigmoid(config.steepness * (score - threshold))
    parts = selected * gains(query.relevance) / jnp.log2(1.0 + rank)
    return -jnp.sum(parts) / best_dcg(query.relevance, config.top)

  return upper, lower


def pointwise(params: Any, query: Queries) -> jax.Array:
  """Squared error of the grade."""
  return jnp.mean((scores(params, query.features) - query.relevance) ** 2)


def listwise(params: Any, query: Queries) -> jax.Array:
  """Cross entropy of the softmax of scores to that of grades."""
  target = jax.nn.softmax(query.relevance)
  return -jnp.sum(target * jax.nn.log_softmax(scores(params, query.features)))


class State(NamedTuple):
  """State of one lane."""

  warm: optlab.TrainState
  train: optlab.TrainState


def entry(config: Config, name: str) -> study.Entry:
  """A method: BSVRB trains listwise at first, as the listwise loss does."""
  bilevel = name.startswith('bsvrb')
  warm_steps = int(config.warm_fraction * config.steps) if bilevel else 0
  m = config.queries
  loss = pointwise if name == 'pointwise' else listwise
  plain = optlab.value_and_grad(
    lambda params, batch: jnp.mean(
      jax.vmap(loss, (None, 0))(params, batch.upper)
    )
  )
  table = multi_block.methods(floor=config.convexity)
  method = table[name if bilevel else 'bsvrb_v2']
  estimator = method.make(*levels(config), m, config.inner_lr)

  def start(key, rate, *_):
    params, tx = init_model(config, key), optax.adam(rate)
    thresholds = jnp.zeros(m, params['bias'].dtype)
    return State(
      optlab.init(params, plain, tx),
      optlab.init(params, estimator, tx, thresholds),
    )

  def step(state, key, rate, train_queries):
    tx = optax.adam(rate)
    blocks = optlab.sample_blocks(key, m, config.blocks)
    queries = jax.tree.map(lambda leaf: leaf[blocks], train_queries)
    batch = optlab.BlockBatch(blocks, queries, queries)
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
  data = synthesize(config)

  def measure(state, _):
    values = {
      f'{part}{cut}': ndcg(state.train.params, queries, cut)
      for part, queries in (
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
