"""Functions of parameters as problems: any optimizer is a method, by its name.

A problem in a file of the user's is one, too.
"""

from collections.abc import Callable
import functools
import inspect
import math
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab

from ..methods import optimizers
from . import flags
from . import oracles
from .study import Entry
from .study import Problem

GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def of_optimizers(
  text: str, make: Callable[[optimizers.Optimizer], Entry]
) -> Entry:
  """The entry of an optimizer, or of its search space."""
  found = {one.text: make(one) for one in optimizers.variants(text)}
  first = next(iter(found.values()))
  return first._replace(variants=found if len(found) > 1 else None)


def of_function(
  start: Callable[[jax.Array], Any],
  loss: Callable[[Any, Any], jax.Array],
  measure: Callable[[Any], dict[str, jax.Array]],
  curvature: Callable[[Any, Any], Any] | None = None,
  **fields: Any,
) -> Problem:
  """A function of parameters: every optimizer of optlab and optax is a method.

  Args:
    start: ``key -> params``.
    loss: ``(params, key) -> scalar``; the key draws the batch, if there is one.
    measure: ``params -> dict`` with ``tuning`` and ``value``.
    curvature: ``(params, key) -> operator``, the Hessian if not given.
    **fields: Of the `Problem`.

  Returns:
    The `Problem`. A call is a gradient or a Hessian-vector product; they are
    counted (`oracles.count`), but for those of a search, which reports them.
  """
  curvature = curvature or optlab.hessian(loss)
  shapes = jax.eval_shape(start, jax.random.key(0))

  def estimator(loss):
    return optlab.with_curvature(optlab.value_and_grad(loss), curvature)

  own = estimator(loss)

  def make(one):
    one = one._replace(make=functools.partial(_taking_extras, one.make))
    tx = one.make(0.1)
    found = jax.eval_shape(tx.init, shapes)
    has = lambda name: optax.tree.get(found, name, None) is not None
    if has('total_trials'):
      # Gradients of all trials, and products with the Hessian.
      total = lambda state: (
        optax.tree.get(state, 'total_trials')
        + optax.tree.get(state, 'total_products')
      )
      calls = lambda before, after: total(after) - total(before)
    elif has('num_linesearch_steps'):
      calls = lambda before, after: optax.tree.get(
        after, 'num_linesearch_steps'
      )
    else:
      calls = count(one)

    def begin(key, rate, *_):
      return optlab.init(start(key), own, one.make(rate))

    def step(state, key, rate, *_):
      return optlab.train_step(own, one.make(rate))(state, key)[0]

    return Entry(begin, step, calls, one.tuned)

  def count(one):
    marked = estimator(oracles.marked(loss))

    def step(key):
      state = optlab.init(start(key), marked, one.make(0.1))
      return optlab.train_step(marked, one.make(0.1))(state, key)[0]

    found = oracles.count(step, jax.random.key(0))
    if found.open:
      raise flags.UserError(
        f'--methods={one.text}: has a loop of gradients that ends on a'
        ' condition, and does not report how many it took'
      )
    return max(found.gradients + found.products, 1)

  def measure_state(state, _):
    return measure(_answer(state))

  unit = fields.pop('unit', 'gradients and Hessian-vector products')
  return Problem(
    functools.cache(lambda text: of_optimizers(text, make)),
    measure=measure_state, unit=unit,
    batched=can_batch(start, loss, measure), **fields,
  )  # fmt: skip


def _taking_extras(make: Callable[[Any], Any], rate: Any) -> Any:
  """A transformation that is given what it takes of `optlab.train_step`'s.

  SAM takes no other keywords than ``grad_fn``, which nobody but it asks for.
  """
  tx = make(rate)
  taken = inspect.signature(tx.update).parameters
  if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
    return tx

  def update(updates, state, params=None, **extras):
    value_fn = extras.get('value_fn')
    if value_fn is not None:
      extras['grad_fn'] = lambda params, _: jax.grad(value_fn)(params)
    extras = {name: extras[name] for name in extras if name in taken}
    return tx.update(updates, state, params, **extras)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _answer(state: Any) -> Any:
  """The parameters that a method stands for, which may not be the current."""
  kinds = optax.contrib.ScheduleFreeState, optax.contrib.SAMState
  parts = jax.tree.leaves(
    state.opt_state, is_leaf=lambda part: isinstance(part, kinds)
  )
  params = state.params
  for part in parts:
    if isinstance(part, optax.contrib.ScheduleFreeState):
      params = optax.contrib.schedule_free_eval_params(part, params)
    if isinstance(part, optax.contrib.SAMState) and part.cache is not None:
      synced = part.steps_since_sync == 0
      params = jax.tree.map(
        functools.partial(jnp.where, synced), params, part.cache
      )
  return params


