"""The contracts on many devices: layout, abstract shapes, meshes, platforms."""

import jax
import jax.numpy as jnp
import optax

import optlab
from tests import contract_test as contract
from tests.contract_test import over_rows
from tests.contract_test import over_transformations
from tests.layout import COLLECTIVES

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
SPECS = {'w': jax.P(None, 'data'), 'b': jax.P('data'), 'empty': {}}

# Norms over all parameters: the squares, and in a branch that is seldom taken
# the largest number, where the squares would over- or underflow.
REDUCTIONS = {
  'adagrad_norm': 2,
  'normalized_momentum': 4,
  'normalized_descent': 4,
  'adadagrad': 2,
  'adadagrad_norm': 2,
  'grow_batch_coordinate': 3,
  'grow_batch_means': 2,
}
# Its curvature is a matrix, which sees all parameters as one vector.
FLATTENING = ('with_curvature',)
ONE_OF_EACH = {
  'value_and_grad', 'gns_newton', 'diffgrad', 'adadagrad', 'soba', 'implicit',
  'meco', 'contrastive_divergence',
}  # fmt: skip


def mesh_of(kind):
  return jax.make_mesh((2,), ('data',), axis_types=(kind,))


def laid_out(mesh):
  """The toy's parameters, split over two devices."""
  return jax.tree.map(
    lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)),
    contract.tree_params(),
    SPECS,
  )


def spread(leaf):
  """Inner variables are split on their first axis, where it can be."""
  if jnp.ndim(leaf) and leaf.shape[0] % 2 == 0:
    return jax.device_put(leaf, jax.NamedSharding(mesh_of(AUTO), jax.P('data')))
  return leaf


def abstract(tree):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree
  )


@over_rows
def test_the_state_can_be_made_of_shapes_alone(row):
  estimator, tx = row.make(row.hyper)
  params, inner = contract.tree_params(), row.inner(jnp.float32)
  real = optlab.init(params, estimator, tx, *inner)
  shapes = jax.eval_shape(
    lambda params, *inner: optlab.init(params, estimator, tx, *inner),
    params,
    *inner,
  )
  assert contract.types(shapes) == contract.types(real)
  direct = optlab.init(abstract(params), estimator, tx, *inner)
  assert contract.types(direct) == contract.types(real)


@over_rows
def test_the_step_exports_for_cpu_cuda_and_tpu(row):
  step, state, batch = contract.setup(row, contract.tree_params())
  exported = jax.export.export(jax.jit(step), platforms=('cpu', 'cuda', 'tpu'))(
    state, batch
  )
  assert exported.platforms == ('cpu', 'cuda', 'tpu')


def split(row, batch):
  """How a row's batch may be split."""
  if callable(row.shard):
    return row.shard(batch)
  return jax.tree.map(
    lambda leaf: jax.P('data') if row.shard else jax.P(), batch
  )


@over_rows
def test_split_over_devices_the_numbers_and_the_layout_stay(row):
  """Parameters, inner variables and batch, each over both devices."""
  mesh = mesh_of(AUTO)
  estimator, tx = row.make(row.hyper)
  if row.name in FLATTENING:
    params = jax.device_put(
      contract.tree_params(), jax.NamedSharding(mesh, jax.P())
    )
  else:
    params = laid_out(mesh)
  inner = jax.tree.map(spread, row.inner(jnp.float32))
  state = optlab.init(params, estimator, tx, *inner)
  where = {
    leaf.shape: leaf.sharding
    for leaf in jax.tree.leaves((params, inner))
    if leaf.ndim
  }
  _, alone, _ = contract.setup(row, contract.tree_params())
  # Not `compiled`, which another test asks to have compiled once.
  step = jax.jit(optlab.train_step(estimator, tx))
  stages = [state]
  for batch in contract.batches(row, 2):
    alone, _ = contract.compiled(row.name)(alone, batch)
    shardings = jax.tree.map(
      lambda spec: jax.NamedSharding(mesh, spec), split(row, batch)
    )
    state, _ = step(state, jax.device_put(batch, shardings))
    stages.append(state)
  for stage in stages if row.name not in FLATTENING else ():
    for path, leaf in jax.tree.leaves_with_path(stage):
      if leaf.shape in where and jnp.issubdtype(leaf.dtype, jnp.inexact):
        assert leaf.sharding.is_equivalent_to(where[leaf.shape], leaf.ndim), (
          jax.tree_util.keystr(path)
        )
  contract.assert_close(state, alone, 1e-4, 1e-5)


