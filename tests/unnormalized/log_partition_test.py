"""log Z against closed forms, and figures that are refused."""

import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import stats
import numpy as np
import pytest

import optlab
from optlab.unnormalized import _pareto

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
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


@pytest.mark.parametrize('size', [1, pytest.param(2, marks=pytest.mark.slow)])
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


class Uniform(NamedTuple):
  """Rows in [-width, width]; scored alike everywhere if the user forgot."""

  width: Any = 1.0
  forgot: Any = False
  constant: Any = 0.0

  def sample(self, key, num):
    return jax.random.uniform(key, (num, 1), minval=-1.0) * self.width

  def log_prob(self, rows):
    inside = (jnp.abs(rows[:, 0]) <= self.width) | self.forgot
    log_q = self.constant - jnp.log(2 * self.width)
    return jnp.where(inside, log_q, -jnp.inf)


class Cauchy(NamedTuple):
  def sample(self, key, num):
    return jax.random.cauchy(key, (num, 1))

  def log_prob(self, rows):
    return -jnp.log1p(rows[:, 0] ** 2) - math.log(math.pi)


def parabola(x):
  """log(1 - x^2), NaN outside."""
  return jnp.log(1 - x[:, 0] ** 2)


def cut_parabola(x):
  inside = jnp.abs(x[:, 0]) < 1
  return jnp.where(inside, parabola(jnp.where(inside[:, None], x, 0)), -jnp.inf)


def two_modes(x):
  return jnp.logaddexp(quadratic(x - 2.0), quadratic(x + 2.0))


REFUSED = {
  'NaN outside the support': (parabola, isotropic(1, 1.0)),
  'infinite on a half line': (
    lambda x: jnp.where(x[:, 0] > 1, jnp.inf, quadratic(x)),
    isotropic(1, 1.0),
  ),
  'infinite where no draw has been': (
    lambda x: jnp.where(x[:, 0] > 1, jnp.inf, quadratic(x)),
    Uniform(),
  ),
  'heavy tail on a Gaussian': (
    lambda x: -jnp.log1p(x[:, 0] ** 2),
    isotropic(1, 1.0),
  ),
  'heavy tail on a wide Gaussian': (
    lambda x: -jnp.log1p(x[:, 0] ** 2),
    isotropic(1, 25.0),
  ),
  'improper on a Gaussian': (lambda x: 0 * x[:, 0], isotropic(1, 1.0)),
  'improper on a Cauchy': (lambda x: 0 * x[:, 0], Cauchy()),
  'improper on a box': (lambda x: 0 * x[:, 0], Uniform(3.0)),
  'improper on one side': (
    lambda x: jnp.minimum(x[:, 0], 0),
    isotropic(1, 1.0),
  ),
  'just improper': (lambda x: -jnp.log1p(jnp.abs(x[:, 0])), Cauchy()),
  'just improper on a Gaussian': (
    lambda x: -jnp.log1p(jnp.abs(x[:, 0])),
    isotropic(1, 1.0),
  ),
  # A floor that no draw meets, and hardly a kick.
  'a floor': (lambda x: jnp.maximum(quadratic(x), -12.0), isotropic(1, 4.0)),
  'a hole of a third': (quadratic, Uniform(1.0)),
  'a hole of a third, scored wrong': (quadratic, Uniform(1.0, forgot=True)),
  # Ok, and wrong by the constant: what forgot it is no density.
  'scored without a constant': (cut_parabola, Uniform(2.0, constant=0.3)),
  'a hole of three permille': (quadratic, Uniform(3.0)),
  'half of the line': (
    quadratic,
    optlab.unnormalized.mixture([1.0], Uniform(1.0)),
  ),
  'no support at all': (
    lambda x: jnp.full(x.shape[0], -jnp.inf),
    isotropic(1, 4.0),
  ),
}


