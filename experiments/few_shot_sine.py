"""A start for many small networks, from which ten examples teach a new one.

python -m experiments.few_shot_sine [--penalty=10] [--methods=...] ...

A task is a sine of its own amplitude and phase; a block is a task, its lower
variable a network that is drawn to the start x by a penalty. `bsvrb` keeps a
network of each task, and takes the hypergradient from its Gauss-Newton products
(`bsvrb_hessian`: from its Hessian, which is indefinite); `unrolled`, the peer,
is MAML: it differentiates through a few steps from x and keeps nothing. All see
the same tasks and as many examples. Reported: the error on new tasks after
steps of gradient descent from x on ten examples each. It, and not the loss that
a step reports, is what the start is for: a network that is kept for its task
knows it without the start's help.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import optlab

from .lab import flags
from .lab import launch
from .lab import plots
from .lab import study
from .lab import verdicts
from .lab.session import Session

METHODS = ('bsvrb', 'bsvrb_hessian', 'unrolled')


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  """Flags."""

  QUICK = {
    'methods': ('bsvrb', 'unrolled'),
    'steps': 1000,
    'seeds': 2,
  }
  MINUTES = (1, 2)

  num_tasks: int = flags.flag(200, 'Tasks, m.', low=1)
  tasks: int = flags.flag(20, 'Tasks sampled in a step, I.', low=1)
  shots: int = flags.flag(10, 'Examples of a task, at each level.', low=1)
  width: int = flags.flag(20, 'Width of the two hidden layers.', low=1)
  penalty: float = flags.flag(
    10.0, 'Weight of |y - x|^2 / 2 in the lower problems.', low=0.0
  )
  steps: int = flags.flag(3000, 'Steps.', low=20)
  looks: int = flags.flag(10, 'Evaluations of a run.', low=1)
  learning_rates: tuple[float, ...] = flags.flag(
    (1e-3,), 'Rates of the start, which decay; several are tuned.', low=0.0
  )
  tuning_seeds: int = flags.flag(1, 'Seeds that pick rates.', low=1, grows=True)
  unrolled_steps: int = flags.flag(5, 'Lower steps of unrolled.', low=1)
  unrolled_lr: float = flags.flag(0.03, 'Their rate.', low=0.0)
  adapt_steps: int = flags.flag(50, 'Steps on a new task.', low=1)
  adapt_lr: float = flags.flag(0.01, 'Their rate.', low=0.0)
  methods: tuple[str, ...] = flags.flag(METHODS, 'Methods.', choices=METHODS)
  seeds: int = flags.flag(3, 'Number of seeds.', low=1, grows=True)
  precision: str = flags.flag(
    'float32', 'Floating point type.', choices=('float32', 'float64')
  )


def sample_tasks(key: jax.Array, count: int, dtype: str) -> jax.Array:
  """Amplitudes and phases, of shape ``(count, 2)``."""
  uniform = jax.random.uniform(key, (count, 2), dtype)
  low, high = jnp.array([0.1, 0.0]), jnp.array([5.0, jnp.pi])
  return (low + uniform * (high - low)).astype(dtype)


def sample_rows(key: jax.Array, tasks: jax.Array, shots: int) -> Any:
  """Examples of each task: inputs and values."""
  shape = len(tasks), shots
  inputs = jax.random.uniform(key, shape, tasks.dtype, -5.0, 5.0)
  return inputs, values_at(inputs, tasks)


def values_at(inputs: jax.Array, tasks: jax.Array) -> jax.Array:
  """The sine of each task at its own inputs."""
  return tasks[:, :1] * jnp.sin(inputs - tasks[:, 1:])


def start_network(key: jax.Array, width: int, dtype: str) -> list:
  """Two hidden layers whose first one is spread over the inputs."""
  sizes = 1, width, width, 1
  keys = jax.random.split(key, 3)
  layers = [
    (jax.random.normal(k, (a, b), dtype) / a**0.5, jnp.zeros(b, dtype))
    for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
  ]
  first = layers[0][0], jnp.linspace(-2.0, 2.0, width, dtype=dtype)
  return [first, *layers[1:]]


def network(weights: list, inputs: jax.Array) -> jax.Array:
  """Outputs of shape ``(rows,)``."""
  hidden = inputs[:, None]
  for matrix, bias in weights[:-1]:
    hidden = jnp.tanh(hidden @ matrix + bias)
  matrix, bias = weights[-1]
  return (hidden @ matrix + bias)[:, 0]


def mean_square(weights: list, rows: Any) -> jax.Array:
  """The error of a network on examples."""
  return jnp.mean((network(weights, rows[0]) - rows[1]) ** 2)


def upper(x: list, y: list, rows: Any) -> jax.Array:
  """What the network of a task is worth on other examples."""
  del x
  return mean_square(y, rows)


def bsvrb(config: Config, name: str) -> optlab.GradientEstimator:
  """An estimator that keeps a network of each task."""

  def lower(x, y, rows):
    apart = jax.tree.map(jnp.subtract, y, x)
    penalty = 0.5 * config.penalty * optax.tree.norm(apart, squared=True)
    return mean_square(y, rows) + penalty

  def curvature(x, y, rows):
    del x
    products = optlab.gauss_newton(
      lambda y: network(y, rows[0]), lambda u: jnp.mean((u - rows[1]) ** 2)
    )(y)
    return lambda v: jax.tree.map(
      lambda product, v: product + config.penalty * v, products(v), v
    )

  return optlab.bsvrb(
    upper, lower, config.num_tasks, inner_lr=None,
    curvature=curvature if name == 'bsvrb' else None,
  )  # fmt: skip


def unrolled(config: Config) -> optlab.GradientEstimator:
  """MAML: the lower variable is the networks of the sampled tasks."""

  def over_tasks(x, y, rows):
    del x
    return jax.vmap(mean_square)(y, rows)

  def spread(x, y):
    return jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), x, y)

  return optlab.unrolled(
    lambda *args: jnp.mean(over_tasks(*args)),
    # A sum, so that no task's steps depend on how many there are.
    lambda *args: jnp.sum(over_tasks(*args)),
    optax.sgd(config.unrolled_lr), lower_steps=config.unrolled_steps,
    warm=False, start=spread, reuse_sample=True,
  )  # fmt: skip


def entry(config: Config, name: str) -> study.Entry:
  """A method on the problem."""

  def make(rate):
    tx = optax.adam(optax.cosine_decay_schedule(rate, config.steps))
    if name == 'unrolled':
      return unrolled(config), tx
    return bsvrb(config, name), tx

  def start(key, rate, seed, tasks):
    del seed
    x = start_network(key, config.width, config.precision)
    count = config.tasks if name == 'unrolled' else len(tasks)
    y = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), x)
    return optlab.init(x, *make(rate), y)

  def step(state, key, rate, tasks):
    keys = jax.random.split(key, 3)
    blocks = optlab.sample_blocks(keys[0], config.num_tasks, config.tasks)
    below, above = (
      sample_rows(key, tasks[blocks], config.shots) for key in keys[1:]
    )
    batch = optlab.BlockBatch(blocks, above, below)
    if name == 'unrolled':
      batch = optlab.BilevelBatch(above, below)
    return optlab.train_step(*make(rate))(state, batch)[0]

  return study.Entry(start, step, config.tasks)


def adapted(config: Config, x: list, key: jax.Array) -> jax.Array:
  """The mean error on 200 new tasks, each taught by a few examples."""
  keys = jax.random.split(key)
  tasks = sample_tasks(keys[0], 200, config.precision)
  examples = sample_rows(keys[1], tasks, config.shots)
  grid = jnp.linspace(-5.0, 5.0, 50, dtype=tasks.dtype)
  inputs = jnp.broadcast_to(grid, (len(tasks), len(grid)))

  def teach(rows):
    def descend(_, y):
      grad = jax.grad(mean_square)(y, rows)
      return jax.tree.map(lambda a, b: a - config.adapt_lr * b, y, grad)

    return jax.lax.fori_loop(0, config.adapt_steps, descend, x)

  networks = jax.vmap(teach)(examples)
  errors = jax.vmap(mean_square)(networks, (inputs, values_at(inputs, tasks)))
  return jnp.mean(errors)


def problem(config: Config) -> study.Problem:
  """Tasks, and what a start is worth on others."""

  def measure(train, tasks):
    del tasks
    return {
      'tuning': adapted(config, train.params, jax.random.key(1)),
      'value': adapted(config, train.params, jax.random.key(2)),
      'total_not_ok': train.estimator_state.info.total_not_ok,
    }

  return study.Problem(
    lambda name: entry(config, name), config.methods, config.learning_rates,
    config.steps * config.tasks, 'visits of a task', measure,
    f'error on new tasks after {config.adapt_steps} steps',
    reported=('total_not_ok',),
    data=sample_tasks(jax.random.key(0), config.num_tasks, config.precision),
  )  # fmt: skip


@launch.program
def main(config: Config) -> None:
  """Compares the methods, prints the table and draws the picture."""
  if config.tasks > config.num_tasks:
    raise flags.UserError(
      f'--tasks={config.tasks}: more than --num_tasks={config.num_tasks}'
    )
  made = problem(config)
  plan = study.Plan(
    '', made, made.budget, config.learning_rates, config.seeds,
    config.tuning_seeds if len(config.learning_rates) > 1 else 0,
    pieces=config.looks,
  )  # fmt: skip
  title = f'few_shot_sine, {config.num_tasks} tasks, {config.shots} examples'
  with Session('few_shot_sine', config) as session:
    rows = study.study(session, plan, config.methods)
    verdicts.show(title, made.value, rows, reported=made.reported)
    figure, axes = plt.subplots(figsize=(5.0, 3.5))
    plots.draw_lines(
      axes, [('', session.rows)], 'calls', 'value', log_x=False, log_y=True,
      keep=plots.reported,
    )  # fmt: skip
    axes.set(xlabel=made.unit, ylabel='error on new tasks')
    axes.legend(fontsize=8)
    path = session.folder / 'few_shot_sine.png'
    plots.save(figure, path, title=title)
    print(path)


if __name__ == '__main__':
  launch.run(main, Config)
