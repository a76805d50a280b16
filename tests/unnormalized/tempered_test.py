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


@pytest.mark.parametrize(
  ('size', 'seeds'),
  [(8, 10), (32, 3), pytest.param(32, 10, marks=pytest.mark.slow)],
)
def test_two_modes_in_many_dimensions(size, seeds):
  pytest.importorskip('blackjax')
  noise = optlab.unnormalized.gaussian(jnp.zeros(size), 9 * jnp.eye(size))
  method = optlab.unnormalized.tempered_smc()
  truth = size * HALF_LOG_2PI + math.log(2)

  @jax.jit
  def score(key):
    runs = []

    def watched(*args):
      found = method(*args)
      runs.append(found[4].stages)
      return found

    result = optlab.log_partition(two_modes, noise, key, method=watched)
    return result, runs[0]

  inside = 0
  for seed in range(seeds):
    result, stages = score(jax.random.key(seed))
    assert result.ok
    inside += abs(result.value - truth) < 2 * result.standard_error
    assert jnp.sum(stages) * 256 * 10 <= 250_000
  assert inside >= 0.9 * seeds
  if size == 32:
    plain = jax.jit(lambda key: optlab.log_partition(two_modes, noise, key))
    assert not plain(jax.random.key(0)).ok


# Tempering believes what the noise says of its own density.
CASES = set(log_partition_test.REFUSED) - {'a hole of a third, scored wrong'}
METHOD = optlab.unnormalized.tempered_smc()


@pytest.mark.parametrize('case', sorted(CASES))
def test_right_or_refused(case):
  pytest.importorskip('blackjax')
  result = log_partition_test.refused(case, jax.random.key(0), METHOD)
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


def test_bits_in_floats_are_not_ok():
  pytest.importorskip('blackjax')
  result = optlab.log_partition(
    lambda rows: jnp.sum(rows, -1),
    optlab.unnormalized.bernoulli(jnp.full(2, 0.5)),
    jax.random.key(0),
    method=optlab.unnormalized.tempered_smc(32, repeats=2, num_steps=2),
  )
  assert not result.ok
