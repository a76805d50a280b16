"""Operators against explicit matrices."""

from typing import Any

import jax
import jax.experimental.sparse
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import pytest

import optlab
from optlab.newton import _operators as operators

pytestmark = pytest.mark.usefixtures('x64')


def tree(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'w': jnp.asarray(rng.normal(size=(3, 2))),
    'b': jnp.asarray(rng.normal(size=2)),
    'none': {},
  }


def batch(rows=5):
  rng = np.random.default_rng(1)
  labels = jnp.asarray(rng.integers(0, 2, size=rows))
  return jnp.asarray(rng.normal(size=(rows, 3))), labels


def model(params, batch):
  return jnp.tanh(batch[0] @ params['w'] + params['b'])


def cross_entropy(outputs, batch):
  logs = jax.nn.log_softmax(outputs)
  return -jnp.mean(jnp.take_along_axis(logs, batch[1][:, None], 1))


def explicit(fun, params):
  """Jacobian of ``fun`` as a matrix in the flattened parameters."""
  flat, unravel = ravel_pytree(params)
  return jax.jit(jax.jacobian(lambda x: fun(unravel(x))))(flat)


def explicit_hessian(fun, params):
  flat, unravel = ravel_pytree(params)
  return jax.jit(jax.hessian(lambda x: fun(unravel(x))))(flat)


