r"""Operators near others that are solved at once: diagonals and blocks.

They show ``inverse(shift)``, which returns the function :math:`v \mapsto
(P + s I)^{-1} v`. `cg` takes one as its preconditioner.
"""

from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.newton import _conjugate
from optlab.newton import _operators

KEY = 'a PRNG key such as jax.random.key(0)'


class Diagonal(NamedTuple):
  """The operator that multiplies each number by one of its own.

  Attributes:
    diagonal: A pytree like the vectors.
  """

  diagonal: base.ArrayTree

  def __call__(self, vector: base.ArrayTree) -> base.ArrayTree:
    return jax.tree.map(
      lambda d, v: (d * v).astype(v.dtype), self.diagonal, vector
    )

  def inverse(self, shift: Any) -> base.Operator:
    """``v -> (P + shift I)^-1 v``; what has no inverse is left as it is."""

    def leaf_wise(d, v):
      shifted = d + jnp.asarray(shift, d.dtype)
      return (v / jnp.where(shifted == 0, 1.0, shifted)).astype(v.dtype)

    return lambda vector: jax.tree.map(leaf_wise, self.diagonal, vector)


class Blocks(NamedTuple):
  """The operator of one symmetric matrix a leaf.

  Attributes:
    blocks: A pytree like the vectors, with a matrix of shape ``(n, n)`` in
      place of a leaf of ``n`` numbers.
  """

  blocks: base.ArrayTree

  def __call__(self, vector: base.ArrayTree) -> base.ArrayTree:
    return self._map(lambda block, flat: block @ flat, self.blocks, vector)

  def inverse(self, shift: Any) -> base.Operator:
    """``v -> (P + shift I)^-1 v``; NaN where that is not positive definite."""
    factors = jax.tree.map(
      lambda block: jax.lax.linalg.cholesky(
        block + jnp.asarray(shift, block.dtype) * jnp.eye(len(block)),
        symmetrize_input=False,
      ),
      self.blocks,
    )
    solve = lambda factor, flat: jax.scipy.linalg.cho_solve(
      (factor, True), flat
    )
    return lambda vector: self._map(solve, factors, vector)

  @staticmethod
  def _map(function, matrices, vector):
    return jax.tree.map(
      lambda matrix, leaf: (
        function(matrix, leaf.reshape(-1).astype(matrix.dtype))
        .reshape(leaf.shape)
        .astype(leaf.dtype)
      ),
      matrices,
      vector,
    )


@checks.domains(samples=checks.Integer(1), rounds=checks.Integer(1))
def hutchinson(
  key: jax.Array, samples: int = 8, rounds: int = 1
) -> _conjugate.Preconditioner:
  r"""The magnitudes of an estimated diagonal, by products with random signs.

  .. math:: P = \operatorname{diag} \left| \tfrac1m \sum_{i=1}^m z_i \odot
    A z_i \right|, \quad z_i \in \{-1, 1\}^n

  Choose it for `cg` where the diagonal dominates: there the estimate is good,
  and exact where there is nothing else. It is no smaller than its own error,
  :math:`(\tfrac1{m^2} \sum_i (A z_i)^2)^{1/2}`. A further round estimates the
  diagonal of :math:`P^{-1/2} A P^{-1/2}`. The same signs serve every step.

  Args:
    key: For the signs.
    samples: Products of a round.
    rounds: How often.

  Returns:
    A preconditioner for `cg`: ``(operator, like) -> (Diagonal, products)``. The
    diagonal that a `Dense` or `LowRank` operator shows takes no product.

  Raises:
    TypeError: ``key`` is no PRNG key, or ``samples`` or ``rounds`` not an
      integer.
    ValueError: ``samples`` or ``rounds`` is below one.

  Examples:
    >>> import jax, jax.numpy as jnp, optlab
    >>> make = optlab.newton.hutchinson(jax.random.key(0))
    >>> make(lambda v: v * jnp.array([3.0, 15.0]), jnp.ones(2))[0].diagonal
    Array([ 3., 15.], dtype=float32)

  References:
    Bekas, Kokiopoulou and Saad, `An estimator for the diagonal of a matrix
    <https://doi.org/10.1016/j.apnum.2007.01.003>`_, Appl. Numer. Math. 2007
  """
  checks.enforce(hutchinson, locals())
  _check_key(key)

  def estimate(mean, square):
    error = jnp.sqrt(square / samples)
    return jnp.maximum(jnp.abs(mean), error)

  return _diagonal(key, samples, rounds, estimate)


