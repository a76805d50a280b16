"""The bilevel programs and their text: data, costs, and one small run each."""

import dataclasses
import gzip
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import naive_bayes

from experiments import __main__ as programs
from experiments import hyper_cleaning
from experiments import hyper_representation
from experiments import hyperparameter_optimization
from experiments import reproduce
from experiments import unbounded_smoothness
from experiments.lab import flags
from experiments.lab import record
from experiments.lab import searching
from experiments.lab import study
from experiments.lab import tuning
from experiments.lab.session import Session
from experiments.methods import bilevel
from experiments.problems import encoders
from experiments.problems import penalties
from experiments.problems import text

WORDS = ('alpha', 'beta', 'gamma', 'delta', 'caf\xe9\x85')


@pytest.fixture
def trec(tmp_path):
  """A folder with small TREC files: the label is a function of the words."""
  random = np.random.RandomState(0)

  def lines(count):
    for i in range(count):
      label = i % 3
      others = random.choice(WORDS[3:], 3)
      yield f'{label} {WORDS[label]} {" ".join(others)} ?\n'

  for stem, count in (('TREC.train.all', 900), ('TREC.test.all', 60)):
    with gzip.open(tmp_path / f'{stem}.gz', 'wb') as file:
      file.write(''.join(lines(count)).encode('latin-1'))
  return tmp_path


def test_loads_padded_latin_1_sentences(trec):
  data = text.load('trec', str(trec), max_length=4)
  assert [len(part.labels) for part in (data.train, data.valid, data.test)] == [
    810, 90, 60,
  ]  # fmt: skip
  assert data.classes == 3
  # Split at spaces: 0x85 is whitespace in Unicode, and ends a word.
  assert sorted(data.vocabulary[2:]) == sorted(
    ['?', 'alpha', 'beta', 'gamma', 'delta', 'caf\xe9']
  )
  first = [WORDS[label] for label in data.train.labels[:20]]
  found = [data.vocabulary[row[0]] for row in data.train.tokens[:20]]
  assert found == first
  longer = text.load('trec', str(trec), max_length=9)
  np.testing.assert_array_equal(longer.train.tokens[:, 5:], text.PAD)
  np.testing.assert_array_equal(longer.train.tokens[:, :4], data.train.tokens)


def test_sentences_are_generated_where_no_folder_is_named(trec):
  data = text.load('auto', '')
  assert data.name == 'generated'
  assert data.classes == 6
  assert text.load('auto', str(trec)).name == 'trec'
  again = text.load('generated', '')
  np.testing.assert_array_equal(data.train.tokens, again.train.tokens)
  # The words tell the topics apart, but not all of them.
  bags = text.bags_of_words(data.train.tokens).matrix(len(data.vocabulary))
  test = text.bags_of_words(data.test.tokens).matrix(len(data.vocabulary))
  model = naive_bayes.MultinomialNB().fit(bags, data.train.labels)
  assert 0.7 < model.score(test, data.test.labels) < 0.97


def test_a_bad_line_or_folder_is_named(trec, tmp_path):
  with (trec / 'TREC.test.all').open('w') as file:
    file.write('0 fine\nno label\n')
  (trec / 'TREC.test.all.gz').unlink()
  with pytest.raises(flags.UserError, match='line 2 is not "label words"'):
    text.load('trec', str(trec))
  with pytest.raises(flags.UserError, match='no such folder'):
    text.load('trec', str(tmp_path / 'missing'))
  with pytest.raises(flags.UserError, match=r'has no file stsa\.binary\.train'):
    text.load('sst2', str(trec))


def test_flips_the_share_to_wrong_labels():
  labels = np.arange(1000, dtype=np.int32) % 6
  noisy, flipped = text.flip(labels, 6, 0.3, seed=1)
  assert flipped.sum() == 300
  np.testing.assert_array_equal(noisy != labels, flipped)
  assert set(noisy) == set(range(6))


def test_bags_have_unit_length_and_a_constant():
  tokens = np.array([[2, 3, 2, 0], [4, 0, 0, 0]], np.int32)
  dense = text.bags_of_words(tokens).matrix(5).toarray()
  root = np.sqrt(5.0)
  expected = [[1.0, 0.0, 2 / root, 1 / root, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0]]
  np.testing.assert_allclose(dense, expected, rtol=1e-6)


@pytest.mark.parametrize('cell', ['gru', 'lstm'])
def test_the_encoder_ignores_padding(cell):
  init, encode = encoders.functional(
    lambda r: encoders.Encoder(9, 4, r, cell=cell)
  )
  params = init(jax.random.key(0))
  tokens = jnp.array([[2, 3, 4], [5, 0, 0]])
  padded = jnp.pad(tokens, ((0, 0), (0, 3)))
  run = jax.jit(encode)
  state = run(params, tokens)
  np.testing.assert_allclose(run(params, padded), state, rtol=0, atol=1e-7)
  assert np.max(np.abs(run(params, tokens.at[1, 0].set(6)) - state)) > 1e-3


