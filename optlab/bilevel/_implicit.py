"""Implicit differentiation, the linear system solved to a tolerance."""

from collections.abc import Callable
import functools

import jax
import optax

from optlab import _systems
from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel
from optlab.bilevel import _dual
from optlab.bilevel import _lower
from optlab.bilevel import _problem


@checks.domains(
  **_bilevel.LEVELS,
  lower_steps=checks.Integer(),
  rtol=checks.NON_NEGATIVE._replace(schedule=True),
  max_steps=checks.Integer(),
  **_bilevel.SYSTEM,
)
def implicit(
  upper: _problem.Objective,
  lower: _problem.Objective,
  lower_optimizer: optax.GradientTransformation | None,
  *,
  lower_steps: int = 5,
  rtol: base.ScalarOrSchedule = 1e-6,
  max_steps: int = 100,
  warm: bool = True,
  dual_radius: float | jax.Array | None = None,
  damping: base.ScalarOrSchedule | None = None,
  curvature: Callable[..., base.Operator] | None = None,
  lower_map: _problem.Objective | None = None,
  has_aux: bool = False,
  reuse_sample: bool = False,
) -> base.GradientEstimator:
  r"""Implicit differentiation with the linear system solved to a tolerance.

  The reference: exact where the lower variable has converged.

  .. math::
    \|g_{yy} z_t - f_y\| \le \text{rtol} \, \|f_y\|, \quad
    d_t = f_x - g_{xy} z_t

  at :math:`(x_t, y_{t+1})`, after the lower steps, by conjugate gradients from
  the last ``z``.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``.
    lower_steps: Lower steps, each with a sample of its own.
    rtol: Relative tolerance of the linear system; a schedule that falls saves
      products where x is far off.
    max_steps: The most steps of conjugate gradients.
    warm: Whether they start at the last ``z``, if that is better than zero.
    dual_radius: Keeps ``z`` in a ball around zero; ``None`` does not.
    damping: See `soba`.
    curvature: See `soba`.
    lower_map: See `soba`.
    has_aux: See `soba`.
    reuse_sample: Whether lower steps take ``batch.lower`` where the batch has
      no ``step_samples``.

  Returns:
    A `GradientEstimator` with a `BilevelState`.

  Raises:
    TypeError: An argument is of a wrong type, or a leaf not a real array.
    ValueError: A number is outside its domain, ``lower_optimizer`` keeps y in
      a set, or the step samples are missing.

  Examples:
    >>> import jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum(y ** 2)
    >>> lower = lambda x, y, batch: jnp.sum((y - x) ** 2)
    >>> estimator = optlab.implicit(upper, lower, optax.sgd(0.5))
    >>> x = jnp.ones(1)
    >>> batch = optlab.BilevelBatch(None, None)
    >>> result, _ = estimator.estimate(x, estimator.init(x, x), batch)
    >>> print(result.grads)
    [2.]

  References:
    Pedregosa, `Hyperparameter optimization with approximate gradient
    <https://arxiv.org/abs/1602.02355>`_, ICML 2016.

  Notes:
    Cost: one upper gradient, ``lower_steps`` lower gradients, one lower
    linearization, up to ``max_steps`` + 2 Hessian-vector products, one cross
    product. Where ``g_yy`` has negative curvature on the sample, conjugate
    gradients stop at the best ``z`` before it and ``info.ok`` is false; damping
    or Gauss-Newton products mend it. It is false too where y is behind, as in
    `soba`. With ``lower_map`` the system is not symmetric and GMRES solves it.
  """
  checks.enforce(implicit, locals())
  problem = _bilevel.problem_of(
    upper, lower, lower_optimizer, has_aux=has_aux, lower_map=lower_map,
    curvature=curvature, damping=damping, reuse_sample=reuse_sample,
  )  # fmt: skip

  def solve(point, state, grad_y, beside):
    lower, products = _problem.linearize(problem, point)
    wide = state.dual
    multiply = lambda z: trees.cast_like(products(z)[1], wide)
    b = trees.cast_like(grad_y, wide)
    # Squares of f_y may leave the range of numbers that f_y itself keeps.
    size = _systems.magnitude(b)
    b = trees.divided(b, size)
    tolerance = trees.at_step(rtol, state.step)
    start = trees.divided(state.dual, size) if warm else None
    if lower_map is None:
      dual, ok = _systems.cg(
        multiply, b, start, rtol=tolerance, max_steps=max_steps
      )
    else:
      dual, ok = _systems.gmres(
        multiply, b, start, rtol=tolerance, max_steps=max_steps
      )
    dual = trees.scaled(size, dual)
    if dual_radius is not None:
      dual, inside, _ = _dual.hold(dual, dual_radius)
      ok &= inside
    cross, product = products(dual)
    residual = trees.norm(_dual.residual_of(dual, product, grad_y))
    solution = _dual.Solution(dual, residual, ok, trees.norm(product))
    # The last z, in whose noise this sample has no part.
    return _dual.look(solution, cross, lower, state.dual, beside)

  move = functools.partial(_lower.lower_round, problem, lower_steps)
  return _bilevel.estimator(problem, solve, move)
