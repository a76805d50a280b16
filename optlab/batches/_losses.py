"""The losses of a batch, one an example, and of one example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base

#: ``(params, examples) -> [examples]``: a loss for each.
Losses = Callable[[base.Params, base.Batch], jax.Array]


def single(losses: Losses) -> Callable[[base.Params, Any], jax.Array]:
  """The loss of one example, from the losses of a batch of one."""

  def loss(params, example):
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], example)
    try:
      return losses(fresh(params), batch)[0]
    except Exception as error:
      if 'harding' not in str(error):
        raise
      raise ValueError(
        'losses say where their examples lie on a mesh with explicit axes, by'
        ' with_sharding_constraint or reshard, which gradients by example can'
        ' not follow: leave the word out, for there the type of the rows says'
        ' it; make the mesh with AxisType.Auto; or take microbatch_means or'
        f' plain_grads. jax says: {error}'
      ) from error

  return loss


def fresh(tree: base.ArrayTree) -> base.ArrayTree:
  """The same leaves in new containers, which a user's model may write into."""
  return jax.tree.map(lambda leaf: leaf, tree)


def checked(
  losses: Losses,
  params: base.Params,
  examples: base.Batch,
  mask: jax.Array | jax.ShapeDtypeStruct,
) -> jax.Array:
  """The losses, one an example; anything else is an error."""
  values = losses(fresh(params), fresh(examples))
  if jnp.shape(values) != mask.shape:
    raise ValueError(
      f'losses must return one loss per example, shape {mask.shape}, got shape'
      f' {jnp.shape(values)}: leave out the mean over the batch.'
    )
  dtype = jnp.result_type(values)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'losses must return real numbers, got dtype {dtype}, which has no'
      ' gradient that descends.'
    )
  return values


def batch_length(batch: base.ArrayTree) -> int:
  """The common length of the leading axes of ``batch``.

  Args:
    batch: Pytree of arrays with examples on the leading axis.

  Returns:
    The number of examples.

  Raises:
    ValueError: There is no array, a scalar among them, lengths differ, or there
      is no example.
  """
  lengths = {
    jax.tree_util.keystr(path): (np.shape(leaf) or (-1,))[0]
    for path, leaf in jax.tree.leaves_with_path(batch)
  }
  if len(set(lengths.values())) != 1 or -1 in lengths.values():
    raise ValueError(
      'Every array of a batch must have the examples on its leading axis, got'
      f' lengths {lengths}.'
    )
  length = next(iter(lengths.values()))
  if not length:
    raise ValueError('a batch must have at least one example, got none.')
  return length
