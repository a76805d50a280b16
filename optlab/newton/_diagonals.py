r"""Diagonals near an operator, by products with random signs.

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

    def solve(vector):
      checks.check_same_tree('diagonal', self.diagonal, 'v', vector)
      return jax.tree.map(leaf_wise, self.diagonal, vector)

    return solve


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


def _diagonal(key, samples, rounds, estimate):
  """A preconditioner from the means of ``z * A z`` and ``(A z) ** 2``."""

  def make(operator, like):
    shown = _shown_diagonal(operator, like)
    if shown is not None:
      return Diagonal(shown), 0
    of = _operators.checked(operator)
    product = lambda v: trees.wide(of(_conjugate.like(v, like)))

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


def _check_key(key):
  dtype = getattr(key, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise TypeError(f'key must be {KEY}, got {key!r}.')
