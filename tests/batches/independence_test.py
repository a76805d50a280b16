"""Losses that mix their examples are refused where gradients are by example."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

N, D = 6, 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
IMAGES = jnp.asarray(
  np.random.default_rng(1).normal(size=(N, 5, 5, 2)), jnp.float32
)
LABELS = jnp.arange(N) % 3
W = {'w': jnp.asarray(np.random.default_rng(2).normal(size=(D, 3)))}
PARAMS = jax.tree.map(lambda w: w.astype(jnp.float32), W)


class Network(nnx.Module):
  def __init__(self, rngs, image):
    if image:
      self.first = nnx.Conv(2, 3, (3, 3), rngs=rngs)
    else:
      self.first = nnx.Linear(D, 3, rngs=rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)
    self.last = nnx.Linear(75 if image else 3, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.first(x)))
    return self.last(x.reshape(x.shape[0], -1))


def normalized(image, train):
  model = Network(nnx.Rngs(0), image)
  model.set_attributes(use_running_average=not train)
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def losses(params, batch):
    own = jax.tree.map(lambda leaf: leaf, rest)  # Training writes into it.
    logits = nnx.merge(graph, params, own)(batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])

  return losses, params, ((IMAGES if image else X), LABELS)


def contrast(params, x):
  z = x @ params['w']
  return -jnp.diagonal(jax.nn.log_softmax(z @ z.T))


def in_a_loop(params, x):
  part = jax.checkpoint(lambda x: jnp.tanh(x - jnp.mean(x, 0)) @ params['w'])
  return jnp.sum(part(x), 1)


def ranked(params, x):
  return jnp.sum(jnp.sort(x @ params['w'], 0), 1)


def running(params, x):
  return jnp.cumsum(x @ params['w'], 0)[:, 0]


def hidden(params, x):
  """Mixed in the gradient alone; its value at zero is that of each alone."""
  return (x - jax.lax.stop_gradient(x.mean(0))) @ params['w'][:, 0]


def of_rows(centre):
  """Squares of rows that a function has put together."""
  return lambda params, x: jnp.sum(centre(x @ params['w']) ** 2, 1)


def by_name(z):
  """As equinox normalizes: by the name of a mapped axis."""
  return jax.vmap(lambda z: z - jax.lax.pmean(z, 'rows'), axis_name='rows')(z)


def from_classes(z):
  classes = jnp.arange(len(z)) % 2 + (z[:, 0] > 0)
  return z - jax.ops.segment_sum(z, classes, 3)[classes]


def in_turn(z):
  return jax.lax.scan(lambda seen, row: (seen + row, seen + row), z[0] * 0, z)[
    1
  ]


def in_scanned_layers(z):
  layer = lambda z, w: (jnp.tanh(z - z.mean(0)) * w, None)
  return jax.lax.scan(layer, z, jnp.ones(2))[0]


def in_a_branch(z):
  return jax.lax.cond(z.size > 0, lambda z: z - z.mean(0), lambda z: z, z)


def distances(z):
  return jnp.sum((z[:, None] - z[None]) ** 2, 1)


def after_a_sum_by_hand(z):
  return z * jax.lax.fori_loop(0, len(z), lambda i, total: total + z[i, 0], 0.0)


MIXED = {
  'batch norm': normalized(False, True),
  'batch norm of images': normalized(True, True),
  'contrast': (contrast, PARAMS, X),
  'checkpoint': (in_a_loop, PARAMS, X),
  'sort': (ranked, PARAMS, X),
  'cumsum': (running, PARAMS, X),
  'stop_gradient': (hidden, PARAMS, X),
  **{
    part.__name__: (of_rows(part), PARAMS, X)
    for part in (
      by_name,
      from_classes,
      in_turn,
      in_scanned_layers,
      in_a_branch,
      distances,
      after_a_sum_by_hand,
    )
  },
  'roll': (of_rows(lambda z: z - jnp.roll(z, 1, 0)), PARAMS, X),
  'order': (of_rows(lambda z: z - z[::-1]), PARAMS, X),
  'all numbers': (of_rows(lambda z: z - z.reshape(-1).mean()), PARAMS, X),
  'spectrum': (of_rows(lambda z: jnp.fft.fft(z, axis=0).real), PARAMS, X),
}


@pytest.mark.parametrize('name', MIXED)
@pytest.mark.parametrize('route', ['ghost_norms', 'vmap_grads'])
def test_mixed_examples_are_refused(name, route):
  losses, params, batch = MIXED[name]
  estimator = optlab.per_example(losses, getattr(optlab.batches, route))
  with pytest.raises(ValueError, match='loss i must depend on example i alone'):
    jax.eval_shape(estimator.estimate, params, (), batch)
  with pytest.raises(ValueError, match='loss i must depend on example i alone'):
    optlab.batches.check_losses(losses, params, batch)


@pytest.mark.parametrize('name', ['batch norm', 'contrast'])
def test_microbatches_take_them(name):
  losses, params, batch = MIXED[name]
  estimator = optlab.per_example(losses, optlab.batches.plain_grads)
  estimate, _ = estimator.estimate(params, (), batch)
  loss, grads = jax.value_and_grad(lambda p: jnp.mean(losses(p, batch)))(params)
  np.testing.assert_allclose(estimate.value, loss, 1e-5)
  for a, b in zip(*map(jax.tree.leaves, (estimate.grads, grads)), strict=True):
    np.testing.assert_allclose(a, b, 1e-4, 1e-6)


def layer_norm(params, x):
  x = (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 0.1)
  logits = x @ params['w']
  return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[:1])


def attention(params, x):
  x = jnp.stack([x, x**2], 1) @ params['w']
  weights = jax.nn.softmax(jnp.einsum('btd,bsd->bts', x, x))
  return jnp.einsum('bts,bsd->btd', weights, x).sum((1, 2))


def penalized(params, x):
  return (x @ params['w'])[:, 0] + jnp.sum(params['w'] ** 2)


def in_pieces(params, x):
  """Chunks, loops and views, each example for itself."""
  z = x @ params['w']
  part = lambda z: jnp.sum(jnp.tanh(z) ** 2, -1)
  chunks = jnp.concatenate([part(z[:2]), part(z[2:])])
  mapped = jax.lax.map(lambda row: jnp.sum(row @ params['w']), x)
  counted = jax.lax.scan(lambda k, row: (k + 1, k + row[0]), 0.0, z * 0)[1]
  fill = lambda i, out: out.at[i].set(jnp.sum(z[i]))
  filled = jax.lax.fori_loop(0, len(z), fill, jnp.zeros(len(z)))
  twice = jnp.concatenate([z, 2 * z])
  views = jnp.sum(twice[: len(z)] * twice[len(z) :], 1)
  return chunks * mapped + counted * 0 + filled + views


def by_row(params, x):
  """What mixes rows, within each example."""

  def one(row):
    z = row @ params['w']
    order = jnp.argsort(z)
    counts = jax.ops.segment_sum(z, order, 3)[order]
    return (
      jnp.sum(jnp.cumsum(jnp.sort(z)) * counts)
      + jax.lax.top_k(z, 2)[0][1]
      + jnp.abs(jnp.fft.rfft(row)).sum()
      + jax.lax.cond(z[0] > 0, jnp.sum, jnp.prod, z)
      + jnp.sum(jax.lax.scan(lambda c, y: (c * y, c), 1.0, z)[1])
      + jax.lax.while_loop(
        lambda c: c > 1.0, lambda c: c / 2, jax.lax.stop_gradient(z[0])
      )
      + jnp.linalg.slogdet(jnp.outer(z, z) + jnp.eye(3))[1]
    )

  return jax.vmap(one)(x)


ALONE = {
  'in pieces': (in_pieces, PARAMS, X),
  'by row': (by_row, PARAMS, X),
  'fixed statistics': normalized(False, False),
  'images, fixed statistics': normalized(True, False),
  'layer norm': (layer_norm, PARAMS, X),
  'attention': (attention, PARAMS, X),
  'a penalty': (penalized, PARAMS, X),
}  # fmt: skip


@pytest.mark.parametrize('name', ALONE)
def test_losses_of_their_own_example_pass(name):
  optlab.batches.check_losses(*ALONE[name])
  losses, params, batch = ALONE[name]
  jax.eval_shape(optlab.per_example(losses).estimate, params, (), batch)


def test_what_the_program_hides_the_numbers_show():
  """Through a sum over axes that were merged with the examples'."""

  def losses(params, x):
    rows = (x @ params['w']).reshape(-1)
    return (rows - rows.mean()).reshape(len(x), -1)[:, 0]

  with pytest.raises(ValueError, match='in a batch of 6 and .* alone'):
    optlab.batches.check_losses(losses, PARAMS, X)
