"""A user's loss in one form: auxiliary output, model state, keys."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees

__all__ = [
  'Loss',
  'LossState',
]


class LossState(NamedTuple):
  """State of `value_and_grad` for a loss with model state or a key."""

  step: jax.Array  # shape (), int32, folded into the key
  model_state: Any  # as the loss returned it last; () where it has none
  key: Any  # typed PRNG key of the run; () where the loss takes none


class Loss(NamedTuple):
  """A user's loss in one form, whatever it takes and returns.

  It maps ``(params, model_state, batch, key)`` to ``(value, (model_state,
  aux))``, with ``()`` for what the loss does not have. Estimators use it.

  Attributes:
    fun: The user's function, see `value_and_grad`.
    has_aux: Whether it returns auxiliary output.
    has_state: Whether it takes and returns model state.
    has_key: Whether it takes a key, last.
    part: Where the model state is a tuple of several losses, the place of the
      part that this one returns.
  """

  fun: Callable[..., Any]
  has_aux: bool = False
  has_state: bool = False
  has_key: bool = False
  part: int | None = None

  def __call__(
    self, params: base.Params, model_state: Any, batch: base.Batch, key: Any
  ) -> tuple[jax.Array, tuple[Any, Any]]:
    """The value, and the model state and auxiliary output beside it."""
    args = (params, model_state) if self.has_state else (params,)
    args = (*args, batch, key) if self.has_key else (*args, batch)
    # New containers: a module of the user may write into those it gets.
    out = self.fun(*jax.tree.map(lambda leaf: leaf, args))
    if not (self.has_aux or self.has_state):
      _check_value(out)
      return out, (self.own(model_state), ())
    if not (isinstance(out, tuple) and len(out) == 2):
      raise ValueError(
        f'the loss must return {self.returns()}, got {type(out).__name__}'
        + (f' of {len(out)}' if isinstance(out, tuple) else '')
        + '.'
      )
    value, rest = out
    if not self.has_state:
      return value, (self.own(model_state), rest)
    new, aux = rest, ()
    if self.has_aux:
      if not (isinstance(rest, tuple) and len(rest) == 2):
        raise ValueError(
          f'the loss must return {self.returns()}, got {type(rest).__name__}'
          ' beside the value.'
        )
      new, aux = rest
    own = self.own(model_state)
    checks.check_same_tree(
      'the model state that the loss returned', new, 'the one given to init',
      own,
    )  # fmt: skip
    return value, (trees.cast_like(new, own), aux)

  def scalar(self, *args: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    """The same of a loss of a whole batch, which must be one real number."""
    value, rest = self(*args)
    checks.check_scalar(
      'the loss',
      value,
      'Take its mean over the batch, or give the losses of the examples to'
      ' optlab.per_example.',
    )
    return value, rest

  def own(self, model_state):
    """The part of the model state that this loss returns."""
    return model_state if self.part is None else model_state[self.part]

  def returns(self) -> str:
    """What the loss must return, in words."""
    if self.has_state and self.has_aux:
      return '(value, (model_state, aux))'
    return '(value, model_state)' if self.has_state else '(value, aux)'

  def value(
    self,
    model_state: Any,
    batch: base.Batch,
    key: Any,
    params: base.Params,
    *,
    curvature: Any = None,
  ) -> jax.Array:
    """The loss alone; optax's line searches pass ``curvature`` on to it."""
    del curvature
    return self(params, model_state, batch, key)[0]

  def init(self, params: base.Params, *given: Any) -> Any:
    """The state before the first step, from what follows the parameters."""
    checks.check_params('params', params)
    names = ['model_state'] * self.has_state + ['key'] * self.has_key
    if len(given) != len(names):
      raise ValueError(
        f'init must get {", ".join(["params", *names])}, got {len(given)}'
        ' after params: declare has_state and has_key where the estimator is'
        ' made, and pass what they declare to optlab.init after tx.'
      )
    if not names:
      return optax.EmptyState()
    values = dict(zip(names, given, strict=True))
    checks.check_arrays('model_state', values.get('model_state', ()))
    return LossState(
      step=jnp.zeros((), jnp.int32),
      model_state=trees.own(values.get('model_state', ())),
      key=checks.as_key('key', values['key']) if self.has_key else (),
    )

  def begin(self, state: Any) -> tuple[Any, Any, Any]:
    """The model state and the key of this step, and the state."""
    if not isinstance(state, LossState):
      return (), (), state
    key = jax.random.fold_in(state.key, state.step) if self.has_key else ()
    return state.model_state, key, state

  def end(self, state: Any, model_state: Any) -> Any:
    """The state after this step."""
    if not isinstance(state, LossState):
      return state
    return state._replace(step=state.step + 1, model_state=model_state)


def _check_value(out):
  if isinstance(out, tuple):
    raise ValueError(
      f'the loss returned a tuple of {len(out)}: declare has_aux=True for'
      ' (value, aux), has_state=True for (value, model_state).'
    )
