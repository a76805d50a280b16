"""Programs killed at random moments and resumed, until they are done.

By SIGINT, SIGTERM and SIGKILL in turn, five times each program, also with files
damaged while it is dead, and on another mesh; run by ``make crash-test``. What
counts is that the record of the killed run has the numbers of one that was left
alone, and that the signals that can be heard are answered with the way on.
"""

import gzip
import itertools
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.lab import record
from experiments.lab import stopping

pytestmark = pytest.mark.crash
ROOT = pathlib.Path(__file__).parents[2]
KILLS = 5  # Of each program, 80 and more in all.
SIGNALS = (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)

PROGRAMS = {
  'logistic_regression': (
    '--dataset=breast_cancer', '--optimizers=gns,lbfgs,gradient_descent',
    '--curvature=exact,gauss_newton', '--l2=1e-3', '--max_steps=60',
  ),
  'softmax_regression': (
    '--optimizers=gns,lbfgs', '--curvature=exact', '--l2=1e-2',
    '--max_steps=20',
  ),
  'nonlinear_equations': (
    '--problem=chebyshev', '--dimension=50', '--optimizers=gns,lbfgs',
    '--curvature=exact,gauss_newton',
  ),
  'synthetic_functions': (
    '--steps=100', '--seeds=3', '--functions=F1,F3',
    '--optimizers=diffgrad,adam,sgd',
  ),
  'image_classification': (
    '--model=logistic', '--epochs=4', '--batches=16,norm:1',
    '--learning_rates=0.01,0.1', '--microbatch=16', '--tuning_seeds=1',
    '--seeds=2',
  ),
  'unbounded_smoothness': (
    '--steps=400', '--learning_rates=0.01,0.1', '--seeds=2',
    '--methods=bo_rep,soba',
  ),
  'hyperparameter_optimization': (
    '--steps=200', '--learning_rates=0.03,0.1,0.3', '--seeds=2',
    '--tuning_seeds=1', '--methods=bo_rep,soba',
  ),
  'multi_block_hyperparameters': (
    '--dataset=breast_cancer', '--num_blocks=10', '--blocks=3', '--rows=8',
    '--steps=200', '--looks=10', '--seeds=2',
    '--learning_rates=1,10', '--inner_lrs=0.1,0.3', '--methods=bsvrb_v2,frozen',
  ),
  'parallel_speedup': (
    '--num_blocks=10', '--blocks=2,5', '--rows=1', '--learning_rates=0.1,0.2',
    '--inner_lrs=0.1', '--steps=200', '--seeds=2', '--target=1e-6',
  ),
  'ranking': (
    '--queries=20', '--documents=15', '--features=4', '--hidden=3',
    '--blocks=5', '--top=5', '--steps=100', '--looks=5',
    '--learning_rates=0.01', '--seeds=2', '--methods=bsvrb_v2,pointwise',
  ),
  'density_estimation': (
    '--sets=8gaussians', '--methods=meco,nce', '--steps=300', '--seeds=2',
    '--learning_rates=0.01',
  ),
  'ood_detection': (
    '--steps=100', '--batch=32', '--hidden=16', '--components=3', '--seeds=1',
  ),
  'image_generation': (
    '--steps=100', '--batch=32', '--hidden=16', '--components=3', '--seeds=1',
  ),
  'hyper_cleaning': (
    '--flipped=0.3', '--methods=bo_rep', '--upper_steps=normalized',
    '--steps=60', '--seeds=2', '--learning_rates=1,3', '--batch=64',
    '--clean=192', '--tuning_seeds=1',
  ),
  'hyper_representation': (
    '--methods=bo_rep', '--upper_steps=normalized', '--seeds=2', '--width=8',
    '--max_length=6', '--steps=60', '--learning_rates=0.3,1',
    '--tuning_seeds=1',
  ),
  'compare': (
    '--problem=blocks', '--methods=bsvrb_v2', '--budget=2000', '--seeds=2',
    '--learning_rates=0.01,0.1', '--tuning_seeds=1',
  ),
}  # fmt: skip


TEXT = ('hyper_cleaning', 'hyper_representation')


