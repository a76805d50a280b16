"""The plane's noise, flags and paired test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import density_estimation
from experiments.lab import flags
from experiments.lab import record
from experiments.lab import study
from experiments.lab import verdicts
from experiments.methods import unnormalized
from experiments.problems import plane
from experiments.problems import plane_noise


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


def test_rates_are_picked_on_seeds_and_data_of_their_own(tmp_path):
  config = density_estimation.Config(
    output_dir=str(tmp_path), problem='mean', distances=(4.0,), seeds=3,
    methods=('meco_ratio',), steps=40, learning_rates=(0.01, 0.1),
    tuning_seeds=1,
  )  # fmt: skip
  density_estimation.main(config)
  rows = record.read(tmp_path)[1]
  for row in record.select(rows, 'summary'):
    label = f'distance 4: {row["method"]}'
    tuned = [
      r for grid in range(3)
      for r in verdicts.last(rows, f'{label}: tuning, grid {grid}')
    ]  # fmt: skip
    assert {r['seed'] for r in tuned} == {study.TUNING_SEED}
    best = min(tuned, key=lambda r: r['value'])
    assert row['learning_rate'] == best['learning_rate']
    ends = verdicts.last(rows, label)
    assert [r['seed'] for r in ends] == [0, 1, 2]
    assert row['median'] == sorted(r['value'] for r in ends)[1]
  assert (tmp_path / 'mean.png').exists()


def test_every_seed_has_rows_of_its_own(monkeypatch):
  monkeypatch.setattr(plane_noise, 'TRAIN_ROWS', 50)
  config = density_estimation.Config(seeds=2, tuning_seeds=1)
  plane_noise.plane.cache_clear()
  entry = plane.problem(config, 'rings', 'gaussian').entry('meco')
  place = jax.jit(lambda seed: entry.start(jax.random.key(0), 0.1, seed, ()))
  own = study.TUNING_SEED
  places = [int(place(seed).place) for seed in (0, 1, own, own + 1)]
  # Of more seeds than the flags have, those of the last.
  assert places == [0, 1, -1, -1]
  found = plane_noise.plane('rings', 'gaussian', (0, 1, own))
  assert len(set(np.asarray(jnp.mean(found.train, (1, 2))).tolist())) == 3
  plane_noise.plane.cache_clear()


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
