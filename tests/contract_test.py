"""The contracts of the design, over every method: one row, all the tests.

A row says how to make the method from one hyperparameter that may be traced,
and what batch it eats. Its functions see the parameters through `flat`, so that
the same row runs on a tree with an empty subtree and on a single leaf.
"""

from collections.abc import Callable
import functools
import inspect
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optlab
from tests.public import PUBLIC


def flat(params):
  """All numbers of a tree in one vector."""
  return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])


def loss(params, batch):
  """Least squares on rows of eight; strongly convex in expectation."""
  x = flat(params)
  residual = batch.astype(x.dtype) @ x - 1.0
  return 0.5 * jnp.mean(residual**2) + 0.05 * jnp.sum(x**2)


def rows(key, dtype=jnp.float32):
  return jax.random.normal(key, (16, 8), dtype)


class Row(NamedTuple):
  """One method.

  Attributes:
    name: Shown by pytest.
    make: ``hyper -> (estimator, tx)``; ``hyper`` may be a tracer.
    hyper: A value of the hyperparameter that works on the toy problem.
    is_transformation: Whether the method is the transformation ``tx`` (then
      the wrappers of optax are tried on it) or the estimator.
    batch: ``(key, dtype) -> batch`` with a leading axis of even length.
    inner: ``dtype -> tuple`` of inner variables for ``estimator.init``.
    shard: Whether each leaf of the batch may be sharded on its first axis, or
      ``batch -> tree of partition specs``.
    whole: Whether it evaluates ``value_fn``, which takes all parameters, so
      that a mask or partition must leave it all of them.
  """

  name: str
  make: Callable[[Any], tuple[Any, Any]]
  hyper: float
  is_transformation: bool = False
  batch: Callable[..., Any] = rows
  inner: Callable[[Any], tuple[Any, ...]] = lambda dtype: ()
  shard: bool | Callable[[Any], Any] = True
  whole: bool = False


def plain(tx_factory):
  """A row's `make` for a transformation that needs nothing but a gradient."""
  return lambda hyper: (optlab.value_and_grad(loss), tx_factory(hyper))


def bilevel_upper(x, y, batch):
  """Mild in both levels; ``y*`` is linear in x."""
  return loss(x, batch) + 0.1 * jnp.mean(jnp.cosh(y))


def bilevel_lower(x, y, batch):
  """Strongly convex in y: least squares to a linear function of x."""
  batch = batch.astype(y.dtype)
  fit = batch[..., :4] @ y - batch @ flat(x).astype(y.dtype)
  return 0.5 * jnp.mean(fit**2) + 0.1 * jnp.sum(y**2)


def bilevel_batch(steps):
  """Two lower samples and ``steps`` inner ones, of sixteen rows each."""

  def batch(key, dtype=jnp.float32):
    data = rows(key, dtype)
    inner = jnp.stack([data] * steps)
    return optlab.BilevelBatch(upper=data, lower=data, inner=inner)

  return batch


def bilevel_shard(batch):
  """Samples are spread; steps and block numbers are not."""
  spread = lambda leaf: jax.P('data') if leaf.ndim else jax.P()
  return optlab.BilevelBatch(
    upper=jax.tree.map(spread, batch.upper),
    lower=jax.tree.map(spread, batch.lower),
    inner=jax.tree.map(lambda leaf: jax.P(None, 'data'), batch.inner),
  )


def bilevel_row(name, make, *, steps=2, key=False, **fields):
  """A row for a hypergradient estimator, with plain gradient descent above."""

  def inner(dtype):
    start = jnp.full((4,), 0.25, dtype)
    return (start, jax.random.key(7)) if key else (start,)

  return Row(
    name,
    lambda hyper: (make(hyper), optax.sgd(0.1)),
    0.1,
    batch=fields.pop('batch', bilevel_batch(steps)),
    inner=inner,
    shard=bilevel_shard,
    **fields,
  )


def indexed_batch(key, dtype=jnp.float32):
  """One block of two, by the first draw's sign."""
  data = rows(key, dtype)
  block = optlab.bilevel.IndexedBatch((data[0, 0] > 0).astype(jnp.int32), data)
  return optlab.BilevelBatch(upper=block, lower=block)


LEVELS = (bilevel_upper, bilevel_lower)


def losses(params, batch):
  """One loss an example, without the penalty, that ghost norms refuse."""
  x = flat(params)
  return 0.5 * (batch.astype(x.dtype) @ x - 1.0) ** 2


def growing(moments, tx_factory, **kwargs):
  """A row's `make` for a growth rule in front of an optimizer."""
  estimator = optlab.per_example(losses, moments, **kwargs)
  return lambda hyper: (estimator, tx_factory(hyper))


