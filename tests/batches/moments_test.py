"""Routes to per-example moments against explicit per-example gradients."""

import functools

from flax import nnx
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.experimental import aggregating
import pytest

import optlab
from optlab.batches import _moments as moments

N = 7


def data(shape=(5,), seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(N, *shape))), jnp.arange(N) % 3


def dense(*shape, seed=1):
  # NumPy: float64 where a test is in float64.
  return np.random.default_rng(seed + sum(shape)).normal(size=shape)


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def logistic(params, batch):
  x, y = batch
  return cross_entropy(x @ params['w'] + params['b'], y)


def mlp(params, batch):
  x, y = batch
  hidden = jax.nn.relu(x @ params['w1'] + params['b1'])
  return cross_entropy(hidden @ params['w2'] + params['b2'], y)


def positions(params, batch):
  """A dense layer that every position of an example passes."""
  x, y = batch
  hidden = jax.nn.gelu(x @ params['w1'] + params['b1'])
  return cross_entropy(hidden.mean(1) @ params['w2'] + params['b2'], y)


def rearranged(params, batch):
  """Weights on the left, transposed and reshaped on their way."""
  x, y = batch
  hidden = jnp.tanh(jnp.einsum('hd,bd->bh', params['w1'].T, x))
  weights = params['w2'].reshape(-1).reshape(3, 7)
  return cross_entropy(jnp.einsum('ch,bh->bc', weights, hidden), y)


def other_operations(params, batch):
  """Scales, a function of a weight, a scan, and a jitted part."""
  x, y = batch
  x = jnp.exp(params['log_scale']) * x

  @jax.jit
  def cell(carry, row):
    return jnp.tanh(carry @ params['u'] + row), None

  inputs = jnp.stack([x @ params['w1']] * 3)
  hidden, _ = jax.lax.scan(cell, jnp.zeros((len(y), 7)), inputs)
  return cross_entropy(hidden @ params['w2'], y)


MLP = {
  'w1': dense(5, 7), 'b1': dense(7), 'w2': dense(7, 3), 'b2': dense(3),
}  # fmt: skip
MODELS = {
  'logistic': (logistic, {'w': dense(5, 3), 'b': dense(3)}, (5,)),
  'mlp': (mlp, MLP, (5,)),
  'positions_direct': (positions, MLP, (9, 5)),
  'positions_gram': (
    positions,
    MLP | {'w1': dense(31, 7)},
    (2, 31),
  ),
  'rearranged': (rearranged, {'w1': MLP['w1'], 'w2': MLP['w2']}, (5,)),
  'other_operations': (
    other_operations,
    {
      'w1': MLP['w1'], 'w2': MLP['w2'],
      'u': dense(7, 7), 'log_scale': 0.1 * dense(5),
    },
    (5,),
  ),
}  # fmt: skip


def explicit(losses, params, batch):
  """Everything about the batch from its matrix of per-example gradients."""
  single = lambda p, e: losses(p, jax.tree.map(lambda leaf: leaf[None], e))[0]
  grads = jax.jit(jax.vmap(jax.grad(single), (None, 0)))(params, batch)
  matrix = np.concatenate(
    [np.asarray(leaf, float).reshape(N, -1) for leaf in jax.tree.leaves(grads)],
    1,
  )
  mean = matrix.mean(0)
  rest = matrix - mean
  return {
    'value': np.mean(losses(params, batch)),
    'grads': mean,
    'sum_sq_diff_grads': np.sum(rest**2, 0),
    'sum_sq_diff_norm': np.sum(rest**2),
    'sum_sq_diff_inner': np.sum((rest @ mean) ** 2),
    'sample_size': N,
  }


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def compare(estimate, expected, names, rtol):
  found = dict(estimate.extras) | {
    'value': estimate.value, 'grads': estimate.grads,
  }  # fmt: skip
  for name in ('value', 'grads', 'sample_size', *names):
    np.testing.assert_allclose(
      flat(found[name]), np.ravel(expected[name]), rtol, rtol, err_msg=name
    )


INNER = 'sum_sq_diff_inner'
ROUTES = {
  'vmap': (
    optlab.batches.vmap_grads, optlab.batches.vmap_inner_products,
    ('sum_sq_diff_grads', 'sum_sq_diff_norm', INNER),
  ),
  'ghost': (
    optlab.ghost_norms, optlab.batches.jvp_inner_products,
    ('sum_sq_diff_norm', INNER),
  ),
  'plain': (
    optlab.batches.plain_grads, optlab.batches.jvp_inner_products, (INNER,)),
}  # fmt: skip


