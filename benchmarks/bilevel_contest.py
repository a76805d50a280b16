"""Every bilevel estimator at equal oracle calls and at equal flops.

python -m benchmarks.bilevel_contest [quadratic|a8a [STEPS [calls|flops]]]

Two finite sums: quadratics, whose hypergradient is known, and logistic
regression on a8a (where OPTLAB_DATA is set) with a penalty for each feature.
Each estimator has two rates below and a grid of rates above that goes on past
its edge, picked on two seeds of their own; five more are shown, with the paired
difference from the best one.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import bilevel as quadratics
from experiments.lab import oracles
from experiments.lab import searching
from experiments.lab import tables
from experiments.lab import verdicts
from experiments.methods import bilevel
from experiments.problems import data
from experiments.problems import penalties
import optlab

LOWER_STEPS, NEUMANN_STEPS, PRODUCTS, PERIOD = 5, 5, 10, 16
BATCH, SEEDS, TUNING_SEEDS = 64, 5, 2
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)


def quadratic():
  """Levels, data, start, lower rates, and the squared norm of grad F."""
  random = np.random.RandomState(0)
  lower = quadratics.make_quadratic(2048, 20, 10, 0.1, random)
  upper = quadratics.make_quadratic(1024, 20, 10, 0.1, random)
  levels = tuple(
    lambda x, y, rows, part=part: quadratics.level(
      x, y, jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], part)
    )
    for part in (upper, lower)
  )
  metric = quadratics.squared_gradient(lower, upper)
  start = jnp.full(10, -2.0), jnp.zeros(20)
  return levels, (1024, 2048), start, (0.1, 0.3), optax.sgd, metric


def a8a(folder):
  """The same of penalties of a8a's features; F is of the exact lower level."""
  found = data.load('a8a', folder)
  features, labels = found.features.toarray(), data.signs(found)
  order = np.random.RandomState(0).permutation(len(labels))
  parts = [
    (features[order[a:b]].astype(np.float32), labels[order[a:b]])
    for a, b in ((0, 1024), (1024, 3072), (3072, 4096))
  ]

  def loss(y, part, rows):
    x, t = (jnp.asarray(leaf, jnp.float32)[rows] for leaf in part)
    return jnp.mean(jax.nn.softplus(-t * (x @ y)))

  upper = lambda x, y, rows: loss(y, parts[0], rows)

  def lower(x, y, rows):
    return loss(y, parts[1], rows) + 0.5 * jnp.sum(jnp.exp(x) * y**2)

  @jax.jit
  def exact(x):
    every = slice(None)
    y = penalties.newton(
      lambda y: lower(x, y, every), jnp.zeros(features.shape[1])
    )
    return upper(x, y, every)

  size = features.shape[1]
  start = jnp.full(size, -4.0), jnp.zeros(size)
  metric = lambda x: float(exact(jnp.asarray(x)))
  return (upper, lower), (1024, 2048), start, (0.1, 0.3), optax.adam, metric


def methods(blocks, rows):
  """The table of the programs, and SRBA, which wants all data."""
  table = bilevel.methods(LOWER_STEPS, NEUMANN_STEPS, PRODUCTS, blocks=blocks)
  for name in ('bo_rep_period1', 'bo_rep_period4', 'bo_rep_single'):
    del table[name]

  def srba(upper, lower, optimizer, dual_lr):
    full = optlab.BilevelBatch(*map(jnp.arange, rows))
    return optlab.bilevel.srba(
      upper, lower, optimizer, dual_lr, full, period=PERIOD
    )

  # Four calls on all data every PERIOD steps, by the rows of a batch.
  full = 2 * (rows[0] + rows[1]) / BATCH / PERIOD
  table['srba'] = bilevel.Method(srba, 0, 4 + full / 2, 4 + full / 2)
  return table


