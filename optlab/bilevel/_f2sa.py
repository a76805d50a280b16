"""F2SA: hypergradients from first derivatives alone, by a penalty."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel
from optlab.bilevel import _dual
from optlab.bilevel import _lag
from optlab.bilevel import _lower
from optlab.bilevel import _problem
from optlab.bilevel import _state


class F2saMemory(NamedTuple):
  """The second lower variable of `f2sa`."""

  shifted: base.Params  # minimizes g + f / penalty
  opt_state: base.OptState
  steepest: jax.Array  # shape (), the largest norm of f_y so far
  recent: jax.Array  # shape (), the same of late


@checks.domains(
  **_bilevel.LEVELS,
  lower_optimizer=checks.TRANSFORMATION,
  penalty=_bilevel.RATE,
  lower_steps=checks.Integer(),
)
def f2sa(
  upper: _problem.Objective,
  lower: _problem.Objective,
  lower_optimizer: optax.GradientTransformation,
  penalty: base.ScalarOrSchedule,
  *,
  lower_steps: int = 5,
  central: bool = False,
  has_aux: bool = False,
  reuse_sample: bool = False,
) -> base.GradientEstimator:
  r"""First-order hypergradients: the lower level, with and without a penalty.

  Choose it where second derivatives do not exist (kernels with a gradient
  alone) or do not fit in memory, or where the lower level is constrained to a
  set that does not depend on x: a projecting ``lower_optimizer`` is right here.

  .. math::
    y \approx \arg\min g(x, \cdot), \quad
    y_\lambda \approx \arg\min g(x, \cdot) + f(x, \cdot) / \lambda, \quad
    d = f_x(x, y_\lambda) + \lambda\, (g_x(x, y_\lambda) - g_x(x, y))

  after ``lower_steps`` on each. With ``central`` differences :math:`y` too is
  shifted, to :math:`y_{-\lambda}`, and

  .. math::
    d = \tfrac12 (f_x(x, y_\lambda) + f_x(x, y_{-\lambda})) +
      \tfrac\lambda2 (g_x(x, y_\lambda) - g_x(x, y_{-\lambda}))

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for both lower variables.
    penalty: The weight :math:`\lambda`, a number or a schedule of accepted
      steps. The bias falls as its inverse, or as the square of that with
      ``central``; rounding and noise grow with it.
    lower_steps: Steps on each lower variable, each with a sample of its own.
    central: Whether differences are central: one upper gradient a lower step
      more.
    has_aux: See `soba`; of both levels at :math:`y_\lambda`.
    reuse_sample: Whether lower steps take ``batch.lower`` where the batch has
      no ``step_samples``.

  Returns:
    A `GradientEstimator` with a `BilevelState` whose ``memory`` is an
    `F2saMemory`. The value is f at :math:`y_\lambda`, or the mean of both.

  Raises:
    TypeError: An argument is of a wrong type, or a leaf not a real array.
    ValueError: A number is outside its domain, the step samples are missing, or
      ``lower_optimizer`` moves nothing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
    >>> lower = lambda x, y, batch: jnp.sum((y - 2.0 * x) ** 2)
    >>> estimator = optlab.bilevel.f2sa(upper, lower, optax.sgd(0.2), 100.0)
    >>> tx = optax.sgd(0.1)
    >>> state = optlab.init(jnp.zeros(1), estimator, tx, jnp.zeros(1))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(50):
    ...   state, value = step(state, optlab.BilevelBatch(None, None))
    >>> print(f'{value:.3f} {state.params[0]:.2f}')
    0.000 0.50

  References:
    Kwon, Kwon, Wright, Nowak, `A Fully First-Order Method for Stochastic
    Bilevel Optimization <https://arxiv.org/abs/2301.10945>`_, ICML 2023. Its
    central differences are the case p = 2 of F2SA-p, ICLR 2026.

  Notes:
    Departure: the penalized level is divided by :math:`\lambda`, so that one
    lower rate serves both variables.

    Cost: a lower step takes two lower gradients and one upper one (two with
    ``central``); an estimate two more of the lower level, and one of the upper
    and a value (two). Memory: two lower variables with their optimizer states,
    no second derivatives. In float32 the difference of two gradients loses
    about :math:`10^{-7} \lambda` of the larger. Where a lower variable lags
    behind, the estimate is wrong by up to :math:`\lambda` times the lag:
    ``info.lower_grad_norm`` is the larger of the two levels' gradients, and
    ``info.dual_residual`` that of :math:`z = \lambda (y - y_\lambda)`.
    ``info.ok`` is false where the lower gradient falls along that shift, or its
    residual is ten times that of :math:`z = 0` of late: then the lower level is
    not convex or runs away, or its steps are too long for the penalty; where
    f_y changes by half along the shift: then the penalty is too small, and the
    estimate biased by about a third or more; where the shift is lost in the
    rounding of y; and where y is behind, as in `soba`, along that shift.
  """
  checks.enforce(f2sa, locals())
  problem = _bilevel.problem_of(
    upper, lower, lower_optimizer, has_aux=has_aux, reuse_sample=reuse_sample
  )

  def init(params, inner):
    state = _state.init_state(problem, params, inner, dual=False)
    shifted = trees.own(inner)
    # Not one zero twice: a buffer can be donated once.
    steepest, recent, residual, lag = (
      jnp.zeros_like(state.info.lower_grad_norm) for _ in range(4)
    )
    info = state.info._replace(dual_residual=residual, lower_lag=lag)
    return state._replace(
      memory=F2saMemory(
        shifted, problem.optimizer.init(shifted), steepest, recent
      ),
      pace=_lag.start(lag.dtype),
      info=info,
    )

  def estimate(params, state, batch):
    _state.check_batch(batch)
    checks.check_real_params('params', params)
    strength = trees.at_step(penalty, state.step)
    weight = 1 / strength
    (y, opt_state), memory = _descend(
      problem, lower_steps, params, state, batch,
      (-weight if central else None, weight),
    )  # fmt: skip
    value, upper_aux, *f = _problem.upper_value_and_grads(
      problem, params, memory[0], batch.upper
    )
    lower_aux, *g = _lower_grads(
      problem, params, memory[0], batch.lower, state.step
    )
    _, *g_below = _lower_grads(problem, params, y, batch.lower, state.step)
    minus = lambda a, b: trees.combine(lambda a, b: scale * (a - b), a, b)
    above, mean, scale = value, f, strength
    above_y = trees.combine(lambda g, f: g + weight * f, g[1], f[1])
    below_y = g_below[1]
    if central:
      other, _, *f_below = _problem.upper_value_and_grads(
        problem, params, y, batch.upper
      )
      value, scale = 0.5 * (value + other), 0.5 * strength
      mean = trees.combine(lambda a, b: 0.5 * (a + b), f, f_below)
      below_y = trees.combine(lambda g, f: g - weight * f, below_y, f_below[1])
    else:
      other, _ = problem.upper(params, y, batch.upper)
    grads = trees.combine(jnp.add, mean[0], minus(g[0], g_below[0]))
    dual, product = minus(y, memory[0]), minus(g_below[1], g[1])
    size = trees.norm(mean[1])
    # Through zero f_y passes in a few steps, which the shift follows later.
    steepest = jnp.maximum(state.memory.steepest, size)
    recent = jnp.maximum(0.9 * state.memory.recent, size)
    residual, length, ok = _judge(dual, product, mean[1], recent)
    first, curved = (
      trees.inner_product(dual, tree) / scale for tree in (f[1], product)
    )
    ok &= _is_small(first, curved, above, other, central)
    reached = trees.norm(y)
    ok &= _is_seen(length / scale, y, reached, size <= 1e-3 * steepest)
    slope = jnp.maximum(trees.norm(above_y), trees.norm(below_y))
    pace, behind = _lag.follow(
      state.pace,
      state.step,
      trees.inner_product(dual, below_y),
      jnp.sqrt(trees.sq_norm(product, residual.dtype)),
      trees.sq_norm(
        trees.combine(jnp.subtract, y, state.inner), residual.dtype
      ),
      reached,
    )
    aux = _bilevel.aux_of(problem, upper_aux, lower_aux)
    return _state.accept(
      base.Estimate(value, grads, aux=aux),
      state,
      memory,
      inner=y,
      lower_opt_state=opt_state,
      memory=F2saMemory(
        *memory, *(norm.astype(residual.dtype) for norm in (steepest, recent))
      ),
      sizes=(slope, reached),
      pace=pace,
      lower_grad_norm=slope,
      dual_residual=residual,
      ok=ok & ~behind,
    )

  return base.GradientEstimator(init, estimate)


def _descend(problem, steps, params, state, batch, weights):
  """Steps of both lower variables, each by its weight of the upper level."""
  samples, of = _lower.sampler(problem, batch, steps)

  def penalized(params, inner, batch):
    up, low, weight = batch
    value, aux = problem.lower(params, inner, low)
    extra, upper_aux = problem.upper(params, inner, up)
    return value + (weight * extra).astype(value.dtype), (extra, upper_aux, aux)

  def move(variable, sample, weight):
    inner, opt_state = variable
    level, data = problem, sample
    if weight is not None:
      level = problem._replace(lower=penalized)
      data = batch.upper, sample, weight
    return _lower.step(level, params, inner, opt_state, data)[:2]

  def body(carry, sample):
    sample = of(sample)
    moved = tuple(
      move(variable, sample, weight)
      for variable, weight in zip(carry, weights, strict=True)
    )
    return moved, None

  start = (state.inner, state.lower_opt_state), tuple(state.memory[:2])
  return jax.lax.scan(body, start, samples, length=steps)[0]


def _lower_grads(problem, params, inner, batch, step):
  """The auxiliary output of g, ``g_x`` and ``g_y``."""
  grads, (_, aux) = _problem.gradients(
    problem, _problem.Point(params, inner, batch, step)
  )(inner)
  return aux, *grads


def _is_small(first, curved, value, other, central):
  """Whether the shift is short beside the curvature of f.

  Else the difference is not near a derivative: f bends it by as much as g, or
  is all that there is where a lower variable runs away.
  """
  change = other - value
  eps = jnp.finfo(value.dtype).eps
  rounding = 8 * eps * (jnp.abs(value) + jnp.abs(other))
  # Half of what f_y differs by from one end to the other, along the shift.
  bend = jnp.abs(change - first)
  allowed = 0.5 * jnp.abs(change) if central else 0.25 * jnp.abs(first)
  # Where f_y passes through zero the shift follows later, no longer than g lets
  # it be.
  allowed = jnp.maximum(allowed, 0.25 * curved)
  return ~(bend > allowed + rounding)


def _is_seen(length, inner, reached, at_end):
  """Whether the shift stands out from the rounding of y."""
  eps = max(
    (float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(inner)),
    default=0.0,
  )
  # In float32 or wider it may be short at the end, where f_y is small.
  wide = eps < 1e-4
  least = (4 if wide else 16) * eps * reached
  return (length > least) | (wide & at_end)


def _judge(dual, product, grad_y, recent):
  """How well ``z`` solves its system, and whether the difference is sane.

  The shift times the penalty is a ``z``, and the change of the lower gradient
  over it ``g_yy z``.
  """
  # Plain sums: a look that may be repeated in scaled numbers keeps all trees.
  residual = trees.combine(jnp.subtract, product, grad_y)
  length, size, reached = (
    jnp.sqrt(trees.sq_norm(tree, trees.real_dtype(tree)))
    for tree in (residual, grad_y, dual)
  )
  along = trees.inner_product(dual, product)
  ok = _dual.is_convex(along, reached * (length + size))
  # A constraint or a slow start may leave more than z = 0 would; an order more
  # is a lower level that runs away, or steps too long for so small a shift.
  return length, reached, ok & ~(length > 10 * recent)