@pytest.mark.parametrize(
  ('name', 'route', 'microbatch_size'),
  [(name, 'ghost', None) for name in MODELS]
  + [('mlp', 'vmap', None)]
  + [('mlp', route, 3) for route in ROUTES],
)
def test_routes_are_exact(x64, name, route, microbatch_size):
  losses, params, shape = MODELS[name]
  batch = data(shape)
  moments_route, inner_products, names = ROUTES[route]
  estimator = optlab.per_example(
    losses,
    moments_route,
    inner_products=inner_products,
    microbatch_size=microbatch_size,
  )
  estimate, _ = jax.jit(estimator.estimate)(params, (), batch)
  compare(estimate, explicit(losses, params, batch), names, 1e-12)
  assert set(estimate.extras) == {
    *names,
    'sample_size',
    'scaled_moments',
    'value_fn',
  }


@pytest.mark.parametrize('route', ['vmap', 'ghost'])
def test_routes_are_exact_in_float32(route):
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), MLP)
  moments_route, inner_products, names = ROUTES[route]
  estimator = optlab.per_example(
    mlp, moments_route, inner_products=inner_products, microbatch_size=2
  )
  batch = jax.tree.map(jnp.asarray, data())
  estimate, _ = jax.jit(estimator.estimate)(params, (), batch)
  compare(estimate, explicit(mlp, params, batch), names, 1e-5)


class Network(nnx.Module):
  """Everything that a small image model is made of."""

  def __init__(self, rngs):
    make = functools.partial(dict, rngs=rngs, param_dtype=jnp.float64)
    self.conv = nnx.Conv(1, 4, (3, 3), **make())
    self.norm = nnx.LayerNorm(4, **make())
    self.dense = nnx.Linear(4 * 16, 3, **make())

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    return self.dense(x.reshape(x.shape[0], -1))


class Attention(nnx.Module):
  """Embedding, attention and a head."""

  def __init__(self, rngs):
    make = functools.partial(dict, rngs=rngs, param_dtype=jnp.float64)
    self.embed = nnx.Embed(11, 8, **make())
    self.attend = nnx.MultiHeadAttention(2, 8, decode=False, **make())
    self.dense = nnx.Linear(8, 3, **make())

  def __call__(self, tokens):
    return self.dense(self.attend(self.embed(tokens)).mean(1))


@pytest.mark.parametrize('module', [Network, Attention])
def test_ghost_norms_of_a_flax_model_as_it_is(x64, module):
  graph, params, rest = nnx.split(module(nnx.Rngs(0)), nnx.Param, ...)

  def losses(params, batch):
    x, y = batch
    return cross_entropy(nnx.merge(graph, params, rest)(x), y)

  if module is Network:
    batch = data((4, 4, 1))
  else:
    tokens = np.random.default_rng(0).integers(0, 11, (N, 5))
    batch = (jnp.asarray(tokens), jnp.arange(N) % 3)
  estimator = optlab.per_example(losses, optlab.ghost_norms)
  estimate, _ = jax.jit(estimator.estimate)(params, (), batch)
  expected = explicit(losses, params, batch)
  compare(estimate, expected, ['sum_sq_diff_norm'], 1e-11)


def test_a_parameter_that_the_loss_ignores_counts_nothing(x64):
  losses = lambda p, b: jnp.sum(jnp.tanh(b[0] @ p['w']), 1)
  params = {'w': dense(5, 3), 'idle': dense(4)}
  estimator = optlab.per_example(losses, optlab.ghost_norms)
  estimate, _ = jax.jit(estimator.estimate)(params, (), data())
  compare(
    estimate, explicit(losses, params, data()), ['sum_sq_diff_norm'], 1e-12
  )


@pytest.mark.parametrize('route', ['vmap', 'ghost'])
def test_padding_does_not_count(x64, route):
  moments_route, inner_products, names = ROUTES[route]
  pad = lambda leaf: jnp.concatenate([leaf, leaf[:1].repeat(4, 0)])
  batch = data()
  estimator = optlab.per_example(
    mlp, moments_route, inner_products=inner_products, microbatch_size=3
  )
  estimate, _ = jax.jit(estimator.estimate)(
    MLP, (), optlab.batches.PaddedBatch(jax.tree.map(pad, batch), np.int32(N))
  )
  compare(estimate, explicit(mlp, MLP, batch), names, 1e-12)


