"""Problems on which unlike methods meet: what a method is, and what it costs.

A problem makes an `Entry` of a method's name: how a run starts, what a step
does, and how many oracle calls the step took. Where the problem is a function
of parameters, every optimizer of optlab and optax is a method, by its name.
"""

from collections.abc import Callable
import functools
import math
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import optlab

from ..methods import bilevel
from ..methods import label_sets as label_methods
from ..methods import multi_block
from ..methods import optimizers
from ..methods import unnormalized
from ..problems import data as data_lib
from ..problems import densities
from ..problems import image_classifiers
from ..problems import label_sets
from ..problems import penalties
from ..problems import plane
from ..problems import plane_noise
from ..problems import quadratic
from ..problems import smooth
from . import flags
from . import newton
from . import oracles
from . import study
from . import tuning
from .study import Entry
from .study import Problem


def of_optimizers(
  text: str, make: Callable[[optimizers.Optimizer], Entry]
) -> Entry:
  """The entry of an optimizer, or of its search space."""
  found = {one.text: make(one) for one in optimizers.variants(text)}
  first = next(iter(found.values()))
  return first._replace(variants=found if len(found) > 1 else None)


def of_function(
  start: Callable[[jax.Array], Any],
  loss: Callable[[Any, Any], jax.Array],
  measure: Callable[[Any], dict[str, jax.Array]],
  curvature: Callable[[Any, Any], Any] | None = None,
  **fields: Any,
) -> Problem:
  """A function of parameters: every optimizer of optlab and optax is a method.

  Args:
    start: ``key -> params``.
    loss: ``(params, key) -> scalar``; the key draws the batch, if there is one.
    measure: ``params -> dict`` with ``tuning`` and ``value``.
    curvature: ``(params, key) -> operator``, the Hessian if not given.
    **fields: Of the `Problem`.

  Returns:
    The `Problem`. A call is a gradient or a Hessian-vector product; they are
    counted (`oracles.count`), but for those of a search, which reports them.
  """
  curvature = curvature or optlab.hessian(loss)
  shapes = jax.eval_shape(start, jax.random.key(0))

  def estimator(loss):
    return optlab.with_curvature(optlab.value_and_grad(loss), curvature)

  own = estimator(loss)

  def make(one):
    tx = one.make(0.1)
    found = jax.eval_shape(tx.init, shapes)
    has = lambda name: optax.tree.get(found, name, None) is not None
    if has('total_trials'):
      # Gradients of all trials, and products with the Hessian.
      total = lambda state: (
        optax.tree.get(state, 'total_trials')
        + optax.tree.get(state, 'total_products')
      )
      calls = lambda before, after: total(after) - total(before)
    elif has('num_linesearch_steps'):
      calls = lambda before, after: optax.tree.get(
        after, 'num_linesearch_steps'
      )
    else:
      calls = count(one)

    def begin(key, rate, *_):
      return optlab.init(start(key), own, one.make(rate))

    def step(state, key, rate, *_):
      return optlab.train_step(own, one.make(rate))(state, key)[0]

    return Entry(begin, step, calls, one.tuned)

  def count(one):
    marked = estimator(oracles.marked(loss))

    def step(key):
      state = optlab.init(start(key), marked, one.make(0.1))
      return optlab.train_step(marked, one.make(0.1))(state, key)[0]

    found = oracles.count(step, jax.random.key(0))
    if found.open:
      raise flags.UserError(
        f'--methods={one.text}: has a loop of gradients that ends on a'
        ' condition, and does not report how many it took'
      )
    return max(found.gradients + found.products, 1)

  def measure_state(state, _):
    return measure(state.params)

  unit = fields.pop('unit', 'gradients and Hessian-vector products')
  return Problem(
    functools.cache(lambda text: of_optimizers(text, make)),
    measure=measure_state, unit=unit,
    batched=can_batch(start, loss, measure), **fields,
  )  # fmt: skip


def can_batch(start, loss, measure) -> bool:
  """Whether several runs can be computed together."""

  def look(key):
    params = start(key)
    return measure(params), jax.value_and_grad(loss)(params, key)

  try:
    jax.eval_shape(jax.vmap(look), jax.random.split(jax.random.key(0)))
  except NotImplementedError:  # A primitive without a rule for that.
    return False
  return True


