"""What the public functions of core say to bad input."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from tests import inputs
from tests.inputs import BLOCKS
from tests.inputs import DATA
from tests.inputs import NAN
from tests.inputs import ROWS
from tests.inputs import TABLE_OF_4
from tests.inputs import X
from tests.inputs import estimate
from tests.inputs import family
from tests.inputs import loss
from tests.inputs import losses
from tests.inputs import traced

table = inputs.Table()
row = table.row

# Estimators, training.

value_and_grad = family('value_and_grad', fun=loss)
family('stateless', estimate=lambda params, batch: None)
family(
  'with_curvature',
  estimator=optlab.value_and_grad(loss),
  curvature=optlab.hessian(loss),
)
with_storm = family(
  'with_storm', estimator=optlab.value_and_grad(loss), beta=0.1
)
estimate_if_finite = family(
  'estimate_if_finite', estimator=optlab.value_and_grad(loss)
)
init = family(
  'init',
  params=X,
  estimator=optlab.value_and_grad(loss),
  tx=optax.sgd(0.1),
)
train_step = family(
  'train_step', estimator=optlab.value_and_grad(loss), tx=optax.sgd(0.1)
)
minimize = family(
  'minimize',
  fun=lambda x: jnp.sum(x**2),
  params=X,
  tx=optax.sgd(0.1),
  max_steps=1,
)
for wrong, params, error, match in (
  (
    'integer params',
    {'n': np.ones(2, int)},
    TypeError,
    r"params\['n'\] must be floating, got dtype int",
  ),
  (
    'a function among params',
    {'f': jnp.sin},
    TypeError,
    r"params\['f'\] must be an array",
  ),
  ('params=None', None, Exception, ''),
  ('params are words', 'abc', TypeError, "params must be an array, got 'abc'"),
):
  row(
    'minimize',
    wrong,
    lambda params=params: traced(lambda: minimize(params=params)),
    error,
    match,
  )
for wrong, bounds, error, match in (
  (
    'pairs of ends, as in scipy',
    [(0, 1)] * 3,
    ValueError,
    r'bounds must be a pair \(lower, upper\)',
  ),
  ('a number for bounds', 1.0, ValueError, 'bounds must be a pair .*got 1.0'),
  ('words for a bound', ('a', 1.0), TypeError, "real numbers, got lower = 'a'"),
  ('a NaN bound', (None, NAN), ValueError, 'not be NaN, got upper = nan'),
  (
    'bounds that are turned around',
    (X + 1, X),
    ValueError,
    'lower <= upper, got lower = .* and upper = ',
  ),
  (
    'a bound of another shape',
    (np.zeros(7), None),
    ValueError,
    r'lower has shape \(7,\), the parameter \(2,\)',
  ),
  (
    'a bound of another tree',
    ({'a': 0.0}, None),
    ValueError,
    'the lower end of bounds must be a tree like params',
  ),
):
  row(
    'minimize',
    wrong,
    lambda bounds=bounds: traced(lambda: minimize(bounds=bounds)),
    error,
    match,
  )
for wrong, arguments, match in (
  (
    'aux that nobody announced',
    {'fun': lambda x: (jnp.sum(x), x)},
    'fun must return a scalar, .*has_aux=True',
  ),
  (
    'has_aux without aux',
    {'has_aux': True},
    r'fun must return a pair \(value, aux\)',
  ),
):
  row(
    'minimize',
    wrong,
    lambda arguments=arguments: traced(lambda: minimize(**arguments)),
    TypeError,
    match,
  )
row(
  'minimize',
  'bounds of complex params',
  lambda: traced(lambda: minimize(params=X * 1j, bounds=(0.0, 1.0))),
  TypeError,
  'bounds need real params',
)
row(
  'minimize',
  'a vector where a scalar belongs',
  lambda: traced(lambda: minimize(fun=lambda x: x)),
  TypeError,
  r'fun must return a real scalar of floats, got shape \(2,\)',
)
row(
  'minimize',
  'a count where a scalar belongs',
  lambda: traced(lambda: minimize(fun=lambda x: jnp.sum(x > 0))),
  TypeError,
  r'fun must return a real scalar .* dtype int',
)
row(
  'minimize',
  'words where a scalar belongs',
  lambda: traced(lambda: minimize(fun=lambda x: 'abc')),
  TypeError,
  "fun must return a scalar, got 'abc'",
)
row(
  'minimize',
  'NaN at the start: stops there and says so',
  lambda: (
    (result := minimize(params=X * NAN)).status == 4 and result.steps == 0
  ),
)
row(
  'value_and_grad',
  'integer params',
  lambda: estimate(value_and_grad(), ROWS, np.ones(2, int)),
  TypeError,
  'params must be floating, got dtype int',
)
row(
  'value_and_grad',
  'losses where their mean belongs',
  lambda: estimate(value_and_grad(fun=losses), ROWS),
  TypeError,
  'the loss must return a real scalar of floats, got shape',
)


argmin = family('argmin', lower=lambda x, y, batch: jnp.sum((y - x) ** 2))
ema = family('ema', tracker=X, now=X, rate=0.1)
storm = family('storm', tracker=X, now=X, before=X, beta=0.1)
msvr = family('msvr', tracker=X, now=X, before=X, alpha=0.1)
msvr_gamma = family('msvr_gamma', num_blocks=4, sampled=2, alpha=0.1)
for bad, error in ((0, ValueError), (2.0, TypeError), (None, TypeError)):
  row(
    'msvr_gamma',
    f'sampled={bad}',
    functools.partial(msvr_gamma, sampled=bad),
    error,
    f'sampled must be .*got {bad}',
  )
for make in (ema, storm, msvr):
  name = make.__name__
  for wrong, arguments, error, match in (
    (
      'an integer tracker',
      {'tracker': np.ones(2, int)},
      TypeError,
      'tracker .*',
    ),
    (
      'now of another shape',
      {'now': 1.0},
      ValueError,
      r'now has shape \(\), but',
    ),
    (
      'now of another tree',
      {'now': {'a': X}},
      ValueError,
      'structure of tracker',
    ),
    ('now=None', {'now': None}, ValueError, 'now must have the tree structure'),
    (
      'a scalar for a table',
      {'tracker': np.float32(1), 'blocks': BLOCKS},
      ValueError,
      r'tracker must be a table, .*got shapes \[\(\)\]',
    ),
    (
      'an empty table',
      {'tracker': {}, 'blocks': BLOCKS},
      ValueError,
      r'tracker must be a table, .*got shapes \[\]',
    ),
    (
      'rows for other blocks',
      {'tracker': TABLE_OF_4, 'blocks': BLOCKS, 'now': TABLE_OF_4},
      ValueError,
      r'now has shape \(4, 2\), but tracker\[blocks\] has shape \(2, 2\)',
    ),
    (
      'blocks that are no integers',
      {'tracker': TABLE_OF_4, 'blocks': BLOCKS * 1.0, 'now': DATA},
      TypeError,
      'blocks must be an integer array',
    ),
    (
      'a negative block',
      {'tracker': TABLE_OF_4, 'blocks': BLOCKS - 1, 'now': DATA},
      ValueError,
      'negative, got .* pad with num_blocks=4, which is dropped',
    ),
    (
      'more blocks than rows',
      {'tracker': TABLE_OF_4, 'blocks': np.arange(5), 'now': DATA},
      ValueError,
      'names 5 blocks, more than num_blocks=4',
    ),
  ):
    row(name, wrong, functools.partial(make, **arguments), error, match)


@pytest.mark.parametrize('row', table.rows, ids=inputs.identity)
def test_bad_input(row):
  inputs.check(row)


def test_docstrings_name_every_promised_error():
  inputs.check_docstrings(table.rows)
