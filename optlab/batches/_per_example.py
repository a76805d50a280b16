"""An estimator that knows how much the gradients of its examples differ."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab import checks
from optlab import losses as loss_lib
from optlab import trees
from optlab.batches import _moments
from optlab.batches import _passes
from optlab.batches import _routes
from optlab.batches import _unit


@checks.domains(
  losses=checks.Function('(params, examples) -> (n,) losses'),
  moments=checks.Function('such as optlab.ghost_norms'),
  inner_products=checks.Function(
    'such as optlab.batches.jvp_inner_products', optional=True
  ),
  microbatch_size=checks.Integer(optional=True),
)
def per_example(
  losses: _moments.Losses,
  moments: _moments.Route = _routes.vmap_grads,
  *,
  inner_products: _moments.InnerProducts | None = None,
  microbatch_size: int | None = None,
  axis_name: Any = None,
  layers: bool = False,
  has_aux: bool = False,
  has_state: bool = False,
  has_key: bool = False,
) -> base.GradientEstimator:
  r"""The mean gradient of a batch, with moments of its per-example gradients.

  It makes what the tests of `grow_batch` take:

  ========================= ================================================
  extra argument            what it is, for a mean gradient g of n examples
  ========================= ================================================
  ``sample_size``           n, an int32 scalar (optax's name)
  ``sum_sq_diff_grads``     tree, :math:`\sum_i (g_i - g)^2` per coordinate
                            (optax's name)
  ``sum_sq_diff_norm``      scalar, :math:`\sum_i \|g_i - g\|^2`
  ``sum_sq_diff_norms``     tree of scalars, the same by array; if ``layers``
  ``sum_sq_diff_inner``     scalar, :math:`\sum_i (\langle g_i, g\rangle -
                            \|g\|^2)^2`
  ``scaled_moments``        dict: ``unit``, a power of two, and of gradients
                            over it those above and ``sq_norms``, a tree of
                            scalars, :math:`\|g\|^2` by array
  ========================= ================================================

  ===================== ============================== ======================
  ``moments``           right for                      knows
  ===================== ============================== ======================
  `vmap_grads`          every model                    grads and norm
  `ghost_norms`         every model, dense ones cheap  norm
  `microbatch_means`    every model, as an estimate    norm
  `plain_grads`         every model                    neither
  ===================== ============================== ======================

  ``inner_products=jvp_inner_products`` adds ``sum_sq_diff_inner`` to any of
  them, by a second pass over the batch.

  Args:
    losses: ``(params, examples) -> (n,)``, one loss per example; examples is a
      pytree with the n examples on the leading axes. Loss i may depend on
      example i alone.
    moments: The route to the second moments, one of the functions above.
    inner_products: `jvp_inner_products`, `vmap_inner_products`, or ``None``.
    microbatch_size: Examples in one step of the loop over the batch; ``None``
      takes the batch at once.
    axis_name: Axis of `jax.shard_map` or `jax.vmap` over which every device
      holds its part of the batch; moments are merged over it. Not needed where
      `jax.jit` shards the batch.
    layers: Whether to add ``sum_sq_diff_norms``, which has the norm's sum for
      each array of the parameters.
    has_aux: Whether ``losses`` returns auxiliary output too, see
      `value_and_grad`; with one row an example. `Estimate.aux` is its mean.
    has_state: Whether the model has state, see `value_and_grad`. It goes
      through the microbatches one after the other. Losses that see it change
      within a batch (batch normalization that trains) are those of
      microbatches, which `microbatch_means` and `plain_grads` take.
      It sees each example once: those that are left when a batch is no
      multiple of ``microbatch_size`` are a microbatch of their own, of
      `PaddedBatch` and `ResidentBatch` several, of powers of two.
    has_key: Whether the losses are random. ``losses`` gets an array of n keys
      last, folded with the step and with each example's index in the data, so
      that neither the microbatches nor the devices change the numbers.

  Returns:
    A `GradientEstimator`, with the state of `value_and_grad`. Its batch is a
    pytree of arrays, `PaddedBatch`, or `ResidentBatch`.

  Raises:
    TypeError: ``losses`` or a route is not a function, or ``microbatch_size``
      not an integer.
    ValueError: ``microbatch_size`` is below 1, `microbatch_means` has none or
      gets fewer than two microbatches, or ``losses`` doesn't return one number
      an example; in a `jax.shard_map` whose devices hold other examples and the
      same parameters, without ``axis_name``.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> losses = lambda x, rows: (rows @ x - 1.0) ** 2
    >>> estimator = optlab.per_example(losses, optlab.ghost_norms)
    >>> x = jnp.zeros(2)
    >>> estimate, _ = estimator.estimate(x, estimator.init(x), jnp.eye(2))
    >>> print(estimate.value, estimate.grads)
    1.0 [-1. -1.]
    >>> for name in ('sample_size', 'sum_sq_diff_norm'):
    ...   print(name, estimate.extras[name])
    sample_size 2
    sum_sq_diff_norm 4.0

  Notes:
    The unit is 1 unless squares leave the range of their dtype (in float32 of
    gradients around 1e-16 and 1e16, with inner products 1e-8 and 1e8): then
    the pass is repeated, once or twice, with the loss over a unit.

    Microbatches and devices are merged exactly: squared norms as sums, central
    moments by Chan's formula. Cost: see the routes; with ``inner_products`` a
    second pass over the batch.

    An estimate can be differentiated once more, in both modes (of batches whose
    size is traced, in forward mode).

    ``value_fn``, the mean loss as a function of the parameters, comes with the
    extra arguments unless there is an ``axis_name``: its gradient is a loop
    over the microbatches as well.
  """
  checks.enforce(per_example, locals())
  is_means = moments is _routes.microbatch_means
  if is_means and microbatch_size is None:
    raise ValueError(
      'microbatch_means needs a microbatch_size, at most half of the batch'
      ' size.'
    )

  method = _passes.Method(
    loss_lib.Loss(losses, has_aux, has_state, has_key),
    moments,
    inner_products,
    microbatch_size,
    axis_name,
  )
  loss, value_fn = method.loss, _passes.value_fn(method)

  def estimate(params, state, batch):
    checks.check_params('params', params)
    params = jax.tree.map(jnp.asarray, params)
    model_state, key, state = loss.begin(state)
    over, wide = _passes.over_batch(method, params, batch, key)
    if is_means:
      _check_means(over.groups.size, microbatch_size)
    inputs = params, model_state, batch, key

    def run(unit):
      """A pass with the losses over ``unit``."""
      scaled = over._replace(unit=unit)
      result, aux, new_state = _passes.first_pass(
        method, scaled, params, model_state
      )
      extras = _passes.spread(result, wide, layers)
      if inner_products is not None:
        extras['sum_sq_diff_inner'] = _passes.second_pass(
          method, scaled, params, model_state, result
        )
      if unit is not None:
        extras['sq_norms'] = _unit.sq_norms(result.grads, wide)
      rest = result.count, aux, new_state
      return _unit.Found(result.value, result.grads, extras, rest)

    if moments is _routes.plain_grads and inner_products is None:
      found, extras = run(None), {}
    else:
      power = 2 if inner_products is None else 4
      found, unit = _unit.fitted(run, power, wide, inputs, axis_name)
      extras = _unit.plain(found.moments, unit)
      extras['scaled_moments'] = found.moments | {'unit': unit}
    count, aux, new_state = found.rest
    extras['sample_size'] = count.astype(jnp.int32)
    if axis_name is None:  # Else it holds one device's part of the batch.
      extras['value_fn'] = jax.tree_util.Partial(
        value_fn, (batch, model_state, key)
      )
    aux = jax.tree.map(lambda leaf: leaf / jnp.maximum(count, 1), aux)
    grads = trees.conjugate(trees.cast_like(found.grads, params))
    estimate = base.Estimate(found.value, grads, extras, aux)
    return estimate, loss.end(state, new_state)

  return base.GradientEstimator(loss.init, estimate)


def _check_means(size, microbatch_size):
  if isinstance(size, (int, np.integer)) and size < 2 * microbatch_size:
    raise ValueError(
      'microbatch_means needs at least two microbatches: a batch of at least'
      f' {2 * microbatch_size} examples for microbatch_size='
      f'{microbatch_size}, got {size}. Lower microbatch_size, or start with a'
      ' larger batch_size.'
    )
