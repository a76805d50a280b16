"""StocBiO: a Neumann series of the lower Hessian."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel
from optlab.bilevel import _dual
from optlab.bilevel import _lower
from optlab.bilevel import _problem


@checks.domains(
  **_bilevel.LEVELS,
  neumann_lr=_bilevel.RATE,
  lower_steps=checks.Integer(),
  neumann_steps=checks.Integer(),
  **_bilevel.SYSTEM,
)
def stocbio(
  upper: _problem.Objective,
  lower: _problem.Objective,
  lower_optimizer: optax.GradientTransformation | None,
  neumann_lr: base.ScalarOrSchedule,
  *,
  lower_steps: int = 5,
  neumann_steps: int = 5,
  dual_radius: float | jax.Array | None = None,
  damping: base.ScalarOrSchedule | None = None,
  curvature: Callable[..., base.Operator] | None = None,
  lower_map: _problem.Objective | None = None,
  has_aux: bool = False,
  reuse_sample: bool = False,
) -> base.GradientEstimator:
  r"""Lower steps from where the last ones ended, then a Neumann series.

  .. math::
    z_t = \nu \sum_{q=0}^{Q-1} (I - \nu\, g_{yy})^q f_y, \quad
    d_t = f_x - g_{xy} z_t

  at :math:`(x_t, y_{t+1})`, after the lower steps. Its bias is that of the
  lower steps and :math:`z_t - z^* = -(I - \nu\, g_{yy})^Q z^*`.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``.
    neumann_lr: The rate :math:`\nu`; the series diverges from two over the
      largest eigenvalue of ``g_yy`` on.
    lower_steps: Lower steps, each with a sample of its own.
    neumann_steps: Terms Q of the series.
    dual_radius: Keeps ``z`` in a ball around zero. ``None`` takes the one of
      radius :math:`Q \nu \|f_y\|`, which no convergent series leaves.
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
    >>> estimator = optlab.stocbio(upper, lower, optax.sgd(0.5), 0.25)
    >>> x = jnp.ones(1)
    >>> batch = optlab.BilevelBatch(None, None)
    >>> result, _ = estimator.estimate(x, estimator.init(x, x), batch)
    >>> print(result.grads, 2.0 * (1.0 - 0.5 ** 5))
    [1.9375] 1.9375

  References:
    Ji, Yang, Liang, `Bilevel Optimization: Convergence Analysis and Enhanced
    Design <https://arxiv.org/abs/2010.07962>`_, ICML 2021.

  Notes:
    Departure: all terms use one sample ``batch.lower``, as the authors' code
    does, where the paper draws a fresh one for each.

    Cost: one upper gradient, ``lower_steps`` lower gradients, one lower
    linearization, ``neumann_steps`` Hessian-vector products (the last for the
    residual) and one cross product. ``info.ok`` is false where the series
    grows: the rate is too large, or ``g_yy`` indefinite; where it meets no
    curvature: the lower level is linear; where y is behind, as in `soba`; and
    where ``info.truncated``, the part of the series' limit that its Q terms
    lack at least, is above a tenth: take more terms, or a larger rate. With a
    rate of one over the largest curvature, five terms are enough for one
    smallest that is a third of it.
  """
  checks.enforce(stocbio, locals())
  problem = _bilevel.problem_of(
    upper, lower, lower_optimizer, has_aux=has_aux, lower_map=lower_map,
    curvature=curvature, damping=damping, reuse_sample=reuse_sample,
  )  # fmt: skip

  def solve(point, state, grad_y, beside):
    lower, products = _problem.linearize(problem, point)
    rate = trees.at_step(neumann_lr, state.step)
    # The first term is the gradient itself.
    first = jax.tree.map(
      lambda z, fy: (rate * fy.astype(z.dtype)).astype(z.dtype),
      state.dual,
      grad_y,
    )

    def add_term(_, carry):
      dual, _ = carry
      residual = _dual.residual_of(dual, products(dual)[1], grad_y)
      return _dual.subtract(dual, rate, residual), residual

    zeros = trees.zeros_accumulator(grad_y)
    before = _dual.residual_of(zeros, zeros, grad_y)
    dual, before = jax.lax.fori_loop(
      1, neumann_steps, add_term, (first, before)
    )
    dual, inside, length = _dual.hold(
      dual, _dual.series_radius(dual_radius, neumann_steps * rate, grad_y)
    )
    cross, product = products(dual)
    after = _dual.residual_of(dual, product, grad_y)
    residual, size, left = map(trees.norm, (after, grad_y, before))
    unit = trees.divided(before, jnp.where(left > 0, left, 1))
    sign = trees.inner_product(unit, after)
    ok = inside & (residual <= 1.01 * size)
    along = trees.inner_product(dual, product)
    ok &= _dual.is_convex(along, length * (residual + size))
    ok &= _dual.feels(along, length, size)
    solution = _dual.Solution(
      dual, residual, ok, residual + size,
      truncated=_dual.lacking(
        rate * left, rate * residual, sign, length, cross
      ),
    )  # fmt: skip
    # The last z, in whose noise this sample has no part.
    return _dual.look(solution, cross, lower, state.dual, beside)

  move = functools.partial(_lower.lower_round, problem, lower_steps)
  return _bilevel.estimator(problem, solve, move, series=True)
