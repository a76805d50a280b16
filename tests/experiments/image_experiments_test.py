"""The programs of growing batches and of diffGrad, at a size of seconds."""

import dataclasses
import os
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import image_classification
from experiments import synthetic_functions
from experiments.lab import flags
from experiments.lab import record
from experiments.lab import study
from experiments.lab.session import Session
from experiments.methods import images
from experiments.problems import image_classifiers


@pytest.fixture
def config(tmp_path):
  """197 digits to train on, 137 of them while rates are tuned."""
  return image_classification.Config(
    output_dir=str(tmp_path / 'run'), model='logistic', epochs=2,
    batches=('40', 'norm:1'), learning_rates=(1e-4, 0.1), microbatch=16,
    test_size=1600, valid_size=60, tuning_seeds=1, seeds=2,
    checkpoint_every=0.0,
  )  # fmt: skip


@pytest.mark.slow
def test_tunes_on_validation_images_and_reports_test_images(config, capsys):
  image_classification.main(config)
  shown = capsys.readouterr().out
  _, rows = record.read(config.output_dir)
  summaries = record.select(rows, 'summary')
  assert [row['method'] for row in summaries[:2]] == [
    'adagrad, 40', 'adagrad, norm:1',
  ]  # fmt: skip
  # The third is the constant batch of the growing one's average size.
  average = summaries[1]['average_batch']
  assert 8.0 < average < 137.0
  assert summaries[2]['method'] == f'adagrad, {round(average)}'
  steps = summaries[1]['updates']
  assert abs(summaries[2]['updates'] - steps) <= 0.2 * steps + 1
  for summary in summaries:
    label = summary['method']
    tuning = record.select(
      rows, 'eval', method=f'{label}: tuning, grid 0', step=2
    )
    assert not any('test_accuracy' in row for row in tuning)
    losses = {row['learning_rate']: row['valid_loss'] for row in tuning}
    assert losses[0.1] < losses[1e-4]
    # The grid went on above, where nothing is better.
    assert {row['seed'] for row in tuning} == {study.TUNING_SEED}
    assert not summary['edge']
    assert summary['learning_rate'] == 0.1
    assert summary['tuning'] == losses[0.1]
    ends = record.select(rows, 'eval', method=label, step=2)
    assert [row['seed'] for row in ends] == [0, 1]
    assert all(row['calls'] == pytest.approx(2 * 197, rel=1e-5) for row in ends)
    accuracies = [row['test_accuracy'] for row in ends]
    assert summary['median'] == pytest.approx(np.median(accuracies))
    assert summary['median'] > 0.3
  compared = record.select(rows, 'comparison', batches='norm:1')
  same = round(average)
  assert [row['against'] for row in compared] == [
    'smallest, 40', 'best, 40', f'same average, {same}',
  ]  # fmt: skip
  gap = summaries[1]['median'] - summaries[0]['median']
  assert compared[0]['accuracy_gap'] == pytest.approx(gap)
  assert 'same average' in shown
  assert max(len(t) for t in shown.split('\n') if 'png' not in t) <= 80
  folder = pathlib.Path(config.output_dir)
  assert (folder / 'image_classification.png').stat().st_size > 10_000


def test_a_run_of_growing_batches_resumes(config):
  data = image_classifiers.load('digits', '', config.test_size, np.float32)
  problem = images.problem(config, data, ('adagrad, norm:1',))

  def go(folder, look, resume=False):
    now = dataclasses.replace(config, output_dir=str(folder), resume=resume)
    own = problem._replace(look=look)
    plan = study.Plan('', own, own.budget, (0.1,), 2, 0, pieces=config.epochs)
    with Session('image_classification', now) as session:
      study.study(session, plan, own.methods)
    return record.without_times(record.read(folder)[1])

  calls = []

  def interrupt(state, seed):
    calls.append(1)
    if len(calls) == 3:  # The first of two lanes, after the first epoch.
      os.kill(os.getpid(), signal.SIGINT)
    return {'seed_seen': seed}

  folder = pathlib.Path(config.output_dir)
  look = lambda state, seed: {'seed_seen': seed}
  whole = go(folder / 'whole', look)
  with pytest.raises(flags.InterruptedRun, match='at step 1 of adagrad, norm'):
    go(folder / 'cut', interrupt)
  assert go(folder / 'cut', look, resume=True) == whole
  ends = record.select(whole, 'eval', step=2)
  assert all(row['batch_size'] > config.first_size for row in ends)


@pytest.mark.parametrize(
  ('batches', 'message'),
  [
    ('1', 'a size must be from 2 to the 137 images'),
    ('138', 'a size must be from 2 to the 137 images'),
    ('many', 'not a size, full, or a test with its constant, as in norm:1'),
    ('64+root', 'not a size, full, or a test with its constant'),
    ('norm:0', 'eta must be in'),
    ('norm:small', 'could not convert'),
    ('random:1', 'no test random; there are norm, means, coordinate'),
    ('norm:1+often', r'after the constant comes \+memory, and \+root or'),
    ('norm:1+root+linear', r'after the constant comes \+memory, and \+root or'),
  ],
)
def test_bad_batches_are_one_line(config, batches, message):
  with pytest.raises(
    flags.UserError, match=f'--batches={re.escape(batches)}: .*{message}'
  ):
    image_classification.main(dataclasses.replace(config, batches=(batches,)))