class Chosen(NamedTuple):
  """One of some kinds of noise on one column: one program scores them all."""

  index: Any
  noises: Any

  def sample(self, key, num):
    draws = [noise.sample for noise in self.noises]
    return jax.lax.switch(
      self.index, [lambda draw=draw: draw(key, num) for draw in draws]
    )

  def log_prob(self, rows):
    return jax.lax.switch(
      self.index, [noise.log_prob for noise in self.noises], rows
    )


KINDS = (
  isotropic(1, 1.0),
  Uniform(),
  Cauchy(),
  optlab.unnormalized.mixture([1.0], Uniform()),
)
ON_ONE = [f for f, _ in REFUSED.values()]


@functools.cache
def compiled(method):
  """``(index, noise, key) -> log Z`` of the models on one column."""

  def score(index, noise, key):
    log_density = lambda rows: jax.lax.switch(index, ON_ONE, rows)
    return optlab.log_partition(log_density, noise, key, method=method)

  return jax.jit(score)


def refused(case, key, method=None):
  """Scores a case; those of one column are one program."""
  log_density, noise = REFUSED[case]
  index = [type(other) for other in KINDS].index(type(noise))
  noises = (*KINDS[:index], noise, *KINDS[index + 1 :])
  noises = jax.tree.map(jnp.asarray, noises)
  return compiled(method)(ON_ONE.index(log_density), Chosen(index, noises), key)


@pytest.mark.parametrize('case', REFUSED)
def test_refused(case):
  for seed in range(3):
    result = refused(case, jax.random.key(seed))
    assert not result.ok
    assert np.isnan(result.value)


score = jax.jit(optlab.log_partition, static_argnums=(0, 3))


def improper_in_one_direction(x):
  return -0.5 * x[:, 0] ** 2


def test_a_column_that_is_improper_is_refused():
  for seed in range(3):
    noise = isotropic(2, 1.0)
    assert not score(improper_in_one_direction, noise, jax.random.key(seed)).ok


def test_outside_the_support_counts_with_the_whole_divisor():
  for noise in (isotropic(1, 1.0), Uniform(2.0)):
    result = score(cut_parabola, noise, jax.random.key(0))
    assert result.ok
    assert result.rejected == 0
    error = abs(result.value - math.log(4 / 3))
    assert error < 3 * result.standard_error
  # Where neither has density, the model may be NaN.
  result = score(parabola, Uniform(1.0), jax.random.key(0))
  assert result.ok
  assert abs(result.value - math.log(4 / 3)) < 3 * result.standard_error


def test_the_walk_sees_what_the_noise_missed():
  golden = json.loads(GOLDEN.read_text())['support_hole']
  result = score(quadratic, Uniform(), jax.random.key(0))
  # Alone, importance sampling finds nothing wrong.
  assert result.rejected == 0
  assert result.ess > 90_000
  assert not result.ok
  miss = abs(result.second - golden['log_z_true'])
  assert miss < 4 * result.second_error
  wide = estimate(isotropic(1, 4.0), jax.random.key(1))
  np.testing.assert_allclose(
    wide.value, golden['log_z_true'], atol=4 * wide.standard_error
  )
  assert not optlab.unnormalized.agree(result, wide)
  assert optlab.unnormalized.agree(
    wide, estimate(isotropic(1, 9.0), jax.random.key(2))
  )


def test_discrete_rows_walk_too():
  # All 16 rows of four bits, against noise that never sets the last one.
  class Bits(NamedTuple):
    rates: Any

    def sample(self, key, num):
      uniform = jax.random.uniform(key, (num, 4))
      return (uniform < self.rates).astype(jnp.int32)

    def log_prob(self, rows):
      rates = jnp.where(rows == 1, self.rates, 1 - self.rates)
      return jnp.sum(jnp.log(rates), -1)

  def log_density(rows):
    return rows @ jnp.asarray([0.5, -1.0, 0.3, 0.7]) + rows[:, 0] * rows[:, 3]

  every = jnp.asarray([[i >> j & 1 for j in range(4)] for i in range(16)])
  truth = jax.nn.logsumexp(log_density(every))
  for rates, ok in (([0.5] * 4, True), ([0.5, 0.5, 0.5, 1e-6], False)):
    result = score(
      log_density, Bits(np.float32(rates)), jax.random.key(0), 20_000
    )
    assert result.ok == ok
    if ok:
      assert abs(result.value - truth) < 3 * result.standard_error


