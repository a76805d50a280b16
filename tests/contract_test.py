"""The contracts of the design, over every method: one row, all the tests.

A row says how to make the method from one hyperparameter that may be traced,
and what batch it eats. Its functions see the parameters through `flat`, so that
the same row runs on a tree with an empty subtree and on a single leaf.
"""

import functools
import inspect
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optlab
from tests.batches import rows as batches
from tests.bilevel import rows as bilevel
from tests.contract import rows
from tests.core import rows as core
from tests.first_order import rows as first_order
from tests.multi_block import rows as multi_block
from tests.newton import rows as newton
from tests.public import PUBLIC
from tests.unnormalized import rows as unnormalized

ROWS = [
  *core.ROWS,
  *newton.ROWS,
  *first_order.ROWS,
  *batches.ROWS,
  *bilevel.ROWS,
  *multi_block.ROWS,
  *unnormalized.ROWS,
]

# Rows of a method that another row has, with other arguments or another solver.
AGAIN = {
  'adadagrad_norm',
  'bsvrb_v1',
  'cg',
  'fcco_log',
  'fcco_mirror',
  'grow_batch_means',
  'layerwise',
  'meco_ratio_corrected',
  'mrbo',
  'multishift_cg',
  'normalized_descent',
  'rsvrb',
  'srba',
}


def over(rows, slow=lambda row: row.name in AGAIN):
  # One worker runs all tests of a row, so that it compiles the step once.
  params = [
    pytest.param(
      row,
      id=row.name,
      marks=[
        pytest.mark.xdist_group(row.name),
        *([pytest.mark.slow] if slow(row) else []),
      ],
    )
    for row in rows
  ]
  return pytest.mark.parametrize('row', params)


over_rows = over(ROWS)
over_transformations = over([row for row in ROWS if row.is_transformation])


def tree_params(dtype=jnp.float32):
  return {
    'w': jnp.linspace(-1.0, 1.0, 6, dtype=dtype).reshape(3, 2),
    'b': jnp.full((2,), 0.5, dtype),
    'empty': {},
  }


def leaf_params(dtype=jnp.float32):
  return jnp.linspace(-1.0, 1.0, 8, dtype=dtype)


def setup(row, params, dtype=jnp.float32, hyper=None, seed=0):
  estimator, tx = row.make(row.hyper if hyper is None else hyper)
  state = optlab.init(params, estimator, tx, *row.inner(dtype))
  batch = row.batch(jax.random.key(seed), dtype)
  return optlab.train_step(estimator, tx), state, batch


def batches(row, count, dtype=jnp.float32):
  keys = [jax.random.key(seed) for seed in range(count)]
  return [row.batch(key, dtype) for key in keys]


def types(tree):
  """Shapes, dtypes and weak types by path."""
  return jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype, getattr(leaf, 'weak_type', False)),
    tree,
  )


def numbers(tree):
  """Keys as the numbers that they are, for comparisons."""
  return jax.tree.map(
    lambda leaf: (
      np.asarray(jax.random.key_data(leaf))
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      else np.asarray(leaf)
    ),
    tree,
  )


