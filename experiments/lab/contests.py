"""Problems on which unlike methods meet: what a method is, and what it costs.

A problem makes an `Entry` of a method's name: how a run starts, what a step
does, and how many oracle calls the step took.
"""

import jax
import jax.numpy as jnp
import optax

import optlab

from ..methods import bilevel
from ..methods import label_sets as label_methods
from ..methods import multi_block
from ..methods import unnormalized
from ..problems import classic
from ..problems import label_sets
from ..problems import penalties
from ..problems import plane
from ..problems import quadratic
from . import flags
from . import functions
from . import tuning
from .study import Entry
from .study import Problem

MAX_BATCH = 512


def images() -> Problem:
  """A perceptron on the digits; rates by validation loss, test loss shown."""
  model, data, valid, test = classic.perceptron()
  estimator = optlab.per_example(
    model.losses, optlab.ghost_norms, microbatch_size=classic.BATCH
  )
  growing = {
    'adadagrad': optlab.adadagrad,
    'adadagrad_norm': optlab.adadagrad_norm,
  }

  def entry(name):
    if name in growing:
      make = lambda rate: growing[name](
        rate, optlab.norm_test(1.0), 8, MAX_BATCH
      )
      return of_batches(make, None)
    return functions.of_optimizers(
      name,
      lambda one: of_batches(one.make, classic.BATCH)._replace(tuned=one.tuned),
    )

  def of_batches(make, size):

    def start(key, rate, *_):
      keys = jax.random.split(key)
      params = model.start(keys[0])
      return optlab.growing_init(params, estimator, make(rate), data, keys[1])

    def step(state, key, rate, *_):
      del key
      run = optlab.growing_step(estimator, make(rate), batch_size=size)
      return run(state, data)[0]

    def calls(before, after):
      epochs = after.epochs.epoch - before.epochs.epoch
      moved = after.epochs.position - before.epochs.position
      return len(data[1]) * epochs + moved

    return Entry(start, step, calls)

  def measure(state, _):
    loss = lambda part: jnp.mean(model.losses(state.train.params, part))
    return {'tuning': loss(valid), 'value': loss(test)}

  return Problem(
    entry,
    ('adadagrad', 'adadagrad_norm', 'diffgrad', 'adam', 'sgd', 'adagrad'),
    (1e-3, 1e-2, 1e-1, 1.0),
    20_000,
    'gradients of one image',
    measure,
    'test loss',
  )


# Two levels: the penalty of a ridge regression.


def ridge() -> Problem:
  """Bilevel methods, ``estimator`` or ``estimator, upper step``."""
  config = tuning.Config(
    learning_rates=(0.01, 0.03, 0.1, 0.3, 1.0), inner_lr=0.05, dual_lr=0.05,
    refine_epochs=0,
  )  # fmt: skip
  problem, _, _ = penalties.linear('ridge', 8, str(jnp.zeros(()).dtype))
  found = tuning.of_bilevel(config, problem)
  methods = 'bo_rep:normalized', *bilevel.ONE_OF_EACH
  return found._replace(methods=methods, budget=5000)


# A hundred lower levels.


def blocks() -> Problem:
  """Multi-block methods on quadratics whose minimizer is known."""
  sampled, noise = 10, 0.1
  data = quadratic.make()
  count, dim = data.c.shape
  least = jax.jit(quadratic.objective)(jax.jit(quadratic.minimizer)(data), data)
  levels = quadratic.upper, quadratic.lower, count
  table = multi_block.methods()

  def entry(name):
    if name not in table:
      raise flags.UserError(f'--methods={name}: not one of {", ".join(table)}')
    method = table[name]
    estimator = method.make(*levels, 0.5)

    def start(key, rate, *_):
      x = jnp.full(data.b.shape[-1], 3.0)
      inner = jnp.zeros_like(data.c)
      return optlab.init(x, estimator, optax.sgd(rate), inner)

    def step(state, key, rate, *_):
      keys = jax.random.split(key, 3)
      chosen = optlab.sample_blocks(keys[0], count, sampled)
      drawn = noise * jax.random.normal(keys[1], (2, sampled, dim))
      rows = jax.tree.map(lambda leaf: leaf[chosen], data)
      outer = optlab.sample_blocks(keys[2], count, sampled)
      parts = chosen, (rows, drawn[0]), (rows, drawn[1]), outer
      batch = method.batch(*parts)
      return optlab.train_step(estimator, optax.sgd(rate))(state, batch)[0]

    return Entry(start, step, sampled)

  def measure(state, _):
    gap = jnp.maximum(quadratic.objective(state.params, data) - least, 0.0)
    return {'tuning': gap, 'value': gap}

  return Problem(
    entry,
    tuple(table),
    (0.003, 0.01, 0.03, 0.1, 0.3),
    20_000,
    'sampled blocks',
    measure,
    'F - F*',
  )


# A density without its normalizer.


def density() -> Problem:
  """MECO and its peers on eight Gaussians; the same rows for all seeds."""
  config = unnormalized.Config(
    sets=('8gaussians',), methods=('meco', 'snis', 'nce', 'ence'), steps=600,
    learning_rates=(0.003, 0.01, 0.03), seeds=1, tuning_seeds=1,
  )  # fmt: skip
  return plane.problem(config, '8gaussians', watched=True)


PROBLEMS = {
  'logistic': classic.CLASSIC['mushrooms'],
  'images': images,
  'ridge': ridge,
  'blocks': blocks,
  'density': density,
  'labels': lambda: label_methods.problem(label_sets.synthetic),
  'next_word': lambda: label_methods.problem(label_sets.next_words),
}
