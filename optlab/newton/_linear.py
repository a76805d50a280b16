r"""Solvers for shifted linear systems, ``(A + shift I) x = b``.

``solver(operator, b, shift)`` prepares for the smallest shift of interest and
returns a `Prepared`, which maps a shift to ``(x, ok)``; preparing is the
expensive part, so that the search of `gns_newton` tries many shifts at little
cost. ``b`` and
``x`` are pytrees. Where ``ok`` is false the shifted operator was found not to
be positive definite (or not to be finite) and ``x`` is of no use.

================ ================================= ==========================
solver           to prepare                        a shift
================ ================================= ==========================
`cholesky`       the matrix                        :math:`n^3 / 3`
`eigh`           its eigenvalues, about 13         :math:`2 n^2`
                 Cholesky factorizations
`woodbury`       a Gram matrix, :math:`r^2 n`      :math:`r^3 / 3 + 4 r n`
`blockwise`      nothing                           :math:`\sum_i n_i^3 / 3`
`lanczos`        k products, :math:`k^2 n`         :math:`k n`
`multishift_cg`  k products, :math:`10 k n`        nothing
`cg`             nothing                           k products
================ ================================= ==========================
"""

import jax
import jax.numpy as jnp

from optlab import base
from optlab import trees
from optlab.newton import _operators


def cholesky() -> base.Solver:
  """Factorizes the shifted matrix anew for each shift.

  The default for `Dense` operators, from 200 unknowns on where a hundred
  products do not solve the system: faster than an eigendecomposition unless
  some 13 shifts are tried, and as accurate as the matrix allows. Other
  operators are made dense first, at ``n`` products. ``ok`` is false where a
  pivot is not above the rounding error of the matrix.

  Returns:
    A solver.

  Raises:
    TypeError: ``operator`` is neither a function nor an operator; a bare matrix
      belongs in `Dense`.
    ValueError: The operator has another size than ``b``.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> operator = optlab.Dense(jnp.diag(jnp.array([3.0, 15.0])))
    >>> solve = optlab.cholesky()(operator, jnp.ones(2), 1.0)
    >>> print(solve(1.0)[0].round(4), solve(-4.0)[1])
    [0.25   0.0625] False
  """

  def solver(operator, b, shift):
    del shift
    matrix, products = _matrix(operator, b)
    flat, unravel = flatten(b)
    scale = jnp.max(jnp.abs(jnp.diagonal(matrix)), initial=0.0)

    def solve(shift):
      shifted = matrix + shift * jnp.eye(*matrix.shape, dtype=matrix.dtype)
      factor = jax.lax.linalg.cholesky(shifted, symmetrize_input=False)
      x = jax.scipy.linalg.cho_solve((factor, True), flat)
      floor = jnp.finfo(matrix.dtype).eps * (scale + jnp.abs(shift))
      pivots = jnp.diagonal(factor) ** 2
      ok = jnp.all(pivots > floor) & jnp.all(jnp.isfinite(x))
      return unravel(x), ok, jnp.zeros((), jnp.int32)

    return base.Prepared(solve, products)

  return solver


def eigh() -> base.Solver:
  """Diagonalizes the matrix once; every shift is then two small products.

  Choose it for many shifts of one matrix, or to see its spectrum. ``ok`` is
  false where an eigenvalue plus the shift is not above the rounding error.

  Returns:
    A solver.

  Raises:
    TypeError: ``operator`` is neither a function nor an operator; a bare matrix
      belongs in `Dense`.
    ValueError: The operator has another size than ``b``.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> operator = optlab.Dense(jnp.diag(jnp.array([3.0, 15.0])))
    >>> solve = optlab.newton.eigh()(operator, jnp.ones(2), 1.0)
    >>> print(solve(1.0)[0].round(4), solve(-4.0)[1])
    [0.25   0.0625] False
  """

  def solver(operator, b, shift):
    del shift
    matrix, products = _matrix(operator, b)
    flat, unravel = flatten(b)
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    coordinates = flat @ vectors
    scale = jnp.max(jnp.abs(values), initial=0.0)

    def solve(shift):
      x = vectors @ (coordinates / (values + shift))
      floor = jnp.finfo(matrix.dtype).eps * (scale + jnp.abs(shift))
      ok = jnp.all(values + shift > floor) & jnp.all(jnp.isfinite(x))
      return unravel(x), ok, jnp.zeros((), jnp.int32)

    return base.Prepared(solve, products)

  return solver


def woodbury() -> base.Solver:
  r"""Solves in the dimensions of the factor of a `LowRank` operator.

  .. math:: (F^\top F + s I)^{-1} b = \frac1s \left(b - F^\top
    (F F^\top + s I)^{-1} F b\right)

  The default for `LowRank` operators; choose `cholesky` where the rank exceeds
  the dimension. One step of iterative refinement undoes the cancellation at
  small shifts. ``ok`` is false unless the shift is positive, since the operator
  alone is singular, and where it is so small that the first solution leaves a
  tenth of ``b``.

  Returns:
    A solver, which raises a ``TypeError`` for an operator without ``factor``.

  Raises:
    TypeError: ``operator`` is not a `LowRank`.
    ValueError: The operator has another size than ``b``.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> operator = optlab.newton.LowRank(jnp.array([[1.0, 0.0]]))
    >>> print(*optlab.newton.woodbury()(operator, jnp.ones(2), 1.0)(1.0))
    [0.5 1. ] True
  """

  def solver(operator, b, shift):
    del shift
    factor = _operators.factor_of(operator)
    if factor is None:
      raise TypeError(
        'woodbury needs an operator with a factor, such as empirical_fisher'
        f' makes, got {operator!r}; use cholesky, cg or lanczos for others.'
      )
    _operators.check_system(operator, b)
    flat, unravel = flatten(b)
    factor = factor.astype(flat.dtype)
    gram = factor @ factor.T

    def solve(shift):
      shifted = gram + shift * jnp.eye(*gram.shape, dtype=gram.dtype)
      lower = jax.lax.linalg.cholesky(shifted, symmetrize_input=False)

      def apply(b):
        inner = jax.scipy.linalg.cho_solve((lower, True), factor @ b)
        return (b - inner @ factor) / shift

      x = apply(flat)
      residual = flat - (factor @ x) @ factor - shift * x
      x = x + apply(residual)
      # A shift that rounding hides beside the factor leaves nothing of `x`.
      solved = jnp.linalg.norm(residual) <= 0.1 * jnp.linalg.norm(flat)
      ok = (shift > 0) & solved & jnp.all(jnp.isfinite(x))
      return unravel(x), ok, jnp.zeros((), jnp.int32)

    return base.Prepared(solve, jnp.zeros((), jnp.int32))

  return solver


def _matrix(operator, b):
  """The matrix of an operator, and the products that it took."""
  _operators.check_system(operator, b)
  matrix = _operators.as_matrix(operator, b)
  shown = (_operators.matrix_of(operator), _operators.factor_of(operator))
  products = 0 if any(part is not None for part in shown) else matrix.shape[0]
  return matrix, jnp.asarray(products, jnp.int32)


def flatten(tree):
  """The leaves as one vector of float32 or wider, and the way back."""
  flat, unravel = _operators.flatten(tree)
  wide = flat.astype(trees.accumulator_dtype(tree))
  return wide, lambda vector: unravel(vector.astype(flat.dtype))