def test_a_window_of_resident_data(x64):
  """Windows that begin and end anywhere, the end of the data included."""
  order = jnp.asarray([3, 8, 1, 11, 0, 6, 9, 2, 5, 10, 4, 7])
  rng = np.random.default_rng(3)
  x, y = jnp.asarray(rng.normal(size=(12, 5))), jnp.arange(12) % 3
  estimator = optlab.per_example(
    mlp,
    optlab.ghost_norms,
    inner_products=optlab.batches.jvp_inner_products,
    microbatch_size=4,
  )
  estimate = jax.jit(estimator.estimate)
  for start in (0, 2, 5):
    window = optlab.batches.ResidentBatch(
      (x, y), order, jnp.int32(start), jnp.int32(N)
    )
    result, _ = estimate(MLP, (), window)
    rows = order[start : start + N]
    expected = explicit(mlp, MLP, (x[rows], y[rows]))
    compare(result, expected, ['sum_sq_diff_norm', INNER], 1e-12)
  assert estimate._cache_size() == 1


def test_microbatch_means_estimate_the_trace_without_bias(x64):
  """Averaged over orders of the data, the estimate is the trace."""
  estimator = optlab.per_example(
    mlp, optlab.batches.microbatch_means, microbatch_size=2
  )
  x, y = data()

  def one(key):
    order = jax.random.permutation(key, N)
    estimate, _ = estimator.estimate(MLP, (), (x[order], y[order]))
    return estimate.extras['sum_sq_diff_norm']

  estimates = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 1000))
  expected = explicit(mlp, MLP, (x, y))['sum_sq_diff_norm']
  error = np.std(estimates) / np.sqrt(len(estimates))
  assert abs(np.mean(estimates) - expected) < 4.0 * error
  assert error < 0.1 * expected


@settings(max_examples=40, deadline=None)
@given(
  sizes=st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(any),
  width=st.integers(1, 3),
  seed=st.integers(0, 100),
)
def test_merging_groups_of_any_size_is_exact(sizes, width, seed):
  rows = np.random.default_rng(seed).normal(size=(sum(sizes), width))
  with jax.enable_x64(True):
    total = None
    for part in np.split(rows, np.cumsum(sizes)[:-1]):
      mean = part.mean(0) if len(part) else np.zeros(width)
      squares = ((part - mean) ** 2).sum(0)
      group = moments.Moments(
        *(jnp.asarray(float(n)) for n in (len(part), len(part), mean.sum())),
        jnp.asarray(mean),
        jnp.asarray(squares),
        jnp.asarray(squares.sum()),
      )
      total = group if total is None else moments.merge(total, group)
  spread = ((rows - rows.mean(0)) ** 2).sum(0)
  assert float(total.count) == float(total.units) == len(rows)
  np.testing.assert_allclose(total.value, rows.mean(0).sum(), 1e-12, 1e-13)
  np.testing.assert_allclose(total.grads, rows.mean(0), 1e-12, 1e-13)
  np.testing.assert_allclose(total.sum_sq_diff_grads, spread, 1e-12, 1e-13)
  np.testing.assert_allclose(total.sum_sq_diff_norm, spread.sum(), 1e-12, 1e-13)


@pytest.mark.parametrize(
  ('how', 'route', 'dtype', 'rtol'),
  [
    ('shard_map', 'vmap', jnp.float64, 1e-12),
    ('shard_map', 'ghost', jnp.float64, 1e-12),
    pytest.param(
      'shard_map', 'ghost', jnp.float32, 1e-6, marks=pytest.mark.slow
    ),
    ('jit', 'ghost', jnp.float64, 1e-12),
    pytest.param('jit', 'ghost', jnp.float32, 1e-6, marks=pytest.mark.slow),
    pytest.param('vmap', 'ghost', jnp.float64, 1e-12, marks=pytest.mark.slow),
  ],
)
def test_over_two_devices_as_on_one(x64, route, dtype, rtol, how):
  """Chan's formula over a data axis, of parts with different means."""
  moments_route, inner_products, names = ROUTES[route]
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), MLP)
  x, y = (jnp.concatenate([leaf, leaf[:1]]) for leaf in data())
  x = (x + jnp.where(jnp.arange(8) < 4, 1.0, -1.0)[:, None]).astype(dtype)
  make = functools.partial(
    optlab.per_example, mlp, moments_route, inner_products=inner_products
  )
  alone, _ = jax.jit(make().estimate)(params, (), (x, y))
  axis = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((2,), ('data',), axis_types=axis)
  split = jax.NamedSharding(mesh, jax.P('data'))
  if how == 'jit':
    spread, _ = jax.jit(make().estimate)(
      jax.device_put(params, jax.NamedSharding(mesh, jax.P())),
      (),
      jax.device_put((x, y), split),
    )
  else:
    estimate = make(axis_name='data', microbatch_size=3).estimate
    one = lambda params, batch: estimate(params, (), batch)[0]
    if how == 'shard_map':
      spread = jax.jit(
        jax.shard_map(
          one, mesh=mesh, in_specs=(jax.P(), jax.P('data')), out_specs=jax.P()
        )
      )(params, (x, y))
    else:
      halves = jax.tree.map(
        lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), (x, y)
      )
      both = jax.jit(jax.vmap(one, (None, 0), axis_name='data'))(params, halves)
      spread = jax.tree.map(lambda leaf: leaf[1], both)
  for name in names:
    np.testing.assert_allclose(
      flat(spread.extras[name]), flat(alone.extras[name]), rtol, rtol
    )
  np.testing.assert_allclose(flat(spread.grads), flat(alone.grads), rtol, rtol)
  np.testing.assert_allclose(spread.value, alone.value, rtol)
  assert spread.extras['sample_size'] == 8


