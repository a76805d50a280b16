"""The multi-block programs end to end, at a size that takes seconds."""

import gzip

import jax
import numpy as np
import pytest

from experiments import few_shot_sine
from experiments import multi_block_hyperparameters
from experiments import parallel_speedup
from experiments import ranking
from experiments.lab import flags
from experiments.lab import record
from experiments.lab import study
from experiments.lab import verdicts
from experiments.problems import quadratic
from experiments.problems import queries
from experiments.problems import ratings
from experiments.problems import scaled_logistic as logistic


def test_log_loss_has_the_derivatives_of_its_definition(x64):
  z = np.linspace(-30.0, 30.0, 13)
  sigmoid = 1.0 / (1.0 + np.exp(-z))
  small = np.exp(-np.abs(z))
  for fun, expected in (
    (logistic.log_loss, np.logaddexp(0.0, -z)),
    (jax.grad(logistic.log_loss), sigmoid - 1.0),
    (jax.grad(jax.grad(logistic.log_loss)), small / (1.0 + small) ** 2),
  ):
    np.testing.assert_allclose(
      jax.vmap(fun)(z), expected, rtol=1e-12, atol=1e-15
    )


def test_quadratic_starts_where_it_was_recorded(x64):
  data = quadratic.make()
  x = jax.jit(quadratic.minimizer)(data)
  gap = quadratic.objective(np.full(5, 3.0), data) - quadratic.objective(
    x, data
  )
  np.testing.assert_allclose(gap, 4.29, atol=5e-3)
  grad = jax.grad(quadratic.objective)(x, data)
  assert np.linalg.norm(grad) < 1e-14


@pytest.mark.slow
def test_parallel_speedup_end_to_end(x64, tmp_path):
  config = parallel_speedup.Config(
    output_dir=str(tmp_path), num_blocks=20, blocks=(20,), rows=(8,),
    learning_rates=(0.1, 0.3), inner_lrs=(0.03, 0.3), steps=200, seeds=4,
    target=0.03, tuning_seeds=1,
  )  # fmt: skip
  parallel_speedup.main(config)
  rows = record.read(tmp_path)[1]
  summaries = record.select(rows, 'summary')
  assert [row['method'] for row in summaries] == ['I=20 B=8']
  for row in summaries:
    assert 0 < row['steps_to_target_low'] <= row['steps_to_target'] < 200
    # The rates are those of the seed of their own, which is not reported.
    tuned = [
      r for grid in range(3) for r in verdicts.last(
        rows, f'{row["method"]}: tuning, grid {grid}')
    ]  # fmt: skip
    best = min(tuned, key=lambda r: (r['tuning'], r['learning_rate']))
    for name in ('learning_rate', 'inner_lr'):
      assert row[name] == best[name]
    assert {r['seed'] for r in tuned} == {study.TUNING_SEED}
  assert (tmp_path / 'parallel_speedup.png').stat().st_size > 1000


@pytest.mark.slow
def test_ranking_end_to_end(tmp_path):
  config = ranking.Config(
    output_dir=str(tmp_path), queries=20, documents=15, features=4, hidden=3,
    blocks=5, top=5, steps=40, looks=2, learning_rates=(0.01,),
    seeds=2, methods=('bsvrb_v2', 'pointwise'),
  )  # fmt: skip
  ranking.main(config)
  rows = record.read(tmp_path)[1]
  last = verdicts.last(rows, 'bsvrb_v2')
  assert [row['seed'] for row in last] == [0, 1]
  assert all(0.0 < row['ndcg5'] <= 1.0 for row in last)
  assert (tmp_path / 'ranking.png').exists()


def test_padding_of_a_query_changes_nothing():
  config = ranking.Config(top=3)
  rng = np.random.default_rng(0)
  score = rng.normal(size=6).astype(np.float32)
  grades = np.array([0, 1, 4, 2, 0, 3], np.float32)
  append = lambda a, b: np.append(a, np.float32(b))
  alone = queries.Queries(score, grades, np.int32(6))
  padded = queries.Queries(
    append(score, [1e3, -1e3]), append(grades, [4, 2]), np.int32(6)
  )
  lower, upper = queries.levels(config, lambda _, features: features, 2.0)
  for function in (
    *(lambda q, f=f: f(q.features, q) for f in ranking.LOSSES.values()),
    *(lambda q, f=f: f(None, np.float32(0.3), q) for f in (lower, upper)),
    lambda q: queries.ndcg(
      *jax.tree.map(lambda leaf: leaf[None], (q.features, q)), 3
    ),
  ):
    np.testing.assert_allclose(function(alone), function(padded), rtol=1e-6)
  # A pair in the wrong order costs more, the more so at the top.
  best = np.argsort(np.argsort(grades)).astype(np.float32)
  worse = best.copy()
  worse[[2, 0]] = worse[[0, 2]]
  assert queries.lambdarank(best, alone) < queries.lambdarank(worse, alone)


