"""Programs killed at random moments and resumed, until they are done.

At least 50 kills over the programs; run by ``make crash-test``. What counts is
that the record of the killed run has the numbers of one that was left alone.
"""

import json
import pathlib
import random
import subprocess
import sys
import time

import pytest

from experiments.lab import record

pytestmark = pytest.mark.crash
ROOT = pathlib.Path(__file__).parents[2]
KILLS = 4  # Of each program.

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
    '--steps=200', '--tuning_steps=100', '--looks=10', '--seeds=2',
    '--learning_rates=1,10', '--inner_lrs=0.1,0.3', '--methods=bsvrb_v2,frozen',
  ),
  'parallel_speedup': (
    '--num_blocks=10', '--blocks=2,5', '--rows=1', '--learning_rates=0.1,0.2',
    '--inner_lrs=0.1', '--steps=200', '--seeds=2', '--target=1e-6',
  ),
  'ranking': (
    '--queries=20', '--documents=15', '--features=4', '--hidden=3',
    '--blocks=5', '--top=5', '--steps=100', '--tuning_steps=20', '--looks=5',
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
  'compare': (
    '--problem=blocks', '--methods=bsvrb_v2', '--budget=2000', '--seeds=2',
    '--learning_rates=0.01,0.1', '--tuning_seeds=1',
  ),
}  # fmt: skip


def launch(program, folder, *arguments):
  return subprocess.Popen(
    [
      sys.executable, '-m', f'experiments.{program}', *PROGRAMS[program],
      f'--output_dir={folder}', '--checkpoint_every=0', *arguments,
    ],
    cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def numbers(folder):
  """The rows of a record without times, as text; NaN equals NaN."""
  rows = record.without_times(record.read(folder)[1])
  return [json.dumps(row) for row in rows]


@pytest.mark.parametrize('program', PROGRAMS)
def test_a_killed_run_resumes_to_the_same_numbers(program, tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  began = time.perf_counter()
  process = launch(program, whole)
  errors = process.communicate()[1]
  assert process.returncode == 0, errors
  seconds = time.perf_counter() - began

  moments = random.Random(f'{program} 0')
  kills, attempts = 0, 0
  while kills < KILLS:
    attempts += 1
    assert attempts < 4 * KILLS, 'the run ends before it can be killed'
    begun = (killed / 'record.jsonl').exists()
    process = launch(program, killed, *(['--resume'] if begun else []))
    # Resumed runs are shorter, and the first seconds are imports.
    try:
      _, errors = process.communicate(
        timeout=moments.uniform(0.2, 0.9) * seconds
      )
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      kills += 1
    else:
      assert process.returncode == 0, errors
      assert numbers(killed) == numbers(whole)
      (killed / 'record.jsonl').unlink()  # It came to its end: begin anew.
  if not (killed / 'record.jsonl').exists():
    return
  process = launch(program, killed, '--resume')
  errors = process.communicate()[1]
  assert process.returncode == 0, errors
  assert numbers(killed) == numbers(whole)