def test_optax_aggregating_makes_the_same_moments(x64):
  """Names and conventions are optax's: its aggregator can feed the rule."""
  x, y = data()
  single = lambda p, e: mlp(p, jax.tree.map(lambda leaf: leaf[None], e))[0]
  grads = jax.vmap(jax.grad(single), (None, 0))(MLP, (x, y))
  rule = optlab.grow_batch(optlab.norm_test(0.5), 4, 1000)
  tx = aggregating.process(
    optax.identity(),
    aggregating.get_per_element_mean_and_sum_sq_diff_grads(),
    rule,
    aggregator_has_aux=True,
  )
  _, state = jax.jit(tx.update)(grads, tx.init(MLP))
  estimator = optlab.per_example(mlp, optlab.ghost_norms)
  estimate, _ = jax.jit(estimator.estimate)(MLP, (), (x, y))
  _, expected = rule.update(estimate.grads, rule.init(MLP), **estimate.extras)
  assert optlab.batches.next_size(state) == expected.batch_size > 4
  np.testing.assert_allclose(
    optax.tree.get(state, 'requested_size'), expected.info.requested_size, 1e-12
  )


def test_bfloat16_parameters_have_float32_moments():
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MLP)
  x, y = data()
  for route in (optlab.batches.vmap_grads, optlab.ghost_norms):
    estimator = optlab.per_example(mlp, route)
    estimate, _ = jax.jit(estimator.estimate)(
      params, (), (x.astype(jnp.bfloat16), y)
    )
    assert estimate.grads['w1'].dtype == jnp.bfloat16
    assert estimate.extras['sum_sq_diff_norm'].dtype == jnp.float32
    expected = explicit(mlp, params, (x.astype(jnp.bfloat16), y))
    np.testing.assert_allclose(
      estimate.extras['sum_sq_diff_norm'],
      float(expected['sum_sq_diff_norm']),
      rtol=0.02,
    )


def test_rows_of_each_device_and_parameters_of_all_are_merged_or_refused():
  """Else jax sums the gradients of all devices before they are squared."""
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((2,), ('data',), axis_types=auto)
  rows = jnp.asarray(data((3,))[0][:6], jnp.float32)
  losses = lambda x, rows: (rows @ x - 1.0) ** 2

  def spread(estimator, to):
    @jax.shard_map(
      mesh=mesh, in_specs=(jax.P(), jax.P('data')), out_specs=jax.P('data')
    )
    def run(x, rows):
      estimate, _ = estimator.estimate(to(x), (), rows)
      return estimate.extras.get('sum_sq_diff_norm', jnp.ones(()))[None]

    return run

  for route in ('vmap_grads', 'ghost_norms', 'plain_grads'):
    estimator = optlab.per_example(losses, getattr(optlab.batches, route))
    with pytest.raises(ValueError, match="pass axis_name='data' to per_exampl"):
      jax.eval_shape(spread(estimator, lambda x: x), jnp.ones(3), rows)
  own = lambda x: jax.lax.pcast(x, 'data', to='varying')
  estimator = optlab.per_example(losses, optlab.ghost_norms)
  found = jax.jit(spread(estimator, own))(jnp.ones(3), rows)
  for k in range(2):
    alone, _ = jax.jit(estimator.estimate)(
      jnp.ones(3), (), rows[3 * k : 3 * k + 3]
    )
    np.testing.assert_allclose(
      found[k], alone.extras['sum_sq_diff_norm'], rtol=1e-5
    )


