"""A transformer of 110 million parameters on a mesh of 8: bytes, collectives.

Nothing runs: each step is compiled from abstract shapes for eight virtual
devices, with parameters split as in fully sharded data parallelism and a batch
of 64 sequences of 512 tokens split over the devices. ``state`` is what a device
holds beside its part of the parameters, in bytes a parameter of the model
(optax.adam: 2 x 4 / 8 = 1.00); ``temporaries`` and the collectives, by kind and
by volume a device, are the compiler's.

  python -m benchmarks transformer
"""

import collections
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _devices
import optlab

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH, BATCH = 12, 768, 12, 32768, 512, 64
DEVICES = 8


def shapes():
  """The parameters; the layers lie on a leading axis for `jax.lax.scan`."""
  of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return {
    'embed': of(VOCABULARY, WIDTH),  # Tied with the last layer.
    'qkv': of(LAYERS, WIDTH, 3 * WIDTH),
    'out': of(LAYERS, WIDTH, WIDTH),
    'up': of(LAYERS, WIDTH, 4 * WIDTH),
    'down': of(LAYERS, 4 * WIDTH, WIDTH),
    'norms': of(LAYERS, 2, WIDTH),
  }


def normalize(x, scale):
  return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def by_rows(x):
  """Activations are split by sequence: the weights travel, not they."""
  return jax.lax.with_sharding_constraint(x, jax.P('data'))


def block(x, layer):
  n, t, _ = x.shape
  h = normalize(x, 1 + layer['norms'][0])
  q, k, v = jnp.split(h @ layer['qkv'], 3, -1)
  heads = lambda z: z.reshape(n, t, HEADS, -1)
  attended = jax.nn.dot_product_attention(
    heads(q), heads(k), heads(v), is_causal=True
  )
  x = x + attended.reshape(n, t, WIDTH) @ layer['out']
  h = normalize(x, 1 + layer['norms'][1])
  return by_rows(x + jax.nn.gelu(h @ layer['up']) @ layer['down'])


def losses(params, tokens):
  """One loss a sequence."""
  layers = {name: leaf for name, leaf in params.items() if name != 'embed'}
  x = by_rows(params['embed'][tokens[:, :-1]])
  step = jax.checkpoint(lambda x, layer: (block(x, layer), None))
  x, _ = jax.lax.scan(step, x, layers)
  logits = by_rows(x @ params['embed'].T)
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]), -1
  )


def loss(params, tokens):
  return jnp.mean(losses(params, tokens))


def upper(weights, params, tokens):
  del weights
  return loss(params, tokens)


def lower(weights, params, tokens):
  """Weights by domain, which the first token names."""
  share = jax.nn.softmax(weights)[tokens[:, 0] % 8]
  return jnp.sum(share * losses(params, tokens))


GRADIENT = optlab.value_and_grad(loss)
SGD = optax.sgd(1e-3)
MEANS = optlab.per_example(
  losses, optlab.batches.microbatch_means, microbatch_size=8
)
GROWING = optlab.adadagrad(1e-3, optlab.norm_test(0.5), 16, BATCH)
SINGLE = {
  'optax.adam': (GRADIENT, optax.adam(1e-3)),
  'diffgrad': (GRADIENT, optlab.diffgrad(1e-3)),
  'adagrad_norm': (GRADIENT, optlab.adagrad_norm(1.0)),
  'normalized_momentum': (GRADIENT, optlab.normalized_momentum(1e-3)),
  'with_storm': (optlab.with_storm(GRADIENT, 0.1), SGD),
  'adadagrad, group means': (MEANS, GROWING),
  'adadagrad, ghost norms': (
    optlab.per_example(losses, optlab.ghost_norms),
    GROWING,
  ),
  'gns_newton, cg of 10': (
    GRADIENT,
    optlab.gns_newton(optlab.cg(10), max_trials=4),
  ),
}
BILEVEL = {
  'soba': optlab.soba(upper, lower, SGD, 1e-3),
  'bo_rep': optlab.bo_rep(upper, lower, SGD, 1e-3, lower_steps=1),
}


# The score of a whole sequence, up to a normalizer, against sampled ones.
LIKELIHOOD = {
  'nce': optlab.nce(lambda params, tokens: -losses(params, tokens)),
  'meco': optlab.meco(lambda params, tokens: -losses(params, tokens)),
}
# The worst of eight domains, softly.
COMPOSITIONS = {
  'fcco, 8 domains': optlab.multi_block.fcco(
    lambda params, tokens: jnp.mean(
      losses(params, tokens.reshape(-1, LENGTH + 1)).reshape(8, -1), 1
    ),
    lambda u, tokens: jnp.exp(u),
    8,
  )
}


def split(leaf):
  """On the last axis that the devices divide."""
  for axis in reversed(range(leaf.ndim)):
    if leaf.shape[axis] % DEVICES == 0 and leaf.shape[axis] >= WIDTH:
      return jax.P(*[None] * axis, 'data')
  return jax.P()


