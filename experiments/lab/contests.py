"""Problems on which unlike methods meet: what a method is, and what it costs.

A problem makes an `Entry` of a method's name: how a run starts, what a step
does, and how many oracle calls the step took. Where the problem is a function
of parameters, every optimizer of optlab and optax is a method, by its name.
"""

from collections.abc import Callable
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab

from ..methods import bilevel
from ..methods import multi_block
from ..methods import unnormalized
from ..problems import data as data_lib
from ..problems import densities
from ..problems import image_classifiers
from ..problems import penalties
from ..problems import plane_noise
from ..problems import quadratic
from ..problems import smooth
from . import flags
from . import newton


class Entry(NamedTuple):
  """A method on a problem.

  Attributes:
    start: ``(key, rate) -> state``.
    step: ``(state, key, rate) -> state``.
    calls: ``(state before, state after) -> calls`` of the step between, in the
      problem's unit.
    tuned: Whether it has a rate.
  """

  start: Callable[..., Any]
  step: Callable[..., Any]
  calls: Callable[[Any, Any], Any]
  tuned: bool = True


class Problem(NamedTuple):
  """What is compared.

  Attributes:
    entry: ``method -> Entry``; raises `app.UserError` for a name it lacks.
    methods: The default methods.
    learning_rates: The default grid of rates.
    budget: The default budget of calls.
    unit: What a call is.
    measure: ``state -> dict`` of scalars: ``tuning``, which rates are picked
      by, and ``value``, which is reported; less is better.
    value: What the value is.
  """

  entry: Callable[[str], Entry]
  methods: tuple[str, ...]
  learning_rates: tuple[float, ...]
  budget: float
  unit: str
  measure: Callable[[Any], dict[str, jax.Array]]
  value: str


