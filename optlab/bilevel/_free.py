"""Whether a lower optimizer leaves y free, tried before the run."""

import functools
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from optlab import base

_AXIS = 3  # Numbers of an axis that are tried.
_FAR = 1e4  # Where a probe starts: what any dtype holds.
_GATHERED = (8, 512)  # Updates of a probe where those before move nothing.
_STAND_IN = 0.1  # A hyperparameter that is a tracer.
_STILL = (
  'lower_optimizer must move y, got one whose updates are zero for a gradient'
  ' of one, 512 times over: the hypergradient would be that of a y that stands'
  ' still. Give it a learning rate above zero.'
)
_MILD = 1.5e-3  # A pull that adam's default decay stays below, and lion's.


def check_free(optimizer: Any, inner: base.Params) -> None:
  """Raises a ``ValueError`` for an optimizer that does not leave y free.

  A probe of few numbers tries gradients of either sign at zero, where a
  half-space holds one of them; and far off and near, where what both have in
  common is a pull, of a projection, of weight decay or a threshold. Where steps
  follow the gradient's size any pull is refused; where they do not (adam, lion)
  y* moves by the pull times the gradients' noise, and a small one passes.

  What begins later, and numbers that stand still, are left to what the steps
  see. An optimizer that cannot be tried is refused: nobody knows what it does.
  """
  whole, few = _whole(inner), _few(inner)
  try:
    try:
      tried = _try(optimizer, few)
    except Exception:  # It may have bounds of its own for just these shapes.
      tried = _try(optimizer, whole)
  except Exception as error:
    raise ValueError(
      'lower_optimizer must have steps that can be tried beforehand, got one'
      f' that raises {type(error).__name__} ({error}): whether it leaves y free'
      ' is not known. Give what it needs, or take unrolled.'
    ) from error
  for i, leaf in enumerate(jax.tree.leaves(whole)):
    eps = float(jnp.finfo(leaf.dtype).eps)
    _judge({name: moves[i] for name, moves in tried.items()}, eps)
  signs = tried['up'] + tried['down']  # A half-space holds one of them.
  if any(move.size for move in signs) and not any(map(np.any, signs)):
    raise ValueError(_STILL)


def check_moves(optimizer: Any, inner: Any, *, smooth: bool) -> None:
  """Raises a ``ValueError`` for an optimizer that moves nothing of y.

  For estimators that allow a constrained y. An optimizer that cannot be tried
  passes: the steps themselves will tell.

  Args:
    optimizer: The lower optimizer.
    inner: The lower variable.
    smooth: Whether its steps must follow the gradient, and not its signs alone,
      through which no derivative passes.
  """
  like = _few(inner)
  random = np.random.default_rng(0)
  start, *grads = [_filled(like, random) for _ in range(3)]
  # A half-space holds one of the signs.
  grads += [jax.tree.map(np.negative, grad) for grad in grads]
  paths, moved = [], False
  try:
    for updates in (3, *_GATHERED):
      look = _with_numbers(
        functools.partial(_path, optimizer, updates, wavy=True), like
      )
      paths = [look(start, grad) for grad in grads]
      moved = any(np.any(move) for path in paths for move in path)
      if moved:
        break
  except Exception:
    return
  if not any(leaf.size for leaf in jax.tree.leaves(like)):
    return
  if not moved:
    raise ValueError(_STILL)
  up, other, down, below = paths
  if smooth and all(map(np.array_equal, up + down, other + below)):
    raise ValueError(
      'lower_optimizer must have steps that follow the size of the gradient,'
      ' got one that moves y alike for all sizes (as optax.sign_sgd, lion and'
      ' rprop do): no derivative passes through such steps. Take another, or an'
      ' estimator that solves a linear system, such as implicit.'
    )


def _whole(inner):
  return jax.tree.map(  # At least float32, whose rounding hides no decay.
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)
    ),
    inner,
  )


def _few(inner):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      tuple(min(size, _AXIS) for size in leaf.shape), leaf.dtype
    ),
    _whole(inner),
  )


def _filled(like, random):
  return jax.tree.map(
    lambda leaf: np.asarray(random.uniform(0.5, 1.5, leaf.shape), leaf.dtype),
    like,
  )


def _try(optimizer, like) -> dict[Any, list[np.ndarray]]:
  """The moves of each leaf, by where it starts and what gradient it gets."""
  random = np.random.default_rng(0)
  leaves, treedef = jax.tree.flatten(like)
  away = [random.uniform(0.5, 1.5, leaf.shape) for leaf in leaves]
  fill = lambda numbers: treedef.unflatten(
    [
      np.asarray(n * np.ones(leaf.shape), leaf.dtype)
      for n, leaf in zip(numbers, leaves, strict=True)
    ]
  )
  at = lambda scale: fill([scale * numbers for numbers in away])
  flat = lambda number: fill([number] * len(leaves))
  cases: dict[Any, Any] = {
    'up': (flat(0.0), flat(1.0)),
    'down': (flat(0.0), flat(-1.0)),
    'twice': (flat(0.0), flat(2.0)),
  }
  for name, scale in (('above', _FAR), ('below', -_FAR), ('near', 1.0)):
    for sign in (1.0, -1.0):
      cases[name, sign] = at(scale), flat(sign)
  for updates in (1, *_GATHERED):
    look = _with_numbers(functools.partial(_moves, optimizer, updates), like)
    tried = {name: look(*case) for name, case in cases.items()}
    if any(map(np.any, tried['up'] + tried['down'])):
      break  # Else steps are gathered, or a rate begins at zero.
  return tried


