"""The program for densities of tables, and the problems over label sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tabular_density
from experiments.lab import flags
from experiments.lab import record
from experiments.methods import label_sets as label_methods
from experiments.methods import tabular as methods
from experiments.problems import label_sets
from experiments.problems import tabular


@pytest.mark.slow
def test_quick_makes_a_table_and_a_picture(tmp_path, capsys):
  tabular_density.main(
    tabular_density.Config(output_dir=str(tmp_path), quick=True)
  )
  shown = capsys.readouterr().out
  assert max(map(len, shown.splitlines())) <= 80 + len(str(tmp_path))
  assert (tmp_path / 'tabular_density.png').stat().st_size > 5000
  _, rows = record.read(str(tmp_path))
  summaries = record.select(rows, 'summary')
  assert [row['method'] for row in summaries] == ['meco', 'nce', 'kernel']
  assert all(np.isfinite(row['median']) for row in summaries)


def test_splits_are_white_apart_and_keep_their_volume():
  rows = np.random.default_rng(0).normal(size=(100, 3)) @ np.array(
    [[3.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 2.0]]
  )
  split = tabular.split(jax.random.key(0), jnp.asarray(rows), None)
  sizes = [len(part) for part in (split.train, split.valid, split.test)]
  assert sizes == [60, 20, 20]
  np.testing.assert_allclose(jnp.cov(split.train.T), jnp.eye(3), atol=0.02)
  both = jnp.concatenate(split[:3])
  assert len(np.unique(np.round(both, 5), axis=0)) == 100
  # Of standardized columns, so the determinant is that of correlations.
  want = 0.5 * np.linalg.slogdet(np.corrcoef(rows.T))[1]
  assert abs(split.log_det - want) < 0.2


def test_a_mixture_is_found_and_a_kernel_density_is_normalized():
  keys = jax.random.split(jax.random.key(0), 2)
  sides = 3.0 * jax.random.rademacher(keys[0], (200, 1), float)
  rows = sides + 0.5 * jax.random.normal(keys[1], (200, 1))
  one, two = (
    jnp.mean(tabular.fit_mixture(keys[0], rows, k).log_prob(rows))
    for k in (1, 2)
  )
  assert two > one + 0.5
  split = tabular.Split(rows[:100], rows[100:150], rows[150:], jnp.zeros(()))
  _, loss = tabular.kernel_density(split)
  assert 1.2 < loss < 1.8  # log 2 + log(.5 sqrt(2 pi e)) is 1.42.


@pytest.mark.parametrize(
  'name, match',
  [
    ('mushrooms', 'not one of digits, breast_cancer, wine, and no file'),
    ('wine:x', 'after the colon stands a dimension'),
    ('wine:40', 'keep 2 to 13 components'),
    ('digits:1', 'keep 2 to 61 components'),
  ],
)
def test_bad_sets_are_one_line(name, match):
  with pytest.raises(flags.UserError, match=match):
    tabular.load(name)


def test_csv_files(tmp_path):
  path = tmp_path / 'mine.csv'
  lines = ['a,b,c', *(f'{i},{i % 7},1' for i in range(60))]
  path.write_text('\n'.join(lines))
  rows, keep = tabular.load(f'{path}:2')
  assert rows.shape == (60, 2)
  assert keep == 2
  for bad, match in (
    ('1,2', 'line 61 has 2 numbers, not 3 finite'),
    ('1,nan,3', 'line 61 has 3 numbers, not 3 finite'),
    ('1,x,3', "line 61 is not numbers: '1,x,3'"),
  ):
    path.write_text('\n'.join([*lines[:60], bad]))
    with pytest.raises(flags.UserError, match=match):
      tabular.load(str(path))
  path.write_text('')
  with pytest.raises(flags.UserError, match='has no rows of numbers'):
    tabular.load(str(path))
  path.write_text('1,2\n3,4\n')
  with pytest.raises(flags.UserError, match='2 rows of 2 columns'):
    tabular.load(str(path))


@pytest.mark.parametrize('method', ['vae', 'meco:0', 'nce:0.1', 'dsm:x'])
def test_unknown_methods_are_refused(method):
  problem = methods.problem('wine', 10, False)
  with pytest.raises(flags.UserError, match=f'{method}: not one of'):
    problem.entry(method)


# Label sets.


def test_noise_over_labels_is_what_it_says():
  share = jnp.asarray([0.5, 0.2, 0.0, 0.3])
  noise = label_methods.Labels(jnp.log(share))
  draws = noise.sample(jax.random.key(0), 20_000)
  counts = jnp.bincount(draws, length=4) / 20_000
  np.testing.assert_allclose(counts, share, atol=0.02)


def test_methods_over_labels_learn():
  random = np.random.default_rng(0)
  context = random.integers(0, 5, 1000)
  pairs = np.stack([context, 3 * context], 1).astype(np.int32)
  sets = label_sets.Pairs(pairs, pairs[:250], pairs[:250], 5, 15)
  problem = label_methods.problem(lambda: sets)
  for name in ('meco:0.1', 'sampled_softmax'):
    entry = problem.entry(name)

    def run(key, entry=entry):
      def step(i, state):
        return entry.step(state, jax.random.fold_in(key, i), 0.03)

      return jax.lax.fori_loop(0, 150, step, entry.start(key, 0.03))

    found = problem.measure(jax.jit(run)(jax.random.key(0)), None)
    assert found['value'] < 0.5, name
