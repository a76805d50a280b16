"""What exact per-example norms cost a model: memory, tracing, devices.

Nothing runs but the tracing: steps are compiled from abstract shapes. ``plain``
is `jax.value_and_grad` of the mean loss, ``ghost`` is `optlab.ghost_norms`.
``memory`` is the ratio of the compiler's temporaries, ``flops`` that of its
operations, ``tracing`` that of the CPU time of tracing and lowering (the median
of three). ``share`` is the part of one device's flops that each of eight does
in a growing step that ends an epoch.

  python -m benchmarks ghost
"""

import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _devices
import optlab

DEVICES, ROWS = 8, 4096
ROUTES = {
  'ghost': optlab.ghost_norms,
  'vmap': optlab.batches.vmap_grads,
  'means': optlab.batches.microbatch_means,
}


def of(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def tokens(count, length):
  return (jax.ShapeDtypeStruct((count, length), jnp.int32),) * 2


def normalize(x, scale):
  centred = x - x.mean(-1, keepdims=True)
  return scale * centred / (x.std(-1, keepdims=True) + 1e-5)


def block(layer, x, heads=4):
  n, length, width = x.shape
  mixed = normalize(x, layer['n1']) @ layer['qkv'] + layer['bq']
  q, k, v = (
    part.reshape(n, length, heads, width // heads)
    for part in jnp.split(mixed, 3, -1)
  )
  scores = jnp.einsum('bthd,bshd->bhts', q, k) / np.sqrt(width // heads)
  scores = jnp.where(jnp.tri(length, dtype=bool), scores, -1e9)
  heads_out = jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores), v)
  x = x + heads_out.reshape(x.shape) @ layer['o'] + layer['bo']
  hidden = jax.nn.gelu(normalize(x, layer['n2']) @ layer['w1'] + layer['b1'])
  return x + hidden @ layer['w2'] + layer['b2']


def layers(width, *lead):
  sizes = {
    'n1': (width,), 'qkv': (width, 3 * width), 'bq': (3 * width,),
    'o': (width, width), 'bo': (width,), 'n2': (width,),
    'w1': (width, 4 * width), 'b1': (4 * width,), 'w2': (4 * width, width),
    'b2': (width,),
  }  # fmt: skip
  return {name: of(*lead, *size) for name, size in sizes.items()}


def language_model(params, batch, *, remat=False):
  """Losses by sequence; layers in a list or on a leading axis, head tied."""
  words, targets = batch
  x = params['embed'][words] + params['place'][: words.shape[1]]
  apply = jax.checkpoint(block) if remat else block
  if isinstance(params['layers'], list):
    for layer in params['layers']:
      x = apply(layer, x)
  else:
    x, _ = jax.lax.scan(
      lambda x, layer: (apply(layer, x), None), x, params['layers']
    )
  head = params.get('head', params['embed'].T)
  logits = normalize(x, params['norm']) @ head
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(
    -1
  )


def model(width, vocabulary, length, stack):
  return {
    'embed': of(vocabulary, width), 'place': of(length, width),
    'norm': of(width), 'layers': stack,
  }  # fmt: skip


def dense(params, x):
  apply = lambda x, layer: (jnp.tanh(x @ layer['w'] + layer['b']), None)
  return jnp.sum(jax.lax.scan(apply, x, params)[0] ** 2, 1)


def cases():
  """Name, losses, parameters and batch of each row on memory."""
  wide = functools.partial(model, 128, 8192, 128)
  yield 'scan, tied', language_model, wide(layers(128, 4)), tokens(16, 128)
  yield (
    'scan, tied, remat', functools.partial(language_model, remat=True),
    wide(layers(128, 4)), tokens(16, 128),
  )  # fmt: skip
  yield 'list, tied', language_model, wide([layers(128)] * 4), tokens(16, 128)
  yield (
    'scan, untied', language_model,
    wide(layers(128, 4)) | {'head': of(128, 8192)}, tokens(16, 128),
  )  # fmt: skip
  yield (
    '16 dense layers in a scan', dense,
    {'w': of(16, 512, 512), 'b': of(16, 512)}, of(32, 512),
  )  # fmt: skip
  yield (
    'mostly head, as long as wide', language_model,
    model(64, 8192, 64, layers(64, 1)), tokens(8, 64),
  )  # fmt: skip


def lowered(losses, ghost, params, batch):
  """The lowered gradient, and the CPU seconds that it took."""
  count = jax.tree.leaves(batch)[0].shape[0]

  def step(p, b):
    if ghost:
      return optlab.ghost_norms(losses, p, b, jnp.ones(count))
    return jax.value_and_grad(lambda p: jnp.mean(losses(p, b)))(p)

  began = time.process_time()
  found = jax.jit(step).lower(params, batch)
  return found, time.process_time() - began


def memory():
  print(f'{"model":30} {"plain MB":>9} {"ghost MB":>9} {"memory":>7} flops')
  for name, *case in cases():
    sizes, flops = [], []
    for ghost in (False, True):
      compiled = lowered(case[0], ghost, *case[1:])[0].compile()
      sizes.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
      flops.append(compiled.cost_analysis()['flops'])
    print(
      f'{name:30} {sizes[0]:9.1f} {sizes[1]:9.1f} {sizes[1] / sizes[0]:7.2f}'
      f' {flops[1] / flops[0]:5.2f}',
      flush=True,
    )


def tracing():
  print(f'{"blocks":30} {"plain s":>9} {"ghost s":>9} tracing')
  for depth in (2, 4, 8, 16):  # The first warms up and is not shown.
    found = []
    for _ in range(3):
      params = model(64, 512, 32, [layers(64)] * depth)
      plain, ghost = (
        lowered(functools.partial(language_model), kind, params, tokens(4, 32))[
          1
        ]
        for kind in (False, True)
      )
      found.append((ghost / plain, plain, ghost))
    ratio, plain, ghost = statistics.median_low(found)
    if depth > 2:
      print(f'{depth:<30} {plain:9.2f} {ghost:9.2f} {ratio:7.2f}', flush=True)


def shares(size):
  """By route: for a network and 4,096 rows that are split over the devices."""

  def losses(params, batch):
    x, labels = batch
    hidden = jax.nn.relu(x @ params['a'] + params['b'])
    return optax.softmax_cross_entropy_with_integer_labels(
      hidden @ params['c'], labels
    )

  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    'a': 0.1 * jax.random.normal(keys[0], (256, 512)),
    'b': jnp.zeros(512),
    'c': 0.1 * jax.random.normal(keys[1], (512, 10)),
  }
  x = jax.random.normal(keys[2], (ROWS, 256))
  data = x, jnp.argmax(x[:, :10], 1)
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((DEVICES,), ('data',), axis_types=auto)
  split = jax.device_put(data, jax.NamedSharding(mesh, jax.P('data')))
  whole = jax.NamedSharding(mesh, jax.P())
  tx = optax.chain(
    optlab.grow_batch(optlab.norm_test(0.5), 512, ROWS), optax.sgd(0.1)
  )
  for name, route in ROUTES.items():
    estimator = optlab.per_example(losses, route, microbatch_size=size)
    step = jax.jit(optlab.growing_step(estimator, tx))
    flops = []
    for rows, place in ((data, lambda tree: tree), (split, on(whole))):
      state = optlab.growing_init(
        place(params), estimator, tx, rows, jax.random.key(3)
      )
      compiled = step.lower(place(state), rows).compile()
      flops.append(compiled.cost_analysis()['flops'])
    yield name, flops[1] / flops[0]


def share():
  print(f'{"route, rows in a microbatch":30} share of a device')
  for size in (128, 256):
    for name, found in shares(size):
      print(f'{name + f", {size}":30} {found:17.4f}', flush=True)


def on(sharding):
  return lambda tree: jax.device_put(tree, sharding)


def main():
  for name in ('memory', 'tracing', 'share'):
    _devices.run('ghost', name, DEVICES if name == 'share' else 1)


if __name__ == '__main__':
  {'memory': memory, 'tracing': tracing, 'share': share}[sys.argv[1]]()
