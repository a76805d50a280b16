"""TTSA: one random term of a Neumann series of the lower Hessian."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _bilevel
from optlab.bilevel import _lower


class TtsaMemory(NamedTuple):
  """What `ttsa` keeps beside a `BilevelState`'s other fields."""

  key: jax.Array  # typed key of the powers
  power: jax.Array  # shape (), int32, the last power drawn


@checks.domains(
  **_bilevel.LEVELS, neumann_lr=_bilevel.RATE, neumann_steps=checks.Integer()
)
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
    ``batch.step_samples`` has a leading axis of one. Its state is a
    `BilevelState` whose ``memory`` is a `TtsaMemory`.

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
  checks.enforce(ttsa, locals())
  optimizer = optax.with_extra_args_support(lower_optimizer)

  def init(params, inner, key):
    del params
    memory = TtsaMemory(jax.random.clone(key), jnp.zeros((), jnp.int32))
    return _bilevel.init_state(optimizer, inner, dual=False, memory=memory)

  def estimate(params, state, batch):
    _bilevel.check_batch(batch)
    inner, lower_opt_state = _lower.lower_round(
      lower, 1, optimizer, params, state, batch
    )
    value, grad_x, grad_y = _bilevel.upper_value_and_grads(
      upper, params, inner, batch.upper
    )
    grad_lower, products = _bilevel.linearize(lower, params, inner, batch.lower)
    rate = trees.at_step(neumann_lr, state.step)
    zero = jax.tree.map(jnp.zeros_like, grad_y)

    def multiply(_, dual):  # By I - nu H.
      return _bilevel.dual_step(dual, products(dual)[1], zero, rate)[0]

    key, subkey = jax.random.split(state.memory.key)
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
      memory=TtsaMemory(key, power),
    )

  return base.GradientEstimator(init, estimate)
