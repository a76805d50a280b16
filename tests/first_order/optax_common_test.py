"""What optax asks of every contributed optimizer, asked of ours.

The same targets, wrappers and tolerances as optax's own table.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest

import optlab
from tests.public import PUBLIC

OPTIMIZERS = {
  'diffgrad': lambda: optlab.diffgrad(1e-2),
  'adagrad_norm': lambda: optlab.adagrad_norm(1.0),
}


def rosenbrock(x):
  return (1.0 - x[0]) ** 2 + 100.0 * (x[1] - x[0] ** 2) ** 2


def parabola(target):
  return lambda x: sum(
    jnp.sum((a - b) ** 2)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(target), strict=True)
  )


def targets():
  vector = jnp.asarray([1.0, -1.0, 1.0])
  matrix = jnp.asarray([[3.0, -2.0], [1.0, 4.0]])
  mixed = (jnp.asarray([1.0, -1.0, 2.0]), jnp.asarray([[1.0, 0], [-1.0, 0]]))
  zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
  return {
    'parabola': (
      jnp.asarray([-1.0, 10.0, 1.0]), vector, parabola(vector)
    ),
    'rosenbrock': (jnp.zeros(2), jnp.ones(2), rosenbrock),
    'matrix': (zeros(matrix), matrix, parabola(matrix)),
    'mixed': (zeros(mixed), mixed, parabola(mixed)),
  }  # fmt: skip


def wrap(wrapper, tx):
  return {
    'none': lambda: tx,
    'mechanize': lambda: contrib.mechanize(tx, weight_decay=0.0),
    'reduce_on_plateau': lambda: optax.chain(tx, contrib.reduce_on_plateau()),
    'MultiSteps': lambda: optax.MultiSteps(tx, 2).gradient_transformation(),
  }[wrapper]()


# Bare and mechanized on all targets, as in optax; the others on one.
CASES = [
  (wrapper, target) for wrapper in ('none', 'mechanize') for target in targets()
] + [('reduce_on_plateau', 'mixed'), ('MultiSteps', 'mixed')]


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize(('wrapper', 'target'), CASES)
def test_converges(name, wrapper, target):
  """30,000 steps end within 3e-2 of the minimum, under every wrapper."""
  tx = OPTIMIZERS[name]()
  if wrapper == 'mechanize':
    tx = PUBLIC[name](1.0)  # As in optax: it tunes the rate itself.
  tx = optax.with_extra_args_support(wrap(wrapper, tx))
  params, final, objective = targets()[target]
  state = tx.init(params)
  state = optax.tree.map_params(tx, lambda leaf: leaf, state)

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(objective)(params)
    updates, state = tx.update(grads, state, params, value=value)
    return (optax.apply_updates(params, updates), state), None

  # As users run it: mechanize ends elsewhere with other rounding.
  run = jax.jit(
    lambda carry: jax.lax.scan(step, carry, length=30_000)[0],
    compiler_options={
      'xla_backend_optimization_level': 3,
      'xla_llvm_disable_expensive_passes': False,
    },
  )
  params, _ = run((params, state))
  for found, want in zip(
    jax.tree.leaves(params), jax.tree.leaves(final), strict=True
  ):
    np.testing.assert_allclose(found, want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_wrappers_that_change_nothing_change_nothing(name):
  tx = OPTIMIZERS[name]()
  wrapped = {
    'none': tx,
    'masked': optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    'partition': optax.partition(
      {'ours': tx}, lambda p: jax.tree.map(lambda _: 'ours', p)
    ),
    'apply_if_finite': optax.apply_if_finite(tx, 5),
  }
  start, _, objective = targets()['mixed']

  @jax.jit
  def run(params):
    ends = {}
    for wrapper, tx in wrapped.items():
      x, state = params, optax.tree.map_params(tx, lambda v: v, tx.init(params))
      for _ in range(3):
        updates, state = tx.update(jax.grad(objective)(x), state, x)
        x = optax.apply_updates(x, updates)
      ends[wrapper] = x
    return ends

  ends = run(start)
  for wrapper, end in ends.items():
    for found, want in zip(
      jax.tree.leaves(end), jax.tree.leaves(ends['none']), strict=True
    ):
      np.testing.assert_allclose(found, want, rtol=1e-6, err_msg=wrapper)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_masked_leaves_pass_untouched(name):
  params = {'a': jnp.ones(2), 'b': jnp.ones(2)}
  tx = optax.masked(OPTIMIZERS[name](), {'a': True, 'b': False})
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_array_equal(updates['b'], params['b'])
  assert np.all(np.asarray(updates['a']) < 0.0)


@pytest.mark.parametrize(
  ('factory', 'kwargs'),
  [
    (optlab.diffgrad, {'learning_rate': 1e-2}),
    (optlab.diffgrad, {'learning_rate': 1e-2, 'weight_decay': 1e-3}),
    (optlab.adagrad_norm, {'learning_rate': 1.0}),
  ],
)
def test_inject_hyperparams(factory, kwargs):
  params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
  grads = [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]
  tx = factory(**kwargs)
  injected = optax.inject_hyperparams(factory)(**kwargs)
  expected, state = jax.jit(tx.update)(grads, tx.init(params), params)
  updates, outer = jax.jit(injected.update)(
    grads, jax.jit(injected.init)(params), params
  )
  pairs = ((updates, expected), (outer.inner_state, state))
  for found, want in pairs:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize(
  'dtype', [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
)
def test_dtypes_are_stable(name, dtype):
  """Through lax.cond, MultiSteps, and a value of another dtype."""
  with jax.enable_x64(dtype == jnp.float64):
    tx = OPTIMIZERS[name]()
    params = jnp.asarray([-1.0, 10.0, 1.0], dtype)
    state = tx.init(params)

    @jax.jit
    def step(params, state, take):
      grads = jax.grad(lambda x: jnp.sum(x**2))(params)
      return jax.lax.cond(
        take,
        lambda: tx.update(
          grads, state, params, value=jnp.zeros((), jnp.bfloat16)
        ),
        lambda: (params, state),
      )

    for take in (True, False):
      updates, state = step(params, state, take)
      assert updates.dtype == dtype
    multi = optax.MultiSteps(tx, 4)
    updates, _ = multi.update(params, multi.init(params), params)
    np.testing.assert_array_equal(updates, 0.0)
    assert updates.dtype == dtype


@pytest.mark.parametrize('factory', [optlab.diffgrad, optlab.adagrad_norm])
def test_schedules(factory):
  params = jnp.asarray([-1.0, 10.0, 1.0])
  both = []
  for rate in (1e-3, optax.constant_schedule(1e-3)):
    tx, x = factory(rate), params
    state = tx.init(x)
    for _ in range(3):
      updates, state = tx.update(2.0 * x, state, x)
      x = optax.apply_updates(x, updates)
    both.append(x)
  np.testing.assert_allclose(*both, rtol=1e-6)
