"""What a test of the batch size is, and the statistics that tests share."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import trees
from optlab.batches import _unit


class Test(NamedTuple):
  """A pair of functions that requests a batch size.

  Attributes:
    init: ``params -> state``, ``()`` where it remembers nothing.
    update: ``(grads, state, **extras) -> (requested, state)``, with the extra
      arguments of the step and of `grow_batch`: ``step``, the steps before this
      one, ``samples``, the examples before it, and ``batch_size``. A request
      that is NaN keeps the size.
    scaled: Whether it reads ``scaled_moments`` where they are, so that it
      matters no more whether the others have left the range of their dtype.
  """

  __test__ = False  # For pytest, which else takes it for a case.

  init: Callable[[base.Params], Any]
  update: Callable[..., tuple[jax.Array, Any]]
  scaled: bool = False


class AveragesState(NamedTuple):
  """State of a test with a ``decay``."""

  weight: jax.Array  # shape (), what the averages of ones would be
  averages: Any  # by name, what is averaged, of gradients over the unit
  unit: jax.Array  # shape (), a power of two


def from_function(function: Callable[..., Any], scaled: bool = False) -> Test:
  """A test without memory, ``(grads, **extras) -> requested``."""
  return Test(
    init=lambda params: (),
    update=lambda grads, state, **extras: (function(grads, **extras), state),
    scaled=scaled,
  )


def no_averages(like: Any, wide: Any) -> AveragesState:
  """The state of averages before the first step."""
  return AveragesState(jnp.zeros((), wide), like, jnp.ones((), wide))


def average(
  state: AveragesState, fresh: Any, decay: Any, extras: Any
) -> tuple[Any, AveragesState]:
  """Averages, free of the bias of their start, and the state after them.

  Args:
    state: Before the step.
    fresh: By name, squares of gradients over the unit of ``extras``; those that
      are called ``along`` are fourth powers.
    decay: Of the averages.
    extras: The extra arguments of the step.

  Returns:
    Averages and state in one unit, so that only their ratios mean something.
  """
  wide = state.weight.dtype
  now = jnp.asarray(unit_of(extras), wide)
  unit = jnp.where(state.weight > 0, jnp.maximum(state.unit, now), now)
  old = _times(state.averages, state.unit / unit)
  fresh = _times(fresh, now / unit)
  weight, averages = jax.tree.map(
    lambda old, new: (old + (1 - decay) * (new - old)).astype(old.dtype),
    (state.weight, old),
    (jnp.ones_like(state.weight), fresh),
  )
  # Old squares that were larger fade, and with them their unit.
  squares = [
    leaf
    for name in averages
    if name != 'along'
    for leaf in jax.tree.leaves(averages[name])
  ]
  top = trees.largest(squares)
  tiny = float(jnp.finfo(wide).tiny)
  faint = (top > 0) & (top < tiny**0.6)
  factor = jnp.where(faint, 2.0 ** round(-0.24 * math.log2(tiny)), 1.0)
  factor = factor.astype(wide)
  state = AveragesState(weight, _times(averages, factor), unit / factor)
  return jax.tree.map(lambda leaf: leaf / weight, state.averages), state


def _times(moments, factor):
  """Moments of gradients that are ``factor`` times as long."""

  def moment(name, tree):
    power = 4 if name == 'along' else 2
    return jax.tree.map(lambda leaf: _unit.times(leaf, factor, power), tree)

  return {name: moment(name, tree) for name, tree in moments.items()}


def unit_of(extras: Any) -> Any:
  """The unit of the gradients whose moments a test reads."""
  return extras.get('scaled_moments', {}).get('unit', 1.0)


def scaled(extras: Any) -> Any:
  """The extra arguments, with moments that have digits where they are."""
  return {**extras, **extras.get('scaled_moments', {})}


def from_moments(
  moments: Callable[..., Any],
  request: Callable[[Any], jax.Array],
  like: Callable[[base.Params], Any],
  decay: Any,
) -> Test:
  """A test from its moments, averaged where there is a decay.

  Args:
    moments: ``(grads, extras, unbiased) -> moments``, a tree.
    request: ``moments -> requested``.
    like: ``params -> moments`` of zeros.
    decay: Of the averages, or ``None``.

  Returns:
    A `Test`.
  """
  if decay is None:
    return from_function(
      lambda grads, **extras: request(moments(grads, extras, False)), True
    )

  def init(params):
    return no_averages(like(params), real(params))

  def update(grads, state, **extras):
    fresh = moments(grads, extras, True)
    averages, state = average(state, fresh, decay, extras)
    return request(averages), state

  return Test(init, update, scaled=True)


def check_size(name: str, size: Any) -> None:
  """Raises unless what a function requests is one real number."""
  if jnp.iscomplexobj(size) or not hasattr(size, '__float__'):
    raise TypeError(f'{name} a size, a number, got {size!r}.')
  if jnp.ndim(size):
    raise ValueError(
      f'{name} one size, a scalar, got an array of shape {jnp.shape(size)}:'
      ' take its largest.'
    )


def scalars(*names: str) -> Callable[[base.Params], Any]:
  """``params -> zeros`` by name."""
  return lambda params: {name: jnp.zeros((), real(params)) for name in names}


def above_zero(value: jax.Array) -> jax.Array:
  """NaN where noise is all that is known of a squared gradient."""
  return jnp.where(value > 0, value, jnp.nan)


def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
  """``a / b``, where 0 / 0 is 0 and a / 0 infinite."""
  safe = jnp.where(b == 0.0, 1.0, b)
  return jnp.where(b == 0.0, jnp.where(a == 0.0, 0.0, a * jnp.inf), a / safe)


def real(tree: Any) -> Any:
  """The dtype of norms of ``tree``."""
  return jnp.finfo(trees.accumulator_dtype(tree)).dtype


def variance(total: jax.Array, sample_size: jax.Array) -> jax.Array:
  """From a sum of squared deviations."""
  return ratio(total, (sample_size - 1).astype(total.dtype))


def trace_of(
  grads: base.Updates, name: str, extras: Any
) -> tuple[jax.Array, jax.Array]:
  """``(||g||^2, V)``, from the norm or summed from the coordinates."""
  wide, extras = real(grads), scaled(extras)
  total = extras.get('sum_sq_diff_norm')
  if total is None and extras.get('sum_sq_diff_grads') is not None:
    leaves = jax.tree.leaves(extras['sum_sq_diff_grads'])
    total = sum((jnp.sum(leaf.astype(wide)) for leaf in leaves), 0.0)
  checks.require_extra(
    name,
    'per_example(losses, ghost_norms), or vmap_grads or microbatch_means in'
    ' place of ghost_norms',
    sum_sq_diff_norm=total,
    sample_size=extras.get('sample_size'),
  )
  total = jnp.asarray(total, wide)
  grad_sq = _sq_norm(grads, total, extras)
  return grad_sq, variance(total, size_of(extras))


def inner_of(
  grads: base.Updates, name: str, extras: Any
) -> tuple[jax.Array, jax.Array]:
  """``(||g||^2, Var(<g_i, g>) / ||g||^2)``."""
  wide, extras = real(grads), scaled(extras)
  total = extras.get('sum_sq_diff_inner')
  checks.require_extra(
    name,
    'per_example(losses, ..., inner_products=jvp_inner_products)',
    sum_sq_diff_inner=total,
    sample_size=extras.get('sample_size'),
  )
  total = jnp.asarray(total, wide)
  grad_sq = _sq_norm(grads, total, extras, power=2)
  # Divided once here and once by the caller: ||g||^4 would underflow.
  return grad_sq, variance(ratio(total, grad_sq), size_of(extras))


def _sq_norm(grads, total, extras, power=1):
  wide = real(grads)
  if extras.get('sq_norms') is not None:
    sq_norms = jax.tree.leaves(extras['sq_norms'])
    return sum(sq_norms, jnp.zeros((), wide)).astype(wide)
  sq_norm = trees.sq_norm(grads, wide)
  return known(sq_norm, total, trees.largest(grads), power)


def known(sq_norm: Any, total: Any, largest: Any, power: int = 1) -> jax.Array:
  """``sq_norm``, or NaN where neither it nor ``total`` has digits.

  Args:
    sq_norm: A squared gradient.
    total: A sum of its deviations to the power ``2 * power``.
    largest: The largest entry of the gradient; where it is 0, so is the square.
    power: Of ``sq_norm`` that ``total`` is compared with.

  Returns:
    The square; NaN, which keeps the size, where both have underflowed.
  """
  info = jnp.finfo(jnp.result_type(sq_norm))
  least = info.tiny / info.eps
  digits = (sq_norm > least ** (1 / power)) | (total > least)
  return jnp.where(digits | (largest == 0), sq_norm, jnp.nan)


def unbiased(grad_sq: jax.Array, trace: jax.Array, extras: Any) -> jax.Array:
  """``||g||^2`` without the noise of the batch in it; of either sign."""
  return grad_sq - trace / size_of(extras).astype(trace.dtype)


def size_of(extras: Any) -> jax.Array:
  """The examples of the batch."""
  return jnp.asarray(extras['sample_size'])
