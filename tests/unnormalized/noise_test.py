"""Noise distributions: normalized, drawn as they are scored, and adaptive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optlab
from optlab.unnormalized import _noise as noise_lib

COVARIANCE = np.array([[1.0, 0.4], [0.4, 0.5]], np.float32)
MEAN = np.array([0.5, -0.25], np.float32)


def single():
  return optlab.unnormalized.gaussian(MEAN, COVARIANCE)


def several():
  means = np.stack([MEAN, -2 * MEAN, MEAN + 1])
  covariances = np.stack([COVARIANCE, 0.3 * COVARIANCE, 0.1 * np.eye(2)])
  return optlab.unnormalized.gaussian_mixture(
    np.array([0.5, 0.3, 0.2], np.float32), means, covariances
  )


def bent_rows(num=2000):
  x = np.random.default_rng(0).normal(size=(num, 2)).astype(np.float32)
  return jnp.asarray(np.stack([x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1]], 1))


def flow():
  start = optlab.unnormalized.init_flow(jax.random.key(0), bent_rows(), 4, 16)
  fitted, _ = optlab.unnormalized.fit_flow(
    start, jax.random.key(1), bent_rows(), 300
  )
  return fitted


MAKERS = {
  'gaussian': single,
  'gaussian_mixture': several,
  'defensive': lambda: optlab.unnormalized.defensive(
    several(), optlab.unnormalized.gaussian(jnp.zeros(2), 9 * jnp.eye(2)), 0.2
  ),
  'mixture': lambda: optlab.unnormalized.mixture(
    np.array([1.0, 2.0]), single(), several()
  ),
  'flow': flow,
}


@pytest.mark.parametrize('name', MAKERS)
def test_density_integrates_to_one_and_draws_follow_it(name):
  noise = MAKERS[name]()
  total = optlab.unnormalized.grid_log_partition(
    noise.log_prob, [-16.0, -16.0], [16.0, 16.0], 384, change_tol=2e-3
  )
  np.testing.assert_allclose(total.value, 0.0, atol=2e-3)
  # Draws weighed by any other density over theirs average to one: a test of
  # both functions together, at a standard error of a few thousandths.
  rows = jax.jit(noise.sample, static_argnums=1)(jax.random.key(0), 40_000)
  assert rows.shape == (40_000, 2)

  @jax.jit
  def log_weights(rows):
    other = optlab.fit_gaussian(rows, inflate=0.3)
    return other.log_prob(rows) - noise.log_prob(rows)

  weights = np.exp(log_weights(rows))
  error = np.std(weights) / np.sqrt(len(weights))
  assert error < 0.05
  np.testing.assert_allclose(np.mean(weights), 1.0, atol=4.5 * error)


def test_moments_of_draws():
  rows = single().sample(jax.random.key(0), 100_000)
  np.testing.assert_allclose(np.mean(rows, 0), MEAN, atol=0.02)
  np.testing.assert_allclose(np.cov(np.asarray(rows).T), COVARIANCE, atol=0.02)


@pytest.mark.parametrize('make', [single, several])
def test_lattice_draws_are_unbiased_and_vary_less(make):
  noise = make()

  def means(sample):
    keys = jax.random.split(jax.random.key(0), 400)
    square = lambda key: jnp.mean(sample(key, 256) ** 2, 0)
    return np.asarray(jax.jit(jax.vmap(square))(keys))

  plain, even = means(noise.sample), means(noise.sample_lattice)
  error = np.std(plain, 0) / 20
  np.testing.assert_allclose(even.mean(0), plain.mean(0), atol=5 * error.max())
  assert np.all(np.std(even, 0) < 0.5 * np.std(plain, 0))


def test_draws_of_images_take_no_matrix_a_row():
  """10,000 of them were once 25 GB of factors."""
  size, num = 784, 10_000
  noise = optlab.unnormalized.GaussianMixture(
    *(
      jax.ShapeDtypeStruct(shape, jnp.float32)
      for shape in ((3,), (3, size), (3, size, size), (3, size, size))
    )
  )
  for draw in (lambda n, k: n.sample(k, num),
               lambda n, k: n.sample_lattice(k, num)):  # fmt: skip
    compiled = jax.jit(draw).lower(noise, jax.random.key(0)).compile()
    rows = 4 * num * size
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 6 * rows


def test_lattice_is_uniform_in_each_column():
  points = np.asarray(noise_lib.lattice(jax.random.key(3), 1000, 3))
  assert points.min() > 0
  assert points.max() < 1
  for column in points.T:
    gaps = np.sort(column) - (np.arange(1000) + 0.5) / 1000
    assert np.max(np.abs(gaps)) < 0.01


def test_fit_gaussian_has_the_moments_of_its_rows():
  rows = bent_rows()
  noise = optlab.fit_gaussian(rows, inflate=2.0)
  np.testing.assert_allclose(noise.mean, np.mean(rows, 0), rtol=1e-5)
  covariance = np.cov(np.asarray(rows).T, bias=True)
  np.testing.assert_allclose(
    noise.scale @ noise.scale.T, 2 * covariance, rtol=1e-4
  )


@pytest.mark.usefixtures('x64')
def test_follow_is_the_moment_update():
  rng = np.random.default_rng(0)
  rows, log_weights = rng.normal(size=(50, 2)) + 3, rng.normal(size=50)
  start = optlab.unnormalized.gaussian(
    MEAN.astype(float), COVARIANCE.astype(float)
  )
  rate = 0.3
  moved = optlab.unnormalized.follow(
    start, jnp.asarray(rows), rate, jnp.asarray(log_weights)
  )
  # The moments of the mixture of the old Gaussian and the weighted rows.
  weights = np.exp(log_weights) / np.sum(np.exp(log_weights))
  mean = (1 - rate) * MEAN + rate * weights @ rows
  second = (1 - rate) * (COVARIANCE + np.outer(MEAN, MEAN)) + rate * (
    rows.T * weights
  ) @ rows
  np.testing.assert_allclose(moved.mean, mean)
  np.testing.assert_allclose(
    moved.scale @ moved.scale.T,
    second - np.outer(mean, mean) + rate * 1e-6 * np.eye(2),
    rtol=1e-6,
  )
  np.testing.assert_allclose(moved.whiten @ moved.scale, np.eye(2), atol=1e-12)


def test_follow_ignores_bad_rows_and_holds_without_weight():
  start, rows = single(), np.asarray(single().sample(jax.random.key(0), 20))
  spoiled = rows.copy()
  spoiled[3] = np.nan
  kept = np.delete(rows, 3, 0)
  follow = jax.jit(optlab.unnormalized.follow)
  moved = follow(start, spoiled, 0.5, np.zeros(20, np.float32))
  expected = follow(start, kept, 0.5, np.zeros(19, np.float32))
  np.testing.assert_allclose(moved.mean, expected.mean, rtol=1e-5)
  held = follow(start, rows, 0.5, np.full(20, -np.inf, np.float32))
  np.testing.assert_array_equal(held.mean, start.mean)
  np.testing.assert_array_equal(held.scale, start.scale)


WIDE_EYE = np.broadcast_to(np.eye(2, dtype=np.float32), (2, 2, 2))


def two_modes(x):
  far = jnp.sum((x - 2.0) ** 2, -1), jnp.sum((x + 2.0) ** 2, -1)
  return jnp.logaddexp(-2 * far[0], -2 * far[1])


def test_a_mixture_follows_the_model_by_weighted_rows():
  start = optlab.unnormalized.gaussian_mixture(
    jnp.ones(2), jnp.asarray([[1.0, 0.0], [-0.5, -1.0]]), 4 * WIDE_EYE
  )
  wide = optlab.unnormalized.gaussian(jnp.zeros(2), 9 * jnp.eye(2))
  noise = optlab.unnormalized.defensive(start, wide)

  def ess(noise, rows):
    log_w = two_modes(rows) - noise.log_prob(rows)
    weights = jax.nn.softmax(log_w)
    return log_w, 1 / jnp.sum(weights**2) / len(rows)

  def step(noise, key):
    rows = noise.sample(key, 256)
    log_w, share = ess(noise, rows)
    return optlab.unnormalized.follow(noise, rows, 0.2, log_w), share

  moved, shares = jax.jit(
    lambda noise: jax.lax.scan(
      step, noise, jax.random.split(jax.random.key(0), 60)
    )
  )(noise)
  assert shares[0] < 0.3
  assert shares[-1] > 0.8
  first = moved.components[0]
  order = np.argsort(first.means[:, 0])
  want = [[-2.0, -2.0], [2.0, 2.0]]
  np.testing.assert_allclose(first.means[order], want, atol=0.15)
  scales = first.scales @ jnp.swapaxes(first.scales, 1, 2)
  np.testing.assert_allclose(scales, WIDE_EYE / 4, atol=0.1)
  np.testing.assert_allclose(jnp.exp(first.log_weights), 0.5, atol=0.1)
  # The wide one and the weights are what they were.
  np.testing.assert_array_equal(moved.components[1].scale, wide.scale)
  np.testing.assert_array_equal(moved.log_weights, noise.log_weights)
  # Nothing to follow, and one row that has all the weight.
  none = jnp.full(256, -jnp.inf)
  rows = noise.sample(jax.random.key(1), 256)
  held = optlab.unnormalized.follow(start, rows, 0.5, none)
  for got, want in zip(held, start, strict=True):
    np.testing.assert_array_equal(got, want)
  one = optlab.unnormalized.follow(start, rows, 0.5, none.at[0].set(0.0))
  assert np.all(jnp.linalg.svd(one.scales)[1] > 1.5)


def test_kinds_that_do_not_follow_are_named():
  follow = optlab.unnormalized.follow
  rows = bent_rows()
  flow = optlab.unnormalized.init_flow(jax.random.key(0), rows, 1, 1)
  with pytest.raises(TypeError, match='got Flow. Refit a flow by fit_flow'):
    follow(flow, rows, 0.1)
  with pytest.raises(TypeError, match='first, got float'):
    follow(1.0, rows, 0.1)


def test_a_flow_is_refitted_to_weighted_rows():
  rows = jnp.concatenate([bent_rows(), jnp.full((10, 2), jnp.nan)])
  log_w = jnp.where(rows[:, 0] > 0, 0.0, -jnp.inf)
  flow = optlab.unnormalized.init_flow(jax.random.key(0), bent_rows(), 2, 8)
  fit = jax.jit(
    lambda log_w: optlab.unnormalized.fit_flow(
      flow, jax.random.key(1), rows, 200, learning_rate=1e-2, log_weights=log_w
    )
  )
  found, losses = fit(log_w)
  assert losses[-20:].mean() < losses[:20].mean() - 0.2
  assert jnp.mean(found.sample(jax.random.key(2), 1000)[:, 0] > 0) > 0.8
  held, _ = fit(jnp.full(len(rows), -jnp.inf))
  for got, want in zip(held, flow, strict=True):
    np.testing.assert_array_equal(got, want)
  with pytest.raises(ValueError, match='log_weights must have shape'):
    fit(log_w[:3])


def test_adaptive_noise_recompiles_nothing():
  traces = []

  @jax.jit
  def step(noise, key):
    traces.append(noise)
    batch = optlab.noise_batch(noise, key, jnp.ones((8, 2)), 16)
    return optlab.unnormalized.follow(noise, batch.data, 0.1), batch.noise

  noise = single()
  for key in jax.random.split(jax.random.key(0), 3):
    noise, _ = step(noise, key)
  refit = optlab.fit_gaussian(bent_rows())
  step(refit, key)
  assert len(traces) == 1


def test_a_flow_fits_what_a_gaussian_does_not():
  rows = bent_rows()
  gaussian = -np.mean(optlab.fit_gaussian(rows).log_prob(rows))
  assert -np.mean(flow().log_prob(rows)) < gaussian - 0.3


def test_a_flow_of_half_precision_rows_is_wider():
  """In float16 every loss after some was NaN."""
  rows = bent_rows().astype(jnp.float16)
  flow = optlab.unnormalized.init_flow(jax.random.key(0), rows, 2, 8)
  assert {leaf.dtype for leaf in flow} == {jnp.dtype(jnp.float32)}
  fitted, losses = jax.jit(
    lambda rows: optlab.unnormalized.fit_flow(
      flow, jax.random.key(1), rows, 20, batch_size=32
    )
  )(rows)
  assert np.all(np.isfinite(losses))
  assert np.all(np.isfinite(fitted.log_prob(rows)))


def test_no_rows_to_follow_are_named():
  noise = optlab.unnormalized.gaussian(jnp.zeros(2), jnp.eye(2))
  with pytest.raises(ValueError, match='with num at least 1, as the noise'):
    optlab.unnormalized.follow(noise, jnp.zeros((0, 2)), 0.5)


# Distributions of other libraries.


class OfNumpyro:
  """The shape of numpyro's distributions; so are those of TFP and distrax."""

  def __init__(self, batch_shape=(), seed='key'):
    self.batch_shape, self.seed = batch_shape, seed
    rows = single().sample
    if seed == 'key':
      self.sample = lambda key, sample_shape=(): rows(key, *sample_shape)
    else:
      self.sample = lambda sample_shape=(), seed=None: rows(seed, *sample_shape)

  def log_prob(self, value):
    return single().log_prob(value)


