"""Operators that show more than their products, and how to make them so."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from optlab import _varying
from optlab import base
from optlab import checks
from optlab import trees

#: ``(params, *args) -> operator``: the curvature at a point.
OperatorFactory = Callable[..., base.Operator]


class Dense(NamedTuple):
  """The operator ``v -> matrix @ v`` on pytrees, flattened leaf after leaf.

  Attributes:
    matrix: Symmetric, shape ``(n, n)``; only its lower triangle may be read.
  """

  matrix: jax.Array

  def __call__(self, vector: base.ArrayTree) -> base.ArrayTree:
    flat, unravel = flatten(vector)
    return unravel((whole(self.matrix) @ flat).astype(flat.dtype))


class LowRank(NamedTuple):
  """The operator ``v -> factor.T @ (factor @ v)`` on flattened pytrees.

  Attributes:
    factor: Shape ``(rank, n)``.
  """

  factor: jax.Array

  def __call__(self, vector: base.ArrayTree) -> base.ArrayTree:
    flat, unravel = flatten(vector)
    factor = whole(self.factor)
    # `w @ factor` is many times faster than `factor.T @ w` on a CPU.
    return unravel(((factor @ flat) @ factor).astype(flat.dtype))


def whole(array: Any) -> Any:
  """An array that the devices of an explicit mesh split, on all of them.

  What is flattened, factorized or contracted must not be split.
  """
  if array is None or not trees.is_split(array):
    return array
  return _laid(array, jax.P(*(None for _ in array.shape)), array)


def _laid(array, spec, like):
  mesh = jax.typeof(like).sharding.mesh
  return jax.sharding.reshard(array, jax.NamedSharding(mesh, spec))


def flatten(tree: base.ArrayTree) -> tuple[jax.Array, Callable[..., Any]]:
  """All numbers of a tree in one vector, and the way back."""
  flat, unravel = ravel_pytree(jax.tree.map(whole, tree))

  def back(vector):
    return jax.tree.map(
      lambda new, old: (
        _laid(new, jax.typeof(old).sharding.spec, old)
        if trees.is_split(old)
        else new
      ),
      unravel(vector),
      tree,
    )

  return flat, back


def matrix_of(operator: Any) -> Any:
  """The matrix that an operator shows, as `Dense` ones do, or ``None``."""
  return whole(getattr(operator, 'matrix', None))


def factor_of(operator: Any) -> Any:
  """The factor that an operator shows, as `LowRank` ones do, or ``None``."""
  return whole(getattr(operator, 'factor', None))


@checks.domains(factory=checks.Function('(params, *args) -> operator'))
def dense(factory: OperatorFactory) -> OperatorFactory:
  """Makes the operators of a factory `Dense`.

  The matrix of a `LowRank` operator is a product of its factor; any other one
  takes ``n`` products, batched into matrix products by ``vmap``. Choose it
  where ``n`` is at most about 200: a trial of `gns_newton` then costs one
  Cholesky factorization. Beyond, a step by products takes fewer than the matrix
  does. See `linear_gauss_newton` for half the cost.

  Args:
    factory: For example ``hessian(fun)``.

  Returns:
    An operator factory that makes `Dense` operators.

  Raises:
    TypeError: ``factory`` is not a function.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> factory = optlab.dense(optlab.hessian(lambda x: jnp.sum(x ** 3)))
    >>> print(factory(jnp.ones(2)).matrix)
    [[6. 0.]
     [0. 6.]]
  """
  checks.enforce(dense, locals())
  return lambda params, *args: Dense(as_matrix(factory(params, *args), params))


def as_matrix(operator: base.Operator, like: base.ArrayTree) -> jax.Array:
  """The matrix of an operator on pytrees like ``like``, shape ``(n, n)``.

  Args:
    operator: Any operator.
    like: A pytree with the structure, shapes and dtypes of its arguments.

  Returns:
    Its matrix, in float32 or wider.
  """
  dtype = trees.accumulator_dtype(like)
  flat, unravel = flatten(like)
  check_operator('operator', operator, flat.size)
  matrix, factor = matrix_of(operator), factor_of(operator)
  if matrix is not None:
    return matrix.astype(dtype)
  if factor is not None:
    factor = factor.astype(dtype)
    return factor.T @ factor
  product = checked(operator)
  columns = jax.vmap(
    lambda unit: ravel(product(_varying.like(unravel(unit), like)))
  )
  return columns(jnp.eye(flat.shape[0], dtype=flat.dtype)).astype(dtype)


def check_operator(name: str, operator: Any, size: int) -> None:
  """Raises unless ``operator`` maps vectors of ``size`` numbers.

  Args:
    name: The argument's name, for the message.
    operator: Any operator; the shapes of `Dense` and `LowRank` are checked.
    size: The numbers in the pytrees that it is for.

  Raises:
    TypeError: It is not a function.
    ValueError: Its ``matrix`` or ``factor`` is of another shape.
  """
  checks.check_callable(
    name, operator, 'v -> A v (wrap a matrix in optlab.Dense)'
  )
  matrix = matrix_of(operator)
  if matrix is not None and jnp.shape(matrix) != (size, size):
    raise ValueError(
      f'{name} must have a matrix of shape {(size, size)}, got'
      f' {jnp.shape(matrix)}.'
    )
  factor = factor_of(operator)
  if factor is not None and jnp.shape(factor)[1:] != (size,):
    raise ValueError(
      f'{name} must have a factor of shape (r, {size}), got'
      f' {jnp.shape(factor)}.'
    )


def check_system(operator: Any, b: base.ArrayTree) -> None:
  """Raises unless ``operator`` may be solved with the right side ``b``."""
  for path, leaf in jax.tree.leaves_with_path(b):
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        f'b{jax.tree_util.keystr(path)} must be of real floats, got dtype'
        f' {dtype}; the solution has its dtype.'
      )
  size = sum(map(jnp.size, jax.tree.leaves(b)))
  check_operator('operator', operator, size)


def checked(operator: base.Operator) -> base.Operator:
  """The operator, which raises where a product is unlike its vector."""

  def product(vector):
    image = operator(vector)
    checks.check_same_tree('operator(v)', image, 'v', vector)
    return image

  return product


def ravel(tree: base.ArrayTree) -> jax.Array:
  """All numbers of a tree in one vector."""
  return flatten(tree)[0]
