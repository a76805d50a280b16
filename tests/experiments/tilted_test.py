"""Energies of small images: their scores, and both programs end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import image_generation
from experiments import ood_detection
from experiments.lab import flags
from experiments.lab import record
from experiments.lab import tilted
from experiments.problems import small_images


def test_frechet_distance_of_two_gaussians():
  """|a - b|^2 + tr (A + B - 2 (A B)^1/2), by hand for diagonal A and B."""
  corners = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)
  assert image_generation.frechet(corners, corners) == pytest.approx(0.0)
  other = corners * np.array([2.0, 3.0]) + np.array([1.0, 0.0])
  assert image_generation.frechet(corners, other) == pytest.approx(1 + 1 + 4)


def test_auroc_of_scores_in_any_units():
  assert ood_detection.auroc([1.0, 2.0], [-1.0, 0.0]) == 1.0
  assert ood_detection.auroc([1.0, 3.0], [2.0, 4.0]) == 0.25


def test_left_out_classes_are_in_no_other_part():
  labels = np.repeat(np.arange(10), 20)
  rows = np.arange(200.0, dtype=np.float32)[:, None]
  data = small_images.Images(rows, labels, 1, 2)
  train, inside, outside = ood_detection.split(data, seed=4)
  parts = [set(labels[part[:, 0].astype(int)]) for part in (train, outside)]
  assert parts == [set(range(8)), {8, 9}]
  assert len(train) + len(inside) + len(outside) == 200
  assert not set(train[:, 0]) & set(inside[:, 0])


def test_an_energy_starts_as_the_noise_and_stays_bounded():
  params = tilted.init_energy(jax.random.key(0), 5, 7)
  rows = jnp.concatenate([jnp.ones((3, 5)), jnp.full((3, 1), -2.0)], 1)
  np.testing.assert_array_equal(tilted.log_density(params, rows), -2.0)
  *layers, (weight, bias) = params
  wild = [*layers, (weight + 1e6, bias)]
  assert np.all(np.abs(tilted.tilt(wild, rows[:, :-1])) <= 20.0)


def test_coordinates_of_the_chains_whiten_the_noise(few_draws):
  rows = np.random.default_rng(0).normal(size=(200, 3)) * np.array([1, 0.1, 3])
  noise = small_images.fit_noise(rows.astype(np.float32), 2, 0)
  space = tilted.whitened(noise)
  white = space.sample(jax.random.key(0), 2000)
  np.testing.assert_allclose(jnp.cov(white.T), np.eye(3), atol=0.15)
  np.testing.assert_allclose(space.white(space.rows(white)), white, atol=1e-4)


@pytest.fixture
def few_draws(monkeypatch):
  monkeypatch.setattr(small_images, 'POOL', 2000)
  monkeypatch.setattr(tilted, 'LOG_Z_DRAWS', 4000)


@pytest.mark.slow
def test_ood_detection_end_to_end(tmp_path, capsys, few_draws):
  """Every score is an AUROC, and training improved on the noise."""
  config = ood_detection.Config(
    output_dir=str(tmp_path / 'run'), steps=100, seeds=1, hidden=16,
    components=3, learning_rates=(2e-3,), tuning_seeds=0,
  )  # fmt: skip
  ood_detection.main(config)
  shown = capsys.readouterr().out
  _, rows = record.read(config.output_dir)
  found = record.select(rows, 'auroc')
  names = {'nearest neighbour', 'Gaussian', 'mixture q', 'meco', 'nce'}
  assert {row['method'] for row in found} == names
  assert all(0.5 < row['auroc'] <= 1.0 for row in found)
  for name in names:
    assert name in shown
  scores = record.select(rows, 'score')
  assert len(scores) == 2
  for row in scores:
    assert row['agree']
    assert row['nll'] < row['q_nll']
  assert (tmp_path / 'run' / 'auroc.png').stat().st_size > 5000


@pytest.mark.slow
def test_image_generation_end_to_end(tmp_path, capsys, few_draws):
  """Real images are nearer to real ones than the noise that chains start at."""
  config = image_generation.Config(
    output_dir=str(tmp_path / 'run'), steps=100, seeds=1, hidden=16,
    components=3, chain_steps=20, learning_rates=(2e-3,), tuning_seeds=0,
    score='smc', particles=32,
  )  # fmt: skip
  image_generation.main(config)
  assert 'Frechet' in capsys.readouterr().out
  _, rows = record.read(config.output_dir)
  distances = {
    row['method']: row['frechet'] for row in record.select(rows, 'frechet')
  }
  assert set(distances) >= {'meco', 'nce'}
  assert min(distances, key=distances.__getitem__).startswith('real')
  for row in record.select(rows, 'score'):  # By tempering.
    assert row['agree']
    assert row['nll'] < row['q_nll'] + 3 * row['standard_error']
  assert (tmp_path / 'run' / 'samples.png').stat().st_size > 5000


def test_steps_of_chains_must_be_positive(tmp_path):
  config = image_generation.Config(output_dir=str(tmp_path), step_size=0.0)
  with pytest.raises(
    flags.UserError, match='--step_size=0.0: must be positive'
  ):
    image_generation.main(config)