NEWTON_METHODS = (
  'gns_newton', 'lbfgs', 'sgd', 'adam', 'diffgrad', 'adagrad_norm',
)  # fmt: skip
GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def of_smooth(
  make: Callable[[], smooth.Problem], curvature: str = 'gauss_newton'
) -> Callable[[], Problem]:
  """A smooth function without noise; the value is f - f*, by that at the start.

  Args:
    make: Makes it.
    curvature: The one that Newton's method is given.

  Returns:
    What makes the problem.
  """

  def problem():
    own = make()
    data = jax.tree.map(jnp.asarray, own.data)
    fun = lambda params: own.fun(params, data)
    least = newton.least_value(own)
    first = jnp.asarray(own.start(0))
    height = fun(first) - least

    def start(key):
      return first + 0.1 * jax.random.normal(key, first.shape)

    def measure(params):
      gap = jnp.maximum(fun(params) - least, 0.0) / height
      return {'tuning': gap, 'value': gap}

    factory = own.curvatures[curvature].factory
    return of_function(
      start, lambda params, key: fun(params), measure,
      lambda params, key: factory(params, data), methods=NEWTON_METHODS,
      learning_rates=GRID, budget=200, value='(f - f*) / (f(x0) - f*)',
      target=1e-6,
    )  # fmt: skip

  return problem


def logistic() -> Problem:
  """Ridge-penalized logistic regression on mushrooms, without noise."""
  dataset = data_lib.load('mushrooms')
  problem = smooth.logistic(dataset, 1.0 / len(dataset.labels))
  data = jax.tree.map(jnp.asarray, problem.data)
  fun = lambda params: problem.fun(params, data)
  curvature = problem.curvatures['gauss_newton'].factory
  least = newton.least_value(problem)
  shape = problem.start(0).shape

  def measure(params):
    value = jnp.maximum(fun(params) - least, 0.0)
    return {'tuning': value, 'value': value}

  return of_function(
    lambda key: 0.1 * jax.random.normal(key, shape),
    lambda params, key: fun(params),
    measure,
    lambda params, key: curvature(params, data),
    methods=NEWTON_METHODS, learning_rates=GRID, budget=200, value='f - f*',
    target=1e-6,
  )  # fmt: skip


def least_squares() -> Problem:
  """Linear regression on the diabetes data, whose least value is known."""
  bunch: Any = datasets.load_diabetes()
  features = bunch.data / np.std(bunch.data, 0)
  targets = (bunch.target - np.mean(bunch.target)) / np.std(bunch.target)
  best = np.linalg.lstsq(features, targets, rcond=None)[0]
  features, targets = jnp.asarray(features), jnp.asarray(targets)
  fun = lambda params: jnp.mean((features @ params - targets) ** 2) / 2
  least = fun(jnp.asarray(best))
  height = fun(jnp.zeros(features.shape[1])) - least

  def measure(params):
    gap = jnp.maximum(fun(params) - least, 0.0) / height
    return {'tuning': gap, 'value': gap}

  return of_function(
    lambda key: 0.1 * jax.random.normal(key, features.shape[1:]),
    lambda params, key: fun(params), measure, methods=NEWTON_METHODS,
    learning_rates=GRID, budget=200, value='(f - f*) / (f(0) - f*)',
    target=1e-6,
  )  # fmt: skip


def ridge_penalty() -> Problem:
  """The log penalty of a ridge regression, by its validation loss.

  The regression is solved in every call, so that the two levels are one
  function of a number.
  """
  problem, _, least = penalties.linear('ridge', 8, str(jnp.zeros(()).dtype))

  def value(x):
    return problem.measure(x, None, problem.data)['valid_loss']

  first = problem.start(jax.random.key(0), problem.data)[0]
  height = value(first) - least

  def measure(x):
    gap = jnp.maximum(value(x) - least, 0.0) / height
    return {'tuning': gap, 'value': gap}

  return of_function(
    lambda key: first + 0.1 * jax.random.normal(key), lambda x, key: value(x),
    measure, methods=NEWTON_METHODS, learning_rates=GRID, budget=200,
    value='(f - f*) / (f(x0) - f*)', target=1e-4,
  )  # fmt: skip