def assert_operator(operator, matrix, like):
  """Products, the formed matrix and symmetry all agree with ``matrix``."""
  vector = jax.tree.map(lambda leaf: jnp.cos(leaf + 1.0), like)
  formed, product = jax.jit(
    lambda operator: (operators.as_matrix(operator, like), operator(vector))
  )(operator)
  np.testing.assert_allclose(formed, matrix, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(
    ravel_pytree(product)[0],
    matrix @ ravel_pytree(vector)[0],
    rtol=1e-10,
    atol=1e-12,
  )
  assert jax.tree.structure(product) == jax.tree.structure(like)


def test_hessian():
  fun = lambda params, batch: cross_entropy(model(params, batch), batch)
  operator = jax.jit(optlab.hessian(fun))(tree(), batch())
  expected = explicit_hessian(lambda params: fun(params, batch()), tree())
  assert_operator(operator, expected, tree())


def test_gauss_newton():
  operator = jax.jit(optlab.gauss_newton(model, cross_entropy))(tree(), batch())
  jacobian = explicit(lambda params: model(params, batch()).ravel(), tree())
  outer = jax.hessian(lambda u: cross_entropy(u.reshape(-1, 2), batch()))(
    model(tree(), batch()).ravel()
  )
  assert_operator(operator, jacobian.T @ outer @ jacobian, tree())
  fun = lambda params: cross_entropy(model(params, batch()), batch())
  exact = explicit_hessian(fun, tree())
  assert np.linalg.eigvalsh(exact)[0] < -1e-3  # The two do differ here.
  assert np.linalg.eigvalsh(jacobian.T @ outer @ jacobian)[0] > -1e-12


@pytest.mark.parametrize('p', [2, 3, 4, 5])
def test_gauss_newton_of_a_power_of_the_norm_is_the_papers_matrix(p):
  x = jnp.array([0.3, -1.2, 0.7])
  u = lambda x: jnp.stack([x[0] * x[1], x[1] ** 2 - x[2], jnp.sin(x[2])])
  factory = optlab.gauss_newton(u, lambda u: jnp.sum(u**2) ** (p / 2) / p)
  jacobian, norm = jax.jacobian(u)(x), jnp.linalg.norm(u(x))
  inner = jacobian.T @ u(x)
  expected = norm ** (p - 2) * jacobian.T @ jacobian
  expected += (p - 2) * norm ** (p - 4) * jnp.outer(inner, inner)
  assert_operator(jax.jit(factory)(x), expected, x)


def test_gauss_newton_weights_outputs_through_a_stopped_gradient():
  x = jnp.array([0.3, -1.2])
  u = lambda x: jnp.stack([x[0] * x[1], x[1] ** 2, x[0]])
  weights = jnp.exp
  loss = lambda u: 0.5 * jnp.sum(jax.lax.stop_gradient(weights(u)) * u**2)
  jacobian = jax.jacobian(u)(x)
  expected = jacobian.T @ jnp.diag(weights(u(x))) @ jacobian
  assert_operator(jax.jit(optlab.gauss_newton(u, loss))(x), expected, x)


def test_empirical_fisher_is_the_mean_of_outer_products():
  loss = lambda params, features, label: cross_entropy(
    model(params, (features[None],)), (None, label[None])
  )
  operator = jax.jit(optlab.empirical_fisher(loss))(tree(), *batch())
  gradient = jax.jit(jax.grad(loss))
  rows = jnp.stack(
    [
      ravel_pytree(gradient(tree(), features, label))[0]
      for features, label in zip(*batch(), strict=True)
    ]
  )
  assert operator.factor.shape == (5, 8)
  assert_operator(operator, rows.T @ rows / 5, tree())


def test_empirical_fisher_covers_the_rank_one_term_of_the_paper():
  p, x = 4, jnp.array([0.3, -1.2, 0.7])
  u = lambda x: jnp.stack([x[0] * x[1], x[1] ** 2 - x[2]])
  fun = lambda x: jnp.sum(u(x) ** 2) ** (p / 2) / p
  inner = jax.jacobian(u)(x).T @ u(x)
  norm = jnp.linalg.norm(u(x))
  expected = (p - 2) * norm ** (p - 4) * jnp.outer(inner, inner)
  factory = optlab.empirical_fisher(fun, lambda f: (p - 2) / (p * f))
  operator = jax.jit(factory)(x)
  assert operator.factor.shape == (1, 3)
  assert_operator(operator, expected, x)


def test_empirical_fisher_covers_the_weighted_gauss_newton_of_log_sum_exp():
  rng = np.random.default_rng(0)
  a, x, mu = jnp.asarray(rng.normal(size=(6, 3))), jnp.ones(3), 0.5
  weights = lambda terms: jax.nn.softmax(terms / mu) / mu
  operator = optlab.empirical_fisher(lambda x, a: a @ x, weights)(x, a)
  expected = a.T @ jnp.diag(jax.nn.softmax(a @ x / mu)) @ a / mu
  assert_operator(operator, expected, x)


def test_fisher_is_the_gauss_newton_matrix_of_the_cross_entropy():
  log_probs = lambda params, features: jax.nn.log_softmax(
    model(params, (features[None],))[0]
  )
  operator = jax.jit(optlab.fisher(log_probs))(tree(), batch()[0])
  expected = operators.as_matrix(
    jax.jit(optlab.gauss_newton(model, cross_entropy))(tree(), batch()), tree()
  )
  assert operator.factor.shape == (10, 8)
  assert_operator(operator, expected, tree())


def test_fisher_of_one_example():
  x = jnp.array([0.5, -0.5])
  operator = optlab.fisher(jax.nn.log_softmax)(x)
  probs = jax.nn.softmax(x)
  assert_operator(operator, jnp.diag(probs) - jnp.outer(probs, probs), x)


@pytest.mark.parametrize('make', ['hessian', 'low_rank', 'dense'])
def test_dense_forms_the_matrix(make):
  x = jnp.array([0.3, -1.2, 0.7])
  fun = lambda x: jnp.sum(x**4) + jnp.prod(x)
  factory = {
    'hessian': optlab.hessian(fun),
    'low_rank': optlab.empirical_fisher(fun),
    'dense': optlab.dense(optlab.hessian(fun)),
  }[make]
  grad = jax.grad(fun)(x)
  expected = (
    jnp.outer(grad, grad) if make == 'low_rank' else jax.hessian(fun)(x)
  )
  operator = jax.jit(optlab.dense(factory))(x)
  assert operator.matrix.shape == (3, 3)
  assert_operator(operator, expected, x)


@pytest.mark.parametrize('classes', [None, 3])
def test_linear_gauss_newton_is_the_hessian(classes):
  rng = np.random.default_rng(0)
  features = jnp.asarray(rng.normal(size=(20, 4)))
  if classes is None:
    x, targets = jnp.asarray(rng.normal(size=4)), jnp.sign(features[:, 0])
    loss = lambda u, batch: jnp.mean(jnp.logaddexp(0.0, -batch[1] * u))
  else:
    x = jnp.asarray(rng.normal(size=(4, classes)))
    targets = jnp.asarray(rng.integers(0, classes, size=20))
    loss = cross_entropy
  factory = optlab.linear_gauss_newton(lambda batch: batch[0], loss, l2=0.1)
  operator = jax.jit(factory)(x, (features, targets))
  fun = lambda x: loss(features @ x, (features, targets)) + 0.05 * jnp.sum(x**2)
  assert_operator(operator, explicit_hessian(fun, x), x)


def test_wide_targets_do_not_widen_the_work_of_narrow_inputs(x64):
  seen = []

  def loss(outputs, rows, targets):
    seen.append((outputs.dtype, rows.dtype, targets.dtype))
    return jnp.sum((outputs - targets) ** 2) / 2

  rows = jnp.asarray([[1.0, 2.0], [3.0, 4.0]], jnp.float32)
  factory = optlab.linear_gauss_newton(lambda rows, _: rows, loss)
  operator = factory(jnp.zeros(2), rows, jnp.zeros(2))
  assert set(seen) == {(jnp.dtype('float32'),) * 3}
  assert operator.matrix.dtype == jnp.float64
  np.testing.assert_allclose(operator.matrix, rows.T @ rows, rtol=1e-6)


def test_linear_gauss_newton_keeps_indefinite_weights_and_narrow_inputs():
  features = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3)))
  loss = lambda u: jnp.sum(jnp.cos(u))
  x = jnp.ones(3)
  operator = jax.jit(optlab.linear_gauss_newton(lambda: features, loss))(x)
  expected = explicit_hessian(lambda x: loss(features @ x), x)
  assert np.linalg.eigvalsh(expected)[0] < 0 < np.linalg.eigvalsh(expected)[-1]
  assert_operator(operator, expected, x)
  narrow = optlab.linear_gauss_newton(
    lambda: features.astype(jnp.float32), loss
  )(x)
  assert narrow.matrix.dtype == jnp.float64
  np.testing.assert_allclose(narrow.matrix, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', [int, bool, np.uint8, list, 'BCOO'])
def test_linear_gauss_newton_of_counts_flags_and_lists(kind):
  entries = np.array([[1, 0, 3], [0, 2, 1]])
  features: Any = entries.tolist()
  if kind == 'BCOO':
    features = jax.experimental.sparse.BCOO.fromdense(jnp.asarray(entries))
  elif kind is not list:
    features = entries.astype(kind)
    entries = features.astype(int)
  x, loss = jnp.array([0.3, -0.7, 0.2]), lambda u: jnp.sum(jnp.cosh(u))
  factory = jax.jit(optlab.linear_gauss_newton(lambda: features, loss))
  expected = jax.hessian(lambda x: loss(jnp.asarray(entries, float) @ x))(x)
  np.testing.assert_allclose(factory(x).matrix, expected, rtol=1e-5)


def test_operators_are_pytrees_that_cross_jit_and_vmap():
  fun = lambda x: jnp.sum(x**4)
  model = jnp.sin
  points = jnp.array([[0.1, 0.2], [0.3, 0.4]])
  for factory in (
    optlab.hessian(fun),
    optlab.gauss_newton(model, lambda u: jnp.sum(u**4)),
    optlab.empirical_fisher(fun),
    optlab.dense(optlab.hessian(fun)),
  ):
    made = jax.jit(jax.vmap(factory))(points)
    applied = jax.jit(jax.vmap(lambda op, v: op(v)))(made, points)
    alone = jnp.stack([factory(x)(x) for x in points])
    np.testing.assert_allclose(applied, alone, rtol=1e-12)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: optlab.hessian(3), 'fun must be a function'),
    (lambda: optlab.gauss_newton(model, None), 'loss must be a function'),
    (lambda: optlab.empirical_fisher(model, 2.0), 'weights must be a function'),
    (lambda: optlab.fisher('softmax'), 'log_probs must be a function'),
    (lambda: optlab.dense(jnp.eye(2)), 'factory must be a function'),
  ],
)
def test_not_a_function(make, message):
  with pytest.raises(TypeError, match=message):
    make()