@over_transformations
def test_collectives_of_an_update(row):
  """As `optax.adam` none, but for the norms that a method is made of."""
  if row.whole:  # It evaluates the objective, whose collectives it has.
    return
  estimator, tx = row.make(row.hyper)
  params = laid_out(mesh_of(AUTO))
  estimate, _ = jax.jit(
    lambda params, batch: estimator.estimate(
      params, estimator.init(params), batch
    )
  )(params, row.batch(jax.random.key(0), jnp.float32))
  grads = jax.tree.map(
    lambda grad, leaf: jax.device_put(grad, leaf.sharding),
    estimate.grads,
    params,
  )
  update = jax.jit(optax.with_extra_args_support(tx).update)
  text = (
    update.lower(
      grads,
      tx.init(params),
      params,
      value=estimate.value,
      grad=grads,
      **estimate.extras,
    )
    .compile()
    .as_text()
  )
  assert len(COLLECTIVES.findall(text)) <= REDUCTIONS.get(row.name, 0)


# One of each wing; the others are among the slow tests.
@contract.over(
  contract.ROWS,
  slow=lambda row: row.name not in ONE_OF_EACH,
)
def test_an_explicit_mesh_gives_the_same_numbers(row):
  if not row.shard:
    return
  mesh = mesh_of(EXPLICIT)
  _, alone, _ = contract.setup(row, contract.tree_params())
  data = contract.batches(row, 2)
  for batch in data:
    alone, _ = contract.compiled(row.name)(alone, batch)
  with jax.set_mesh(mesh):
    step, state, _ = contract.setup(
      row, jax.device_put(contract.tree_params(), jax.P())
    )
    step = jax.jit(step)
    for batch in data:
      placed = jax.tree.map(jax.device_put, batch, split(row, batch))
      state, _ = step(state, placed)
  contract.assert_close(state, alone, 1e-4, 1e-5)


@over_transformations
def test_an_explicit_layout_is_kept(row):
  """As optax asks of its own: init, jitted init, jitted update."""
  if row.name in FLATTENING:
    return
  _, tx = row.make(row.hyper)
  tx = optax.with_extra_args_support(tx)
  if 'grow' in row.name or 'adadagrad' in row.name:
    moments = {
      'sample_size': jnp.int32(8),
      'sum_sq_diff_norm': jnp.float32(1.0),
      'sum_sq_diff_inner': jnp.float32(1.0),
    }
  else:
    moments = {}
  with jax.set_mesh(mesh_of(EXPLICIT)):
    params = jax.device_put(
      jnp.ones((2, 8, 4), jnp.float16), jax.P(None, 'data')
    )
    value_fn = lambda p: jnp.sum(jnp.square(p.astype(jnp.float32)))
    extras = moments | {
      'value': value_fn(params),
      'grad': params,
      'value_fn': value_fn,
    }
    if 'coordinate' in row.name:
      extras['sum_sq_diff_grads'] = params

    def update(params, state):
      return tx.update(params, state, params, **extras)

    state = tx.init(params)
    # One operation at a time has the same rules, and each is compiled.
    _, after = jax.jit(update)(params, state)
    kinds = [
      jax.tree.map(jax.typeof, tree)
      for tree in (state, jax.jit(tx.init)(params), after)
    ]
  assert kinds[0] == kinds[1]
  assert kinds[0] == kinds[2]