def can_batch(start, loss, measure) -> bool:
  """Whether several runs can be computed together."""

  def look(key):
    params = start(key)
    return measure(params), jax.value_and_grad(loss)(params, key)

  try:
    jax.eval_shape(jax.vmap(look), jax.random.split(jax.random.key(0)))
  except NotImplementedError:  # A primitive without a rule for that.
    return False
  return True


def of_file(path: str) -> Problem:
  """The problem that a Python file defines.

  Args:
    path: A file with ``start(key)``, which makes parameters, ``loss(params,
      key)``, a scalar whose key draws the batch, and ``measure(params)``, what
      is reported; and, if it likes, ``tuning(params)``, by which rates are
      picked, ``METHODS``, ``LEARNING_RATES``, ``BUDGET``, ``VALUE`` (its name)
      and ``TARGET``.

  Returns:
    The problem.

  Raises:
    UserError: The file lacks one of them, or does not run.
  """
  try:
    found = runpy.run_path(path)
  except (Exception, SystemExit) as error:
    raise _bad_file(path, error) from error
  for name in ('start', 'loss', 'measure'):
    if not callable(found.get(name)):
      raise flags.UserError(f'--problem={path}: has no function {name}')
  start, loss, reported = (found[n] for n in ('start', 'loss', 'measure'))
  tuning = found.get('tuning', reported)
  try:
    key = jax.random.key(0)
    params = jax.eval_shape(start, key)
    shapes = [jax.eval_shape(loss, params, key)]
    shapes += [jax.eval_shape(f, params) for f in (reported, tuning)]
    bad = [shape for shape in shapes if getattr(shape, 'shape', None) != ()]
    if bad:
      raise ValueError(f'loss, measure and tuning give scalars, not {bad[0]}')
    jax.eval_shape(jax.grad(loss), params, key)
    fields = _settings(found)
    first = start(key)
    for name, value, again in (
      ('loss', loss(first, key), loss(first, key)),
      ('measure', reported(first), reported(first)),
    ):
      if math.isnan(value):
        raise ValueError(f'{name} is not a number at the start')
      if value != again:
        raise _random(name)
    same = functools.partial(np.array_equal, equal_nan=True)
    if not jax.tree.all(jax.tree.map(same, first, start(key))):
      raise _random('start')
  except Exception as error:
    raise _bad_file(path, error) from error
  return of_function(
    start, loss,
    lambda params: {'tuning': tuning(params), 'value': reported(params)},
    value=str(found.get('VALUE', 'measure')), **fields,
  )  # fmt: skip


def _random(name: str) -> ValueError:
  return ValueError(
    f'{name} is another one when it is called again: a compiled one would keep'
    ' the numbers that it drew first. Draw by the key'
  )


def _bad_file(path: str, error: BaseException) -> flags.UserError:
  return flags.UserError(f'--problem={path}: {flags.one_line(error)}')


def _settings(found: dict[str, Any]) -> dict[str, Any]:
  """What a file says in capitals, or defaults."""
  methods = _list(found, 'METHODS', ('sgd', 'adam', 'diffgrad'), str)
  rates = _list(found, 'LEARNING_RATES', GRID, float)
  budget = _real('BUDGET', found.get('BUDGET', 1000))
  target = found.get('TARGET')
  target = None if target is None else _real('TARGET', target)
  if not rates or not all(0 <= rate < math.inf for rate in rates):
    raise ValueError(f'LEARNING_RATES are numbers of at least 0, not {rates}')
  if not 0 < budget < math.inf:
    raise ValueError(f'BUDGET is a positive number, not {budget}')
  return {
    'methods': methods,
    'learning_rates': rates,
    'budget': budget,
    'target': target,
  }


def _list(found, name, default, kind) -> tuple[Any, ...]:
  """What a file has under a name: one, or several, of a kind."""
  value = found.get(name, default)
  single = isinstance(value, str) or not hasattr(value, '__iter__')
  entries = (value,) if single else tuple(value)
  if kind is float:
    return tuple(_real(name, entry) for entry in entries)
  if not entries or not all(isinstance(entry, kind) for entry in entries):
    raise ValueError(f'{name} are names, at least one, not {value!r}')
  return entries


def _real(name: str, value: Any) -> float:
  try:
    number = float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{name}: {error}') from error
  if math.isnan(number):
    raise ValueError(f'{name} is {number}, not a number')
  return number
