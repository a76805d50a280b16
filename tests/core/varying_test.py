"""Loops in a `jax.shard_map` whose devices hold other data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
TARGETS = jnp.arange(8.0)


def bowl(rows, targets):
  return lambda x: jnp.sum((rows @ x - targets) ** 2) / 2 + jnp.sum(jnp.cosh(x))


def solve(rows, targets, tx=None, **options):
  return optlab.minimize(
    bowl(rows, targets), jnp.zeros(3), tx or optlab.gns_newton(),
    max_steps=30, grad_tol=1e-3, **options,
  ).params  # fmt: skip


def each(function, run=lambda f, *args: f(*args), out=('data',)):
  """Runs a function on each device, on its own rows."""
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  split = jax.P('data')
  shared = jax.shard_map(
    function, mesh=mesh, in_specs=(split, split), out_specs=jax.P(*out)
  )
  return run(jax.jit(shared), ROWS, TARGETS)


def test_each_device_solves_its_own_problem_and_is_differentiated():
  def both(rows, targets):
    params, pull = jax.vjp(functools.partial(solve, rows), targets)
    return params, *pull(jnp.ones_like(params))

  found, slopes = each(both)
  for i in range(2):
    rows, targets = ROWS[4 * i : 4 * i + 4], TARGETS[4 * i : 4 * i + 4]
    x = found[3 * i : 3 * i + 3]
    assert jnp.linalg.norm(jax.grad(bowl(rows, targets))(x)) < 2e-3
    inverse = np.linalg.inv(jax.hessian(bowl(rows, targets))(x))
    np.testing.assert_allclose(
      slopes[4 * i : 4 * i + 4], rows @ inverse.sum(0), rtol=1e-3, atol=1e-5
    )


def prepared(solver):
  return lambda rows, targets: solver(
    lambda v: rows.T @ (rows @ v), rows.T @ targets, 0.1
  )(0.1)[0]


@pytest.mark.parametrize(
  'function',
  [
    functools.partial(solve, tx=optlab.gns_newton(optlab.cg())),
    functools.partial(solve, bounds=(0.0, 1.0)),
    functools.partial(solve, tx=optax.adam(0.1), trace=lambda now: now.value),
    lambda rows, targets: solve(
      rows, targets, curvature=optlab.dense(optlab.hessian(bowl(rows, targets)))
    ),
    lambda rows, targets: optlab.newton.least_squares(
      lambda x: rows @ x - targets, jnp.zeros(3)
    ).params,
    lambda rows, targets: jax.grad(
      lambda t: optlab.minimize(
        lambda x: jnp.sum((x - t[0]) ** 4), jnp.zeros(300), optax.sgd(0.1),
        max_steps=2,
      ).params.sum()
    )(targets),
    prepared(optlab.lanczos()),
    prepared(optlab.newton.multishift_cg()),
  ],
)  # fmt: skip
def test_types_agree(function):
  # Types are all that could be wrong: nothing runs.
  each(function, jax.eval_shape)


def test_one_problem_of_all_devices_is_solved_by_all():
  def together(rows, targets):
    loss = lambda x: jax.lax.psum(bowl(rows, targets)(x), 'data')
    return optlab.minimize(
      loss, jnp.zeros(3), optlab.gns_newton(), max_steps=30, grad_tol=1e-3
    ).params

  assert each(together, jax.eval_shape, out=()).shape == (3,)


def test_sums_of_gradients_and_parts_of_parameters_are_refused():
  def update(rows, targets):
    x, tx = jnp.zeros(3), optlab.gns_newton()
    value, grad = jax.value_and_grad(bowl(rows, targets))(x)
    return tx.update(
      grad, tx.init(x), x, value=value, grad=grad,
      value_fn=bowl(rows, targets),
    )[0]  # fmt: skip

  def split(rows, targets):
    loss = lambda x: jax.lax.psum(bowl(rows, targets)(x), 'data')
    return optlab.minimize(loss, targets[:3], optax.sgd(0.1), max_steps=1)

  with pytest.raises(ValueError, match='params do not: their gradient is the'):
    each(update, jax.eval_shape)
  with pytest.raises(ValueError, match='norms would be those of a part'):
    each(split, jax.eval_shape)
