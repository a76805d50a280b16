"""Hypergradients by a Neumann series of the lower Hessian: StocBiO and TTSA."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel


def stocbio(
  upper: _bilevel.Objective,
  lower: _bilevel.Objective,
  lower_optimizer: optax.GradientTransformation,
  neumann_lr: base.ScalarOrSchedule,
  *,
  lower_steps: int = 5,
  neumann_steps: int = 5,
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

  Returns:
    A `GradientEstimator` with a `BilevelState`.

  Raises:
    TypeError: An objective is not a function, a count not an integer.
    ValueError: A count is below one, or the rate not positive.

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
    residual) and one cross product.
  """
  checks.check_positive('neumann_lr', neumann_lr, schedule=True)
  checks.check_int('lower_steps', lower_steps, 1)
  checks.check_int('neumann_steps', neumann_steps, 1)

  def solve(state, products, grad_y):
    rate = _bilevel.at(neumann_lr, state.step)

    def add_term(_, dual):
      return _bilevel.linear_step(dual, products(dual)[1], grad_y, rate)[0]

    # The first term is the gradient itself.
    dual = jax.tree.map(
      lambda z, fy: (rate * fy.astype(z.dtype)).astype(z.dtype),
      state.dual,
      grad_y,
    )
    dual = jax.lax.fori_loop(1, neumann_steps, add_term, dual)
    cross, hessian_dual = products(dual)
    _, residual = _bilevel.linear_step(dual, hessian_dual, grad_y, rate)
    return dual, cross, residual

  move = functools.partial(_bilevel.lower_round, lower, lower_steps)
  return _bilevel.linear_system_estimator(
    upper, lower, lower_optimizer, solve, move
  )


class TtsaState(NamedTuple):
  """State of `ttsa`."""

  step: jax.Array  # shape (), int32, accepted estimates
  inner: base.Params  # the lower variable y
  lower_opt_state: optax.OptState
  lower_grad_norm: jax.Array  # shape (), norm of g_y at the last estimate
  power: jax.Array  # shape (), int32, the last power drawn
  key: jax.Array  # typed key of the powers
  rejected: jax.Array  # shape (), int32, estimates that were not finite


def ttsa(
  upper: _bilevel.Objective,
  lower: _bilevel.Objective,
  lower_optimizer: optax.GradientTransformation,
  neumann_lr: base.ScalarOrSchedule,
  *,
  neumann_steps: int = 5,
) -> base.GradientEstimator:
  r"""One lower step, then one random term of the Neumann series.

  .. math::
    p \sim \text{uniform}\{0, \dots, Q-1\}, \quad
    z_t = Q\, \nu\, (I - \nu\, g_{yy})^p f_y, \quad d_t = f_x - g_{xy} z_t

  In expectation over p the estimate of `stocbio` with one lower step.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    lower_optimizer: Any optax optimizer, for ``y``.
    neumann_lr: The rate :math:`\nu`, below two over the largest eigenvalue of
      ``g_yy``.
    neumann_steps: Terms Q of the series.

  Returns:
    A `GradientEstimator`: ``init(x, y, key)`` takes a typed key, and
    ``batch.inner`` has a leading axis of one. Its state is a `TtsaState`.

  Raises:
    TypeError: An objective is not a function, the count not an integer.
    ValueError: The count is below one, or the rate not positive.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
    >>> lower = lambda x, y, batch: jnp.sum((y - 2.0 * x) ** 2)
    >>> estimator = optlab.bilevel.ttsa(upper, lower, optax.sgd(0.2), 0.2)
    >>> tx = optax.sgd(0.02)
    >>> state = optlab.init(
    ...     jnp.zeros(1), estimator, tx, jnp.zeros(1), jax.random.key(0))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(200):
    ...   state, value = step(state, optlab.BilevelBatch(None, None))
    >>> print(f'{value:.2f} {state.params[0]:.2f}')
    0.00 0.50

  References:
    Hong, Wai, Wang, Yang, `A Two-Timescale Stochastic Algorithm Framework for
    Bilevel Optimization <https://arxiv.org/abs/2007.05170>`_, SIAM J. Optim.
    2023.

  Notes:
    Departure: all factors use one sample ``batch.lower``. The two time scales
    are the caller's: decay the upper rate faster than the lower one.

    Cost: one upper gradient, one lower gradient, one lower linearization, on
    average ``(Q - 1) / 2`` Hessian-vector products and one cross product. Under
    ``vmap`` every member waits for the largest power. The estimate's variance
    grows with Q.
  """
  _bilevel.check_objectives(upper, lower)
  checks.check_positive('neumann_lr', neumann_lr, schedule=True)
  checks.check_int('neumann_steps', neumann_steps, 1)
  checks.check_transformation('lower_optimizer', lower_optimizer)
  optimizer = optax.with_extra_args_support(lower_optimizer)

  def init(params, inner, key):
    del params
    inner = trees.own(inner)
    return TtsaState(
      step=jnp.zeros((), jnp.int32),
      inner=inner,
      lower_opt_state=optimizer.init(inner),
      lower_grad_norm=jnp.zeros((), trees.accumulator_dtype(inner)),
      power=jnp.zeros((), jnp.int32),
      key=jax.random.clone(key),
      rejected=jnp.zeros((), jnp.int32),
    )

  def estimate(params, state, batch):
    _bilevel.check_batch(batch)
    inner, lower_opt_state = _bilevel.lower_round(
      lower, 1, optimizer, params, state, batch
    )
    value, grad_x, grad_y = _bilevel.upper_value_and_grads(
      upper, params, inner, batch.upper
    )
    grad_lower, products = _bilevel.linearize(lower, params, inner, batch.lower)
    rate = _bilevel.at(neumann_lr, state.step)
    zero = jax.tree.map(jnp.zeros_like, grad_y)

    def multiply(_, dual):  # By I - nu H.
      return _bilevel.linear_step(dual, products(dual)[1], zero, rate)[0]

    key, subkey = jax.random.split(state.key)
    power = jax.random.randint(subkey, (), 0, neumann_steps, jnp.int32)
    dual = jax.tree.map(
      lambda z, fy: (neumann_steps * rate * fy.astype(z.dtype)).astype(z.dtype),
      trees.zeros_accumulator(grad_y),
      grad_y,
    )
    dual = jax.lax.fori_loop(0, power, multiply, dual)
    cross, _ = products(dual)
    return _bilevel.accept(
      value,
      _bilevel.hypergradient(grad_x, cross),
      state,
      grad_lower,
      inner=inner,
      lower_opt_state=lower_opt_state,
      lower_grad_norm=trees.norm(grad_lower),
      power=power,
      key=key,
    )

  return base.GradientEstimator(init, estimate)
