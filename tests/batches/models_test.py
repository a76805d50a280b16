"""`per_example` on losses with auxiliary output, model state and keys."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab

ROWS = jax.random.normal(jax.random.key(0), (20, 6))
PARAMS = {'w': jnp.linspace(-1.0, 1.0, 6), 'b': jnp.zeros(())}
KEY = jax.random.key(5)
ROUTES = {
  'ghost': optlab.ghost_norms,
  'vmap': optlab.batches.vmap_grads,
  'plain': optlab.batches.plain_grads,
}


def noisy(params, model_state, rows, keys):
  """A mask an example; the state counts what it has seen."""
  mask = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (6,)))(keys)
  margin = (rows * mask) @ params['w'] + params['b'] - 1.0
  seen = {'sum': model_state['sum'] + jnp.sum(rows[:, 0])}
  return margin**2, (seen, {'margin': margin, 'hit': margin > 0})


def make(route='ghost', microbatch_size=None, **kwargs):
  return optlab.per_example(
    noisy, ROUTES[route], microbatch_size=microbatch_size,
    has_aux=True, has_state=True, has_key=True, **kwargs,
  )  # fmt: skip


def start(estimator):
  return estimator.init(PARAMS, {'sum': jnp.zeros(())}, KEY)


def written_out(step=0, rows=ROWS):
  """Losses, gradients and auxiliary output, one example after the other."""
  step_key = jax.random.fold_in(KEY, step)

  def one(params, i):
    key = jax.random.fold_in(step_key, i)[None]
    losses, (_, aux) = noisy(params, {'sum': 0.0}, rows[i][None], key)
    return losses[0], aux

  grad = jax.vmap(jax.value_and_grad(one, has_aux=True), (None, 0))
  (losses, aux), grads = grad(PARAMS, jnp.arange(len(rows)))
  return losses, grads, aux


def close(actual, expected, rtol=2e-5):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6),
    actual,
    expected,
  )


@pytest.mark.parametrize(
  'microbatch_size',
  [None, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 20))],
)
@pytest.mark.parametrize('route', ROUTES)
def test_the_numbers_do_not_depend_on_microbatches_or_routes(
  route, microbatch_size
):
  estimator = make(route, microbatch_size)
  estimate, state = jax.jit(estimator.estimate)(PARAMS, start(estimator), ROWS)
  losses, grads, aux = written_out()
  close(estimate.value, jnp.mean(losses))
  close(estimate.grads, jax.tree.map(lambda g: jnp.mean(g, 0), grads))
  close(estimate.aux['margin'], jnp.mean(aux['margin'][:, 0]))
  close(estimate.aux['hit'], jnp.mean(aux['hit'][:, 0]))
  if route != 'plain':
    flat = jnp.concatenate([grads['w'], grads['b'][:, None]], 1)
    spread = jnp.sum((flat - jnp.mean(flat, 0)) ** 2)
    close(estimate.extras['sum_sq_diff_norm'], spread, 1e-4)
  close(state.model_state['sum'], jnp.sum(ROWS[:, 0]), 1e-4)
  assert state.step == 1
  again, _ = jax.jit(estimator.estimate)(PARAMS, state, ROWS)
  close(again.value, jnp.mean(written_out(step=1)[0]))


def centred(w, stats, rows):
  """Batch normalization: of the microbatch, and averages; a count beside."""
  mean = jnp.mean(rows, 0)
  count = stats['count'] + len(rows)
  average = 0.9 * stats['average'] + 0.1 * mean
  return ((rows - mean) @ w - 1.0) ** 2, {'count': count, 'average': average}


def in_parts(rows, sizes):
  """The mean loss and the statistics of microbatches, written out."""
  stats, values, first = NO_STATS, [], 0
  for size in sizes:
    part = rows[first : first + size]
    value, stats = centred(jnp.ones(6), stats, part)
    values, first = [*values, value], first + size
  return jnp.mean(jnp.concatenate(values)), stats


NO_STATS = {'count': jnp.zeros((), jnp.int32), 'average': jnp.zeros(6)}
CENTRED = optlab.per_example(
  centred, optlab.batches.plain_grads, microbatch_size=6, has_state=True
)


def test_model_state_sees_every_example_once():
  """Also where the microbatches do not divide the batch: nothing is filled."""
  start, w = CENTRED.init(jnp.ones(6), NO_STATS), jnp.ones(6)
  estimate = jax.jit(CENTRED.estimate)
  found, state = estimate(w, start, ROWS)
  value, stats = in_parts(ROWS, (6, 6, 6, 2))
  close((found.value, state.model_state), (value, stats))
  close(found.extras['value_fn'](w), value)
  for size, parts in ((3, (2, 1)), (99, (6, 6, 6, 2)), (18, (6, 6, 6))):
    padded = optlab.batches.PaddedBatch(ROWS, jnp.int32(size))
    found, state = estimate(w, start, padded)
    value, stats = in_parts(ROWS, parts)
    close((found.value, state.model_state), (value, stats))
  assert estimate._cache_size() == 2
  again, state = CENTRED.estimate(w, start, padded._replace(size=18))
  close((again.value, state.model_state), (value, stats))
  # A loss that mixes examples without a state sees no others either.
  plain = lambda w, rows: centred(w, NO_STATS, rows)[0]
  mixing = optlab.per_example(
    plain, optlab.batches.microbatch_means, microbatch_size=6
  )
  found, _ = jax.jit(mixing.estimate)(w, (), ROWS)
  close(found.value, in_parts(ROWS, (6, 6, 6, 2))[0])


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_model_state_in_growing_steps_on_devices(kind):
  """A group of one row is whole on each device."""
  mesh = jax.make_mesh((2,), ('data',), axis_types=(
    jax.sharding.AxisType[kind],
  ))  # fmt: skip
  tx = optax.sgd(0.01)
  states = []
  for rows in (
    ROWS,
    jax.device_put(ROWS, jax.NamedSharding(mesh, jax.P('data'))),
  ):
    with jax.set_mesh(mesh):
      state = optlab.growing_init(
        jnp.ones(6), CENTRED, tx, rows, jax.random.key(1), NO_STATS
      )
      step = jax.jit(optlab.growing_step(CENTRED, tx, batch_size=9))
      for count in (9, 18, 27):
        state, _ = step(state, rows)
        assert state.train.estimator_state.model_state['count'] == count
    states.append(state.train)
  close(*states)


def test_inner_products_see_the_same_masks():
  estimator = make('ghost', 8, inner_products=optlab.batches.jvp_inner_products)
  estimate, _ = jax.jit(estimator.estimate)(PARAMS, start(estimator), ROWS)
  _, grads, _ = written_out()
  flat = jnp.concatenate([grads['w'], grads['b'][:, None]], 1)
  mean = jnp.mean(flat, 0)
  products = flat @ mean - mean @ mean
  close(estimate.extras['sum_sq_diff_inner'], jnp.sum(products**2), 1e-4)


@pytest.mark.parametrize('microbatch_size', [None, 6])
def test_value_fn_is_the_loss_of_the_estimate(microbatch_size):
  estimator = make('ghost', microbatch_size)
  estimate, _ = estimator.estimate(PARAMS, start(estimator), ROWS)
  value_fn = estimate.extras['value_fn']
  value, grads = jax.jit(jax.value_and_grad(value_fn))(PARAMS)
  close((value, grads), (estimate.value, estimate.grads))
  # Curvature by forward over reverse mode, through the loop.
  tangent = jax.tree.map(jnp.ones_like, PARAMS)
  product = jax.jit(lambda p: jax.linearize(jax.grad(value_fn), p)[1](tangent))(
    PARAMS
  )
  step_key = jax.random.fold_in(KEY, 0)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, jnp.arange(20))
  whole = lambda p: jnp.mean(noisy(p, {'sum': 0.0}, ROWS, keys)[0])
  expected = jax.jvp(jax.grad(whole), (PARAMS,), (tangent,))[1]
  close(product, expected, 1e-4)


@pytest.mark.parametrize(
  'tx', [optlab.gns_newton(), optax.lbfgs()], ids=['gns', 'lbfgs']
)
def test_newton_and_lbfgs_take_growing_batches(tx):
  """Byrd et al. 2012, whom the norm test cites."""
  target = ROWS @ jnp.arange(1.0, 7.0)
  losses = lambda w, batch: (
    jax.nn.softplus(-jnp.sign(batch[1]) * (batch[0] @ w)) + 0.01 * jnp.sum(w**2)
  )
  estimator = optlab.per_example(losses, microbatch_size=4)
  tx = optax.chain(optlab.grow_batch(optlab.norm_test(0.5), 4, 20), tx)
  data = (ROWS, target)
  state = optlab.growing_init(
    jnp.zeros(6), estimator, tx, data, jax.random.key(0)
  )
  step = jax.jit(optlab.growing_step(estimator, tx))
  for _ in range(12):
    state, _ = step(state, data)
  # The first state of optax.lbfgs has weak types, the next ones have not.
  assert step._cache_size() <= 2
  assert optlab.batches.next_size(state) == 20
  whole = lambda w: jnp.mean(losses(w, data))
  best = optlab.minimize(
    whole, jnp.zeros(6), optlab.gns_newton(), max_steps=50, grad_tol=1e-5
  )
  assert whole(state.train.params) - best.value < 1e-3


def test_growing_steps_carry_all_three():
  estimator = make('ghost', 4)
  tx = optlab.adadagrad(0.1, optlab.norm_test(0.5), 4, 20)
  state = optlab.growing_init(
    jax.tree.map(jnp.array, PARAMS),  # A copy: donated below.
    estimator,
    tx,
    ROWS,
    jax.random.key(1),
    {'sum': jnp.zeros(())},
    KEY,
  )
  step = jax.jit(optlab.growing_step(estimator, tx), donate_argnums=0)
  state, (value, aux) = step(state, ROWS)
  first = jax.random.permutation(
    jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 0), 20
  )[:4]
  losses, _, rest = written_out()
  close(value, jnp.mean(losses[first]))
  close(aux['margin'], jnp.mean(rest['margin'][first, 0]))
  close(state.train.estimator_state.model_state['sum'], jnp.sum(ROWS[first, 0]))


def test_devices_see_the_same_masks():
  """On an automatic mesh, and by `jax.shard_map` of the user's own."""
  estimator = make('ghost', 5)
  alone, _ = jax.jit(estimator.estimate)(PARAMS, start(estimator), ROWS)
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spread = jax.device_put(ROWS, jax.NamedSharding(mesh, jax.P('data')))
  split, _ = jax.jit(estimator.estimate)(PARAMS, start(estimator), spread)
  close(split.grads, alone.grads)
  mapped = make('ghost', 5, axis_name='data')

  def numbers(*args):  # Not the extras: a function has no partition spec.
    result, _ = mapped.estimate(*args)
    return result.grads, result.aux, result.value

  wanted = jax.shard_map(
    numbers,
    mesh=mesh,
    in_specs=(jax.P(), jax.P(), jax.P('data')),
    out_specs=jax.P(),
  )
  grads, aux, value = jax.jit(wanted)(PARAMS, start(mapped), spread)
  close(grads, alone.grads)
  close(aux, alone.aux)
  close(value, alone.value)


