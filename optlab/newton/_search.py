"""Rules that move the smoothness ``gamma`` in the search of `gns_newton`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import checks

FACTOR = checks.Real(low=1.0, low_open=True)


class Trial(NamedTuple):
  """What a search rule sees of a trial; every field is a scalar.

  Attributes:
    gamma: The smoothness tried.
    shift: The regularization tried, ``lambda = |g|_* / gamma``.
    attempt: The systems solved since the last accepted trial, of an earlier
      step too, this one included: 1 for the first.
    accepted: Whether the trial is accepted.
    start_norm: Dual norm of the gradient ``g`` at the current point.
    grad_norm: Dual norm of the gradient ``g+`` at the trial point.
    step_norm: Norm of the step ``d``.
    residual_norm: Dual norm of ``g+ + lambda B d``, the error of the quadratic
      model's gradient.
  """

  gamma: jax.Array
  shift: jax.Array
  attempt: jax.Array
  accepted: jax.Array
  start_norm: jax.Array
  grad_norm: jax.Array
  step_norm: jax.Array
  residual_norm: jax.Array


class SearchRule(NamedTuple):
  """How the smoothness moves: a pair of pure functions.

  Attributes:
    init: ``gamma -> state``, any pytree of arrays that the rule remembers;
      ``gamma`` is the first smoothness, or 0 where it is still to be chosen.
    update: ``(trial, state) -> (gamma, state)``. After a rejected trial the
      result is tried next; after an accepted one the next step starts from it.
      A ``gamma`` that is not positive and finite leaves smoothness and state
      as they are, and a search that stalls undoes what it did to both.
  """

  init: Callable[[jax.Array], Any]
  update: Callable[[Trial, Any], tuple[jax.Array, Any]]


def stateless(next_gamma: Callable[[Trial], jax.Array]) -> SearchRule:
  """A rule that remembers nothing, from ``trial -> gamma``."""
  return SearchRule(
    lambda gamma: (), lambda trial, state: (next_gamma(trial), state)
  )


@checks.domains(factor=FACTOR, gamma_min=checks.NON_NEGATIVE)
def double(
  factor: float | jax.Array = 2.0, gamma_min: float | jax.Array = 1e-9
) -> SearchRule:
  r"""The paper's rule: up after every success, down after every failure.

  .. math:: \gamma^+ = \max(2 \gamma, \gamma_{\min}) \text{ if accepted, else }
    \gamma / 2

  Args:
    factor: The factor in both directions, 2 in the paper.
    gamma_min: The least smoothness after a success, 1e-9 in the paper.

  Returns:
    A `SearchRule`.

  Raises:
    TypeError: An argument is not a real number.
    ValueError: ``factor`` is not above 1, or ``gamma_min`` negative.
  """
  checks.enforce(double, locals())

  def next_gamma(trial):
    return jnp.where(
      trial.accepted,
      jnp.maximum(factor * trial.gamma, gamma_min),
      trial.gamma / factor,
    )

  return stateless(next_gamma)


@checks.domains(factor=FACTOR)
def hold(factor: float | jax.Array = 4.0) -> SearchRule:
  r"""Moves ``lambda`` itself, and down only after a step without a failure.

  .. math:: \lambda^+ = \lambda / 4 \text{ if accepted at the first trial, }
    \lambda \text{ if later, } 4 \lambda \text{ if rejected}

  and at least :math:`\epsilon |g|_* / |d|`, which rounding hides beside the
  curvature. A regularization that just failed is not tried again at once, which
  `double` does about every other step. On mushrooms (logistic regression, ridge
  1/n and 1e-6) 10 and 15 trials to 1e-8, where `double` from the paper's start
  takes 12 and 20.

  Args:
    factor: The factor in both directions.

  Returns:
    A `SearchRule`.

  Raises:
    TypeError: An argument is not a real number.
    ValueError: ``factor`` is not above 1.
  """
  checks.enforce(hold, locals())

  def next_gamma(trial):
    down = jnp.where(trial.attempt == 1, factor, 1.0)
    shift = jnp.maximum(trial.shift / down, _least(trial))
    return jnp.where(
      trial.accepted, trial.grad_norm / shift, trial.gamma / factor
    )

  return stateless(next_gamma)


@checks.domains(factor=FACTOR, max_drop=FACTOR)
def adaptive(
  factor: float | jax.Array = 4.0, max_drop: float | jax.Array = 1000.0
) -> SearchRule:
  r"""Goes down as far as the smoothness just measured allows.

  .. math:: \lambda^+ = \min\left(c\, \lambda, \max\left(\frac{\lambda}{1000},
    \frac{|g^+ + \lambda B d|_*}{|d|}\right)\right)

  with :math:`c = 1/4` where the first attempt was accepted, 1 where a later one
  was, :math:`4 \lambda` after a rejection, and at least :math:`\epsilon |g|_* /
  |d|`, which rounding hides beside the curvature.

  The default: `hold`, with `measured` where that is smaller. Where the model is
  good, the regularization fades in a step or two: a quadratic takes 3 or 4
  evaluations in place of 10.

  Args:
    factor: ``lambda`` grows by it after a failure, and falls by it at least
      after a step without one.
    max_drop: ``lambda`` falls by it at most.

  Returns:
    A `SearchRule`.

  Raises:
    TypeError: An argument is not a real number.
    ValueError: ``factor`` or ``max_drop`` is not above 1.
  """
  checks.enforce(adaptive, locals())

  def next_gamma(trial):
    low = trial.shift / max_drop
    high = trial.shift / jnp.where(trial.attempt == 1, factor, 1.0)
    measured = trial.residual_norm / trial.step_norm
    shift = jnp.minimum(high, jnp.maximum(low, measured))
    shift = jnp.maximum(shift, _least(trial))
    return jnp.where(
      trial.accepted, trial.grad_norm / shift, trial.gamma / factor
    )

  return stateless(next_gamma)


def _least(trial):
  """What rounding hides beside the curvature along the step.

  A smaller regularization is none; but fallen on and on, a few hundred steps
  long, it would take as many attempts to come back, and a search has forty.
  """
  eps = jnp.finfo(trial.shift.dtype).eps
  return eps * trial.start_norm / trial.step_norm


@checks.domains(factor=FACTOR)
def measured(factor: float | jax.Array = 2.0) -> SearchRule:
  r"""Takes the smoothness from its definition at the step just made.

  .. math:: \lambda^+ = |g^+ + \lambda B d|_* / |d|

  One trial a step where the curvature is crude (subsampled rows, say); poor
  where it turns sharply, as in Rosenbrock's function.

  Args:
    factor: ``lambda`` grows by it after a failure.

  Returns:
    A `SearchRule`.

  Raises:
    TypeError: An argument is not a real number.
    ValueError: ``factor`` is not above 1.
  """
  checks.enforce(measured, locals())

  def next_gamma(trial):
    return jnp.where(
      trial.accepted,
      trial.grad_norm * trial.step_norm / trial.residual_norm,
      trial.gamma / factor,
    )

  return stateless(next_gamma)
