"""What the public functions of bilevel say to bad input."""

import functools

import jax
import numpy as np
import optax
import pytest

import optlab
from tests import inputs
from tests.inputs import KEY
from tests.inputs import NAN
from tests.inputs import X
from tests.inputs import estimate
from tests.inputs import family
from tests.inputs import lower
from tests.inputs import same
from tests.inputs import upper
from tests.inputs import zero

table = inputs.Table()
row = table.row

# Two-level problems.


SAMPLE = optlab.BilevelBatch(X, X, np.ones((5, 2), np.float32))
LEVELS = {'upper': upper, 'lower': lower, 'lower_optimizer': optax.sgd(0.1)}
bo_rep = family('bo_rep', **LEVELS, dual_lr=0.1)
soba = family('soba', **LEVELS, dual_lr=0.1)
with_models = family(
  'with_models',
  make=lambda f, g: optlab.soba(f, g, optax.sgd(0.1), 0.1, has_aux=True),
  upper=upper,
  lower=lower,
)
implicit = family('implicit', **LEVELS)
stocbio = family('stocbio', **LEVELS, neumann_lr=0.1)
ttsa = family('ttsa', **LEVELS, neumann_lr=0.1)
unrolled = family('unrolled', **LEVELS)
saba = family('saba', **LEVELS, dual_lr=0.1, upper_blocks=3, lower_blocks=3)
f2sa = family('f2sa', **LEVELS, penalty=10.0)
srba = family('srba', **LEVELS, dual_lr=0.1, full=SAMPLE, period=3)
mrbo = family('mrbo', **LEVELS, dual_lr=0.1)
BILEVEL = (
  bo_rep, soba, implicit, stocbio, ttsa, unrolled, saba, f2sa, srba, mrbo,
)  # fmt: skip
for make in BILEVEL:
  name = make.__name__
  inner = (X, KEY) if make is ttsa else (X,)
  for bad in (None, (X, X), {'upper': X, 'lower': X}):
    row(
      'BilevelBatch',
      f'{name} on a {type(bad).__name__}',
      lambda make=make, bad=bad, inner=inner: estimate(
        make(), bad, inner=inner
      ),
      TypeError,
      'batch must be a BilevelBatch, with upper and lower and step_samples;'
      f' got {type(bad).__name__}',
    )
  if make not in (soba, saba, srba, mrbo):
    steps = 1 if make is ttsa else 5
    for wrong, samples in (('scalar', 1.0), ('too few', np.ones((3, 2)))):
      row(
        name,
        f'{wrong} step samples',
        lambda make=make, bad=samples, inner=inner: estimate(
          make(), SAMPLE._replace(step_samples=bad), inner=inner
        ),
        ValueError,
        'batch.step_samples must have a leading axis of'
        rf' lower_steps = {steps}, got shape .*:'
        ' stack one fresh sample for each lower step',
      )
  if make is not saba:
    row(
      name,
      'an upper level that is no scalar',
      lambda make=make, inner=inner: estimate(
        make(upper=lambda x, y, b: y),
        SAMPLE._replace(
          step_samples=SAMPLE.step_samples[: 1 if make is ttsa else 5]
        ),
        inner=inner,
      ),
      TypeError,
      r'upper must return a real scalar of floats.*\(2,\).*Sum or average',
    )
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
    (start := jax.jit(soba().init)(X, X))
    and (
      got := jax.jit(soba().estimate)(X, start, optlab.BilevelBatch(X, X * NAN))
    )
    and zero(got[0].grads)
    and got[1].info.rejected
    and got[1].info.total_rejected == 1
    and same(got[1]._replace(info=start.info), start)
  ),
)

suggest_rates = family(
  'suggest_rates',
  upper=upper,
  lower=lower,
  params=X,
  state=jax.jit(soba().init)(X, X),
  batch=SAMPLE,
  key=KEY,
)
proximal_map = family(
  'proximal_map', lower=lower, prox=lambda x, y, rate: y, learning_rate=0.1
)
for make, options, match in (
  (soba, {'dual_lr': None}, 'dual_lr must be given, or dual_optimizer in its'),
  (bo_rep, {'dual_optimizer': optax.sgd(0.1)}, 'dual_lr must be given'),
  (
    implicit,
    {'lower_map': lower, 'curvature': lower},
    'curvature must be None beside lower_map',
  ),
):
  row(
    make.__name__,
    f'{sorted(options)} that do not go together',
    functools.partial(make, **options),
    ValueError,
    match,
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