@pytest.mark.parametrize('seed', ['key', 'seed'])
def test_distributions_of_other_libraries_plug_in(seed):
  other, key = OfNumpyro(seed=seed), jax.random.key(0)
  data = jnp.ones((4, 2))
  got = optlab.noise_batch(other, key, data, 8)
  want = optlab.noise_batch(single(), key, data, 8)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  model = lambda x: -0.5 * jnp.sum(x**2, -1)
  score = lambda noise: optlab.log_partition(
    model, noise, key, 4000, chunk=2000
  )
  assert score(other).second == score(single()).second
  both = optlab.unnormalized.mixture([0.5, 0.5], other, single())
  np.testing.assert_allclose(
    both.log_prob(data), single().log_prob(data), rtol=1e-6
  )


def test_numpyro_itself():
  distributions = pytest.importorskip('numpyro.distributions')
  noise = distributions.MultivariateNormal(jnp.zeros(2), 2 * jnp.eye(2))
  model = lambda x: -0.5 * jnp.sum(x**2, -1)
  result = optlab.log_partition(model, noise, jax.random.key(0))
  assert result.ok
  np.testing.assert_allclose(result.value, np.log(2 * np.pi), atol=0.01)
  with pytest.raises(ValueError, match=r'batch of shape \(2,\).*to_event'):
    optlab.noise_batch(
      distributions.Normal(jnp.zeros(2), 1.0),
      jax.random.key(0),
      jnp.ones((4, 2)),
      8,
    )


