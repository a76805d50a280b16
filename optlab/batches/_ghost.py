r"""Per-example gradient norms out of one ordinary backward pass.

A dense layer :math:`y_i = x_i W` has the per-example gradient
:math:`x_i^\top \dot y_i`, whose squared norm :math:`\|x_i\|^2 \|\dot y_i\|^2`
needs only what the backward pass has at hand (Goodfellow 2015, *Efficient
Per-Example Gradient Computations*, https://arxiv.org/abs/1510.01799).

No model is rewritten for it. The jaxpr of the loss of one example is walked
once; where an array of the parameters meets the data, an identity is put on the
result whose reverse rule adds that array's squared norm to the cotangent of a
dummy scalar. Mapped over the examples and differentiated, the one pass returns
the summed gradient, and in the dummy the squared norms.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.batches import _moments

# Operations that only rearrange the numbers of an array: norms stay.
_REARRANGE = frozenset(
  ('transpose', 'reshape', 'squeeze', 'expand_dims', 'copy', 'rev')
)
_CALLS = frozenset(('jit', 'pjit', 'closed_call', 'core_call', 'remat2'))


class _Value(NamedTuple):
  """A number of the walked program, and how it comes from the parameters.

  Attributes:
    array: What it is.
    has_data: Whether it depends on the example.
    leaves: Indices of the parameter arrays that it depends on without having
      met the data; those that it met the data with are accounted for.
    rebuild: Makes ``array`` again from the list of all parameter arrays.
    rearranged: Whether it is one such array up to the order of its numbers.
  """

  array: Any
  has_data: bool = False
  leaves: frozenset[int] = frozenset()
  rebuild: Callable[[Sequence[Any]], Any] | None = None
  rearranged: bool = False


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
  without touching them. Exact where each array of the parameters meets the data
  in one operation; choose it for models built of dense layers.

  It takes what `plain_grads` takes; loss i must depend on example i alone (no
  batch normalisation). Its `Moments` have ``sum_sq_norm``, which `per_example`
  centres when all groups are merged.

  Raises:
    TypeError: ``mask`` is not a floating array.
    ValueError: An array of the parameters meets the data more than once
      (shared weights, or a penalty on the weights inside the loss): the norms
      of its parts don't add up. Use `vmap_grads`.

  Notes:
    Cost: dense layers one gradient and two norms of activations; with T
    positions an example (attention, patches of an image) the cheaper of T x T
    Gram matrices and the layer's per-example gradient. Every other operation,
    convolutions and embeddings among them, is exact through the per-example
    gradient of that one array, which costs what `vmap_grads` does there.

    The difference of squares loses :math:`\|g\|^2 / V` digits: where the spread
    of the gradients is below 1e-6 of their mean in float32, it is rounding,
    clipped at 0, and far below any request to grow.
  """
  _moments.check_mask(mask)
  checks.check_floating('params', params)
  wide = mask.dtype
  # Zeros, laid out over devices as the losses are, which not every version of
  # jax promises of zeros_like; jit removes the evaluation.
  values = _moments.checked(losses, params, examples, mask)
  slots = (jnp.isnan(values) & False).astype(wide)
  count = jnp.sum(mask)
  tapped = _tap_parameters(_moments.single(losses), wide)

  def mapped(params, slots):
    return jax.vmap(tapped, (None, 0, 0))(params, examples, slots)

  values, pullback = jax.vjp(mapped, params, slots)
  # Masked examples get the cotangent 0, and with it gradient and norm 0.
  sums, sq_norms = pullback(jnp.ones_like(values) * mask.astype(values.dtype))
  total = jnp.maximum(count, 1.0)
  grads = jax.tree.map(
    lambda g: g.astype(jnp.promote_types(g.dtype, wide)) / total, sums
  )
  values = jnp.where(mask > 0.0, values.astype(wide), 0.0)
  return _moments.Moments(
    count, count, jnp.sum(values) / total, grads, sum_sq_norm=jnp.sum(sq_norms)
  )


def _tap_parameters(loss, wide):
  """``loss(params, example)`` with a last argument that collects norms."""

  def tapped(params, example, slot):
    closed = jax.make_jaxpr(loss)(params, example)
    paths_and_leaves = jax.tree.leaves_with_path(params)
    leaves = [leaf for _, leaf in paths_and_leaves]
    names = [jax.tree_util.keystr(path) for path, _ in paths_and_leaves]
    walker = _Walker(leaves, names, slot, wide)
    inputs = [
      _Value(leaf, False, frozenset((i,)), lambda p, i=i: p[i], True)
      for i, leaf in enumerate(leaves)
    ]
    inputs += [_Value(leaf, True) for leaf in jax.tree.leaves(example)]
    (out,) = walker.walk(closed.jaxpr, closed.consts, inputs)
    if out.leaves:
      walker.refuse(out.leaves, 'reaches the loss without meeting the data')
    return out.array

  return tapped