def optimizer(name: str) -> Callable[..., Any]:
  """The optimizer of that name, of optlab or else of optax.

  Args:
    name: Such as ``diffgrad`` or ``adam``.

  Returns:
    ``rate -> transformation``.

  Raises:
    UserError: Neither library has one that needs a learning rate alone.
  """
  homes = (optlab, optlab.first_order, optax)
  make = next((m for m in (getattr(h, name, None) for h in homes) if m), None)
  try:
    parameters = inspect.signature(make).parameters  # pyrefly: ignore
    needed = [
      key
      for key, parameter in parameters.items()
      if parameter.default is inspect.Parameter.empty
      and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
  except TypeError:
    needed = []
  if needed != ['learning_rate']:
    raise flags.UserError(
      f'--methods={name}: neither optlab nor optax has an optimizer of that'
      ' name whose one argument is a learning rate'
    )
  return make  # pyrefly: ignore


# A smooth function: mushrooms, all rows in every gradient.


def logistic() -> Problem:
  """Ridge-penalized logistic regression, without noise."""
  dataset = data_lib.load('mushrooms')
  l2 = 1.0 / len(dataset.labels)
  problem = smooth.logistic(dataset, l2)
  data = jax.tree.map(jnp.asarray, problem.data)
  fun = lambda params: problem.fun(params, data)
  estimator = optlab.value_and_grad(lambda params, _: fun(params))
  curvature = problem.curvatures['gauss_newton'].factory
  least = newton.least_value(problem)
  shape = problem.start(0).shape

  def entry(name):
    own, tuned = estimator, False
    calls = lambda before, after: 1
    if name in ('gns_newton', 'gns_newton_paper'):
      make = lambda rate: getattr(optlab, name)()
      own = optlab.with_curvature(
        estimator, lambda params, _: curvature(params, data)
      )
      # Gradients of all trials, and products with the Hessian.
      total = lambda state: (
        optax.tree.get(state, 'total_trials')
        + optax.tree.get(state, 'total_products')
      )
      calls = lambda before, after: total(after) - total(before)
    elif name == 'lbfgs':
      make = lambda rate: optax.lbfgs()
      calls = lambda before, after: optax.tree.get(
        after, 'num_linesearch_steps'
      )
    else:
      make, tuned = optimizer(name), True

    def start(key, rate):
      params = 0.1 * jax.random.normal(key, shape)
      return optlab.init(params, own, make(rate))

    def step(state, key, rate):
      return optlab.train_step(own, make(rate))(state, None)[0]

    return Entry(start, step, calls, tuned)

  def measure(state):
    value = jnp.maximum(fun(state.params) - least, 0.0)
    return {'tuning': value, 'value': value}

  return Problem(
    entry,
    ('gns_newton', 'lbfgs', 'sgd', 'adam', 'diffgrad', 'adagrad_norm'),
    (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    200,
    'gradients and Hessian-vector products',
    measure,
    'f - f*',
  )


# Images in batches: constant ones, and ones that grow.

BATCH, MAX_BATCH = 32, 512


def images() -> Problem:
  """A perceptron on the digits; rates by validation loss, test loss shown."""
  whole = image_classifiers.load('digits', '', 360, np.float32)
  inner = image_classifiers.hold_out(*whole.train, 287, 'valid', whole.classes)
  data, valid, test = jax.tree.map(
    jnp.asarray, (inner.train, inner.held, whole.held)
  )
  side = whole.train[0].shape[1]
  model = image_classifiers.model('mlp', side, whole.classes, jnp.float32)
  estimator = optlab.per_example(
    model.losses, optlab.ghost_norms, microbatch_size=BATCH
  )
  growing = {
    'adadagrad': optlab.adadagrad,
    'adadagrad_norm': optlab.adadagrad_norm,
  }

  def entry(name):
    size = None if name in growing else BATCH
    if size is None:
      make = lambda rate: growing[name](
        rate, optlab.norm_test(1.0), 8, MAX_BATCH
      )
    else:
      make = optimizer(name)

    def start(key, rate):
      keys = jax.random.split(key)
      params = model.start(keys[0])
      return optlab.growing_init(params, estimator, make(rate), data, keys[1])

    def step(state, key, rate):
      del key
      run = optlab.growing_step(estimator, make(rate), batch_size=size)
      return run(state, data)[0]

    def calls(before, after):
      # The last batch of an epoch is what is left of it.
      left = len(data[1]) - before.epochs.position
      asked: Any = size
      if size is None:
        asked = optax.tree.get(before.train.opt_state, 'batch_size')
      return jnp.minimum(asked, left)

    return Entry(start, step, calls)

  def measure(state):
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
  """Bilevel methods, ``estimator`` or ``estimator:upper step``."""
  precision = str(jnp.zeros(()).dtype)
  problem, _, _ = penalties.linear('ridge', 8, precision)
  table = bilevel.methods(5, 5, blocks=problem.blocks)

  def entry(name):
    estimator_name, _, upper_step = name.partition(':')
    upper_step = upper_step or 'plain'
    if estimator_name not in table or upper_step not in bilevel.UPPER_STEPS:
      raise flags.UserError(
        f'--methods={name}: estimators are {", ".join(table)}; upper steps, put'
        f' behind a colon, {", ".join(bilevel.UPPER_STEPS)}'
      )
    method = table[estimator_name]
    estimator = method.make(problem.upper, problem.lower, optax.sgd(0.05), 0.05)
    make = lambda rate: bilevel.upper_step(upper_step, rate, 0.9)

    def sample(key):
      batches = problem.sample(key, problem.data)
      if method.indexed:
        return batches
      return tuple(batch.data for batch in batches)

    def start(key, rate):
      x, y = problem.start(key, problem.data)
      return method.init(estimator, make(rate), x, y, key)

    def step(state, key, rate):
      batch = bilevel.draw(key, sample, method.step_samples)
      return optlab.train_step(estimator, make(rate))(state, batch)[0]

    return Entry(start, step, lambda before, after: method.calls)

  def measure(state):
    values = problem.measure(
      state.params, state.estimator_state.inner, problem.data
    )
    return {'tuning': values['valid_loss'], 'value': values['regret']}

  return Problem(
    entry,
    ('bo_rep:normalized', *bilevel.ONE_OF_EACH),
    (0.01, 0.03, 0.1, 0.3, 1.0),
    5000,
    'gradients and products of a sample',
    measure,
    'regret of the penalty',
  )


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

    def start(key, rate):
      x = jnp.full(data.b.shape[-1], 3.0)
      inner = jnp.zeros_like(data.c)
      return optlab.init(x, estimator, optax.sgd(rate), inner)

    def step(state, key, rate):
      keys = jax.random.split(key, 3)
      chosen = optlab.sample_blocks(keys[0], count, sampled)
      drawn = noise * jax.random.normal(keys[1], (2, sampled, dim))
      rows = jax.tree.map(lambda leaf: leaf[chosen], data)
      outer = optlab.sample_blocks(keys[2], count, sampled)
      parts = chosen, (rows, drawn[0]), (rows, drawn[1]), outer
      batch = method.batch(*parts)
      return optlab.train_step(estimator, optax.sgd(rate))(state, batch)[0]

    return Entry(start, step, lambda before, after: sampled)

  def measure(state):
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


# Contrastive divergence needs chains beside the batch.
NOISE_METHODS = tuple(name for name in unnormalized.METHODS if name != 'cd')


def density() -> Problem:
  """MECO and its peers on eight Gaussians; the same noise for all seeds."""
  rows = 256
  plane = jax.tree.map(
    lambda leaf: leaf[0], plane_noise.plane('8gaussians', 'mixture', 1)
  )
  make = functools.partial(
    unnormalized.estimator_and_start, log_density=densities.log_density,
    log_z=math.log(8 * math.pi), gamma=0.1,
  )  # fmt: skip

  def entry(name):
    if name not in NOISE_METHODS:
      raise flags.UserError(
        f'--methods={name}: not one of {", ".join(NOISE_METHODS)}'
      )

    def start(key, rate):
      estimator, params, _ = make(name, params=densities.init_mlp(key))
      return optlab.init(params, estimator, optax.adam(rate))

    def step(state, key, rate):
      estimator, _, _ = make(name, params=None)
      keys = jax.random.split(key)
      index = jax.random.randint(keys[0], (rows,), 0, len(plane.train))
      drawn = plane.noise.sample_lattice(keys[1], rows)
      batch = optlab.NoiseBatch(
        plane.train[index],
        drawn,
        plane.noise.log_prob(drawn),
        plane.noise_of_train[index],
      )
      return optlab.train_step(estimator, optax.adam(rate))(state, batch)[0]

    return Entry(start, step, lambda before, after: 2 * rows)

  def measure(state):
    params = state.params
    if isinstance(params, optlab.unnormalized.NceParams):
      params = params.model
    model = functools.partial(densities.log_density, params)
    corner = np.full(2, 7.0)
    log_z = optlab.unnormalized.grid_log_partition(model, -corner, corner, 200)
    gap = plane.negative_entropy + log_z.value - jnp.mean(model(plane.test))
    return {'tuning': gap, 'value': gap}

  return Problem(
    entry,
    ('meco', 'snis', 'nce', 'ence'),
    (0.003, 0.01, 0.03),
    2 * rows * 600,
    'rows of data and noise',
    measure,
    'held-out divergence, nats',
  )


PROBLEMS = {
  'logistic': logistic,
  'images': images,
  'ridge': ridge,
  'blocks': blocks,
  'density': density,
}