def on_no_device(leaf):
  """An array, or a key, that any program may take."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(np.asarray(jax.random.key_data(leaf)))
  return np.asarray(leaf)


def assert_close(actual, expected, rtol=2e-5, atol=2e-6):
  chex.assert_trees_all_close(
    numbers(actual), numbers(expected), rtol=rtol, atol=atol
  )


def assert_equal(actual, expected):
  chex.assert_trees_all_equal(numbers(actual), numbers(expected))


def abstract_step(row, params, dtype=jnp.float32):
  """Types of the state, and of what a step makes of it; nothing is compiled."""

  def run(params):
    step, state, batch = setup(row, params, dtype)
    return state, step(state, batch)

  return jax.eval_shape(run, params)


@over_rows
@pytest.mark.parametrize('make_params', [tree_params, leaf_params])
def test_state_in_equals_state_out(row, make_params):
  for dtype in (jnp.float32, jnp.bfloat16):
    state, (out, value) = abstract_step(row, make_params(dtype))
    assert jax.tree.structure(out) == jax.tree.structure(state)
    assert types(out) == types(state)
    assert value.shape == ()


@over_rows
def test_float64_is_kept_and_float32_not_promoted(row):
  with jax.enable_x64(True):
    for dtype in (jnp.float32, jnp.float64):
      state, (out, value) = abstract_step(row, tree_params(dtype), dtype)
      assert types(out) == types(state)
      assert value.dtype == dtype
      for leaf in jax.tree.leaves(out.params):
        assert leaf.dtype == dtype


STEPS = 12


@functools.cache
def compiled(name):
  """The jitted step of a row, which donates the state it is given."""
  row = next(row for row in ROWS if row.name == name)
  return jax.jit(setup(row, tree_params())[0], donate_argnums=0)


def stack(data):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *data)


@over_rows
def test_jit_scan_vmap_and_donation_agree_and_the_loss_falls(row):
  """Lanes of seeds and hyperparameters in a scan; steps that donate."""
  hypers = np.asarray([row.hyper, 0.5 * row.hyper], np.float32)
  scales = np.asarray([1.0, 0.5], np.float32)
  _, state, batch = setup(row, tree_params())
  data = [*batches(row, 2), *[batch] * (STEPS - 2)]

  def run(hyper, scale):
    estimator, tx = row.make(hyper)
    params = jax.tree.map(lambda leaf: scale * leaf, tree_params())
    start = optlab.init(params, estimator, tx, *row.inner(jnp.float32))
    step = optlab.train_step(estimator, tx)

    def advance(state, batch):
      state, value = step(state, batch)
      return state, (state, value)

    return jax.lax.scan(advance, start, stack(data))[1]

  together = jax.jit(jax.vmap(run))
  lanes, values = numbers(together(hypers, scales))
  swapped, _ = numbers(together(hypers[::-1], scales[::-1]))
  turned = jax.tree.map(lambda leaf: leaf[::-1], swapped.params)
  assert_close(turned, lanes.params)
  jitted = compiled(row.name)
  for k, batch in enumerate(data):
    state, _ = jitted(state, batch)  # Donated: the same state, in place.
    lane = jax.tree.map(lambda leaf, k=k: leaf[0, k], lanes)
    assert_close(lane.params, state.params, 1e-4, 1e-5)
    if k < 3:  # Later, what a search keeps may be the rounding of its loss.
      assert_close(lane, state, 1e-4, 1e-5)
  assert jitted._cache_size() == 1, 'recompiled on the second call'
  assert np.all(np.isfinite(values[0]))
  assert values[0][-1] < values[0][2]


@over_rows
def test_resumes_bit_for_bit_from_orbax(row, tmp_path):
  jitted = compiled(row.name)
  _, state, _ = setup(row, tree_params())
  data = batches(row, 4)
  for batch in data[:2]:
    state, _ = jitted(state, batch)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    _, fresh, _ = setup(row, tree_params())
    restored = checkpointer.restore(tmp_path / 'state', fresh)
  # A device that is given by name would be another program of the same step.
  restored = jax.tree.map(on_no_device, restored)
  for batch in data[2:]:
    state, _ = jitted(state, batch)
    restored, _ = jitted(restored, batch)
  assert_equal(restored, state)


@over_transformations
def test_composes_with_chain_and_wrappers(row):
  estimator, tx = row.make(row.hyper)
  mask = {'w': True, 'b': row.whole, 'empty': {}}
  labels = {'w': 'ours', 'b': 'ours' if row.whole else 'other', 'empty': {}}
  multi_steps = optax.MultiSteps(optax.masked(tx, mask), 2)
  wrapped = {
    'chain in apply_if_finite': optax.apply_if_finite(
      optax.chain(optax.clip_by_global_norm(1e3), tx), 3
    ),
    'partition': optax.partition(
      {'ours': tx, 'other': optax.set_to_zero()}, labels
    ),
    # Its gradient_transformation() would drop the extra arguments.
    'masked in MultiSteps': optax.GradientTransformationExtraArgs(
      multi_steps.init, multi_steps.update
    ),
  }
  for name, wrapper in wrapped.items():
    state = optlab.init(tree_params(), estimator, wrapper)
    step = jax.jit(optlab.train_step(estimator, wrapper))
    for batch in batches(row, 2):
      state, value = step(state, batch)
    assert np.isfinite(value), name
    for leaf in jax.tree.leaves(state.params):
      assert np.all(np.isfinite(leaf)), name
    moved = not np.array_equal(state.params['w'], tree_params()['w'])
    assert moved, name


@over_transformations
def test_inject_hyperparams_gives_the_same_numbers(row):
  estimator, tx = row.make(row.hyper)
  factory = optax.inject_hyperparams(lambda hyper: row.make(hyper)[1])
  injected = factory(hyper=row.hyper)
  plain_state = optlab.init(tree_params(), estimator, tx)
  state = optlab.init(tree_params(), estimator, injected)
  step = jax.jit(optlab.train_step(estimator, injected))
  for batch in batches(row, 2):
    plain_state, _ = compiled(row.name)(plain_state, batch)
    state, _ = step(state, batch)
  assert_close(state.params, plain_state.params)


@over_transformations
def test_map_params_and_unknown_extras(row):
  estimator, tx = row.make(row.hyper)
  params = tree_params()
  state = tx.init(params)
  mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
  assert jax.tree.structure(mapped) == jax.tree.structure(state)

  def update(params, **unknown):
    estimate, _ = estimator.estimate(
      params, estimator.init(params), rows(jax.random.key(0))
    )
    return tx.update(
      estimate.grads, state, params,
      value=estimate.value, grad=estimate.grads, **estimate.extras, **unknown,
    )  # fmt: skip

  expected = jax.make_jaxpr(update)(params)
  actual = jax.make_jaxpr(functools.partial(update, unknown_extra=1))(params)
  assert str(actual) == str(expected)


# Tested inside what they are a link of.
PARTS = {
  'scale_by_adagrad_norm': 'adagrad_norm',
  'scale_by_diffgrad': 'diffgrad',
  'scale_by_normalized_momentum': 'normalized_momentum',
  'stateless': 'value_and_grad',
}


def test_every_public_method_has_a_row():
  kinds = (
    optax.GradientTransformation,
    optax.GradientTransformationExtraArgs,
    optlab.GradientEstimator,
  )
  tables = pathlib.Path(__file__).parent.glob('*/rows.py')
  table = '\n'.join(path.read_text() for path in tables)
  found = 0
  for name, public in PUBLIC.items():
    if (
      inspect.isfunction(public)
      and inspect.signature(public).return_annotation in kinds
    ):
      found += 1
      pattern = rf"(optlab\.(\w+\.)?|'){PARTS.get(name, name)}\b"
      assert re.search(pattern, table), f'{name} has no row in ROWS'
  assert found >= 30
