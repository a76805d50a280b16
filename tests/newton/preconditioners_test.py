"""Preconditioners of cg, and operators of one matrix a leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import newton
from optlab import training

KEY = jax.random.key(0)
N = 40
# Scales over three decades around a matrix near the identity: a condition of
# 1e6, which a diagonal undoes.
SCALES = np.random.default_rng(2).permutation(np.geomspace(1e-3, 1.0, N))
NOISE = np.random.default_rng(0).normal(size=(N, N)) / 40
MATRIX = SCALES[:, None] * (np.eye(N) + NOISE + NOISE.T) * SCALES
RIGHT = SCALES * np.random.default_rng(1).normal(size=N)

PRECONDITIONERS = {
  'none': None,
  'hutchinson': newton.hutchinson(KEY, samples=4, rounds=4),
  'row_norms': newton.row_norms(KEY, samples=4, rounds=4),
  'leaf_blocks': newton.leaf_blocks(),
}


def split(vector):
  """A tree of three leaves."""
  return {'a': vector[:9].reshape(3, 3), 'b': vector[9], 'c': vector[10:]}


def joined(tree):
  return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


def product(tree):
  flat = joined(tree)
  image = split(jnp.asarray(MATRIX, flat.dtype) @ flat)
  return jax.tree.map(lambda new, old: new.astype(old.dtype), image, tree)


@functools.partial(jax.jit, static_argnums=0)
def solved(solver, b, shifts):
  prepared = solver(jax.tree_util.Partial(product), b, 1e-6)
  return prepared.products, jax.vmap(prepared.solve)(shifts)


def test_the_same_solution_in_fewer_products(x64):
  b, shifts = split(jnp.asarray(RIGHT)), jnp.array([1e-6, 1e-3, 1.0])
  counts = {}
  for name, preconditioner in PRECONDITIONERS.items():
    solver = optlab.cg(2000, 1e-8, 0.0, preconditioner)
    before, (x, ok, taken) = solved(solver, b, shifts)
    assert np.all(ok), name
    for i, shift in enumerate(shifts):
      matrix = MATRIX + shift * np.eye(N)
      found = joined(jax.tree.map(lambda leaf, i=i: leaf[i], x))
      residual = matrix @ found - RIGHT
      assert np.linalg.norm(residual) < 1e-8 * np.linalg.norm(RIGHT)
      np.testing.assert_allclose(
        found, np.linalg.solve(matrix, RIGHT), rtol=1e-2, atol=1e-3
      )
    counts[name] = int(before) + int(taken[0]), int(before)
  assert [before for _, before in counts.values()] == [0, 16, 16, N]
  none = counts.pop('none')[0]
  # What the preconditioner takes is counted.
  assert all(2 * total < none for total, _ in counts.values()), (none, counts)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', ['hutchinson', 'row_norms', 'leaf_blocks'])
def test_narrow_and_mixed_dtypes(name, dtype):
  scales = {'w': jnp.array([[100.0, 1.0]]), 'b': jnp.asarray(16.0), 'none': {}}
  b = {
    'w': jnp.ones((1, 2), dtype), 'b': jnp.ones((), jnp.float32), 'none': {}
  }  # fmt: skip
  operator = lambda v: jax.tree.map(
    lambda s, leaf: s.astype(leaf.dtype) * leaf, scales, v
  )
  solver = optlab.cg(rtol=1e-3, preconditioner=PRECONDITIONERS[name])
  x, ok = jax.jit(lambda b: solver(operator, b, 1.0)(1.0))(b)
  assert ok and x['none'] == {}
  for leaf, like in (('w', dtype), ('b', jnp.float32)):
    assert x[leaf].dtype == like
    np.testing.assert_allclose(
      x[leaf].astype(float), 1 / (1 + scales[leaf]), rtol=1e-2
    )


def test_operators_that_show_their_diagonal_take_no_product(x64):
  factor = jnp.asarray(np.random.default_rng(3).normal(size=(3, N)))
  b = split(jnp.asarray(RIGHT))
  for operator in (
    newton.LowRank(factor),
    optlab.Dense(factor.T @ factor),
  ):
    near, products = newton.hutchinson(KEY)(operator, b)
    assert products == 0
    np.testing.assert_allclose(
      joined(near.diagonal), np.sum(np.square(factor), 0)
    )


@pytest.mark.parametrize('name', ['hutchinson', 'row_norms', 'leaf_blocks'])
@pytest.mark.parametrize('value', [0.0, -1.0, jnp.nan, jnp.inf])
def test_what_is_not_definite_is_not_ok(name, value):
  operator = jax.tree_util.Partial(
    lambda v: {'a': value * v['a'], 'b': 2.0 * v['b']}
  )
  b = {'a': jnp.ones(2), 'b': jnp.ones(2)}
  solver = optlab.cg(preconditioner=PRECONDITIONERS[name])
  x, ok = jax.jit(lambda shift: solver(operator, b, shift)(shift))(0.5)
  assert ok == (value == 0.0)
  if ok:
    np.testing.assert_allclose(x['a'], 2.0)
    np.testing.assert_allclose(x['b'], 0.4)


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
@pytest.mark.parametrize('name', ['none', 'hutchinson', 'row_norms'])
def test_split_over_devices(name, kind):
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType[kind],)
  )
  put = lambda leaf, *spec: jax.device_put(
    leaf, jax.NamedSharding(mesh, jax.P(*spec))
  )
  scales = np.array([[1.0, 100.0], [4.0, 9.0]], np.float32)
  solver = optlab.cg(rtol=1e-4, preconditioner=PRECONDITIONERS[name])
  if name == 'none':
    solver = newton.multishift_cg(rtol=1e-4)
  with jax.set_mesh(mesh):
    scale = put(scales, None, 'data')
    operator = lambda v: {'w': scale * v['w'], 'b': 2 * v['b']}
    b = {'w': put(np.ones((2, 2), np.float32), None, 'data'),
         'b': put(np.ones(3, np.float32))}  # fmt: skip
    x, ok = jax.jit(lambda b: solver(operator, b, 1.0)(1.0))(b)
    assert ok and x['w'].sharding.spec == jax.P(None, 'data')
    np.testing.assert_allclose(x['w'], 1 / (1 + scales), rtol=1e-3)
    np.testing.assert_allclose(x['b'], 1 / 3, rtol=1e-3)
    if kind == 'Explicit':
      with pytest.raises(ValueError, match='Blocks need leaves that are whole'):
        jax.jit(lambda b: newton.leaf_blocks()(operator, b)[0].blocks)(b)


def network(params, inputs):
  return jnp.tanh(inputs @ params['up']) @ params['down'] + params['bias']


def squares(outputs, inputs):
  return jnp.sum((outputs - jnp.sin(2 * inputs[:, :1])) ** 2) / len(inputs)


@pytest.fixture
def params():
  keys = jax.random.split(KEY)
  return {
    'up': jax.random.normal(keys[0], (2, 5)),
    'down': jax.random.normal(keys[1], (5, 1)),
    'bias': jnp.zeros(()),
  }


INPUTS = jax.random.normal(jax.random.key(3), (50, 2))


def test_layerwise_is_the_block_diagonal(x64, params):
  factory = optlab.gauss_newton(network, squares)
  matrix, blocks = jax.jit(
    lambda params: (
      optlab.dense(factory)(params, INPUTS).matrix,
      newton.layerwise(factory)(params, INPUTS),
    )
  )(params)
  # bias, down, up: the order of the leaves.
  for name, low, high in (('bias', 0, 1), ('down', 1, 6), ('up', 6, 16)):
    np.testing.assert_allclose(
      blocks.blocks[name], matrix[low:high, low:high], atol=1e-6
    )
  vector = jax.tree.map(lambda leaf: jnp.ones_like(leaf) / 3, params)
  expected = jax.tree.map(
    lambda block, leaf: (block @ leaf.reshape(-1)).reshape(leaf.shape),
    blocks.blocks,
    vector,
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    blocks(vector),
    expected,
  )
  back = blocks.inverse(0.5)(
    jax.tree.map(lambda a, v: a + 0.5 * v, blocks(vector), vector)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), back, vector
  )


def test_a_network_descends_by_blocks_and_by_preconditioned_products(params):
  full = optlab.gauss_newton(network, squares)
  metric = jax.tree.map(jnp.ones_like, params)
  for tx, curvature in (
    (optlab.gns_newton(), newton.layerwise(full)),
    (optlab.gns_newton(metric=metric), newton.layerwise(full)),
    (
      optlab.gns_newton(optlab.cg(preconditioner=newton.row_norms(KEY, 2, 1))),
      full,
    ),
  ):
    run = jax.jit(
      lambda params, tx=tx, curvature=curvature: training.minimize(
        lambda params: squares(network(params, INPUTS), INPUTS),
        params,
        tx,
        max_steps=30,
        curvature=lambda params: curvature(params, INPUTS),
      )
    )(params)
    assert run.value < 0.05 and np.isfinite(run.grad_norm)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float64])
def test_blocks_stay_blocks_under_a_metric_and_narrow_parameters(x64, dtype):
  matrix = jnp.asarray([[4.0, 1.0, 0.0], [1.0, 9.0, 0.0], [0.0, 0.0, 2.0]])
  scales = jnp.asarray([2.0, 0.5, 8.0])
  tree = lambda v: {'a': v[:2], 'b': v[2:]}
  blocks = newton.Blocks({'a': matrix[:2, :2], 'b': matrix[2:, 2:]})
  dense = optlab.Dense(matrix)
  params = tree(jnp.asarray([1.0, -2.0, 3.0], dtype))
  flat = lambda p: joined(p).astype(jnp.float64)
  value_fn = lambda p: flat(p) @ matrix @ flat(p) / 2
  value, grad = jax.value_and_grad(value_fn)(params)

  @functools.partial(jax.jit, static_argnums=0)
  def step(solver, curvature, metric):
    tx = optlab.gns_newton(solver, gamma_init=1.0, metric=metric)
    return tx.update(
      grad, tx.init(params), params, value=value, grad=grad,
      value_fn=value_fn, curvature=curvature,
    )[0]  # fmt: skip

  for metric in (None, tree(scales)):
    found = step(newton.blockwise(), blocks, metric)
    wanted = step(optlab.cholesky(), dense, metric)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
      assert a.dtype == dtype
      rtol = 0.01 if dtype is jnp.bfloat16 else 1e-12
      np.testing.assert_allclose(a.astype(float), b.astype(float), rtol)


def test_a_preconditioner_works_in_a_step_vmapped_over_keys():
  fun = lambda x: jnp.sum(jnp.asarray(SCALES, x.dtype) * jnp.cosh(x))

  @jax.jit
  @jax.vmap
  def run(key):
    tx = optlab.gns_newton(optlab.cg(preconditioner=newton.hutchinson(key)))
    return training.minimize(
      fun, jnp.full(N, 0.5), tx, max_steps=20, grad_tol=1e-4
    )

  result = run(jax.random.split(KEY, 3))
  assert np.all(result.success)
  # The first shift, and eight signs a step.
  counts = np.asarray(result.opt_state.info.total_products)
  assert np.all(counts > 8 * np.asarray(result.steps))
  assert optax.tree.get(result.opt_state, 'total_trials').shape == (3,)
