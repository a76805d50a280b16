"""A step of every family on eight devices: bytes of the fullest, collectives.

Parameters and tables are split as in fully sharded data parallelism, rows of
the data over the same devices; and the part of the work of a growing step that
a device does. Prints a line of JSON; eight virtual devices
need a process of their own, see `eight_devices_test`.
"""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import ghost
import optlab
from tests.layout import COLLECTIVES
from tests.layout import bytes_a_device

DEVICES, ROWS, INPUTS, WIDTH = 8, 16, 32, 128
NUMBERS = INPUTS * WIDTH + 2 * WIDTH
SPECS = {'w': jax.P(None, 'data'), 'b': jax.P('data'), 'v': jax.P('data')}
SGD = optax.sgd(0.01)
RULE = optlab.norm_test(0.5)


def outputs(params, rows):
  return jnp.tanh(rows @ params['w'] + params['b']) @ params['v']


def losses(params, rows):
  return jnp.square(outputs(params, rows) - 1.0)


def loss(params, rows):
  return jnp.mean(losses(params, rows))


def upper(x, y, rows):
  return loss(y, rows) + jnp.sum(x**2)


def lower(x, y, rows):
  return jnp.mean(jax.nn.softplus(x[0]) * losses(y, rows))


def tables_upper(x, y, rows):
  return jnp.mean((rows @ y - 1.0) ** 2) + jnp.sum(x**2)


def tables_lower(x, y, rows):
  return jnp.mean((rows @ y) ** 2) + jnp.sum((y - x) ** 2)


GRADIENT = optlab.value_and_grad(loss)
LEVELS = upper, lower
FULL = optlab.BilevelBatch(*(np.ones((ROWS, INPUTS), np.float32),) * 2)


def growing(route, **kwargs):
  return (
    optlab.per_example(losses, route, **kwargs),
    optlab.adadagrad(0.1, RULE, 8, 100),
  )


PLAIN = {
  'adam': lambda: (GRADIENT, optax.adam(0.1)),
  'value_and_grad': lambda: (GRADIENT, SGD),
  'diffgrad': lambda: (GRADIENT, optlab.diffgrad(0.1)),
  'adagrad_norm': lambda: (GRADIENT, optlab.adagrad_norm(1.0)),
  'normalized_momentum': lambda: (GRADIENT, optlab.normalized_momentum(0.1)),
  'with_storm': lambda: (optlab.with_storm(GRADIENT, 0.1), SGD),
  'ghost_norms': lambda: growing(optlab.ghost_norms),
  'microbatch_means': lambda: growing(
    optlab.batches.microbatch_means, microbatch_size=8
  ),
  'gns_newton': lambda: (GRADIENT, optlab.gns_newton(optlab.cg(3))),
}
BILEVEL = {
  'soba': lambda: optlab.soba(*LEVELS, SGD, 0.01),
  'bo_rep': lambda: optlab.bo_rep(*LEVELS, SGD, 0.01, lower_steps=1),
  'stocbio': lambda: optlab.stocbio(*LEVELS, SGD, 0.01, lower_steps=1),
  'f2sa': lambda: optlab.bilevel.f2sa(*LEVELS, SGD, 10.0, lower_steps=1),
  'srba': lambda: optlab.bilevel.srba(*LEVELS, SGD, 0.01, FULL, period=3),
}
LIKELIHOOD = {
  'meco': lambda: optlab.meco(outputs, 0.5),
  'nce': lambda: optlab.nce(outputs),
}
TABLES = {'bsvrb': lambda: optlab.bsvrb(tables_upper, tables_lower, DEVICES)}


def place(tree, spec):
  return jax.device_put(tree, jax.NamedSharding(MESH, spec))


def problem(name):
  """Estimator, optimizer, parameters, inner variables, batch."""
  keys = jax.random.split(jax.random.key(0), 4)
  rows = jax.random.normal(keys[0], (ROWS, INPUTS))
  split = place(rows, jax.P('data'))
  whole = {
    'w': 0.1 * jax.random.normal(keys[1], (INPUTS, WIDTH)),
    'b': jnp.zeros(WIDTH),
    'v': 0.1 * jax.random.normal(keys[2], (WIDTH,)),
  }
  params = jax.tree.map(place, whole, SPECS)
  x = jnp.ones(2)
  if name in PLAIN:
    return *PLAIN[name](), params, (), split
  if name in BILEVEL:
    steps = place(jnp.stack([rows]), jax.P(None, 'data'))
    batch = optlab.BilevelBatch(split, split, steps)
    return BILEVEL[name](), SGD, x, (params,), batch
  if name in LIKELIHOOD:
    noise = place(jax.random.normal(keys[3], (ROWS, INPUTS)), jax.P('data'))
    density = lambda rows: -0.5 * jnp.sum(rows**2, 1)
    batch = optlab.NoiseBatch(split, noise, density(noise), density(split))
    return LIKELIHOOD[name](), SGD, params, (), batch
  table = place(jnp.ones((DEVICES, WIDTH)), jax.P('data'))
  rows = jax.random.normal(keys[3], (4, ROWS, WIDTH))
  blocks = jnp.asarray([0, 3, 5, 6])
  return (
    TABLES[name](),
    SGD,
    jnp.ones(()),
    (table,),
    optlab.BlockBatch(blocks, rows, rows),
  )


def measure(name):
  """Bytes before and after a step, and the collectives of the step."""
  estimator, tx, params, inner, batch = problem(name)
  state = optlab.init(params, estimator, tx, *inner)
  compiled = jax.jit(optlab.train_step(estimator, tx)).lower(
    state, batch
  ).compile()  # fmt: skip
  after, value = compiled(state, batch)
  assert jnp.isfinite(value)
  rest = lambda state: bytes_a_device((state.opt_state, state.estimator_state))
  found = collections.Counter(COLLECTIVES.findall(compiled.as_text()))
  return {'before': rest(state), 'after': rest(after), **found}


if __name__ == '__main__':
  MESH = jax.make_mesh(
    (DEVICES,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  names = (*PLAIN, *BILEVEL, *LIKELIHOOD, *TABLES)
  found = {name: measure(name) for name in names}
  print(json.dumps(found | {'share': dict(ghost.shares(128))}))
