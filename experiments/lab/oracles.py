"""What a step of a method costs, counted and not typed.

A loss is marked; a step that calls it is evaluated abstractly, and the marks in
it are counted: each value, each gradient (a pass back through the loss) and
each product (a derivative of a gradient along a vector). What nothing uses is
left out, as a compiler does. Loops of fixed length count as often as they run;
of a loop that ends on a condition nobody knows how often it runs: it is said,
and how many rounds to count is the caller's.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir
from jax.interpreters import partial_eval
import jax.numpy as jnp


class Calls(NamedTuple):
  """Oracle calls of one step.

  Attributes:
    values: Evaluations of marked losses; those behind a gradient count too.
    gradients: Gradients of them.
    products: Hessian-vector products and cross products: one for each variable
      of the loss, also where one pass gives them all.
    open: Whether some are in a loop that ends on a condition.
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
  'input_gradient': 'product', 'product': 'product', 'back': 'back',
}  # fmt: skip
_BACK = {
  'tangent': 'gradient', 'gradient': 'tangent',
  'gradient_tangent': 'gradient_tangent', 'input_tangent': 'input_gradient',
  'input_gradient': 'input_tangent', 'product': 'back', 'back': 'product',
}  # fmt: skip


def _identity(name: str) -> core.Primitive:
  """``(x, witness) -> x``, for an ``x`` of a loss of so many ``variables``.

  Without a witness of the loop that it is in, the pass back from a loss, which
  begins with a constant, would be moved out of the loop.
  """
  primitive = core.Primitive(f'oracle_{name}')
  primitive.def_impl(lambda x, witness, variables: x)
  primitive.def_abstract_eval(lambda x, witness, variables: x)
  mlir.register_lowering(primitive, lambda ctx, x, witness, variables: [x])

  def batch(args, axes, *, variables):
    x, witness = args
    if axes[1] is not None:
      witness = jax.lax.index_in_dim(witness, 0, axes[1], keepdims=False)
    return primitive.bind(x, witness, variables=variables), axes[0]

  batching.primitive_batchers[primitive] = batch
  if name in _BACK:

    def transpose(cotangent, x, witness, *, variables):
      if type(cotangent) is ad.Zero:
        return [cotangent, None]
      mark = _MARKS[_BACK[name]]
      return [mark.bind(cotangent, witness, variables=variables), None]

    ad.primitive_transposes[primitive] = transpose

  def jvp(primals, tangents, *, variables):
    (x, witness), (tangent, _) = primals, tangents
    if type(tangent) is not ad.Zero:
      mark = _MARKS[_FORWARD[name]]
      tangent = mark.bind(tangent, witness, variables=variables)
    return primitive.bind(x, witness, variables=variables), tangent

  ad.primitive_jvps[primitive] = jvp
  return primitive


_MARKS = {name: _identity(name) for name in _FORWARD}


def _mark(name: str, x: Any, variables: int) -> Any:
  x = jnp.asarray(x)
  return _MARKS[name].bind(x, jax.lax.stop_gradient(x), variables=variables)


def _mark_input(tree: Any, variables: int) -> Any:
  """The same with a mark on its first array of floating point numbers."""
  leaves, structure = jax.tree.flatten(tree)
  for i, leaf in enumerate(leaves):
    if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      leaves[i] = _mark('input', leaf, variables)
      break
  return jax.tree.unflatten(structure, leaves)


def marked(loss: Callable[..., Any], variables: int = 1) -> Callable[..., Any]:
  """The same loss, whose calls can be counted.

  Args:
    loss: Its result is a scalar, or an array of losses.
    variables: Of how many of its first arguments it is differentiated.

  Returns:
    A function for `count` alone: what it computes is the same.
  """

  @functools.wraps(loss)
  def call(*args, **kwargs):
    inputs = [_mark_input(arg, variables) for arg in args[:variables]]
    value = loss(*inputs, *args[variables:], **kwargs)
    return _mark('value', value, variables)

  return call


def count(step: Callable[..., Any], *args: Any, rounds: float = 1) -> Calls:
  """Counts the calls of marked losses in ``step(*args)``, without running it.

  Args:
    step: A function of arrays.
    *args: Arrays, or their shapes.
    rounds: How often a loop runs that ends on a condition.

  Returns:
    The `Calls`.
  """
  return _count(jax.make_jaxpr(step)(*args).jaxpr, rounds)


def _calls(equation: Any) -> Calls | None:
  """Those that a mark stands for."""
  # A pass back through a gradient gives the products of all variables.
  all_products = Calls(products=equation.params.get('variables', 1))
  return {
    'oracle_value': Calls(values=1), 'oracle_gradient': Calls(gradients=1),
    'oracle_product': Calls(products=1), 'oracle_back': all_products,
  }.get(equation.primitive.name)  # fmt: skip


def _count(jaxpr: Any, rounds: float) -> Calls:
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  total = Calls()
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    calls = _calls(equation)
    if calls is not None:
      total = total.plus(calls)
      continue
    inner = [_count(part, rounds) for part in _parts(equation.params)]
    if name == 'cond':
      inner = [max(inner, key=lambda calls: sum(calls[:3]))]
    times = equation.params.get('length', 1) if name == 'scan' else 1
    for calls in inner:
      loops = name == 'while' and sum(calls[:3]) > 0
      calls = calls._replace(open=calls.open or loops)
      total = total.plus(calls, rounds if loops else times)
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