def flops(jaxpr, rounds, share):
  """Multiplications and additions of a program, loops as often as they run."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, outs = equation.primitive.name, equation.outvars
    inner = [
      flops(part, rounds, share) for part in oracles._parts(equation.params)
    ]
    size = sum(np.prod(var.aval.shape) for var in outs)
    if name == 'cond':  # The last branch is taken once in so many steps.
      total += (1 - share) * inner[0] + share * inner[-1]
    elif inner:
      times = {'scan': equation.params.get('length', 1), 'while': rounds}
      total += times.get(name, 1) * sum(inner)
    elif name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      total += 2 * size * np.prod([shape[axis] for axis in contracted])
    elif name.startswith('reduce'):
      total += np.prod(equation.invars[0].aval.shape)
    elif name not in ('gather', 'broadcast_in_dim', 'reshape', 'transpose'):
      total += size
  return total


def runner(name, method, levels, rows, start, upper_step):
  """A compiled run of lanes, and what a step costs."""
  keyed = (jax.random.key(0),) if method.keyed else ()

  def parts(rates, steps):
    rate = lambda t: rates[1] * 0.5 * (1 + jnp.cos(jnp.pi * t / steps))
    estimator = method.make(*levels, optax.sgd(rates[0]), rates[0])
    return estimator, upper_step(rate)

  def sample(key):
    keys, found = jax.random.split(key), []
    for one, count in zip(keys, rows, strict=True):
      block = jax.random.randint(one, (), 0, count // BATCH)
      own = block * BATCH + jnp.arange(BATCH)
      found.append(
        optlab.bilevel.IndexedBatch(block, own) if method.indexed else own
      )
    return tuple(found)

  def advance(state, key, rates, steps):
    batch = bilevel.draw(key, sample, method.step_samples)
    return optlab.train_step(*parts(rates, steps))(state, batch)[0]

  def begin(rates, steps):
    x, y = start
    return optlab.init(x, *parts(rates, steps), y, *keyed)

  @jax.jit
  def run(rates, seeds, steps):
    def lane(rates, seed):
      key = jax.random.key(seed)
      body = lambda t, state: advance(
        state, jax.random.fold_in(key, t), rates, steps
      )
      return jax.lax.fori_loop(0, steps, body, begin(rates, steps)).params

    return jax.vmap(lane)(rates, seeds)

  rates = jnp.asarray([0.1, 0.1])
  program = jax.make_jaxpr(lambda s: advance(s, jax.random.key(0), rates, 10))(
    begin(rates, 10)
  )
  rounds = {'implicit': PRODUCTS, 'ttsa': (NEUMANN_STEPS - 1) / 2}
  share = {'bo_rep': 1 / 2, 'srba': 1 / PERIOD}
  count = flops(program.jaxpr, rounds.get(name, 1), share.get(name, 1.0))
  return run, {'calls': method.calls, 'flops': count}


def tuned(ends, lower_rates):
  """The rates of the least median, and whether the upper one is at an edge."""
  best = {}

  def measure(new, grid):
    del grid
    for i in range(0, len(new), len(RATES)):
      some = new[i : i + len(RATES)]
      pairs = [(low, up) for up in some for low in lower_rates]
      seeds = range(1000, 1000 + TUNING_SEEDS)
      values = np.median([ends(pairs, [seed]) for seed in seeds], axis=0)
      own = dict(zip(pairs, values, strict=True))
      for up in some:
        low = min(lower_rates, key=lambda low: own[low, up])
        best[up] = low
        yield up, own[low, up]

  found = searching.search(RATES, measure)
  return (best[found.rate], found.rate), found.edge


def contest(problem, made, unit, steps):
  """Rows of a table at the cost of so many steps of the first estimator."""
  _, _, _, lower_rates, _, metric = problem
  budget, found = None, {}
  for name, (run, costs) in made.items():
    budget = budget or steps * costs[unit]
    count = max(1, round(budget / costs[unit]))

    def ends(pairs, seeds, run=run, count=count):
      """Values of as many lanes as the longer has; one program serves all."""
      lanes = len(lower_rates) * len(RATES)
      fill = lambda some: jnp.asarray(
        [some[i % len(some)] for i in range(lanes)]
      )
      wanted = max(len(pairs), len(seeds))
      x = run(fill(pairs), fill(seeds), count)
      values = [metric(each) for each in np.asarray(x)[:wanted]]
      return [v if np.isfinite(v) else np.inf for v in values]

    pair, edge = tuned(ends, lower_rates)
    found[name] = count, pair, edge, ends([pair], list(range(SEEDS)))
  middle = lambda name: np.median(found[name][-1])
  first, rows = min(found, key=middle), []
  for name in sorted(found, key=middle):
    count, (low, up), edge, values = found[name]
    gap = verdicts.paired(np.subtract(values, found[first][-1]))
    said = 'first'
    if name != first:
      said = f'{gap.low:+.2g} to {gap.high:+.2g}, {gap.said}'
    rows.append(
      (name, count, low, f'{up:g}{"*" * edge}', f'{middle(name):.3g}', said)
    )
  return rows


def main(only: str = '', steps: int = 2000, unit: str = '') -> None:
  problems = []
  if only != 'a8a':
    problems = [('quadratic', quadratic(), 'squared norm of grad F')]
  folder = os.environ.get('OPTLAB_DATA')
  if folder and only != 'quadratic':
    title = 'a8a, a penalty a feature'
    problems.append((title, a8a(folder), 'F, the validation loss'))
  for title, problem, value in problems:
    levels, rows, start, _, upper_step, _ = problem
    blocks = tuple(count // BATCH for count in rows)
    made = {
      name: runner(name, method, levels, rows, start, upper_step)
      for name, method in methods(blocks, rows).items()
    }
    for each in [unit] if unit else ['calls', 'flops']:
      tables.show(
        f'{title}: {each} of {steps} steps of bo_rep; {value}, {SEEDS} seeds;'
        ' * a rate at the edge of a grid that went on',
        ('estimator', 'steps', 'lower', 'upper', 'median',
         'behind the first, 95 %'),
        contest(problem, made, each, steps),
      )  # fmt: skip


if __name__ == '__main__':
  given = sys.argv[1:]
  main(*given[:1], *map(int, given[1:2]), *given[2:3])
