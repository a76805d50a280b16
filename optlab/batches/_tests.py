r"""Tests that request a batch size from the noise in a gradient.

A *test* is a function ``(grads, **extras) -> requested size``, a real number
from the moments that `per_example` makes; `grow_batch` acts on it. With b
examples and gradients :math:`g_i` of mean g, all variances have the divisor
``b - 1`` and are over the whole model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optlab import checks
from optlab import trees

Test = Callable[..., jax.Array]


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
  """``a / b``, where 0 / 0 is 0 and a / 0 infinite."""
  safe = jnp.where(b == 0.0, 1.0, b)
  return jnp.where(b == 0.0, jnp.where(a == 0.0, 0.0, a * jnp.inf), a / safe)


def _real(tree):
  return jnp.finfo(trees.accumulator_dtype(tree)).dtype


def _variance(total, sample_size):
  return _ratio(total, (sample_size - 1).astype(total.dtype))


def _trace(grads, name, extras):
  """``(||g||^2, V)``, from the norm or summed from the coordinates."""
  wide = _real(grads)
  total = extras.get('sum_sq_diff_norm')
  if total is None and extras.get('sum_sq_diff_grads') is not None:
    leaves = jax.tree.leaves(extras['sum_sq_diff_grads'])
    total = sum((jnp.sum(leaf.astype(wide)) for leaf in leaves), 0.0)
  checks.require_extra(
    name,
    'per_example(losses, ghost_norms), or vmap_grads or microbatch_means in'
    ' place of ghost_norms',
    sum_sq_diff_norm=total,
    sample_size=extras.get('sample_size'),
  )
  trace = _variance(jnp.asarray(total, wide), _size(extras))
  return trees.sq_norm(grads, wide), trace


def _inner(grads, name, extras):
  """``(||g||^2, Var(<g_i, g>) / ||g||^2)``."""
  wide = _real(grads)
  total = extras.get('sum_sq_diff_inner')
  checks.require_extra(
    name,
    'per_example(losses, ..., inner_products=jvp_inner_products)',
    sum_sq_diff_inner=total,
    sample_size=extras.get('sample_size'),
  )
  grad_sq = trees.sq_norm(grads, wide)
  # Divided once here and once by the caller: ||g||^4 would underflow.
  scaled = _ratio(jnp.asarray(total, wide), grad_sq)
  return grad_sq, _variance(scaled, _size(extras))


def _size(extras):
  return jnp.asarray(extras['sample_size'])


@checks.domains(eta=checks.POSITIVE)
def norm_test(eta: float | jax.Array) -> Test:
  r"""The noise of the gradient is at most ``eta`` times its norm.

  .. math:: r = \frac{V}{\eta^2 \|g\|^2}

  with :math:`V` the trace of the covariance of the per-example gradients. The
  strictest of the tests but the coordinate-wise: choose it where the direction
  of every step should be right.

  Args:
    eta: Positive; the smaller, the faster the batch grows.

  Returns:
    A test that takes ``sum_sq_diff_norm`` (or ``sum_sq_diff_grads``, optax's)
    and ``sample_size``.

  Raises:
    TypeError: ``eta`` is not a real number.
    ValueError: ``eta`` is not a finite number above 0.

  References:
    Byrd, Chin, Nocedal, Wu, *Sample size selection in optimization methods for
    machine learning*, Math. Program. 2012,
    https://doi.org/10.1007/s10107-012-0572-5
  """
  checks.enforce(norm_test, locals())

  def test(grads, **extras):
    grad_sq, trace = _trace(grads, 'norm_test', extras)
    return _ratio(trace, jnp.asarray(eta, trace.dtype) ** 2 * grad_sq)

  return test


@checks.domains(eta=checks.POSITIVE)
def coordinate_norm_test(eta: float | jax.Array) -> Test:
  r"""The norm test in every coordinate by itself.

  .. math:: r = \max_j \frac{\mathrm{var}_j}{\eta^2 g_j^2}

  The condition under which AdAdaGrad's convergence is proved. One coordinate
  whose mean gradient is near zero sends the batch to its maximum, which on
  neural networks is the first step: use it on small convex problems.

  Args:
    eta: Positive; the smaller, the faster the batch grows.

  Returns:
    A test that takes ``sum_sq_diff_grads`` and ``sample_size``.

  Raises:
    TypeError: ``eta`` is not a real number.
    ValueError: ``eta`` is not a finite number above 0.
  """
  checks.enforce(coordinate_norm_test, locals())

  def test(grads, **extras):
    squares: Any = extras.get('sum_sq_diff_grads')
    checks.require_extra(
      'coordinate_norm_test',
      'per_example(losses, vmap_grads)',
      sum_sq_diff_grads=squares,
      sample_size=extras.get('sample_size'),
    )
    checks.check_same_tree('sum_sq_diff_grads', squares, 'grads', grads)
    wide = _real(grads)
    scale = jnp.asarray(eta, wide) ** 2

    def request(g, total):
      g_sq = jnp.square(jnp.abs(g).astype(wide))
      variance = _variance(total.astype(wide), _size(extras))
      return jnp.max(_ratio(variance, scale * g_sq), initial=0.0)

    # Not Python's max: a NaN must reach the rule.
    requests = jax.tree.leaves(jax.tree.map(request, grads, squares))
    return jnp.max(jnp.stack(requests + [jnp.zeros((), wide)]))

  return test


@checks.domains(theta=checks.POSITIVE)
def inner_product_test(theta: float | jax.Array) -> Test:
  r"""Per-example gradients agree with the mean on its own direction.

  .. math::

    r = \frac{\mathrm{Var}(p_i)}{\theta^2 \|g\|^4}, \qquad
    p_i = \langle g_i, g \rangle

  Steps are descent directions with high probability. Choose it for the slowest
  growth; noise orthogonal to the gradient isn't seen, and where the mean
  gradient is exactly 0 (0 / 0) the batch stays.

  Args:
    theta: Positive; the smaller, the faster the batch grows.

  Returns:
    A test that takes ``sum_sq_diff_inner`` and ``sample_size``.

  Raises:
    TypeError: ``theta`` is not a real number.
    ValueError: ``theta`` is not a finite number above 0.

  References:
    Bollapragada, Byrd, Nocedal, *Adaptive sampling strategies for stochastic
    optimization*, SIAM J. Optim. 2018, https://arxiv.org/abs/1710.11258
  """
  checks.enforce(inner_product_test, locals())

  def test(grads, **extras):
    grad_sq, scaled = _inner(grads, 'inner_product_test', extras)
    return _ratio(scaled, jnp.asarray(theta, scaled.dtype) ** 2 * grad_sq)

  return test


@checks.domains(theta=checks.POSITIVE, nu=checks.POSITIVE)
def augmented_inner_product_test(
  theta: float | jax.Array, nu: float | jax.Array
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

  Returns:
    A test that takes ``sum_sq_diff_norm`` (or ``sum_sq_diff_grads``),
    ``sum_sq_diff_inner`` and ``sample_size``.

  Raises:
    TypeError: ``theta`` or ``nu`` is not a real number.
    ValueError: ``theta`` or ``nu`` is not a finite number above 0.

  References:
    Bollapragada, Byrd, Nocedal, *Adaptive sampling strategies for stochastic
    optimization*, SIAM J. Optim. 2018, https://arxiv.org/abs/1710.11258
  """
  checks.enforce(augmented_inner_product_test, locals())

  def test(grads, **extras):
    name = 'augmented_inner_product_test'
    grad_sq, trace = _trace(grads, name, extras)
    _, along = _inner(grads, name, extras)
    across = trace - along
    across = jnp.where(across < 0.0, 0.0, across)  # Rounding; NaN stays.
    bound = lambda scale: jnp.asarray(scale, trace.dtype) ** 2 * grad_sq
    return jnp.maximum(_ratio(along, bound(theta)), _ratio(across, bound(nu)))

  return test
