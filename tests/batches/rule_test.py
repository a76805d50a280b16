"""The growth rule inside optax's wrappers, and what its tests remember."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab.batches import _unit
from tests.public import PUBLIC

ROWS = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
PARAMS = {'a': jnp.zeros(3), 'b': jnp.zeros(2)}


def losses(params, rows):
  return (rows @ jnp.concatenate([params['a'], params['b']]) - 1.0) ** 2


def estimate_of(route=optlab.batches.vmap_grads, rows=ROWS):
  estimator = optlab.per_example(losses, route)
  return jax.jit(lambda rows: estimator.estimate(PARAMS, (), rows)[0])(rows)


def request(state):
  (rule,) = [
    leaf
    for leaf in jax.tree.leaves(
      state, is_leaf=lambda s: isinstance(s, optlab.batches.GrowBatchState)
    )
    if isinstance(leaf, optlab.batches.GrowBatchState)
  ]
  return rule.info.requested_size


SIZES = {'batch_size': 8, 'max_batch_size': 4096}
ALIASES = {
  name: make
  for name, make in PUBLIC.items()
  if inspect.isfunction(make)
  and inspect.signature(make).return_annotation
  is optax.GradientTransformationExtraArgs
}


@pytest.mark.parametrize('name', ALIASES)
def test_every_transformation_can_be_injected(name):
  """With its defaults, and with its numbers as hyperparameters of a state."""
  given = {'learning_rate': 0.1, 'test': optlab.norm_test(0.5), **SIZES}
  wanted = inspect.signature(ALIASES[name]).parameters
  arguments = {k: v for k, v in given.items() if k in wanted}
  static = {
    k for k, v in wanted.items()
    if callable(v.default) and v.default is not v.empty
  }  # fmt: skip
  make = optax.inject_hyperparams(ALIASES[name], static_args=static)
  injected, plain = make(**arguments), ALIASES[name](**arguments)
  estimate = estimate_of()
  value_fn = jax.tree_util.Partial(lambda p: jnp.mean(losses(p, ROWS)))
  extras = dict(estimate.extras)
  extras |= {'value': estimate.value, 'grad': estimate.grads}
  extras |= {'value_fn': value_fn}
  extras['curvature'] = optlab.hessian(value_fn)(PARAMS)
  updates = []
  for tx in (injected, plain):
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for _ in range(2):
      found, after = update(estimate.grads, state, PARAMS, **extras)
      assert jax.tree.structure(after) == jax.tree.structure(state)
      state = after
    updates.append(found)
  for a, b in zip(*map(jax.tree.leaves, updates), strict=True):
    np.testing.assert_allclose(a, b, 1e-5, 1e-7)


def test_an_injected_rule_is_read_by_the_growing_step():
  make = optax.inject_hyperparams(optlab.adadagrad)
  tx = make(0.1, optlab.norm_test(0.5), 8, 64)
  estimator = optlab.per_example(losses, microbatch_size=8)
  state = optlab.growing_init(PARAMS, estimator, tx, ROWS, jax.random.key(0))
  assert optlab.batches.next_size(state) == 8
  step = jax.jit(optlab.growing_step(estimator, tx))
  for _ in range(4):
    state, _ = step(state, ROWS)
  assert optlab.batches.next_size(state) > 8


@pytest.mark.parametrize('wrap', ['object', 'transformation'])
def test_multi_steps_test_the_last_batch(wrap):
  estimator = optlab.per_example(losses)
  rule = optlab.adadagrad(0.1, optlab.norm_test(0.5), **SIZES)
  multi = optax.MultiSteps(rule, 2)
  tx = multi if wrap == 'object' else multi.gradient_transformation()
  state = optlab.init(PARAMS, estimator, tx)
  step = jax.jit(optlab.train_step(estimator, tx))
  state, _ = step(state, ROWS[:32])
  assert optlab.batches.next_size(state) == 8
  state, _ = step(state, ROWS[32:])
  expected, _ = estimator.estimate(PARAMS, (), ROWS[32:])
  alone = optlab.grow_batch(optlab.norm_test(0.5), **SIZES)
  _, alone = alone.update(expected.grads, alone.init(PARAMS), **expected.extras)
  assert optlab.batches.next_size(state) == alone.batch_size > 8


def group_request(test, estimate):
  """The request of the part 'b' alone, from its own losses."""
  only = lambda b, rows: losses({'a': PARAMS['a'], 'b': b}, rows)
  own, _ = optlab.per_example(only).estimate(PARAMS['b'], (), ROWS)
  rule = optlab.grow_batch(test, **SIZES)
  _, state = rule.update(own.grads, rule.init(PARAMS['b']), **own.extras)
  return state.info.requested_size


@pytest.mark.parametrize('wrap', ['masked', 'partition'])
@pytest.mark.parametrize(
  'test', [optlab.norm_test(0.5), optlab.batches.coordinate_norm_test(0.5)]
)
def test_a_rule_that_sees_a_part_takes_the_moments_of_it(wrap, test):
  rule = optlab.grow_batch(test, **SIZES)
  if wrap == 'masked':
    tx = optax.masked(rule, {'a': False, 'b': True})
  else:
    tx = optax.partition(
      {'ours': rule, 'other': optax.sgd(0.1)}, {'a': 'other', 'b': 'ours'}
    )
  estimate = estimate_of()
  state = tx.init(PARAMS)
  _, own = tx.update(estimate.grads, state, PARAMS, **estimate.extras)
  np.testing.assert_allclose(
    request(own), group_request(test, estimate), rtol=1e-5
  )
  # With the gradient of all, the request is that of all.
  _, whole = tx.update(
    estimate.grads, state, PARAMS, grad=estimate.grads, **estimate.extras
  )
  _, expected = rule.update(
    estimate.grads, rule.init(PARAMS), **estimate.extras
  )
  np.testing.assert_allclose(
    request(whole), expected.info.requested_size, rtol=1e-5
  )


def test_a_part_without_moments_of_its_own_is_an_error():
  tx = optax.masked(
    optlab.grow_batch(optlab.norm_test(0.5), **SIZES), {'a': False, 'b': True}
  )
  estimate = estimate_of(optlab.ghost_norms)
  with pytest.raises(
    ValueError, match='sees a part of the parameters, but sum'
  ):
    tx.update(estimate.grads, tx.init(PARAMS), **estimate.extras)


def test_a_part_with_moments_that_its_test_does_not_need():
  rule = optlab.grow_batch(optlab.batches.noise_scale(layers=True), **SIZES)
  tx = optax.masked(rule, {'a': False, 'b': True})
  estimate, _ = optlab.per_example(
    losses, inner_products=optlab.batches.jvp_inner_products
  ).estimate(PARAMS, (), ROWS)
  state = tx.init(PARAMS)
  _, own = tx.update(estimate.grads, state, **estimate.extras)
  assert jax.tree.structure(own) == jax.tree.structure(state)
  np.testing.assert_allclose(
    request(own),
    group_request(optlab.batches.noise_scale(), estimate_of()),
    rtol=1e-4,
  )
  with pytest.raises(ValueError, match='remembers them one by one.*leave out'):
    tx.update(estimate.grads, state, grad=estimate.grads, **estimate.extras)
  inner = optax.masked(
    optlab.grow_batch(optlab.inner_product_test(0.5), **SIZES),
    {'a': False, 'b': True},
  )
  with pytest.raises(ValueError, match='but sum_sq_diff_inner is of all'):
    inner.update(estimate.grads, inner.init(PARAMS), **estimate.extras)


def test_rows_without_noise_and_without_gradient_keep_the_size():
  """And a mean of exactly zero asks for all, or keeps it: never a crash."""
  half = jnp.asarray(ROWS[:4])
  tests = [
    make(decay=decay)
    for decay in (None, 0.9)
    for make in (
      functools.partial(optlab.norm_test, 0.5),
      functools.partial(optlab.batches.coordinate_norm_test, 0.5),
      functools.partial(optlab.inner_product_test, 0.5),
      functools.partial(optlab.augmented_inner_product_test, 0.5, 0.5),
    )
  ]
  estimator = optlab.per_example(
    losses, inner_products=optlab.batches.vmap_inner_products
  )
  cases = {
    'alike': (jnp.tile(half[:1], (4, 1)), 4, {8}),
    'nothing': (jnp.zeros_like(half), 4, {8}),
    'alone': (half, 1, {8}),
    'nan': (half.at[1, 2].set(jnp.nan), 4, {8}),
    'opposite': (jnp.concatenate([half[:2], -half[:2]]), 4, {8, 4096}),
  }

  @jax.jit
  @jax.vmap
  def sizes(rows, size):
    estimate, _ = estimator.estimate(
      PARAMS, (), optlab.batches.PaddedBatch(rows, size)
    )
    rules = [optlab.grow_batch(test, **SIZES) for test in tests]
    states = [
      rule.update(estimate.grads, rule.init(PARAMS), **estimate.extras)[1]
      for rule in rules
    ]
    return jnp.stack([state.batch_size for state in states])

  rows, counts, allowed = zip(*cases.values(), strict=True)
  found = sizes(jnp.stack(rows), jnp.array(counts))
  for name, here, good in zip(cases, found, allowed, strict=True):
    assert set(here.tolist()) <= good, name


SCALES = 1.0, 1e-30, 1e-22, 1e-9, 1e9, 1e22, 1e30
TESTS = {
  'norm_test': optlab.norm_test(0.2),
  'averaged': optlab.norm_test(0.2, decay=0.5),
  'coordinate': optlab.batches.coordinate_norm_test(0.2),
  'inner': optlab.inner_product_test(0.1),
  'augmented': optlab.augmented_inner_product_test(0.1, 0.1, decay=0.5),
  'noise_scale': optlab.batches.noise_scale(0.5, layers=True, decay=0.5),
}


@pytest.mark.parametrize(
  'route, kwargs, names',
  [
    ('vmap_grads', {'inner_products': 'jvp_inner_products'}, list(TESTS)),
    (
      'ghost_norms',
      {'inner_products': 'vmap_inner_products', 'microbatch_size': 4},
      ['norm_test', 'inner', 'augmented', 'noise_scale'],
    ),
    (
      'microbatch_means',
      {'microbatch_size': 2},
      ['norm_test', 'averaged', 'noise_scale'],
    ),
  ],
)
def test_requests_do_not_depend_on_the_unit_of_the_loss(route, kwargs, names):
  """Squares of 1e-30 and 1e30 have no place in float32."""
  inner = kwargs.pop('inner_products', None)
  estimator = lambda scale: optlab.per_example(
    lambda p, rows: scale * losses(p, rows),
    getattr(optlab.batches, route),
    inner_products=inner and getattr(optlab.batches, inner),
    layers=True,
    **kwargs,
  )
  rules = {name: optlab.grow_batch(TESTS[name], **SIZES) for name in names}

  @jax.jit
  def requests(scale):
    estimate, _ = estimator(scale).estimate(PARAMS, (), ROWS)
    found = {}
    for name, rule in rules.items():
      state = rule.init(PARAMS)
      for _ in range(2):
        _, state = rule.update(
          estimate.grads, state, grad=estimate.grads, **estimate.extras
        )
      found[name] = state.info.requested_size
    return found, estimate

  right, plain = requests(1.0)
  for scale in SCALES:
    found, estimate = requests(scale)
    for name in names:
      np.testing.assert_allclose(found[name], right[name], 1e-3, err_msg=name)
    for a, b in zip(
      *map(jax.tree.leaves, (estimate.grads, plain.grads)), strict=True
    ):
      np.testing.assert_allclose(a / scale, b, 1e-5, 1e-6)
    np.testing.assert_allclose(estimate.value / scale, plain.value, 1e-5)
  # What anyone else reads is what it is called, in range or not.
  assert requests(1e-30)[1].extras['sum_sq_diff_norm'] == 0
  assert requests(1e30)[1].extras['sum_sq_diff_norm'] == np.inf


def test_small_inputs_are_right_or_keep_the_size():
  """The gradient has digits; the square of a layer's input has none."""
  sizes = {}
  for scale in (1.0, 1e-22, 1e-30):
    for route in (optlab.ghost_norms, optlab.batches.vmap_grads):
      estimator = optlab.per_example(losses, route)
      rule = optlab.grow_batch(optlab.norm_test(0.2), **SIZES)
      estimate, _ = jax.jit(estimator.estimate)(PARAMS, (), scale * ROWS)
      _, state = rule.update(
        estimate.grads, rule.init(PARAMS), **estimate.extras
      )
      sizes[scale, route] = int(state.batch_size)
  right = sizes[1.0, optlab.ghost_norms]
  assert right > 8
  for (_, route), size in sizes.items():
    vmap = route is optlab.batches.vmap_grads
    assert abs(size - right) <= 1 or (size == 8 and not vmap)


