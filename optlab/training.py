"""One training step for every method, and a compiled loop to a tolerance."""

from collections.abc import Callable
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab._argmin import ArgminResult
from optlab._argmin import argmin
from optlab._counts import Counts
from optlab._kept import takes_extras
from optlab._minimize import minimize
from optlab._results import GRAD_TOL
from optlab._results import MAX_SECONDS
from optlab._results import MAX_STEPS
from optlab._results import NON_FINITE
from optlab._results import REJECTED
from optlab._results import STALLED
from optlab._results import STOPPED
from optlab._results import TARGET_VALUE
from optlab._results import MinimizeResult
from optlab._results import Progress

__all__ = [
  'GRAD_TOL',
  'MAX_SECONDS',
  'MAX_STEPS',
  'NON_FINITE',
  'REJECTED',
  'STALLED',
  'STOPPED',
  'TARGET_VALUE',
  'ArgminResult',
  'Counts',
  'MinimizeResult',
  'Progress',
  'TrainState',
  'argmin',
  'init',
  'minimize',
  'report',
  'train_step',
]


class TrainState(NamedTuple):
  """All that a run carries from step to step; a pytree that checkpoints."""

  step: jax.Array  # shape (), int32
  params: base.Params
  opt_state: base.OptState
  estimator_state: Any


@checks.domains(estimator=checks.ESTIMATOR, tx=checks.TRANSFORMATION)
def init(
  params: base.Params,
  estimator: base.GradientEstimator,
  tx: optax.GradientTransformation,
  *inner: base.ArrayTree,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    params: The parameters, any pytree of arrays.
    estimator: Makes the gradients.
    tx: Turns them into updates.
    *inner: Inner variables of the estimator (the lower variable of a bilevel
      problem), passed on to ``estimator.init``.

  Returns:
    A `TrainState`.

  Raises:
    TypeError: ``estimator`` is not a `GradientEstimator`, or ``tx`` not an
      optax transformation.
    ValueError: ``inner`` is more or less than the estimator has.
  """
  checks.enforce(init, locals())
  signature = inspect.signature(estimator.init)
  try:
    signature.bind(params, *inner)
  except TypeError as error:
    raise ValueError(
      f'the estimator is initialized by ({", ".join(signature.parameters)}),'
      f' got {1 + len(inner)} of them: optlab.init passes on params and what'
      ' follows tx.'
    ) from error
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=trees.strong(params),
    opt_state=tx.init(params),
    estimator_state=estimator.init(params, *inner),
  )


@checks.domains(estimator=checks.ESTIMATOR, tx=checks.TRANSFORMATION)
def train_step(
  estimator: base.GradientEstimator,
  tx: optax.GradientTransformation,
) -> Callable[[TrainState, base.Batch], tuple[TrainState, Any]]:
  """Makes the step that serves every method of optlab and optax.

  The step is pure: jit it, scan it, vmap it over seeds. What a method reports
  beside the loss (trials, effective sample size, batch size) lies in its state;
  `report` lists it.

  Args:
    estimator: Makes the gradients, for example `value_and_grad`.
    tx: Any optax transformation.

  Returns:
    ``step(state, batch) -> (state, value)``, with the loss before the step;
    ``(state, (value, aux))`` where the loss has auxiliary output.

  Raises:
    TypeError: ``estimator`` is not a `GradientEstimator`, or ``tx`` not an
      optax transformation.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> loss = lambda params, batch: jnp.mean((batch @ params - 1.0) ** 2)
    >>> estimator, tx = optlab.value_and_grad(loss), optax.adam(0.1)
    >>> state = optlab.init(jnp.zeros(3), estimator, tx)
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(3):
    ...   state, value = step(state, jnp.eye(3))
    ...   print(f'{value:.2f}')
    1.00
    0.81
    0.64
  """
  checks.enforce(train_step, locals())
  tx = takes_extras(tx)

  def step(state, batch):
    estimate, estimator_state = estimator.estimate(
      state.params, state.estimator_state, batch
    )
    updates, opt_state = tx.update(
      estimate.grads,
      state.opt_state,
      state.params,
      value=estimate.value,
      # optax's line searches take what jax.grad makes.
      grad=trees.conjugate(estimate.grads),
      **estimate.extras,
    )
    params = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, opt_state, estimator_state)
    return state, with_aux(estimate)

  return step


def with_aux(estimate: base.Estimate) -> Any:
  """The value, and beside it the auxiliary output where there is one."""
  if isinstance(estimate.aux, tuple) and not estimate.aux:
    return estimate.value
  return estimate.value, estimate.aux


def report(state: Any) -> dict[str, jax.Array]:
  """All scalars of a state by path, for a logger.

  Args:
    state: A `TrainState`, the state of an estimator or of a transformation, or
      any nesting of them.

  Returns:
    A flat dict: the names on the way to a number, joined by ``/``, and the
    number, an array of shape (). Arrays with axes and PRNG keys are left out.

  Examples:
    >>> import jax.numpy as jnp, optax, optlab
    >>> plain = optlab.value_and_grad(lambda x, batch: jnp.sum(x * batch))
    >>> estimator = optlab.estimators.estimate_if_finite(plain)
    >>> state = optlab.init(jnp.ones(2), estimator, optax.adam(0.1))
    >>> for name, number in optlab.report(state).items():
    ...   print(name, number)
    step 0
    opt_state/0/count 0
    estimator_state/info/rejected False
    estimator_state/info/total_rejected 0
  """
  found = {}
  for path, leaf in jax.tree.leaves_with_path(state):
    if jnp.ndim(leaf) == 0 and not (
      hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    ):
      found[jax.tree_util.keystr(path, simple=True, separator='/')] = leaf
  return found
