"""The nouns of optlab.

A *transformation* is optax's own ``(init, update)`` pair. An *estimator* is its
twin: a pair of pure functions that makes the gradients which a transformation
consumes. An *operator* is a function ``v -> A v`` on pytrees that is itself a
pytree. A *solver* prepares ``(A + shift I)^-1 b`` once and answers for many
shifts.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple, Protocol

import jax
import optax

__all__ = [
  'ArrayLike',
  'ArrayTree',
  'Batch',
  'Estimate',
  'GradientEstimator',
  'Operator',
  'OptState',
  'Params',
  'Prepared',
  'ScalarOrSchedule',
  'Solver',
  'Updates',
]

# What a tree of arrays is, a user says: a loss may take an array, a dict, a
# dataclass. optax's union fits none of these to a type checker.
#: Any pytree of arrays.
ArrayTree = Any
#: The pytree that is optimized.
Params = Any
#: A pytree like the parameters: gradients, or what is added to them.
Updates = Any
#: What a transformation remembers.
OptState = Any
#: What a loss takes beside the parameters: a pytree, examples in front.
Batch = Any
#: An array, a number, or nested lists of them.
ArrayLike = jax.typing.ArrayLike | Sequence[Any]
#: A linear map of pytrees like the parameters.
Operator = Callable[[ArrayTree], ArrayTree]
#: A number, or a function of the step.
ScalarOrSchedule = float | jax.Array | optax.Schedule


class Estimate(NamedTuple):
  """What an estimator knows about the loss at one point.

  Attributes:
    value: Scalar, the loss that the estimate belongs to.
    grads: Pytree with the structure, shapes and dtypes of the parameters.
    extras: Keyword arguments for the transformation's ``update``, by the names
      of the glossary; each value is a pytree.
    aux: Auxiliary output of the loss, a pytree; ``()`` where there is none.
  """

  value: jax.Array
  grads: Updates
  extras: dict[str, Any] = {}
  aux: Any = ()


class GradientEstimator(NamedTuple):
  """A pair of pure functions that makes gradients, with memory where needed.

  Attributes:
    init: ``(params, *inner) -> state``; ``inner`` are the inner variables of a
      method that has some (the lower variable of a bilevel problem).
    estimate: ``(params, state, batch) -> (Estimate, state)``.
  """

  init: Callable[..., Any]
  estimate: Callable[[Params, Any, Batch], tuple[Estimate, Any]]


class Prepared(NamedTuple):
  """The system ``(A + shift I) x = b``, prepared for many shifts.

  It is a function ``shift -> (x, ok)``; ``solve`` also counts.

  Attributes:
    solve: ``shift -> (x, ok, products)``. ``ok`` is false where the shifted
      operator is not positive definite, and ``x`` is then undefined;
      ``products`` are the operator-vector products of this shift, 0 or an int32
      scalar.
    products: Those of the preparation.
  """

  solve: Callable[[jax.Array], tuple[ArrayTree, jax.Array, Any]]
  products: Any = 0

  def __call__(self, shift: Any) -> tuple[ArrayTree, jax.Array]:
    return self.solve(shift)[:2]


@functools.singledispatch
def rows_of(batch: Batch) -> Batch:
  """The examples of a batch; kinds of batches that only name theirs register.

  Estimators whose loss sees a whole batch call it, so that the loss of the user
  gets examples and never a window on a data set.

  Args:
    batch: Any batch.

  Returns:
    The batch itself, or the examples that it names.

  Raises:
    ValueError: Their number is not known when the step is compiled.
  """
  return batch


class Solver(Protocol):
  """Prepares the solution of ``(A + shift I) x = b`` for many shifts.

  ``shift`` is the smallest shift of interest: a solver may use it to decide how
  far to prepare. `gns_newton` passes trees like the parameters, in float32 or
  wider, and one flat vector where curvature or metric show a matrix; without a
  metric the operator is the user's own, with the structure that a solver may
  use (bands, say).
  """

  def __call__(
    self, operator: Operator, b: ArrayTree, shift: Any
  ) -> Prepared: ...
