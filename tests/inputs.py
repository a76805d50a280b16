"""What every public function says to bad input: the tables' common parts.

Each wing has a table of its own, ``tests/WING/bad_input_test.py``; values
outside the declared domains of arguments are tried by `domains_test`.
A row is a public name, what is wrong, a call, and what must come of it: an
error of a type with a message, or a safe state (the call returns true). Most
arguments have declared domains; `counts` replaces one that has none of a good
call by bad values; the message must name the argument and the value. Nearly all
fail before anything is compiled; steps are only traced (`traced`).
"""

from collections.abc import Callable
import functools
import inspect
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.public import PUBLIC

NAN, INF = np.nan, np.inf
SCHEDULE = optax.constant_schedule(0.1)
NOT_INTEGER = ('2', None, 2.0, np.array(2))


class Row(NamedTuple):
  """A bad input and what must come of it.

  Attributes:
    name: Public name.
    wrong: What is wrong.
    call: Makes the error; where none is promised, says whether all is well.
    error: Type of the error, or `None`.
    match: Regular expression for the message.
  """

  name: str
  wrong: str
  call: Callable[[], Any]
  error: type[Exception] | None = None
  match: str = ''


def under_jit(call, argument, value):
  """Calls with a tracer."""
  jax.eval_shape(lambda value: (call(**{argument: value}), 0)[1], value)


class Table:
  """The rows of one module."""

  def __init__(self):
    self.rows: list[Row] = []

  def row(self, name, wrong, call, error=None, match=''):
    self.rows.append(Row(name, wrong, call, error, match))

  def counts(self, call, minimum=1, not_integer=NOT_INTEGER, **bad):
    """Rows for integers that give shapes: too small, no integer, a tracer."""
    name = call.__name__
    for argument, values in bad.items():
      for value in values or (minimum - 1, -1):
        self.row(
          name,
          f'{argument}={value!r}',
          functools.partial(call, **{argument: value}),
          ValueError,
          rf'{argument} must be at least \d+, got {value}\.',
        )
      for value in not_integer:
        self.row(
          name,
          f'{argument}={value!r}',
          functools.partial(call, **{argument: value}),
          TypeError,
          rf'{argument} must be an integer, got {re.escape(repr(value))}',
        )
      self.row(
        name,
        f'{argument} is a tracer',
        functools.partial(under_jit, call, argument, 2),
        TypeError,
        rf'{argument} must be an integer.*pass a Python integer',
      )


GOOD: dict[str, Callable[..., Any]] = {}


def family(name, **good):
  """A public function with good arguments, some of which may be replaced."""

  def call(**replaced):
    return PUBLIC[name](**(good | replaced))

  call.__name__ = name
  GOOD[name] = call
  return call


def traced(function, *args):
  """Runs what is only traced; nothing is compiled."""
  return jax.eval_shape(function, *args)


def estimate(estimator, batch, params=None, inner=(), **state):
  """Traces an estimator's init and one estimate."""
  params = X if params is None else params

  def run():
    start = estimator.init(params, *inner)
    start = start._replace(**state) if state else start
    return estimator.estimate(params, start, batch)

  return traced(run)


def update(tx, updates=None, params=None, **extras):
  """Traces an optimizer's init and one update."""
  params = X if params is None else params
  updates = X if updates is None else updates
  tx = optax.with_extra_args_support(tx)
  return traced(lambda: tx.update(updates, tx.init(params), params, **extras))


def zero(tree):
  return all(bool(np.all(np.asarray(x) == 0)) for x in jax.tree.leaves(tree))


def same(a, b):
  return all(
    bool(np.array_equal(x, y))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


X = np.ones(2, np.float32)
KEY = jax.random.key(0)
ROWS = np.ones((4, 2), np.float32)
BLOCKS = np.arange(2, dtype=np.int32)
DATA = np.ones((2, 2), np.float32)
TABLE_OF_4 = np.ones((4, 2), np.float32)
INDEFINITE = np.diag([1.0, -2.0]).astype(np.float32)


def loss(x, batch):
  return jnp.sum((batch @ x - 1.0) ** 2)


def losses(x, batch):
  return (batch @ x - 1.0) ** 2


def identity(row):
  text = f'{row.name}: {row.wrong}'
  # Addresses differ between the processes of a parallel run.
  return re.sub(r' at 0x[0-9a-f]+', '', text)


def check(row):
  """Makes the call of a row: its error, or a safe state."""
  if row.error is None:
    assert row.call()
    return
  with pytest.raises(row.error) as caught:
    row.call()
  assert re.search(row.match, str(caught.value), re.DOTALL)


def check_docstrings(rows):
  """Docstrings name every promised error."""
  for row in rows:
    public = PUBLIC[row.name]
    if inspect.isclass(public):  # Its users' docstrings name the errors.
      continue
    raises = inspect.getdoc(public).partition('Raises:')[2]
    if row.error and row.error is not Exception:
      kinds = row.error if isinstance(row.error, tuple) else (row.error,)
      assert any(kind.__name__ in raises for kind in kinds), row


def upper(x, y, batch):
  return jnp.sum(x**2) + jnp.sum((y - batch) ** 2)


def lower(x, y, batch):
  return jnp.sum((y - x - batch) ** 2)