@pytest.mark.parametrize('route', ['vmap_grads', 'ghost_norms'])
def test_estimates_have_derivatives_of_both_modes(route):
  """Though the passes in another unit are a loop of unknown length."""
  rows = jnp.asarray(data((3,))[0][:6], jnp.float32)
  x = jnp.asarray([0.5, -1.0, 2.0])

  def numbers(moments, scale):
    estimator = optlab.per_example(
      lambda x, rows: scale * (rows @ x - 1.0) ** 3,
      moments,
      inner_products=optlab.batches.jvp_inner_products,
      microbatch_size=3,
    )

    def of(x):
      estimate, _ = estimator.estimate(x, (), rows)
      scaled = estimate.extras['scaled_moments']
      unit = jax.lax.stop_gradient(scaled['unit']) / scale
      return (
        estimate.value / scale,
        estimate.grads / scale,
        # One factor at a time: products of them would overflow.
        scaled['sum_sq_diff_norm'] * unit * unit,
        scaled['sum_sq_diff_inner'] * unit * unit * unit * unit,
      )

    return of

  def expected(x):
    rest = rows @ x - 1.0
    grads = 3.0 * rest[:, None] ** 2 * rows
    mean = grads.mean(0)
    inner = (grads - mean) @ mean
    return (
      jnp.mean(rest**3),
      mean,
      jnp.sum((grads - mean) ** 2),
      jnp.sum(inner**2),
    )

  of = numbers(getattr(optlab.batches, route), 2.0**-70)  # It takes two.
  found = jax.jit(lambda x: (jax.jacrev(of)(x), jax.jacfwd(of)(x)))(x)
  by_seed = jax.jit(jax.vmap(jax.jacrev(of)))(jnp.stack([2.0 * x, x]))
  right = jax.jit(jax.jacrev(expected))(x)
  for modes in (*found, jax.tree.map(lambda leaf: leaf[1], by_seed)):
    for a, b in zip(modes, right, strict=True):
      np.testing.assert_allclose(a, b, 2e-4, 1e-3 * np.abs(b).max())


def test_bad_input_is_named():
  make = optlab.per_example
  with pytest.raises(TypeError, match='losses must be a function'):
    make(3)
  with pytest.raises(TypeError, match='moments must be a function'):
    make(mlp, 'ghost')
  with pytest.raises(TypeError, match='inner_products must be a function'):
    make(mlp, inner_products=True)
  with pytest.raises(ValueError, match='microbatch_size must be at least 1'):
    make(mlp, microbatch_size=0)
  with pytest.raises(TypeError, match='microbatch_size must be an integer'):
    make(mlp, microbatch_size=2.5)
  with pytest.raises(ValueError, match='microbatch_means needs a microbatch'):
    make(mlp, optlab.batches.microbatch_means)
  few = make(mlp, optlab.batches.microbatch_means, microbatch_size=4)
  with pytest.raises(ValueError, match='at least two microbatches.*got 7'):
    few.estimate(MLP, (), data())
  resident = optlab.batches.ResidentBatch(data(), jnp.arange(N), 0, N)
  with pytest.raises(
    ValueError, match='microbatch_size to read a ResidentBatch'
  ):
    make(mlp).estimate(MLP, (), resident)
  x, y = data()
  with pytest.raises(ValueError, match='examples on its leading axis'):
    make(mlp).estimate(MLP, (), (x, y[:3]))
  with pytest.raises(ValueError, match='examples on its leading axis'):
    make(mlp).estimate(MLP, (), (x, 1.0))
  x = jnp.ones((4, 2))
  for to, kind in ((int, 'int32'), (complex, 'complex64'), (bool, 'bool')):
    losses = lambda p, x, to=to: (x @ p).astype(to)
    for route in (optlab.batches.vmap_grads, optlab.ghost_norms):
      with pytest.raises(TypeError, match=f'losses must return real.*{kind}'):
        make(losses, route).estimate(jnp.ones(2), (), x)
  keys = lambda p, x: (x @ p, jax.random.split(jax.random.key(0), len(x)))
  with pytest.raises(TypeError, match=r'aux must be numbers, got dtype key'):
    make(keys, has_aux=True).estimate(jnp.ones(2), (), x)


@pytest.mark.parametrize(
  'route',
  [optlab.batches.vmap_grads, optlab.ghost_norms, optlab.batches.plain_grads],
)
def test_a_mean_in_the_loss_is_refused(route):
  estimator = optlab.per_example(lambda p, b: jnp.mean(mlp(p, b)), route)
  with pytest.raises(ValueError, match='one loss per example, shape'):
    estimator.estimate(MLP, (), data())
