"""Synthetic queries with graded documents, a model, and losses of a ranking."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Queries(NamedTuple):
  """Documents and relevance of queries."""

  features: jax.Array  # shape (queries, documents, features)
  relevance: jax.Array  # shape (queries, documents), 0 to 4


class Data(NamedTuple):
  """Queries for training, for tuning, and for the report."""

  train: Queries
  validation: Queries
  test: Queries


def synthesize(config: Any) -> Data:
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


def init_model(config: Any, key: jax.Array) -> dict[str, jax.Array]:
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


def levels(config: Any):
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
