"""What `minimize` returns, and what it tells a callback."""

from typing import Any, NamedTuple

import jax

from optlab import _counts
from optlab import base


class MinimizeResult(NamedTuple):
  """Where `minimize` stopped, and why.

  Attributes:
    params: The last iterate.
    opt_state: The transformation's state.
    value: Scalar, the objective at ``params``.
    grad_norm: Scalar, the Euclidean norm of the gradient at ``params``, with
      bounds of the part of it that no active bound holds.
    steps: int32 scalar, the steps taken.
    status: int32 scalar, one of the constants below.
    trace: What ``trace`` returned before each step and at the end, stacked on a
      leading axis of ``max_steps + 1``; rows beyond ``steps`` are zero.
    aux: Auxiliary output of ``fun`` at ``params``; ``()`` where there is none.
    counts: Values, gradients, products and solves of the run, `Counts`.
    active: Which bounds hold the point: a tree of int8 like ``params``, -1 at
      the lower one, 1 at the upper one, else 0; ``()`` without bounds.
  """

  params: base.Params
  opt_state: base.OptState
  value: jax.Array
  grad_norm: jax.Array
  steps: jax.Array
  status: jax.Array
  trace: Any
  aux: Any = ()
  counts: Any = ()
  active: Any = ()

  @property
  def success(self) -> jax.Array:
    """Whether a tolerance was met: `GRAD_TOL` or `TARGET_VALUE`.

    A saddle, a maximum and a plateau meet ``grad_tol`` too: only derivatives
    through `minimize`, which are NaN there, look at the curvature.
    """
    return (self.status == GRAD_TOL) | (self.status == TARGET_VALUE)

  @property
  def message(self) -> str:
    """Why it stopped, in words; of a result of one run, outside of jit."""
    return MESSAGES[int(self.status)]


MAX_STEPS, GRAD_TOL, TARGET_VALUE, STALLED, NON_FINITE, REJECTED = range(6)
STOPPED, MAX_SECONDS = 6, 7
MESSAGES = (
  'max_steps were taken.',
  'The norm of the gradient is at most grad_tol.',
  'The value is at most target_value.',
  'No more progress: rounding, or stall_steps, ended the descent.',
  'The value or the gradient is not finite.',
  'All that the transformation tried was rejected.',
  'The callback stopped it.',
  'max_seconds have passed.',
)


class Progress(NamedTuple):
  """What a callback of `minimize` is told, as numpy arrays on the host.

  Attributes:
    params: The point.
    value: The objective there.
    grad_norm: The Euclidean norm of the gradient there.
    steps: The steps taken.
    counts: Values, gradients, products and solves so far.
  """

  params: base.Params
  value: Any
  grad_norm: Any
  steps: Any
  counts: _counts.Counts