@pytest.mark.usefixtures('x64')
def test_k_hat_is_the_shape_of_the_tail():
  rng = np.random.default_rng(0)
  k_hat = jax.jit(_pareto.k_hat)
  for k in (0.3, 0.5, 0.7, 1.0, 2.0):
    weights = rng.pareto(1 / k, size=100_000) + 1
    found = k_hat(np.log(weights))
    assert abs(found - k) < 0.1
  assert k_hat(np.zeros(1000)) == -np.inf
  assert k_hat(np.zeros(10)) == np.inf
  assert k_hat(np.log(rng.uniform(size=10_000))) < 0


def cauchy(rows):
  return -jnp.sum(jnp.log1p(rows**2), -1)


def test_a_thin_tail_that_no_draw_has_reached_is_in_the_error():
  """Half of such errors held the truth: no weight told of the tail."""
  noise = isotropic(2, 49.0)
  result = jax.jit(
    lambda key: optlab.log_partition(cauchy, noise, key, 50_000)
  )(jax.random.key(0))
  gap = 2 * math.log(math.pi) - result.second
  assert abs(gap) < 4 * result.standard_error
  gap = 2 * math.log(math.pi) - result.value
  assert not result.ok or gap < 1.96 * result.standard_error
  assert result.standard_error >= result.second_error


def test_a_constant_that_takes_the_digits_is_in_the_error():
  def found(constant):
    return optlab.log_partition(
      lambda x: quadratic(x) + constant,
      isotropic(1, 2.0),
      jax.random.key(0),
      20_000,
    )

  found = jax.jit(found)
  assert found(0.0).standard_error < 0.01
  for constant in (1e6, -1e6):
    result = found(constant)
    assert result.ok
    gap = np.float64(result.value) - constant - HALF_LOG_2PI
    assert abs(gap) < 2 * result.standard_error < 0.5
  assert not found(3e7).ok  # Of whole numbers two by two.
  flat = grid(lambda x: quadratic(x) + 1e6, [-8.0], [8.0], 64)
  assert not flat.ok


def test_half_precision_is_in_the_error():
  def found(constant):
    return optlab.log_partition(
      lambda x: (quadratic(x) + constant).astype(jnp.bfloat16),
      isotropic(2, 1.5), jax.random.key(0), 10_000, walk_steps=5,
    )  # fmt: skip

  found = jax.jit(found)
  result = found(-40.0)
  gap = abs(result.value + 40 - 2 * HALF_LOG_2PI)
  assert result.ok
  assert gap < 2 * result.standard_error < 1
  assert not found(300.0).ok  # Two by two, as all of them are.


def apart(weight, distance):
  """Two modes along the first axis, the second with so much of the mass."""

  def log_density(x):
    moved = x.at[:, 0].add(-distance)
    return jnp.logaddexp(
      jnp.log(1 - weight) + quadratic(x), jnp.log(weight) + quadratic(moved)
    )

  return log_density


def scores_apart(size):
  """``(weight, distance, variance) -> log Z less its truth``, ten times."""

  def score(weight, distance, variance, key):
    found = optlab.log_partition(
      apart(weight, distance), isotropic(size, variance), key, 10_000,
      walk_steps=10,
    )  # fmt: skip
    return found._replace(value=found.value - size * HALF_LOG_2PI)

  keys = jax.random.split(jax.random.key(0), 10)
  return jax.jit(lambda *case: jax.lax.map(lambda key: score(*case, key), keys))