def density_nce() -> Problem:
  """Two moons by noise contrastive estimation, with a batch in each step."""
  # A set of rows for tuning, and one for the report.
  train, test, entropy, noise, log_q = plane_noise.plane(
    'moons', 'mixture', (0, study.TUNING_SEED)
  )
  noise = jax.tree.map(lambda leaf: leaf[0], noise)

  def log_ratio(params, rows, log_q):
    return densities.log_density(params[0], rows) - params[1] - log_q

  def start(key):
    network = densities.init_mlp(key, (2, 32, 32, 1))
    return network, jnp.asarray(math.log(8 * math.pi), float)

  def loss(params, key):
    keys = jax.random.split(key)
    rows = jax.random.randint(keys[0], (128,), 0, train.shape[1])
    drawn = noise.sample_lattice(keys[1], 128)
    data = log_ratio(params, train[0, rows], log_q[0, rows])
    other = log_ratio(params, drawn, noise.log_prob(drawn))
    return jnp.mean(jax.nn.softplus(-data)) + jnp.mean(jax.nn.softplus(other))

  # The model is one on this square.
  side = (np.arange(100) + 0.5) / 100 * 2 * plane.BOX - plane.BOX
  grid = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2))
  log_area = 2 * math.log(side[1] - side[0])

  def measure(params):
    model = functools.partial(densities.log_density, params[0])
    log_z = jax.nn.logsumexp(model(grid.astype(train.dtype))) + log_area
    value, tuning = (
      entropy[i] + log_z - jnp.mean(model(test[i, :2000])) for i in (0, 1)
    )
    return {'tuning': tuning, 'value': value}

  return of_function(
    start, loss, measure, methods=('sgd', 'adam', 'diffgrad'),
    learning_rates=(1e-3, 1e-2, 1e-1, 1.0, 10.0), budget=200,
    value='held-out divergence, nats', target=0.1,
  )  # fmt: skip


def mnist(data_dir: str) -> Problem:
  """Softmax regression on MNIST, with a batch in each step."""
  dataset = data_lib.load('mnist', data_dir)
  pixels = jnp.asarray(data_lib.dense(dataset), float)
  labels = jnp.asarray(dataset.labels)
  # A fifth to tune on, a fifth to report.
  cut = len(labels) // 5

  def mean(params, rows, labels):
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(rows @ params, labels)
    )

  def loss(params, key):
    rows = jax.random.randint(key, (128,), 2 * cut, len(labels))
    return mean(params, pixels[rows], labels[rows])

  def measure(params):
    part = lambda i: slice(i * cut, (i + 1) * cut)
    held = [mean(params, pixels[part(i)], labels[part(i)]) for i in (0, 1)]
    return {'tuning': held[0], 'value': held[1]}

  return of_function(
    lambda key: 0.01 * jax.random.normal(key, (pixels.shape[1], 10)), loss,
    measure, methods=('sgd', 'adam', 'diffgrad'),
    learning_rates=(1e-3, 1e-2, 1e-1, 1.0, 10.0), budget=200,
    value='test loss', target=0.5,
  )  # fmt: skip


# A problem in a file of the user's.


def of_file(path: str) -> Problem:
  """The problem that a Python file defines.

  Args:
    path: A file with ``start(key)``, which makes parameters, ``loss(params,
      key)``, a scalar whose key draws the batch, and ``measure(params)``, what
      is reported; and, if it likes, ``tuning(params)``, by which rates are
      picked, ``METHODS``, ``LEARNING_RATES``, ``BUDGET``, ``VALUE`` (its name)
      and ``TARGET``.

  Returns:
    The problem.

  Raises:
    UserError: The file lacks one of them, or does not run.
  """
  try:
    found = runpy.run_path(path)
  except Exception as error:
    raise flags.UserError(
      f'--problem={path}: {type(error).__name__}: {error}'
    ) from error
  for name in ('start', 'loss', 'measure'):
    if not callable(found.get(name)):
      raise flags.UserError(f'--problem={path}: has no function {name}')
  start, loss, reported = (found[n] for n in ('start', 'loss', 'measure'))
  tuning = found.get('tuning', reported)
  try:
    key = jax.random.key(0)
    params = jax.eval_shape(start, key)
    shapes = [
      jax.eval_shape(loss, params, key).shape,
      *(jax.eval_shape(f, params).shape for f in (reported, tuning)),
    ]
    grid = tuple(float(rate) for rate in found.get('LEARNING_RATES', GRID))
    budget = float(found.get('BUDGET', 1000))
  except Exception as error:
    raise flags.UserError(
      f'--problem={path}: {type(error).__name__}: {str(error)[:300]}'
    ) from error
  if any(shapes):
    raise flags.UserError(
      f'--problem={path}: loss, measure and tuning give scalars, not arrays of'
      f' shape {next(filter(None, shapes))}'
    )
  return of_function(
    start, loss,
    lambda params: {'tuning': tuning(params), 'value': reported(params)},
    methods=tuple(found.get('METHODS', ('sgd', 'adam', 'diffgrad'))),
    learning_rates=grid, budget=budget,
    value=str(found.get('VALUE', 'measure')), target=found.get('TARGET'),
  )  # fmt: skip


