"""First-order optimizers: abstract and sharded states, dtypes, scales."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

MAKE = {
  'diffgrad': lambda: optlab.diffgrad(0.1),
  'adagrad_norm': lambda: optlab.adagrad_norm(0.1),
  'normalized_momentum': lambda: optlab.normalized_momentum(0.1),
  'adadagrad': lambda: optlab.adadagrad(0.1, lambda grads: 1.0, 2, 8),
}
over_all = pytest.mark.parametrize('make', MAKE.values(), ids=MAKE)
KINDS = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)


def types(tree):
  return jax.tree.map(jax.typeof, tree)


@over_all
def test_a_state_is_made_from_abstract_parameters(make):
  params = {'w': jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)}
  state = make().init(params)
  assert types(state) == types(make().init({'w': jnp.ones((2, 4, 8))}))
  jax.eval_shape(make().init, params)


@over_all
@pytest.mark.parametrize('kind', KINDS)
def test_the_state_lies_where_the_parameters_lie(make, kind):
  mesh = jax.make_mesh((2,), ('x',), axis_types=(kind,))
  sharding = jax.NamedSharding(mesh, jax.P(None, 'x'))
  with jax.set_mesh(mesh):
    params = jax.device_put(jnp.ones((2, 8, 4), jnp.float16), sharding)
    tx = make()
    state = tx.init(params)
    for leaf in jax.tree.leaves(state):
      if leaf.shape == params.shape:
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert types(jax.jit(tx.init)(params)) == types(state)
    # One operation at a time has the same rules, and each is compiled.
    updates, after = jax.jit(tx.update)(params, state, params)
    assert types(after) == types(state)
    assert types(updates) == types(params)


@over_all
def test_narrow_gradients_of_wide_parameters_give_wide_updates(make):
  """The rule of optax.adam, leaf by leaf of a mixed tree."""
  params = {
    'wide': jnp.ones(3), 'narrow': jnp.ones(3, jnp.bfloat16),
  }  # fmt: skip
  grads = jax.tree.map(lambda p: jnp.full(3, 0.1, jnp.bfloat16), params)
  tx = make()
  state = tx.init(params)
  updates, after = tx.update(grads, state, params)
  assert types(after) == types(state)
  assert updates['wide'].dtype == jnp.float32
  assert updates['narrow'].dtype == jnp.bfloat16


def test_diffgrad_knows_the_dtype_without_the_parameters():
  tx = optlab.diffgrad(0.1)
  grads = jnp.ones(3, jnp.bfloat16)
  assert tx.update(grads, tx.init(jnp.ones(3)))[0].dtype == jnp.float32
  assert tx.update(grads, tx.init(grads))[0].dtype == jnp.bfloat16


@over_all
def test_complex_leaves_descend(make):
  target = jnp.asarray([1.0 - 2.0j, -0.5j])
  loss = lambda p: jnp.sum(jnp.abs(p['z'] - target) ** 2) + jnp.sum(p['x'] ** 2)
  params = {'z': jnp.zeros(2, jnp.complex64), 'x': jnp.ones(2)}
  tx = make()
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    grads = jax.tree.map(jnp.conj, grads)
    updates, new = tx.update(grads, state, params)
    assert types(new) == types(state)
    assert types(updates) == types(params)
    return optax.apply_updates(params, updates), new, value

  values = []
  for _ in range(21):
    params, state, value = step(params, state)
    values.append(value)
  assert values[-1] < 0.8 * values[0]


@over_all
@pytest.mark.parametrize(
  'bad', [jnp.arange(3), jnp.tanh, 'w', np.ones(2, jnp.float8_e4m3fn)]
)
def test_leaves_that_no_gradient_moves_are_named(make, bad):
  with pytest.raises(
    TypeError, match=r"params\['b'\] must (be floating|be an ar|have 16 bits)"
  ):
    make().init({'a': jnp.ones(2), 'b': bad})


@pytest.mark.parametrize('make', list(MAKE.values())[:3], ids=list(MAKE)[:3])
def test_leaves_without_a_gradient_pass(make):
  params = {'a': jnp.ones(2), 'b': jnp.ones(3)}
  tx = make()
  state = tx.init(params)
  updates, after = tx.update({'a': jnp.ones(2), 'b': None}, state)
  assert updates['b'] is None
  assert np.all(updates['a'] != 0)
  assert types(after) == types(state)


@pytest.mark.parametrize('name', ['adagrad_norm', 'normalized_momentum'])
@pytest.mark.parametrize('scale', [1e-30, 1e-22, 1.0, 1e22, 1e30])
def test_norms_neither_over_nor_underflow(name, scale):
  """A first step from a zero accumulator has the length of the rate."""
  if name == 'adagrad_norm':
    tx = optlab.adagrad_norm(0.1, initial_accumulator_value=0.0)
  else:
    tx = optlab.normalized_momentum(0.1)
  grads = {'a': scale * jnp.asarray([3.0]), 'b': scale * jnp.asarray([-4.0])}
  state = tx.init(grads)
  for step in (1, 2):
    updates, state = tx.update(grads, state)
    length = 1.0 if name == 'normalized_momentum' else step**-0.5
    np.testing.assert_allclose(updates['a'], -0.06 * length, rtol=1e-5)
    np.testing.assert_allclose(updates['b'], 0.08 * length, rtol=1e-5)


@pytest.mark.parametrize('scale', [1e-30, 1e-22, 1.0, 1e22, 1e30])
def test_second_moments_neither_over_nor_underflow(scale):
  """Of one gradient twice: the length is the rate's, but for the friction."""
  tx = optlab.diffgrad(0.1, eps=0.0)
  grads = {
    'a': scale * jnp.asarray([3.0, -4.0]),
    'z': scale * jnp.asarray([3.0 - 4.0j]),
  }
  state = tx.init(grads)
  for before in (0.0, scale):
    updates, state = tx.update(grads, state)
    friction = jax.nn.sigmoid(jnp.asarray([3.0, 4.0]) * (scale - before))
    np.testing.assert_allclose(
      updates['a'], friction * np.asarray([-0.1, 0.1]), rtol=1e-5
    )
    friction = jax.nn.sigmoid(5.0 * (scale - before))
    np.testing.assert_allclose(
      updates['z'], (-0.06 + 0.08j) * friction, rtol=1e-5
    )
  updates, _ = tx.update(
    {'a': jnp.ones(2), 'z': jnp.full(1, 1j * jnp.inf)}, state
  )
  assert np.all(np.isfinite(updates['a']))
  assert not np.any(np.isfinite(updates['z']))


@pytest.mark.parametrize('scale', [1e-25, 1e25])
def test_adagrad_norm_after_a_gradient_of_another_scale(scale):
  tx = optlab.first_order.scale_by_adagrad_norm(0.0)
  grads = jnp.asarray([3.0, 4.0])
  state = tx.init(grads)
  _, state = tx.update(scale * grads, state)
  updates, state = tx.update(grads, state)
  expected = grads / 5.0 if scale < 1 else grads / (5.0 * scale)
  np.testing.assert_allclose(updates, expected, rtol=1e-5)
  _, after = tx.update(jnp.asarray([jnp.nan, 1.0]), state)
  assert np.isnan(after.sum_of_squares)
