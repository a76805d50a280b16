"""What the tests of growing batches cost beside a plain gradient.

First the moments of one batch of an MLP by every route. Then the growing loop
beside the same estimator on batches of a static size: one that takes its rows
from an epoch's permutation of the same resident data, as the loop does, one
that was gathered before, and, where the loop takes several microbatches, one
that takes the same ones, written out. Then how often the loop compiles while
the batch grows from 8 to N. Variants take turns; medians of the ratios within a
round are shown, of the time and of the CPU time, which other work on the
machine changes less.
"""

import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab

BATCH, WIDTHS = 512, (784, 256, 128, 10)
N = 4096
ROUNDS = 21
SLOW = 5.0  # Seconds after which a variant has been timed enough.


def _params(key):
  params = {}
  for i, (n, m) in enumerate(itertools.pairwise(WIDTHS)):
    key, new = jax.random.split(key)
    params[f'w{i}'] = jax.random.normal(new, (n, m)) / np.sqrt(n)
    params[f'b{i}'] = jnp.zeros(m)
  return params


def losses(params, batch):
  x, y = batch
  for i in range(len(WIDTHS) - 1):
    x = x if i == 0 else jax.nn.relu(x)
    x = x @ params[f'w{i}'] + params[f'b{i}']
  return optax.softmax_cross_entropy_with_integer_labels(x, y)


def compile_(function, *args):
  began = time.perf_counter()
  compiled = jax.jit(function).lower(*args).compile()
  return compiled, time.perf_counter() - began


def turns(functions, rounds=ROUNDS):
  """Seconds and CPU seconds, in rounds; slow ones drop out after three."""
  seconds = {name: [] for name in functions}
  for i in range(rounds + 2):
    for name, function in functions.items():
      if len(seconds[name]) >= 3 and np.sum(seconds[name], 0)[0] > SLOW:
        continue
      began = np.array([time.perf_counter(), time.process_time()])
      jax.block_until_ready(function())
      if i > 1:
        ended = time.perf_counter(), time.process_time()
        seconds[name].append(ended - began)
  return {name: np.array(taken) for name, taken in seconds.items()}


def table(head, seconds, reference, extra):
  print(f'{head:40} {"ms":>8} {"ratio":>6} {"CPU":>6} {"compile s":>9}  bound')
  for name, taken in seconds.items():
    rounds = min(len(taken), len(seconds[reference]))
    ratios = np.median(taken[:rounds] / seconds[reference][:rounds], 0)
    compiling, bound = extra[name]
    print(
      f'{name:40} {1e3 * np.median(taken[:, 0]):8.2f} {ratios[0]:6.2f}'
      f' {ratios[1]:6.2f} {compiling:9.2f}  {bound}',
      flush=True,
    )


def _moments(params, batch):
  tests: dict[str, tuple[Any, Any, Any, str]] = {
    'plain gradient': (None, None, None, ''),
    'norm test, ghost norms': (
      optlab.norm_test(0.5), optlab.ghost_norms, None, '1.2'
    ),
    'inner product test, JVP': (
      optlab.inner_product_test(0.5), optlab.batches.plain_grads,
      optlab.batches.jvp_inner_products, ''
    ),
    'augmented test, ghost norms and JVP': (
      optlab.augmented_inner_product_test(0.5, 0.5), optlab.ghost_norms,
      optlab.batches.jvp_inner_products, '1.8'
    ),
    'norm test, vmap(grad)': (
      optlab.norm_test(0.5), optlab.batches.vmap_grads, None, ''
    ),
    'norm test, vmap(grad) in microbatches of 64': (
      optlab.norm_test(0.5), optlab.batches.vmap_grads, None, ''
    ),
    'norm test, microbatch means of 64': (
      optlab.norm_test(0.5), optlab.batches.microbatch_means, None, ''
    ),
  }  # fmt: skip
  functions, extra, requests = {}, {}, {}
  for name, (test, moments, inner_products, bound) in tests.items():
    if test is None:

      def run(params, batch):
        return jax.value_and_grad(lambda p: jnp.mean(losses(p, batch)))(params)

    else:
      estimator = optlab.per_example(
        losses,
        moments,
        inner_products=inner_products,
        microbatch_size=64 if 'microbatch' in name else None,
      )

      def run(params, batch, estimator=estimator, test=test):
        estimate, _ = estimator.estimate(params, (), batch)
        size, _ = test.update(estimate.grads, (), **estimate.extras)
        return estimate.value, estimate.grads, size

    compiled, seconds = compile_(run, params, batch)
    functions[name] = lambda compiled=compiled: compiled(params, batch)
    extra[name] = (seconds, bound)
    requests[name] = compiled(params, batch)
  grads = requests['plain gradient'][1]
  for name, result in requests.items():
    for a, b in zip(
      jax.tree.leaves(result[1]), jax.tree.leaves(grads), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)
  exact = [
    float(requests[name][2])
    for name in requests
    if name.startswith('norm') and 'means' not in name
  ]
  np.testing.assert_allclose(exact, exact[0], rtol=1e-4)
  table(
    f'MLP {WIDTHS}, batch {BATCH}', turns(functions), 'plain gradient', extra
  )