@pytest.mark.parametrize(
  ('size', 'distances'),
  [(1, (10.0, 14.0)), pytest.param(3, (10.0,), marks=pytest.mark.slow)],
)
def test_kicks_tell_a_mode_that_no_draw_met(size, distances):
  """Of 3 %: the interval held the truth in 37 runs of 100, and in none."""
  scores = scores_apart(size)
  for distance in distances:
    found = scores(0.03, distance, 4.0)
    # The weights had not told.
    assert np.all(found.k_hat < 0.5)
    assert np.all(found.ess > 1000)
    assert np.sum(found.ok) >= 3
    gap = np.abs(found.value)
    assert np.sum(found.ok & (gap > 1.96 * found.standard_error)) == 0
    assert np.all(gap[found.ok] > 0.01)  # What the error makes up for.
  # Of a fifth it is more than an error.
  assert not np.any(scores(0.2, distances[-1], 4.0).ok)


class Shifted(NamedTuple):
  """A Gaussian that is off by a constant, or repeats its draws."""

  size: int
  constant: Any = 0.0
  few: Any = False

  @property
  def _noise(self):
    return isotropic(self.size, 1.05)

  def sample(self, key, num):
    index = jnp.where(self.few, jnp.arange(num) // 2, jnp.arange(num))
    return self._noise.sample(key, num)[index]

  def log_prob(self, rows):
    return self._noise.log_prob(rows) + self.constant


@functools.cache
def shifted(size):
  def score(constant, few):
    noise = Shifted(size, constant, few)
    return optlab.log_partition(
      quadratic, noise, jax.random.key(0), 10_000, walk_steps=10
    )

  return jax.jit(score)


def test_noise_whose_density_is_off_is_refused_in_many_columns():
  """The model's rows around themselves, or as one Gaussian, are noise too."""
  score = shifted(128)
  right = score(0.0, False)
  assert right.ok
  gap = abs(right.value - 128 * HALF_LOG_2PI)
  assert gap < 3 * right.standard_error
  # Weights of the last would be zero, were they not scaled.
  for constant in (0.3, 30.0, -0.3, -30.0, -150.0):
    assert not score(constant, False).ok


def test_noise_that_repeats_its_draws_is_refused():
  """Half of them are all there are, and the error is not of so many."""
  assert not shifted(128)(0.0, True).ok
  noise = isotropic(1, 2.0)
  same = noise.sample(jax.random.key(0), 1000)

  class Ignores(NamedTuple):
    rows: Any

    def sample(self, key, num):
      del key
      return jnp.resize(self.rows, (num, 1))

    def log_prob(self, rows):
      return noise.log_prob(rows)

  assert not score(quadratic, Ignores(same), jax.random.key(0), 10_000).ok


def test_a_model_that_normalizes_by_its_batch_is_refused():
  def standardized(x):
    return quadratic(x) + 0.3 * jnp.tanh((x / jnp.std(x))[:, 0] ** 2)

  result = score(standardized, isotropic(1, 2.0), jax.random.key(0), 10_000)
  assert not result.ok
  with pytest.raises(TypeError, match='must return real numbers, got dtype'):
    optlab.log_partition(
      lambda x: quadratic(x) + 0j, isotropic(1, 2.0), jax.random.key(0)
    )


PAIRS = {
  'cauchy on a Gaussian': (
    REFUSED['heavy tail on a Gaussian'],
    math.log(math.pi),
  ),
  't, 3 degrees, on a Gaussian': (
    (lambda x: stats.t.logpdf(x[:, 0], 3), isotropic(1, 1.0)),
    0.0,
  ),
  't, 5 degrees, on a Gaussian': (
    (lambda x: stats.t.logpdf(x[:, 0], 5), isotropic(1, 1.0)),
    0.0,
  ),
  'Laplace on a Gaussian': (
    (lambda x: -jnp.abs(x[:, 0]), isotropic(1, 1.0)),
    math.log(2),
  ),
  'Gaussian on one of a third': ((quadratic, isotropic(1, 0.3)), HALF_LOG_2PI),
  'Gaussian on one of a half': ((quadratic, isotropic(1, 0.5)), HALF_LOG_2PI),
  'Gaussian on twice': ((quadratic, isotropic(1, 2.0)), HALF_LOG_2PI),
  'Gaussian on a Cauchy': ((quadratic, Cauchy()), HALF_LOG_2PI),
  'Gaussian two away': ((quadratic, isotropic(1, 1.0, 2.0)), HALF_LOG_2PI),
  'five columns on a half': ((quadratic, isotropic(5, 0.5)), 5 * HALF_LOG_2PI),
  'two modes on a wide one': (
    (two_modes, isotropic(2, 9.0)),
    2 * HALF_LOG_2PI + math.log(2),
  ),
  'two modes, four columns': (
    (two_modes, isotropic(4, 9.0)),
    4 * HALF_LOG_2PI + math.log(2),
  ),
  'two modes on one': (
    (two_modes, isotropic(1, 1.0)),
    HALF_LOG_2PI + math.log(2),
  ),
  'Cauchy on a wide Gaussian': (
    (cauchy, isotropic(1, 100.0)),
    math.log(math.pi),
  ),
  'two Cauchy columns on a wide one': (
    (cauchy, isotropic(2, 49.0)),
    2 * math.log(math.pi),
  ),
  't, 2 degrees, on a wide one': (
    (lambda x: stats.t.logpdf(x[:, 0], 2), isotropic(1, 25.0)),
    0.0,
  ),
  'a hole': ((quadratic, Uniform(3.0)), HALF_LOG_2PI),
  'a parabola': ((cut_parabola, isotropic(1, 1.0)), math.log(4 / 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize('pair', PAIRS)
def test_coverage_wherever_it_says_ok(pair):
  (log_density, noise), truth = PAIRS[pair]
  score = jax.jit(lambda key: optlab.log_partition(log_density, noise, key))
  results = [score(key) for key in jax.random.split(jax.random.key(1), 300)]
  results = jax.tree.map(lambda *leaves: np.stack(leaves), *results)
  misses = results.ok & (
    abs(results.value - truth) > 1.96 * results.standard_error
  )
  assert misses.sum() <= 0.07 * results.ok.sum()


def grid(*args):
  return jax.jit(lambda: optlab.unnormalized.grid_log_partition(*args))()


@pytest.mark.usefixtures('x64')
def test_grid_is_exact():
  for size in (1, 2):
    corner = np.full(size, 8.0)
    result = grid(quadratic, -corner, corner, 64)
    np.testing.assert_allclose(
      result.value, 0.5 * size * math.log(2 * math.pi), rtol=1e-12
    )
    assert result.ok


def test_grid_refuses_a_small_box_and_a_coarse_spacing():
  small = grid(quadratic, [-2.0, -2.0], [2.0, 2.0], 64)
  assert not small.ok
  assert small.box_error > 1e-2
  assert np.isnan(small.value)
  coarse = grid(lambda x: 400 * quadratic(x), [-6.0, -6.0], [6.0, 6.0], 64)
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


def test_a_key_used_twice_is_no_agreement():
  noise = isotropic(1, 2.0)
  first, second = (
    score(quadratic, noise, jax.random.key(i), 10_000) for i in (0, 1)
  )
  assert optlab.unnormalized.agree(first, second)
  assert not optlab.unnormalized.agree(first, first)


def test_keys_and_draws_that_are_none_are_named():
  noise = isotropic(1, 2.0)

  class Half(NamedTuple):
    def sample(self, key, num):
      return noise.sample(key, num // 2)

    def log_prob(self, rows):
      return noise.log_prob(rows)

  with pytest.raises(TypeError, match='key must be a PRNG key'):
    optlab.log_partition(quadratic, noise, 0)
  with pytest.raises(ValueError, match='must draw 10000 rows, got shapes'):
    optlab.log_partition(quadratic, Half(), jax.random.key(0))
  with pytest.raises(ValueError, match='must draw 4 rows, got shapes'):
    optlab.noise_batch(Half(), jax.random.key(0), jnp.ones((4, 1)), 4)