def test_averages_follow_gradients_that_fall_by_decades():
  """From 1 to 1e-28 and on, past what one unit can hold."""
  rule = optlab.grow_batch(optlab.norm_test(1.0, decay=0.5), 2, 4096)

  def step(state, unit):
    noise = jnp.where(unit < 1, 196.0, 210.0)
    moments = {'unit': unit, 'sq_norms': 4.0, 'sum_sq_diff_norm': noise}
    moments = jax.tree.map(jnp.float32, moments)
    _, state = rule.update(
      jnp.ones(2), state, sample_size=8, scaled_moments=moments
    )
    return state, state.info.requested_size

  units = jnp.exp2(jnp.concatenate([jnp.zeros(3), jnp.full(300, -90.0)]))
  run = jax.jit(lambda units: jax.lax.scan(step, rule.init(jnp.ones(2)), units))
  found = run(units)[1]
  np.testing.assert_allclose(found[:100], 30 / (4 - 30 / 8), 1e-5)
  np.testing.assert_allclose(found[-60:], 28 / (4 - 28 / 8), 1e-5)
  found = run(units[::-1])[1]
  np.testing.assert_allclose(found[:300], 28 / (4 - 28 / 8), 1e-5)
  np.testing.assert_allclose(found[300:], 30 / (4 - 30 / 8), 1e-5)


