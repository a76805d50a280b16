"""Whether the loss of an example depends on that example alone.

A loss that mixes its examples (batch normalization that trains) is another
function on a batch of one, and its per-example gradients are wrong. The jaxpr
of the losses is read once, while a step is traced: the axis of the examples is
followed (`_dependence`), and an operation that takes them together, on the way
to the loss, is an error. What can't be followed passes; `check_losses` compares
numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab import checks
from optlab.batches import _dependence
from optlab.batches import _losses


def check_losses(
  losses: _losses.Losses, params: base.Params, examples: base.Batch
) -> None:
  """Raises unless loss i depends on example i alone, as far as numbers show.

  Per-example gradients (`vmap_grads`, `ghost_norms`) need that, and those
  routes refuse what they see in the program. This compares the losses of the
  batch with the losses of batches of one; call it once, outside `jax.jit`.

  Args:
    losses: ``(params, examples) -> (n,)`` losses.
    params: The parameters.
    examples: Batch of n examples on the leading axes, at least 2.

  Raises:
    TypeError: ``losses`` is not a function, or a leaf of ``params`` not a
      floating array.
    ValueError: The losses differ, or are not one an example.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> centred = lambda x, rows: (rows - rows.mean(0)) @ x
    >>> try:
    ...   optlab.batches.check_losses(centred, jnp.ones(2), jnp.eye(2))
    ... except ValueError as error:
    ...   print(str(error)[:38])
    loss i must depend on example i alone:
  """
  checks.check_callable('losses', losses, '(params, examples) -> (n,) losses')
  checks.check_params('params', params)
  length = _losses.batch_length(examples)
  check_program(losses, params, examples)
  mask = jnp.ones(length)
  # Under jit, where a model can not write into what is outside.
  together = jax.jit(lambda p, e: _losses.checked(losses, p, e, mask))(
    params, examples
  )
  one = _losses.single(losses)
  alone = jax.jit(jax.vmap(one, (None, 0)))(params, examples)
  tolerance = float(jnp.finfo(together.dtype).eps) ** 0.5
  together, alone = np.asarray(together, float), np.asarray(alone, float)
  scale = np.maximum(np.abs(together), np.abs(alone)).max(initial=0.0)
  worst = int(np.argmax(np.abs(together - alone)))
  if not np.allclose(together, alone, tolerance, tolerance * scale):
    raise ValueError(
      _message(
        f'that of example {worst} is {together[worst]:.6g} in a batch of'
        f' {length} and {alone[worst]:.6g} alone'
      )
    )


def check_program(
  losses: _losses.Losses, params: base.Params, examples: base.Batch
) -> Any:
  """The program of losses that are one an example, and of it alone.

  Raises:
    ValueError: They are not.
  """
  closed = _program(losses, params, examples)
  by = _mixed_by(closed, params, examples)
  if by is not None:
    raise ValueError(_message(f'{by} takes the examples together'))
  return closed


def mixed_by(
  losses: _losses.Losses, params: base.Params, examples: base.Batch
) -> str | None:
  """The operation in the program of the losses that mixes examples, if any."""
  closed = _program(losses, params, examples)
  return _mixed_by(closed, params, examples)


def _program(losses, params, examples):
  mask = jax.ShapeDtypeStruct((_losses.batch_length(examples),), bool)
  return jax.make_jaxpr(lambda p, e: _losses.checked(losses, p, e, mask))(
    params, examples
  )


def _mixed_by(closed, params, examples):
  if _losses.batch_length(examples) < 2:
    return None
  return _dependence.mixed_by(
    closed.jaxpr, len(jax.tree.leaves(params)), len(jax.tree.leaves(examples))
  )


def _message(what):
  return (
    f'loss i must depend on example i alone: {what}, as in batch normalization'
    ' that trains or a contrast within the batch. Fix the statistics'
    ' (use_running_average=True), normalize within examples, or take'
    ' microbatch_means or plain_grads, whose gradients are of microbatches.'
  )