GROWTH_ROWS = [
  Row('diffgrad', plain(optlab.diffgrad), 0.1, True),
  Row('diffgrad_coupled', plain(lambda hyper: optlab.diffgrad(
    hyper, weight_decay=1e-3, decoupled=False, eps_uncorrected=True,
    mu_dtype=jnp.bfloat16,
  )), 0.1, True),
  Row('adagrad_norm', plain(optlab.adagrad_norm), 1.0, True),
  Row('adadagrad', growing(
    optlab.ghost_norms,
    lambda hyper: optlab.adadagrad(0.3, optlab.norm_test(hyper), 8, 100),
  ), 0.5, True),
  Row('adadagrad_norm', growing(
    optlab.ghost_norms,
    lambda hyper: optlab.adadagrad_norm(
      1.0, optlab.augmented_inner_product_test(hyper, hyper), 8, 100
    ),
    inner_products=optlab.batches.jvp_inner_products,
  ), 0.5, True),
  Row('grow_batch_coordinate', growing(
    optlab.batches.vmap_grads,
    lambda hyper: optax.chain(
      optlab.grow_batch(optlab.batches.coordinate_norm_test(hyper), 8, 100),
      optax.sgd(0.1),
    ),
    microbatch_size=6,
  ), 0.5, True),
  Row('grow_batch_means', growing(
    optlab.batches.microbatch_means,
    lambda hyper: optax.chain(
      optlab.grow_batch(optlab.inner_product_test(hyper), 8, 100),
      optax.sgd(0.1),
    ),
    inner_products=optlab.batches.vmap_inner_products,
    microbatch_size=4,
  ), 0.5, True),
]  # fmt: skip


def block_lower(params, y, batch):
  residual = y - flat(params)
  return 0.5 * jnp.sum(residual**2) + 0.0 * jnp.sum(batch.astype(y.dtype) * y)


def block_upper(params, y, batch):
  residual = batch.astype(y.dtype) @ y - 1.0
  return 0.5 * jnp.mean(residual**2) + 0.05 * jnp.sum(y**2)


def block_batch(key, dtype=jnp.float32, paired=False):
  """Three blocks of four, and padding."""
  blocks = jnp.append(jax.random.permutation(key, 4)[:3], 4)
  data = jax.random.normal(key, (4, 16, 8), dtype), jnp.ones((4, 8), dtype)
  if paired:
    return optlab.multi_block.PairedBlockBatch(blocks, *data, blocks)
  return optlab.BlockBatch(blocks, *data)


def block_row(name, estimator, **kwargs):
  """A row for a multi-block estimator, made from ``hyper -> estimator``."""
  return Row(
    name,
    lambda rate: (estimator(rate), optax.sgd(0.1)),
    0.5,
    batch=functools.partial(block_batch, **kwargs),
    inner=lambda dtype: (jnp.full((4, 8), 2.0, dtype),),
    shard=False,  # Tables are sharded; see bsvrb_test.
  )


BLOCK_LEVELS = block_upper, block_lower, 4


def energy(params, x):
  """A Gaussian around the parameters, up to its normalizer."""
  mean = flat(params)
  return x.astype(mean.dtype) @ mean - 0.5 * jnp.sum(x**2, -1).astype(
    mean.dtype
  )


def noise_batch(key, dtype=jnp.float32):
  """Data around 0.5, noise around the origin; both of eight columns."""
  data_key, noise_key = jax.random.split(key)
  data = 0.5 + jax.random.normal(data_key, (16, 8), dtype)
  noise = 1.5 * jax.random.normal(noise_key, (16, 8), dtype)

  def log_prob(x):
    white = x.astype(jnp.promote_types(dtype, jnp.float32)) / 1.5
    return -0.5 * jnp.sum(white**2, -1) - 8 * jnp.log(1.5 * (2 * jnp.pi) ** 0.5)

  return optlab.NoiseBatch(data, noise, log_prob(noise), log_prob(data))


def likelihood_row(name, make, hyper, **fields):
  """A row for an estimator over `NoiseBatch`, with SGD behind it."""
  return Row(
    name,
    lambda hyper: (make(hyper), optax.sgd(0.05)),
    hyper,
    batch=noise_batch,
    **fields,
  )


