"""Conditional likelihood over many labels, of which a step sees few.

A log-bilinear model p(label given context). All methods but the full softmax
see the same rows: a batch of pairs, and labels drawn for each from one noise
distribution, the training labels' frequencies, smoothed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab

from ..lab import flags
from ..lab.study import Entry
from ..lab.study import Problem
from ..problems import label_sets

WIDTH, ROWS, DRAWN = 16, 64, 16
STEPS = 3000
METHODS = (
  'meco:0.01', 'meco:0.1', 'snis', 'nce', 'sampled_softmax', 'softmax',
)  # fmt: skip


class Labels:
  """Noise over labels."""

  def __init__(self, log_share: jax.Array):
    self.log_share = log_share
    self.ends = jnp.cumsum(jnp.exp(log_share))

  def sample(self, key: jax.Array, num: int) -> jax.Array:
    """Draws labels, ``[num]``."""
    uniform = jax.random.uniform(key, (num,)) * self.ends[-1]
    found = jnp.searchsorted(self.ends, uniform)
    return jnp.minimum(found, self.log_share.size - 1)

  def log_prob(self, rows: jax.Array) -> jax.Array:
    """Their log probabilities, ``[num]``."""
    return self.log_share[rows]


def score(params: Any, rows: Any) -> jax.Array:
  """The logit of each row, a pair of a context and a label."""
  context, label = rows
  inner = jnp.sum(params['contexts'][context] * params['labels'][label], -1)
  return inner + params['bias'][label]


def loss(params: Any, pairs: jax.Array) -> jax.Array:
  """Cross-entropy over all labels, the mean over rows."""
  logits = params['contexts'][pairs[:, 0]] @ params['labels'].T + params['bias']
  rows = optax.softmax_cross_entropy_with_integer_labels(logits, pairs[:, 1])
  return jnp.mean(rows)


def sampled_softmax(params: Any, batch: Any) -> jax.Array:
  """The softmax over a row's label and its noise, each less its log q."""
  n = batch.data_log_prob.shape[0]
  data = score(params, batch.data) - batch.data_log_prob
  noise = score(params, batch.noise) - batch.noise_log_prob
  noise = noise.reshape(n, -1)
  same = batch.noise[1].reshape(n, -1) == batch.data[1][:, None]
  noise = jnp.where(same, -jnp.inf, noise) - jnp.log(noise.shape[1])
  both = jnp.concatenate([data[:, None], noise], 1)
  return jnp.mean(jax.nn.logsumexp(both, 1) - data)


def estimator_of(name: str, contexts: int) -> optlab.GradientEstimator:
  """The estimator of one of `METHODS`, or of ``meco:GAMMA``."""
  base, _, number = name.partition(':')
  try:
    gamma = float(number) if number else 1.0
  except ValueError:
    gamma = 0.0
  if (base == 'meco' and number and 0 < gamma <= 1) or name == 'snis':
    return optlab.meco(score, gamma, contexts=contexts)
  if name == 'nce':
    return optlab.nce(
      lambda params, rows: score(params, rows) - params['log_z'][rows[0]]
    )
  if name in ('sampled_softmax', 'softmax'):
    return optlab.value_and_grad({'softmax': loss}.get(name, sampled_softmax))
  raise flags.UserError(
    f'--methods={name}: not one of {", ".join(METHODS)}, or meco:GAMMA'
  )


def problem(make: Callable[[], label_sets.Pairs]) -> Problem:
  """The problem of a set of pairs; a call is a step."""
  pairs = make()
  train = jnp.asarray(pairs.train)
  counts = np.bincount(pairs.train[:, 1], minlength=pairs.labels) + 1.0
  noise = Labels(jnp.asarray(np.log(counts / counts.sum()), jnp.float32))

  def entry(name):
    estimator = estimator_of(name, pairs.contexts)
    # To zero by a cosine, so that no method is judged by its last step's noise.
    adam = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, STEPS))

    def start(key, rate, *_):
      keys = jax.random.split(key)
      normal = lambda key, rows: (
        jax.random.normal(key, (rows, WIDTH)) / WIDTH**0.5
      )
      params = {
        'contexts': normal(keys[0], pairs.contexts),
        'labels': normal(keys[1], pairs.labels),
        'bias': noise.log_share,
      }
      if name == 'nce':
        params['log_z'] = jnp.zeros(pairs.contexts)
      return optlab.init(params, estimator, adam(rate))

    def step(state, key, rate, *_):
      keys = jax.random.split(key)
      rows = train[jax.random.randint(keys[0], (ROWS,), 0, len(train))]
      batch: Any = rows
      if name != 'softmax':
        batch = optlab.unnormalized.conditional_batch(
          noise, keys[1], rows[:, 0], rows[:, 1], rows[:, 0], DRAWN
        )
      if name in ('nce', 'sampled_softmax'):
        batch = batch._replace(contexts=None, noise_contexts=None)
      return optlab.train_step(estimator, adam(rate))(state, batch)[0]

    return Entry(start, step, 1.0)

  def measure(state, _):
    parts = [
      jnp.mean(
        jax.lax.map(
          lambda rows: loss(state.params, rows),
          jnp.asarray(part).reshape(-1, 250, 2),
        )
      )
      for part in (pairs.valid, pairs.test)
    ]
    return {'tuning': parts[0], 'value': parts[1]}

  return Problem(
    entry, METHODS, (0.003, 0.01, 0.03), STEPS,
    f'steps of {ROWS} rows and {DRAWN} labels drawn for each', measure,
    'held-out nats',
  )  # fmt: skip
