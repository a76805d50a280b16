"""The program that compares anything with anything."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from experiments import compare
from experiments.lab import contests
from experiments.lab import flags
from experiments.lab import record


@pytest.fixture
def config(tmp_path):
  return compare.Config(
    output_dir=str(tmp_path / 'run'), problem='blocks',
    methods=('bsvrb_v2', 'rsvrb'), budget=400.0,
    learning_rates=(1e-3, 0.1), seeds=3, tuning_seeds=1, precision='float32',
  )  # fmt: skip


def test_tunes_runs_pairs_and_draws(config, capsys):
  compare.main(config)
  shown = capsys.readouterr().out
  _, rows = record.read(config.output_dir)
  summaries = {row['method']: row for row in record.select(rows, 'summary')}
  assert list(summaries) == ['bsvrb_v2', 'rsvrb']
  for method, summary in summaries.items():
    ends = record.select(rows, 'eval', method=method, step=compare.PIECES)
    assert [row['seed'] for row in ends] == [0, 1, 2]
    # Equal calls: ten blocks a step, 400 in all.
    assert [row['calls'] for row in ends] == [400.0] * 3
    assert [row['updates'] for row in ends] == [40] * 3
    starts = record.select(rows, 'eval', method=method, step=0)
    assert ends[0]['value'] < starts[0]['value']
    tuned = record.select(
      rows, 'eval', method=f'{method}: tuning 10000', step=compare.PIECES
    )
    best = min(tuned, key=lambda row: row['tuning'])
    assert ends[0]['learning_rate'] == pytest.approx(best['learning_rate'])
    assert summary['learning_rate'].endswith(
      '*'
    )  # Both rates are edges of the grid.
  values = [
    [row['value'] for row in record.select(
      rows, 'eval', method=method, step=compare.PIECES
    )]
    for method in summaries
  ]  # fmt: skip
  wins = sum(a < b for a, b in zip(*values, strict=True))
  assert summaries['rsvrb']['wins'] == f'{wins} of 3'
  assert 'sampled blocks' in shown
  assert 'compare.png' in shown


@pytest.mark.parametrize(
  ('problem', 'method', 'match'),
  [
    ('blocks', 'adam', 'not one of bsvrb_v1'),
    ('ridge', 'bo_rep:lion', 'upper steps'),
    ('density', 'sgd', 'not one of meco'),
    ('images', 'softmax', 'neither optlab nor optax'),
    ('images', 'MultiSteps', 'neither optlab nor optax'),
  ],
)
def test_unknown_methods_are_refused(problem, method, match):
  with pytest.raises(flags.UserError, match=match):
    contests.PROBLEMS[problem]().entry(method)


def test_any_optimizer_of_optax_is_a_method():
  tx, ones = contests.optimizer('sign_sgd')(0.5), jnp.ones(2)
  updates, _ = tx.update(3.0 * ones, tx.init(ones), ones)
  assert updates.tolist() == [-0.5, -0.5]


def test_a_record_can_be_repeated_and_a_difference_is_found(tmp_path):
  """In processes of their own, as users do."""

  def launch(*arguments):
    return subprocess.run(
      [sys.executable, '-m', 'experiments.synthetic_functions', *arguments],
      capture_output=True,
      text=True,
      check=False,
    )

  first, again = tmp_path / 'first', tmp_path / 'again'
  ran = launch(f'--output_dir={first}', '--steps=10', '--seeds=2')
  assert ran.returncode == 0, ran.stderr
  ran = launch(f'--repeat={first}', f'--output_dir={again}')
  assert ran.returncode == 0, ran.stderr
  header, rows = record.read(again)
  assert header['config']['steps'] == 10
  assert f'repeated: {len(rows)} rows with the same numbers' in ran.stdout

  # Other flags beside it would not be those of the record.
  ran = launch(f'--repeat={first}', f'--output_dir={again}', '--steps=20')
  assert ran.returncode == 1
  assert '--repeat takes the flags of the record, not --steps=20' in ran.stderr

  path = first / 'record.jsonl'
  lines = path.read_text().splitlines()
  row = json.loads(lines[1])
  assert row['kind'] == 'eval'
  lines[1] = json.dumps(row | {'seed': 17})
  path.write_text('\n'.join(lines) + '\n')
  ran = launch(f'--repeat={first}', f'--output_dir={again}')
  assert ran.returncode == 1
  assert 'row 2 differs: seed was 17, is 0' in ran.stderr
  assert 'Traceback' not in ran.stderr