@pytest.fixture(scope='module', autouse=True)
def heard():
  """What a shell's background job starts would not hear of SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture(scope='module')
def sentences(tmp_path_factory):
  """A folder with small TREC files: the label is a function of the words."""
  folder = tmp_path_factory.mktemp('trec')
  random_words = np.random.RandomState(0)
  for stem, count in (('TREC.train.all', 900), ('TREC.test.all', 60)):
    lines = [
      f'{i % 3} word{i % 3} {" ".join(random_words.choice(list("abcd"), 3))}\n'
      for i in range(count)
    ]
    with gzip.open(folder / f'{stem}.gz', 'wt') as file:
      file.writelines(lines)
  return folder


def launch(program, folder, sentences, *arguments):
  more = [f'--data_dir={sentences}'] if program in TEXT else []
  return subprocess.Popen(
    [
      sys.executable, '-m', f'experiments.{program}', *PROGRAMS[program],
      f'--output_dir={folder}', '--checkpoint_every=0', *more, *arguments,
    ],
    cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def numbers(folder):
  """The rows of a record without times, as text; NaN equals NaN."""
  rows = record.without_times(record.read(folder)[1])
  return [json.dumps(row) for row in rows]


def damage(folder, random_numbers):
  """What a crash of the machine may leave: a cut line, a cut checkpoint."""
  path = folder / 'record.jsonl'
  with path.open('a') as file:
    file.write('{"kind": "eval", "method": "a", "see')
  checkpoints = sorted(folder.glob('checkpoints/*/*'), key=str)
  if checkpoints:
    for file in random_numbers.choice(checkpoints).rglob('*'):
      if file.is_file():
        file.write_bytes(file.read_bytes()[:10])


@pytest.mark.parametrize('program', PROGRAMS)
def test_a_killed_run_resumes_to_the_same_numbers(program, tmp_path, sentences):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  began = time.perf_counter()
  process = launch(program, whole, sentences)
  errors = process.communicate()[1]
  assert process.returncode == 0, errors
  seconds = time.perf_counter() - began

  moments = random.Random(f'{program} 0')
  numbers_of_signals = itertools.cycle(SIGNALS)
  kills, attempts = 0, 0
  while kills < KILLS:
    attempts += 1
    assert attempts < 4 * KILLS, 'the run ends before it can be killed'
    begun = (killed / 'record.jsonl').exists()
    more = ['--resume'] if begun else []
    process = launch(program, killed, sentences, *more)
    # From the imports on; resumed runs are shorter.
    try:
      _, errors = process.communicate(
        timeout=moments.uniform(0.2, 0.9) * seconds
      )
    except subprocess.TimeoutExpired:
      number = next(numbers_of_signals)
      asked = time.perf_counter()
      process.send_signal(number)
      _, errors = process.communicate()
      assert time.perf_counter() - asked < 30.0
      kills += 1
      if process.returncode == stopping.STATUS:
        assert 'Traceback' not in errors
        assert (
          'start it again' in errors
          or 'go on with --resume' in errors
          or ('the record is whole' in errors)
        ), errors
      else:  # Before the first import, or at the end: it may be too late.
        assert process.returncode in (-number, 0), errors
      if kills % 2 and (killed / 'record.jsonl').exists():
        damage(killed, moments)
    else:
      assert process.returncode == 0, errors
      assert numbers(killed) == numbers(whole)
      (killed / 'record.jsonl').unlink()  # It came to its end: begin anew.
  if not (killed / 'record.jsonl').exists():
    return
  process = launch(program, killed, sentences, '--resume')
  errors = process.communicate()[1]
  assert process.returncode == 0, errors
  assert numbers(killed) == numbers(whole)


def test_a_killed_run_goes_on_on_other_devices(
  tmp_path, monkeypatch, sentences
):
  """Eight, then four, then one: equal but for rounding."""
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
  program, where = 'multi_block_hyperparameters', ('data=4,blocks=2', 'data=4')
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  process = launch(program, whole, sentences)
  process.communicate()
  assert process.returncode == 0
  for i, mesh in enumerate((*where, '')):
    more = ['--resume'] if i else []
    process = launch(program, killed, sentences, f'--mesh={mesh}', *more)
    if mesh:
      # Beyond what there was: before, it has nothing to go on with.
      path = killed / 'record.jsonl'
      rows = lambda path=path: path.exists() and path.read_bytes().count(b'\n')
      begun = rows()
      while process.poll() is None:
        if rows() > begun + 4:
          process.send_signal(signal.SIGTERM)
          break
        time.sleep(0.02)
    process.communicate()
    assert process.returncode in ((stopping.STATUS, 0) if mesh else (0,))
  found, expected = (
    record.select(record.read(folder)[1], 'eval') for folder in (killed, whole)
  )
  assert len(found) == len(expected)
  for row, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(row['test'], other['test'], rtol=1e-3)