def test_linear_gauss_newton_names_bad_params():
  factory = optlab.linear_gauss_newton(lambda: jnp.eye(2), jnp.sum)
  with pytest.raises(ValueError, match='one array of shape'):
    factory({'w': jnp.ones(2)})
  with pytest.raises(ValueError, match='l2 must be in'):
    optlab.linear_gauss_newton(lambda: jnp.eye(2), jnp.sum, l2=-1.0)


@pytest.mark.parametrize(
  'loss',
  [
    jax.nn.logsumexp,
    jnp.var,  # Its Hessian maps ones to zero.
    lambda u: jnp.sum(jnp.exp(u)) + 0.01 * jnp.sum(u) ** 2,
  ],
)
@pytest.mark.parametrize(
  'shape', [(3,), pytest.param((3, 2), marks=pytest.mark.slow)]
)
def test_a_loss_that_couples_rows_has_no_row_by_row_hessian(loss, shape):
  features = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)))
  factory = optlab.linear_gauss_newton(lambda: features, loss)
  assert jnp.all(jnp.isnan(factory(jnp.ones(shape)).matrix))


@pytest.mark.parametrize(
  'log_probs', [lambda x, a: a * x, lambda x, a: jax.nn.softmax(a * x)]
)
def test_fisher_of_what_is_no_distribution_is_nan(log_probs):
  product = optlab.fisher(log_probs)(jnp.zeros(2), jnp.ones((4, 2)))
  assert jnp.all(jnp.isnan(product(jnp.ones(2))))


