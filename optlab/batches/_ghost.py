r"""Per-example gradient norms out of one ordinary backward pass.

A dense layer :math:`y_i = x_i W` has the per-example gradient
:math:`x_i^\top \dot y_i`, whose squared norm :math:`\|x_i\|^2 \|\dot y_i\|^2`
needs only what the backward pass has at hand (Goodfellow 2015, *Efficient
Per-Example Gradient Computations*, https://arxiv.org/abs/1510.01799).

No model is rewritten for it. The jaxpr of the loss of one example is walked
twice (`_ghost_walk`): first to plan, where each array of the parameters meets
the data, then to run it with an identity put on every result of a meeting. Its
reverse rule adds that array's squared norm to the cotangent of a dummy scalar.
Mapped over the examples and differentiated, the one pass returns the summed
gradient, and in the dummies the squared norms, an array of the parameters each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from optlab import _varying
from optlab import base
from optlab import checks
from optlab.batches import _ghost_walk
from optlab.batches import _independence
from optlab.batches import _layout
from optlab.batches import _losses
from optlab.batches import _moments


def ghost_norms(
  losses: _moments.Losses,
  params: base.Params,
  examples: base.Batch,
  mask: jax.Array,
) -> _moments.Moments:
  r"""The route of ghost norms: the exact trace of the covariance, cheaply.

  .. math:: \sum_i \|g_i - g\|^2 = \sum_i \|g_i\|^2 - n \|g\|^2

  The per-example norms come out of one backward pass, see the module. Works on
  plain functions and on flax models (split into parameters and the rest)
  without touching them, layers in `jax.lax.scan` and rematerialized ones
  included. Exact for every model; choose it for models built of dense layers
  and embeddings, where it costs little more than a gradient.

  It takes what `plain_grads` takes; loss i must depend on example i alone (see
  `check_losses`). Its `Moments` have ``sum_sq_norm``, which `per_example`
  centres when all groups are merged.

  Raises:
    TypeError: ``mask`` is not a floating array, or a leaf of ``params`` not.
    ValueError: ``losses`` does not give one loss per example, or mixes them.

  Notes:
    Cost: dense layers one gradient and two norms of activations; with T
    positions an example (attention, patches of an image) the cheaper of T x T
    Gram matrices and the layer's per-example gradient. Embeddings: the rows
    that occur. Weights that meet the data twice (tied embeddings, two branches)
    add the products of their Gram matrices where all meetings are of these two
    kinds. Every other operation, convolutions among them, is exact through the
    per-example gradient of that one array, which costs what `vmap_grads` does
    there; so are a penalty on the weights inside the loss, whose gradient every
    example gets a copy of (take it out), and weights that every round of a
    loop shares.

    A backward rule (`jax.custom_vjp`) of parameters alone is taken as linear in
    the cotangent, as a derivative is: one that clips runs once on the sum over
    the examples, where a batch runs it on their mean.

    The difference of squares loses :math:`\|g\|^2 / V` digits: where the spread
    of the gradients is below 1e-6 of their mean in float32, it is rounding,
    clipped at 0, and far below any request to grow. Inputs of a layer below
    1e-19 or above 1e19 in float32, whose own squares leave its range, make the
    norms NaN, which keeps the size: `vmap_grads` has them.
  """
  values, grads, sq_norms = _backward(losses, params, examples, mask)
  count = jnp.sum(mask)
  total = jnp.maximum(count, 1.0)
  grads = jax.tree.map(lambda g: g / total, grads)
  values = jnp.where(mask > 0.0, values.astype(mask.dtype), 0.0)
  return _moments.Moments(
    count,
    count,
    jnp.sum(values) / total,
    grads,
    sum_sq_norm=jax.tree.map(jnp.sum, sq_norms),
  )


def ghost_sq_norms(
  losses: _moments.Losses, params: base.Params, examples: base.Batch
) -> base.ArrayTree:
  r"""Squared norms of per-example gradients, by array of the parameters.

  For clipping, sampling and diagnosis by example. Exact, by one backward pass,
  see `ghost_norms`.

  Args:
    losses: ``(params, examples) -> (n,)`` losses.
    params: The parameters.
    examples: Batch of n examples on the leading axes.

  Returns:
    The tree of the parameters with arrays of shape (n,), whose sum over the
    tree is :math:`\|g_i\|^2`.

  Raises:
    TypeError: A leaf of ``params`` is not floating.
    ValueError: ``losses`` does not give one loss per example, or mixes them.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> losses = lambda x, rows: rows @ x
    >>> rows = jnp.asarray([[3.0, 4.0], [1.0, 0.0]])
    >>> print(optlab.batches.ghost_sq_norms(losses, jnp.ones(2), rows))
    [25.  1.]
  """
  checks.check_params('params', params)
  length = _losses.batch_length(examples)
  real = jnp.finfo(jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
  mask = _layout.like_rows(jnp.ones(length, real.dtype), examples)
  return _backward(losses, params, examples, mask)[2]


def _backward(losses, params, examples, mask) -> Any:
  """Losses, summed gradient and squared norms; zero where masked."""
  _moments.check_route(params, mask, examples)
  wide = mask.dtype
  _independence.check_program(losses, params, examples)
  zeros = _zeros(params, examples).astype(wide)
  slots = jax.tree.map(lambda leaf: zeros, params)
  if _layout.explicit(examples) is None:
    one = jax.tree.map(lambda leaf: leaf[0], examples)
  else:  # Where rows are split by type, one of them is nowhere.
    one = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), examples
    )
  tapped, along = _ghost_walk.tap(_losses.single(losses), params, one, wide)

  def mapped(params, slots):
    over_examples = jax.vmap(tapped, (None, 0, 0), spmd_axis_name=along)
    return over_examples(params, examples, slots)

  values, pullback = jax.vjp(mapped, params, slots)
  # Masked examples get the cotangent 0, and with it gradient and norm 0.
  sums, sq_norms = pullback(jnp.ones_like(values) * mask.astype(values.dtype))
  sums = jax.tree.map(lambda g: g.astype(_moments.wide_like(g, wide)), sums)
  return values, sums, sq_norms


def _zeros(params, examples):
  """One false an example, which lies over devices as the losses do.

  As the losses it depends on the arrays; `jax.jit` removes that.
  """

  def false(leaf, first):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
      leaf = jax.random.key_data(leaf)
    same = jnp.equal(leaf, leaf)
    return jnp.any(same, tuple(range(first, leaf.ndim))) & False

  falses = [false(leaf, 1) for leaf in jax.tree.leaves(examples)]
  # Only in a shard_map may parameters differ from device to device.
  falses += [
    false(leaf, 0)
    for leaf in jax.tree.leaves(params)
    if _varying.varies_over(leaf)
  ]
  return functools.reduce(jnp.logical_or, falses)
