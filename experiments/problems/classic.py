"""The set of problems called classic, on which every optimizer runs.

Where a function has no noise the value is its height above the least one, as a
share of the height of the start; solved is a millionth. The least value is
known, or it is the least that reference solvers find (`smooth.least_value`).
Where batches are seen solved is a tenth more than the median at which Adam
ends, its rate tuned, by ``compare --problems=classic --methods=adam --seeds=10
--data_dir=FOLDER``: .36 nats, .180, .492.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

from ..lab import functions
from ..lab import study
from . import data as data_lib
from . import densities
from . import image_classifiers
from . import penalties
from . import plane
from . import plane_noise
from . import regressions
from . import smooth

SOLVED = 1e-6
TARGETS = {'moons_nce': 0.4, 'digits_mlp': 0.2, 'mnist': 0.54}
BATCH = 32
METHODS = (
  'gns_newton', 'lbfgs', 'sgd', 'adam', 'diffgrad', 'adagrad_norm',
)  # fmt: skip


def noiseless(
  fun: Callable[[Any], jax.Array],
  first: Any,
  least: float | jax.Array,
  curvature: Callable[[Any, Any], Any] | None = None,
) -> study.Problem:
  """A function without noise, by its height above the least value.

  Args:
    fun: ``params -> scalar``.
    first: An array, the start but for a tenth of its scale.
    least: The least value.
    curvature: See `functions.of_function`.

  Returns:
    The problem.
  """
  height = fun(first) - least
  scale = jnp.max(jnp.abs(first))
  scale = 0.1 * jnp.where(scale > 0, scale, 1.0)

  def measure(params):
    gap = jnp.maximum(fun(params) - least, 0.0) / height
    return {'tuning': gap, 'value': gap}

  return functions.of_function(
    lambda key: first + scale * jax.random.normal(key, first.shape),
    lambda params, key: fun(params), measure, curvature, methods=METHODS,
    learning_rates=functions.GRID, budget=200, value='(f - f*) / (f(x0) - f*)',
    target=SOLVED,
  )  # fmt: skip


def of_smooth(
  make: Callable[[], smooth.Problem], curvature: str = 'gauss_newton'
) -> Callable[[], study.Problem]:
  """What makes a smooth function's problem, with the curvature of that name."""

  def problem():
    own = make()
    data = jax.tree.map(jnp.asarray, own.data)
    factory = own.curvatures[curvature].factory
    return noiseless(
      lambda params: own.fun(params, data), jnp.asarray(own.start(0)),
      smooth.least_value(own), lambda params, key: factory(params, data),
    )  # fmt: skip

  return problem


def least_squares() -> study.Problem:
  """Linear regression on the diabetes data, whose least value is known."""
  bunch: Any = datasets.load_diabetes()
  features = bunch.data / np.std(bunch.data, 0)
  targets = (bunch.target - np.mean(bunch.target)) / np.std(bunch.target)
  best = np.linalg.lstsq(features, targets, rcond=None)[0]
  features, targets = jnp.asarray(features), jnp.asarray(targets)
  fun = lambda params: jnp.mean((features @ params - targets) ** 2) / 2
  best = jnp.asarray(best)
  return noiseless(fun, jnp.zeros_like(best), fun(best))


def ridge_penalty() -> study.Problem:
  """The log penalty of a ridge regression, by its validation loss.

  The regression is solved in every call, so that the two levels are one
  function of a number.
  """
  problem, _, least = penalties.linear('ridge', 8, str(jnp.zeros(()).dtype))
  first = problem.start(jax.random.key(0), problem.data)[0]
  value = lambda x: problem.measure(x, None, problem.data)['valid_loss']
  return noiseless(value, first, least)


def in_batches(
  name: str, value: str, start: Any, loss: Any, measure: Any
) -> study.Problem:
  """A function that a step sees through a batch."""
  return functions.of_function(
    start, loss, measure, methods=('sgd', 'adam', 'diffgrad'),
    learning_rates=functions.GRID, budget=200, value=value,
    target=TARGETS[name],
  )  # fmt: skip


def density_nce() -> study.Problem:
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

  return in_batches(
    'moons_nce', 'held-out divergence, nats', start, loss, measure
  )


def mnist(data_dir: str) -> study.Problem:
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

  start = lambda key: 0.01 * jax.random.normal(key, (pixels.shape[1], 10))
  return in_batches('mnist', 'test loss', start, loss, measure)


def perceptron():
  """A model of the digits, and the parts to train, tune and test on."""
  whole = image_classifiers.load('digits', '', 360, np.float32)
  inner = image_classifiers.hold_out(*whole.train, 287, 'valid', whole.classes)
  parts = jax.tree.map(jnp.asarray, (inner.train, inner.held, whole.held))
  side = whole.train[0].shape[1]
  model = image_classifiers.model('mlp', side, whole.classes, jnp.float32)
  return model, *parts


def digits_mlp() -> study.Problem:
  """The perceptron as a function of parameters, with a batch in each step."""
  model, data, valid, test = perceptron()

  def loss(params, key):
    rows = jax.random.randint(key, (BATCH,), 0, len(data[1]))
    return jnp.mean(model.losses(params, (data[0][rows], data[1][rows])))

  def measure(params):
    mean = lambda part: jnp.mean(model.losses(params, part))
    return {'tuning': mean(valid), 'value': mean(test)}

  return in_batches('digits_mlp', 'test loss', model.start, loss, measure)


CUTEST = (
  'AKIVA', 'BOX3', 'BROWNDEN', 'CHWIRUT1LS', 'CLIFF', 'DENSCHNC', 'EXPFIT',
)  # fmt: skip


def _small(name: str, kind: str) -> smooth.Problem:
  dataset = data_lib.load(name)
  make = regressions.logistic if kind == 'logistic' else regressions.softmax
  return make(dataset, 1.0 / len(dataset.labels))


def _equations(kind: str) -> Callable[[], study.Problem]:
  return of_smooth(lambda: smooth.equations(kind, 2, 10))


# Functions of parameters, on which every optimizer runs.
CLASSIC: dict[str, Callable[[], study.Problem]] = {
  'mushrooms': of_smooth(lambda: _small('mushrooms', 'logistic')),
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