def test_batches_of_distributions_are_refused():
  key, data = jax.random.key(0), jnp.ones((4, 2))
  for call in (
    lambda noise: optlab.noise_batch(noise, key, data, 8),
    lambda noise: optlab.log_partition(lambda x: x[:, 0], noise, key),
    lambda noise: optlab.unnormalized.defensive(single(), noise),
  ):
    with pytest.raises(ValueError, match=r'a batch of shape \(3,\): make one'):
      call(OfNumpyro(batch_shape=(3,)))

  class Columns:
    sample = staticmethod(lambda key, num: jnp.zeros((num, 2)))
    log_prob = staticmethod(lambda rows: rows)

  with pytest.raises(
    ValueError, match=r'log_prob must return one number a row'
  ):
    optlab.noise_batch(Columns(), key, data, 8)
  with pytest.raises(
    ValueError, match=r'log_prob must return one number a row'
  ):
    optlab.log_partition(lambda x: x[:, 0], Columns(), key)


class Tree:
  """Rows that are trees, of floats and of integers."""

  def sample(self, key, num):
    keys = jax.random.split(key)
    return {
      'x': jax.random.normal(keys[0], (num, 2)),
      'k': jax.random.randint(keys[1], (num,), 0, 3),
    }

  def log_prob(self, rows):
    normal = -0.5 * jnp.sum(rows['x'] ** 2, -1) - jnp.log(2 * jnp.pi)
    inside = (rows['k'] >= 0) & (rows['k'] < 3)
    return jnp.where(inside, normal - jnp.log(3.0), -jnp.inf)


