"""diffGrad and AdaGrad-Norm beside optax.adam at 10 million parameters.

A step is ``update`` and ``apply_updates`` in one program with its state
donated; the methods take turns, and the medians of their ratios to Adam's time
in the same round are shown. ``bytes`` are those that XLA's loops read and
write. On a CPU it makes one loop an output: Adam passes over a buffer 10 times
(3 for each moment, 4 for the parameters), diffGrad 17 times (3 and 3, 5 for the
update, 3 for the parameters, 3 for the last gradient), because its update has
two consumers and is written. 9 of 7 needs loops with several outputs.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab

LEAVES, LEAF = 4, 2_500_000
ROUNDS = 15


def _step(tx):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step, donate_argnums=(0, 1))


def _mebibytes(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**20


def _check(grads):
  """The fast program takes the step of the formulas, in NumPy."""
  tx = optlab.diffgrad(1e-3)
  params = [jnp.zeros_like(leaf) for leaf in grads]
  params, state = _step(tx)(params, tx.init(params), grads)
  params, _ = _step(tx)(params, state, grads)
  g = np.asarray(grads[0][:1000], np.float64)
  first = 1e-3 / (1.0 + np.exp(-np.abs(g))) * np.sign(g)
  np.testing.assert_allclose(
    params[0][:1000], -first - 0.5e-3 * np.sign(g), rtol=1e-3, atol=1e-8
  )


def main():
  keys = jax.random.split(jax.random.key(0), LEAVES)
  grads = [0.1 * jax.random.normal(key, (LEAF,)) for key in keys]
  _check(grads)
  methods = {
    'optax.adam': optax.adam(1e-3),
    'optlab.diffgrad': optlab.diffgrad(1e-3),
    'optlab.adagrad_norm': optlab.adagrad_norm(1.0),
  }
  carried, steps, compiling, sizes, moved = {}, {}, {}, {}, {}
  for name, tx in methods.items():
    params = [jnp.ones_like(leaf) for leaf in grads]
    state = tx.init(params)
    sizes[name] = _mebibytes(state)
    began = time.perf_counter()
    steps[name] = _step(tx).lower(params, state, grads).compile()
    compiling[name] = time.perf_counter() - began
    moved[name] = steps[name].cost_analysis()['bytes accessed']
    carried[name] = jax.block_until_ready((params, state))
  seconds = {name: [] for name in methods}
  for _ in range(ROUNDS):
    for name, step in steps.items():
      began = time.perf_counter()
      carried[name] = jax.block_until_ready(step(*carried[name], grads))
      seconds[name].append(time.perf_counter() - began)
  reference = np.array(seconds['optax.adam'][2:])
  print(f'{LEAVES * LEAF / 1e6:g} million float32 parameters')
  print(
    f'{"method":20} {"ms":>7} {"time / Adam":>12} {"bytes / Adam":>13}'
    f' {"state / Adam":>13} {"compile s":>10}'
  )
  for name, taken in seconds.items():
    own = np.array(taken[2:])
    print(
      f'{name:20} {1e3 * np.median(own):7.1f}'
      f' {np.median(own / reference):12.2f}'
      f' {moved[name] / moved["optax.adam"]:13.2f}'
      f' {sizes[name] / sizes["optax.adam"]:13.2f} {compiling[name]:10.2f}'
    )
  # At best Adam reads 4 and writes 3 buffers, diffGrad reads 5 and writes 4.
  print('bounds: diffgrad 2.0 in time, 1.7 in bytes (9/7 at best), 1.5 in')
  print('        state; adagrad_norm 0.6 in time')


if __name__ == '__main__':
  main()
