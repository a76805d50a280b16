"""Ghost norms of the models that people train, against explicit gradients."""

import cProfile
import functools
import pstats

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ghost
import optlab
from optlab.batches import _ghost_norms
from optlab.batches import _ghost_values
from optlab.batches import _ghost_walk

N, T, D, V = 5, 6, 4, 11


def dense(*shape, seed=1):
  rng = np.random.default_rng(seed + 7 * sum(shape) + len(shape))
  return rng.normal(size=shape) / np.sqrt(shape[0])


def vectors(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=(N, *shape)))


def tokens():
  return jnp.asarray(np.random.default_rng(0).integers(0, V, (N, T)))


def norm(x):
  return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 0.1)


def block(p, x):
  return x + jnp.tanh(norm(x) * p['scale'] @ p['w'] + p['b']) @ p['out']


def layers(*lead):
  return {
    'scale': dense(*lead, D), 'w': dense(*lead, D, 7),
    'b': dense(*lead, 7), 'out': dense(*lead, 7, D),
  }  # fmt: skip


def scanned(p, x):
  body = lambda x, layer: (block(layer, x), None)
  return jnp.sum(jax.lax.scan(body, x, p['layers'])[0] ** 2, (1, 2))


def scanned_remat(p, x):
  body = jax.checkpoint(lambda x, layer: (block(layer, x), jnp.sum(x, (1, 2))))
  x, sums = jax.lax.scan(body, x, p['layers'], reverse=True)
  return jnp.sum(x**2, (1, 2)) + jnp.sum(jnp.sin(sums), 0)


def remat(p, x):
  part = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)
  return jnp.sum(part(p['layers'], part(p['layers'], x)) ** 2, (1, 2))


def nested(p, x):
  inner = lambda x, layer: (block(layer, x), None)
  outer = lambda x, group: jax.lax.scan(inner, x, group)
  return jnp.sum(jax.lax.scan(outer, x, p['layers'])[0] ** 2, (1, 2))


def twice_in_a_round(p, x):
  body = lambda x, layer: (block(layer, block(layer, x)), None)
  return jnp.sum(jax.lax.scan(body, x, p['layers'])[0] ** 2, (1, 2))


def recurrent(p, x):
  cell = lambda h, row: (jnp.tanh(h @ p['u'] + row @ p['v'] + p['b']), None)
  start = jnp.tanh(p['start']) + jnp.zeros((len(x), D))
  h, _ = jax.lax.scan(cell, start, x.swapaxes(0, 1))
  return jnp.sum(h**2, 1)


def start_alone(p, x):
  """The first carried value comes from parameters alone."""

  def one(row):
    cell = lambda h, r: (jnp.tanh(h * r), h @ p['v'])
    return jnp.sum(jnp.square(jax.lax.scan(cell, jnp.sin(p['h']), row)[1]))

  return jax.vmap(one)(x)


def stacked_and_outside(p, x):
  body = lambda x, w: (jnp.tanh(x @ w), None)
  x, _ = jax.lax.scan(body, x, p['w'])
  return jnp.sum((x @ p['w'][0]) ** 2, (1, 2)) + jnp.sum(p['w'] ** 2)


def by_index(p, x):
  body = lambda i, x: jnp.tanh(x @ p['w'][i])
  return jnp.sum(jax.lax.fori_loop(0, 3, body, x) ** 2, (1, 2))


def shared_and_stacked(p, x):
  """A loop's slice and a weight of all rounds in one product."""
  body = lambda x, w: (jnp.tanh(x @ (w * p['scale'])), None)
  return jnp.sum(jax.lax.scan(body, x, p['w'])[0] ** 2, (1, 2))


def stacked_by_hand(p, x):
  body = lambda x, w: (jnp.tanh(x @ w), None)
  stack = jnp.stack([p['a'], p['b']])
  return jnp.sum(jax.lax.scan(body, x, stack)[0] ** 2, (1, 2))


def unrolled(p, x):
  for i in range(3):
    x = jnp.tanh(x @ p['w'][i] + p['b'][i])
  return jnp.sum(x**2, (1, 2))


def attention(p, x):
  q, k, v = jnp.split(x @ p['qkv'], 3, -1)
  heads = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
  return jnp.sum((heads @ p['out']) ** 2, (1, 2))


def slices(p, x):
  """The same function, from slices of one matrix."""
  q, k, v = (x @ part for part in jnp.split(p['qkv'], 3, 1))
  heads = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
  return jnp.sum((heads @ p['out']) ** 2, (1, 2))