one = lambda x, a: jnp.sum(x * a) ** 2
OTHERS = {
  'a fun of a vector': (
    lambda: optlab.hessian(jnp.sin)(jnp.ones(2)),
    'fun must return a real scalar of floats, got shape',
  ),
  'a fun with aux': (
    lambda: optlab.hessian(lambda x: (jnp.sum(x), 3))(jnp.ones(2)),
    'fun must return a scalar',
  ),
  'params of integers': (
    lambda: optlab.hessian(jnp.sum)(jnp.arange(2)),
    'params must be floating, got dtype int',
  ),
  'a loss of a vector': (
    lambda: optlab.gauss_newton(jnp.sin, jnp.sin)(jnp.ones(2)),
    'loss must return a real scalar of floats, got shape',
  ),
  'outputs of integers': (
    lambda: optlab.gauss_newton(jnp.argmax, lambda u: 2.0 * u)(jnp.ones(2)),
    r'model\(params\) must be floating, got dtype int',
  ),
  'no examples': (
    lambda: optlab.empirical_fisher(one)(jnp.ones(2), jnp.ones((0, 2))),
    r'one leading axis, over one example or more; got shapes \[\(0, 2\)\]',
  ),
  'examples of two numbers': (
    lambda: optlab.fisher(one)(jnp.ones(2), (jnp.ones(2), jnp.ones(3))),
    r'one leading axis, .*; got shapes \[\(2,\), \(3,\)\]',
  ),
  'weights of another number': (
    lambda: optlab.empirical_fisher(one, lambda losses: jnp.ones(3))(
      jnp.ones(2), jnp.ones((2, 2))
    ),
    r'weights must return one number an example, shape \(2,\), got shape',
  ),
  'one class': (
    lambda: optlab.fisher(lambda x, a: jax.nn.log_sigmoid(x * a))(
      jnp.ones(1), jnp.ones(4)
    ),
    r'\(classes,\) for two or more, got shape \(1,\)',
  ),
}


@pytest.mark.parametrize('make, message', OTHERS.values(), ids=OTHERS.keys())
def test_what_a_factory_is_given_is_named(make, message):
  with pytest.raises((TypeError, ValueError), match=message):
    make()