def test_budgets_are_equal_calls():
  table = bilevel.methods(lower_steps=4, neumann_steps=3)
  budget = 1000 * table['bo_rep'].calls
  for name, method in table.items():
    steps = method.steps(budget, 5)
    assert steps % 5 == 0
    assert abs(steps * method.calls - budget) <= 5 * method.calls, name
  assert table['soba'].calls == 4
  assert 'saba' not in table
  assert bilevel.methods(4, 3, blocks=(2, 5))['saba'].calls == 4
  assert table['bo_rep'].gradients == 2 + 4 / 2
  assert table['stocbio'].gradients == 2 + 4


def test_a_grid_goes_on_where_its_best_rate_is_at_the_edge():
  grid = [0.1, 0.3, 1.0]
  assert searching.continued(grid, 0.3, 3) == []
  assert searching.continued(grid, 1.0, 2) == [3.33, 11.1]
  assert searching.continued(grid, 0.1, 2) == [0.0333, 0.0111]
  assert searching.continued([0.1], 0.1, 1) == []


def test_a_run_that_diverged_is_never_picked():
  values = [(0.1, 2.0), (0.1, 3.0), (1.0, 1.0), (1.0, np.inf), (3.0, np.nan)]
  grids = []

  def measure(new, grid):
    grids.append(new)
    return values if grid == 0 else [(rate, np.nan) for rate in new]

  found = study.search([0.1, 1.0, 3.0], measure)
  assert found.rate == 0.1
  assert found.values[0.1] == 2.5
  assert found.values[1.0] == found.values[3.0] == np.inf
  # It went on below, where all diverged, and there was no need of more.
  assert len(grids) == 2
  assert max(grids[1]) < 0.1
  assert not found.edge


@pytest.mark.parametrize(
  ('program', 'options', 'message'),
  [
    (hyper_cleaning, {'clean': 500}, '--clean=500: more than half'),
    (
      hyper_cleaning,
      {'clean': 100, 'batch': 64},
      '--clean=100: must be a mult',
    ),
    (hyper_cleaning, {'flipped': (0.1, 1.0)}, '--flipped=1.0: must be below 1'),
    (hyper_cleaning, {'learning_rates': ()}, '--learning_rates is empty'),
    (hyper_cleaning, {'dataset': 'imdb'}, '--dataset=imdb: not one of'),
    (hyper_representation, {'methods': ('saba',)}, '--methods=saba: this'),
    (hyper_representation, {'vectors': 'no.txt'}, '--vectors=no.txt: No such'),
    (hyper_representation, {'l2': 0.0}, '--l2=0.0: must be at least'),
    (hyper_representation, {'shots': 1000}, '--shots=1000: a class has'),
    (hyper_representation, {'min_count': 9999}, '--min_count=9999: no word'),
    (hyperparameter_optimization, {'batch': 7}, '--batch=7: must divide 40'),
    (
      hyperparameter_optimization,
      {'problem': 'text', 'dataset': 'trec', 'data_dir': ''},
      '--data_dir=: no such folder',
    ),
  ],
)
def test_flags_that_make_no_sense_are_said_in_a_line(
  trec, tmp_path, program, options, message
):
  common = {'data_dir': str(trec), 'output_dir': str(tmp_path / 'bad')}
  with pytest.raises(flags.UserError, match=f'^{message}'):
    program.main(program.Config(**common | options))


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('', 'has none of the 2 words of the text'),
    ('x 1 2\n', 'has none of the 2 words of the text'),
    ('a 1\n', 'line 1 has 1 finite numbers, not 2'),
    ('x 1\na 1 nan\n', 'line 2 has 1 finite numbers, not 2'),
    ('a 1 b\n', 'line 1: could not convert'),
  ],
)
def test_word_vectors_are_those_of_the_words(tmp_path, content, message):
  path = tmp_path / 'vectors.txt'
  path.write_text(content)
  with pytest.raises(flags.UserError, match=message):
    hyper_representation.read_vectors(str(path), ['a', 'b'], 2)
  path.write_text('b 3 4\nx 1\n')
  found = hyper_representation.read_vectors(str(path), ['a', 'b'], 2)
  np.testing.assert_array_equal(found[1], [3.0, 4.0])


def test_sentences_of_support_and_query_are_different_ones():
  """Also of a class with fewer than half of the largest one's."""
  labels = np.repeat([0, 1, 2], [40, 9, 2])
  support, query = hyper_representation.halves(labels, [0, 1, 2])
  for label, (one, other) in enumerate(zip(support, query, strict=True)):
    assert not set(one) & set(other)
    assert set(one) | set(other) == set(np.flatnonzero(labels == label))


def ends(folder):
  _, rows = record.read(folder)
  return record.select(rows, 'summary')