ROWS = [
  *GROWTH_ROWS,
  Row(
    'gns_newton',
    plain(lambda gamma: optlab.gns_newton(gamma_init=gamma)),
    1.0,
    is_transformation=True,
    whole=True,
  ),
  Row(
    'with_curvature',
    lambda gamma: (
      optlab.with_curvature(
        optlab.value_and_grad(loss), optlab.dense(optlab.hessian(loss))
      ),
      optlab.newton.gns_newton_paper(gamma_init=gamma),
    ),
    1.0,
    is_transformation=True,
    whole=True,
  ),
  Row('value_and_grad', plain(optax.sgd), 0.1),
  Row(
    'normalized_momentum',
    plain(optlab.normalized_momentum),
    0.1,
    is_transformation=True,
  ),
  bilevel_row(
    'bo_rep',
    lambda rate: optlab.bo_rep(
      *LEVELS, optax.sgd(rate), rate, lower_steps=2, radius=1.0, z_radius=9.0
    ),
  ),
  bilevel_row('soba', lambda rate: optlab.soba(*LEVELS, optax.sgd(rate), rate)),
  bilevel_row(
    'saba',
    lambda rate: optlab.saba(
      *LEVELS, optax.sgd(rate), rate, upper_blocks=2, lower_blocks=2
    ),
    batch=indexed_batch,
  ),
  bilevel_row(
    'stocbio',
    lambda rate: optlab.stocbio(*LEVELS, optax.adam(rate), rate, lower_steps=2),
  ),
  bilevel_row(
    'ttsa',
    lambda rate: optlab.bilevel.ttsa(*LEVELS, optax.sgd(rate), rate),
    steps=1,
    key=True,
  ),
  bilevel_row(
    'implicit',
    lambda rate: optlab.implicit(*LEVELS, optax.sgd(rate), lower_steps=2),
  ),
  bilevel_row(
    'unrolled',
    lambda rate: optlab.unrolled(*LEVELS, optax.sgd(rate), lower_steps=2),
  ),
  bilevel_row(
    'with_storm',
    lambda beta: optlab.with_storm(
      optlab.soba(*LEVELS, optax.sgd(0.1), 0.1), beta
    ),
  ),
  block_row('bsvrb', lambda rate: optlab.bsvrb(*BLOCK_LEVELS, step_size=rate)),
  block_row(
    'bsvrb_v1',
    lambda rate: optlab.bsvrb(
      *BLOCK_LEVELS, step_size=rate, dual=optlab.multi_block.track_hessians()
    ),
  ),
  block_row(
    'rsvrb',
    lambda rate: optlab.multi_block.rsvrb(
      *BLOCK_LEVELS, step_size=rate, beta=0.5, floor=0.5
    ),
    paired=True,
  ),
  likelihood_row('meco', lambda gamma: optlab.meco(energy, gamma), 0.5),
  likelihood_row(
    'meco_ratio_corrected',
    lambda gamma: optlab.meco(energy, gamma, ratio_correction=True),
    0.5,
  ),
  likelihood_row('nce', lambda nu: optlab.nce(energy, nu), 1.0),
  likelihood_row(
    'ence', lambda clip: optlab.unnormalized.ence(energy, clip), 5.0
  ),
  likelihood_row(
    'contrastive_divergence',
    lambda rate: optlab.contrastive_divergence(energy, rate, 3),
    0.1,
    inner=lambda dtype: (jax.random.key(7), jnp.zeros((16, 8), dtype)),
  ),
  Row(
    'normalized_descent',
    plain(lambda rate: optlab.normalized_momentum(rate, beta=0.0)),
    0.05,
    is_transformation=True,
  ),
]


def over(rows):
  # One worker runs all tests of a row, so that it compiles the step once.
  marks = lambda row: pytest.mark.xdist_group(row.name)
  params = [pytest.param(row, id=row.name, marks=marks(row)) for row in rows]
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


def assert_close(actual, expected, rtol=2e-5, atol=2e-6):
  actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
  assert len(actual) == len(expected)
  for a, b in zip(actual, expected, strict=True):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def assert_equal(actual, expected):
  assert_close(actual, expected, rtol=0.0, atol=0.0)


@over_rows
@pytest.mark.parametrize('make_params', [tree_params, leaf_params])
def test_state_in_equals_state_out(row, make_params):
  for dtype in (jnp.float32, jnp.bfloat16):
    step, state, batch = setup(row, make_params(dtype))
    out, value = jax.eval_shape(step, state, batch)
    abstract = jax.eval_shape(lambda state: state, state)
    assert jax.tree.structure(out) == jax.tree.structure(state)
    assert types(out) == types(abstract)
    assert value.shape == ()


@over_rows
def test_float64_is_kept_and_float32_not_promoted(row):
  with jax.enable_x64(True):
    for dtype in (jnp.float32, jnp.float64):
      step, state, batch = setup(row, tree_params(dtype), dtype)
      out, value = jax.eval_shape(step, state, batch)
      assert types(out) == types(jax.eval_shape(lambda state: state, state))
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
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)