def test_words_behind_a_test_give_it_a_memory_and_couple_the_rate():
  for text, remembers, power in (
    ('norm:1', False, 0.0), ('norm:1+memory+root', True, 0.5),
    ('inner:0.5+linear', False, 1.0), ('augmented:1+memory', True, 0.0),
    ('noise:1', True, 0.0),
  ):  # fmt: skip
    rule = images.batches(text, 8, 100)
    memory = jax.tree.leaves(rule.test.init(jnp.zeros(3)))
    assert bool(memory) == remembers, text
    assert rule.cap == (2.0 if remembers else None)
    assert rule.power == power


def test_an_image_is_not_moved_out_of_sight():
  with pytest.raises(flags.UserError, match='--shift=4: an image of 6 x 4'):
    images.shifted(4)(
      jnp.ones((2, 6, 4, 1)), jax.random.split(jax.random.key(0))
    )


def test_shifted_images_are_the_same_ones_elsewhere():
  image = np.zeros((1, 5, 5, 1), np.float32)
  image[0, 2, 2] = 1.0
  keys = jax.random.split(jax.random.key(0), 64)
  many = images.shifted(2)(jnp.repeat(image, 64, 0), keys)
  np.testing.assert_array_equal(np.sum(many, (1, 2, 3)), 1.0)
  assert len(np.unique(many, axis=0)) > 15  # Of 25 places.


def test_a_moved_image_reaches_the_step(config):
  config = dataclasses.replace(config, shift=1)
  data = image_classifiers.load('digits', '', config.test_size, np.float32)
  problem = images.problem(config, data, ('adam, inner:1+memory+linear',))
  entry = problem.entry(problem.methods[0])

  def run(key):
    start = entry.start(key, 0.1, 0, problem.data)
    return start, entry.step(start, key, 0.1, problem.data)

  before, after = jax.eval_shape(run, jax.random.key(0))
  assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)


def test_bad_splits_are_one_line(config):
  for name, size in (('test_size', 1790), ('valid_size', 190)):
    with pytest.raises(flags.UserError, match=f'--{name}={size}: must leave'):
      image_classification.main(dataclasses.replace(config, **{name: size}))
  with pytest.raises(flags.UserError, match='are no square images'):
    image_classification.main(
      dataclasses.replace(config, dataset='breast_cancer')
    )


@pytest.mark.parametrize('name', ['cnn', 'mlp'])
def test_models_give_one_loss_an_image(name):
  """On images of either size; examples do not see each other."""
  labels = np.arange(3)
  for side in (8, 28):
    model = image_classifiers.model(name, side, 10, np.float32)
    images = np.random.default_rng(0).normal(size=(3, side, side, 1))
    shape = jax.eval_shape(model.losses, model.start(0), (images, labels))
    assert shape.shape == (3,)
    if side == 8:
      losses = jax.jit(model.losses)
      together = losses(model.start(0), (images, labels))
      alone = losses(model.start(0), (images[::-1], labels[::-1]))[::-1]
      np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_the_synthetic_functions_are_the_papers(x64):
  for function, points in (
    (synthetic_functions.f1, {-0.3: 0.0, 0.2: 0.05, -1.0: 0.49}),
    (synthetic_functions.f2, {-1.0: 4.85, 0.0: 0.85}),
    (synthetic_functions.f3, {0.0: 0.0, 0.4: 0.35, 0.5: 0.25, -1.0: 1.0}),
  ):
    for x, value in points.items():
      np.testing.assert_allclose(function(jnp.asarray(x)), value, atol=1e-12)
  # Their pieces meet; those of f2 miss each other by 0.015, in the paper, too.
  for function, seam in (
    (synthetic_functions.f1, 0.0),
    (synthetic_functions.f2, -0.9),
    (synthetic_functions.f3, 0.4),
    (synthetic_functions.f3, 0.5),
  ):
    below, above = (function(jnp.asarray(seam + e)) for e in (-1e-6, 1e-6))
    np.testing.assert_allclose(below, above, atol=2e-2)


def test_synthetic_functions_end_where_the_paper_says(tmp_path, x64, capsys):
  config = synthetic_functions.Config(
    output_dir=str(tmp_path), functions=('F1',), seeds=2,
    optimizers=('diffgrad', 'adam'),
  )  # fmt: skip
  synthetic_functions.main(config)
  _, rows = record.read(tmp_path)
  ends = {row['optimizer']: row['x'] for row in record.select(rows, 'minimum')}
  assert ends['diffgrad'] == pytest.approx(-0.3, abs=1e-3)
  assert ends['adam'] == pytest.approx(0.2, abs=1e-3)
  assert '-0.300' in capsys.readouterr().out
  assert (tmp_path / 'synthetic_functions.png').stat().st_size > 10_000
  again = dataclasses.replace(config, resume=True)
  synthetic_functions.main(again)
  assert record.without_times(record.read(tmp_path)[1]) == (
    record.without_times(rows)
  )
