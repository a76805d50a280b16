r"""Operators of one matrix a leaf, which are factorized.

They show ``inverse(shift)``, which returns the function :math:`v \mapsto
(P + s I)^{-1} v`. `cg` takes one as its preconditioner.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.newton import _conjugate
from optlab.newton import _operators


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

  def between(self, root: base.ArrayTree) -> 'Blocks':
    """``D^-1 P D^-1`` for the diagonal D of a tree like the vectors."""

    def scaled(block, leaf):
      scale = leaf.reshape(-1).astype(block.dtype)
      return block / scale / scale[:, None]

    return Blocks(jax.tree.map(scaled, self.blocks, root))

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
    _operators.check_system(operator, b)
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


def _blocks_of(operator, like):
  """The blocks of an operator, and the products that they take."""
  leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, like))
  blocks, product = [], _operators.checked(operator)
  for i, leaf in enumerate(leaves):
    if trees.is_split(leaf):
      raise ValueError(
        f'Blocks need leaves that are whole on every device, got a leaf of'
        f' type {jax.typeof(leaf)}; use hutchinson or row_norms.'
      )

    def column(unit, i=i, leaf=leaf):
      others = [jnp.zeros_like(other) for other in leaves]
      others[i] = unit.reshape(leaf.shape)
      image = product(jax.tree.unflatten(structure, others))
      return jax.tree.leaves(image)[i].reshape(-1)

    eye = jnp.eye(leaf.size, dtype=leaf.dtype)
    blocks.append(trees.wide(jax.vmap(column)(eye)))
  products = sum(leaf.size for leaf in leaves)
  return Blocks(jax.tree.unflatten(structure, blocks)), products