def test_ratings_are_parted_by_user(monkeypatch):
  users = np.repeat([7, 3], [20, 10])
  films = np.concatenate([np.arange(20), np.arange(10)]) + 100
  tables = {
    'data': {'user_id': users, 'movie_id': films, 'rating': films % 5 + 1},
    'users': {
      'user_id': [3, 7], 'age': [20, 40], 'gender': ['F', 'M'],
      'occupation': ['artist', 'none'],
    },
    'items': {
      'movie_id': np.arange(100, 120), 'IMDb_URL': [''] * 20,
      'Drama': np.arange(20) % 2,
    },
  }  # fmt: skip
  monkeypatch.setattr(ratings, '_read', lambda folder, name: tables[name])
  data, model = ratings.load(ranking.Config(dataset='movielens'))
  seen = []
  for part, counts in zip(data, ([5, 10], [2, 4], [3, 6]), strict=True):
    np.testing.assert_array_equal(part.count, counts)
    for row, count in enumerate(counts):
      film = np.asarray(part.features['film'])[row, :count]
      np.testing.assert_array_equal(part.relevance[row, :count], film % 5)
      seen += [(row, number) for number in film]
  assert len(set(seen)) == 30
  few = queries.drawn(jax.random.key(0), data.train, 6)
  np.testing.assert_array_equal(few.count, [5, 6])
  assert len(set(np.asarray(few.features['film'])[1].tolist())) == 6
  scores = model.scores(model.init(jax.random.key(0)), few.features)
  assert scores.shape == (2, 6) and np.all(np.isfinite(scores))


def test_ratings_are_the_users():
  with pytest.raises(flags.UserError, match='pyarrow|wants --data_dir'):
    ranking.main(ranking.Config(dataset='movielens'))


def test_spoiled_labels_are_those_of_training_rows_alone():
  def load(**kwargs):
    random = np.random.default_rng(0)
    return logistic.load('breast_cancer', '', random=random, **kwargs)

  clean, few = load(), load(keep_positive=0.25)
  turned = load(keep_positive=0.25, flip=0.3)
  for split in (few, turned):
    np.testing.assert_array_equal(split.validation, clean.validation)
    np.testing.assert_array_equal(split.test, clean.test)
  positive = clean.train[:, 0] > 0
  assert 0.15 < np.mean(few.train[:, 0] > 0) / np.mean(positive) < 0.6
  assert np.sum(few.train[:, 0] < 0) == np.sum(~positive)
  flipped = np.any(turned.train != few.train, axis=1)
  np.testing.assert_array_equal(turned.train[flipped], -few.train[flipped])
  assert 0.2 < np.mean(flipped) < 0.4


def test_a_split_is_whole_or_refused(tmp_path):
  """A test file that is damaged is not passed over for another split."""
  (tmp_path / 'toy.libsvm').write_text('1 1:1\n-1 2:1\n' * 8)
  load = lambda: logistic.load(
    'toy', str(tmp_path), random=np.random.default_rng(0)
  )
  assert len(load().test) == 3
  other = tmp_path / 'toy_testing.libsvm.gz'
  other.write_bytes(gzip.compress(b'1 1:1\n-1 2:1\n'))
  assert len(load().test) == 2
  other.write_bytes(b'1 1:1\n')
  with pytest.raises(flags.UserError, match='toy_testing.*Not a gzipped'):
    load()
  other.unlink()
  (tmp_path / 'toy.libsvm').write_text('1 1:1\n-1 2:1\n')
  with pytest.raises(flags.UserError, match='0 to validate .* too few'):
    load()


@pytest.mark.slow
def test_multi_block_hyperparameters_end_to_end(tmp_path):
  config = multi_block_hyperparameters.Config(
    output_dir=str(tmp_path), dataset='breast_cancer', train_rows=30,
    num_blocks=6, blocks=2, rows=4, steps=40, looks=2,
    learning_rates=(1.0,), inner_lrs=(0.03, 0.1), seeds=2,
    methods=('frozen', 'rsvrb'),
  )  # fmt: skip
  multi_block_hyperparameters.main(config)
  rows = record.read(tmp_path)[1]
  for name in config.methods:
    # The rate of the least validation loss on the tuning seeds is chosen.
    tuned: dict[float, list[float]] = {}
    for row in verdicts.last(rows, f'{name}: tuning, grid 0'):
      tuned.setdefault(row['inner_lr'], []).append(row['validation'])
    assert all(len(values) == config.tuning_seeds for values in tuned.values())
    best = min(tuned, key=lambda rate: np.median(tuned[rate]))
    start = record.select(rows, 'eval', method=name, step=0)
    last = verdicts.last(rows, name)
    assert [row['seed'] for row in last] == [0, 1]
    assert all(row['inner_lr'] == best for row in last)
    for before, after in zip(start, last, strict=True):
      assert after['validation'] < before['validation']
      assert (after['moved'] == 0.0) == (name == 'frozen')
  path = tmp_path / 'multi_block_hyperparameters.png'
  assert path.stat().st_size > 1000


def test_bad_flags_are_one_line():
  with pytest.raises(flags.UserError, match='more than --num_blocks=4'):
    parallel_speedup.main(parallel_speedup.Config(num_blocks=4))
  with pytest.raises(flags.UserError, match='--top=40: must be below'):
    ranking.main(ranking.Config(top=40))
  with pytest.raises(flags.UserError, match='no data set nothing'):
    multi_block_hyperparameters.main(
      multi_block_hyperparameters.Config(dataset='nothing')
    )


@pytest.mark.slow
def test_few_shot_sine_end_to_end(tmp_path):
  config = few_shot_sine.Config(
    output_dir=str(tmp_path), num_tasks=6, tasks=3, shots=4, width=3, steps=20,
    looks=2, seeds=2, adapt_steps=2, methods=('bsvrb', 'unrolled'),
  )  # fmt: skip
  few_shot_sine.main(config)
  rows = record.read(tmp_path)[1]
  for name in config.methods:
    ends = verdicts.last(rows, name)
    assert [(row['seed'], row['updates']) for row in ends] == [(0, 20), (1, 20)]
    assert all(0.0 < row['value'] < 10.0 for row in ends)
    assert all(row['total_not_ok'] == 0 for row in ends)
  assert (tmp_path / 'few_shot_sine.png').stat().st_size > 1000
