"""Bilevel estimators of levels with model state, keys and auxiliary output."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab.bilevel import with_models

SGD = optax.sgd(0.05)
ROWS = jax.random.normal(jax.random.key(0), (16, 4))
X, Y, KEY = jnp.full(4, 0.5), jnp.full(4, 0.25), jax.random.key(5)
STEPS = 2
MAKERS = {
  'soba': lambda f, g: optlab.soba(f, g, SGD, 0.05, has_aux=True),
  'bo_rep': lambda f, g: optlab.bo_rep(
    f, g, SGD, 0.05, lower_steps=STEPS, period=1, has_aux=True
  ),
  'stocbio': lambda f, g: optlab.stocbio(
    f, g, SGD, 0.05, lower_steps=STEPS, has_aux=True
  ),
  'implicit': lambda f, g: optlab.implicit(
    f, g, SGD, lower_steps=STEPS, has_aux=True
  ),
  'unrolled': lambda f, g: optlab.unrolled(
    f, g, SGD, lower_steps=STEPS, has_aux=True
  ),
}


def mask_of(key):
  return jax.random.bernoulli(key, 0.7, ROWS.shape)


def upper(x, y, model_state, batch, key):
  value = jnp.mean((batch * mask_of(key)) @ y - 1.0) ** 2 + jnp.sum(x**2) / 9
  return value, (model_state[0] + 1.0, {'lower_saw': model_state[1]})


def lower(x, y, model_state, batch, key):
  fit = (batch * mask_of(key)) @ (y - x)
  return jnp.mean(fit**2) + 0.1 * jnp.sum(y**2), (
    model_state[1] + jnp.sum(batch[:, 0]),
    jnp.max(fit),
  )


def batch_of(rows=ROWS):
  return optlab.BilevelBatch(rows, rows, jnp.stack([rows] * STEPS))


def make(name):
  return with_models(
    MAKERS[name], upper, lower, has_aux=True, has_state=True, has_key=True
  )


def start(estimator):
  return estimator.init(X, Y, (jnp.zeros(()), jnp.zeros(())), KEY)


@pytest.mark.parametrize(
  'name',
  [
    name
    if name in ('soba', 'implicit')
    else pytest.param(name, marks=pytest.mark.slow)
    for name in MAKERS
  ],
)
def test_the_numbers_are_those_of_masks_that_lie_in_the_batch(name):
  explicit = MAKERS[name](
    lambda x, y, pair: (
      jnp.mean((pair[0] * pair[1]) @ y - 1.0) ** 2 + jnp.sum(x**2) / 9, ()),
    lambda x, y, pair: (
      jnp.mean(((pair[0] * pair[1]) @ (y - x)) ** 2) + 0.1 * jnp.sum(y**2), ()),
  )  # fmt: skip
  estimator = make(name)
  state, plain = start(estimator), explicit.init(X, Y)
  estimate, explicit_estimate = map(
    jax.jit, (estimator.estimate, explicit.estimate)
  )
  x = X
  for step in range(3):
    key = jax.random.fold_in(KEY, step)
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    steps = jax.vmap(mask_of)(jax.random.split(keys[2], STEPS))
    batch = optlab.BilevelBatch(
      (ROWS, mask_of(keys[0])),
      (ROWS, mask_of(keys[1])),
      (jnp.stack([ROWS] * STEPS), steps),
    )
    expected, plain = explicit_estimate(x, plain, batch)
    result, state = estimate(x, state, batch_of())
    np.testing.assert_allclose(result.value, expected.value, rtol=1e-5)
    np.testing.assert_allclose(
      result.grads, expected.grads, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      state.estimator_state.inner, plain.inner, rtol=1e-5
    )
    assert state.loss.model_state[0] == step + 1
    np.testing.assert_allclose(
      result.aux.upper['lower_saw'], step * jnp.sum(ROWS[:, 0]), rtol=1e-4,
      atol=1e-5,
    )  # fmt: skip
    x = x - 0.1 * result.grads


def test_a_rejected_step_holds_model_state_and_key():
  estimator = make('soba')
  _, state = estimator.estimate(X, start(estimator), batch_of())
  result, held = estimator.estimate(X, state, batch_of(ROWS * jnp.nan))
  assert not jnp.any(result.grads)
  assert held.loss.model_state == state.loss.model_state
  assert held.loss.step == state.loss.step
  assert held.estimator_state.info.rejected


def test_a_network_below_with_batch_normalization():
  """The upper level takes the statistics of data that the lower one keeps."""

  class Network(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
      self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
      return self.last(self.norm(x))[:, 0]

  graph, params, stats = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)
  rows = 3.0 + ROWS

  def evaluate(x, y, model_state, batch):
    model = nnx.merge(graph, y, model_state[1])
    model.eval()
    return jnp.mean((model(batch) - 1.0) ** 2) + 0.01 * x**2, ()

  def train(x, y, model_state, batch):
    model = nnx.merge(graph, y, model_state[1])
    value = jnp.mean((model(batch) - 1.0) ** 2)
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
    stats = nnx.split(model, nnx.Param, ...)[2]
    return value + jnp.exp(x) * penalty, stats

  estimator = with_models(MAKERS['soba'], evaluate, train, has_state=True)
  tx = optax.sgd(0.1)
  state = optlab.init(jnp.zeros(()), estimator, tx, params, ((), stats))
  step = jax.jit(optlab.train_step(estimator, tx))
  values = []
  for _ in range(60):
    state, value = step(state, optlab.BilevelBatch(rows, rows))
    values.append(float(value))
  kept = state.estimator_state.loss.model_state[1]
  np.testing.assert_allclose(kept['norm']['mean'][...], rows.mean(0), rtol=1e-4)
  assert values[-1] < 0.5 * values[0]


def test_model_state_that_x_or_y_moves_is_refused_where_a_level_feels_it():
  """Statistics of hidden units: how x moves them would be left out."""
  still = jax.lax.stop_gradient
  plain = lambda x, y, s, rows: (jnp.sum(y**2) + jnp.sum(x), s[0])
  keep = lambda x, y, s, rows: (jnp.sum((y - x) ** 2), {
    'mean': 0.9 * s[1]['mean'] + 0.1 * still(jnp.mean(rows @ y)),
    'after': s[1]['mean'] + 1.0, 'rows': jnp.mean(rows), 'n': s[1]['n'] + 1,
  })  # fmt: skip
  stats = {'mean': 0.0, 'after': 0.0, 'rows': 0.0, 'n': 0}
  stats = jax.tree.map(jnp.asarray, stats)

  def reads(level, leaf, hold=lambda leaf: leaf, part=1):
    @jax.custom_vjp
    def square(number):
      return number**2

    square.defvjp(lambda n: (n**2, n), lambda n, g: (2 * n * g,))

    def feel(x, y, s, rows):
      value, new = level(x, y, s, rows)
      return value + square(jnp.sum(y) - hold(s[part][leaf])), new

    return feel

  def look(upper, lower, stats=((), stats), name='soba'):
    estimator = with_models(MAKERS[name], upper, lower, has_state=True)
    step = lambda: estimator.estimate(
      X, estimator.init(X, Y, stats), batch_of()
    )
    jax.eval_shape(step)

  def refused(levels, leaf, **rest):
    with pytest.raises(
      ValueError, match=rf'must not depend on .*{leaf}: how x'
    ):
      look(*levels, **rest)

  for leaf in ('mean', 'after'):
    for name in MAKERS:
      refused(
        (reads(plain, leaf), keep), rf"model_state\[1\]\['{leaf}'\]", name=name
      )
  refused((plain, reads(keep, 'mean')), r"\[1\]\['mean'\]")
  own = lambda x, y, s, rows: (plain(x, y, s, rows)[0] + s[0], jnp.sum(x))
  refused((own, keep), r'\[0\]', stats=(jnp.zeros(()), stats))
  look(reads(plain, 'mean', still), reads(keep, 'mean', still))
  look(reads(plain, 'rows'), reads(keep, 'rows'))
  look(reads(plain, 'n'), reads(keep, 'n'))


def test_statistics_of_the_batch_above_give_the_slope_of_the_whole(x64):
  """Running ones would be held fixed, though y moves them."""
  keys = jax.random.split(jax.random.key(0), 3)
  low, high = jax.random.normal(keys[0], (2, 20, 3)) + 0.5
  target = lambda rows: jnp.sin(rows @ jnp.array([1.0, -1.0, 0.5]))

  def network(y, rows):
    hidden = rows @ y['w']
    mean, var = hidden.mean(0), hidden.var(0)
    scaled = jnp.tanh((hidden - mean) / jnp.sqrt(var + 0.1))
    return jnp.mean((scaled @ y['o'] - target(rows)) ** 2), (mean, var)

  upper = lambda x, y, model_state, rows: (network(y, rows)[0], ())

  def lower(x, y, model_state, rows):
    value, stats = network(y, rows)
    leaves = jax.tree.leaves(y)
    return value + jnp.exp(x) * sum(jnp.sum(leaf**2) for leaf in leaves), stats

  def solve(x):
    slope = jax.grad(lambda y: lower(x, y, None, low)[0])
    move = lambda _, y: jax.tree.map(lambda a, g: a - 0.3 * g, y, slope(y))
    y = {
      'w': jax.random.normal(keys[1], (3, 2)),
      'o': jax.random.normal(keys[2], (2,)),
    }
    return jax.lax.fori_loop(0, 3000, move, y)

  make = lambda f, g: optlab.implicit(
    f, g, optax.sgd(0.3), has_aux=True, reuse_sample=True
  )
  estimator = with_models(make, upper, lower, has_state=True)

  @jax.jit
  def look(x):
    y = solve(x)
    state = estimator.init(x, y, ((), network(y, low)[1]))
    result, state = estimator.estimate(x, state, optlab.BilevelBatch(high, low))
    return result.value, result.grads, state.estimator_state.info.ok

  values = [float(look(jnp.array(x))[0]) for x in (-3.0 + 1e-4, -3.0 - 1e-4)]
  _, grads, ok = look(jnp.array(-3.0))
  np.testing.assert_allclose(grads, np.subtract(*values) / 2e-4, rtol=1e-4)
  assert ok


def test_seeds_scan_and_donation():
  estimator, tx = make('bo_rep'), optax.sgd(0.1)
  step = optlab.train_step(estimator, tx)

  def run(key):
    zeros = jnp.zeros(()), jnp.zeros(())
    state = optlab.init(X, estimator, tx, Y, zeros, key)
    return jax.lax.scan(lambda s, _: step(s, batch_of()), state, length=3)

  states, _ = jax.jit(jax.vmap(run))(jax.random.split(KEY, 2))
  assert not jnp.allclose(states.params[0], states.params[1])
  zeros = jnp.zeros(()), jnp.zeros(())
  one = optlab.init(jnp.array(X), estimator, tx, Y, zeros, KEY)
  jitted = jax.jit(step, donate_argnums=0)
  for _ in range(2):
    one, _ = jitted(one, batch_of())
  assert jitted._cache_size() == 1


def test_what_is_forgotten_is_named():
  estimator = make('soba')
  with pytest.raises(ValueError, match='params, inner, model_state, key, got'):
    estimator.init(X, Y)
  with pytest.raises(TypeError, match='key must be a PRNG key'):
    estimator.init(X, Y, ((), ()), 0)
  wrong = with_models(
    MAKERS['soba'],
    lambda x, y, s, b: (jnp.sum(y), jnp.ones(3)),
    lambda x, y, s, b: (jnp.sum(y**2), s[1]),
    has_state=True,
  )
  state = wrong.init(X, Y, (jnp.ones(2), ()))
  with pytest.raises(ValueError, match='model state that the loss returned'):
    wrong.estimate(X, state, batch_of())
  saba = with_models(
    lambda f, g: optlab.saba(
      f, g, SGD, 0.05, upper_blocks=2, lower_blocks=2, has_aux=True
    ),
    upper,
    lower,
    has_aux=True,
    has_state=True,
    has_key=True,
  )
  with pytest.raises((TypeError, ValueError), match='take soba'):
    block = optlab.bilevel.IndexedBatch(jnp.int32(0), ROWS)
    saba.estimate(X, start(saba), optlab.BilevelBatch(block, block))
