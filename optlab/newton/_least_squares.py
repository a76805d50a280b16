"""Nonlinear least squares with Gauss-Newton curvature built in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import training
from optlab import trees
from optlab.newton import _curvature
from optlab.newton import _gns
from optlab.newton import _operators

DENSE = 500  # The most parameters whose matrix is formed.


@checks.domains(
  residuals=checks.Function('(params, *args) -> residuals'),
  max_steps=checks.Integer(0),
  grad_tol=checks.NON_NEGATIVE,
)
def least_squares(
  residuals: Callable[..., base.ArrayTree],
  params: base.Params,
  *,
  max_steps: int = 200,
  grad_tol: float | jax.Array = 1e-6,
  args: tuple[Any, ...] = (),
  tx: optax.GradientTransformation | None = None,
  **options: Any,
) -> training.MinimizeResult:
  r"""Minimizes half the sum of squared residuals.

  .. math:: f(x) = \tfrac12 |r(x)|^2, \quad H \approx J^\top J, \quad J = r'(x)

  Args:
    residuals: ``(params, *args) -> residuals``, a tree of arrays; with
      ``has_aux=True`` a pair of it and anything else.
    params: The start.
    max_steps: The most steps.
    grad_tol: Stop where the norm of the gradient :math:`J^\top r` is at most
      this.
    args: Further arguments of ``residuals``.
    tx: The transformation; ``None`` is `gns_newton`.
    **options: Further arguments of `minimize`.

  Returns:
    A `MinimizeResult`.

  Raises:
    TypeError: ``residuals`` is not a function or not of real floats,
      ``max_steps`` no integer, or ``curvature`` is among the options.
    ValueError: ``grad_tol`` is negative.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> result = optlab.newton.least_squares(
    ...     lambda x: jnp.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)]),
    ...     jnp.array([-1.2, 1.0]), grad_tol=1e-3)
    >>> print(result.params.round(2), bool(result.success))
    [1. 1.] True

  Notes:
    A step costs a matrix of as many products as there are parameters where
    there are at most 500, else one Krylov basis. Far from a zero residual, on
    residuals that bend much, `hessian` converges faster.
  """
  checks.enforce(least_squares, locals())
  if 'curvature' in options:
    raise TypeError(
      'least_squares makes its own curvature, got curvature ='
      f' {options["curvature"]!r}; give another one to minimize, with'
      ' fun = lambda params: jnp.sum(residuals(params) ** 2) / 2.'
    )

  def half(found, *args):
    del args
    for path, leaf in jax.tree.leaves_with_path(found):
      if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise TypeError(
          'residuals must return real floats, got dtype'
          f' {jnp.result_type(leaf)} in residuals'
          f'{jax.tree_util.keystr(path)}; give floats, of complex ones the real'
          ' and the imaginary part as two.'
        )
    return trees.sq_norm(found, trees.real_dtype(found)) / 2

  has_aux = options.get('has_aux', False)
  rest = lambda *args: residuals(*args)[0] if has_aux else residuals(*args)
  curvature = _curvature.gauss_newton(rest, half)
  if sum(map(jnp.size, jax.tree.leaves(params))) <= DENSE:
    curvature = _operators.dense(curvature)

  def fun(params, *args) -> Any:
    if not has_aux:
      return half(residuals(params, *args))
    found, aux = residuals(params, *args)
    return half(found), aux

  return training.minimize(
    fun,
    params,
    _gns.gns_newton() if tx is None else tx,
    max_steps=max_steps,
    grad_tol=grad_tol,
    args=args,
    curvature=curvature,
    **options,
  )
