"""A compiled loop of an optimizer, to a tolerance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optlab import _box
from optlab import _implicit
from optlab import _kept
from optlab import _loop
from optlab import _results
from optlab import _varying
from optlab import base
from optlab import checks
from optlab import trees


@checks.domains(
  fun=checks.Function('(params, *args) -> scalar'),
  tx=checks.TRANSFORMATION,
  max_steps=checks.Integer(0),
  max_seconds=checks.POSITIVE._replace(optional=True),
  grad_tol=checks.NON_NEGATIVE,
  target_value=checks.Real(),
  stall_steps=checks.Integer(1, optional=True),
  stall_tol=checks.NON_NEGATIVE,
  curvature=checks.Function('(params, *args) -> operator', optional=True),
  trace=checks.Function('MinimizeResult -> row', optional=True),
  callback=checks.Function('Progress -> whether to stop', optional=True),
)
def minimize(
  fun: Callable[..., jax.Array],
  params: base.Params,
  tx: optax.GradientTransformation,
  *,
  max_steps: int,
  args: tuple[Any, ...] = (),
  has_aux: bool = False,
  bounds: Any = None,
  max_seconds: float | jax.Array | None = None,
  grad_tol: float | jax.Array = 0.0,
  target_value: float | jax.Array = -jnp.inf,
  stall_steps: int | None = None,
  stall_tol: float | jax.Array = 0.0,
  curvature: Callable[..., base.Operator] | None = None,
  opt_state: base.OptState | None = None,
  trace: Callable[[_results.MinimizeResult], Any] | None = None,
  callback: Callable[[_results.Progress], Any] | None = None,
) -> _results.MinimizeResult:
  """Runs an optimizer on the device until a stopping test holds.

  One ``lax.while_loop``: no host round trip. Transformations that keep the
  accepted ``value`` and ``grad`` in their state (`gns_newton`, `optax.lbfgs`)
  are not made to evaluate them again, where their update is the last word: in
  ``chain(gns_newton(), scale(0.5))`` it is not, and the point is evaluated.
  Pure; jit it, or vmap it over starting points, where each stops on its own.

  Args:
    fun: The objective, ``(params, *args) -> scalar``.
    params: The start; complex leaves descend along the conjugate of `jax.grad`.
    tx: Any optax transformation; it gets ``value``, ``grad`` and ``value_fn``.
    max_steps: The most steps, a Python integer.
    args: Further arguments of ``fun`` and ``curvature``, data for example.
    has_aux: Whether ``fun`` returns ``(scalar, aux)``; that of the last point
      is in the result.
    bounds: ``(lower, upper)``, each a tree like ``params``, a number, or
      ``None``, as its leaves may be too. A start outside is moved to the box.
    max_seconds: Stop after the step in which so many seconds of the host's
      clock have passed since the start, compiling apart.
    grad_tol: Stop where the Euclidean norm of the gradient is at most this;
      with ``bounds``, of the part that no active bound holds.
    target_value: Stop where the value is at most this.
    stall_steps: Stop after so many steps in a row that do not lower the best
      value by more than ``stall_tol * |value|``; ``None`` never does.
    stall_tol: Relative decrease that counts as progress.
    curvature: ``(params, *args) -> operator``, called once a step and handed to
      the transformation as ``curvature``, for example ``hessian(fun)``.
    opt_state: State of ``tx`` at ``params``, to go on where an earlier result
      stopped; ``None`` starts afresh.
    trace: Called on the `MinimizeResult` so far (with ``trace=None``) before
      each step and at the end; its results are stacked.
    callback: Called on the host with a `Progress` after each step; stops the
      run where it returns true (``None`` goes on). Neither it nor
      ``max_seconds`` can be vmapped: jax refuses, as lanes stop on their own.

  Returns:
    A `MinimizeResult`; ``status`` is `MAX_STEPS`, `GRAD_TOL`, `TARGET_VALUE`,
    `STOPPED` (by ``callback``), `MAX_SECONDS`, `STALLED` (by ``stall_steps``,
    or the transformation says ``stalled`` in its state), `NON_FINITE` (the
    value or the gradient at ``params`` is not finite, where no method could go
    on) or `REJECTED` (the transformation says ``failed`` in its state: all that
    it tried was rejected).

  Raises:
    TypeError: ``max_steps`` is not an integer, ``fun`` not a function or of
      no real scalar, or a leaf of ``params`` no array of floats; ``bounds`` of
      complex parameters.
    ValueError: A tolerance is negative or NaN; ``bounds`` are no pair, of other
      shapes than ``params``, NaN, or a lower one is above the upper one.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> fun = lambda x: jnp.sum((x - 1.0) ** 2)
    >>> result = optlab.minimize(
    ...     fun, jnp.zeros(3), optax.lbfgs(), max_steps=100, grad_tol=1e-6)
    >>> print(result.params, int(result.status) == optlab.training.GRAD_TOL)
    [1. 1. 1.] True

    What the objective depends on may be differentiated with respect to:

    >>> centre = lambda c: optlab.minimize(
    ...     lambda x: jnp.sum((x - c) ** 4 + (x - c) ** 2), jnp.zeros(2),
    ...     optax.lbfgs(), max_steps=100, grad_tol=1e-5).params.sum()
    >>> print(jax.grad(centre)(jnp.ones(2)).round(3))
    [1. 1.]

    >>> result = optlab.minimize(
    ...     fun, jnp.zeros(3), optlab.gns_newton(), max_steps=100,
    ...     grad_tol=1e-6, bounds=(None, jnp.array([0.5, 2.0, jnp.inf])))
    >>> print(result.params, result.active)
    [0.5 1.  1. ] [1 0 0]

  Notes:
    In a box each step lands at the nearest point of it, and a coordinate that
    the gradient holds at its bound stays out of the gradient and the curvature
    until it is released. `gns_newton` tries the points where its steps land
    (projected Newton: Bertsekas, `Projected Newton Methods
    <https://doi.org/10.1137/0320018>`_, 1982); line searches do too, along
    their own direction; ``optax.sgd`` is projected gradient descent, and the
    memory of others, momentum for example, is not told of the bounds.

    ``params`` and ``value`` have derivatives, forward and backward, by the
    implicit function theorem: one linear system with the Hessian, formed for at
    most 256 parameters, else conjugate gradients. They are NaN where the point
    is no minimizer, or not the only one near: the Hessian is not positive
    definite there (beyond 256 parameters, 1,000 products do not solve a system
    with a random right side), or the run did not
    meet ``grad_tol`` and the Newton step that is left is no shorter than
    ``eps ** (1/3)`` of the way from the start.
    With ``bounds`` the derivatives are those of the free coordinates, an active
    one moves with its bound; NaN where the gradient does not press on it, or a
    free one is at its bound.
    What else is in the result (``trace``, ``opt_state``) and the start count as
    constants; complex parameters have no derivatives.
  """
  checks.enforce(minimize, locals())
  checks.check_params('params', params)
  args = args if isinstance(args, tuple) else (args,)
  whole = lambda params: fun(params, *args)
  # Line searches of optax refuse extras that their objective does not take.
  value_fn = lambda params, curvature=None: _value(whole(params), has_aux)
  bound = None
  if curvature is not None:
    bound = lambda params: curvature(params, *args)
  box = _box.make(bounds, params)
  run = _loop.Run(
    _kept.takes_extras(tx), value_fn, max_steps, max_seconds, grad_tol,
    target_value, stall_steps, stall_tol, bound, box, trace, callback,
  )  # fmt: skip
  params = trees.own(params)
  if box is not None:
    params = _box.inside(box, params)
  params = _varying.as_value(value_fn, params)
  result = _implicit.run_constant(
    lambda params: _loop.loop(run, params, opt_state), params
  )
  if not any(map(jnp.iscomplexobj, jax.tree.leaves(params))):
    last, value = _implicit.minimizer(
      value_fn, result.params, result.value,
      result.status == _results.GRAD_TOL, params, box, result.active,
    )  # fmt: skip
    result = result._replace(params=last, value=value)
  if has_aux:
    result = result._replace(aux=whole(result.params)[1])
  return result


def _value(output, has_aux):
  """The value among what the objective returns."""
  is_pair = isinstance(output, tuple) and len(output) == 2
  if has_aux and not is_pair:
    raise TypeError(
      f'fun must return a pair (value, aux) where has_aux=True, got {output!r}.'
    )
  if is_pair and not has_aux:
    raise TypeError(
      f'fun must return a scalar, got {output!r}; say has_aux=True where it'
      ' returns (value, aux).'
    )
  value = output[0] if has_aux else output
  checks.check_scalar('fun', value, 'Sum or average the losses.')
  return value
