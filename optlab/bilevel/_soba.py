"""SOBA: one step each on the lower variable, the linear system and x."""

from collections.abc import Callable

import jax
import optax

from optlab import base
from optlab import checks
from optlab.bilevel import _bilevel
from optlab.bilevel import _dual
from optlab.bilevel import _problem


@checks.domains(**_bilevel.LEVELS, **_bilevel.DUAL, **_bilevel.SYSTEM)
def soba(
  upper: _problem.Objective,
  lower: _problem.Objective,
  lower_optimizer: optax.GradientTransformation | None,
  dual_lr: base.ScalarOrSchedule | None = None,
  *,
  dual_optimizer: optax.GradientTransformation | None = None,
  dual_steps: int = 1,
  dual_radius: float | jax.Array | None = None,
  damping: base.ScalarOrSchedule | None = None,
  curvature: Callable[..., base.Operator] | None = None,
  lower_map: _problem.Objective | None = None,
  has_aux: bool = False,
) -> base.GradientEstimator:
  r"""One step each on the lower variable, the linear system and x.

  The cheapest estimator: choose it where noise is small or steps are.

  .. math::
    d_t = f_x - g_{xy} z_t, \quad y_{t+1} = y_t - \rho\, g_y, \quad
    z_{t+1} = z_t - \nu (g_{yy} z_t - f_y)

  with all derivatives at :math:`(x_t, y_t)`.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``; it gets ``value``, ``grad``
      and ``value_fn``. It must not decay weights: a penalty belongs into
      ``lower``. ``None`` beside ``lower_map``: y moves by the map.
    dual_lr: The rate :math:`\nu`, below two over the largest eigenvalue of
      ``g_yy``; a number or a schedule of accepted steps.
    dual_optimizer: An optax optimizer for ``z``, in place of ``dual_lr``.
    dual_steps: Steps on ``z``.
    dual_radius: Keeps ``z`` in a ball around zero. ``None`` takes the one that
      ``z`` cannot leave where ``g_yy`` is positive semidefinite and the rate
      small enough; with a ``dual_optimizer``, none.
    damping: Added to ``g_yy``, a number or a schedule; ``None`` is none. Where
      ``g_yy`` may be singular or indefinite.
    curvature: ``(x, y, batch) -> operator`` on y in place of ``g_yy``, such as
      `gauss_newton` of y, which is never indefinite.
    lower_map: ``(x, y, batch) -> y`` whose fixed point y* is, where the lower
      level has constraints or a penalty with kinks: see `proximal_map`. Then
      ``z`` solves the transposed system of ``y - lower_map(x, y)``.
    has_aux: Whether both levels return ``(scalar, aux)``; `Estimate.aux` is
      then a `BilevelAux`.

  Returns:
    A `GradientEstimator` with a `BilevelState`; it uses ``batch.upper`` and
    ``batch.lower``.

  Raises:
    TypeError: An argument is of a wrong type, or a leaf not a real array.
    ValueError: ``dual_lr`` or another number is outside its domain, or
      ``lower_optimizer`` keeps y in a set.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
    >>> lower = lambda x, y, batch: jnp.sum((y - 2.0 * x) ** 2)
    >>> estimator = optlab.soba(upper, lower, optax.sgd(0.2), 0.2)
    >>> tx = optax.sgd(0.02)
    >>> state = optlab.init(jnp.zeros(1), estimator, tx, jnp.zeros(1))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(100):
    ...   state, value = step(state, optlab.BilevelBatch(None, None))
    >>> print(f'{value:.3f} {state.params[0]:.2f}')
    0.000 0.50

  References:
    Dagreou, Ablin, Vaiter, Moreau, `A framework for bilevel optimization that
    enables stochastic and global variance reduction algorithms
    <https://arxiv.org/abs/2201.13409>`_, NeurIPS 2022.

  Notes:
    Cost: one upper gradient, one forward-over-reverse pass with the lower
    gradient, one Hessian-vector and one cross product.
    Unstable where f_y changes by much in one step: z then lags behind. So may y
    where its rate is too small for that of x: ``info.lower_lag`` is how far y*
    is from it at least, on average of late, along the way that f feels.
    ``info.ok`` is false where ``z`` left its ball or found negative curvature,
    where the lower optimizer held a part of y, where y and g_y have grown by a
    factor a step, to a million times what they were, and where the step was
    rejected; after 50 steps where y is half of its norm behind and has more
    steps to go than it has taken. After 200 it is false too where z has found
    no curvature (a lower level that is linear, or a rate far too small) or
    still grows along a way where g is flat and f is not, and where y is behind:
    by more steps than it has taken and a tenth of its norm, or by half of its
    norm where that is no noise, or grows tenfold, and after 400 by a seventh
    that lasts: the two go round in a cycle. One that is shorter is not told,
    nor what is so before. Of several lower minimizers the hypergradient is that
    of the one that y follows, which the start decides: where they lie apart
    this is no fault, and is not told; nor is a kink that y rests on, as in
    ``jnp.abs``, which has no curvature in ``g_yy``: take ``lower_map``.
  """
  checks.enforce(soba, locals())
  problem = _bilevel.problem_of(
    upper, lower, lower_optimizer, has_aux=has_aux, lower_map=lower_map,
    curvature=curvature, damping=damping,
  )  # fmt: skip
  dual = _bilevel.dual_of(dual_lr, dual_optimizer, dual_steps, dual_radius)

  def solve(point, state, grad_y, beside):
    return _dual.advance(dual, problem, point, state, grad_y, beside)

  return _bilevel.estimator(problem, solve, dual=dual)