def test_mixtures_of_rows_that_are_trees():
  noise = optlab.unnormalized.mixture([0.3, 0.7], Tree(), Tree())
  rows = noise.sample(jax.random.key(0), 5)
  assert jax.tree.map(jnp.shape, rows) == {'x': (5, 2), 'k': (5,)}
  weights = jnp.asarray([0.0, 1.0, -1.0])
  result = optlab.log_partition(
    lambda rows: weights[rows['k']] - jnp.sum(rows['x'] ** 2, -1) / 2,
    noise,
    jax.random.key(0),
  )
  truth = jax.nn.logsumexp(weights) + np.log(2 * np.pi)
  assert result.ok
  assert abs(result.value - truth) < 3 * result.standard_error
  mixed = optlab.unnormalized.mixture([0.5, 0.5], Tree(), single())
  with pytest.raises(ValueError, match=r'a draw of components\[1\] must have'):
    mixed.sample(jax.random.key(0), 4)


def test_integer_rows():
  rows = np.random.default_rng(0).integers(0, 5, (100, 2))
  start = optlab.unnormalized.init_flow(jax.random.key(0), rows, 2, 8)
  fits = [
    optlab.unnormalized.fit_flow(start, jax.random.key(1), rows, 3)[1]
    for rows in (rows, jnp.asarray(rows), rows.astype(np.float32))
  ]
  for fit in fits[1:]:
    np.testing.assert_array_equal(fit, fits[0])
  for noise in (
    start,
    optlab.fit_gaussian(rows),
    optlab.unnormalized.gaussian(np.zeros(2, int), np.eye(2, dtype=int)),
  ):
    assert noise.mean.dtype == jnp.float32
    assert np.all(np.isfinite(noise.log_prob(rows)))