@over_rows
def test_jit_scan_and_donation_agree_and_the_loss_falls(row):
  step, state, batch = setup(row, tree_params())
  data = [*batches(row, 2), *[batch] * (STEPS - 2)]
  jitted = compiled(row.name)
  scanned, values = jax.jit(
    lambda state: jax.lax.scan(step, state, stack(data))
  )(state)
  for batch in data:
    state, _ = jitted(state, batch)  # Donated: the same state, in place.
  assert jitted._cache_size() == 1, 'recompiled on the second call'
  assert_close(scanned, state, 1e-4, 1e-5)
  assert np.all(np.isfinite(values))
  assert values[-1] < values[2]


@over_rows
def test_vmap_over_seeds_and_hyperparameters(row):
  hypers = jnp.asarray([row.hyper, 0.5 * row.hyper])
  scales = jnp.asarray([1.0, 0.5])

  def run(hyper, scale):
    params = jax.tree.map(lambda leaf: scale * leaf, tree_params())
    step, state, batch = setup(row, params, hyper=hyper)
    step_ = lambda state, _: step(state, batch)
    return jax.lax.scan(step_, state, length=2)[0].params

  together = jax.jit(jax.vmap(run))
  lanes = together(hypers, scales)
  swapped = together(hypers[::-1], scales[::-1])
  assert_close(jax.tree.map(lambda leaf: leaf[::-1], swapped), lanes)
  _, alone, batch = setup(row, tree_params())
  for _ in range(2):
    alone, _ = compiled(row.name)(alone, batch)
  first = jax.tree.map(lambda leaf: leaf[0], lanes)
  assert_close(first, alone.params, 1e-4, 1e-5)


@over_rows
def test_sharded_batch_gives_the_same_numbers(row):
  if not row.shard:
    return
  mesh = jax.make_mesh((2,), ('data',))

  def spread_batch(batch):
    if callable(row.shard):
      specs = row.shard(batch)
    else:
      specs = jax.tree.map(lambda leaf: jax.P('data'), batch)
    shardings = jax.tree.map(lambda p: jax.NamedSharding(mesh, p), specs)
    return jax.device_put(batch, shardings)

  _, alone, _ = setup(row, tree_params())
  step, state, _ = setup(row, tree_params())
  spread = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
  # Not `compiled`, which another test asks to have compiled once.
  jitted = jax.jit(step)
  for batch in batches(row, 2):
    alone, _ = compiled(row.name)(alone, batch)
    spread, _ = jitted(spread, spread_batch(batch))
  assert_close(spread, alone, 1e-4, 1e-5)


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
  for batch in data[2:]:
    state, _ = jitted(state, batch)
    restored, _ = jitted(restored, batch)
  assert_equal(restored, state)


@over_transformations
def test_composes_with_chain_and_wrappers(row):
  estimator, tx = row.make(row.hyper)
  mask = {'w': True, 'b': row.whole, 'empty': {}}
  labels = {'w': 'ours', 'b': 'ours' if row.whole else 'other', 'empty': {}}
  multi_steps = optax.MultiSteps(tx, 2)
  wrapped = {
    'chain': optax.chain(optax.clip_by_global_norm(1e3), tx),
    'masked': optax.masked(tx, mask),
    'partition': optax.partition(
      {'ours': tx, 'other': optax.set_to_zero()}, labels
    ),
    # Its gradient_transformation() would drop the extra arguments.
    'MultiSteps': optax.GradientTransformationExtraArgs(
      multi_steps.init, multi_steps.update
    ),
    'apply_if_finite': optax.apply_if_finite(tx, 3),
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
  plain_step = jax.jit(optlab.train_step(estimator, tx))
  step = jax.jit(optlab.train_step(estimator, injected))
  for batch in batches(row, 2):
    plain_state, _ = plain_step(plain_state, batch)
    state, _ = step(state, batch)
  assert_close(state.params, plain_state.params)


@over_transformations
def test_map_params_and_unknown_extras(row):
  estimator, tx = row.make(row.hyper)
  params = tree_params()
  state = tx.init(params)
  mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
  estimate, _ = estimator.estimate(
    params, estimator.init(params), rows(jax.random.key(0))
  )

  def update(grads, **unknown):
    return tx.update(
      grads, state, params,
      value=estimate.value, grad=grads, **estimate.extras, **unknown,
    )  # fmt: skip

  expected = jax.make_jaxpr(update)(estimate.grads)
  actual = jax.make_jaxpr(functools.partial(update, unknown_extra=1))(
    estimate.grads
  )
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
  source = pathlib.Path(__file__).read_text()
  table = source[: source.index('# Tested inside what')]
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
