"""The language model: text, a causal transformer, the comparison."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import language_modeling
from experiments.lab import flags
from experiments.problems import characters
import optlab

LETTERS = 'abcdefgh '


@pytest.fixture(name='folder')
def text_folder(tmp_path):
  rng = np.random.default_rng(0)
  words = [''.join(rng.choice(list(LETTERS), 5)) for _ in range(20)]
  (tmp_path / 'text.txt').write_text(' '.join(rng.choice(words, 300)))
  return tmp_path


def test_windows_do_not_overlap_and_are_held_out(folder):
  text = characters.load(str(folder), 8, 10)
  whole = np.concatenate([text.train, text.valid, text.test])
  raw = (folder / 'text.txt').read_text()
  back = ''.join(text.alphabet[i] for i in whole.reshape(-1))
  assert raw.startswith(back)
  assert len(text.valid) == len(text.test) == 10
  assert len(raw) - len(back) < 9
  with pytest.raises(flags.UserError, match='windows of 8 characters'):
    characters.load(str(folder), 8, 100)
  with pytest.raises(flags.UserError, match='other: no file, nor'):
    characters.load(str(folder / 'other'), 8, 10)
  name, python = characters.read('')
  assert name == 'the Python reference'
  assert len(python) > 400_000


def test_subwords_spell_the_text(folder):
  raw = (folder / 'text.txt').read_text()
  text = characters.load(str(folder), 8, 10, 40)
  assert len(text.alphabet) == 40
  whole = np.concatenate([text.train, text.valid, text.test])
  assert raw.startswith(''.join(text.alphabet[i] for i in whole.reshape(-1)))
  # Fewer than the characters; no pair that occurs once.
  assert whole.size < 0.8 * len(raw)
  used, _ = characters.encode('aaaaa aaaa b' * 2, 50)
  assert list(used) == list(characters.encode('aaaaa aaaa b' * 2, 50)[0])
  alphabet = characters.encode('aaaaa aaaa b' * 2, 50)[1]
  assert alphabet[:5] == (' ', 'a', 'b', characters.OTHER, 'aa')
  assert ''.join(alphabet[i] for i in used) == 'aaaaa aaaa b' * 2
  assert len(alphabet) < 50


def test_the_transformer_sees_the_past_alone_and_its_norms_are_exact():
  model = characters.model(5, 6, 8, 2, 2, 0.2)
  params = model.start(jax.random.key(0))
  rows = jax.random.randint(jax.random.key(1), (3, 7), 0, 5)
  keys = jax.random.split(jax.random.key(2), 3)
  losses, logits = jax.jit(model.losses), jax.jit(model.logits)
  full = losses(params, rows)
  now, later = (
    logits(params, r[:, :-1]) for r in (rows, rows.at[:, 3].add(1) % 5)
  )
  np.testing.assert_allclose(now[:, :3], later[:, :3], 1e-5)
  assert np.all(np.any(now[:, 3:] != later[:, 3:], -1))
  # Dropout has a mask for each row.
  noisy = losses(params, rows, keys)
  mixed = losses(params, rows.at[0].set(rows[2]), keys.at[2].set(keys[0]))
  np.testing.assert_allclose(noisy[1], mixed[1], 1e-5)
  np.testing.assert_allclose(mixed[0], mixed[2], 1e-5)
  assert not np.allclose(noisy, full)

  @jax.jit
  def norms(params, rows):
    state = optlab.losses.LossState(jnp.int32(0), (), keys[0])
    return [
      optlab.per_example(model.losses, route, has_key=True)
      .estimate(params, state, rows)[0]
      .extras['sum_sq_diff_norm']
      for route in (optlab.ghost_norms, optlab.batches.vmap_grads)
    ]

  np.testing.assert_allclose(*norms(params, rows), 1e-4)


@pytest.mark.slow
def test_the_program_compares_batches_at_equal_tokens(folder, tmp_path, capsys):
  config = language_modeling.Config(
    data_dir=str(folder / 'text.txt'), output_dir=str(tmp_path / 'run'),
    optimizers=('adamw',), batches=('4', 'ramp', 'noise'), tokens=1600,
    length=8, width=8, layers=1, first_size=2, largest_size=16, microbatch=4,
    held=10, learning_rates=(0.01,), seeds=1, tuning_seeds=0,
  )  # fmt: skip
  language_modeling.main(config)
  printed = capsys.readouterr().out
  assert max(map(len, printed.splitlines())) <= 80 or str(tmp_path) in printed
  rows = [
    json.loads(line)
    for line in (tmp_path / 'run' / 'record.jsonl').read_text().splitlines()
  ]
  summary = {row['method']: row for row in rows if row['kind'] == 'summary'}
  assert list(summary) == ['adamw:4', 'adamw:ramp', 'adamw:noise']
  for row in summary.values():
    assert 1600 <= row['calls'] < 1600 + 16 * 8
    assert np.isfinite(row['median'])
  assert summary['adamw:4']['updates'] == 50
  targets = {row['method']: row for row in rows if row['kind'] == 'target'}
  # It ends within half a percent of its own end.
  assert 0 < targets['adamw:4']['tokens'] <= 1600
  assert 0 < targets['adamw:4']['steps'] <= 50
  assert (tmp_path / 'run' / 'language_modeling.png').stat().st_size > 1000


def test_group_means_take_a_step(folder):
  """By shapes alone."""
  config = language_modeling.Config(
    data_dir=str(folder), length=8, width=8, layers=1, held=10,
    optimizers=('adagrad',), batches=('means',),
    largest_size=32,
  )  # fmt: skip
  text = characters.load(config.data_dir, config.length, config.held)
  language_modeling.check(config, text)
  problem = language_modeling.make_problem(config, text)

  entry = problem.entry(problem.methods[0])

  def run(key):
    start = entry.start(key, 0.1, 0, problem.data)
    return start, entry.step(start, key, 0.1, problem.data)

  start, after = jax.eval_shape(run, jax.random.key(0))
  assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, after)


def test_bad_flags(folder):
  given = {'data_dir': str(folder), 'length': 8, 'held': 10}
  for wrong, match in (
    ({'heads': 3}, '--heads=3: must divide'),
    ({'batches': ('half',)}, '--batches=half: not a size of'),
    ({'batches': ('0',)}, '--batches=0: not a size of'),
    ({'first_size': 200}, '--largest_size=128: must be --first_size=200'),
    ({'decay': 1.0}, 'must be below 1'),
  ):
    config = language_modeling.Config(**given, **wrong)
    with pytest.raises(flags.UserError, match=match):
      text = characters.load(config.data_dir, config.length, config.held)
      language_modeling.check(config, text)