@pytest.mark.parametrize('scale', [1e-15, 1e15])
def test_moments_by_hand_without_digits_keep_the_size(scale):
  """Right, or kept: never a size from squares that over- or underflowed."""
  estimator = optlab.per_example(
    losses, inner_products=optlab.batches.jvp_inner_products
  )
  expected, _ = estimator.estimate(PARAMS, (), ROWS)
  moments = dict(expected.extras)
  del moments['scaled_moments'], moments['value_fn']
  powers = {'sum_sq_diff_inner': 4, 'sample_size': 0}
  times = lambda tree, power: jax.tree.map(
    lambda leaf: _unit.times(leaf, jnp.float32(scale), power), tree
  )
  by_hand = {k: times(v, powers.get(k, 2)) for k, v in moments.items()}
  grads = jax.tree.map(lambda g: scale * g, expected.grads)
  for name in ('norm_test', 'coordinate', 'inner', 'augmented'):
    rule = optlab.grow_batch(TESTS[name], **SIZES)
    after = lambda grads, extras, rule=rule: rule.update(
      grads, rule.init(PARAMS), **extras
    )[1]
    found, right = after(grads, by_hand), after(expected.grads, moments)
    told = np.isnan(found.info.requested_size) and found.batch_size == 8
    assert told or abs(int(found.batch_size) - int(right.batch_size)) <= 1
    assert right.batch_size > 8


def test_samples_are_counted_beyond_int32():
  rule = optlab.grow_batch(lambda grads, **extras: 2.0, 2, 8)
  state = rule.init(PARAMS)
  seen = 0
  for more in (2**31 - 1, 2**31 - 1, 5, 2**30):
    _, state = rule.update(PARAMS, state, sample_size=jnp.int32(more))
    seen += more
  assert int(state.samples[0]) * 2**30 + int(state.samples[1]) == seen