def _moves(optimizer, updates, start, grad):
  """The longest of so many moves of each leaf."""
  longest = lambda leaf: jnp.take_along_axis(
    leaf, jnp.argmax(jnp.abs(leaf), axis=0, keepdims=True), axis=0
  )[0]
  return [longest(leaf) for leaf in _path(optimizer, updates, start, grad)]


def _path(optimizer, updates, start, slope, wavy=False):
  """So many moves of each leaf, on a leading axis."""

  def update(state, count):
    # One size in all steps is what adam does not see.
    grad = (
      jax.tree.map(lambda g: g ** (1 + count % 3), slope) if wavy else slope
    )
    moved, state = optimizer.update(
      grad, state, start, value=jnp.ones(()), grad=grad,
      value_fn=lambda y: jnp.ones(()),
    )  # fmt: skip
    for new, leaf in zip(
      jax.tree.leaves(moved), jax.tree.leaves(start), strict=True
    ):
      if jnp.shape(new) != leaf.shape:
        raise ValueError(f'updates have shape {jnp.shape(new)}')
    return state, moved

  state = optimizer.init(start)
  if updates == 1:
    moved = jax.tree.map(lambda leaf: leaf[None], update(state, 0)[1])
  else:
    _, moved = jax.lax.scan(update, state, jnp.arange(updates))
  return jax.tree.leaves(moved)


def _with_numbers(function, like):
  """The function under jit and vmap too, where its constants are tracers."""
  program = jax.make_jaxpr(function)(like, like)
  run = core.jaxpr_as_fun(
    core.ClosedJaxpr(program.jaxpr, [*map(_stand_in, program.consts)])
  )

  def look(*args):
    with jax.core.eval_context():
      moves = run(*map(jnp.asarray, jax.tree.leaves(args)))
      return [np.asarray(move, np.float64) for move in moves]

  return look


def _stand_in(const):
  if not isinstance(const, jax.core.Tracer):
    return const
  with jax.core.eval_context():
    if jnp.issubdtype(const.dtype, jax.dtypes.prng_key):
      return jnp.broadcast_to(jax.random.key(0), const.shape)
    inexact = jnp.issubdtype(const.dtype, jnp.inexact)
    return jnp.full(const.shape, _STAND_IN if inexact else 1, const.dtype)


def _judge(moves: dict[Any, np.ndarray], eps: float) -> None:
  """Raises for a leaf that is held, brought back or drawn."""
  up, down = moves['up'], moves['down']
  still = _mean(up, down)  # What moves it wherever it stands (noise).
  step = _most(up - still)
  # By means, since some have no step where the gradient is zero.
  above, below, near = (
    _mean(moves[name, 1.0], moves[name, -1.0]) - still
    for name in ('above', 'below', 'near')
  )
  far = max(_most(above), _most(below))
  reason = None
  if np.any((up == 0) != (down == 0)):
    reason = (
      'holds it where the gradient has one sign (as'
      ' optax.keep_params_nonnegative does)'
    )
  elif not far <= 0.25 * _FAR:
    reason = 'brings it back from far off without a gradient (a projection)'
  if reason is not None:
    raise ValueError(
      f'lower_optimizer must leave y free, got one that {reason}: the'
      ' formula of the hypergradient is wrong there. Declare the constraint by'
      ' lower_map=optlab.bilevel.proximal_map(...), or take unrolled.'
    )
  pull = max(far / _FAR, _most(near))
  follows = _most(moves['twice'] - still) > 1.5 * step
  # As a part of what a gradient of one moves.
  drawn = not pull <= ((0.0 if follows else _MILD) + 8 * eps) * step
  # Or the rounding of new numbers less old ones, which is no pull in
  # proportion.
  rounding = pull <= 8 * eps and _most(above / _FAR - near) > 0.05 * pull
  if drawn and not rounding:
    raise ValueError(
      'lower_optimizer must not decay y, got one that moves it without a'
      ' gradient (weight decay, a threshold, a projection): y* is then not that'
      ' of lower, and the formula of the hypergradient wrong. Set'
      ' weight_decay=0 and write the penalty into lower, or where it has kinks'
      ' into lower_map; or take unrolled.'
    )


def _mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return 0.5 * (a + b)


def _most(a: np.ndarray) -> float:
  return float(np.max(np.abs(a), initial=0.0))
