"""What the public functions of multi_block say to bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optlab
from tests import inputs
from tests.inputs import BLOCKS
from tests.inputs import DATA
from tests.inputs import KEY
from tests.inputs import TABLE_OF_4
from tests.inputs import X
from tests.inputs import family
from tests.inputs import lower
from tests.inputs import upper
from tests.public import PUBLIC

table = inputs.Table()
row, counts = table.row, table.counts

# Many blocks.

bsvrb = family('bsvrb', upper=upper, lower=lower, num_blocks=4)
rsvrb = family('rsvrb', upper=upper, lower=lower, num_blocks=4)
track_products = family('track_products')
track_hessians = family('track_hessians')
BLOCK_BATCH = {
  'bsvrb': optlab.BlockBatch(BLOCKS, DATA, DATA),
  'rsvrb': optlab.multi_block.PairedBlockBatch(BLOCKS, DATA, DATA, BLOCKS),
}
for make in (bsvrb, rsvrb):
  name = make.__name__
  batch = BLOCK_BATCH[name]
  for field, bad, error, match in (
    ('blocks', [0, 1], TypeError, r'blocks must be an integer array, got \[0'),
    (
      'blocks',
      BLOCKS * 1.0,
      TypeError,
      'blocks must be an integer array.*int32',
    ),
    (
      'blocks',
      BLOCKS[:, None],
      ValueError,
      r'shape \(sampled,\), got .*\(2, 1',
    ),
    (
      'blocks',
      BLOCKS - 1,
      ValueError,
      r'negative, got \[-1  0\]; pad with num',
    ),
    ('blocks', np.arange(5), ValueError, '5 blocks, more than num_blocks=4'),
    (
      'upper',
      DATA[:1],
      ValueError,
      'batch.upper must have a leading axis of 2',
    ),
    ('lower', 1.0, ValueError, 'batch.lower must have a leading axis of 2'),
    ('lower', {'a': DATA[:1]}, ValueError, r"batch.lower\['a'\] must have"),
  ):
    row(
      type(batch).__name__,
      f'{name}: {field}={bad!r}',
      # The blocks stay numbers: tracers pass.
      lambda make=make, batch=batch, change={field: bad}: make().estimate(
        X, make().init(X, TABLE_OF_4), batch._replace(**change)
      ),
      error,
      match,
    )
  for bad in (None, (BLOCKS, DATA, DATA), optlab.BilevelBatch(DATA, DATA)):
    row(
      type(batch).__name__,
      f'{name} on a {type(bad).__name__}',
      lambda make=make, bad=bad: make().estimate(
        X, make().init(X, TABLE_OF_4), bad
      ),
      TypeError,
      f'batch must be a {type(batch).__name__}, .*got {type(bad).__name__}',
    )
  for bad in (DATA, 1.0, {'a': TABLE_OF_4, 'b': DATA}):
    row(
      name,
      f'inner without num_blocks rows: {jax.tree.map(np.shape, bad)}',
      lambda make=make, bad=bad: make().init(X, bad),
      ValueError,
      r"inner(\['b'\])? must have a leading axis of 4, one row for each of",
    )
  for argument, x, y, error, match in (
    ('an integer leaf in params', {'a': np.arange(2)}, TABLE_OF_4, TypeError,
     r"params\['a'\] must be floating, got dtype int"),
    ('an integer leaf in inner', X, TABLE_OF_4.astype(int), TypeError,
     'inner must be floating, got dtype int'),
    ('a complex leaf in inner', X, TABLE_OF_4 * 1j, TypeError,
     'inner must be real, got dtype complex'),
    ('a function in params', {'a': np.sum}, TABLE_OF_4, TypeError,
     r"params\['a'\] must be an array, got <function"),
    ('no leaf in inner', X, (), ValueError, 'inner must have at least one'),
  ):  # fmt: skip
    row(
      name,
      argument,
      lambda make=make, x=x, y=y: make().init(x, y),
      error,
      match,
    )
  for argument, objective, has_aux, match in (
    ('upper', lambda x, y, b: (upper(x, y, b), y), False,
     'upper must return a scalar for one block, got tuple.*has_aux'),
    ('lower', lambda x, y, b: (lower(x, y, b), y), True,
     'lower must return a scalar for one block, got tuple'),
    ('lower', lambda x, y, b: (y - x) ** 2, False,
     r'lower must return a scalar for one block, got shape \(2,\)'),
    ('upper', upper, True, r'upper must return \(value, aux\) where has_aux'),
  ):  # fmt: skip
    levels = {'upper': lambda x, y, b: (upper(x, y, b), b)} if (
      has_aux and argument == 'lower'
    ) else {}  # fmt: skip
    levels |= {argument: objective, 'has_aux': has_aux}
    row(
      name,
      f'{argument} returns something else than has_aux={has_aux} says',
      lambda make=make, batch=batch, levels=levels: inputs.estimate(
        make(**levels), batch, inner=(TABLE_OF_4,)
      ),
      TypeError,
      match,
    )
  empty = BLOCKS[:0], DATA[:0], DATA[:0], BLOCKS[:0]
  row(
    name,
    'no blocks',
    lambda make=make, batch=batch, empty=empty: inputs.estimate(
      make(), type(batch)(*empty[: len(batch)]), inner=(TABLE_OF_4,)
    ),
    ValueError,
    r'(blocks|outer) must name at least one block, got shape \(0,\); skip',
  )
  row(
    name,
    'a first batch that has one block twice',
    lambda make=make: make().init(
      X,
      TABLE_OF_4,
      optlab.BlockBatch(np.array([0, 1, 2, 2]), *[TABLE_OF_4] * 2),
    ),
    ValueError,
    'first must have each of the num_blocks=4 blocks once, got 3 blocks',
  )
  row(
    name,
    'a first batch of some blocks only',
    lambda make=make: make().init(
      X, TABLE_OF_4, optlab.BlockBatch(BLOCKS, DATA, DATA)
    ),
    ValueError,
    'first must have each of the num_blocks=4 blocks once, got 2 blocks',
  )
row(
  'PairedBlockBatch',
  'a BlockBatch has no outer blocks',
  lambda: rsvrb().estimate(
    X, rsvrb().init(X, TABLE_OF_4), BLOCK_BATCH['bsvrb']
  ),
  TypeError,
  'PairedBlockBatch, with .* and outer; got BlockBatch',
)
row(
  'dual_variables',
  'a state of track_hessians, which keeps none',
  lambda: optlab.multi_block.dual_variables(
    bsvrb(dual=optlab.multi_block.track_hessians()).init(X, TABLE_OF_4)
  ),
  TypeError,
  r'state.dual must be the state of track_products\(\), .*got HessianState',
)
for name in ('inner_variables', 'dual_variables'):
  row(
    name,
    'the state of another method',
    lambda name=name: PUBLIC[name](rsvrb().init(X, TABLE_OF_4)),
    TypeError,
    'state must be the state of bsvrb, .*got RSVRBState',
  )

fcco = family(
  'fcco', inner=lambda x, b: b @ x, outer=lambda u, b: u**2, num_blocks=4
)
for name in (
  'track_average', 'track_msvr', 'track_log_average', 'track_mirror',
):  # fmt: skip
  family(name)
FCCO = optlab.multi_block.FCCOBatch(BLOCKS, DATA)
for wrong, batch, start, error, match in (
  ('no blocks', FCCO._replace(blocks=BLOCKS[:0]), np.zeros(4, np.float32),
   ValueError, 'blocks must name at least one block'),
  ('a negative block', FCCO._replace(blocks=BLOCKS - 1),
   np.zeros(4, np.float32), ValueError, 'blocks must not be negative'),
  ('outer data of another length', FCCO._replace(outer=1.0),
   np.zeros(4, np.float32), ValueError, 'batch.outer must have a leading axis'),
  ('inner values of another shape', FCCO, TABLE_OF_4, ValueError,
   r'what inner returns has shape \(2,\), but table\[blocks\]'),
  ('another batch', optlab.BlockBatch(BLOCKS), np.zeros(4, np.float32),
   TypeError, 'batch must be a FCCOBatch'),
  ('an integer table', FCCO, np.zeros(4, int), TypeError,
   'table must be floating'),
  ('a table of another length', FCCO, np.zeros(3, np.float32), ValueError,
   'table must have a leading axis of 4'),
):  # fmt: skip
  row(
    'fcco',
    wrong,
    lambda batch=batch, start=start: fcco().estimate(
      X, fcco().init(X, start), batch
    ),
    error,
    match,
  )

whole = family(
  'fcco', inner=lambda x, b: jnp.ones(2, int), outer=lambda u, b: u**2,
  num_blocks=4,
)  # fmt: skip
row(
  'fcco',
  'inner values of integers',
  lambda: whole().estimate(X, whole().init(X, np.zeros(4, np.float32)), FCCO),
  TypeError,
  'what inner returns must be floating, got dtype int',
)

sample_blocks = family('sample_blocks', key=KEY, num_blocks=4, sampled=2)
epoch_of_blocks = family('epoch_of_blocks', key=KEY, num_blocks=4, sampled=2)
for make in (sample_blocks, epoch_of_blocks):
  counts(make, num_blocks=(), sampled=())
  row(
    make.__name__,
    'more blocks than there are',
    functools.partial(make, sampled=5),
    ValueError,
    'sampled must be at most num_blocks=4, got 5; lower it, or .*replace=True',
  )
  row(
    make.__name__,
    'key=None',
    functools.partial(make, key=None),
    TypeError,
    'key',
  )


@pytest.mark.parametrize('row', table.rows, ids=inputs.identity)
def test_bad_input(row):
  inputs.check(row)


def test_docstrings_name_every_promised_error():
  inputs.check_docstrings(table.rows)


def test_the_state_of_another_problem_is_named():
  make = lambda blocks: optlab.multi_block.fcco(
    lambda w, batch: w * batch, lambda value, _: value**2, blocks
  )
  state = make(4).init(jnp.zeros(()), jnp.zeros(4))
  sampled = optlab.multi_block.FCCOBatch(jnp.arange(2), jnp.ones(2))
  with pytest.raises(
    ValueError, match='state.tracked must have a leading axis'
  ):
    make(5).estimate(jnp.zeros(()), state, sampled)
  batch = optlab.BlockBatch(jnp.arange(2), None, jnp.ones(2))
  paired = optlab.multi_block.PairedBlockBatch(*batch, jnp.arange(2))
  lower = lambda x, y, c: 0.5 * jnp.sum(c * (y - x) ** 2)
  upper = lambda x, y, _: jnp.sum(y)
  states = [
    make(upper, lower, 4).init(jnp.zeros(2), jnp.zeros((4, 2)))
    for make in (optlab.bsvrb, optlab.multi_block.rsvrb)
  ]
  for make, data in (optlab.bsvrb, batch), (optlab.multi_block.rsvrb, paired):
    own, other = states if make is optlab.bsvrb else states[::-1]
    with pytest.raises(
      ValueError, match='state.inner must have a leading axis'
    ):
      make(upper, lower, 5).estimate(jnp.zeros(2), own, data)
    with pytest.raises(ValueError, match='params has shape'):
      make(upper, lower, 4).estimate(jnp.zeros(3), own, data)
    with pytest.raises(TypeError, match='state must be the state of'):
      make(upper, lower, 4).estimate(jnp.zeros(2), other, data)
