"""Local steps against closed forms, with growing batches, on two devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

CENTRES = jnp.array([[1.0, 0.0], [3.0, -2.0]])


def quadratic(x, centre):
  return 0.5 * jnp.sum((x - centre) ** 2)


def run(step, states, batch, steps):
  def body(states, _):
    states, value = step(states, batch)
    return states, (states.params, value)

  return jax.jit(lambda s: jax.lax.scan(body, s, length=steps))(states)


def begin(estimator, tx, x):
  return jax.vmap(lambda _: optlab.init(x, estimator, tx))(jnp.arange(2))


@pytest.mark.parametrize('devices', [1, 2])
def test_rounds_of_sgd_have_a_closed_form(devices):
  """Between averages to a worker's centre, over them to that of all."""
  estimator, tx = optlab.value_and_grad(quadratic), optax.sgd(0.1)
  step = jax.vmap(
    optlab.batches.local_step(estimator, tx, axis_name='w', every=3),
    axis_name='w',
  )
  states, centres = begin(estimator, tx, jnp.zeros(2)), CENTRES
  if devices == 2:
    mesh = jax.make_mesh(
      (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    place = jax.NamedSharding(mesh, jax.P('data'))
    states, centres = jax.device_put((states, centres), place)
  _, (path, _) = run(step, states, centres, 7)
  middle = CENTRES.mean(0)
  for t, found in enumerate(path, 1):
    rounds, rest = divmod(t, 3)
    start = middle * (1 - 0.9 ** (3 * rounds))
    expected = CENTRES + 0.9**rest * (start - CENTRES)
    np.testing.assert_allclose(found, expected if rest else [start] * 2, 1e-5)


def test_an_average_in_each_step_is_the_step_on_all():
  losses = lambda x, rows: (rows @ x - 1.0) ** 2
  rows = jax.random.normal(jax.random.key(0), (8, 3))
  estimator, tx = optlab.per_example(losses), optax.sgd(0.1)
  step = jax.vmap(
    optlab.batches.local_step(estimator, tx, axis_name='w', every=1),
    axis_name='w',
  )
  states, (_, values) = run(
    step, begin(estimator, tx, jnp.zeros(3)), rows.reshape(2, 4, 3), 5
  )
  whole, (_, alone) = run(
    optlab.train_step(estimator, tx),
    optlab.init(jnp.zeros(3), estimator, tx),
    rows,
    5,
  )
  np.testing.assert_allclose(states.params[0], whole.params, 1e-5)
  np.testing.assert_allclose(values.mean(1), alone, 1e-5)


def test_workers_go_on_with_the_largest_batch():
  """Averaged moments of tests, one size; keys stay apart."""
  losses = lambda x, rows, keys: (rows @ x - 1.0) ** 2
  rows = jax.random.normal(jax.random.key(0), (2, 6, 3))
  spread = jnp.array([0.1, 0.6])[:, None, None]
  rows = jnp.ones(3) + spread * rows
  estimator = optlab.per_example(losses, has_key=True)
  tx = optlab.adadagrad(0.1, optlab.norm_test(0.3, decay=0.5), 2, 64)
  keys = jax.random.split(jax.random.key(1), 2)
  states = jax.vmap(lambda key: optlab.init(jnp.zeros(3), estimator, tx, key))(
    keys
  )
  step = jax.jit(
    jax.vmap(
      optlab.batches.local_step(estimator, tx, axis_name='w', every=2),
      axis_name='w',
    )
  )
  apart, _ = step(states, rows)
  sizes = jax.vmap(optlab.batches.next_size)(apart)
  assert sizes[0] != sizes[1]
  together, _ = step(apart, rows)
  sizes = jax.vmap(optlab.batches.next_size)(together)
  assert sizes[0] == sizes[1]
  assert jax.tree.map(jax.typeof, together) == jax.tree.map(jax.typeof, apart)
  for leaf in jax.tree.leaves(together.opt_state):
    np.testing.assert_array_equal(leaf[0], leaf[1])
  assert np.all(together.estimator_state.key == keys)
