"""log Z by tempering: in many dimensions, and where it must refuse."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optlab
from tests.unnormalized import log_partition_test

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def two_modes(x):
  return jnp.logaddexp(
    -0.5 * jnp.sum((x - 1.5) ** 2, -1), -0.5 * jnp.sum((x + 1.5) ** 2, -1)
  )


@pytest.mark.parametrize('size', [8, 32])
def test_two_modes_in_many_dimensions(size):
  pytest.importorskip('blackjax')
  noise = optlab.unnormalized.gaussian(jnp.zeros(size), 9 * jnp.eye(size))
  method = optlab.unnormalized.tempered_smc()
  truth = size * HALF_LOG_2PI + math.log(2)

  @jax.jit
  def score(key):
    result = optlab.log_partition(two_modes, noise, key, method=method)
    return result, method(two_modes, noise, key)[4].stages

  inside = 0
  for seed in range(10):
    result, stages = score(jax.random.key(seed))
    assert result.ok
    inside += abs(result.value - truth) < 2 * result.standard_error
    assert jnp.sum(stages) * 256 * 10 <= 250_000
  assert inside >= 9
  if size == 32:
    assert not optlab.log_partition(two_modes, noise, jax.random.key(0)).ok


# Tempering believes what the noise says of its own density.
CASES = set(log_partition_test.REFUSED) - {'a hole of a third, scored wrong'}


@pytest.mark.parametrize('case', sorted(CASES))
def test_right_or_refused(case):
  pytest.importorskip('blackjax')
  log_density, noise = log_partition_test.REFUSED[case]
  method = optlab.unnormalized.tempered_smc()
  result = jax.jit(
    lambda key: optlab.log_partition(log_density, noise, key, method=method)
  )(jax.random.key(0))
  truth = {
    'heavy tail on a Gaussian': math.log(math.pi),
    'heavy tail on a wide Gaussian': math.log(math.pi),
  }.get(case, np.nan)
  close = abs(result.value - truth) < 3 * result.standard_error
  assert not result.ok or close
  assert result.ok or np.isnan(result.value)


def test_an_error_names_what_is_missing(monkeypatch):
  real = importlib.import_module

  def without(name, *args):
    if name.partition('.')[0] == 'blackjax':
      raise ImportError(name)
    return real(name, *args)

  monkeypatch.setattr(importlib, 'import_module', without)
  with pytest.raises(
    ImportError, match='blackjax, which is not installed: pip'
  ):
    optlab.log_partition(
      two_modes,
      optlab.unnormalized.gaussian(jnp.zeros(2), jnp.eye(2)),
      jax.random.key(0),
      method=optlab.unnormalized.tempered_smc(),
    )


def test_discrete_rows_are_refused_by_name():
  pytest.importorskip('blackjax')
  noise = optlab.unnormalized.categorical(jnp.ones((2, 3)))
  with pytest.raises(TypeError, match='floating rows, got dtype int32'):
    optlab.log_partition(
      lambda rows: jnp.sum(rows, -1) * 1.0,
      noise,
      jax.random.key(0),
      method=optlab.unnormalized.tempered_smc(),
    )