def place(tree, mesh, like):
  """Leaves of a parameter's shape where it is, all others everywhere."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=jax.NamedSharding(mesh, like.get(leaf.shape, jax.P())),
    ),
    tree,
  )


def held(tree):
  """Bytes of one device."""
  return sum(
    leaf.dtype.itemsize * np.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(tree)
  )


def moved(text):
  """Collectives by kind, and the bytes a device that they give out."""
  counts, volume = collections.Counter(), 0
  sizes = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'pred': 1, 'f16': 2}
  pattern = re.compile(
    r'= (\(?[^=]*?)\s(' + '|'.join(_devices.KINDS) + r')(?:-start)?\('
  )
  for match in pattern.finditer(text):
    counts[_devices.KINDS[match[2]]] += 1
    for kind, dims in re.findall(r'(\w+)\[([\d,]*)\]', match[1]):
      volume += sizes.get(kind, 0) * int(
        np.prod([int(d) for d in dims.split(',') if d] or [1])
      )
  return ' '.join(f'{n} {kind}' for kind, n in sorted(counts.items())), volume


def measure(name):
  mesh = jax.make_mesh(
    (DEVICES,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  params = shapes()
  like = {leaf.shape: split(leaf) for leaf in params.values()}
  size = sum(leaf.size for leaf in params.values())
  tokens = jax.ShapeDtypeStruct(
    (BATCH, LENGTH + 1),
    jnp.int32,
    sharding=jax.NamedSharding(mesh, jax.P('data')),
  )
  if name in SINGLE:
    estimator, tx = SINGLE[name]
    state = jax.eval_shape(lambda p: optlab.init(p, estimator, tx), params)
    batch, own = tokens, 1
  elif name in LIKELIHOOD:
    estimator, tx = LIKELIHOOD[name], optax.adam(1e-3)
    state = jax.eval_shape(lambda p: optlab.init(p, estimator, tx), params)
    scores = jax.ShapeDtypeStruct(
      (BATCH,), jnp.float32, sharding=tokens.sharding
    )
    batch, own = optlab.NoiseBatch(tokens, tokens, scores, scores), 1
  elif name in COMPOSITIONS:
    estimator, tx = COMPOSITIONS[name], optax.adam(1e-3)
    trackers = jax.ShapeDtypeStruct((8,), jnp.float32)
    state = jax.eval_shape(
      lambda p, u: optlab.init(p, estimator, tx, u), params, trackers
    )
    by_domain = jax.ShapeDtypeStruct(
      (8, BATCH // 8, LENGTH + 1), jnp.int32, sharding=tokens.sharding
    )
    blocks = jax.ShapeDtypeStruct((8,), jnp.int32)
    batch, own = optlab.multi_block.FCCOBatch(blocks, by_domain), 1
  else:
    estimator, tx = BILEVEL[name], optax.adam(1e-2)
    weights = jax.ShapeDtypeStruct((8,), jnp.float32)
    state = jax.eval_shape(
      lambda x, y: optlab.init(x, estimator, tx, y), weights, params
    )
    samples = ()
    if name != 'soba':
      samples = jax.ShapeDtypeStruct(
        (1, *tokens.shape),
        jnp.int32,
        sharding=jax.NamedSharding(mesh, jax.P(None, 'data')),
      )
    batch, own = optlab.BilevelBatch(tokens, tokens, samples), 1
  state = place(state, mesh, like)
  step = jax.jit(optlab.train_step(estimator, tx), donate_argnums=0)
  with jax.set_mesh(mesh):
    compiled = step.lower(state, batch).compile()
  memory = compiled.memory_analysis()
  kinds, volume = moved(compiled.as_text())
  rest = held(state) - own * held(place(params, mesh, like))
  print(
    f'{name:24} {rest / size:6.2f} {memory.temp_size_in_bytes / size:8.2f}'
    f' {volume / size / 4:8.2f}  {kinds}',
    flush=True,
  )


def main():
  size = sum(leaf.size for leaf in shapes().values())
  print(
    f'{size / 1e6:.0f} million float32 parameters on {DEVICES} devices,'
    f' {BATCH} sequences of {LENGTH} tokens'
  )
  print(
    f'{"step":24} {"state":>6} {"temp.":>8} {"moved":>8}  collectives in the'
    ' program'
  )
  print(f'{"":24} {"B/par.":>6} {"B/par.":>8} {"volumes":>8}')
  for name in (*SINGLE, *BILEVEL, *COMPOSITIONS, *LIKELIHOOD):
    _devices.run('transformer', name, DEVICES)
  print(
    'moved: volumes of all parameters that a device gets from its collectives,'
  )
  print('each counted once, also where it stands in a loop.')


if __name__ == '__main__':
  measure(sys.argv[1])