def overlapping(p, x):
  a, b = x @ p['w'][:, :5], x @ p['w'][:, 3:]
  return jnp.sum(a**2, (1, 2)) + jnp.sum(jnp.sin(b), (1, 2))


def tied_embedding(p, t):
  x = jnp.tanh(p['table'][t] @ p['w'])
  logits = jax.nn.log_softmax(x @ p['table'].T)
  return -jnp.take_along_axis(logits, t[..., None], -1)[..., 0].mean(1)


def siamese(p, x):
  a, b = (jnp.tanh(part @ p['w']) for part in jnp.split(x, 2, 1))
  return jnp.sum((a - b) ** 2, (1, 2))


def autoencoder(p, x):
  return jnp.sum((jnp.tanh(x @ p['w']) @ p['w'].T - x) ** 2, (1, 2))


def thrice(p, x):
  for _ in range(3):
    x = jnp.tanh(x @ p['w'])
  return jnp.sum(x**2, (1, 2))


def two_tables(p, t):
  """An embedding twice, and once more as a matrix."""
  x = p['table'][t] * p['table'][(t + 1) % V]
  return jnp.sum((jnp.tanh(x) @ p['table'].T) ** 2, (1, 2))


def out_of_range(p, t):
  a = jnp.take(p['table'], 2 * t - 5, 0, mode='clip')
  b = jnp.take(p['other'], 2 * t, 0, mode='fill', fill_value=0.0)
  return jnp.sum(jnp.sin(a), (1, 2)) + jnp.sum(jnp.cos(b), (1, 2))


def penalty(p, x):
  return thrice(p, x) + jnp.sum(p['w'] ** 2)


def no_data(p, x):
  return jnp.sum(p['w'] ** 3) * jnp.ones(len(x))


def weight_norm(p, x):
  w = p['g'] * p['v'] / jnp.linalg.norm(p['v'], axis=0)
  return jnp.sum(jnp.tanh(x @ w) ** 2, (1, 2))


def experts(p, x):
  return jnp.sum(jnp.einsum('btd,edh->beth', x, p['w']) ** 2, (1, 2, 3))


def heads(p, x):
  y = jnp.einsum('bthk,hkd->btd', x.reshape(N if len(x) == N else 1, T, 2, 2),
                 p['w'])  # fmt: skip
  return jnp.sum(jnp.tanh(y) ** 2, (1, 2))


def convolution(p, x):
  y = jax.lax.conv_general_dilated(
    x, p['k'], (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')
  )
  return jnp.sum(jnp.tanh(y + p['b']) ** 2, (1, 2))


def branches(p, x):
  return jax.vmap(
    lambda row: jax.lax.cond(
      row[0, 0] > 0,
      lambda: jnp.sum(jnp.tanh(row @ p['w'])),
      lambda: jnp.sum(jnp.sin(row) @ p['w']),
    )
  )(x)


SEQUENCE, TOKENS = (lambda: vectors(T, D)), tokens
MODELS = {
  scanned: ({'layers': layers(3)}, SEQUENCE),
  scanned_remat: ({'layers': layers(3)}, SEQUENCE),
  remat: ({'layers': layers()}, SEQUENCE),
  nested: ({'layers': layers(2, 3)}, SEQUENCE),
  twice_in_a_round: ({'layers': layers(2)}, SEQUENCE),
  recurrent: (
    {
      'u': dense(D, D), 'v': dense(D, D, seed=2), 'b': dense(D),
      'start': dense(D, seed=3),
    },
    SEQUENCE,
  ),
  start_alone: ({'h': dense(D), 'v': dense(D, 3)}, SEQUENCE),
  stacked_and_outside: ({'w': dense(3, D, D)}, SEQUENCE),
  by_index: ({'w': dense(3, D, D)}, SEQUENCE),
  shared_and_stacked: (
    {'w': dense(3, D, D), 'scale': dense(D)}, SEQUENCE,
  ),
  stacked_by_hand: ({'a': dense(D, D), 'b': dense(D, D, seed=9)}, SEQUENCE),
  unrolled: ({'w': dense(3, D, D), 'b': dense(3, D)}, SEQUENCE),
  attention: ({'qkv': dense(D, 3 * D), 'out': dense(D, D)}, SEQUENCE),
  slices: ({'qkv': dense(D, 3 * D), 'out': dense(D, D)}, SEQUENCE),
  overlapping: ({'w': dense(D, 7)}, SEQUENCE),
  tied_embedding: ({'table': dense(V, D), 'w': dense(D, D)}, TOKENS),
  siamese: ({'w': dense(D, 9)}, SEQUENCE),
  autoencoder: ({'w': dense(D, 9)}, SEQUENCE),
  thrice: ({'w': dense(D, D)}, SEQUENCE),
  two_tables: ({'table': dense(V, D)}, TOKENS),
  out_of_range: ({'table': dense(V, D), 'other': dense(V, 3)}, TOKENS),
  penalty: ({'w': dense(D, D)}, SEQUENCE),
  no_data: ({'w': dense(D, D)}, SEQUENCE),
  weight_norm: ({'g': dense(7), 'v': dense(D, 7)}, SEQUENCE),
  experts: ({'w': dense(3, D, 2)}, SEQUENCE),
  heads: ({'w': dense(2, 2, D)}, SEQUENCE),
  convolution: ({'k': dense(3, D, 2), 'b': dense(2)}, SEQUENCE),
  branches: ({'w': dense(D, 3)}, SEQUENCE),
}  # fmt: skip


def explicit(losses, params, examples):
  """Squared norms and the sum of per-example gradients, by leaf."""
  one = lambda p, e: losses(p, jax.tree.map(lambda leaf: leaf[None], e))[0]
  grads = jax.jit(jax.vmap(jax.grad(one), (None, 0)))(params, examples)
  norms = jax.tree.map(
    lambda g: jnp.sum(jnp.abs(g.reshape(N, -1)) ** 2, 1), grads
  )
  return norms, jax.tree.map(lambda g: g.mean(0), grads)


def close(actual, expected, rtol=1e-10):
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol, 1e-12)


