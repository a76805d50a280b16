r"""Local steps: workers that train alone, and are averaged now and then.

Lau, Li, Xu, Liu, Kolar, *Communication-Efficient Adaptive Batch Size Strategies
for Distributed Local Gradient Methods*, 2024, https://arxiv.org/abs/2406.13936.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import training


@checks.domains(
  estimator=checks.ESTIMATOR,
  tx=checks.TRANSFORMATION,
  every=checks.Integer(traced=True),
)
def local_step(
  estimator: base.GradientEstimator,
  tx: optax.GradientTransformation,
  *,
  axis_name: str,
  every: int | jax.Array,
) -> Callable[[training.TrainState, base.Batch], Any]:
  r"""A training step of one worker; every H steps the workers are averaged.

  .. math::

    x^m_{t+1} = x^m_t - u^m_t, \qquad
    x^m \leftarrow \frac{1}{M} \sum_j x^j \quad \text{where } H \mid t

  Choose it where communication is dear: the workers speak to each other once in
  H steps and not in each. What is averaged is the whole state, moments of the
  optimizer and of tests with a memory too; of integers the largest stands, so
  that all workers go on with the largest batch that one of them asks for.

  Args:
    estimator: Makes a worker's gradients, from its own batch; without an
      ``axis_name``.
    tx: Any optax transformation; with a `grow_batch` each worker has its size,
      between two averages, and reads it from its state.
    axis_name: The axis of `jax.vmap` over the workers, whose leading axis may
      lie on several devices, or of `jax.shard_map`.
    every: H, the steps from average to average.

  Returns:
    ``step(state, batch) -> (state, value)`` of one worker, as `train_step`.

  Raises:
    TypeError: ``estimator`` is not a `GradientEstimator`, ``tx`` not an optax
      transformation, ``axis_name`` not a string, or ``every`` not an integer.
    ValueError: ``every`` is below 1.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> estimator = optlab.value_and_grad(lambda x, c: jnp.sum((x - c) ** 2))
    >>> tx = optax.sgd(0.25)
    >>> start = lambda _: optlab.init(jnp.zeros(()), estimator, tx)
    >>> states = jax.vmap(start)(jnp.arange(2))
    >>> step = optlab.batches.local_step(
    ...     estimator, tx, axis_name='workers', every=2)
    >>> step = jax.jit(jax.vmap(step, axis_name='workers'))
    >>> for _ in range(2):
    ...   states, values = step(states, jnp.array([1.0, 3.0]))
    ...   print(states.params)
    [0.5 1.5]
    [1.5 1.5]

  References:
    Lau, Li, Xu, Liu, Kolar, 2024, https://arxiv.org/abs/2406.13936; Stich,
    *Local SGD Converges Fast and Communicates Little*, 2019,
    https://arxiv.org/abs/1805.09767.

  Notes:
    Their test compares the workers' gradients where they meet; here the rule is
    any in ``tx``, on the moments of a worker's own examples.
  """
  checks.enforce(local_step, locals())
  if not isinstance(axis_name, str):
    raise TypeError(
      'axis_name must be the name of an axis of jax.vmap or jax.shard_map, got'
      f' {axis_name!r} of type {type(axis_name).__name__}.'
    )
  train_step = training.train_step(estimator, tx)

  def step(state, batch):
    state, value = train_step(state, batch)

    def average(carry):
      state, _ = carry
      return _average(state, axis_name), jnp.zeros((), bool)

    # A loop of at most one round: under vmap lax.cond would be a select, and
    # the workers would speak in every step.
    due = state.step % jnp.asarray(every, jnp.int32) == 0
    state, _ = jax.lax.while_loop(lambda carry: carry[1], average, (state, due))
    return state, value

  return step


def _average(state, axis_name):
  """Means, and the largest of integers; keys stay those of their worker."""

  def leaf(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
      return x
    if jnp.issubdtype(x.dtype, jnp.inexact):
      return jax.lax.pmean(x, axis_name)
    return jax.lax.pmax(x.astype(jnp.int32), axis_name).astype(x.dtype)

  return jax.tree.map(leaf, state)
