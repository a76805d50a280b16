"""Queries with graded documents: data, models and losses of a ranking."""

from collections.abc import Callable
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Queries(NamedTuple):
  """Documents and relevance of queries; what is behind the count is padding."""

  features: Any  # what a model takes, leading axes (queries, documents)
  relevance: jax.Array  # shape (queries, documents), 0 to 4
  count: jax.Array  # shape (queries,), how many documents there are


class Data(NamedTuple):
  """Queries for training, for tuning, and for the report."""

  train: Queries
  validation: Queries
  test: Queries


class Model(NamedTuple):
  """What gives documents their scores."""

  init: Callable[[jax.Array], Any]  # key -> params
  scores: Callable[[Any, Any], jax.Array]  # (params, features) -> scores


def network(config: Any, hidden: int) -> Model:
  """One hidden layer on the features of a document."""

  def init(key):
    first, second = jax.random.split(key)
    shape = config.features, hidden
    dtype = jnp.dtype(config.precision)
    return {
      'hidden': jax.random.normal(first, shape, dtype) / np.sqrt(shape[0]),
      'bias': jnp.zeros(hidden, dtype),
      'out': jax.random.normal(second, shape[1:], dtype) / np.sqrt(shape[1]),
    }

  def scores(params, features):
    layer = jnp.tanh(features @ params['hidden'] + params['bias'])
    return layer @ params['out']

  return Model(init, scores)


def plain(config: Any) -> tuple[Data, Model]:
  """A network of one layer with noise, which a pointwise loss is made for."""
  random = np.random.default_rng(0)
  mix = random.normal(size=(config.features, 8)) / np.sqrt(config.features)
  out = random.normal(size=8)

  def observe(x):
    score = np.tanh(2.0 * x @ mix) @ out
    return score + config.noise * random.normal(size=score.shape)

  grades = 0.6, 0.8, 0.9, 0.96
  model = network(config, config.hidden or 16)
  return _draw(config, random, observe, grades), model


def skewed(config: Any) -> tuple[Data, Model]:
  """Few good documents, noise that grows with the score, a model too small.

  Two layers of sixteen stand behind the grades, nine in ten of which are zero;
  the model has one of two.
  """
  random = np.random.default_rng(0)
  sizes = config.features, 16, 16, 1
  layers = [
    random.normal(size=shape) / np.sqrt(shape[0])
    for shape in itertools.pairwise(sizes)
  ]

  def observe(x):
    for layer in layers[:-1]:
      x = np.tanh(2.0 * x @ layer)
    score = (x @ layers[-1])[..., 0]
    score = (score - score.mean()) / score.std()
    # Half as much noise where the score is low as where it is high.
    size = config.noise * (0.5 + 1 / (1 + np.exp(-2.0 * score)))
    return score + size * random.normal(size=score.shape)

  grades = 0.9, 0.95, 0.98, 0.995
  model = network(config, config.hidden or 2)
  return _draw(config, random, observe, grades), model


def _draw(config, random, observe, quantiles):
  """Grades by quantiles of what is observed of each document."""

  def queries(count):
    shift = random.normal(size=(count, 1, config.features))
    x = random.normal(size=(count, config.documents, config.features))
    x = x + 0.5 * shift
    score = observe(x)
    grades = np.searchsorted(np.quantile(score, quantiles), score)
    return Queries(
      jnp.asarray(x, config.precision),
      jnp.asarray(grades, config.precision),
      jnp.full(count, config.documents),
    )

  return Data(queries(config.queries), queries(200), queries(500))


def drawn(key: jax.Array, queries: Queries, most: int) -> Queries:
  """So many documents of each query at the most, chosen by chance."""
  if queries.relevance.shape[1] <= most:
    return queries
  places = jax.random.uniform(key, queries.relevance.shape)
  places = jnp.where(_there(queries), places, -1.0)
  chosen = jax.lax.top_k(places, most)[1]
  pick = jax.vmap(lambda leaf, index: leaf[index])
  return Queries(
    jax.tree.map(lambda leaf: pick(leaf, chosen), queries.features),
    pick(queries.relevance, chosen),
    jnp.minimum(queries.count, most),
  )


