"""What the public functions of newton say to bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse

import optlab
from tests import inputs
from tests.inputs import INDEFINITE
from tests.inputs import NAN
from tests.inputs import ROWS
from tests.inputs import X
from tests.inputs import family
from tests.inputs import loss
from tests.inputs import losses
from tests.inputs import traced
from tests.inputs import update
from tests.inputs import zero
from tests.public import PUBLIC

table = inputs.Table()
row = table.row

# Newton: curvature, solvers, the method.

hessian = family('hessian', fun=loss)
gauss_newton = family('gauss_newton', model=loss, loss=jnp.sum)
empirical_fisher = family('empirical_fisher', loss=loss)
fisher = family('fisher', log_probs=jax.nn.log_softmax)
linear_gauss_newton = family(
  'linear_gauss_newton', inputs=lambda a: a, loss=lambda u, a: jnp.sum(u**2)
)
dense = family('dense', factory=optlab.hessian(loss))
for name, make in (
  ('hessian', optlab.hessian),
  ('gauss_newton', lambda fun: optlab.gauss_newton(losses, fun)),
  ('dense', lambda fun: optlab.dense(optlab.hessian(fun))),
):
  row(
    name,
    'a vector where a scalar belongs',
    lambda make=make: traced(lambda: make(lambda u, b: u)(X, ROWS)(X)),
    TypeError,
    'must return a real scalar of floats, got shape',
  )
  row(
    name,
    'integer params',
    lambda make=make: traced(
      lambda: make(lambda u, b: jnp.sum(u))(np.ones(2, int), ROWS)(X)
    ),
    TypeError,
    'params must be floating, got dtype int',
  )
row(
  'fisher',
  'one number where one a class belongs',
  lambda: traced(lambda: fisher(log_probs=jnp.sum)(X)(X)),
  ValueError,
  r'log_probs must return one number a class .*got shape \(\)',
)
row(
  'empirical_fisher',
  'examples of two lengths',
  lambda: traced(
    lambda: empirical_fisher(loss=lambda x, a, b: a @ x)(X, ROWS, ROWS[:2])(X)
  ),
  ValueError,
  'one leading axis, over one example or more',
)
for wrong, params in (('a tree', {'a': X}), ('a cube', np.ones((2, 2, 2)))):
  row(
    'linear_gauss_newton',
    f'params are {wrong}',
    lambda params=params: linear_gauss_newton()(params, ROWS),
    ValueError,
    r'params that are one array of shape \(d,\) or \(d, classes\), got',
  )

for wrong, features, error, match in (
  ('a scipy matrix', scipy.sparse.eye_array(2), TypeError, 'optlab.sparse_mat'),
  ('a vector', np.ones(2), ValueError, r'matrix of shape \(m, 2\), .*\(2,\)'),
  ('too wide', np.ones((3, 5)), ValueError, r'shape \(m, 2\), .* \(3, 5\)'),
):
  row(
    'linear_gauss_newton',
    f'inputs are {wrong}',
    lambda features=features: linear_gauss_newton(inputs=lambda _: features)(
      X, ROWS
    ),
    error,
    match,
  )

KRYLOV = ('cg', 'lanczos', 'multishift_cg')
SOLVERS = ('cholesky', 'eigh', 'woodbury', *KRYLOV)
for name in KRYLOV:
  family(name)
for name in SOLVERS:
  solver = family(name)()
  for wrong, operator, error, match in (
    ('a bare matrix', np.eye(2), TypeError, 'wrap a matrix in optlab.Dense'),
    ('operator=None', None, TypeError, 'operator must be a function v -> A v'),
    (
      'a Dense operator of another size',
      optlab.Dense(np.eye(3)),
      ValueError,
      r'operator must have a matrix of shape \(2, 2\), got \(3, 3\)',
    ),
    (
      'a LowRank operator of another size',
      optlab.newton.LowRank(np.ones((1, 3))),
      ValueError,
      r'operator must have a factor of shape \(r, 2\), got \(1, 3\)',
    ),
  ):
    if name == 'woodbury' and wrong != 'a LowRank operator of another size':
      error, match = TypeError, 'woodbury needs an operator with a factor'
    row(
      {'Dense': 'Dense', 'LowRank': 'LowRank'}.get(
        type(operator).__name__, name
      ),
      f'{name}: {wrong}',
      lambda solver=solver, operator=operator: traced(
        lambda: solver(operator, X, 1.0)(1.0)
      ),
      error,
      match,
    )
for name in ('cholesky', 'eigh', *KRYLOV):
  row(
    name,
    'an indefinite matrix: not ok',
    lambda name=name: (
      not PUBLIC[name]()(optlab.Dense(INDEFINITE), X, 0.5)(0.5)[1]
    ),
  )
for name in SOLVERS:
  row(
    name,
    'a shift that is NaN: not ok',
    lambda name=name: (
      not PUBLIC[name]()(
        optlab.newton.LowRank(np.ones((1, 2), np.float32)), X, jnp.float32(NAN)
      )(jnp.float32(NAN))[1]
    ),
  )

KEY = jax.random.key(0)
for name in ('hutchinson', 'row_norms'):
  make = family(name, key=KEY)
  for bad in (0, None, 'key'):
    row(
      name,
      f'key={bad!r}',
      functools.partial(make, key=bad),
      TypeError,
      r'key must be a PRNG key such as jax.random.key\(0\), got',
    )
family('layerwise', factory=optlab.hessian(loss))
for name in ('leaf_blocks', 'blockwise'):
  family(name)
row(
  'leaf_blocks',
  'an indefinite operator: not ok',
  lambda: (
    not PUBLIC['cg'](preconditioner=PUBLIC['leaf_blocks']())(
      optlab.Dense(INDEFINITE), X, 0.5
    )(0.5)[1]
  ),
)
row(
  'blockwise',
  'an operator without blocks',
  lambda: traced(lambda: PUBLIC['blockwise']()(lambda v: v, X, 1.0)(1.0)),
  TypeError,
  'blockwise needs an operator with blocks, such as layerwise',
)
for bad in (lambda *_: X, lambda *_: (X, 2), lambda *_: None):
  row(
    'cg',
    f'a preconditioner that returns {bad()}',
    lambda bad=bad: traced(
      lambda: PUBLIC['cg'](preconditioner=bad)(lambda v: v, X, 1.0)(1.0)
    ),
    TypeError,
    r'preconditioner must return \(operator, products\)',
  )

least_squares = family('least_squares', residuals=lambda x: x - 1.0, params=X)
for kind, dtype in (('counts', int), ('complex numbers', complex)):
  row(
    'least_squares',
    f'residuals that are {kind}',
    lambda dtype=dtype: traced(
      lambda: least_squares(residuals=lambda x: {'r': x.astype(dtype)})
    ),
    TypeError,
    r"residuals must return real floats, got dtype .* in residuals\['r'\]",
  )
row(
  'least_squares',
  'a curvature of its own',
  lambda: least_squares(curvature=optlab.hessian(jnp.sum)),
  TypeError,
  'least_squares makes its own curvature, got .*; give another one to minimize',
)
for name in ('adaptive', 'double', 'hold', 'measured'):
  family(name)
gns_newton = family('gns_newton')
gns_newton_paper = family('gns_newton_paper')
VALUES = {'value': 2.0, 'grad': X, 'value_fn': lambda x: jnp.sum(x**2)}
for make in (gns_newton, gns_newton_paper):
  name = make.__name__
  for wrong, metric, error, match in (
    ('a zero', np.array([1.0, 0.0]), ValueError, r'metric must be in \(0.0'),
    ('NaN', {'a': NAN}, ValueError, r"metric\['a'\] must be in \(0.0, inf"),
    (
      'negative',
      optlab.Dense(-np.eye(2)),
      ValueError,
      r'metric must be in \(0.0, inf\), got ',
    ),
    ('a word', 'B', TypeError, "metric must be a real number, got 'B'"),
  ):
    row(
      name,
      f'a metric with {wrong}',
      functools.partial(make, metric=metric),
      error,
      match,
    )
  for missing in VALUES:
    row(
      name,
      f'no {missing}',
      lambda make=make, missing=missing: update(
        make(), **{k: v for k, v in VALUES.items() if k != missing}
      ),
      ValueError,
      rf'gns_newton needs the extra argument {missing}: pass {missing}=\.\.\.'
      ' to update, or take them from the estimator value_and_grad',
    )
  for wrong, change, error, match in (
    (
      'no function',
      {'value_fn': 1.0},
      TypeError,
      'value_fn must be a function',
    ),
    (
      'a matrix',
      {'curvature': np.eye(2)},
      TypeError,
      'curvature .*optlab.Dense',
    ),
    (
      'a curvature of another size',
      {'curvature': optlab.Dense(np.eye(3))},
      ValueError,
      r'curvature must have a matrix of shape \(2, 2\), got \(3, 3\)',
    ),
    ('another tree', {'grad': {'a': X}}, ValueError, 'grad must have the tree'),
    ('another shape', {'grad': ROWS}, ValueError, r'grad has shape \(4, 2\)'),
  ):
    row(
      name,
      f'{wrong} for {next(iter(change))}',
      lambda make=make, change=change: update(make(), **(VALUES | change)),
      error,
      match,
    )
  row(
    name,
    'params=None in update',
    lambda make=make: make().update(X, make().init(X), None, **VALUES),
    ValueError,
    'needs the extra argument params',
  )
  row(
    name,
    'a metric of another tree',
    lambda make=make: update(make(metric={'a': X}), **VALUES),
    ValueError,
    'metric must have the tree structure of params',
  )
row(
  'gns_newton',
  'a solver that returns a function',
  lambda: update(gns_newton(solver=lambda *_: lambda s: (X, True)), **VALUES),
  TypeError,
  r'solver must return optlab.newton.Prepared\(solve, products\)',
)
for bad in (optlab.newton.hold, 'hold', 2.0, optax.sgd(0.1)):
  row(
    'gns_newton',
    f'rule={bad!r}',
    functools.partial(gns_newton, rule=bad),
    TypeError,
    r'rule must be a SearchRule such as optlab.newton.hold\(\) makes, got',
  )
row(
  'gns_newton',
  'an empty tree: an empty update',
  lambda: (
    update(
      gns_newton(), {}, {}, value=0.0, grad={}, value_fn=lambda p: jnp.zeros(())
    )[0]
    == {}
  ),
)
row(
  'gns_newton',
  'a gradient with NaN: a zero update, no trial',
  lambda: (
    (
      result := gns_newton().update(
        X, gns_newton().init(X), X, **(VALUES | {'value': NAN})
      )
    )
    and zero(result[0])
    and result[1].info.trials == 0
  ),
)

matrix = scipy.sparse.csr_matrix(np.eye(3, 2))
sparse_matrix = family('sparse_matrix', matrix=matrix)
row(
  'sparse_matrix',
  'complex entries',
  lambda: sparse_matrix(matrix=matrix * 1j),
  TypeError,
  'matrix must be real, got dtype complex128',
)
for bad in (np.eye(2), None, [[1.0]]):
  row(
    'sparse_matrix',
    f'matrix={type(bad).__name__}',
    functools.partial(sparse_matrix, matrix=bad),
    TypeError,
    f'matrix must be a scipy sparse matrix, got {type(bad).__name__}; use a',
  )
for vector, error, match in (
  (np.ones(3), ValueError, r'vector must have shape \(2,\) .*got \(3,\)'),
  (1.0, ValueError, r'vector must have shape \(2,\) .*got \(\)'),
  (np.ones(2, int), TypeError, 'vector must be floating.*got dtype int'),
):
  row(
    'SparseMatrix',
    f'times {vector!r}',
    lambda vector=vector: sparse_matrix() @ vector,
    error,
    match,
  )
row(
  'SparseMatrix',
  'gram without gram=True',
  lambda: sparse_matrix().gram(np.ones(3)),
  ValueError,
  r'make it with sparse_matrix\(\.\.\., gram=True\)',
)
row(
  'SparseMatrix',
  'weights of another length',
  lambda: sparse_matrix(gram=True).gram(jnp.ones(2)),
  ValueError,
  r'weights must have shape \(3,\), one a row, got \(2,\)',
)


@pytest.mark.parametrize('row', table.rows, ids=inputs.identity)
def test_bad_input(row):
  inputs.check(row)


def test_docstrings_name_every_promised_error():
  inputs.check_docstrings(table.rows)
