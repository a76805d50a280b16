"""Where the axis of the examples is in the results of an operation."""

import math
from typing import Any, NamedTuple

_ELEMENTWISE = """
  abs add add_any and acos acosh asin asinh atan atan2 atanh cbrt ceil clamp
  clz complex conj convert_element_type copy cos cosh digamma div eq erf erf_inv
  erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le
  lgamma log log1p logistic lt max min mul ne neg nextafter not
  optimization_barrier or polygamma population_count pow real reduce_precision
  rem round rsqrt select_n sharding_constraint shift_left
  shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
  stop_gradient sub tan tanh threefry2x32 xor pvary pcast
"""
_IS_ELEMENTWISE = frozenset(_ELEMENTWISE.split())


class Mixed(NamedTuple):
  """A number in which examples are mixed, and by what."""

  by: str


class Part(NamedTuple):
  """A range of the examples, along an axis."""

  axis: int
  start: int
  stop: int
  count: int  # of all examples


NONE, SOME, UNKNOWN = 'none', 'some', 'unknown'


def rule_of(eqn: Any) -> Any:
  """``(eqn, states) -> one state, or one a result``, of axes and `NONE`."""
  name = eqn.primitive.name
  if name in _IS_ELEMENTWISE or name.startswith('random_'):
    return _elementwise
  if name.startswith(('reduce_', 'arg')) and 'axes' in eqn.params:
    return _reduce
  if name.startswith('cum'):
    return _along('axis')
  if name.startswith(('reduce_window', 'select_and_')):
    return _pooling
  if name.startswith('scatter'):
    return _scatter
  return _RULES.get(name, lambda eqn, states: [UNKNOWN])


def _elementwise(eqn, states):
  """Rows of one axis; with those of another, every example meets every one."""
  axes = {state for state in states if state != NONE}
  return [axes.pop() if len(axes) == 1 else Mixed(eqn.primitive.name)]


def _reduce(eqn, states):
  axes = eqn.params['axes']
  if states[0] in axes:
    return [Mixed(eqn.primitive.name)]
  return [states[0] - sum(axis < states[0] for axis in axes)]


def _mapped(eqn, states):
  """Sums over mapped axes, which `jax.vmap` has made axes of the arrays."""
  axes = eqn.params['axes']
  return [
    state
    if state == NONE
    else Mixed(eqn.primitive.name)
    if state in axes
    else state - sum(axis < state for axis in axes if isinstance(axis, int))
    for state in states
  ]


def _along(parameter):
  def rule(eqn, states):
    (axis,) = _elementwise(eqn, states)
    same = axis == eqn.params[parameter]
    return [Mixed(eqn.primitive.name) if same else axis]

  return rule


def _dot(eqn, states):
  contract, batch = eqn.params['dimension_numbers']
  places = []
  for side, state in enumerate(states):
    if state == NONE:
      continue
    if state in contract[side]:
      return [Mixed('dot_general')]
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
  return [places[0] if len(set(places)) == 1 else Mixed('dot_general')]


def _reshape(eqn, states):
  before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  axis = states[0]
  lead = math.prod(before[:axis])
  for place, size in enumerate(after):
    if size == before[axis] and math.prod(after[:place]) == lead:
      return [place]
  return [UNKNOWN]


def _transpose(eqn, states):
  return [list(eqn.params['permutation']).index(states[0])]


def _broadcast(eqn, states):
  axis = eqn.params['broadcast_dimensions'][states[0]]
  before = eqn.invars[0].aval.shape[states[0]]
  # A single example of a part, made that of every one.
  return [axis if eqn.outvars[0].aval.shape[axis] == before else SOME]


def _convolution(eqn, states):
  numbers = eqn.params['dimension_numbers']
  if states[1] != NONE or eqn.params['batch_group_count'] != 1:
    return [UNKNOWN]
  if states[0] == numbers.lhs_spec[0]:
    return [numbers.out_spec[0]]
  if states[0] in numbers.lhs_spec[2:]:
    return [Mixed('conv_general_dilated')]
  return [UNKNOWN]


