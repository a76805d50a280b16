"""Passes over a batch in its groups: moments, inner products, the mean loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import losses as loss_lib
from optlab import trees
from optlab.batches import _independence
from optlab.batches import _moments
from optlab.batches import _routes
from optlab.batches import _windows


class Method(NamedTuple):
  """The arguments of `per_example`."""

  loss: loss_lib.Loss
  moments: _moments.Route
  inner_products: Any
  microbatch_size: int | None
  axis_name: Any


def over_batch(method, params, batch, key):
  """The groups of a batch, and the dtype of its statistics."""
  wide = jnp.finfo(trees.accumulator_dtype(params)).dtype
  axis_name = method.axis_name

  def over(exact):
    groups = _windows.groups(
      batch, method.microbatch_size, wide, axis_name, exact
    )
    return _windows.Over(method.loss, groups, key, axis_name)

  # A model with state sees the examples in their order, and no others.
  found = over(method.loss.has_state)
  if found.groups.fills and _mixes(method, found, params):
    found = over(True)
  return found, wide


def _mixes(method, over, params):
  """Whether a loss, by a route that may, takes examples together."""
  if method.moments not in (_routes.plain_grads, _routes.microbatch_means):
    return False
  (examples, keys), _ = jax.eval_shape(
    lambda: over.group(_windows.Window(0, over.groups.width))
  )
  by = _independence.mixed_by(over.bind(()), params, (examples, keys))
  return by is not None


def first_pass(method, over, params, model_state):
  """The moments of the batch, sums of auxiliary output, the model state."""
  local = over.vary(params)

  def group(window, model_state):
    examples, mask = over.group(window)
    result = method.moments(over.bind(model_state), local, examples, mask)
    aux, model_state = over.rest(local, model_state, examples, mask)
    # Sizes alone don't vary over devices; the merged groups do.
    return over.vary((result, aux)), over.vary(model_state)

  (result, aux), model_state = over.add_up(
    group,
    lambda a, b: (
      _moments.merge(a[0], b[0]),
      jax.tree.map(jnp.add, a[1], b[1]),
    ),
    over.vary(model_state),
  )
  if method.axis_name is not None:
    result = _moments.merge_over(result, method.axis_name)
    aux = jax.lax.psum(aux, method.axis_name)
    model_state = _average(model_state, method.axis_name)
  return _moments.centred(result), aux, model_state


def spread(result, wide, layers):
  """The extra arguments on second moments, those that the route knows."""
  # What K units say about the sum over n examples.
  spread = (result.count - 1.0) / (result.units - 1.0)
  extras = {
    'sum_sq_diff_grads': result.sum_sq_diff_grads,
    'sum_sq_diff_norms': result.sum_sq_diff_norm,
  }
  extras = jax.tree.map(lambda leaf: spread * leaf, extras)
  norms = extras['sum_sq_diff_norms']
  if norms is not None:
    extras['sum_sq_diff_norm'] = sum(
      jax.tree.leaves(norms), start=jnp.zeros((), wide)
    )
  if not layers:
    del extras['sum_sq_diff_norms']
  return {name: leaf for name, leaf in extras.items() if leaf is not None}


def second_pass(method, over, params, model_state, result):
  """The variance of the inner products with the mean gradient, a sum."""
  local, direction = over.vary(params), over.vary(result.grads)

  def sums(window, model_state):
    rest = method.inner_products(
      over.bind(model_state), local, direction, *over.group(window)
    )
    return (jnp.sum(rest), jnp.sum(jnp.square(rest))), model_state

  total, _ = over.add_up(
    sums, lambda a, b: jax.tree.map(jnp.add, a, b), over.vary(model_state)
  )
  if method.axis_name is not None:
    total = jax.lax.psum(total, method.axis_name)
  # The first is 0 but for the rounding of the mean gradient.
  return total[1] - jnp.square(total[0]) / jnp.maximum(result.count, 1.0)


def value_fn(method):
  """``(what is bound, params) -> mean loss``, for line searches.

  Its gradient is a loop over the groups, which reverse mode would not pass.
  """

  @jax.custom_vjp
  def mean(bound, params):
    return mean_and_grads(bound, params)[0]

  def mean_and_grads(bound, params):
    batch, model_state, key = bound
    over, _ = over_batch(method, params, batch, key)

    def group(window, model_state):
      examples, mask = over.group(window)
      result = _routes.plain_grads(
        over.bind(model_state), params, examples, mask
      )
      return result, over.rest(params, model_state, examples, mask)[1]

    result, _ = over.add_up(group, _moments.merge, model_state)
    return result.value, trees.cast_like(result.grads, params)

  def backward(grads, tangent):
    return None, jax.tree.map(lambda g: (tangent * g).astype(g.dtype), grads)

  mean.defvjp(mean_and_grads, backward)

  # The names let optax's line searches pass them on, which refuse others.
  def value_fn(
    bound, params, *, sample_size=None, sum_sq_diff_grads=None,
    sum_sq_diff_norm=None, sum_sq_diff_norms=None, sum_sq_diff_inner=None,
    scaled_moments=None, curvature=None,
  ):  # fmt: skip
    del sample_size, sum_sq_diff_grads, sum_sq_diff_norm, sum_sq_diff_norms
    del sum_sq_diff_inner, scaled_moments, curvature
    return mean(bound, params)

  return value_fn


def _average(model_state, axis_name):
  """The model state of all devices: means, and the largest of integers."""
  return jax.tree.map(
    lambda leaf: (
      jax.lax.pmean(leaf, axis_name)
      if jnp.issubdtype(leaf.dtype, jnp.inexact)
      else jax.lax.pmax(leaf, axis_name)
    ),
    model_state,
  )
