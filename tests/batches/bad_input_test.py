"""What the public functions of batches say to bad input."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from tests import inputs
from tests.inputs import KEY
from tests.inputs import ROWS
from tests.inputs import X
from tests.inputs import estimate
from tests.inputs import family
from tests.inputs import loss
from tests.inputs import losses
from tests.inputs import traced

table = inputs.Table()
row, counts = table.row, table.counts

sizes = {
  'test': optlab.norm_test(0.5),
  'batch_size': 2,
  'max_batch_size': 8,
}
adadagrad = family('adadagrad', learning_rate=0.1, **sizes)
adadagrad_norm = family('adadagrad_norm', learning_rate=0.1, **sizes)
grow_batch = family('grow_batch', **sizes)

for tx in (grow_batch, adadagrad, adadagrad_norm):
  name = tx.__name__
  for argument in ('batch_size', 'max_batch_size'):
    for value, error, match in (
      (1, ValueError, 'must be at least 2, got 1. The variance of one'),
      (jnp.int32(0), ValueError, 'must be at least 2, got 0'),
      (jnp.array([2, 4]), TypeError, 'must be an integer, got Array'),
    ):
      row(
        name,
        f'{argument}={value!r}',
        functools.partial(tx, **{argument: value}),
        error,
        f'^{argument} {match}',
      )
  row(
    name,
    'batch_size above max_batch_size',
    functools.partial(tx, batch_size=16),
    ValueError,
    'batch_size must be at most max_batch_size=8, got 16',
  )
for wrong, arguments, error, match in (
  ('no multiple', {'batch_size': 3, 'multiple_of': 2}, ValueError, '4 or 2'),
  ('no int32', {'max_batch_size': 2**31}, ValueError, 'must be an int32'),
  ('an unknown option', {'cap': 2.0}, TypeError, "argument 'cap'"),
):
  row(
    'grow_batch',
    wrong,
    functools.partial(grow_batch, **arguments),
    error,
    match,
  )


# Tests of the batch size. What they need comes from `per_example`.

MOMENTS = {
  'sum_sq_diff_norm': 1.0,
  'sum_sq_diff_inner': 1.0,
  'sum_sq_diff_grads': X,
  'sample_size': 4,
}
for name, arguments, needs in (
  ('norm_test', {'eta': 0.5}, 'sum_sq_diff_norm'),
  ('coordinate_norm_test', {'eta': 0.5}, 'sum_sq_diff_grads'),
  ('inner_product_test', {'theta': 0.5}, 'sum_sq_diff_inner'),
  (
    'augmented_inner_product_test',
    {'theta': 0.5, 'nu': 1},
    'sum_sq_diff_inner',
  ),
):
  make = family(name, **arguments)
  for missing in (needs, 'sample_size'):
    extras = {k: v for k, v in MOMENTS.items() if k != missing}
    if missing == 'sum_sq_diff_norm':
      del extras['sum_sq_diff_grads']
    row(
      name,
      f'no {missing}',
      lambda make=make, extras=extras: make().update(X, (), **extras),
      ValueError,
      rf'{name} needs the extra argument {missing}: pass {missing}=\.\.\. to'
      r' update, or take them from per_example\(',
    )
row(
  'coordinate_norm_test',
  'sum_sq_diff_grads of another tree',
  lambda: optlab.batches.coordinate_norm_test(0.5).update(
    {'a': X}, (), sum_sq_diff_grads={'b': X}, sample_size=4
  ),
  ValueError,
  'sum_sq_diff_grads must have the tree structure of grads',
)
row(
  'adadagrad',
  'an estimator without moments',
  lambda: traced(
    lambda: optlab.train_step(optlab.value_and_grad(loss), adadagrad())(
      optlab.init(X, optlab.value_and_grad(loss), adadagrad()), ROWS
    )
  ),
  ValueError,
  'norm_test needs the extra arguments sum_sq_diff_norm, sample_size',
)

noise_scale = family('noise_scale')
for mask, error, match in (
  ({'a': False, 'b': False}, ValueError, 'mask must keep at least one array'),
  (False, ValueError, 'mask must keep at least one array'),
  ({'a': True}, ValueError, 'mask must be a prefix of the parameters'),
  ([True, True], ValueError, 'mask must be a prefix of the parameters'),
  ({'a': 'norm', 'b': True}, TypeError, r"mask\['a'\] must be a bool"),
  ({'a': 1.0, 'b': True}, TypeError, r"mask\['a'\] must be a bool"),
):
  row(
    'noise_scale',
    f'mask={mask}',
    lambda mask=mask: noise_scale(mask=mask).init({'a': X, 'b': X}),
    error,
    match,
  )
family('batch_learning_rate', learning_rate=0.1, batch_size=8)
size_schedule = family('size_schedule', schedule=optax.constant_schedule(8))

# Per-example moments, growing batches.

ONES = np.ones(4, np.float32)
per_example = family('per_example', losses=losses)
ROUTES = ('plain_grads', 'microbatch_means', 'vmap_grads', 'ghost_norms')
PRODUCTS = ('jvp_inner_products', 'vmap_inner_products')
for name in ROUTES + PRODUCTS:
  given = {'losses': losses, 'params': X, 'examples': ROWS, 'mask': ONES}
  if name in PRODUCTS:
    given['grads'] = X
  route = family(name, **given)
  for mask in (np.ones(4, bool), np.ones(4, int), None, [1.0] * 4):
    row(
      name,
      f'mask={mask!r}',
      functools.partial(route, mask=mask),
      TypeError,
      r'mask must be a floating array .*got .*jnp\.ones\(n\)',
    )
  row(
    name,
    'a mean in the loss',
    lambda route=route: traced(lambda: route(losses=loss)),
    (ValueError, IndexError, TypeError),
    r'one loss per example, shape \(4,\), got shape \(\): leave out the mean',
  )
  row(
    name,
    'integer params',
    lambda route=route: traced(lambda: route(params=np.ones(2, int))),
    TypeError,
    '(real- or complex-valued|must be floating|float or complex|tangent)',
  )
row(
  'check_losses',
  'losses that mix their examples',
  lambda: optlab.batches.check_losses(
    lambda x, rows: (rows - rows.mean(0)) @ x, X, ROWS
  ),
  ValueError,
  'loss i must depend on example i alone: reduce_sum takes the examples',
)
row(
  'check_losses',
  'losses=None',
  lambda: optlab.batches.check_losses(None, X, ROWS),
  TypeError,
  'losses must be a function',
)
row(
  'ghost_sq_norms',
  'a mean in the loss',
  lambda: traced(lambda: optlab.batches.ghost_sq_norms(loss, X, ROWS)),
  ValueError,
  r'one loss per example, shape \(4,\), got shape \(\): leave out the mean',
)
row(
  'microbatch_means',
  'no microbatch_size',
  lambda: per_example(moments=optlab.batches.microbatch_means),
  ValueError,
  'microbatch_means needs a microbatch_size, at most half',
)
row(
  'microbatch_means',
  'one microbatch',
  lambda: estimate(
    per_example(moments=optlab.batches.microbatch_means, microbatch_size=4),
    ROWS,
  ),
  ValueError,
  'at least two microbatches: .*at least 8 .*got 4. Lower microbatch_size',
)
LENGTHS = 'examples on its leading axis, got lengths'
for wrong, batch in (
  ('an empty batch', {}),
  ('batch=None', None),
  ('a scalar among the batch', (ROWS, 1.0)),
  ('lengths that differ', (ROWS, ROWS[:2])),
):
  row(
    'per_example',
    wrong,
    lambda batch=batch: estimate(per_example(), batch),
    ValueError,
    LENGTHS,
  )
row(
  'per_example',
  'no example',
  lambda: estimate(per_example(), ROWS[:0]),
  ValueError,
  'batch must have at least one example, got none',
)
for wrong, leaf, match in (
  ('a key in params', KEY, 'must be floating, got dtype key<fry>'),
  ('a function in params', jnp.tanh, 'must be an array, got .*functions and'),
):
  row(
    'per_example',
    wrong,
    lambda leaf=leaf: per_example().estimate((X, leaf), (), ROWS),
    TypeError,
    r'params\[1\] ' + match,
  )
row(
  'PaddedBatch',
  'no examples',
  lambda: estimate(per_example(), optlab.batches.PaddedBatch((), 2)),
  ValueError,
  LENGTHS,
)
row(
  'PaddedBatch',
  'size above the examples: all of them count, none twice',
  lambda: (
    per_example(microbatch_size=2)
    .estimate(X, (), optlab.batches.PaddedBatch(ROWS, np.int32(9)))[0]
    .extras['sample_size']
    == 4
  ),
)
row(
  'ResidentBatch',
  'no microbatch_size',
  lambda: estimate(
    per_example(), optlab.batches.ResidentBatch(ROWS, np.arange(4), 0, 2)
  ),
  ValueError,
  'per_example needs a microbatch_size to read a ResidentBatch',
)

growing_init = family(
  'growing_init',
  params=X,
  estimator=optlab.per_example(losses, microbatch_size=1),
  tx=optax.sgd(0.1),
  data=ROWS,
  key=KEY,
)
growing_step = family(
  'growing_step',
  estimator=optlab.per_example(losses, microbatch_size=1),
  tx=optax.sgd(0.1),
  batch_size=2,
)
growing_specs = family('growing_specs', axis_name='data')
for wrong, arguments, error, match in (
  ('no data', {'data': {}}, ValueError, LENGTHS),
  ('scalar data', {'data': 1.0}, ValueError, LENGTHS),
  ('uneven shards', {'num_shards': 3}, ValueError, 'got 4 .*leave out 1'),
  (
    'a batch larger than the data',
    {'tx': adadagrad()},
    ValueError,
    'max_batch_size must be at most the 4 examples of data, got 8',
  ),
  (
    'a first batch too small for the estimator',
    {
      'tx': adadagrad(max_batch_size=4),
      'estimator': optlab.per_example(
        losses, optlab.batches.microbatch_means, microbatch_size=2
      ),
    },
    ValueError,
    'at least two microbatches',
  ),
  ('key=None', {'key': None}, TypeError, 'key'),
):
  row(
    'growing_init',
    wrong,
    functools.partial(growing_init, **arguments),
    error,
    match,
  )
row(
  'growing_step',
  'no batch size anywhere',
  lambda: traced(lambda: growing_step(batch_size=None)(growing_init(), ROWS)),
  ValueError,
  'growing_step needs a batch size: put grow_batch into tx, or pass',
)
for bad in (None, 0, ('data',)):
  row(
    'growing_specs',
    f'axis_name={bad!r}',
    functools.partial(growing_specs, axis_name=bad),
    TypeError,
    r'axis_name must be the name of a mesh axis, got ',
  )

for name in ('wrap', 'keep', 'drop'):
  row(
    name,
    'a batch that ends with its epoch',
    lambda name=name: getattr(optlab.batches, name)(4, 4) == (4, 0),
  )

local_step = family(
  'local_step',
  estimator=optlab.value_and_grad(loss),
  tx=optax.sgd(0.1),
  axis_name='workers',
  every=2,
)
row(
  'local_step',
  'axis_name=None',
  functools.partial(local_step, axis_name=None),
  TypeError,
  'axis_name must be the name of an axis .*got None',
)
bucket_sizes = family('bucket_sizes', batch_size=2, max_batch_size=8)
host_loader = family(
  'host_loader', gather=lambda rows: rows, num_examples=4, buckets=(2, 4)
)
counts(bucket_sizes, max_batch_size=(1, -1))
family('stream', source=[ROWS], microbatch_size=2)
stream_step = family(
  'stream_step',
  estimator=optlab.per_example(losses),
  tx=optax.sgd(0.1),
  batch_size=2,
)
one = optlab.batches.stream([ROWS], 2, prefetch=0)
for wrong, arguments, match in (
  ('no batch size anywhere', {'batch_size': None}, 'needs a batch size: put'),
  (
    'inner products',
    {
      'estimator': optlab.per_example(
        losses, inner_products=optlab.batches.jvp_inner_products
      )
    },
    'without inner products.*got the extra arguments sum_sq_diff_inner: take',
  ),
  (
    'an estimator of whole batches',
    {'estimator': optlab.value_and_grad(loss)},
    '(whose parts of a batch can be merged|the size of the batch must be kno)',
  ),
):
  row(
    'stream_step',
    wrong,
    lambda arguments=arguments: stream_step(**arguments)(
      optlab.init(X, optlab.per_example(losses), optax.sgd(0.1)), one
    ),
    ValueError,
    match,
  )
held = optlab.estimators.estimate_if_finite(optlab.per_example(losses))
row(
  'stream_step',
  'an estimator around it',
  lambda: stream_step(estimator=held)(
    optlab.init(X, held, optax.sgd(0.1)), one
  ),
  ValueError,
  'that of per_example itself, got one with a EstimateIfFiniteState',
)
for size, error, match in (
  (0, ValueError, 'size must be at least 1, got 0'),
  (3, ValueError, 'at most microbatch_size=2, got 3: stream_step'),
  (1.5, TypeError, 'size must be an integer, got 1.5'),
):
  row('Stream', f'take of {size}', lambda n=size: one.take(n), error, match)
row(
  'Stream',
  'a position past the end of the source',
  lambda: optlab.batches.stream([ROWS], 2, prefetch=0).seek(
    optlab.batches.StreamState(0, 0, 5, None)
  ),
  ValueError,
  'source must have the item 0 of pass 0 that it had, got fewer, or shorter',
)
row(
  'stream',
  'an empty source',
  lambda: optlab.batches.stream([], 2, prefetch=0).take(1),
  ValueError,
  'source must yield examples, got an empty one',
)
for wrong in (None, 3, 'file.txt', {'x': ROWS}):
  row(
    'stream',
    f'source={type(wrong).__name__}',
    lambda wrong=wrong: optlab.batches.stream(wrong, 2),
    TypeError,
    'source must be an iterable of examples or batches.*got',
  )
row(
  'next_size',
  'no rule in the state',
  lambda: optlab.batches.next_size(optax.adam(0.1).init(X)),
  ValueError,
  'state must hold a GrowBatchState, got tuple without one: put grow_batch',
)
for bad, error, match in (
  ((), ValueError, r'buckets must be increasing, got \(\)'),
  ((4, 2), ValueError, r'buckets must be increasing, got \(4, 2\)'),
  ((0, 2), ValueError, 'buckets must be at least 1, got 0'),
  ((1.5, 2), TypeError, 'buckets must be an integer, got 1.5'),
  (4, TypeError, 'buckets must be a sequence such as bucket_sizes .*got 4'),
  (None, TypeError, 'buckets must be a sequence such as bucket_sizes .*None'),
):
  row(
    'host_loader',
    f'buckets={bad!r}',
    functools.partial(host_loader, buckets=bad),
    error,
    match,
  )
for bad, error, match in (
  (0, ValueError, 'batch_size must be at least 1, got 0'),
  (5, ValueError, 'batch_size must be at most the last bucket 4, got 5'),
  (1.5, TypeError, r'batch_size must be an integer, got 1\.5'),
  (None, TypeError, 'batch_size must be an integer, got None'),
):
  row(
    'HostLoader',
    f'take of {bad!r}',
    lambda bad=bad: host_loader().take(host_loader().init(0), bad),
    error,
    match,
  )
for bad, error in ((-1, ValueError), (None, TypeError), (0.5, TypeError)):
  row(
    'HostLoader',
    f'seed={bad!r}',
    lambda bad=bad: host_loader().init(bad),
    error,
    f'seed must be .*got {bad}',
  )


@pytest.mark.parametrize('row', table.rows, ids=inputs.identity)
def test_bad_input(row):
  inputs.check(row)


def test_docstrings_name_every_promised_error():
  inputs.check_docstrings(table.rows)
