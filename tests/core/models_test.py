"""Losses with auxiliary output, model state and keys, as users have them."""

import equinox as eqx
from flax import linen
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optlab

KEYS = jax.random.split(jax.random.key(3), 4)
X = jax.random.normal(KEYS[0], (32, 6))
LABELS = jax.random.randint(KEYS[1], (32,), 0, 3)
BATCH = (X, LABELS)
RATE = 0.1


def cross_entropy(logits, labels):
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.mean(losses)


class Network(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(6, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.last = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


class LinenNetwork(linen.Module):
  @linen.compact
  def __call__(self, x, train=True):
    x = linen.Dense(8)(x)
    x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
    x = linen.Dropout(0.5, deterministic=not train)(x)
    return linen.Dense(3)(x)


def run(estimator, tx, params, *inner, steps=4, batch=BATCH):
  state = optlab.init(params, estimator, tx, *inner)
  step = jax.jit(optlab.train_step(estimator, tx))
  values = []
  for _ in range(steps):
    state, value = step(state, batch)
    values.append(value)
  return state, values


def nnx_loss(graph):
  def loss(params, model_state, batch):
    model = nnx.merge(graph, params, model_state)
    logits = model(batch[0])
    _, _, model_state = nnx.split(model, nnx.Param, ...)
    return cross_entropy(logits, batch[1]), (model_state, logits)

  return loss


def test_nnx_batch_norm_and_dropout_equal_the_frameworks_own_step():
  model = Network(nnx.Rngs(0))
  graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)
  optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

  @nnx.jit
  def own_step(model, optimizer, x, labels):
    def loss(model):
      return cross_entropy(model(x), labels)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value

  own = [own_step(model, optimizer, *BATCH) for _ in range(4)]
  estimator = optlab.value_and_grad(
    nnx_loss(graph), has_state=True, has_aux=True
  )
  state, values = run(estimator, optax.adam(RATE), params, rest)
  np.testing.assert_array_equal([value for value, _ in values], own)
  assert values[0][1].shape == (32, 3)
  _, trained, stats = nnx.split(model, nnx.Param, ...)
  for ours, theirs in (
    (state.params, trained),
    (state.estimator_state.model_state, stats),
  ):
    for a, b in zip(
      jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
    ):
      if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
      np.testing.assert_array_equal(a, b)


class BatchStatsState(train_state.TrainState):
  batch_stats: dict


def test_linen_batch_norm_and_dropout_equal_the_frameworks_own_step():
  model, run_key = LinenNetwork(), KEYS[2]
  variables = model.init({'params': KEYS[3], 'dropout': KEYS[3]}, X)

  def loss(params, batch_stats, batch, key):
    logits, changed = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      batch[0],
      rngs={'dropout': key},
      mutable=['batch_stats'],
    )
    return cross_entropy(logits, batch[1]), changed['batch_stats']

  own = BatchStatsState.create(
    apply_fn=model.apply,
    params=variables['params'],
    tx=optax.adam(RATE),
    batch_stats=variables['batch_stats'],
  )

  @jax.jit
  def own_step(own, batch):
    key = jax.random.fold_in(run_key, own.step)
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(
      own.params, own.batch_stats, batch, key
    )
    return own.apply_gradients(grads=grads, batch_stats=stats), value

  expected = []
  for _ in range(4):
    own, value = own_step(own, BATCH)
    expected.append(value)
  estimator = optlab.value_and_grad(loss, has_state=True, has_key=True)
  state, values = run(
    estimator,
    optax.adam(RATE),
    variables['params'],
    variables['batch_stats'],
    run_key,
  )
  np.testing.assert_array_equal(values, expected)
  for a, b in zip(
    jax.tree.leaves((state.params, state.estimator_state.model_state)),
    jax.tree.leaves((own.params, own.batch_stats)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_equinox_batch_norm_equals_the_frameworks_own_step():
  class Model(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout

    def __init__(self, key):
      self.first = eqx.nn.Linear(6, 3, key=key)
      self.norm = eqx.nn.BatchNorm(3, 'batch', mode='batch')
      self.dropout = eqx.nn.Dropout(0.2)

    def __call__(self, x, state, key):
      x, state = self.norm(self.first(x), state)
      return self.dropout(x, key=key), state

  model, bn_state = eqx.nn.make_with_state(Model)(KEYS[3])

  def forward(model, bn_state, batch, key):
    keys = jax.random.split(key, len(batch[0]))
    logits, bn_state = jax.vmap(
      model, axis_name='batch', in_axes=(0, None, 0), out_axes=(0, None)
    )(batch[0], bn_state, keys)
    return cross_entropy(logits, batch[1]), bn_state

  @eqx.filter_jit
  def own_step(model, bn_state, opt_state, key):
    (value, bn_state), grads = eqx.filter_value_and_grad(forward, has_aux=True)(
      model, bn_state, BATCH, key
    )
    updates, opt_state = tx.update(grads, opt_state)
    return eqx.apply_updates(model, updates), bn_state, opt_state, value

  tx, run_key = optax.adam(RATE), KEYS[2]
  params, static = eqx.partition(model, eqx.is_inexact_array)
  own, stats, opt_state, expected = model, bn_state, tx.init(params), []
  for step in range(3):
    key = jax.random.fold_in(run_key, step)
    own, stats, opt_state, value = own_step(own, stats, opt_state, key)
    expected.append(value)
  estimator = optlab.value_and_grad(
    lambda params, *rest: forward(eqx.combine(params, static), *rest),
    has_state=True,
    has_key=True,
  )
  _, values = run(estimator, tx, params, bn_state, run_key, steps=3)
  np.testing.assert_array_equal(values, expected)


def noisy(params, model_state, batch, key):
  """All three: a mean of what was seen, a mask, the margin."""
  keep = jax.random.bernoulli(key, 0.5, batch.shape)
  margin = (batch * keep) @ params['w'] - 1.0
  seen = {'mean': 0.9 * model_state['mean'] + 0.1 * jnp.mean(batch)}
  return jnp.mean(margin**2), (seen, margin)


ROWS = jax.random.normal(KEYS[0], (16, 3))
START = {'w': jnp.ones(3)}, {'mean': jnp.zeros(())}, jax.random.key(5)


def noisy_estimator():
  return optlab.value_and_grad(
    noisy, has_aux=True, has_state=True, has_key=True
  )


def test_keys_differ_by_step_and_a_resumed_run_gives_the_same(tmp_path):
  estimator, tx = noisy_estimator(), optax.sgd(0.1)
  whole, values = run(estimator, tx, *START, batch=ROWS, steps=6)
  assert len({float(jnp.sum(margin)) for _, margin in values}) == 6
  half, _ = run(estimator, tx, *START, batch=ROWS, steps=3)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', half)
    checkpointer.wait_until_finished()
    like = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: half))
    restored = checkpointer.restore(tmp_path / 'state', like)
  step = jax.jit(optlab.train_step(estimator, tx), donate_argnums=0)
  for _ in range(3):
    restored, _ = step(restored, ROWS)
  for a, b in zip(
    jax.tree.leaves(restored), jax.tree.leaves(whole), strict=True
  ):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


def test_seeds_and_scan():
  estimator, tx = noisy_estimator(), optax.sgd(0.1)
  step = optlab.train_step(estimator, tx)

  def many(key):
    state = optlab.init(*START[:1], estimator, tx, START[1], key)
    return jax.lax.scan(lambda s, _: step(s, ROWS), state, length=4)

  keys = jax.random.split(jax.random.key(0), 3)
  states, (values, margins) = jax.jit(jax.vmap(many))(keys)
  assert values.shape == (3, 4)
  assert margins.shape == (3, 4, 16)
  one, _ = jax.jit(many)(keys[1])
  np.testing.assert_allclose(states.params['w'][1], one.params['w'], rtol=1e-6)
  report = optlab.report(one)
  assert float(report['estimator_state/model_state/mean']) == pytest.approx(
    float(jnp.mean(ROWS)) * (1 - 0.9**4), rel=1e-5
  )


def test_a_held_step_holds_the_model_state():
  estimator = optlab.estimators.estimate_if_finite(noisy_estimator())
  tx = optax.adam(0.1)
  state, _ = run(estimator, tx, *START, batch=ROWS, steps=2)
  held, (value, _) = optlab.train_step(estimator, tx)(state, ROWS * jnp.nan)
  assert jnp.isnan(value)
  old, new = state.estimator_state, held.estimator_state
  assert new.info.rejected
  assert new.estimator_state.model_state == old.estimator_state.model_state
  assert new.estimator_state.step == old.estimator_state.step


def test_line_searches_see_the_mask_of_the_step():
  """``value_fn`` is the loss whose gradient they get."""
  estimator = noisy_estimator()
  params, *inner = START
  state = estimator.init(params, *inner)
  estimate, _ = estimator.estimate(params, state, ROWS)
  value, grads = jax.value_and_grad(estimate.extras['value_fn'])(params)
  np.testing.assert_array_equal(value, estimate.value)
  np.testing.assert_array_equal(grads['w'], estimate.grads['w'])
  tx = optlab.gns_newton()
  _, values = run(estimator, tx, *START, batch=ROWS, steps=3)
  assert all(jnp.isfinite(value) for value, _ in values)


def test_with_storm_takes_them():
  estimator = optlab.with_storm(noisy_estimator(), 0.5)
  _, values = run(estimator, optax.sgd(0.05), *START, batch=ROWS)
  assert values[-1][1].shape == (16,)


def test_a_function_that_writes_into_its_arguments_changes_nothing_of_ours():
  def loss(params, model_state, batch):
    value = jnp.sum(params.pop('w') ** 2) + model_state.pop('mean')
    return value * batch.pop('scale'), {'mean': jnp.ones(())}

  estimator = optlab.value_and_grad(loss, has_state=True)
  params, inner, batch = {'w': jnp.ones(2)}, {'mean': jnp.zeros(())}, {
    'scale': jnp.ones(())}  # fmt: skip
  state = estimator.init(params, inner)
  estimate, new = estimator.estimate(params, state, batch)
  assert estimate.extras['value_fn'](params) == 2.0
  assert set(params) == {'w'}
  assert set(batch) == {'scale'}
  assert state.model_state == {'mean': 0.0}
  assert new.model_state == {'mean': 1.0}


def test_complex_parameters_descend():
  loss = lambda p, batch: jnp.sum(jnp.abs(p - batch) ** 2)
  estimator, target = optlab.value_and_grad(loss), jnp.array([1j, 2 - 1j])
  for tx in (optax.sgd(0.1), optax.adam(0.1), optlab.diffgrad(0.1)):
    state, values = run(
      estimator, tx, jnp.zeros(2, complex), batch=target, steps=200
    )
    assert values[-1] < 1e-2
    np.testing.assert_allclose(state.params, target, atol=0.05)


@pytest.mark.parametrize(
  'wrong, match',
  [
    ({'has_aux': True}, r'must return \(value, aux\), got'),
    ({'has_state': True}, r'must return \(value, model_state\), got'),
    (
      {'has_state': True, 'has_aux': True},
      r'must return \(value, \(model_state, aux\)\), got',
    ),
  ],
)
def test_a_declared_output_that_is_not_there(wrong, match):
  def loss(params, *rest):
    del rest
    return jnp.sum(params['w'])

  estimator = optlab.value_and_grad(loss, **wrong)
  inner = START[1:2] if 'has_state' in wrong else ()
  state = estimator.init(START[0], *inner)
  with pytest.raises(ValueError, match=match):
    estimator.estimate(START[0], state, ROWS)


def test_what_is_forgotten_is_named():
  estimator = noisy_estimator()
  with pytest.raises(ValueError, match='params, model_state, key, got 0'):
    optlab.init(START[0], estimator, optax.sgd(0.1))
  with pytest.raises(ValueError, match='init must get params, got 1'):
    optlab.init(
      START[0], optlab.value_and_grad(noisy), optax.sgd(0.1), START[1]
    )
  with pytest.raises(TypeError, match='key must be a PRNG key'):
    optlab.init(START[0], estimator, optax.sgd(0.1), START[1], 0)
  meco = optlab.meco(lambda p, rows: rows @ p)
  with pytest.raises(ValueError, match=r'initialized by \(params\), got 2'):
    optlab.init(START[0], meco, optax.sgd(0.1), START[1])
  plain = optlab.value_and_grad(lambda p, b: (jnp.sum(p), b))
  with pytest.raises(ValueError, match='tuple of 2: declare has_aux=True'):
    plain.estimate(jnp.ones(2), plain.init(jnp.ones(2)), ROWS)
  changing = optlab.value_and_grad(
    lambda p, s, b: (jnp.sum(p), jnp.ones(3)), has_state=True
  )
  state = changing.init(jnp.ones(2), jnp.ones(2))
  with pytest.raises(ValueError, match='model state that the loss returned'):
    changing.estimate(jnp.ones(2), state, ROWS)


@pytest.mark.parametrize(
  'leaf, match',
  [
    (np.ones(2, int), r"params\['a'\] must be floating, got dtype int64"),
    (jnp.tanh, r"params\['a'\] must be an array, got .*eqx|equinox.partition"),
    ('relu', r"params\['a'\] must be an array, got 'relu'"),
    (True, r"params\['a'\] must be floating, got dtype bool"),
  ],
)
def test_leaves_that_no_gradient_moves_are_named(leaf, match):
  estimator = optlab.value_and_grad(lambda p, batch: jnp.sum(p['b']))
  params = {'a': leaf, 'b': jnp.ones(2)}
  with pytest.raises(TypeError, match=match):
    estimator.estimate(params, (), None)


@pytest.mark.parametrize(
  'value, found',
  [
    (jnp.ones(3), r'shape \(3,\)'),
    (jnp.ones(1), r'shape \(1,\)'),
    (jnp.ones((), int), 'int32'),
    (jnp.ones((), complex), 'complex64'),
    (None, 'None'),
  ],
)
def test_a_loss_that_is_no_real_number_is_named(value, found):
  estimator = optlab.value_and_grad(lambda p, batch: value)
  with pytest.raises(TypeError, match=f'loss must return a .*scalar.*{found}'):
    estimator.estimate(jnp.ones(2), (), None)
  with pytest.raises(TypeError, match=f'fun must return a .*scalar.*{found}'):
    optlab.minimize(lambda p: value, jnp.ones(2), optax.sgd(0.1), max_steps=2)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_narrow_and_mixed_dtypes(dtype):
  loss = lambda p, batch: jnp.mean((batch @ p['w'] - p['b']) ** 2)
  params = {'w': jnp.ones(3, dtype), 'b': jnp.ones((), jnp.float32)}
  _, values = run(
    optlab.value_and_grad(loss), optax.sgd(0.05), params, batch=ROWS, steps=20
  )
  assert values[-1] < values[0]


@pytest.mark.parametrize('leaf', [jnp.tanh, jax.random.key(0)])
def test_what_is_no_parameter_is_named_where_a_state_is_made(leaf):
  """A function among the arrays, as of a model that was not taken apart."""
  plain = optlab.value_and_grad(lambda p, batch: jnp.sum(p['w'] * batch))
  params = {'w': jnp.ones(3), 'z': leaf}
  log_density = lambda p, rows: rows @ p['w']
  key, rows = jax.random.key(0), jnp.ones((4, 3))
  losses = lambda p, rows: jnp.square(rows @ p['w'])
  upper = lambda x, y, batch: jnp.sum(y**2)
  saba = optlab.saba(
    upper, upper, optax.sgd(0.1), 0.1, upper_blocks=2, lower_blocks=2
  )
  likelihoods = (
    optlab.meco(log_density).init,
    optlab.nce(log_density).init,
    lambda p: optlab.contrastive_divergence(log_density).init(p, key, rows),
    lambda p: optlab.unnormalized.denoising_score_matching(
      log_density, 0.1
    ).init(p, key),
  )
  for refused in (
    *likelihoods,
    plain.init,
    optlab.with_storm(plain, 0.1).init,
    lambda p: saba.init(p, jnp.ones(2)),
    lambda p: optlab.batches.ghost_sq_norms(losses, p, rows),
    lambda p: optlab.batches.check_losses(losses, p, rows),
    optlab.gns_newton().init,
  ):
    with pytest.raises(TypeError, match=r"params\['z'\] must be"):
      refused(params)
  # The likelihood's gradient is not conjugated: it would lead uphill.
  for refused in likelihoods:
    with pytest.raises(TypeError, match=r'params must be real'):
      refused(jnp.ones(3, jnp.complex64))
  stateful = optlab.value_and_grad(lambda p, s, batch: (0.0, s), has_state=True)
  with pytest.raises(TypeError, match=r"model_state\['f'\] must be an array"):
    stateful.init({'w': jnp.ones(3)}, {'f': jnp.tanh})
  bilevel = optlab.bilevel.with_models(
    lambda f, g: optlab.soba(f, g, optax.sgd(0.1), 0.1, has_aux=True),
    upper,
    upper,
    has_state=True,
  )
  with pytest.raises(
    TypeError, match=r"model_state\[1\]\['f'\] must be an arr"
  ):
    bilevel.init(jnp.ones(2), jnp.ones(2), ((), {'f': jnp.tanh}))
