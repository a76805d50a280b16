"""Hypergradients by differentiating through the lower steps."""

from collections.abc import Callable

import jax
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel
from optlab.bilevel import _lower


@checks.domains(
  **_bilevel.LEVELS,
  lower_steps=checks.Integer(),
  start=checks.Function('(x, y) -> y', optional=True),
)
def unrolled(
  upper: _bilevel.Objective,
  lower: _bilevel.Objective,
  lower_optimizer: optax.GradientTransformation,
  *,
  lower_steps: int = 5,
  warm: bool = True,
  start: Callable[[base.Params, base.Params], base.Params] | None = None,
  checkpoint: bool = True,
) -> base.GradientEstimator:
  r"""Iterative differentiation: the gradient of f after N lower steps.

  .. math:: d_t = \nabla_x f(x_t, Y_N(x_t)), \quad Y_{k+1} = Y_k - \rho\,
    g_y(x_t, Y_k)

  It needs no linear system and no strong convexity, and is the exact gradient
  of what is trained where the lower level *is* N steps (few-shot learning).

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer whose update can be differentiated.
    lower_steps: Lower steps N, each with a sample of its own.
    warm: Start from where the last steps ended, optimizer state included, or
      else from the first start with a fresh optimizer.
    start: ``(x, y) -> y``, applied to the start and differentiated: with
      ``warm=False`` and ``lambda x, y: x`` this is MAML. ``None`` is ``y``.
    checkpoint: Recompute each step in the backward pass, so that a long unroll
      stores the lower variables and not the activations.

  Returns:
    A `GradientEstimator` with a `BilevelState`, whose ``memory`` is the first
    start if not ``warm``; it uses ``batch.upper`` and ``batch.step_samples``.

  Raises:
    TypeError: An objective is not a function, a count not an integer.
    ValueError: ``lower_steps`` is below one.

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
    (of all N without ``checkpoint``). On a quadratic with gradient descent from
    a fixed start, the bias is ``(I - rho g_yy)^N`` applied to the solution's
    derivative, besides that of the lower variable itself.
  """
  checks.enforce(unrolled, locals())
  optimizer = optax.with_extra_args_support(lower_optimizer)

  def init(params, inner):
    del params
    start = () if warm else trees.own(inner)
    state = _bilevel.init_state(optimizer, inner, dual=False, memory=start)
    return state._replace(info=state.info._replace(lower_grad_norm=()))

  def estimate(params, state, batch):
    _bilevel.check_batch(batch)
    first = state.inner if warm else state.memory
    opt_state = state.lower_opt_state if warm else optimizer.init(first)

    def run(params):
      inner = first if start is None else start(params, first)
      inner, lower_opt_state = _lower.descend(
        lower,
        optimizer,
        params,
        inner,
        opt_state,
        batch.step_samples,
        steps=lower_steps,
        checkpoint=checkpoint,
      )
      return upper(params, inner, batch.upper), (inner, lower_opt_state)

    (value, (inner, lower_opt_state)), grads = jax.value_and_grad(
      run, has_aux=True
    )(params)
    return _bilevel.accept(
      value,
      grads,
      state,
      inner=inner,
      lower_opt_state=lower_opt_state,
    )

  return base.GradientEstimator(init, estimate)