def test_batch_normalization_that_trains_is_that_of_the_microbatches():
  """As in data-parallel training without synchronized statistics."""

  class Network(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(6, 8, rngs=rngs)
      self.norm = nnx.BatchNorm(8, rngs=rngs)
      self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
      return self.last(nnx.relu(self.norm(self.first(x))))[:, 0]

  graph, params, stats = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

  def losses(params, stats, rows):
    model = nnx.merge(graph, params, stats)
    values = (model(rows) - 1.0) ** 2
    return values, nnx.split(model, nnx.Param, ...)[2]

  estimator = optlab.per_example(
    losses, optlab.batches.microbatch_means, microbatch_size=5, has_state=True
  )
  state = estimator.init(params, stats)
  estimate, state = jax.jit(estimator.estimate)(params, state, ROWS)
  expected, means = stats, []
  for k in range(4):
    values, expected = losses(params, expected, ROWS[5 * k : 5 * k + 5])
    means.append(jnp.mean(values))
  close(estimate.value, jnp.mean(jnp.stack(means)))
  close(jax.tree.leaves(state.model_state), jax.tree.leaves(expected))


def test_auxiliary_output_without_rows_is_refused():
  estimator = optlab.per_example(
    lambda p, rows: (rows @ p, jnp.zeros(())), has_aux=True
  )
  with pytest.raises(ValueError, match='aux must have one row an example'):
    estimator.estimate(jnp.ones(6), estimator.init(jnp.ones(6)), ROWS)


def test_a_loss_of_a_whole_batch_gets_rows_or_a_word():
  """Never a window on the data set, of which it would see all."""
  loss = lambda w, rows: jnp.mean((rows @ w - 1.0) ** 2)
  plain = optlab.value_and_grad(loss)
  order = jnp.arange(20)[::-1]
  window = optlab.batches.ResidentBatch(ROWS, order, jnp.int32(3), 5)
  padded = optlab.batches.PaddedBatch(ROWS, 5)
  w = jnp.ones(6)
  for batch, rows in ((window, ROWS[order[3:8]]), (padded, ROWS[:5])):
    estimate, _ = plain.estimate(w, (), batch)
    close(estimate.value, loss(w, rows))
    newton = optlab.with_curvature(plain, optlab.hessian(loss))
    estimate, _ = newton.estimate(w, (), batch)
    close(
      estimate.extras['curvature'](w), jax.jvp(
        jax.grad(lambda w, rows=rows: loss(w, rows)), (w,), (w,))[1]
    )  # fmt: skip
  tx = optax.sgd(0.1)
  losses = lambda w, rows: (rows @ w - 1.0) ** 2
  growing = optlab.per_example(losses, microbatch_size=4)
  for estimator in (
    plain, optlab.with_curvature(growing, optlab.hessian(loss))
  ):  # fmt: skip
    state = optlab.growing_init(w, estimator, tx, ROWS, jax.random.key(0))
    step = optlab.growing_step(estimator, tx, batch_size=5)
    with pytest.raises(ValueError, match='size of the batch must be known'):
      jax.eval_shape(step, state, ROWS)