@pytest.mark.parametrize('losses', MODELS, ids=lambda f: f.__name__)
def test_norms_by_example_and_array_are_exact(x64, losses):
  params, make = MODELS[losses]
  params, examples = jax.tree.map(jnp.asarray, params), make()

  @jax.jit
  def both(params, examples):
    return (
      optlab.batches.ghost_sq_norms(losses, params, examples),
      optlab.ghost_norms(losses, params, examples, jnp.ones(N)),
      explicit(losses, params, examples),
      jnp.mean(losses(params, examples)),
    )

  found, moments, (norms, mean), value = both(params, examples)
  close(found, norms)
  close(moments.grads, mean)
  np.testing.assert_allclose(moments.value, value, 1e-12)


def kinds(losses, params, examples):
  one = lambda p, e: losses(p, jax.tree.map(lambda leaf: leaf[None], e))[0]
  closed = jax.make_jaxpr(one)(params, jax.tree.map(lambda e: e[0], examples))
  plans, *_ = _ghost_walk._plan(
    closed, len(jax.tree.leaves(params)), jnp.float32
  )
  return {plans[i].kind for i in plans}


def test_no_array_is_summed_where_factors_do(x64):
  """Stacked layers, slices and tied tables cost no copies of the weights."""
  wide = {'table': dense(500, D), 'w': dense(D, D)}
  assert kinds(tied_embedding, wide, tokens()) == {'pairs', 'direct'}
  close(
    optlab.batches.ghost_sq_norms(tied_embedding, wide, tokens()),
    explicit(tied_embedding, wide, tokens())[0],
  )
  for losses in (scanned, scanned_remat, nested, unrolled, slices, attention):
    assert kinds(losses, *[MODELS[losses][0], MODELS[losses][1]()]) == {
      'direct'
    }
  for losses in (siamese, autoencoder, thrice, two_tables):
    params = {k: dense(D, 300) for k in MODELS[losses][0]}
    if losses is two_tables:
      params = {'table': dense(400, D)}
    if losses is thrice:
      params = {'w': dense(60, 60)}
    examples = MODELS[losses][1]()
    if losses in (thrice, autoencoder):
      examples = vectors(1, len(params['w']))
    assert kinds(losses, params, examples) == {'pairs'}, losses
    close(
      optlab.batches.ghost_sq_norms(losses, params, examples),
      explicit(losses, params, examples)[0],
    )


def test_a_large_gradient_is_made_in_parts(x64, monkeypatch):
  monkeypatch.setattr(_ghost_norms, '_PART', 8)
  losses = lambda p, x: jnp.sum(jnp.tanh(x @ p['w']) ** 2, (1, 2))
  for depth, width in ((D, 23), (23, D), (D, 24)):
    params = {'w': dense(depth, width)}
    examples = vectors(40, depth)
    close(
      jax.jit(lambda p, e: optlab.batches.ghost_sq_norms(losses, p, e))(
        params, examples
      ),
      explicit(losses, params, examples)[0],
    )


