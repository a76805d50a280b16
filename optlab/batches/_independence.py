"""Whether the loss of an example depends on that example alone.

A loss that mixes its examples (batch normalization that trains) is another
function on a batch of one, and its per-example gradients are wrong. The jaxpr
of the losses is read once, while a step is traced: the axis of the examples is
followed, and an operation that takes them together, on the way to the loss, is
an error. What can't be followed passes; `check_losses` compares numbers.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np

from optlab import base
from optlab import checks
from optlab.batches import _losses

_ELEMENTWISE = """
  abs add and acos acosh asin asinh atan atan2 atanh cbrt ceil clamp complex
  conj convert_element_type copy cos cosh digamma div eq erf erf_inv erfc
  exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p
  logistic lt max min mul ne neg nextafter not optimization_barrier or pow
  real reduce_precision rem round rsqrt select_n sharding_constraint sign
  sin sinh sqrt square stop_gradient sub tan tanh xor pvary pcast
"""
_CALLS = """
  jit pjit closed_call core_call remat2 checkpoint custom_jvp_call
  custom_vjp_call custom_vjp_call_jaxpr
"""
_IS_ELEMENTWISE, _IS_CALL = map(
  frozenset, (_ELEMENTWISE.split(), _CALLS.split())
)


class _Mixed(NamedTuple):
  """A number in which examples are mixed, and by what."""

  by: str


_NONE, _UNKNOWN = 'none', 'unknown'  # No data in it; not followed.


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
  inputs = [_NONE] * len(jax.tree.leaves(params))
  inputs += [0] * len(jax.tree.leaves(examples))
  found = _walk(closed.jaxpr, inputs)[0]
  return found.by if isinstance(found, _Mixed) else None


def _message(what):
  return (
    f'loss i must depend on example i alone: {what}, as in batch normalization'
    ' that trains or a contrast within the batch. Fix the statistics'
    ' (use_running_average=True), normalize within examples, or take'
    ' microbatch_means or plain_grads, whose gradients are of microbatches.'
  )


def _walk(jaxpr, inputs):
  env: dict[Any, Any] = dict.fromkeys(jaxpr.constvars, _NONE)
  env |= dict(zip(jaxpr.invars, inputs, strict=True))
  read = lambda atom: _NONE if isinstance(atom, jax_core.Literal) else env[atom]
  for eqn in jaxpr.eqns:
    outs = _equation(eqn, [read(atom) for atom in eqn.invars])
    env |= dict(zip(eqn.outvars, outs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn, states):
  """Where the axis of the examples is in each result."""
  count = len(eqn.outvars)
  name = eqn.primitive.name
  if all(state == _NONE for state in states):
    return [_NONE] * count
  if name in _IS_CALL:
    inner = eqn.params.get('jaxpr', eqn.params.get('call_jaxpr'))
    inner = getattr(inner, 'jaxpr', inner)
    if inner is not None and len(inner.invars) == len(states):
      return _walk(inner, states)
  for state in states:
    if isinstance(state, _Mixed):
      return [state] * count
  if any(state == _UNKNOWN for state in states):
    return [_UNKNOWN] * count
  rule = _RULES.get(name)
  if name in _IS_ELEMENTWISE:
    rule = _elementwise
  elif name.startswith(('reduce_', 'arg')) and 'axes' in eqn.params:
    rule = _reduce
  elif name.startswith('cum'):
    rule = _along('axis')
  return [_UNKNOWN] * count if rule is None else [rule(eqn, states)] * count


def _elementwise(eqn, states):
  axes = {state for state in states if state != _NONE}
  return axes.pop() if len(axes) == 1 else _UNKNOWN


def _reduce(eqn, states):
  axes = eqn.params['axes']
  if states[0] in axes:
    return _Mixed(eqn.primitive.name)
  return states[0] - sum(axis < states[0] for axis in axes)


def _along(parameter):
  def rule(eqn, states):
    axis = _elementwise(eqn, states)
    same = axis == eqn.params[parameter]
    return _Mixed(eqn.primitive.name) if same else axis

  return rule


def _dot(eqn, states):
  contract, batch = eqn.params['dimension_numbers']
  places = []
  for side, state in enumerate(states):
    if state == _NONE:
      continue
    if state in contract[side]:
      return _Mixed('dot_general')
    if state in batch[side]:
      places.append(list(batch[side]).index(state))
      continue
    ranks = [len(atom.aval.shape) for atom in eqn.invars]
    free = [
      axis
      for axis in range(ranks[side])
      if axis not in contract[side] and axis not in batch[side]
    ]
    before = len(batch[0])
    if side == 1:
      before += ranks[0] - len(contract[0]) - len(batch[0])
    places.append(before + free.index(state))
  return places[0] if len(set(places)) == 1 else _Mixed('dot_general')


def _reshape(eqn, states):
  before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  axis = states[0]
  lead = math.prod(before[:axis])
  for place, size in enumerate(after):
    if size == before[axis] and math.prod(after[:place]) == lead:
      return place
  return _UNKNOWN


def _transpose(eqn, states):
  return list(eqn.params['permutation']).index(states[0])


def _broadcast(eqn, states):
  return eqn.params['broadcast_dimensions'][states[0]]


def _convolution(eqn, states):
  numbers = eqn.params['dimension_numbers']
  lhs = states[0] == numbers.lhs_spec[0] and states[1] == _NONE
  whole = eqn.params['batch_group_count'] == 1
  return numbers.out_spec[0] if lhs and whole else _UNKNOWN


def _window(eqn, states):
  """Slices, pads and concatenations along the other axes."""
  axis = _elementwise(eqn, states)
  if axis == _UNKNOWN or states[0] == _NONE:
    return _UNKNOWN
  before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  return axis if before[axis] == after[axis] else _UNKNOWN


def _gather(eqn, states):
  numbers = eqn.params['dimension_numbers']
  if states[1] == _NONE:
    return _UNKNOWN
  if states[0] != _NONE and (
    states[0] not in numbers.operand_batching_dims
    or numbers.start_indices_batching_dims[
      list(numbers.operand_batching_dims).index(states[0])
    ]
    != states[1]
  ):
    return _UNKNOWN
  rank = len(eqn.outvars[0].aval.shape)
  free = [axis for axis in range(rank) if axis not in numbers.offset_dims]
  return free[states[1]]


_RULES = {
  'broadcast_in_dim': _broadcast,
  'concatenate': _window,
  'conv_general_dilated': _convolution,
  'dot_general': _dot,
  'dynamic_slice': _window,
  'expand_dims': _reshape,
  'gather': _gather,
  'pad': _window,
  'reshape': _reshape,
  'rev': _window,
  'slice': _window,
  'sort': _along('dimension'),
  'split': _window,
  'squeeze': _reshape,
  'transpose': _transpose,
}