def _static_step(estimator, tx, size):
  """What one writes where the size never changes: no loop, no mask."""
  train_step = optlab.train_step(estimator, tx)

  def step(state, data):
    train, epochs = state
    rows = jax.lax.dynamic_slice_in_dim(epochs.order, epochs.position, size)
    batch = jax.tree.map(lambda leaf: leaf[rows], data)
    train, value = train_step(train, batch)

    def reshuffle(epochs):
      key = jax.random.fold_in(epochs.key, epochs.epoch)
      order = jax.random.permutation(key, len(epochs.order)).astype(jnp.int32)
      return epochs._replace(
        order=order, epoch=epochs.epoch + 1, position=jnp.int32(0)
      )

    epochs = epochs._replace(position=epochs.position + size)
    at_end = epochs.position >= len(epochs.order)
    epochs = jax.lax.cond(at_end, reshuffle, lambda epochs: epochs, epochs)
    return optlab.batches.GrowingState(train, epochs), value

  return step


def _written_out(estimator, tx, size, microbatch):
  """The static step with the mean of as many gradients as the loop takes."""

  def estimate(params, memory, batch):
    parts = []
    for k in range(size // microbatch):
      rows = slice(k * microbatch, (k + 1) * microbatch)
      part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
      parts.append(estimator.estimate(params, memory, part)[0])
    mean = lambda *leaves: sum(leaves) / len(leaves)
    # The sums of squares need no merging to say what the microbatches cost.
    extras = {**parts[0].extras, 'sample_size': jnp.int32(size)}
    value, grads = jax.tree.map(mean, *((p.value, p.grads) for p in parts))
    return optlab.Estimate(value, grads, extras), memory

  several = optlab.GradientEstimator(estimator.init, estimate)
  return _static_step(several, tx, size)


def _carried(step, state, *args):
  """A donating program, called on the state that it returned before."""
  state = jax.tree.map(jnp.copy, state)
  began = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=0).lower(state, *args).compile()
  seconds = time.perf_counter() - began
  carried = [state]

  def call():
    carried[0], value = compiled(carried[0], *args)
    return carried[0], value

  return call, seconds


def _loop(params, data):
  """The loop against static sizes; whole epochs, so that both reshuffle."""
  for size, microbatch in ((BATCH, 128), (BATCH, BATCH), (64, 64)):
    looped = optlab.per_example(
      losses, optlab.ghost_norms, microbatch_size=microbatch
    )
    static = optlab.per_example(losses, optlab.ghost_norms)
    # The rule may not grow: all take batches of one size.
    rule = optlab.adadagrad(0.05, optlab.norm_test(1e3), size, size)
    state = optlab.growing_init(params, looped, rule, data, jax.random.key(0))
    rows = state.epochs.order[:size]
    batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)
    programs = {
      f'static batch of {size}': (
        _static_step(static, rule, size), state, data
      ),
      'static batch, gathered before': (
        optlab.train_step(static, rule), state.train, batch
      ),
      f'loop, microbatches of {microbatch}': (
        optlab.growing_step(looped, rule), state, data
      ),
    }  # fmt: skip
    bounds = ('', '', '1.1', '')
    if microbatch < size:
      programs[f'static batch, {size // microbatch} microbatches'] = (
        _written_out(static, rule, size, microbatch), state, data
      )  # fmt: skip
    functions, extra, values = {}, {}, []
    for (name, program), bound in zip(programs.items(), bounds, strict=False):
      functions[name], seconds = _carried(*program)
      extra[name] = (seconds, bound)
      values.append(functions[name]()[1])
    np.testing.assert_allclose(values, values[0], rtol=1e-5)
    table(
      f'growing loop, batch {size} of {N}',
      turns(functions, 5 * N // size - 3),
      next(iter(functions)),
      extra,
    )


def _compilations(params, data):
  estimator = optlab.per_example(
    losses, optlab.ghost_norms, microbatch_size=128
  )
  tx = optlab.adadagrad(0.02, optlab.norm_test(0.5), 8, N)
  state = optlab.growing_init(params, estimator, tx, data, jax.random.key(0))
  traces = []

  def counted(state, data):
    traces.append(1)
    return optlab.growing_step(estimator, tx)(state, data)

  step = jax.jit(counted)
  sizes = [8]
  while sizes[-1] < N and len(sizes) < 500:
    state, _ = step(state, data)
    sizes.append(int(optlab.batches.next_size(state)))
  print(
    f'batch {sizes[0]} to {sizes[-1]} in {len(sizes) - 1} steps, with'
    f' {len(set(sizes))} sizes; compilations: {len(traces)}'
  )


def main():
  key = jax.random.key(0)
  params = _params(key)
  x = jax.random.normal(key, (N, WIDTHS[0]))
  y = jnp.argmax(x[:, : WIDTHS[-1]], 1)
  _moments(params, (x[:BATCH], y[:BATCH]))
  _loop(params, (x, y))
  _compilations(params, (x, y))


if __name__ == '__main__':
  main()