def test_bad_arguments():
  with pytest.raises(ValueError, match='positive definite'):
    optlab.unnormalized.gaussian(jnp.zeros(2), -jnp.eye(2))
  factor = jnp.array([[1.0, 0.0], [0.9, 1.0]])  # It was taken for a covariance.
  with pytest.raises(ValueError, match='must be symmetric'):
    optlab.unnormalized.gaussian(jnp.zeros(2), factor)
  with pytest.raises(ValueError, match='must be symmetric'):
    optlab.unnormalized.gaussian_mixture(
      jnp.ones(2), jnp.zeros((2, 2)), jnp.stack([jnp.eye(2), factor])
    )
  score = jax.jit(
    lambda matrix: optlab.unnormalized.gaussian(jnp.zeros(2), matrix).log_prob(
      jnp.zeros((1, 2))
    )
  )
  assert np.all(np.isnan(score(factor)))
  assert np.all(np.isfinite(score(factor @ factor.T)))
  with pytest.raises(ValueError, match='shapes'):
    optlab.unnormalized.gaussian(jnp.zeros(2), jnp.eye(3))
  with pytest.raises(ValueError, match=r'\[num, d\]'):
    optlab.fit_gaussian(jnp.zeros(3))
  with pytest.raises(ValueError, match='shapes'):
    optlab.unnormalized.gaussian_mixture(
      jnp.ones(2), jnp.zeros((3, 1)), jnp.ones((3, 1, 1))
    )
  with pytest.raises(ValueError, match='weight'):
    optlab.unnormalized.defensive(single(), single(), 1.0)
  with pytest.raises(ValueError, match='one a component'):
    optlab.unnormalized.mixture(np.ones(3), single())
  with pytest.raises(ValueError, match='rate'):
    optlab.unnormalized.follow(single(), jnp.zeros((2, 2)), 2.0)
  with pytest.raises(ValueError, match='d at least 2'):
    optlab.unnormalized.init_flow(jax.random.key(0), jnp.zeros((4, 1)))
  with pytest.raises(ValueError, match='num must be'):
    optlab.noise_batch(single(), jax.random.key(0), jnp.zeros((2, 2)), 0)