class _Walker:
  """Runs a jaxpr on `_Value`s; lives for one trace."""

  def __init__(self, leaves, names, slot, wide):
    self.leaves, self.names = leaves, names
    self.slot, self.wide = slot, wide
    self.met = {}  # Leaf index to the operation in which it met the data.

  def refuse(self, leaves, why):
    names = ', '.join(f'params{self.names[i]}' for i in sorted(leaves))
    raise ValueError(
      f'ghost_norms can not be used: {names} {why}. The squared norms of a'
      " gradient's parts add up only where each array of the parameters meets"
      ' the data in one operation. Take penalties on the weights out of the'
      ' loss, or use vmap_grads, which is right for every model.'
    )

  def walk(self, jaxpr, consts, inputs):
    env = dict(zip(jaxpr.constvars, map(_Value, consts), strict=True))
    env |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
      if isinstance(atom, jax_core.Literal):
        return _Value(atom.val)
      return env[atom]

    for eqn in jaxpr.eqns:
      values = [read(atom) for atom in eqn.invars]
      env |= dict(zip(eqn.outvars, self.equation(eqn, values), strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def equation(self, eqn, values):
    used = frozenset().union(*(value.leaves for value in values))
    has_data = any(value.has_data for value in values)
    name = eqn.primitive.name
    run = _equation_function(eqn)
    if used and name in _CALLS:
      inner = eqn.params.get('jaxpr', eqn.params.get('call_jaxpr'))
      consts = getattr(inner, 'consts', ())
      return self.walk(getattr(inner, 'jaxpr', inner), consts, values)
    arrays = [value.array for value in values]
    if not used:
      return [_Value(out, has_data) for out in run(arrays)]
    if not has_data:
      return self.parameters_only(eqn, run, values, used)

    for i in used:
      if i in self.met:
        self.refuse(
          {i}, f'meets the data in two operations ({self.met[i]} and {name})'
        )
      self.met[i] = name
    outs = run(arrays)
    norm = _dense_norm(eqn, values, self.wide)
    if norm is None:
      norm = self.any_norm(run, values, used)
    # Residuals of the tap; the gradient flows through `outs` alone.
    residuals = jax.tree.map(jax.lax.stop_gradient, (arrays, self.leaves))
    outs = _tap(norm, outs, residuals, self.slot)
    return [_Value(out, True) for out in outs]

  def parameters_only(self, eqn, run, values, used):
    """An operation before the data is met: redone where it is met."""
    same = (
      len(eqn.invars) == 1
      and values[0].rearranged
      and (
        eqn.primitive.name in _REARRANGE
        or (
          eqn.primitive.name in ('broadcast_in_dim', 'convert_element_type')
          and eqn.outvars[0].aval.size == eqn.invars[0].aval.size
        )
      )
    )

    def rebuild(params, index):
      arrays = [v.rebuild(params) if v.leaves else v.array for v in values]
      return run(arrays)[index]

    return [
      _Value(out, False, used, functools.partial(rebuild, index=i), same)
      for i, out in enumerate(run([value.array for value in values]))
    ]

  def any_norm(self, run, values, used):
    """Squared norm of the gradient of all arrays that meet the data here."""
    used = sorted(used)
    rebuilds = [value.rebuild if value.leaves else None for value in values]

    def norm(residuals, cotangents):
      arrays, leaves = residuals

      def meet(chosen):
        params = dict(zip(used, chosen, strict=True))
        return run(
          [
            array if rebuild is None else rebuild(params)
            for array, rebuild in zip(arrays, rebuilds, strict=True)
          ]
        )

      _, pullback = jax.vjp(meet, [leaves[i] for i in used])
      return trees.sq_norm(pullback(cotangents), self.wide)

    return norm


def _equation_function(eqn):
  """The equation as a function from its operands to the list of results."""
  bound = eqn.primitive.get_bind_params(eqn.params)
  # Before jax 0.10 the functions that a primitive calls come apart.
  functions, params = bound if isinstance(bound, tuple) else ((), bound)

  def run(arrays):
    out = eqn.primitive.bind(*functions, *arrays, **params)
    return list(out) if eqn.primitive.multiple_results else [out]

  return run


def _dense_norm(eqn, values, wide):
  """The norm of a matrix that multiplies the data, or None if it isn't one."""
  if eqn.primitive.name != 'dot_general':
    return None
  contract, batch = eqn.params['dimension_numbers']
  side = 0 if values[0].leaves else 1
  if batch[0] or not values[side].rearranged or values[1 - side].leaves:
    return None
  data, matrix = values[1 - side].array, values[side].array
  contracted = len(contract[0])
  positions = math.prod(data.shape) // max(
    1, math.prod(data.shape[axis] for axis in contract[1 - side])
  )
  depth = math.prod(data.shape[axis] for axis in contract[1 - side])
  width = matrix.size // max(1, depth)
  use_gram = positions * (depth + width) < depth * width

  def norm(residuals, cotangents):
    x = residuals[0][1 - side]
    free = [a for a in range(x.ndim) if a not in contract[1 - side]]
    x = x.transpose(*free, *contract[1 - side]).reshape(positions, depth)
    (dy,) = cotangents
    # The data's free axes come first where the data is the left operand.
    split = len(free) if side == 1 else matrix.ndim - contracted
    shape = (math.prod(dy.shape[:split]), math.prod(dy.shape[split:]))
    dy = dy.reshape(shape) if side == 1 else dy.reshape(shape).T
    if positions == 1:
      return trees.sq_norm(x, wide) * trees.sq_norm(dy, wide)
    if use_gram:
      gram = lambda a: jnp.matmul(a, jnp.conj(a).T, preferred_element_type=wide)
      return jnp.sum((gram(x) * jnp.conj(gram(dy))).real).astype(wide)
    return trees.sq_norm(jnp.matmul(x.T, dy, preferred_element_type=wide), wide)

  return norm


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(norm, outs, residuals, slot):
  """Identity on ``outs``; its reverse rule adds ``norm`` to the slot's."""
  del norm, residuals, slot
  return outs


def _tap_forward(norm, outs, residuals, slot):
  del norm, slot
  return outs, residuals


def _tap_backward(norm, residuals, cotangents):
  return cotangents, None, norm(residuals, cotangents)


_tap.defvjp(_tap_forward, _tap_backward)