@pytest.mark.slow
def test_tracing_is_linear_in_depth_and_within_three_of_plain():
  """In calls of functions, which do not depend on the load of a machine."""

  def calls(norms, depth):
    stack = [ghost.layers(64)] * depth
    args = ghost.model(64, 512, 32, stack), ghost.tokens(4, 32)
    for _ in range(2):  # The first fills the caches of JAX.
      with cProfile.Profile() as profile:
        fresh = functools.partial(ghost.language_model)
        ghost.lowered(fresh, norms, *args)
    return pstats.Stats(profile).total_calls

  plain, short = calls(False, 4), calls(True, 4)
  assert short <= 3 * plain
  assert calls(True, 8) <= 2 * short


def test_memory_is_that_of_a_gradient():
  """Temporaries of layers in a loop below an output that is wide."""

  def losses(p, x):
    body = lambda x, layer: (jnp.tanh(x @ layer['w'] + layer['b']), None)
    x, _ = jax.lax.scan(body, x, p['layers'])
    return jnp.sum(jax.nn.logsumexp(x @ p['head'], -1), 1)

  shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  params = {
    'layers': {'w': shape(8, 128, 128), 'b': shape(8, 128)},
    'head': shape(128, 1024),
  }
  estimator = optlab.per_example(losses, optlab.ghost_norms)
  outputs = lambda e: (e.value, e.grads, e.extras['scaled_moments'])
  memory = [
    jax.jit(f)
    .lower(params, shape(8, 128, 128))
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for f in (
      jax.grad(lambda p, x: jnp.mean(losses(p, x))),
      lambda p, x: optlab.ghost_norms(losses, p, x, jnp.ones(8)),
      # Which may repeat the pass in another unit.
      lambda p, x: outputs(estimator.estimate(p, (), x)[0]),
    )
  ]
  assert max(memory[1:]) <= 1.3 * memory[0], memory


def pinned(spread):
  def losses(p, x):
    body = lambda h, w: (spread(jnp.tanh(h @ w)), None)
    hidden = jax.checkpoint(spread)(jnp.tanh(x @ p['w']))
    hidden += p['table'][(8 * x[:, 0]).astype(int) % 5]
    return jnp.sum(jax.lax.scan(body, hidden, p['layers'])[0] ** 2, 1)

  return losses


PINNED = {
  'w': dense(16, 32),
  'table': dense(5, 32),
  'layers': dense(2, 32, 32),
}


@pytest.mark.parametrize('route', ['ghost_norms', 'vmap_grads'])
def test_examples_lie_where_the_loss_says(route):
  """A constraint on their axis holds for that which they are mapped over."""
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((2,), ('data',), axis_types=auto)
  split = jax.NamedSharding(mesh, jax.P('data'))
  pin = lambda x: jax.lax.with_sharding_constraint(x, split)
  examples = jax.device_put(vectors(16)[:4], split)
  flops, found = [], []
  for losses in (pinned(lambda x: x), pinned(pin)):
    step = jax.jit(
      lambda p, x, f=losses: getattr(optlab.batches, route)(
        f, p, x, jnp.ones(4)
      )
    )
    compiled = step.lower(PINNED, examples).compile()
    flops.append(compiled.cost_analysis()['flops'])
    found.append(compiled(PINNED, examples))
  close(found[1], found[0], 1e-4)
  assert flops[1] <= 1.05 * flops[0], flops


@pytest.mark.parametrize('route', ['ghost_norms', 'vmap_grads'])
@pytest.mark.parametrize('word', ['with_sharding_constraint', 'reshard'])
def test_on_explicit_meshes_the_type_says_where_examples_lie(route, word):
  explicit = (jax.sharding.AxisType.Explicit,)
  mesh = jax.make_mesh((2,), ('data',), axis_types=explicit)
  split = jax.NamedSharding(mesh, jax.P('data'))
  say = {
    'with_sharding_constraint': jax.lax.with_sharding_constraint,
    'reshard': jax.sharding.reshard,
  }[word]
  with jax.set_mesh(mesh):
    examples = jax.device_put(vectors(16)[:4], split)
    mask = jnp.ones(4, device=split)
    params = jax.device_put(PINNED, jax.NamedSharding(mesh, jax.P()))
    losses = lambda p, x: jnp.sum(say(jnp.tanh(x @ p['w']), split) ** 2, 1)
    with pytest.raises(ValueError, match='leave the word out'):
      jax.eval_shape(
        lambda p, x, m: getattr(optlab.batches, route)(losses, p, x, m),
        params, examples, mask,
      )  # fmt: skip


