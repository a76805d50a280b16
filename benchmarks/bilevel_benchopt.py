"""optlab's estimators in benchopt/benchmark_bilevel, beside its own solvers.

pip install benchopt
git clone https://github.com/benchopt/benchmark_bilevel
BENCHMARK_BILEVEL=benchmark_bilevel python -m benchmarks.bilevel_benchopt SABA

One solver of `BATCHES` after the other, each in a process of its own, so that
the memory is that of one; those named, or all. Lines come as they are known.
Its `simulated` quadratics, 100 unknowns below and 10 above. All solvers draw as
many samples. Its own take its published best rates; ours, which are not tuned,
those of its SABA. SOBA, which it publishes no rates of, has its default.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np

from experiments.lab import tables

BATCH, BUDGET, LOOKS = 64, 2**20, 4
INNER, OUTER, PERIOD = 8192, 1024, 72
# Batches that a step draws, of both levels; SRBA's full looks too.
BATCHES = {
  'optlab[soba]': 2, 'optlab[saba]': 2, f'optlab[srba-{PERIOD}]': 4,
  'optlab[mrbo]': 2, 'optlab[bo_rep-5]': 4.5, 'optlab[stocbio]': 12,
  'optlab[ttsa]': 3, 'optlab[implicit]': 12, 'optlab[unrolled]': 12,
  'optlab[f2sa]': 12, 'SOBA': 2, 'SABA': 2, 'SRBA': 4, 'AmIGO': 22, 'MRBO': 12,
  'StocBiO': 22, 'F2SA': 33,
}  # fmt: skip
# config/quadratics_021424_best_params.yml.
PUBLISHED = {
  'SABA': 'outer_ratio=1.0,step_size=0.1',
  'SRBA': 'outer_ratio=1.0,period_frac=0.5,step_size=0.1',
  'AmIGO': 'outer_ratio=0.1,step_size=0.01',
  'MRBO': 'eta=0.5,outer_ratio=0.1,step_size=0.1',
  'StocBiO': 'outer_ratio=1.0,step_size=0.1',
  'F2SA': 'delta_lmbda=0.01,outer_ratio=1.0,step_size=0.1',
}
PLAIN = 'outer_ratio=1.0,step_size=0.1'
SEEDS = (1,)
DATA = (
  'simulated[L_cross_inner=0.1,L_cross_outer=0.1,mu_inner=[.1],'
  f'n_samples_inner=[{INNER}],n_samples_outer=[{OUTER}],dim_inner=100,'
  'dim_outer=10]'
)


def run(folder, name, solvers):
  """Benchopt's last values: solver and its parameters to numbers by seed."""
  import pandas

  lines = ['objective:', '  - Bilevel Optimization', 'dataset:', f'  - {DATA}',
           'solver:', *(f'  - {solver}' for solver in solvers),
           'n-repetitions: 1', f'max-runs: {LOOKS}', 'timeout: 3000',
           f'output: {name}']  # fmt: skip
  (folder / f'{name}.yml').write_text('\n'.join(lines) + '\n')
  for old in (folder / 'outputs').glob(f'{name}*.parquet'):
    old.unlink()
  command = ['benchopt', 'run', '.', '--config', f'{name}.yml', '--no-plot',
             '--no-html', '-n', str(LOOKS)]  # fmt: skip
  here = pathlib.Path(__file__).parent.parent
  path = f'{here}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
  subprocess.run(
    command, cwd=folder, check=True, env={**os.environ, 'PYTHONPATH': path},
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  rows = pandas.read_parquet(folder / 'outputs' / f'{name}.parquet')
  found = {}
  for _, row in rows[rows.stop_val == rows.stop_val.max()].iterrows():
    label, _, rest = row.solver_name.partition('[')
    chosen = dict(part.split('=') for part in rest.rstrip(']').split(','))
    seed = int(chosen.pop('random_state'))
    if 'estimator' in chosen:
      label = f'optlab[{chosen["estimator"]}]'
    key = label, tuple(chosen.items())
    found.setdefault(key, {})[seed] = row.objective_value
  return found


def asked(label, options, seeds):
  """A solver in the words of a configuration."""
  steps = round(BUDGET / LOOKS / BATCH / BATCHES[label])
  name, _, estimator = label.partition('[')
  if estimator:
    options = f'estimator={estimator.rstrip("]")},{options}'
  return f'{name}[{options},eval_freq={steps},random_state={list(seeds)}]'


def main(names=()) -> None:
  source = os.environ.get('BENCHMARK_BILEVEL')
  if not source or shutil.which('benchopt') is None:
    print(f'skipped: it needs what {__file__} says', file=sys.stderr)
    return
  folder = pathlib.Path(source).resolve()
  solver = (
    pathlib.Path(__file__).parent / 'benchopt_bilevel' / 'optlab_solver.py'
  )
  shutil.copy(solver, folder / 'solvers')
  solvers = [(label, PUBLISHED.get(label, PLAIN)) for label in BATCHES]
  solvers.append(('optlab[soba]', f'{PLAIN},exponent=0.5'))
  rows = []
  for each in solvers:
    if names and each[0] not in names:
      continue
    try:
      ends = run(folder, 'compared', [asked(*each, SEEDS)])
    except (OSError, subprocess.CalledProcessError) as error:
      print(f'{each[0]}: it diverged, or benchopt failed: {error}',
            file=sys.stderr)  # fmt: skip
      continue
    for (label, chosen), values in ends.items():
      decays = dict(chosen).get('exponent', '0.0') != '0.0'
      rows.append((np.median([*values.values()]), label, decays))
      print(f'{label}{", decaying" * decays} {rows[-1][0]:.1e}', flush=True)
  tables.show(
    f'benchmark_bilevel, simulated quadratics, {INNER} and {OUTER} samples;'
    f' squared hypergradient norm after {BUDGET} samples, {len(SEEDS)} seed(s)',
    ('solver', 'value'),
    [
      (label + ', decaying' * decays, f'{middle:.1e}')
      for middle, label, decays in sorted(rows)
    ],
  )


if __name__ == '__main__':
  main(sys.argv[1:])