@checks.domains(samples=checks.Integer(1), rounds=checks.Integer(1))
def row_norms(
  key: jax.Array, samples: int = 4, rounds: int = 3
) -> _conjugate.Preconditioner:
  r"""Scales in which all rows have norm one, by products with random signs.

  .. math:: P_{t+1} = P_t \operatorname{diag} \left( \tfrac1m \sum_{i=1}^m (A_t
    z_i)^2 \right)^{1/2}, \quad A_t = P_t^{-1/2} A P_t^{-1/2}, \quad z_i \in
    \{-1, 1\}^n

  since :math:`E\, (A z)_j^2 = \sum_l A_{jl}^2`. Choose it over `hutchinson`
  where the scales differ widely or numbers far from the diagonal count: no
  terms cancel, and a round takes the square root of the scales that are left.

  Args:
    key: For the signs.
    samples: Products of a round.
    rounds: How often.

  Returns:
    A preconditioner for `cg`: ``(operator, like) -> (Diagonal, products)``. The
    diagonal that a `Dense` or `LowRank` operator shows takes no product.

  Raises:
    TypeError: ``key`` is no PRNG key, or ``samples`` or ``rounds`` not an
      integer.
    ValueError: ``samples`` or ``rounds`` is below one.

  Examples:
    >>> import jax, jax.numpy as jnp, optlab
    >>> make = optlab.newton.row_norms(jax.random.key(0))
    >>> near, _ = make(lambda v: v * jnp.array([3.0, 15.0]), jnp.ones(2))
    >>> print(near.diagonal.round(4))
    [ 3. 15.]

  References:
    Diamond and Boyd, `Stochastic matrix-free equilibration
    <https://doi.org/10.1007/s10957-016-0990-2>`_, J. Optim. Theory Appl. 2017
  """
  checks.enforce(row_norms, locals())
  _check_key(key)
  return _diagonal(key, samples, rounds, lambda mean, square: jnp.sqrt(square))


def leaf_blocks() -> _conjugate.Preconditioner:
  """The blocks of an operator between each leaf and itself.

  Choose it for `cg` on trees of small leaves: it takes as many products as
  there are parameters, batched leaf by leaf, and a Cholesky factorization a
  leaf and shift.

  Returns:
    A preconditioner for `cg`: ``(operator, like) -> (Blocks, products)``.

  Raises:
    ValueError: When it is used, a leaf's type says that devices split it.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> operator = optlab.Dense(jnp.array([[2.0, 1.0], [1.0, 4.0]]))
    >>> like = {'a': jnp.ones(1), 'b': jnp.ones(1)}
    >>> blocks, products = optlab.newton.leaf_blocks()(operator, like)
    >>> print(blocks.blocks['a'], blocks.blocks['b'], products)
    [[2.]] [[4.]] 2
  """
  return _blocks_of


@checks.domains(factory=checks.Function('(params, *args) -> operator'))
def layerwise(
  factory: _operators.OperatorFactory,
) -> _operators.OperatorFactory:
  """Makes the operators of a factory `Blocks`, one a leaf.

  ``layerwise(gauss_newton(model, loss))`` is the block (layerwise) Gauss-Newton
  matrix: what couples one leaf with another is left out, and a trial of
  `gns_newton` costs a small Cholesky factorization a leaf (`blockwise`).

  Args:
    factory: For example ``gauss_newton(model, loss)``.

  Returns:
    An operator factory; it takes as many products as there are parameters,
    batched leaf by leaf.

  Raises:
    TypeError: ``factory`` is not a function.
    ValueError: When it is used, a leaf's type says that devices split it.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> fun = lambda p: jnp.sum(p['a'] ** 2 + p['a'] * p['b'] + p['b'] ** 4)
    >>> factory = optlab.newton.layerwise(optlab.hessian(fun))
    >>> print(factory({'a': jnp.ones(1), 'b': jnp.ones(1)}).blocks)
    {'a': Array([[2.]], dtype=float32), 'b': Array([[12.]], dtype=float32)}
  """
  checks.enforce(layerwise, locals())
  return lambda params, *args: _blocks_of(factory(params, *args), params)[0]


