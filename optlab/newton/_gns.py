r"""GNS-Newton: Newton steps regularized by gradient-normalized smoothness.

A globally convergent Newton method for convex and nonconvex objectives and any
symmetric approximation of the Hessian (Semenov, Jaggi and Doikov, ICLR 2026).
"""

import functools

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab.newton import _defaults
from optlab.newton import _operators
from optlab.newton import _search
from optlab.newton import _step
from optlab.newton import _trials

SOLVER = checks.Function('(operator, b, shift) -> Prepared', optional=True)


@checks.domains(
  solver=SOLVER,
  gamma_init=checks.POSITIVE._replace(optional=True),
  gain=checks.OPEN_FRACTION._replace(optional=True),
  max_trials=checks.Integer(1, traced=True),
  gamma_offset=checks.NON_NEGATIVE,
)
def gns_newton(
  solver: base.Solver | None = None,
  metric: base.ArrayTree | None = None,
  gamma_init: float | jax.Array | None = None,
  rule: _search.SearchRule | None = None,
  gain: float | jax.Array | None = 0.1,
  max_trials: int | jax.Array = 40,
  gamma_offset: float | jax.Array = 0.0,
  safeguard: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""Newton's method, regularized by gradient-normalized smoothness.

  Choose it for smooth problems whose Hessian, or an approximation of it, can be
  had: from any start it descends, and near a solution it converges as fast as
  Newton's method. It has no learning rate and returns final updates:

  .. math::
    \lambda = |g|_* / \gamma, \quad d = -(H + \lambda B)^{-1} g, \quad
    \text{accept if } f(x) - f(x + d) \ge |g(x + d)|_*^2 / (8 \lambda)

  After a rejected trial it is tried again with a smaller :math:`\gamma`; see
  `optlab.newton` for the rules that move it.

  Args:
    solver: Solves ``(H + shift B) x = g``, see `optlab.base.Solver`; ``None``
      takes `cholesky` for operators with a ``matrix`` (of 200 unknowns or more
      where up to a hundred products, by `lanczos`, do not solve the system to
      0.1 %), `woodbury` for those with a ``factor``, `blockwise` for those with
      ``blocks``, `lanczos` for others, and `multishift_cg` beyond ten thousand
      parameters.
    metric: ``B`` of the norm :math:`|d|^2 = \langle B d, d \rangle`: a pytree
      like the parameters (its positive diagonal), a `Dense` operator, or
      ``None`` for the identity.
    gamma_init: The first smoothness; ``None`` chooses a scale-invariant one,
      ``lambda = 0.01 <g, Hg> / <g, B^-1 g>``.
    rule: How the smoothness moves; ``None`` is `adaptive`.
    gain: Accept also where the decrease is at least this part of that of the
      quadratic model; ``None`` never does.
    max_trials: The most attempts a step: systems solved. With 1 a rejected
      trial is a step of length zero, and the trials are the same: choose it
      under ``vmap``, where else a step takes the trials of its slowest lane.
    gamma_offset: Added to ``gamma`` where ``lambda`` is computed.
    safeguard: Where rounding hides the decrease, accept on the gradient
      instead, and report a stall where that fails too.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose ``update`` needs ``params``
    and the extra arguments ``value``, ``grad`` and ``value_fn``, and takes an
    operator ``curvature`` (the exact Hessian of ``value_fn`` if absent).

  Raises:
    TypeError: An argument is not of its type.
    ValueError: An argument is out of range; in ``update``, an extra argument is
      missing.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> def fun(x):
    ...   return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    >>> result = optlab.minimize(
    ...     fun, jnp.array([-2.0, 2.0]), optlab.gns_newton(), max_steps=100,
    ...     curvature=optlab.hessian(fun), grad_tol=1e-3)
    >>> print(result.params.round(2))
    [1. 1.]

  References:
    Semenov, Jaggi and Doikov, `Gradient-Normalized Smoothness for Optimization
    with Approximate Hessians <https://arxiv.org/abs/2506.13710>`_, ICLR 2026

  Notes:
    Cost per step: one preparation of the solver, and per trial one shift of it
    and one value and gradient; the accepted ones are kept in the state. A
    system that is not positive definite costs its solve alone: no point is
    evaluated. Departures from the paper, all absent from `gns_newton_paper`:
    the first ``lambda``, the rule, the safeguard, and ``gain``. A step that
    realizes a tenth of the decrease of its model is accepted although its
    gradient is large; on CUTEst problems that takes half of the evaluations.
    The method stays monotone, and each such step decreases by at least
    ``gain * lambda * |d| ** 2 / 2``; the paper's global rates, which rest on
    its own test, hold for steps that pass it, and with ``gain=None`` for all.
    A trial whose value or gradient is not finite is rejected. At the search
    limit the update is zero and the shrunken smoothness is kept (the authors'
    code takes the failing trial). A start on the axis of a saddle converges to
    the saddle. With stochastic batches ``value_fn`` must be bound to the batch
    of ``grad``; the value and gradient in the state belong to that batch too.
    It cannot be masked or partitioned, as `optax.lbfgs` cannot: ``value_fn``
    takes all parameters; close over what is frozen. Where a link before it
    zeroes a part of the gradient, the step is zero and ``failed``: the
    curvature couples that part with the rest, and would move it. Behind it in a
    chain, a link that changes its updates makes the value and gradient in its
    state those of a point where nobody is: `minimize` and `train_step` then
    evaluate anew, `optax.value_and_grad_from_state` cannot know.
  """
  checks.enforce(gns_newton, locals())
  _check_metric(metric)
  rule = _search.adaptive() if rule is None else rule
  _check_rule(rule)
  method = _step.Method(
    solver=solver,
    metric=metric,
    gamma_init=gamma_init,
    gamma_offset=gamma_offset,
    limits=_trials.Limits(rule, max_trials, gain, safeguard),
  )
  return optax.GradientTransformationExtraArgs(
    functools.partial(_step.init, method),
    functools.partial(_step.update, method),
  )


@checks.domains(solver=SOLVER, gamma_init=checks.POSITIVE)
def gns_newton_paper(
  solver: base.Solver | None = None,
  metric: base.ArrayTree | None = None,
  gamma_init: float | jax.Array = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """`gns_newton` exactly as published (Algorithm 1 and the authors' code).

  ``gamma`` starts at 1, is doubled or halved, is at least 1e-9 after a success,
  and ``lambda = |g|_* / (gamma + 1e-8)``; the decrease test stands alone.

  Args:
    solver: See `gns_newton`; ``None`` factorizes every ``matrix``, as the
      authors do.
    metric: See `gns_newton`.
    gamma_init: The first smoothness.

  Returns:
    An `optax.GradientTransformationExtraArgs`, see `gns_newton`.

  Raises:
    TypeError: ``solver`` or ``metric`` is not a function, or ``gamma_init`` not
      a real number.
    ValueError: ``gamma_init`` is not a finite number above 0.
  """
  checks.enforce(gns_newton_paper, locals())
  return gns_newton(
    solver=_defaults.exact_solver if solver is None else solver,
    metric=metric,
    gamma_init=gamma_init,
    rule=_search.double(factor=2.0, gamma_min=1e-9),
    gain=None,
    gamma_offset=1e-8,
    safeguard=False,
  )


def _check_rule(rule):
  if not isinstance(rule, _search.SearchRule):
    raise TypeError(
      f'rule must be a SearchRule such as optlab.newton.hold() makes, got'
      f' {rule!r}.'
    )


def _check_metric(metric):
  """Raises unless what is seen of the metric's diagonal is positive."""
  matrix = _operators.matrix_of(metric)
  if matrix is not None and not isinstance(matrix, jax.core.Tracer):
    metric = jnp.diagonal(matrix)
  for path, leaf in jax.tree.leaves_with_path(metric):
    checks.check_positive(f'metric{jax.tree_util.keystr(path)}', leaf)
