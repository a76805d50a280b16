"""Shifted solvers against numpy.linalg.solve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optlab
from optlab.newton import _krylov

N = 12


def orthogonal(seed=0):
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))[0]


def symmetric(values):
  q = orthogonal()
  return (q * np.asarray(values)) @ q.T


def right_side():
  return np.random.default_rng(1).normal(size=N)


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, operator, b, smallest, shift):
  return solver(operator, b, smallest)(shift)


DEFINITE = np.geomspace(1e-3, 10.0, N)
SINGULAR = np.where(np.arange(N) < 4, 0.0, DEFINITE)
INDEFINITE = np.linspace(-1.0, 3.0, N)

EXACT = {
  'cholesky': optlab.cholesky(),
  'eigh': optlab.newton.eigh(),
  'cg': optlab.cg(max_steps=200, rtol=1e-13, power=0.0),
  'lanczos': optlab.lanczos(rtol=1e-13, power=0.0),
  'multishift_cg': optlab.newton.multishift_cg(
    max_steps=200, rtol=1e-13, power=0.0
  ),
}
over_solvers = pytest.mark.parametrize(
  'solver', EXACT.values(), ids=EXACT.keys()
)


@over_solvers
@pytest.mark.parametrize('form', ['dense', 'matrix_free'])
@pytest.mark.parametrize(
  'values', [DEFINITE, SINGULAR, INDEFINITE], ids=['pd', 'singular', 'indef']
)
def test_agrees_with_numpy_over_many_shifts(x64, solver, form, values):
  matrix = symmetric(values)
  dense = optlab.Dense(jnp.asarray(matrix))
  operator = dense if form == 'dense' else jax.tree_util.Partial(dense)
  b = right_side()
  smallest = 1e-2 + max(0.0, -values[0])

  @jax.jit
  def solve_all(shifts):
    return jax.vmap(solver(operator, jnp.asarray(b), shifts[0]))(shifts)

  shifts = smallest * np.geomspace(1.0, 1e3, 7)
  solutions, ok = solve_all(shifts)
  assert np.all(ok)
  for x, shift in zip(solutions, shifts, strict=True):
    expected = np.linalg.solve(matrix + shift * np.eye(N), b)
    np.testing.assert_allclose(x, expected, rtol=1e-8, atol=1e-10)


@over_solvers
def test_not_ok_where_the_shifted_operator_is_not_definite(x64, solver):
  operator = optlab.Dense(jnp.asarray(symmetric(INDEFINITE)))
  b = jnp.asarray(right_side())
  # Prepared for a shift that is too small, it serves those that are not.
  assert not solve(solver, operator, b, 0.25, 0.25)[1]
  assert not solve(solver, operator, b, 0.25, 0.5)[1]
  x, ok = solve(solver, operator, b, 0.25, 2.0)
  assert ok
  np.testing.assert_allclose(
    x, np.linalg.solve(operator.matrix + 2.0 * np.eye(N), b), rtol=1e-8
  )


@pytest.mark.parametrize('name', ['cholesky', 'eigh'])
def test_direct_solvers_refuse_a_singular_matrix(x64, name):
  matrix = np.ones((3, 3))  # Rank one; the pivots are exact zeros or rounding.
  system = EXACT[name], optlab.Dense(jnp.asarray(matrix)), jnp.arange(3.0), 0.0
  assert not solve(*system, 0.0)[1]
  assert not solve(*system, -1e-3)[1]
  assert solve(*system, 1e-3)[1]


@over_solvers
def test_non_finite_operators_are_not_ok(solver):
  operator = optlab.Dense(jnp.full((3, 3), jnp.nan))
  assert not solve(solver, operator, jnp.ones(3), 1.0, 1.0)[1]


@pytest.mark.parametrize('rank', [1, 5])
@pytest.mark.parametrize('shift', [1e-6, 1e-3, 1.0, 1e3])
def test_woodbury_agrees_with_numpy(x64, rank, shift):
  factor = np.random.default_rng(0).normal(size=(rank, N))
  operator = optlab.newton.LowRank(jnp.asarray(factor))
  b = factor[0] + 1e-3 * right_side()  # Nearly in the range: cancellation.
  solver = optlab.newton.woodbury()
  x, ok = solve(solver, operator, jnp.asarray(b), shift, shift)
  matrix = factor.T @ factor + shift * np.eye(N)
  assert ok
  np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-7)
  assert not solve(solver, operator, jnp.asarray(b), 0.0, 0.0)[1]


@over_solvers
def test_low_rank_operators_suit_every_solver(x64, solver):
  factor = np.random.default_rng(0).normal(size=(4, N))
  b = right_side()
  operator = optlab.newton.LowRank(jnp.asarray(factor))
  x, ok = solve(solver, operator, jnp.asarray(b), 0.1, 0.1)
  assert ok
  matrix = factor.T @ factor + 0.1 * np.eye(N)
  np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-8)


@pytest.mark.parametrize('name', ['cholesky', 'woodbury'])
def test_a_matrix_that_an_explicit_mesh_splits_is_gathered(name):
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Explicit,)
  )
  put = lambda array, *spec: jax.device_put(
    jnp.asarray(array, jnp.float32), jax.NamedSharding(mesh, jax.P(*spec))
  )
  wide, b = symmetric(DEFINITE), right_side()
  make, matrix = optlab.Dense, wide
  solvers = [optlab.cholesky(), optlab.newton.eigh()]
  if name == 'woodbury':
    make, matrix = optlab.newton.LowRank, wide.T @ wide
    solvers = [optlab.newton.woodbury()]
  split, target = put(wide, 'data', None), put(b, 'data')
  solvers.append(optlab.lanczos(rtol=1e-6))

  @jax.jit
  def solved(split, target):
    return [s(make(split), target, 1.0)(1.0)[0] for s in solvers]

  with jax.set_mesh(mesh):
    for x in solved(split, target):
      assert jax.typeof(x).sharding.spec == jax.P('data')
      np.testing.assert_allclose(
        x, np.linalg.solve(matrix + np.eye(N), b), rtol=1e-3, atol=1e-4
      )


def test_woodbury_names_an_operator_without_factor():
  with pytest.raises(TypeError, match='needs an operator with a factor'):
    optlab.newton.woodbury()(optlab.Dense(jnp.eye(2)), jnp.ones(2), 1.0)


@over_solvers
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_pytrees_in_and_out_in_their_dtype(solver, dtype):
  b = {'w': jnp.ones((2, 2), dtype), 'b': jnp.ones((), dtype), 'none': {}}
  triple = lambda v: jax.tree.map(lambda leaf: 3 * leaf, v)
  operator = jax.tree_util.Partial(triple)
  x, ok = solve(solver, operator, b, 1.0, 1.0)
  assert ok
  assert jax.tree.structure(x) == jax.tree.structure(b)
  for leaf, like in zip(jax.tree.leaves(x), jax.tree.leaves(b), strict=True):
    assert leaf.dtype == dtype and leaf.shape == like.shape
    np.testing.assert_allclose(leaf.astype(jnp.float32), 0.25, rtol=1e-2)


@over_solvers
def test_zero_right_side_and_empty_tree(solver):
  operator = optlab.Dense(jnp.eye(3))
  x, _ = solve(solver, operator, jnp.zeros(3), 1.0, 1.0)
  np.testing.assert_array_equal(x, np.zeros(3))
  identity = jax.tree_util.Partial(lambda v: v)
  x, _ = solve(solver, identity, {}, 1.0, 1.0)
  assert x == {}


def test_lanczos_takes_one_basis_and_no_product_for_a_shift(x64):
  operator = optlab.Dense(jnp.asarray(symmetric(DEFINITE)))
  prepared = optlab.lanczos(rtol=1e-13, power=0.0)(
    operator, jnp.asarray(right_side()), 1e-2
  )
  assert isinstance(prepared, optlab.newton.Prepared)
  assert 0 < prepared.products <= N
  assert prepared.solve(1.0)[2] == 0
  single = optlab.cg(max_steps=200, rtol=1e-13, power=0.0)(
    operator, jnp.asarray(right_side()), 1e-2
  )
  assert single.products == 0 and single.solve(1.0)[2] > 0


def test_lanczos_stops_at_the_residual_asked_for(x64):
  values = np.geomspace(1e-4, 1.0, 60)
  matrix = np.diag(values)
  b = np.ones(60)

  @jax.jit
  def solve_to(rtol):
    prepared = optlab.lanczos(rtol=rtol, power=0.0)(
      optlab.Dense(jnp.asarray(matrix)), jnp.asarray(b), 1e-3
    )
    return *prepared(1e-3), prepared.products

  sizes = []
  for rtol in (1e-1, 1e-3, 1e-6):
    x, ok, size = solve_to(rtol)
    residual = b - matrix @ x - 1e-3 * np.asarray(x)
    # Just below it: not more work than needed.
    ratio = np.linalg.norm(residual) / np.linalg.norm(b) / rtol
    assert ok and 1e-2 < ratio <= 1.0
    sizes.append(int(size))
  assert sizes[0] < sizes[1] < sizes[2] < 60


def test_lanczos_at_its_limit_gives_a_descent_direction(x64):
  matrix, b = symmetric(DEFINITE), right_side()
  x, ok = optlab.lanczos(max_steps=3, rtol=1e-12, power=0.0)(
    optlab.Dense(jnp.asarray(matrix)), jnp.asarray(b), 1e-3
  )(1e-3)
  assert ok and b @ x > 0


def no_solver(operator, b, shift):
  """One that must not be asked."""
  del operator, shift
  return optlab.newton.Prepared(lambda shift: (jnp.nan * b, jnp.bool_(True), 0))


@pytest.mark.parametrize('dtype', [jnp.float64, jnp.float32])
def test_few_products_are_enough_or_a_factorization_is(x64, dtype):
  q = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
  make = lambda values: optlab.Dense(jnp.asarray((q * values) @ q.T, dtype))
  b = jnp.asarray(np.random.default_rng(1).normal(size=40), dtype)

  @functools.partial(jax.jit, static_argnums=0)
  def run(fallback, matrix, shift):
    prepared = _krylov.few_products(fallback, 20, 0.01)(matrix, b, shift)
    return prepared(shift), prepared.products

  def residual(matrix, x, shift):
    left = matrix.matrix @ x + shift * x - b
    return float(jnp.linalg.norm(left) / jnp.linalg.norm(b))

  easy, bad = make(np.linspace(1.0, 10.0, 40)), make(np.geomspace(1e-6, 1, 40))
  (x, ok), products = run(no_solver, easy, 0.1)
  assert ok and 0 < products < 20
  assert 1e-5 < residual(easy, x, 0.1) <= 0.01
  (x, ok), products = run(optlab.cholesky(), bad, 1e-5)
  assert ok and products < 20  # Not all, for nothing.
  np.testing.assert_array_equal(x, optlab.cholesky()(bad, b, 0.0)(1e-5)[0])
  # What the basis shows not to be definite is not, and is not factorized.
  indefinite = make(np.linspace(-1.0, 3.0, 40))
  assert not run(no_solver, indefinite, 0.01)[0][1]
  # Of several systems the factorization is none that all pay.
  shifts = jnp.asarray([0.1, 1.0], dtype)
  (x, ok), _ = jax.vmap(lambda shift: run(no_solver, easy, shift))(shifts)
  assert jnp.all(ok) and jnp.all(jnp.isfinite(x))
  text = run.lower(optlab.cholesky(), bad, 1e-5).compile().as_text()
  assert 'potrf' in text and 'potrf' not in text.split('ENTRY')[1]
  empty = optlab.Dense(jnp.full((40, 40), jnp.nan, dtype))
  assert not run(no_solver, empty, 0.1)[0][1]


def test_an_invariant_subspace_ends_the_basis(x64):
  b = jnp.asarray([1.0, 1.0, 0.0, 0.0])
  prepared = optlab.lanczos(rtol=1e-15, power=0.0)(
    optlab.Dense(jnp.diag(jnp.array([1.0, 2.0, 3.0, 4.0]))), b, 0.0
  )
  assert prepared.products == 2
  np.testing.assert_allclose(prepared(0.0)[0], [1.0, 0.5, 0, 0], atol=1e-14)


def test_dense_solvers_count_the_products_that_form_the_matrix():
  operator = lambda v: 2.0 * v
  assert optlab.cholesky()(operator, jnp.ones(5), 1.0).products == 5
  assert (
    optlab.cholesky()(optlab.Dense(jnp.eye(5)), jnp.ones(5), 1.0).products == 0
  )


def test_multishift_takes_one_sequence_for_its_shifts(x64):
  operator = optlab.Dense(jnp.asarray(symmetric(INDEFINITE)))
  b = jnp.asarray(right_side())

  @functools.partial(jax.jit, static_argnums=0)
  def run(make, shift, shifts):
    prepared = make(rtol=1e-3, power=0.0)(operator, b, shift)
    return prepared.products, jax.vmap(prepared.solve)(shifts)

  def both(shift, shifts):
    basis, _ = run(optlab.lanczos, shift, shifts)
    products, all_of = run(optlab.newton.multishift_cg, shift, shifts)
    for x, ok, s in zip(*all_of[:2], shifts, strict=True):
      assert ok == (s > 1.0)
      matrix = operator.matrix + s * np.eye(N)
      assert not ok or np.linalg.norm(matrix @ x - b) < 1e-3 * np.linalg.norm(b)
    return int(basis), int(products), all_of[2].tolist()

  # Three of them, and then each by itself.
  basis, products, own = both(1.1, 1.1 * 4.0 ** np.arange(5.0))
  assert products == basis and own[:3] == [0, 0, 0] and own[3] > 0
  # Too small ones are found by products that are done again; one that is
  # smaller than those takes none.
  ladder = 2.0 ** np.arange(-9.0, 11.0, 2.0)
  basis, products, own = both(ladder[0], np.append(ladder, ladder[0] / 2))
  assert basis < products < 2 * basis
  assert own[:6] == [0] * 6 and min(own[8:10]) > 0 and own[10] == 0
  # Beside the ladder: conjugate gradients of its own.
  assert both(1.1, np.array([1.5]))[2][0] > 0


def test_without_a_basis_it_takes_a_few_products_more(x64):
  values = np.geomspace(1e-4, 1.0, 60)
  system = optlab.Dense(jnp.diag(jnp.asarray(values))), jnp.ones(60), 1e-3
  # How many, is rounding's: 1.5 and 1.6 times on two versions of jax.
  for rtol, more in ((0.3, 1.0), (0.1, 1.1), (1e-4, 2.0)):
    basis, few = (
      make(rtol=rtol, power=0.0)(*system).products
      for make in (optlab.lanczos, optlab.newton.multishift_cg)
    )
    assert basis <= few <= more * basis


@pytest.mark.parametrize(
  'make', [optlab.cg, optlab.lanczos, optlab.newton.multishift_cg]
)
def test_bad_arguments(make):
  with pytest.raises(TypeError, match='max_steps must be an integer'):
    make(max_steps=1.5)
  with pytest.raises(ValueError, match='max_steps must be at least 1'):
    make(max_steps=0)
  with pytest.raises(ValueError, match='rtol'):
    make(rtol=-0.1)


UNLIKE = {
  'of another size': lambda v: jnp.ones(3),
  'of another structure': lambda v: {'a': v},
}


@pytest.mark.parametrize('operator', UNLIKE.values(), ids=UNLIKE.keys())
@pytest.mark.parametrize(
  'make',
  [
    *EXACT.values(),
    optlab.cg(preconditioner=optlab.newton.hutchinson(jax.random.key(0))),
    optlab.cg(preconditioner=optlab.newton.leaf_blocks()),
    lambda operator, b, shift: optlab.dense(lambda x: operator)(b),
  ],
)
def test_a_product_unlike_its_vector_is_named(make, operator):
  with pytest.raises(ValueError, match=r'operator\(v\) (must have|has shape)'):
    make(operator, jnp.ones(2), 1.0)(1.0)


def test_a_curvature_unlike_the_parameters_is_named():
  tx = optlab.gns_newton()
  fun = lambda x: jnp.sum(x**2)
  for operator in UNLIKE.values():
    with pytest.raises(
      ValueError, match=r'operator\(v\) (must have|has shape)'
    ):
      optlab.minimize(
        fun, jnp.ones(2), tx, max_steps=2, curvature=lambda x, o=operator: o
      )


def test_a_preconditioner_of_another_size_is_named():
  near = optlab.newton.Diagonal(jnp.ones(3))
  solver = optlab.cg(preconditioner=lambda operator, like: (near, 0))
  with pytest.raises(ValueError, match=r'diagonal has shape \(3,\), but v has'):
    solver(lambda v: 2 * v, jnp.ones(2), 1.0)(1.0)


@pytest.mark.parametrize('dtype', [int, complex])
@pytest.mark.parametrize(
  'make',
  [
    *EXACT.values(),
    lambda operator, b, shift: optlab.newton.woodbury()(
      optlab.newton.LowRank(jnp.eye(2)), b, shift
    ),
    lambda operator, b, shift: optlab.newton.blockwise()(
      optlab.newton.Blocks(jnp.eye(2)), b, shift
    ),
  ],
)
def test_right_sides_are_real_floats(make, dtype):
  # Of integers the solution would be cut to integers.
  with pytest.raises(TypeError, match='b must be of real floats, got dtype'):
    make(lambda v: 2 * v, jnp.ones(2, dtype), 1.0)
