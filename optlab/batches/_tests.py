r"""Tests that request a batch size from the noise in a gradient.

A *test* is a pair of functions: what it remembers, and a requested size, a real
number, from the moments that `per_example` makes; `grow_batch` acts on it. With
b examples and gradients :math:`g_i` of mean g, all variances have the divisor
``b - 1`` and are over the whole model.

On one batch :math:`\|g\|^2` contains the noise of that batch, V / b, so that no
test can ask for much more than :math:`b / \eta^2`. With a ``decay`` the tests
average their moments over steps, and take the noise off.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optlab import checks
from optlab.batches import _statistics
from optlab.batches._statistics import Test

DECAY = checks.OPEN_FRACTION._replace(optional=True)


@checks.domains(eta=checks.POSITIVE, decay=DECAY)
def norm_test(
  eta: float | jax.Array, *, decay: float | jax.Array | None = None
) -> Test:
  r"""The noise of the gradient is at most ``eta`` times its norm.

  .. math:: r = \frac{V}{\eta^2 \|g\|^2}

  with :math:`V` the trace of the covariance of the per-example gradients. The
  strictest of the tests but the coordinate-wise: choose it where the direction
  of every step should be right.

  Args:
    eta: Positive; the smaller, the faster the batch grows.
    decay: Of averages over steps, in (0, 1); ``None`` for this step alone.

  Returns:
    A test that takes ``sum_sq_diff_norm`` (or ``sum_sq_diff_grads``, optax's)
    and ``sample_size``.

  Raises:
    TypeError: An argument is not a real number.
    ValueError: ``eta`` is not a finite number above 0, or ``decay`` outside
      (0, 1).

  References:
    Byrd, Chin, Nocedal, Wu, *Sample size selection in optimization methods for
    machine learning*, Math. Program. 2012,
    https://doi.org/10.1007/s10107-012-0572-5
  """
  checks.enforce(norm_test, locals())

  def moments(grads, extras, averaged):
    grad_sq, trace = _statistics.trace_of(grads, 'norm_test', extras)
    if averaged:
      grad_sq = _statistics.unbiased(grad_sq, trace, extras)
    return {'grad_sq': grad_sq, 'trace': trace}

  def request(found):
    grad_sq, trace = found['grad_sq'], found['trace']
    grad_sq = grad_sq if decay is None else _statistics.above_zero(grad_sq)
    return _statistics.ratio(
      trace, jnp.asarray(eta, trace.dtype) ** 2 * grad_sq
    )

  return _statistics.from_moments(
    moments, request, _statistics.scalars('grad_sq', 'trace'), decay
  )


@checks.domains(eta=checks.POSITIVE, decay=DECAY)
def coordinate_norm_test(
  eta: float | jax.Array, *, decay: float | jax.Array | None = None
) -> Test:
  r"""The norm test in every coordinate by itself.

  .. math:: r = \max_j \frac{\mathrm{var}_j}{\eta^2 g_j^2}

  The condition under which AdAdaGrad's convergence is proved. One coordinate
  whose mean gradient is near zero sends the batch to its maximum, which on
  neural networks is the first step: use it on small convex problems.

  Args:
    eta: Positive; the smaller, the faster the batch grows.
    decay: Of averages over steps, in (0, 1); ``None`` for this step alone.

  Returns:
    A test that takes ``sum_sq_diff_grads`` and ``sample_size``.

  Raises:
    TypeError: An argument is not a real number.
    ValueError: ``eta`` is not a finite number above 0, or ``decay`` outside
      (0, 1).
  """
  checks.enforce(coordinate_norm_test, locals())

  def moments(grads, extras, averaged):
    extras, unit = _statistics.scaled(extras), _statistics.unit_of(extras)
    squares: Any = extras.get('sum_sq_diff_grads')
    checks.require_extra(
      'coordinate_norm_test',
      'per_example(losses, vmap_grads)',
      sum_sq_diff_grads=squares,
      sample_size=extras.get('sample_size'),
    )
    checks.check_same_tree('sum_sq_diff_grads', squares, 'grads', grads)
    wide = _statistics.real(grads)
    variance = jax.tree.map(
      lambda total: _statistics.variance(
        total.astype(wide), _statistics.size_of(extras)
      ),
      squares,
    )

    def square(g, total):
      size = jnp.abs(g).astype(wide) / unit
      return _statistics.known(jnp.square(size), total, size)

    grad_sq = jax.tree.map(square, grads, squares)
    if averaged:
      grad_sq = jax.tree.map(
        lambda g, v: _statistics.unbiased(g, v, extras), grad_sq, variance
      )
    return {'grad_sq': grad_sq, 'variance': variance}

  def request(found):
    def leaf(g_sq, variance):
      scale = jnp.asarray(eta, variance.dtype) ** 2
      ratio = _statistics.ratio(variance, scale * g_sq)
      if decay is not None:  # Where noise is all that is known.
        ratio = jnp.where(g_sq > 0, ratio, 0.0)
      return jnp.max(ratio, initial=0.0)

    # Not Python's max: a NaN must reach the rule.
    requests = jax.tree.map(leaf, found['grad_sq'], found['variance'])
    requests = jax.tree.leaves(requests)
    return jnp.max(jnp.stack(requests)) if requests else jnp.zeros(())

  def like(params):
    zeros = lambda leaf: jnp.zeros_like(leaf, dtype=_statistics.real(params))
    tree = jax.tree.map(zeros, params)
    return {'grad_sq': tree, 'variance': jax.tree.map(jnp.copy, tree)}

  return _statistics.from_moments(moments, request, like, decay)


@checks.domains(theta=checks.POSITIVE, decay=DECAY)
def inner_product_test(
  theta: float | jax.Array, *, decay: float | jax.Array | None = None
) -> Test:
  r"""Per-example gradients agree with the mean on its own direction.

  .. math::

    r = \frac{\mathrm{Var}(p_i)}{\theta^2 \|g\|^4}, \qquad
    p_i = \langle g_i, g \rangle

  Steps are descent directions with high probability. Choose it for the slowest
  growth; noise orthogonal to the gradient isn't seen, and where the mean
  gradient is exactly 0 (0 / 0) the batch stays.

  Args:
    theta: Positive; the smaller, the faster the batch grows.
    decay: Of averages over steps, in (0, 1); ``None`` for this step alone.

  Returns:
    A test that takes ``sum_sq_diff_inner`` and ``sample_size``.

  Raises:
    TypeError: An argument is not a real number.
    ValueError: ``theta`` is not a finite number above 0, or ``decay`` outside
      (0, 1).

  References:
    Bollapragada, Byrd, Nocedal, *Adaptive sampling strategies for stochastic
    optimization*, SIAM J. Optim. 2018, https://arxiv.org/abs/1710.11258
  """
  checks.enforce(inner_product_test, locals())

  def moments(grads, extras, averaged):
    name = 'inner_product_test'
    grad_sq, along = _statistics.inner_of(grads, name, extras)
    if averaged:
      # Var(p_i): its division by ||g||^2 comes after the averages.
      along *= grad_sq
      grad_sq = _statistics.unbiased(
        *_statistics.trace_of(grads, name, extras), extras
      )
    return {'grad_sq': grad_sq, 'along': along}

  def request(found):
    grad_sq, along = found['grad_sq'], found['along']
    if decay is not None:
      grad_sq = _statistics.above_zero(grad_sq)
      along = _statistics.ratio(along, grad_sq)
    return _statistics.ratio(
      along, jnp.asarray(theta, along.dtype) ** 2 * grad_sq
    )

  return _statistics.from_moments(
    moments, request, _statistics.scalars('grad_sq', 'along'), decay
  )


@checks.domains(theta=checks.POSITIVE, nu=checks.POSITIVE, decay=DECAY)
def augmented_inner_product_test(
  theta: float | jax.Array,
  nu: float | jax.Array,
  *,
  decay: float | jax.Array | None = None,
) -> Test:
  r"""The inner product test, and a bound on the noise orthogonal to g.

  .. math::

    r = \max\left( \frac{\mathrm{Var}(p_i)}{\theta^2 \|g\|^4},
      \frac{V - \mathrm{Var}(p_i) / \|g\|^2}{\nu^2 \|g\|^2} \right)

  The second numerator is the variance of the components orthogonal to the
  mean, by Pythagoras: no orthogonal component is formed.

  Args:
    theta: Positive; for the noise along the gradient.
    nu: Positive; for the noise orthogonal to it.
    decay: Of averages over steps, in (0, 1); ``None`` for this step alone.

  Returns:
    A test that takes ``sum_sq_diff_norm`` (or ``sum_sq_diff_grads``),
    ``sum_sq_diff_inner`` and ``sample_size``.

  Raises:
    TypeError: An argument is not a real number.
    ValueError: ``theta`` or ``nu`` is not a finite number above 0, or ``decay``
      outside (0, 1).

  References:
    Bollapragada, Byrd, Nocedal, *Adaptive sampling strategies for stochastic
    optimization*, SIAM J. Optim. 2018, https://arxiv.org/abs/1710.11258
  """
  checks.enforce(augmented_inner_product_test, locals())

  def moments(grads, extras, averaged):
    name = 'augmented_inner_product_test'
    grad_sq, trace = _statistics.trace_of(grads, name, extras)
    grad_sq_here, along = _statistics.inner_of(grads, name, extras)
    if averaged:
      along *= grad_sq_here
      grad_sq = _statistics.unbiased(grad_sq, trace, extras)
    return {'grad_sq': grad_sq, 'trace': trace, 'along': along}

  def request(found):
    grad_sq, trace, along = (
      found[name] for name in ('grad_sq', 'trace', 'along')
    )
    if decay is not None:
      grad_sq = _statistics.above_zero(grad_sq)
      along = _statistics.ratio(along, grad_sq)
    across = trace - along
    across = jnp.where(across < 0.0, 0.0, across)  # Rounding; NaN stays.
    bound = lambda scale: jnp.asarray(scale, trace.dtype) ** 2 * grad_sq
    return jnp.maximum(
      _statistics.ratio(along, bound(theta)),
      _statistics.ratio(across, bound(nu)),
    )

  return _statistics.from_moments(
    moments, request, _statistics.scalars('grad_sq', 'trace', 'along'), decay
  )
