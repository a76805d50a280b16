r"""diffGrad: Adam with a friction where the gradient stands still.

Dubey et al., *diffGrad: An Optimization Method for Convolutional Neural
Networks*, IEEE TNNLS 2020, https://arxiv.org/abs/1909.11015.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees


class ScaleByDiffGradState(NamedTuple):
  """State of `scale_by_diffgrad`."""

  step: jax.Array  # shape (), int32
  mu: base.Updates  # first moment, not damped; at least float32
  nu: base.Updates  # second moment; at least float32
  prev_grad: base.Updates  # the last gradient, in its own dtype


def _bias_correction(decay: Any, step: jax.Array, dtype: Any) -> jax.Array:
  """``1 - decay^step`` without the cancellation for decays near 1."""
  if isinstance(decay, (int, float)):
    log_decay = math.log(decay) if decay > 0.0 else -math.inf
  else:
    log_decay = jnp.log(decay)
  return -jnp.expm1(step.astype(dtype) * jnp.asarray(log_decay, dtype))


def _diffgrad_leaf(grad, mu, nu, prev_grad, step, b1, b2, eps, eps_root, late):
  """One step on one leaf: ``(update, mu, nu, prev_grad)``."""
  dtype = trees.accumulator_dtype(grad)  # Complex where the gradient is.
  real = jnp.finfo(dtype).dtype
  b1_, b2_ = jnp.asarray(b1, real), jnp.asarray(b2, real)
  # From Python numbers, 1 - b is rounded once.
  rest1, rest2 = jnp.asarray(1 - b1, real), jnp.asarray(1 - b2, real)
  eps_, eps_root_ = jnp.asarray(eps, real), jnp.asarray(eps_root, real)
  correction1 = _bias_correction(b1, step, real)
  correction2 = _bias_correction(b2, step, real)

  g = grad.astype(dtype)
  friction = jax.nn.sigmoid(jnp.abs(prev_grad.astype(dtype) - g))
  g = _with_a_square(g, real)
  new_mu = b1_ * mu.astype(dtype) + rest1 * g
  new_nu = b2_ * nu + rest2 * jnp.square(jnp.abs(g))
  if late:
    eps_ = eps_ / jnp.sqrt(correction2)
  denominator = jnp.sqrt(new_nu / correction2 + eps_root_) + eps_
  mean = new_mu / correction1
  # Where eps is zero and every gradient was, or their squares underflowed:
  # then the step is of the length of one gradient over its root, one.
  length = jnp.where(mean == 0.0, 1.0, jnp.abs(mean))
  denominator = jnp.where(denominator == 0.0, length, denominator)
  update = friction * mean / denominator
  # The gradient itself, but made to wait for the update: XLA then overwrites
  # the buffer of prev_grad after its last read, instead of copying it first
  # (1.6 times Adam's time in place of 2.3).
  last = jnp.where(jnp.isnan(update), update, grad)
  return update, new_mu.astype(mu.dtype), new_nu, last


def _with_a_square(g, real):
  """The gradient, shortened where its square would overflow.

  Else the second moment would be infinite from then on, and no step move the
  coordinate again.
  """
  largest = 0.25 * float(jnp.finfo(real).max) ** 0.5
  if not jnp.iscomplexobj(g):
    # No division: XLA would give it a loop of its own, and read its output in
    # both moments (2.5 times Adam's time in place of 1.7).
    return jnp.where(jnp.isfinite(g), jnp.clip(g, -largest, largest), g)
  size = jnp.abs(g)
  return jnp.where(jnp.isfinite(size) & (size > largest), g / size * largest, g)


def _kept(leaf, dtype):
  """The dtype in which a leaf is kept: with imaginary parts, if it has any."""
  is_complex = jnp.iscomplexobj(leaf)
  return jnp.promote_types(dtype, jnp.complex64) if is_complex else dtype


DECAY = checks.DECAY._replace(remedy='It is the decay of a moving average.')


@checks.domains(
  b1=DECAY,
  b2=DECAY,
  eps=checks.NON_NEGATIVE,
  eps_root=checks.NON_NEGATIVE,
  mu_dtype=checks.Dtype(optional=True),
  prev_grad_dtype=checks.Dtype(optional=True),
)
def scale_by_diffgrad(
  b1: float | jax.Array = 0.9,
  b2: float | jax.Array = 0.999,
  eps: float | jax.Array = 1e-8,
  eps_root: float | jax.Array = 0.0,
  *,
  eps_uncorrected: bool = False,
  mu_dtype: Any | None = None,
  prev_grad_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Rescales updates by diffGrad; see `diffgrad` for the ready optimizer.

  .. math::

    \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1) g_t \\
    \nu_t &= \beta_2 \nu_{t-1} + (1 - \beta_2) |g_t|^2 \\
    \xi_t &= \sigma(|g_{t-1} - g_t|), \qquad g_0 = 0 \\
    u_t &= \xi_t \, \frac{\mu_t / (1 - \beta_1^t)}
      {\sqrt{\nu_t / (1 - \beta_2^t) + \epsilon_{root}} + \epsilon}

  Args:
    b1: Decay of the first moment, in [0, 1).
    b2: Decay of the second moment, in [0, 1).
    eps: Added to the square root, >= 0.
    eps_root: Added under the square root, >= 0.
    eps_uncorrected: Adds ``eps`` to the root of the second moment *before* its
      bias correction, as the authors' code does; the paper and optax add it
      after. The two differ by 5e-5 after 200 steps at ``eps=1e-8`` and
      completely at ``eps=1e-2``.
    mu_dtype: Dtype in which the first moment is kept; ``None`` keeps the
      gradient's, and at least float32. In float16 moments below 6e-8 are lost
      and those above 65,504 infinite.
    prev_grad_dtype: Dtype in which the last gradient is kept; ``None`` keeps
      the gradient's.

  Returns:
    An optax transformation with `ScaleByDiffGradState`.

  Raises:
    TypeError: A hyperparameter is not a number, or a dtype not floating.
    ValueError: A hyperparameter is outside its interval; in ``update``, a
      gradient has another shape than its parameter.
  """
  checks.enforce(scale_by_diffgrad, locals())

  def init_fn(params):
    checks.check_params('params', params)
    zeros = lambda dtype: jax.tree.map(
      lambda leaf: jnp.zeros_like(leaf, dtype=dtype(leaf)), params
    )
    wide = trees.accumulator_dtype
    return ScaleByDiffGradState(
      step=jnp.zeros((), jnp.int32),
      mu=zeros(lambda leaf: _kept(leaf, mu_dtype or wide(leaf))),
      nu=zeros(lambda leaf: jnp.finfo(wide(leaf)).dtype),
      prev_grad=zeros(
        lambda leaf: _kept(leaf, prev_grad_dtype or jnp.result_type(leaf))
      ),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None and prev_grad_dtype is None:
      params = state.prev_grad  # It has their dtypes.
    step = jnp.asarray(optax.safe_increment(state.step))

    def leaf(grad, mu, nu, prev_grad):
      if grad is None or isinstance(grad, optax.MaskedNode):
        return grad, mu, nu, prev_grad
      if jnp.shape(grad) != jnp.shape(mu):
        raise ValueError(
          'updates must have the shapes of the parameters that init saw, got'
          f' {jnp.shape(grad)} where they have {jnp.shape(mu)}.'
        )
      update, mu, nu, last = _diffgrad_leaf(
        grad, mu, nu, prev_grad, step, b1, b2, eps, eps_root, eps_uncorrected
      )
      return update, mu, nu, last.astype(prev_grad.dtype)

    is_none = lambda leaf: leaf is None
    rows = jax.tree.map(
      leaf, updates, state.mu, state.nu, state.prev_grad, is_leaf=is_none
    )
    treedef = jax.tree.structure(updates, is_leaf=is_none)
    rows = treedef.flatten_up_to(rows)
    columns = [treedef.unflatten([row[i] for row in rows]) for i in range(4)]
    updates = trees.cast_updates(columns[0], updates, params)
    return updates, ScaleByDiffGradState(step, *columns[1:])

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@checks.domains(
  learning_rate=checks.LEARNING_RATE,
  b1=DECAY,
  b2=DECAY,
  eps=checks.NON_NEGATIVE,
  eps_root=checks.NON_NEGATIVE,
  weight_decay=checks.NON_NEGATIVE._replace(optional=True),
  mu_dtype=checks.Dtype(optional=True),
  prev_grad_dtype=checks.Dtype(optional=True),
)
def diffgrad(
  learning_rate: base.ScalarOrSchedule,
  b1: float | jax.Array = 0.9,
  b2: float | jax.Array = 0.999,
  eps: float | jax.Array = 1e-8,
  eps_root: float | jax.Array = 0.0,
  weight_decay: float | jax.Array | None = None,
  mask: Any | Callable[[base.Params], Any] | None = None,
  *,
  decoupled: bool = True,
  eps_uncorrected: bool = False,
  mu_dtype: Any | None = None,
  prev_grad_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam with a friction that falls where the gradient stands still.

  The friction :math:`\xi_t = \sigma(|g_{t-1} - g_t|) \in [1/2, 1)` halves
  Adam's step where a coordinate's gradient doesn't change, and leaves it where
  the gradient jumps. Choose it where Adam overshoots a narrow minimum; where
  gradients change little from step to step, it is Adam at half the learning
  rate.

  .. math::

    \theta_t = \theta_{t-1} - \alpha_t \left( \sigma(|g_{t-1} - g_t|) \,
      \frac{\hat\mu_t}{\sqrt{\hat\nu_t} + \epsilon}
      + \lambda \theta_{t-1} \right)

  with Adam's bias-corrected moments, see `scale_by_diffgrad`.

  Args:
    learning_rate: Number, scalar array or optax schedule.
    b1: Decay of the first moment, in [0, 1).
    b2: Decay of the second moment, in [0, 1).
    eps: Added to the square root, >= 0.
    eps_root: Added under the square root, >= 0.
    weight_decay: The strength :math:`\lambda`; ``None`` for none.
    mask: Tree of bools, or function of the parameters that gives one: where the
      weight decay applies; ``None`` for everywhere.
    decoupled: Adds the decay after the rescaling, as in AdamW; ``False`` adds
      it to the gradient, as the authors' code does.
    eps_uncorrected: The authors' place of ``eps``, see `scale_by_diffgrad`.
    mu_dtype: Dtype in which the first moment is kept.
    prev_grad_dtype: Dtype in which the last gradient is kept.

  Returns:
    An optax transformation.

  Raises:
    TypeError: A hyperparameter is not a number, or a dtype not floating.
    ValueError: A hyperparameter is outside its interval; in ``update``, a
      gradient has another shape than its parameter.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> loss = lambda x: jnp.sum((x - 1.0) ** 2)
    >>> tx, x = optlab.diffgrad(0.3), jnp.zeros(3)
    >>> state = tx.init(x)
    >>> for _ in range(3):
    ...   value, grads = jax.value_and_grad(loss)(x)
    ...   updates, state = tx.update(grads, state, x)
    ...   x = optax.apply_updates(x, updates)
    ...   print(f'{value:.2f}')
    3.00
    1.62
    0.91

  References:
    Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri, *diffGrad: An
    Optimization Method for Convolutional Neural Networks*, IEEE TNNLS 2020,
    https://arxiv.org/abs/1909.11015

  Notes:
    The friction damps the momentum that is used, not the one that is kept; the
    first version of the authors' code damped both, and their ``prev_grad`` was
    an alias of the current gradient. Leaves are computed in at least float32.

    Cost per step: one gradient, three buffers of the parameters' size (Adam
    keeps two).

    On small networks the friction stays near 1/2, and the method close to Adam
    at half the learning rate; tune the learning rate of both before comparing.
    docs/reproduced.md says how they then compare.

    As with Adam, a gradient that is not finite stays in the moments: wrap in
    `optax.apply_if_finite` where that may happen.
  """
  checks.enforce(diffgrad, locals())
  if weight_decay is not None:
    decay = optax.add_decayed_weights(weight_decay, mask)
  else:
    decay = optax.identity()
  scale = scale_by_diffgrad(
    b1,
    b2,
    eps,
    eps_root,
    eps_uncorrected=eps_uncorrected,
    mu_dtype=mu_dtype,
    prev_grad_dtype=prev_grad_dtype,
  )
  return optax.chain(
    *((scale, decay) if decoupled else (decay, scale)),
    optax.scale_by_learning_rate(learning_rate),
  )