def _pooling(eqn, states):
  axes = {state for state in states if state != NONE}
  sizes = eqn.params.get('window_dimensions')
  if len(axes) > 1 or sizes is None:
    return [UNKNOWN]
  (axis,) = axes
  return [axis if sizes[axis] == 1 else Mixed(eqn.primitive.name)]


def _window(eqn, states):
  """Pads, updates and concatenations along the other axes."""
  (axis,) = _elementwise(eqn, states)
  if isinstance(axis, Mixed) or states[0] == NONE:
    return [UNKNOWN]
  before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  return [axis if before[axis] == after[axis] else UNKNOWN]


def _slice(eqn, states):
  axis, shape = states[0], eqn.invars[0].aval.shape
  start = eqn.params['start_indices'][axis]
  stop = eqn.params['limit_indices'][axis]
  if (eqn.params['strides'] or [1] * len(shape))[axis] != 1:
    return [UNKNOWN]
  if (start, stop) == (0, shape[axis]):
    return [axis]
  return [Part(axis, start, stop, shape[axis])]


def _dynamic_slice(eqn, states):
  axis = states[0]
  if axis == NONE or any(state != NONE for state in states[1:]):
    return [UNKNOWN]
  before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  return [axis if before[axis] == after[axis] else SOME]


def _split(eqn, states):
  axis, count = states[0], eqn.invars[0].aval.shape[states[0]]
  if eqn.params['axis'] != axis:
    return [axis]
  found, at = [], 0
  for size in map(int, eqn.params['sizes']):
    found.append(Part(axis, at, at + size, count))
    at += size
  return found


def _reversed(eqn, states):
  return [SOME if states[0] in eqn.params['dimensions'] else states[0]]


def _gather(eqn, states):
  numbers = eqn.params['dimension_numbers']
  if states[1] == NONE:
    return [_taken(eqn, states[0])]
  if states[0] != NONE and (
    states[0] not in numbers.operand_batching_dims
    or numbers.start_indices_batching_dims[
      list(numbers.operand_batching_dims).index(states[0])
    ]
    != states[1]
  ):
    return [UNKNOWN]
  rank = len(eqn.outvars[0].aval.shape)
  free = [axis for axis in range(rank) if axis not in numbers.offset_dims]
  return [free[states[1]]]


def _taken(eqn, axis):
  """Rows of the data at places that are the same for all examples."""
  numbers, shape = eqn.params['dimension_numbers'], eqn.invars[0].aval.shape
  gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  if axis in numbers.operand_batching_dims:
    return UNKNOWN
  if eqn.params['slice_sizes'][axis] != shape[axis]:
    return SOME
  kept = [i for i in range(len(shape)) if i not in gone]
  return numbers.offset_dims[kept.index(axis)] if axis in kept else UNKNOWN


def _scatter(eqn, states):
  """Examples that are added up at places of their own, as by their class."""
  operand, indices, updates = states
  numbers = eqn.params['dimension_numbers']
  by_data = operand == NONE and NONE not in (indices, updates)
  together = (
    by_data
    and indices not in numbers.scatter_indices_batching_dims
    and eqn.invars[1].aval.shape[-1] == 1
  )
  return [SOME if together else UNKNOWN]


def _top_k(eqn, states):
  axis = eqn.params.get('axis', -1) % len(eqn.invars[0].aval.shape)
  return [Mixed('top_k') if states[0] == axis else states[0]]


def _fft(eqn, states):
  first = len(eqn.invars[0].aval.shape) - len(eqn.params['fft_lengths'])
  return [Mixed('fft') if states[0] >= first else states[0]]


_RULES = {
  'bitcast_convert_type': _elementwise,
  'broadcast_in_dim': _broadcast,
  'concatenate': _window,
  'conv_general_dilated': _convolution,
  'dot_general': _dot,
  'dynamic_slice': _dynamic_slice,
  'dynamic_update_slice': _window,
  'expand_dims': _reshape,
  'fft': _fft,
  'gather': _gather,
  'pad': _window,
  'pmax': _mapped,
  'pmin': _mapped,
  'psum': _mapped,
  'psum_invariant': _mapped,
  'reshape': _reshape,
  'rev': _reversed,
  'slice': _slice,
  'sort': _along('dimension'),
  'split': _split,
  'squeeze': _reshape,
  'top_k': _top_k,
  'transpose': _transpose,
}
