"""Hypergradients by differentiating through the lower steps."""

from collections.abc import Callable

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
from optlab.bilevel import _state


@checks.domains(
  **_bilevel.LEVELS,
  lower_steps=checks.Integer(),
  start=checks.Function('(x, y) -> y', optional=True),
  lower_map=_bilevel.SYSTEM['lower_map'],
)
def unrolled(
  upper: _problem.Objective,
  lower: _problem.Objective,
  lower_optimizer: optax.GradientTransformation | None,
  *,
  lower_steps: int = 5,
  warm: bool = True,
  start: Callable[[base.Params, base.Params], base.Params] | None = None,
  checkpoint: bool = True,
  lower_map: _problem.Objective | None = None,
  has_aux: bool = False,
  reuse_sample: bool = False,
) -> base.GradientEstimator:
  r"""Iterative differentiation: the gradient of f after N lower steps.

  .. math:: d_t = \nabla_x f(x_t, Y_N(x_t)), \quad Y_{k+1} = Y_k - \rho\,
    g_y(x_t, Y_k)

  It needs no linear system and no strong convexity, and is the exact gradient
  of what is trained where the lower level *is* N steps (few-shot learning).

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer whose update can be differentiated and
      follows the gradient's size; not its signs alone.
    lower_steps: Lower steps N, each with a sample of its own.
    warm: Start from where the last steps ended, optimizer state included, or
      else from the first start with a fresh optimizer.
    start: ``(x, y) -> y``, applied to the start and differentiated: with
      ``warm=False`` and ``lambda x, y: x`` this is MAML. ``None`` is ``y``.
    checkpoint: Recompute each step in the backward pass, so that a long unroll
      stores the lower variables and not the activations.
    lower_map: See `soba`; with ``lower_optimizer=None`` its steps are taken.
    has_aux: See `soba`; the lower level's is that of the last ``y`` on
      ``batch.lower``.
    reuse_sample: Whether lower steps take ``batch.lower`` where the batch has
      no ``step_samples``.

  Returns:
    A `GradientEstimator` with a `BilevelState`, whose ``memory`` is the first
    start if not ``warm``; it uses ``batch.upper`` and ``batch.step_samples``.

  Raises:
    TypeError: An argument is of a wrong type, or a leaf not a real array.
    ValueError: A number is outside its domain, the step samples are missing, or
      ``lower_optimizer`` moves nothing, or by signs alone.

  Examples:
    >>> import jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum(y ** 2)
    >>> lower = lambda x, y, batch: jnp.sum((y - x) ** 2)
    >>> estimator = optlab.unrolled(upper, lower, optax.sgd(0.25))
    >>> x = jnp.ones(1)
    >>> batch = optlab.BilevelBatch(None, None)
    >>> result, _ = estimator.estimate(x, estimator.init(x, x), batch)
    >>> print(result.grads, 2.0 * (1.0 - 0.5 ** 5))
    [1.9375] 1.9375

  References:
    Franceschi, Donini, Frasconi, Pontil, `Forward and Reverse Gradient-Based
    Hyperparameter Optimization <https://arxiv.org/abs/1703.01785>`_, ICML 2017.
    Finn, Abbeel, Levine, `Model-Agnostic Meta-Learning
    <https://arxiv.org/abs/1703.03400>`_, ICML 2017.

  Notes:
    Cost: one upper gradient, N lower gradients and, backwards, N Hessian-vector
    and cross products (and N gradients again with ``checkpoint``). Memory: N
    lower variables with their optimizer state, and the activations of one step
    (of all N without ``checkpoint``). With ``warm=False`` nothing is assumed of
    the lower level, and ``info.ok`` says nothing of it, but of rejected steps.
    With ``warm`` the N steps stand for all before, and ``info.dual_residual``
    is the norm of what is left of f_y at their start. ``info.truncated`` is the
    part of z that they lack so at least, those before being left out: where it
    is above a tenth, or more is left than there was, ``info.ok`` is false. Then
    the steps are too few or too short, or the lower level is linear or not
    convex. On a quadratic with gradient descent from a fixed start, the bias is
    ``(I - rho g_yy)^N`` applied to the solution's derivative, besides that of
    the lower variable.
  """
  checks.enforce(unrolled, locals())
  problem = _bilevel.problem_of(
    upper, lower, lower_optimizer, has_aux=has_aux, lower_map=lower_map,
    reuse_sample=reuse_sample,
  )  # fmt: skip

  def init(params, inner):
    first = () if warm else trees.own(inner)
    state = _state.init_state(
      problem, params, inner, dual=False, memory=first, smooth=True,
      series=warm, rises=warm,
    )  # fmt: skip
    residual = jnp.zeros_like(state.info.lower_grad_norm) if warm else ()
    return state._replace(
      info=state.info._replace(lower_grad_norm=(), dual_residual=residual)
    )

  def estimate(params, state, batch):
    _state.check_batch(batch)
    samples, of = _lower.sampler(problem, batch, lower_steps)
    first, opt_state = state.inner, state.lower_opt_state
    if not warm:
      first = state.memory
      opt_state = (
        () if problem.optimizer is None else problem.optimizer.init(first)
      )

    def run(params, first):
      inner, lower_opt_state, _ = _lower.descend(
        problem, params, first if start is None else start(params, first),
        opt_state, samples, steps=lower_steps, of=of, checkpoint=checkpoint,
      )  # fmt: skip
      return inner, lower_opt_state

    inner, pull, lower_opt_state = jax.vjp(run, params, first, has_aux=True)
    value, aux, grad_x, grad_y = _problem.upper_value_and_grads(
      problem, params, inner, batch.upper
    )
    through, left = pull(grad_y)
    residual, truncated, ok, sizes = (), (), True, ()
    if warm:
      residual, size, reached = trees.norms(left, grad_y, inner, products=())
      sizes = size, reached
      # What is left of f_y at the start is what the steps have not seen: all
      # where they are too short or g is linear, more where it is not convex.
      # They are the first term of a series in what N steps leave.
      ok = ~(residual > 1.01 * size)
      unit = jnp.where(size > 0, size, 1)
      sign = trees.inner_product(trees.divided(grad_y, unit), left)
      truncated = _dual.lacking(size, residual, sign, size, through)
    if has_aux:
      aux = _problem.BilevelAux(
        aux, problem.lower(params, inner, batch.lower)[1]
      )
    return _state.accept(
      base.Estimate(value, trees.combine(jnp.add, grad_x, through), aux=aux),
      state,
      sizes=sizes,
      inner=inner,
      lower_opt_state=lower_opt_state,
      dual_residual=residual,
      truncated=truncated,
      ok=ok,
    )

  return base.GradientEstimator(init, estimate)
