"""Values outside the declared domains of arguments, for every public function.

A function says its domains once, by `checks.domains`; what follows from them
(ends of intervals, NaN, words, arrays of words, tracers) is tried here, on the
good arguments that the wings' tables of bad inputs name.
"""

import inspect
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

import optlab
from optlab import checks
from tests import inputs
from tests import public_test  # Names all good arguments.
from tests.public import PUBLIC

DECLARED = {
  name: function.domains
  for name, function in PUBLIC.items()
  if inspect.isfunction(function) and hasattr(function, 'domains')
}
SCHEDULE = optax.constant_schedule(0.1)
SGD = optax.sgd(0.1)
ESTIMATOR = optlab.value_and_grad(inputs.loss)


class Case(NamedTuple):
  """A value outside a domain, and the error it must bring."""

  function: str
  argument: str
  value: Any
  error: type[Exception]
  match: str


def outside(domain):
  """Numbers outside an interval: beyond its ends, open ends, NaN."""
  yield np.nan
  for end, is_open, step in (
    (domain.low, domain.low_open, -1.0),
    (domain.high, domain.high_open, 1.0),
  ):
    if is_open:
      yield end
    if np.isfinite(end):
      yield end + step


def cases(function, argument, domain):
  """The cases of one argument."""
  words = lambda value, error, match: Case(
    function,
    argument,
    value,
    error,
    rf'\b{argument}(\[\d\])? {match}.*got {re.escape(repr(value))}',
  )
  none = () if domain.optional else (None,)
  if isinstance(domain, checks.Real):
    for value in outside(domain):
      yield words(value, ValueError, 'must be in')
    other = (True,) if domain.schedule else (SCHEDULE,)
    for value in ('0.1', 1j, [0.1], *other, *none):
      yield words(value, TypeError, 'must be a real number')
  elif isinstance(domain, checks.Integer):
    for value in (domain.minimum - 1, domain.minimum - 9):
      yield words(value, ValueError, 'must be at least')
    for value in ('2', 2.0, 2.5, np.nan, True, *none):
      yield words(value, TypeError, 'must be an integer')
  elif isinstance(domain, checks.Dtype):
    for value in ('narrow', 16, np.int8, np.complex64, True, *none):
      yield words(value, TypeError, 'must be a real floating dtype')
  elif isinstance(domain, checks.Function):
    for value in (1.0, 'f', *none):
      yield words(
        value, TypeError, f'must be a function {re.escape(domain.expected)}'
      )
  elif isinstance(domain, checks.Pair):
    other_pair = SGD if 'estimate' in domain.fields else ESTIMATOR
    for value in (0.1, lambda x: x, optax.sgd, other_pair, *none):
      yield Case(
        function,
        argument,
        value,
        TypeError,
        rf'\b{argument} must be {re.escape(domain.expected)}.*'
        rf'got {type(value).__name__}',
      )


CASES = [
  case
  for name, domains in DECLARED.items()
  for argument, domain in domains.items()
  for case in cases(name, argument, domain)
]


def identity(case):
  value = re.sub(r' at 0x[0-9a-f]+', '', repr(case.value))
  return f'{case.function}: {case.argument}={value}'


@pytest.mark.parametrize('case', CASES, ids=identity)
def test_a_value_outside_its_domain(case):
  with pytest.raises(case.error) as caught:
    inputs.GOOD[case.function](**{case.argument: case.value})
  assert re.search(case.match, str(caught.value), re.DOTALL)
  raises = inspect.getdoc(PUBLIC[case.function]).partition('Raises:')[2]
  assert case.error.__name__ in raises


def arguments(traced):
  for name, domains in DECLARED.items():
    for argument, domain in domains.items():
      if isinstance(domain, (checks.Real, checks.Integer)):
        real = isinstance(domain, checks.Real)
        if traced == (real or domain.traced):
          yield name, argument


def under_jit(name, argument, value):
  call = inputs.GOOD[name]
  jax.eval_shape(lambda value: (call(**{argument: value}), 0)[1], value)


@pytest.mark.parametrize('name, argument', list(arguments(traced=True)))
def test_a_tracer_passes(name, argument):
  domain = DECLARED[name][argument]
  under_jit(name, argument, 0.5 if isinstance(domain, checks.Real) else 2)


@pytest.mark.parametrize('name, argument', list(arguments(traced=False)))
def test_a_tracer_gives_no_shape(name, argument):
  with pytest.raises(
    TypeError, match=rf'{argument} must be an integer.*pass a Python integer'
  ):
    under_jit(name, argument, 2)


def test_defaults_and_names_fit():
  assert public_test.TABLES
  for name, domains in DECLARED.items():
    parameters = inspect.signature(PUBLIC[name]).parameters
    assert set(domains) <= set(parameters), name
    for argument, domain in domains.items():
      if parameters[argument].default is not inspect.Parameter.empty:
        domain.check(argument, parameters[argument].default)