# Images in batches: constant ones, and ones that grow.

BATCH, MAX_BATCH = 32, 512


def _perceptron():
  """A model of the digits, and the parts to train, tune and test on."""
  whole = image_classifiers.load('digits', '', 360, np.float32)
  inner = image_classifiers.hold_out(*whole.train, 287, 'valid', whole.classes)
  parts = jax.tree.map(jnp.asarray, (inner.train, inner.held, whole.held))
  side = whole.train[0].shape[1]
  model = image_classifiers.model('mlp', side, whole.classes, jnp.float32)
  return model, *parts


def digits_mlp() -> Problem:
  """The perceptron as a function of parameters, with a batch in each step."""
  model, data, valid, test = _perceptron()

  def loss(params, key):
    rows = jax.random.randint(key, (BATCH,), 0, len(data[1]))
    return jnp.mean(model.losses(params, (data[0][rows], data[1][rows])))

  def measure(params):
    mean = lambda part: jnp.mean(model.losses(params, part))
    return {'tuning': mean(valid), 'value': mean(test)}

  return of_function(
    model.start, loss, measure, methods=('sgd', 'adam', 'diffgrad'),
    learning_rates=(1e-3, 1e-2, 1e-1, 1.0, 10.0), budget=200,
    value='test loss', target=0.3,
  )  # fmt: skip


def images() -> Problem:
  """A perceptron on the digits; rates by validation loss, test loss shown."""
  model, data, valid, test = _perceptron()
  estimator = optlab.per_example(
    model.losses, optlab.ghost_norms, microbatch_size=BATCH
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
    return of_optimizers(
      name, lambda one: of_batches(one.make, BATCH)._replace(tuned=one.tuned)
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
  'logistic': logistic,
  'images': images,
  'ridge': ridge,
  'blocks': blocks,
  'density': density,
  'labels': lambda: label_methods.problem(label_sets.synthetic),
  'next_word': lambda: label_methods.problem(label_sets.next_words),
}
CUTEST = (
  'AKIVA', 'BOX3', 'BROWNDEN', 'CHWIRUT1LS', 'CLIFF', 'DENSCHNC', 'EXPFIT',
)  # fmt: skip


def _small(name: str, kind: str) -> smooth.Problem:
  dataset = data_lib.load(name)
  make = smooth.logistic if kind == 'logistic' else smooth.softmax
  return make(dataset, 1.0 / len(dataset.labels))


def _equations(kind: str) -> Callable[[], Problem]:
  return of_smooth(lambda: smooth.equations(kind, 2, 10))


# Functions of parameters, on which every optimizer runs.
CLASSIC: dict[str, Callable[[], Problem]] = {
  'mushrooms': logistic,
  'breast_cancer': of_smooth(lambda: _small('breast_cancer', 'logistic')),
  'least_squares': least_squares,
  'ridge_penalty': ridge_penalty,
  'digits_softmax': of_smooth(lambda: _small('digits', 'softmax')),
  'rosenbrock': _equations('rosenbrock'),
  'chebyshev': _equations('chebyshev'),
  'linear': _equations('linear'),
  'log_sum_exp': of_smooth(lambda: smooth.log_sum_exp(50, 20)),
  'digits_mlp': digits_mlp,
  'moons_nce': density_nce,
  **{
    f'cutest_{name.lower()}': of_smooth(
      functools.partial(smooth.cutest, name), 'exact'
    )
    for name in CUTEST
  },
}
SETS = {'classic': CLASSIC}
