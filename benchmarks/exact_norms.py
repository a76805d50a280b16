"""Exact per-example norms of a transformer, and what is cheaper.

The time and the memory of the moments of a transformer with 8,192 tied words
beside those of its plain gradient; then how far the means of groups are from
the exact trace as estimates of it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import batch_growth
from benchmarks import ghost
import optlab


def transformer():
  """Exact moments of four scanned layers, 16 sequences of 128 tokens."""
  shapes = ghost.model(128, 8192, 128, ghost.layers(128, 4))
  leaves, treedef = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  params = treedef.unflatten(
    [jnp.asarray(rng.normal(size=s.shape, scale=0.05), s.dtype) for s in leaves]
  )
  batch = tuple(jnp.asarray(rng.integers(0, 8192, (2, 16, 128)), jnp.int32))
  mean = lambda params, batch: jnp.mean(ghost.language_model(params, batch))
  exact = optlab.per_example(ghost.language_model, optlab.ghost_norms)

  def moments(params, batch):
    estimate, _ = exact.estimate(params, (), batch)
    norm = estimate.extras['sum_sq_diff_norm']
    return estimate.value, estimate.grads, norm

  functions, extra, memory, values = {}, {}, {}, []
  for name, run, bound in (
    ('plain gradient', jax.value_and_grad(mean), ''),
    ('norm test, ghost norms', moments, '1.3'),
  ):
    compiled, seconds = batch_growth.compile_(run, params, batch)
    functions[name] = lambda compiled=compiled: compiled(params, batch)
    extra[name] = (seconds, bound)
    memory[name] = compiled.memory_analysis().temp_size_in_bytes
    values.append(functions[name]()[0])
  np.testing.assert_allclose(*values, rtol=1e-5)
  seconds = batch_growth.turns(functions, 9)
  batch_growth.table(
    'transformer, 8,192 words, tied', seconds, 'plain gradient', extra
  )
  ratio = memory['norm test, ghost norms'] / memory['plain gradient']
  print(f'{"memory of temporaries":40} {"":8} {ratio:6.2f} {"":16}  1.3')


def estimates():
  """Group means (DDP-Norm, Lau et al. 2025) beside exact norms, as estimates.

  On the same batches of 64 sequences, the trace of the covariance by the means
  of 4, 8 and 16 groups over the exact one: its mean, which should be 1, and its
  spread from batch to batch.
  """
  shapes = ghost.model(32, 256, 32, ghost.layers(32, 2))
  leaves, treedef = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  params = treedef.unflatten(
    [jnp.asarray(rng.normal(size=s.shape, scale=0.2), s.dtype) for s in leaves]
  )
  text = rng.zipf(1.5, (40, 64, 33)) % 256
  batches = tuple(jnp.asarray(text[..., i : i + 32], jnp.int32) for i in (0, 1))

  def trace(route, size=None):
    estimator = optlab.per_example(
      ghost.language_model, route, microbatch_size=size
    )
    norm = lambda batch: estimator.estimate(params, (), batch)[0].extras
    return jax.jit(
      lambda batches: jax.lax.map(
        lambda batch: norm(batch)['sum_sq_diff_norm'], batches
      )
    )(batches)

  exact = trace(optlab.ghost_norms)
  spread = np.std(exact) / np.mean(exact)
  print(f'trace of the covariance: exact norms differ by {spread:.3f} of it')
  for groups in (4, 8, 16):
    ratio = trace(optlab.batches.microbatch_means, 64 // groups) / exact
    print(
      f'means of {groups:2} groups: {np.mean(ratio):.3f} of it, spread'
      f' {np.std(ratio):.3f}'
    )


def main():
  transformer()
  estimates()


if __name__ == '__main__':
  main()