@pytest.mark.slow
def test_the_cosh_study_runs_and_draws(tmp_path):
  config = unbounded_smoothness.Config(
    output_dir=str(tmp_path / 'cosh'), learning_rates=(0.03, 0.3), steps=600,
    methods=('bo_rep',), upper_steps=('plain', 'normalized'), seeds=2,
    start=3.0,
  )  # fmt: skip
  with jax.enable_x64(True):
    unbounded_smoothness.main(config)
  rows = {
    (row['upper_step'], row['schedule']): row for row in ends(tmp_path / 'cosh')
  }
  assert len(rows) == 4
  assert rows['normalized', 'cosine']['best_value'] < 0.5
  assert (tmp_path / 'cosh' / 'unbounded_smoothness.png').stat().st_size > 1e4


@pytest.mark.slow
def test_cleaning_finds_the_flipped_labels(trec, tmp_path):
  config = hyper_cleaning.Config(
    output_dir=str(tmp_path / 'clean'), data_dir=str(trec), flipped=(0.3,),
    methods=('bo_rep',), upper_steps=('normalized',), steps=150, seeds=2,
    learning_rates=(1.0, 3.0), batch=64, clean=192,
  )  # fmt: skip
  hyper_cleaning.main(config)
  (row,) = ends(tmp_path / 'clean')
  assert row['auroc'] > 0.95
  assert row['refitted_accuracy'] > 0.95


@pytest.mark.slow
def test_representation_and_penalties_are_learned(trec, tmp_path):
  common = {
    'methods': ('bo_rep',), 'upper_steps': ('normalized',), 'seeds': 2,
  }  # fmt: skip
  config = hyper_representation.Config(
    output_dir=str(tmp_path / 'rep'), data_dir=str(trec), width=8,
    max_length=6, steps=60, learning_rates=(0.3, 1.0), **common,
  )  # fmt: skip
  hyper_representation.main(config)
  (row,) = ends(tmp_path / 'rep')
  assert row['test_accuracy'] > 0.9
  config = hyperparameter_optimization.Config(
    output_dir=str(tmp_path / 'ridge'), steps=400, learning_rates=(0.03, 0.1),
    inner_lr=0.2, dual_lr=0.2, **common,
  )  # fmt: skip
  with jax.enable_x64(True):
    hyperparameter_optimization.main(config)
  _, rows = record.read(tmp_path / 'ridge')
  first = record.select(rows, 'eval', step=0)[0]['regret']
  (row,) = record.select(rows, 'summary')
  assert row['median'] < 0.2 * first


def test_every_program_says_what_a_first_look_takes(
  tmp_path, monkeypatch, capsys
):
  found = {path.stem for path in programs.FOLDER.glob('[!_]*.py')}
  for name in found - {'plot', 'reproduce'}:
    config = importlib.import_module(f'experiments.{name}').Config(quick=True)
    assert config.MINUTES[0] in (1, 2), name
  monkeypatch.setattr(reproduce.stopping, 'run_child', lambda *_: 130)
  config = reproduce.Config(output_dir=str(tmp_path), quick=True)
  with pytest.raises(flags.InterruptedRun, match='go on with --resume'):
    reproduce.main(config)
  assert 'reproduce: about 2 minutes' in capsys.readouterr().err


def test_quick_takes_the_place_of_defaults_alone():
  config = unbounded_smoothness.Config(quick=True)
  assert config.steps == config.QUICK['steps']
  assert unbounded_smoothness.Config(quick=True, steps=2000).steps == 2000
  assert config.is_default()
  assert not unbounded_smoothness.Config(seeds=9).is_default()


@pytest.mark.parametrize('where', ['tuning, grid 1', '"eval"'])
def test_a_study_cut_short_goes_on_where_it_was(tmp_path, where):
  """In the middle of a grid that was continued, or of the last runs."""
  config = hyperparameter_optimization.Config(
    output_dir=str(tmp_path), methods=('saba',), upper_steps=('plain',),
    steps=10, seeds=2, learning_rates=(0.1, 1.0), tuning_seeds=1,
  )  # fmt: skip

  def study(config, problem):
    with Session('hyperparameter_optimization', config) as session:
      tuning.compare(session, config, problem)

  with jax.enable_x64(True):
    problem, *_ = penalties.linear(
      config.problem, config.batch, config.precision
    )
    study(config, problem)
    path = tmp_path / 'record.jsonl'
    whole = record.read(path)[1]
    lines = path.read_text().split('\n')
    # Without the last piece of the runs there.
    found = [i for i, line in enumerate(lines) if where in line]
    cut = max(i for i in found if '"eval"' in lines[i])
    path.write_text('\n'.join(lines[: cut - 1]) + '\n')
    study(dataclasses.replace(config, resume=True), problem)
  resumed = record.read(path)[1]
  assert record.without_times(resumed) == record.without_times(whole)
  assert len(record.select(whole, 'summary')) == 1
