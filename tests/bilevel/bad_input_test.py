"""What the public functions of bilevel say to bad input."""

import functools

import numpy as np
import optax
import pytest

import optlab
from tests import inputs
from tests.inputs import KEY
from tests.inputs import NAN
from tests.inputs import NON_NEGATIVE
from tests.inputs import NOT_OPTIONAL_REAL
from tests.inputs import NOT_SCHEDULED
from tests.inputs import NOT_TX
from tests.inputs import POSITIVE
from tests.inputs import X
from tests.inputs import estimate
from tests.inputs import family
from tests.inputs import lower
from tests.inputs import same
from tests.inputs import upper
from tests.inputs import zero

table = inputs.Table()
row, reals, counts, functions = (
  table.row,
  table.reals,
  table.counts,
  table.functions,
)
accepts = table.accepts

# Two-level problems.


SAMPLE = optlab.BilevelBatch(X, X, np.ones((5, 2), np.float32))
LEVELS = {'upper': upper, 'lower': lower, 'lower_optimizer': optax.sgd(0.1)}
bo_rep = family('bo_rep', **LEVELS, linear_lr=0.1)
soba = family('soba', **LEVELS, linear_lr=0.1)
implicit = family('implicit', **LEVELS)
stocbio = family('stocbio', **LEVELS, neumann_lr=0.1)
ttsa = family('ttsa', **LEVELS, neumann_lr=0.1)
unrolled = family('unrolled', **LEVELS)
saba = family('saba', **LEVELS, linear_lr=0.1, upper_blocks=3, lower_blocks=3)
BILEVEL = (bo_rep, soba, implicit, stocbio, ttsa, unrolled, saba)
for make in BILEVEL:
  name = make.__name__
  functions(make, upper='(x, y, batch)', lower='(x, y, batch) -> scalar')
  for bad in (None, 0.1, optax.sgd):
    row(
      name,
      f'lower_optimizer={type(bad).__name__}',
      functools.partial(make, lower_optimizer=bad),
      TypeError,
      f'lower_optimizer {NOT_TX} {type(bad).__name__}',
    )
  inner = (X, KEY) if make is ttsa else (X,)
  for bad in (None, (X, X), {'upper': X, 'lower': X}):
    row(
      'BilevelBatch',
      f'{name} on a {type(bad).__name__}',
      lambda make=make, bad=bad, inner=inner: estimate(
        make(), bad, inner=inner
      ),
      TypeError,
      'batch must be a BilevelBatch, with upper and lower and inner; got '
      + type(bad).__name__,
    )
  if make not in (soba, saba):
    steps = 1 if make is ttsa else 5
    for wrong, samples in (('scalar', 1.0), ('too few', np.ones((3, 2)))):
      row(
        name,
        f'{wrong} inner samples',
        lambda make=make, bad=samples, inner=inner: estimate(
          make(), SAMPLE._replace(inner=bad), inner=inner
        ),
        ValueError,
        rf'batch.inner must have a leading axis of lower_steps = {steps}, got'
        r' shape .*: stack one fresh sample for each lower step',
      )
  if make is not saba:
    row(
      name,
      'an upper level that is no scalar',
      lambda make=make, inner=inner: estimate(
        make(upper=lambda x, y, b: y),
        SAMPLE._replace(
          inner=SAMPLE.inner[:1] if make is ttsa else SAMPLE.inner
        ),
        inner=inner,
      ),
      TypeError,
      'scalar-output functions',
    )
for make, argument in (
  (bo_rep, 'linear_lr'),
  (soba, 'linear_lr'),
  (saba, 'linear_lr'),
  (stocbio, 'neumann_lr'),
  (ttsa, 'neumann_lr'),
):
  reals(make, NOT_SCHEDULED, **{argument: POSITIVE})
for make, arguments in (
  (bo_rep, ('period', 'lower_steps')),
  (implicit, ('lower_steps', 'max_iterations')),
  (stocbio, ('lower_steps', 'neumann_steps')),
  (ttsa, ('neumann_steps',)),
  (unrolled, ('lower_steps',)),
  (saba, ('upper_blocks', 'lower_blocks')),
):
  counts(make, **dict.fromkeys(arguments, ()))
reals(bo_rep, NOT_OPTIONAL_REAL, radius=POSITIVE, z_radius=POSITIVE)
reals(implicit, tol=NON_NEGATIVE)
functions(unrolled, ('start',), start='(x, y) -> y')
for index, error, match in (
  (3, ValueError, 'batch.lower.index must be below lower_blocks=3, got 3'),
  (-1, ValueError, 'batch.lower.index must be at least 0, got -1'),
  (1.0, TypeError, r'batch.lower.index must be an integer, got 1\.0'),
):
  row(
    'IndexedBatch',
    f'index={index}',
    lambda index=index: estimate(
      saba(),
      optlab.BilevelBatch(
        optlab.bilevel.IndexedBatch(0, X), optlab.bilevel.IndexedBatch(index, X)
      ),
      inner=(X,),
    ),
    error,
    match,
  )
row(
  'IndexedBatch',
  'data without their index',
  lambda: estimate(saba(), SAMPLE, inner=(X,)),
  TypeError,
  'batch.upper must be an IndexedBatch, with index and data; got ndarray',
)
row(
  'ttsa',
  'no key',
  lambda: estimate(ttsa(), SAMPLE, inner=(X,)),
  TypeError,
  "missing 1 required positional argument: 'key'",
)
row(
  'soba',
  'data with NaN: a zero gradient, the state held and counted',
  lambda: (
    (start := soba().init(X, X))
    and (got := soba().estimate(X, start, optlab.BilevelBatch(X, X * NAN)))
    and zero(got[0].grads)
    and got[1].rejected == 1
    and same(got[1]._replace(rejected=0), start._replace(rejected=0))
  ),
)

refine = family(
  'refine',
  lower=lower,
  params=X,
  inner=X,
  batches=np.ones((3, 2), np.float32),
  learning_rate=0.1,
  first_steps=1,
  epochs=2,
)
functions(refine, lower='(x, y, batch) -> scalar')
reals(refine, learning_rate=POSITIVE)
reals(refine, NOT_OPTIONAL_REAL, radius=POSITIVE)
counts(refine, first_steps=(), epochs=())
for bad in (1.0, np.ones((2, 2))):
  row(
    'refine',
    f'batches of shape {np.shape(bad)}',
    functools.partial(refine, batches=bad),
    ValueError,
    r'must have a leading axis of first_steps \* \(2\*\*epochs - 1\) = 3, got',
  )


@pytest.mark.parametrize('row', table.rows, ids=inputs.identity)
def test_bad_input(row):
  inputs.check(row)


def test_docstrings_name_every_promised_error():
  inputs.check_docstrings(table.rows)