def blockwise() -> base.Solver:
  """Factorizes each block of a `Blocks` operator anew for each shift.

  The default for such operators. ``ok`` is false where a block is not positive
  definite.

  Returns:
    A solver.

  Raises:
    TypeError: When it is used, the operator has no ``blocks``.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> operator = optlab.newton.Blocks(jnp.diag(jnp.array([3.0, 15.0])))
    >>> solve = optlab.newton.blockwise()(operator, jnp.ones(2), 1.0)
    >>> print(solve(1.0)[0].round(4), solve(-4.0)[1])
    [0.25   0.0625] False
  """

  def solver(operator, b, shift):
    del shift
    if blocks_of(operator) is None:
      raise TypeError(
        'blockwise needs an operator with blocks, such as'
        f' layerwise(gauss_newton(model, loss)) makes, got {operator!r}; use'
        ' cg or lanczos for others.'
      )
    vector = trees.wide(b)

    def solve(shift):
      x = operator.inverse(shift)(vector)
      ok = trees.is_finite(x) & jnp.isfinite(shift)
      return _conjugate.like(x, b), ok, jnp.zeros((), jnp.int32)

    return base.Prepared(solve, jnp.zeros((), jnp.int32))

  return solver


def blocks_of(operator: Any) -> Any:
  """The blocks that an operator shows, as `Blocks` ones do, or ``None``."""
  return getattr(operator, 'blocks', None)


def _diagonal(key, samples, rounds, estimate):
  """A preconditioner from the means of ``z * A z`` and ``(A z) ** 2``."""

  def make(operator, like):
    shown = _shown_diagonal(operator, like)
    if shown is not None:
      return Diagonal(shown), 0
    product = lambda v: trees.wide(operator(_conjugate.like(v, like)))

    def one_round(diagonal, key):
      root = jax.tree.map(jnp.sqrt, diagonal)
      divide = lambda tree: jax.tree.map(jnp.divide, tree, root)

      def add(sums, key):
        signs = _signs(key, diagonal)
        image = divide(product(divide(signs)))
        terms = jax.tree.map(lambda z, a: (z * a, a * a), signs, image)
        return jax.tree.map(jnp.add, sums, terms), None

      zeros = jax.tree.map(lambda d: (0 * d, 0 * d), diagonal)
      sums, _ = jax.lax.scan(add, zeros, jax.random.split(key, samples))
      found = jax.tree.map(
        lambda d, sums: estimate(sums[0] / samples, sums[1] / samples),
        diagonal,
        sums,
      )
      # Rows of zeros have no scale, nor those whose squares overflow.
      usable = lambda f: (f > 0) & jnp.isfinite(f)
      return jax.tree.map(
        lambda d, f: d * jnp.where(usable(f), f, 1.0), diagonal, found
      ), None

    ones = jax.tree.map(jnp.ones_like, trees.wide(like))
    keys = jax.random.split(key, rounds)
    return Diagonal(jax.lax.scan(one_round, ones, keys)[0]), samples * rounds

  return make


def _shown_diagonal(operator, like):
  """The diagonal that an operator shows, as a tree, or ``None``."""
  matrix = _operators.matrix_of(operator)
  factor = _operators.factor_of(operator)
  if matrix is None and factor is None:
    return None
  flat = jnp.diagonal(matrix) if factor is None else jnp.sum(factor**2, 0)
  wide, unravel = ravel_pytree(trees.wide(like))
  return unravel(jnp.abs(flat).astype(wide.dtype))


def _signs(key, like):
  """Random signs, laid out like a tree."""
  leaves, structure = jax.tree.flatten(like)
  return jax.tree.unflatten(
    structure,
    [
      _laid_out(jax.random.rademacher(k, leaf.shape, leaf.dtype), leaf)
      for k, leaf in zip(
        jax.random.split(key, max(1, len(leaves))), leaves, strict=False
      )
    ],
  )


def _laid_out(array, like):
  """Split over devices as the type of ``like`` says."""
  if not trees.is_split(like):
    return array
  return jax.sharding.reshard(array, jax.typeof(like).sharding)


def _blocks_of(operator, like):
  """The blocks of an operator, and the products that they take."""
  leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, like))
  blocks = []
  for i, leaf in enumerate(leaves):
    if trees.is_split(leaf):
      raise ValueError(
        f'Blocks need leaves that are whole on every device, got a leaf of'
        f' type {jax.typeof(leaf)}; use hutchinson or row_norms.'
      )

    def column(unit, i=i, leaf=leaf):
      others = [jnp.zeros_like(other) for other in leaves]
      others[i] = unit.reshape(leaf.shape)
      image = operator(jax.tree.unflatten(structure, others))
      return jax.tree.leaves(image)[i].reshape(-1)

    eye = jnp.eye(leaf.size, dtype=leaf.dtype)
    blocks.append(trees.wide(jax.vmap(column)(eye)))
  products = sum(leaf.size for leaf in leaves)
  return Blocks(jax.tree.unflatten(structure, blocks)), products


def _check_key(key):
  dtype = getattr(key, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise TypeError(f'key must be {KEY}, got {key!r}.')
