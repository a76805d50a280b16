"""What a step of a method costs, counted and not typed.

A loss is marked; a step that calls it is evaluated abstractly, and the marks in
it are counted: each value, each gradient (a pass back through the loss) and
each product (a derivative of a gradient along a vector). Loops of fixed length
count as often as they run; of a loop that ends on a condition nobody knows how
often it runs, and the count says so.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir
import jax.numpy as jnp


class Calls(NamedTuple):
  """Oracle calls of one step.

  Attributes:
    values: Evaluations of marked losses; those behind a gradient count too.
    gradients: Gradients of them.
    products: Hessian-vector products, cross products, and the like.
    open: Whether some are in a loop that ends on a condition: they count once.
  """

  values: float = 0
  gradients: float = 0
  products: float = 0
  open: bool = False

  def plus(self, other: 'Calls', times: float = 1) -> 'Calls':
    """The sum of both, the other one so many times."""
    return Calls(
      self.values + times * other.values,
      self.gradients + times * other.gradients,
      self.products + times * other.products,
      self.open or other.open,
    )


# What each mark turns into along a tangent, and on the way back. Those on the
# result of a loss tell its gradients, those on its arguments what is taken of
# gradients.
_FORWARD = {
  'value': 'tangent', 'tangent': 'tangent', 'gradient': 'gradient_tangent',
  'gradient_tangent': 'gradient_tangent',
  'input': 'input_tangent', 'input_tangent': 'input_tangent',
  'input_gradient': 'product', 'product': 'product',
}  # fmt: skip
_BACK = {
  'tangent': 'gradient', 'gradient': 'tangent',
  'gradient_tangent': 'gradient_tangent', 'input_tangent': 'input_gradient',
  'input_gradient': 'input_tangent', 'product': 'product',
}  # fmt: skip


def _identity(name: str) -> core.Primitive:
  primitive = core.Primitive(f'oracle_{name}')
  primitive.def_impl(lambda x: x)
  primitive.def_abstract_eval(lambda x: x)
  mlir.register_lowering(primitive, lambda ctx, x: [x])
  batching.primitive_batchers[primitive] = lambda args, axes: (
    primitive.bind(*args), axes[0]
  )  # fmt: skip
  if name in _BACK:
    ad.primitive_transposes[primitive] = lambda cotangent, x: [
      cotangent
      if type(cotangent) is ad.Zero
      else _MARKS[_BACK[name]].bind(cotangent)
    ]

  def jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    if type(tangent) is not ad.Zero:
      tangent = _MARKS[_FORWARD[name]].bind(tangent)
    return primitive.bind(x), tangent

  ad.primitive_jvps[primitive] = jvp
  return primitive


_MARKS = {name: _identity(name) for name in _FORWARD}


def _mark_input(tree: Any) -> Any:
  """The same with a mark on its first array of floating point numbers."""
  leaves, structure = jax.tree.flatten(tree)
  for i, leaf in enumerate(leaves):
    if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      leaves[i] = _MARKS['input'].bind(jnp.asarray(leaf))
      break
  return jax.tree.unflatten(structure, leaves)


def marked(loss: Callable[..., Any]) -> Callable[..., Any]:
  """The same loss, whose calls can be counted.

  Args:
    loss: Its result is a scalar, or an array of losses.

  Returns:
    A function for `count` alone: what it computes is the same.
  """

  @functools.wraps(loss)
  def call(*args, **kwargs):
    args = [_mark_input(argument) for argument in args]
    return _MARKS['value'].bind(jnp.asarray(loss(*args, **kwargs)))

  return call


def count(step: Callable[..., Any], *args: Any) -> Calls:
  """Counts the calls of marked losses in ``step(*args)``, without running it.

  Args:
    step: A function of arrays.
    *args: Arrays, or their shapes.

  Returns:
    The `Calls`.
  """
  return _count(jax.make_jaxpr(step)(*args).jaxpr)


_FIELDS = {
  'oracle_value': Calls(values=1), 'oracle_gradient': Calls(gradients=1),
  'oracle_product': Calls(products=1),
}  # fmt: skip


def _count(jaxpr: Any) -> Calls:
  total = Calls()
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name in _FIELDS:
      total = total.plus(_FIELDS[name])
      continue
    inner = [_count(part) for part in _parts(equation.params)]
    if name == 'cond':
      inner = [max(inner, key=lambda calls: sum(calls[:3]))]
    times = equation.params.get('length', 1) if name == 'scan' else 1
    for calls in inner:
      loops = name == 'while' and sum(calls[:3]) > 0
      total = total.plus(calls._replace(open=calls.open or loops), times)
  return total


def _parts(params: dict[str, Any]) -> list[Any]:
  """The programs inside of an equation."""
  found = []
  for value in params.values():
    for entry in value if isinstance(value, (list, tuple)) else [value]:
      inner = getattr(entry, 'jaxpr', entry)
      if hasattr(inner, 'eqns'):
        found.append(inner)
  return found
