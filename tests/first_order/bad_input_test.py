"""What the public functions of first_order say to bad input."""

import functools

import pytest

import optlab
from tests import inputs
from tests.inputs import INF
from tests.inputs import NAN
from tests.inputs import SCHEDULE
from tests.inputs import X
from tests.inputs import family
from tests.inputs import update
from tests.inputs import zero

table = inputs.Table()
row = table.row

# Transformations.

adagrad_norm = family('adagrad_norm', learning_rate=0.1)
scale_by_adagrad_norm = family('scale_by_adagrad_norm')
diffgrad = family('diffgrad', learning_rate=0.1)
scale_by_diffgrad = family('scale_by_diffgrad')
normalized_momentum = family('normalized_momentum', learning_rate=0.1)
scale_by_normalized_momentum = family('scale_by_normalized_momentum')
for tx in (
  adagrad_norm,
  diffgrad,
):
  row(
    tx.__name__,
    'a negative rate to ascend with',
    functools.partial(tx, learning_rate=-0.1),
    ValueError,
    r'learning_rate .*got -0\.1.*negate the objective',
  )
row(
  'scale_by_diffgrad',
  'a schedule where a number belongs',
  lambda: optlab.first_order.scale_by_diffgrad(b1=SCHEDULE),
  TypeError,
  'b1 must be a real number, got .*inject_hyperparams',
)

for make in (
  adagrad_norm,
  scale_by_adagrad_norm,
  diffgrad,
  scale_by_diffgrad,
  normalized_momentum,
  scale_by_normalized_momentum,
):
  row(
    make.__name__,
    'an empty tree: an empty update',
    lambda make=make: update(make(), {'a': {}}, {'a': {}})[0] == {'a': {}},
  )
for make in (
  scale_by_normalized_momentum,
  scale_by_adagrad_norm,
):
  row(
    make.__name__,
    'a zero gradient: a zero update',
    lambda make=make: zero(make().update(X * 0, make().init(X), X)[0]),
  )
for bad in (NAN, INF):
  for make in (scale_by_normalized_momentum,):
    row(
      make.__name__,
      f'a gradient with {bad}: a zero update, the state held',
      lambda make=make, bad=bad: zero(
        make().update(X * bad, make().init(X), X)
      ),
    )


@pytest.mark.parametrize('row', table.rows, ids=inputs.identity)
def test_bad_input(row):
  inputs.check(row)


def test_docstrings_name_every_promised_error():
  inputs.check_docstrings(table.rows)
