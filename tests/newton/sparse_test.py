"""Sparse products against dense ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import optlab

pytestmark = pytest.mark.usefixtures('x64')


def data(binary, seed=0):
  rng = np.random.default_rng(seed)
  filled = rng.random((30, 9)) < np.linspace(0.0, 0.9, 9)
  filled[3] = False  # An empty row; the first column is empty too.
  values = np.ones((30, 9)) if binary else rng.normal(size=(30, 9))
  return filled * values


def one_hot(binary, seed=0):
  """Two groups that sum to one, an intercept, and columns that do neither."""
  rng = np.random.default_rng(seed)
  group = lambda classes: np.eye(classes)[rng.integers(classes, size=30)]
  plain = data(binary)
  some = group(3) * (np.arange(30) > 0)[:, None]  # One row has none of them.
  parts = [some, group(4), np.ones((30, 1)), plain, group(2), some]
  return np.concatenate(parts, axis=1)


CASES = {
  'plain': data,
  'one-hot': one_hot,
  'intercept alone': lambda binary: np.ones((30, 1)) * (1 if binary else 2),
  'empty': lambda binary: np.zeros((30, 2)),
}


@pytest.mark.parametrize('kind', CASES)
@pytest.mark.parametrize('binary', [True, False])
def test_products_derivatives_and_gram(kind, binary):
  dense = CASES[kind](binary)
  d = dense.shape[1]
  matrix = optlab.sparse_matrix(scipy.sparse.csr_array(dense), gram=True)
  x, w = np.linspace(-1.0, 2.0, d), np.linspace(-1.0, 3.0, 30)
  loss = lambda u: jnp.sum(w * jnp.sin(u))

  @jax.jit
  def everything(matrix):
    fun = lambda x: loss(matrix @ x)
    return (
      matrix @ x,
      jax.grad(fun)(x),
      optlab.hessian(fun)(x)(jnp.cos(x)),
      matrix.gram(w),
    )

  dense_fun = lambda x: loss(dense @ x)
  expected = jax.jit(
    lambda: (
      dense @ x,
      jax.grad(dense_fun)(x),
      jax.hessian(dense_fun)(x) @ jnp.cos(x),
      dense.T @ np.diag(w) @ dense,
    )
  )()
  assert matrix.shape == dense.shape
  found = everything(matrix)
  for actual, wanted in zip(found, expected, strict=True):
    np.testing.assert_allclose(actual, wanted, rtol=1e-10, atol=1e-12)
  np.testing.assert_array_equal(found[-1], found[-1].T)


@pytest.mark.parametrize('kind', CASES)
def test_products_are_batched_and_differentiated_like_dense_ones(kind):
  dense = CASES[kind](False)
  d = dense.shape[1]
  matrix = optlab.sparse_matrix(scipy.sparse.csr_array(dense))
  x = jnp.linspace(-1.0, 2.0, 2 * d).reshape(2, d)

  def scaled(t):
    """The entries, where there are some, times ``t``."""
    floats = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda x: x * t if floats(x) else x, matrix)

  def everything(a, of):
    fun = lambda x: jnp.sum(jnp.sin(a @ x))
    slope = lambda t: jnp.cos(jax.grad(lambda x: jnp.sum(of(t) @ x) ** 2)(x[0]))
    return (
      jax.vmap(lambda x: a @ x)(x),
      a @ x.T,
      jax.vmap(jax.grad(fun))(x),
      jax.grad(lambda x: jnp.sum(jax.vmap(fun)(x) ** 2))(x),
      jax.hessian(fun)(x[0]),
      optlab.dense(optlab.hessian(fun))(x[0]).matrix,
      jax.jacfwd(slope)(1.2),
    )

  of = lambda t: t * dense
  if matrix.rows.values is None:  # Of ones; what no leaf holds stays so.
    of = lambda t: dense
  expected = jax.jit(lambda: everything(jnp.asarray(dense), of))()
  found = jax.jit(lambda: everything(matrix, scaled))()
  assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
  parts = zip(found, expected, strict=True)
  for actual, wanted in list(parts)[: -1 if matrix.one_hot else None]:
    np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-11)


def test_many_matrices_and_what_a_minimizer_owes_to_its_data():
  dense = data(False)
  matrix = optlab.sparse_matrix(scipy.sparse.csr_array(dense))
  both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), matrix)
  found = jax.vmap(lambda a: jax.grad(lambda x: jnp.sum((a @ x) ** 2))(
    jnp.ones(9)
  ))(both)  # fmt: skip
  wanted = 2 * dense.T @ dense @ np.ones(9)
  np.testing.assert_allclose(found, [wanted, wanted], rtol=1e-12)

  @jax.jit
  def slope(a, c):
    fun = lambda x: jnp.sum((a @ x - c) ** 2) + x @ x
    return jax.grad(lambda c: optlab.minimize(
      lambda x: fun(x) - c * jnp.sum(a @ x), jnp.zeros(9), optlab.gns_newton(),
      max_steps=20, grad_tol=1e-8,
    ).params.sum())(c)  # fmt: skip

  inverse = np.linalg.inv(2 * dense.T @ dense + 2 * np.eye(9))
  wanted = np.sum(inverse @ dense.T @ np.ones(30))
  np.testing.assert_allclose(slope(matrix, 0.3), wanted, rtol=1e-8)


def test_the_fullest_column_of_a_group_is_not_stored():
  dense = one_hot(True)
  matrix = optlab.sparse_matrix(scipy.sparse.csr_array(dense), gram=True)
  assert matrix.one_hot is not None
  left_out = np.asarray(matrix.one_hot.left_out)
  assert len(left_out) == 3  # The intercept is a group of its own.
  fullest = 3 + np.argmax(dense[:, 3:7].sum(0))
  assert fullest in left_out
  stored = np.sum(np.asarray(matrix.rows.index) < dense.shape[1])
  assert stored == np.count_nonzero(dense) - dense[:, left_out].sum()


@pytest.mark.parametrize('narrow', [None, jnp.float32])
def test_linear_gauss_newton_takes_it(narrow):
  dense = data(False)
  matrix = optlab.sparse_matrix(scipy.sparse.csr_array(dense), gram=True)
  labels = jnp.where(jnp.arange(30) % 3 == 0, 1.0, -1.0)
  loss = lambda u: jnp.mean(jnp.logaddexp(0.0, -labels * u))
  x = jnp.linspace(-1.0, 2.0, 9)
  sparse, expected = (
    optlab.linear_gauss_newton(lambda a=a: a, loss, 0.1, narrow)(x).matrix
    for a in (matrix, jnp.asarray(dense))
  )
  assert sparse.dtype == jnp.float64
  tolerance = 1e-10 if narrow is None else 1e-5
  np.testing.assert_allclose(sparse, expected, rtol=tolerance, atol=tolerance)
  with pytest.raises(ValueError, match=r'shape \(d,\) only'):
    optlab.linear_gauss_newton(lambda: matrix, loss)(jnp.ones((9, 2)))


def test_what_is_missing_or_wrong_is_named():
  matrix = optlab.sparse_matrix(scipy.sparse.eye_array(3))
  with pytest.raises(ValueError, match='gram=True'):
    matrix.gram(jnp.ones(3))
  with pytest.raises(ValueError, match='at most 46,340 columns, got 50,000'):
    optlab.sparse_matrix(scipy.sparse.csr_array((3, 50_000)), gram=True)
  with pytest.raises(TypeError, match='must be a scipy sparse matrix'):
    optlab.sparse_matrix(np.eye(3))


def test_what_made_the_vector_is_not_computed_again_in_the_gather():
  # XLA fused it there once: an exponential for every entry of the table.
  data = scipy.sparse.random_array((50, 9), density=0.4, rng=0)
  matrix = optlab.sparse_matrix(data, gram=True)
  fun = lambda x: matrix.gram(jnp.exp(matrix @ jnp.exp(x)))
  text = jax.jit(fun).lower(jnp.ones(9)).compile().as_text()
  gathered_from = re.findall(r' gather\(%(\w+)', text)
  assert len(gathered_from) == 2
  # The operand comes from outside of the fusion that gathers.
  assert all('param' in name for name in gathered_from)
