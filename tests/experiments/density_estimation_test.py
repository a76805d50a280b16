"""The plane's noise, flags and paired test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import density_estimation
from experiments.lab import flags
from experiments.methods import unnormalized
from experiments.problems import plane_noise


def test_verdict_is_a_paired_t_test():
  # Mean 1, standard error 0.5477, and 2.776 of them at five seeds.
  differences = [0.0, 0.0, 1.0, 1.0, 3.0]
  interval, said = density_estimation.verdict(differences)
  assert (interval, said) == ('-5.2e-01 to +2.5e+00', 'tie')
  shifted = np.asarray(differences) + 1
  assert density_estimation.verdict(shifted)[1] == 'win'
  assert density_estimation.verdict(-shifted)[1] == 'loss'
  assert density_estimation.verdict([1.0, float('nan')]) == ('-', '-')


@pytest.mark.parametrize(
  'options, match',
  [
    ({'methods': ('meco:2',)}, 'must be in'),
    ({'methods': ('meco:x',)}, 'could not convert'),
    ({'methods': ('nce:0.5',)}, 'not one of'),
    ({'methods': ('adam',)}, 'not one of'),
    ({'gamma': 1.5}, 'must be in'),
    ({'methods': ('cd',), 'problem': 'mean'}, 'no chains'),
    ({'noises': ('flow',)}, 'has no lattice'),
  ],
)
def test_flags_that_are_refused(options, match):
  with pytest.raises(flags.UserError, match=match):
    density_estimation.Config(**options)


@pytest.mark.parametrize('problem', ['plane', 'mean'])
@pytest.mark.parametrize('name', ['auto', *unnormalized.OPTIMIZERS])
def test_every_optimizer_descends(problem, name):
  config = density_estimation.Config(problem=problem, optimizer=name)
  tx = unnormalized.optimizer('meco', 0.1, config)
  grads = jnp.asarray([3.0, -4.0])
  updates, _ = tx.update(grads, tx.init(grads))
  same = {
    'sgd': -0.1 * grads,
    'momentum': -0.1 * grads,
    'normalized': -0.1 * grads / 5.0,
    'diffgrad': -0.1 * jnp.sign(grads) * jax.nn.sigmoid(jnp.abs(grads)),
  }
  kind = name if name != 'auto' else {'plane': 'adam', 'mean': 'sgd'}[problem]
  expected = same.get(kind, -0.1 * jnp.sign(grads))
  np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_adaptive_noise_finds_the_data():
  rng = np.random.default_rng(0)
  centres = np.array([[-2.0, 0.0], [2.0, 1.0]])
  rows = centres[rng.integers(0, 2, 1000)] + 0.2 * rng.normal(size=(1000, 2))
  rows = jnp.asarray(rows, jnp.float32)
  start = jax.tree.map(
    jnp.float32, plane_noise.fit('adaptive', np.asarray(rows), 0)
  )
  follow = functools.partial(
    plane_noise.adapt, rows=rows, log_weights=jnp.zeros(1000)
  )
  noise = jax.jit(
    lambda noise: jax.lax.fori_loop(0, 200, lambda _, q: follow(q), noise)
  )(start)
  before, after = (jnp.mean(q.log_prob(rows)) for q in (start, noise))
  assert after > before + 0.5
  np.testing.assert_allclose(jnp.sum(jnp.exp(noise.log_weights)), 1, rtol=1e-5)
  # The wide component stays as it was.
  np.testing.assert_array_equal(noise.means[-1], start.means[-1])
  np.testing.assert_allclose(noise.log_weights[-1], np.log(0.1), rtol=1e-5)