def _there(queries):
  """Which documents are no padding."""
  places = jnp.arange(queries.relevance.shape[-1])
  return places < queries.count[..., None]


def _gains(queries):
  """The gain of each document; padding has none."""
  gains = 2.0**queries.relevance - 1.0
  return jnp.where(_there(queries), gains, 0.0)


def _discounts(count, dtype):
  return 1.0 / jnp.log2(2.0 + jnp.arange(count, dtype=dtype))


def _best_dcg(gains, top):
  order = jnp.sort(gains, axis=-1)[..., ::-1][..., :top]
  return jnp.sum(order * _discounts(order.shape[-1], gains.dtype), -1)


def ndcg(scores: jax.Array, queries: Queries, top: int) -> jax.Array:
  """Mean NDCG@K of the queries that have a document worth finding."""
  ranked = jnp.where(_there(queries), scores, -jnp.inf)
  order = jnp.argsort(-ranked, axis=-1)[:, :top]
  gains = _gains(queries)
  gain = jnp.take_along_axis(gains, order, -1)
  dcg = jnp.sum(gain * _discounts(gain.shape[-1], gain.dtype), -1)
  best = _best_dcg(gains, top)
  found = jnp.where(best > 0, dcg / jnp.where(best > 0, best, 1), 0)
  return jnp.sum(found) / jnp.sum(best > 0)


def levels(
  config: Any, scores: Callable[[Any, Any], jax.Array], steepness: float
):
  """The two levels of one query."""

  def lower(params, threshold, query):
    smooth = config.smoothness
    above = jax.nn.softplus(
      (scores(params, query.features) - threshold) / smooth
    )
    mean = jnp.sum(jnp.where(_there(query), above, 0)) / query.count
    # A short query's better half.
    part = jnp.minimum(config.top / query.count, 0.5).astype(threshold.dtype)
    penalty = 0.5 * config.convexity * threshold**2
    return part * threshold + penalty + smooth * mean

  def upper(params, threshold, query):
    score = scores(params, query.features)
    margin = jnp.maximum(score[None, :] - score[:, None] + 1.0, 0.0)
    # A document counts itself: at least 1.
    rank = jnp.sum(jnp.where(_there(query), margin**2, 0), -1)
    selected = jax.nn.sigmoid(steepness * (score - threshold))
    gains = _gains(query)
    # Behind what is there, a rank may be anything, and is worth nothing.
    parts = selected * gains / jnp.log2(1.0 + jnp.maximum(rank, 1.0))
    return -jnp.sum(parts) / jnp.maximum(_best_dcg(gains, config.top), 1e-6)

  return upper, lower


def pointwise(score: jax.Array, query: Queries) -> jax.Array:
  """Squared error of the grade."""
  error = (score - query.relevance) ** 2
  return jnp.sum(jnp.where(_there(query), error, 0)) / query.count


def listwise(score: jax.Array, query: Queries) -> jax.Array:
  """Cross entropy of the softmax of scores to that of grades."""
  there = _there(query)
  target = jax.nn.softmax(jnp.where(there, query.relevance, -jnp.inf))
  logs = jax.nn.log_softmax(jnp.where(there, score, -jnp.inf))
  return -jnp.sum(target * jnp.where(there, logs, 0))


def lambdarank(score: jax.Array, query: Queries) -> jax.Array:
  """Logistic losses of pairs, weighted by the NDCG that a swap would cost."""
  gains, there = _gains(query), _there(query)
  order = jnp.argsort(-jnp.where(there, score, -jnp.inf))
  ranks = jnp.argsort(order)
  discounts = _discounts(len(score), score.dtype)[ranks]
  pairs = lambda values: values[:, None] - values[None, :]
  swap = jnp.abs(pairs(gains) * pairs(discounts))
  weight = jnp.where((pairs(gains) > 0) & there[None, :], swap, 0)
  best = jnp.maximum(_best_dcg(gains, len(score)), 1e-6)
  return jnp.sum(weight * jax.nn.softplus(-pairs(score))) / best
