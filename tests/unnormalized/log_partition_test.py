"""log Z against closed forms, and figures that are refused."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optlab

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'meco' / 'theory.json'


def quadratic(x):
  return -0.5 * jnp.sum(x**2, -1)


def isotropic(size, variance, mean=0.0):
  return optlab.unnormalized.gaussian(
    jnp.full(size, mean), variance * jnp.eye(size)
  )


@jax.jit
def estimate(noise, key):
  return optlab.log_partition(quadratic, noise, key)


@pytest.mark.parametrize('size', [1, 2])
def test_importance_sampling_is_right_within_its_error_bar(size):
  truth = 0.5 * size * math.log(2 * math.pi)
  results = jax.vmap(lambda key: estimate(isotropic(size, 2.0), key))(
    jax.random.split(jax.random.key(0), 20)
  )
  score = (results.value - truth) / results.standard_error
  # Chi-square with 20 degrees of freedom: 6 and 42 are past 0.1 %.
  assert 6 < np.sum(score**2) < 42
  assert np.all(results.ok)
  assert np.all(results.rejected == 0)


def test_effective_sample_size_follows_its_law():
  cases = json.loads(GOLDEN.read_text())['ess_scale_mismatch']
  for case in cases:
    if case['d'] == 2:
      # The model is wider by 1 / s2 than the noise is, or the reverse.
      result = estimate(isotropic(2, case['s2']), jax.random.key(0))
      np.testing.assert_allclose(result.ess / 1e5, case['ess_frac'], rtol=0.02)


def test_what_is_not_worth_printing_is_nan():
  result = estimate(isotropic(2, 1.0, mean=5.0), jax.random.key(0))
  assert not result.ok
  assert np.isnan(result.value)
  assert result.ess < 100 or result.largest_share > 0.1


def test_a_hole_in_the_support_is_seen_by_a_second_noise():
  case = json.loads(GOLDEN.read_text())['support_hole']

  class Uniform:
    def sample(self, key, num):
      return jax.random.uniform(key, (num, 1), minval=-1.0)

    def log_prob(self, rows):
      return jnp.full(rows.shape[0], -math.log(2))

  narrow = optlab.log_partition(quadratic, Uniform(), jax.random.key(0))
  np.testing.assert_allclose(
    narrow.value, case['log_z_from_q'], atol=4 * narrow.standard_error
  )
  assert narrow.ok  # The trap: nothing looks wrong.
  wide = estimate(isotropic(1, 4.0), jax.random.key(1))
  np.testing.assert_allclose(
    wide.value, case['log_z_true'], atol=4 * wide.standard_error
  )
  assert not optlab.unnormalized.agree(narrow, wide)
  assert optlab.unnormalized.agree(
    wide, estimate(isotropic(1, 9.0), jax.random.key(2))
  )


def test_bad_rows_are_counted_and_left_out():
  def spoiled(x):
    return jnp.where(x[:, 0] > 3, jnp.nan, quadratic(x))

  result = optlab.log_partition(
    spoiled, isotropic(1, 4.0), jax.random.key(0), 20_000
  )
  assert 0 < result.rejected < 20_000
  assert np.isfinite(result.value)
  nothing = optlab.log_partition(
    lambda x: jnp.full(x.shape[0], -jnp.inf),
    isotropic(1, 4.0),
    jax.random.key(0),
    10_000,
  )
  assert not nothing.ok
  assert np.isnan(nothing.value)


@pytest.mark.usefixtures('x64')
def test_grid_is_exact():
  for size in (1, 2):
    corner = np.full(size, 8.0)
    result = optlab.unnormalized.grid_log_partition(
      quadratic, -corner, corner, 64
    )
    np.testing.assert_allclose(
      result.value, 0.5 * size * math.log(2 * math.pi), rtol=1e-12
    )
    assert result.ok


def test_grid_refuses_a_small_box_and_a_coarse_spacing():
  small = optlab.unnormalized.grid_log_partition(
    quadratic, [-2.0, -2.0], [2.0, 2.0], 64
  )
  assert not small.ok
  assert small.box_error > 1e-2
  assert np.isnan(small.value)
  coarse = optlab.unnormalized.grid_log_partition(
    lambda x: 400 * quadratic(x), [-6.0, -6.0], [6.0, 6.0], 64
  )
  assert not coarse.ok
  assert coarse.spacing_error > 1e-2


def test_bad_arguments():
  noise, key = isotropic(1, 1.0), jax.random.key(0)
  with pytest.raises(ValueError, match='multiple of chunk'):
    optlab.log_partition(quadratic, noise, key, 1500, chunk=1000)
  with pytest.raises(ValueError, match='num must be at least'):
    optlab.log_partition(quadratic, noise, key, 10, chunk=1000)
  with pytest.raises(ValueError, match='one number a row'):
    optlab.log_partition(lambda x: x, noise, key)
  with pytest.raises(ValueError, match='one or two entries'):
    optlab.unnormalized.grid_log_partition(quadratic, np.zeros(3), np.ones(3))
  with pytest.raises(ValueError, match='low must be below high'):
    optlab.unnormalized.grid_log_partition(quadratic, [1.0], [0.0])
