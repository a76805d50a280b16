"""TTSA: one random term of a Neumann series of the lower Hessian."""

from collections.abc import Callable
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


class TtsaMemory(NamedTuple):
  """What `ttsa` keeps beside a `BilevelState`'s other fields."""

  key: jax.Array  # typed key of the powers
  power: jax.Array  # shape (), int32, the last power drawn


@checks.domains(
  **_bilevel.LEVELS,
  neumann_lr=_bilevel.RATE,
  neumann_steps=checks.Integer(),
  **_bilevel.SYSTEM,
)
def ttsa(
  upper: _problem.Objective,
  lower: _problem.Objective,
  lower_optimizer: optax.GradientTransformation | None,
  neumann_lr: base.ScalarOrSchedule,
  *,
  neumann_steps: int = 5,
  dual_radius: float | jax.Array | None = None,
  damping: base.ScalarOrSchedule | None = None,
  curvature: Callable[..., base.Operator] | None = None,
  lower_map: _problem.Objective | None = None,
  has_aux: bool = False,
  reuse_sample: bool = False,
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
    dual_radius: See `stocbio`.
    damping: See `soba`.
    curvature: See `soba`.
    lower_map: See `soba`.
    has_aux: See `soba`.
    reuse_sample: Whether lower steps take ``batch.lower`` where the batch has
      no ``step_samples``.

  Returns:
    A `GradientEstimator`: ``init(x, y, key)`` takes a typed key, and
    ``batch.step_samples`` has a leading axis of one. Its state is a
    `BilevelState` whose ``memory`` is a `TtsaMemory`.

  Raises:
    TypeError: An argument is of a wrong type, or a leaf not a real array.
    ValueError: A number is outside its domain, ``lower_optimizer`` keeps y in
      a set, or the step samples are missing.

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
    average ``(Q - 1) / 2 + 1`` Hessian-vector products (the last to see whether
    ``g_yy`` is indefinite) and one cross product. Under ``vmap`` every member
    waits for the largest power. The estimate's variance grows with Q.
    ``info.ok`` is as in `stocbio`; ``info.truncated`` is what a step's term
    tells of the whole series, less than there.
  """
  checks.enforce(ttsa, locals())
  problem = _bilevel.problem_of(
    upper, lower, lower_optimizer, has_aux=has_aux, lower_map=lower_map,
    curvature=curvature, damping=damping, reuse_sample=reuse_sample,
  )  # fmt: skip

  def init(params, inner, key):
    memory = TtsaMemory(checks.as_key('key', key), jnp.zeros((), jnp.int32))
    state = _state.init_state(
      problem, params, inner, memory=memory, series=True
    )
    info = state.info._replace(dual_residual=())
    return state._replace(dual=(), info=info)

  def estimate(params, state, batch):
    _state.check_batch(batch)
    inner, lower_opt_state, held = _lower.lower_round(
      problem, 1, params, state, batch
    )
    value, upper_aux, grad_x, grad_y = _problem.upper_value_and_grads(
      problem, params, inner, batch.upper
    )
    point = _problem.Point(params, inner, batch.lower, state.step)
    lower, products = _problem.linearize(problem, point)
    rate = trees.at_step(neumann_lr, state.step)
    key, subkey = jax.random.split(state.memory.key)
    power = jax.random.randint(subkey, (), 0, neumann_steps, jnp.int32)
    dual = _term(products, grad_y, rate, neumann_steps, power)
    dual, inside, length = _dual.hold(
      dual, _dual.series_radius(dual_radius, neumann_steps * rate, grad_y)
    )
    cross, product = products(dual)
    after = _lower.Step(inner, lower_opt_state)
    others, pairs = _lag.beside(dual, lower.grad, after, state.inner)
    size, scale, slope, reached, bent, moved, along = trees.norms(
      grad_y, product, *others, products=(*pairs, (dual, product))
    )
    pace, behind = _lag.follow(
      state.pace, state.step, bent, scale, moved, reached
    )
    following = trees.norm(
      _dual.subtract(dual, rate, trees.cast_like(product, dual))
    )
    result = base.Estimate(
      value,
      _bilevel.hypergradient(grad_x, cross),
      aux=_bilevel.aux_of(problem, upper_aux, lower.aux),
    )
    return _state.accept(
      result,
      state,
      (length, slope, reached),
      seen=True,
      sizes=(slope, reached),
      lower_value=lower.value,
      inner=inner,
      lower_opt_state=lower_opt_state,
      pace=pace,
      lower_grad_norm=slope,
      truncated=_dual.lacking(
        length,
        following,
        length**2 - rate * along,
        neumann_steps**2 * rate * size,
        cross,
        neumann_steps - 1 - power,
      ),
      ok=inside
      & ~behind
      & _dual.is_convex(along, length * scale)
      & _dual.feels(along, length, size),
      constrained=held,
      memory=TtsaMemory(key, power),
    )

  return base.GradientEstimator(init, estimate)


def _term(products, grad_y, rate, count, power):
  """``count * rate * (I - rate * g_yy)**power f_y``."""

  def multiply(_, dual):
    return _dual.subtract(dual, rate, trees.cast_like(products(dual)[1], dual))

  dual = jax.tree.map(
    lambda z, fy: (count * rate * fy.astype(z.dtype)).astype(z.dtype),
    trees.zeros_accumulator(grad_y),
    grad_y,
  )
  return jax.lax.fori_loop(0, power, multiply, dual)
