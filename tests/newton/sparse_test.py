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


@pytest.mark.parametrize('binary', [True, False])
def test_products_derivatives_and_gram(binary):
  dense = data(binary)
  matrix = optlab.sparse_matrix(scipy.sparse.csr_array(dense), gram=True)
  x, w = jnp.linspace(-1.0, 2.0, 9), jnp.linspace(-1.0, 3.0, 30)
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
  expected = (
    dense @ x,
    jax.grad(dense_fun)(x),
    jax.hessian(dense_fun)(x) @ jnp.cos(x),
    dense.T @ np.diag(w) @ dense,
  )
  assert matrix.shape == dense.shape
  for actual, wanted in zip(everything(matrix), expected, strict=True):
    np.testing.assert_allclose(actual, wanted, rtol=1e-10, atol=1e-12)


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