def test_a_part_of_two_meetings_of_one_position(x64):
  """Views through a transpose, a cast and an axis of length one."""

  def losses(p, x):
    w = p['w'].T[None].astype(jnp.float64)
    a = jnp.tanh(x @ w[0].T)
    return jnp.sum((a @ jnp.squeeze(w, 0)) ** 2, (1, 2))

  params, examples = {'w': dense(D, 50)}, vectors(1, D)
  assert kinds(losses, params, examples) == {'pairs'}
  close(
    optlab.batches.ghost_sq_norms(losses, params, examples),
    explicit(losses, params, examples)[0],
  )


def test_complex_parameters(x64):
  def losses(p, x):
    return jnp.sum(jnp.abs(jnp.tanh(x @ p['w']) @ p['w'].T + p['b']) ** 2, 1)

  params = {
    'w': dense(D, 3) + 1j * dense(D, 3, seed=5), 'b': 1j * dense(D),
  }  # fmt: skip
  close(
    optlab.batches.ghost_sq_norms(losses, params, vectors(D)),
    explicit(losses, params, vectors(D))[0],
  )
  for inner in ('jvp', 'vmap'):
    estimator = optlab.per_example(
      losses,
      optlab.ghost_norms if inner == 'jvp' else optlab.batches.vmap_grads,
      inner_products=getattr(optlab.batches, f'{inner}_inner_products'),
    )
    estimate, _ = estimator.estimate(params, (), vectors(D))
    loss = lambda p: jnp.mean(losses(p, vectors(D)))
    close(estimate.grads, jax.tree.map(jnp.conj, jax.grad(loss)(params)))
    one = lambda p, e: losses(p, e[None])[0]
    rows = jax.vmap(jax.grad(one), (None, 0))(params, vectors(D))
    flat = jnp.concatenate(
      [leaf.reshape(N, -1) for leaf in jax.tree.leaves(rows)], 1
    )
    products = (flat @ jnp.conj(flat.mean(0))).real
    np.testing.assert_allclose(
      estimate.extras['sum_sq_diff_inner'],
      jnp.sum((products - products.mean()) ** 2),
      1e-9,
    )


def test_nothing_of_the_user_is_written_into(x64):
  """Weight normalization overwrites the variables of its own parameters."""

  class Model(nnx.Module):
    def __init__(self, rngs):
      self.inner = nnx.WeightNorm(
        nnx.Linear(D, 7, rngs=rngs, param_dtype=jnp.float64), rngs=rngs
      )
      self.out = nnx.Linear(7, 2, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
      return self.out(jnp.tanh(self.inner(x)))

  graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
  before = jax.tree.map(np.array, params)

  def losses(params, x):
    return jnp.sum(nnx.merge(graph, params, rest)(x) ** 2, 1)

  found = optlab.batches.ghost_sq_norms(losses, params, vectors(D))
  for route in (optlab.ghost_norms, optlab.batches.vmap_grads):
    moments = route(losses, params, vectors(D), jnp.ones(N))
    close(params, before, 0)
    close(moments.grads, explicit(losses, params, vectors(D))[1])
  close(found, explicit(losses, params, vectors(D))[0])


def test_a_loss_that_writes_into_its_arguments(x64):
  def losses(params, batch):
    params['w'] = params['w'] / 2.0
    batch['x'] = batch['x'] @ params['w']
    return jnp.sum(batch['x'] ** 2, 1)

  params, examples = {'w': dense(D, 3)}, {'x': vectors(D)}
  for route in (
    optlab.ghost_norms,
    optlab.batches.vmap_grads,
    optlab.batches.plain_grads,
    optlab.batches.microbatch_means,
  ):
    moments = route(losses, params, examples, jnp.ones(N))
    assert examples['x'].shape == (N, D)
    np.testing.assert_array_equal(params['w'], dense(D, 3))
    clean = lambda p, e: jnp.sum((e['x'] @ (p['w'] / 2)) ** 2, 1)
    close(moments.grads, explicit(clean, params, examples)[1])


def test_the_walk_reads_a_loop_of_every_jax():
  closed = jax.make_jaxpr(
    lambda c, w: jax.lax.scan(lambda x, w: (c * x @ w, x), jnp.ones(D), w)
  )(1.0, jnp.ones((3, D, D)))
  loop = _ghost_values.Loop.of(closed.jaxpr.eqns[-1])
  assert (loop.consts, loop.carry, loop.length) == (1, 1, 3)
