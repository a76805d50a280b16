"""What reproduces of the six papers: one table of their claims.

python -m experiments.reproduce [--data_dir=FOLDER] [--only=cosh,speedup]

Each claim is checked by a reduced run of one of the programs, and judged by a
rule that is written here. With ``--data_dir`` (TREC and LIBSVM's a8a) the
claims that need text or larger tables are run too. A run that was stopped goes
on where it was with ``--resume``.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib
import sys
import textwrap
from typing import NamedTuple

import numpy as np

from .lab import flags
from .lab import launch
from .lab import record
from .lab import stopping
from .lab import tables
from .lab import verdicts

GNS, DIFFGRAD, ADADAGRAD, BO_REP, BSVRB, MECO = (
  'Semenov, Jaggi, Doikov', 'Dubey et al.', 'Lau, Liu, Kolar',
  'Hao, Gong, Liu', 'Hu et al.', 'Jiang et al.',
)  # fmt: skip
HOLDS, PARTLY, NOT, NOT_RUN = 'holds', 'partly', 'not', 'not run'
Rows = list[dict]


class Run(NamedTuple):
  """A reduced run of a program, which several claims may read."""

  program: str
  flags: dict[str, str]
  needs_data: bool = False


class Claim(NamedTuple):
  """A claim of a paper, and the rule by which a run decides it."""

  paper: str
  claim: str
  run: str
  judge: Callable[[Rows], tuple[str, str]]  # (number, verdict)


RUNS = {
  'newton': Run(
    'logistic_regression',
    {'optimizers': 'gns,lbfgs,gradient_descent,sklearn_lbfgs', 'seeds': '1'},
  ),
  'nonlinear': Run(
    'nonlinear_equations',
    {'problem': 'rosenbrock', 'optimizers': 'gns,lbfgs,gradient_descent'},
  ),
  'landscapes': Run('synthetic_functions', {}),
  'images': Run(
    'image_classification',
    {
      'optimizers': 'diffgrad,adam,sgd', 'batches': '32',
      'learning_rates': '0.0003,0.001,0.003,0.01,0.03,0.1', 'epochs': '10',
    },
  ),
  'batches': Run(
    'image_classification',
    {
      'batches': '8,32,128,norm:1,inner:0.5,augmented:1',
      'learning_rates': '0.03,0.1,0.3',
    },
  ),
  'cosh': Run(
    'unbounded_smoothness',
    {
      'methods': 'bo_rep,soba', 'upper_steps': 'plain,normalized',
      'learning_rates': '0.01,0.03,0.1,0.3,1',
    },
  ),
  'ridge': Run(
    'hyperparameter_optimization',
    {'methods': 'bo_rep,soba,stocbio,ttsa', 'steps': '2000', 'seeds': '3'},
  ),
  'few_shot': Run(
    'hyper_representation',
    {
      'methods': 'bo_rep,soba,stocbio', 'seeds': '3',
      'tuning_seeds': '1',
    },
    needs_data=True,
  ),
  'cleaning': Run(
    'hyper_cleaning',
    {
      'methods': 'bo_rep,soba', 'flipped': '0.4', 'l2': '1e-5', 'seeds': '3',
      'upper_steps': 'normalized', 'tuning_seeds': '1',
    },
    needs_data=True,
  ),
  'speedup': Run(
    'parallel_speedup', {'blocks': '10,100', 'rows': '1,8'}
  ),
  'spoiled': Run(
    'multi_block_hyperparameters',
    {
      'dataset': 'a8a', 'methods': 'bsvrb_v2,frozen', 'keep_positive': '0.3',
      'flip': '0.2', 'seeds': '3',
    },
    needs_data=True,
  ),
  'ranking': Run('ranking', {'seeds': '3'}),
  'plane': Run(
    'density_estimation',
    {
      'sets': '8gaussians,pinwheel,moons', 'seeds': '3', 'steps': '1000',
      'learning_rates': '0.01,0.02',
    },
  ),
  'few_noise': Run(
    'density_estimation',
    {
      'sets': '8gaussians', 'noises': 'gaussian', 'sampling': 'independent',
      'methods': 'meco,snis', 'noise_rows': '16', 'seeds': '3',
      'learning_rates': '0.01,0.02',
    },
  ),
  'far_mean': Run(
    'density_estimation',
    {
      'problem': 'mean', 'distances': '16', 'methods': 'meco_ratio,meco,nce',
      'decay': 'inverse', 'learning_rates': '0.01,0.04,0.3', 'seeds': '3',
    },
  ),
  'ood': Run('ood_detection', {'seeds': '3'}),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(flags.BareConfig):
  """Flags."""

  output_dir: str = flags.flag('results/reproduce', 'Folder of results.')
  data_dir: str = flags.flag('', 'Folder with TREC and a8a; skipped if empty.')
  only: tuple[str, ...] = flags.flag(
    tuple(RUNS), 'Runs to do.', choices=tuple(RUNS)
  )
  resume: bool = flags.flag(False, 'Go on where a run in output_dir stopped.')


def ends(rows: Rows, method: str, field: str) -> np.ndarray:
  """A field at the end of a method's runs, one a seed; not a number is inf."""
  values = [row[field] for row in verdicts.last(rows, method)]
  return np.nan_to_num(np.array(values, float), nan=np.inf, posinf=np.inf)


def median(rows: Rows, method: str, field: str) -> float:
  """Over the seeds, at the end."""
  return float(np.median(ends(rows, method, field)))


def summary(rows: Rows, **fields: str) -> dict:
  """The last summary with these fields."""
  return record.select(rows, 'summary', **fields)[-1]


def grade(holds: bool, partly: bool = False) -> str:
  """The verdict of a rule."""
  return HOLDS if holds else PARTLY if partly else NOT


# Each rule returns the number that it judges, and its verdict.


def _newton_steps(rows: Rows) -> tuple[str, str]:
  ours = summary(rows, method='gns, exact')
  descent = summary(rows, method='gradient descent')
  steps = f'{ours["step"]} steps, gradient descent {descent["step"]}'
  steps += '' if descent['reached'] else ' and not there'
  return steps, grade(ours['reached'] and 10 * ours['step'] < descent['step'])


def _newton_approximate(rows: Rows) -> tuple[str, str]:
  exact, *others = (
    summary(rows, method=f'gns, {name}')
    for name in ('exact', 'gauss_newton', 'fisher', 'empirical_fisher')
  )
  numbers = (
    'steps: exact {}, Gauss-Newton {}, Fisher {}, empirical Fisher {}'.format(
      *(row['step'] for row in (exact, *others))
    )
  )
  good = [row['reached'] and row['step'] <= 2 * exact['step'] for row in others]
  return numbers, grade(all(good), any(good))


def _newton_seconds(rows: Rows) -> tuple[str, str]:
  ours = min(
    row['seconds']
    for row in record.select(rows, 'summary')
    if row['method'].startswith('gns') and row['reached']
  )
  others = {
    row['method']: row['seconds']
    for row in record.select(rows, 'summary')
    if not row['method'].startswith('gns') and row['reached']
  }
  name = min(others, key=lambda name: others[name])
  numbers = f'{1e3 * ours:.1f} ms, {name} {1e3 * others[name]:.1f} ms'
  return numbers, grade(ours < others[name])


def _rosenbrock(rows: Rows) -> tuple[str, str]:
  ours = summary(rows, method='gns, exact')
  return (
    f'{ours["step"]} steps to {ours["suboptimality"]:.0e}',
    grade(ours['reached']),
  )


def _diffgrad_minima(rows: Rows) -> tuple[str, str]:
  found = {
    (row['function'], row['optimizer']): row['at_minimum']
    for row in record.select(rows, 'minimum')
  }
  functions = sorted({function for function, _ in found})
  shares = [
    (found[function, 'diffgrad'], found[function, 'adam'])
    for function in functions
  ]
  numbers = '; '.join(
    f'{function} {ours:.0%} of starts, Adam {theirs:.0%}'
    for function, (ours, theirs) in zip(functions, shares, strict=True)
  )
  return numbers, grade(
    all(ours == 1.0 for ours, _ in shares)
    and all(ours > theirs for ours, theirs in shares),
    any(ours > theirs for ours, theirs in shares),
  )


def _diffgrad_images(rows: Rows) -> tuple[str, str]:
  gaps = {
    name: ends(rows, 'diffgrad, 32', 'test_accuracy')
    - ends(rows, f'{name}, 32', 'test_accuracy')
    for name in ('adam', 'sgd')
  }
  numbers = '; '.join(
    f'{100 * np.mean(gap):+.2f} points to {name}, {np.sum(gap > 0)} of'
    f' {len(gap)} seeds'
    for name, gap in gaps.items()
  )
  better = [np.mean(gap) > 0 for gap in gaps.values()]
  return numbers, grade(all(better), any(better))


def _batches_accuracy(rows: Rows) -> tuple[str, str]:
  found = [
    row
    for row in record.select(rows, 'comparison')
    if row['against'].startswith('best')
  ]
  numbers = '; '.join(
    f'{row["batches"]} {100 * row["accuracy_gap"]:+.2f} points' for row in found
  )
  good = [row['accuracy_gap'] >= 0 for row in found]
  return f'{numbers}; {found[0]["against"]}', grade(all(good), any(good))


def _batches_steps(rows: Rows) -> tuple[str, str]:
  found = {
    row['batches']: row['steps_ratio']
    for row in record.select(rows, 'comparison')
    if row['against'].startswith('best')
  }
  numbers = '; '.join(f'{name} {ratio:.0f}' for name, ratio in found.items())
  return f'times fewer: {numbers}', grade(min(found.values()) > 2)


def _highest(rows: Rows, estimator: str, upper_step: str) -> tuple[float, ...]:
  """Highest value over rates from 0.03 to 1: median of the seeds, and worst."""
  row = summary(
    rows, estimator=estimator, upper_step=upper_step, schedule='cosine'
  )
  return row['wide_median'], row['wide_worst']


def _cosh_robust(rows: Rows) -> tuple[str, str]:
  ours, worst = _highest(rows, 'bo_rep', 'normalized')
  plain, _ = _highest(rows, 'bo_rep', 'plain')
  return (
    f'highest median {ours:.2g} (worst seed {worst:.2g}); plain {plain:.2g}',
    grade(ours < 0.05 < plain, ours < 0.05),
  )


def _cosh_peers(rows: Rows) -> tuple[str, str]:
  ours, _ = _highest(rows, 'bo_rep', 'normalized')
  theirs, _ = _highest(rows, 'soba', 'normalized')
  return (
    f'highest median {ours:.2g}; SOBA with the same step {theirs:.2g}',
    grade(ours < 0.05 <= theirs),
  )


def _against_peers(field, ours, peers):
  """Medians, and in how many peers ours is no worse; less is better."""

  def judge(rows: Rows) -> tuple[str, str]:
    mine = median(rows, ours, field)
    found = {name: median(rows, name, field) for name in peers}
    best = min(found, key=lambda name: found[name])
    good = [mine <= 1.01 * value for value in found.values()]
    return (
      f'{field} {mine:.3g}, best peer ({best.replace(", cosine", "")})'
      f' {found[best]:.3g}; no worse than {sum(good)} of {len(good)}',
      grade(all(good), any(good)),
    )

  return judge


def _cleaning(rows: Rows) -> tuple[str, str]:
  found = summary(rows, method='bo_rep, normalized, cosine')
  auroc = found['auroc']
  return f'AUROC of the weights {auroc:.2f} at {found["problem"]}', grade(
    auroc > 0.8, auroc > 0.6
  )


def _times_fewer(rows: Rows, few: str, many: str) -> float:
  """Steps of one cell over those of another; 0 where one is not there."""
  found = [
    summary(rows, method=name)['steps_to_target'] for name in (few, many)
  ]
  return found[0] / found[1] if np.all(np.isfinite(found)) else 0.0


def _speedup_blocks(rows: Rows) -> tuple[str, str]:
  ratio = _times_fewer(rows, 'I=10 B=1', 'I=100 B=1')
  return f'{ratio:.1f} times fewer for I = 100 than 10', grade(
    ratio >= 5, ratio > 1.5
  )


def _speedup_rows(rows: Rows) -> tuple[str, str]:
  ratio = _times_fewer(rows, 'I=10 B=1', 'I=10 B=8')
  return f'{ratio:.1f} times fewer for B = 8 than 1', grade(
    ratio >= 1.5, ratio > 1
  )


def _spoiled(rows: Rows) -> tuple[str, str]:
  ours, frozen = (median(rows, name, 'test') for name in ('bsvrb_v2', 'frozen'))
  return f'test loss {ours:.3f}, equal weights {frozen:.3f}', grade(
    ours < frozen
  )


def _ranking(rows: Rows) -> tuple[str, str]:
  names = ('bsvrb_v2', 'listwise', 'pointwise')
  values = [median(rows, name, 'ndcg10') for name in names]
  numbers = ', '.join(
    f'{name} {value:.3f}' for name, value in zip(names, values, strict=True)
  )
  better = [values[0] > value for value in values[1:]]
  return f'NDCG@10 {numbers}', grade(all(better), any(better))


def _plane(rows: Rows) -> tuple[str, str]:
  found = {
    row['problem']: row for row in record.select(rows, 'summary', method='nce')
  }
  said = [row['verdict'] for row in found.values()]
  numbers = '; '.join(
    f'{name} {row["gap"]:+.4f} ({row["verdict"]})'
    for name, row in found.items()
  )
  return f'NCE minus MECO: {numbers}', grade(
    all(word == 'worse' for word in said),
    'better' not in said and 'worse' in said,
  )


def _few_noise(rows: Rows) -> tuple[str, str]:
  ours, alone = (
    summary(rows, method=method)['median'] for method in ('meco', 'snis')
  )
  return (
    f'{ours:.3f}, gamma = 1 {alone:.3f}: {alone / ours:.0f} times',
    grade(alone >= 10 * ours, alone > ours),
  )


def _far_mean(rows: Rows) -> tuple[str, str]:
  found = {
    method: summary(rows, method=method)['median']
    for method in ('meco_ratio', 'meco', 'nce')
  }
  numbers = ', '.join(f'{name} {value:.2g}' for name, value in found.items())
  ours, plain, nce = found.values()
  return f'error from a distance of 16: {numbers}', grade(
    max(ours, plain) < 0.005 < nce, ours < 0.005 < nce
  )


def _ood(rows: Rows) -> tuple[str, str]:
  found: dict[str, list[float]] = {}
  for row in record.select(rows, 'auroc'):
    found.setdefault(row['method'], []).append(row['auroc'])
  middle = {name: float(np.median(values)) for name, values in found.items()}
  ours = middle.pop('meco')
  numbers = ', '.join(f'{name} {value:.3f}' for name, value in middle.items())
  better = [ours >= value for value in middle.values()]
  return f'AUROC {ours:.3f}; {numbers}', grade(all(better), any(better))


CLAIMS = (
  Claim(GNS, 'A Newton method reaches high accuracy in few steps from any'
        ' start', 'newton', _newton_steps),
  Claim(GNS, 'Gauss-Newton and Fisher curvature keep the fast rate', 'newton',
        _newton_approximate),
  Claim(GNS, 'It is faster in time than first-order methods', 'newton',
        _newton_seconds),
  Claim(GNS, 'It converges on problems that are not convex', 'nonlinear',
        _rosenbrock),
  Claim(DIFFGRAD, 'It stops at the global minimum of F1 to F3 where Adam'
        ' overshoots', 'landscapes', _diffgrad_minima),
  Claim(DIFFGRAD, 'It classifies better than Adam and SGD with momentum',
        'images', _diffgrad_images),
  Claim(ADADAGRAD, 'Growing batches lose no accuracy for as many samples',
        'batches', _batches_accuracy),
  Claim(ADADAGRAD, 'They take several times fewer steps', 'batches',
        _batches_steps),
  Claim(BO_REP, 'It converges at every rate of two decades under unbounded'
        ' smoothness', 'cosh', _cosh_robust),
  Claim(BO_REP, 'Its peers do not, with the same upper step', 'cosh',
        _cosh_peers),
  Claim(BO_REP, 'It is no worse than its peers for as many oracle calls:'
        ' penalty of ridge regression', 'ridge',
        _against_peers('regret', 'bo_rep, normalized, cosine',
                       [f'{name}, {step}, cosine'
                        for name in ('soba', 'stocbio', 'ttsa')
                        for step in ('normalized', 'plain')])),
  Claim(BO_REP, 'The same: few-shot text', 'few_shot',
        _against_peers('test_loss', 'bo_rep, normalized, cosine',
                       [f'{name}, {step}, cosine'
                        for name in ('soba', 'stocbio')
                        for step in ('normalized', 'plain')])),
  Claim(BO_REP, 'It finds the sentences with wrong labels', 'cleaning',
        _cleaning),
  Claim(BSVRB, 'Iterations fall with the number of sampled blocks', 'speedup',
        _speedup_blocks),
  Claim(BSVRB, 'They fall with the rows of a block', 'speedup', _speedup_rows),
  Claim(BSVRB, 'Learned weights beat equal ones on spoiled labels', 'spoiled',
        _spoiled),
  Claim(BSVRB, 'Top-K thresholds rank better than pointwise and listwise'
        ' losses', 'ranking', _ranking),
  Claim(MECO, 'It beats NCE on densities in the plane', 'plane', _plane),
  Claim(MECO, 'The moving average makes few noise samples enough',
        'few_noise', _few_noise),
  Claim(MECO, 'It learns where the landscape of NCE is flat', 'far_mean',
        _far_mean),
  Claim(MECO, 'It detects what is out of distribution', 'ood', _ood),
)  # fmt: skip


def command(run: Run, config: Config, folder: pathlib.Path) -> list[str]:
  """The command line of a run; what was begun is resumed."""
  flags = run.flags | {'output_dir': str(folder)}
  if run.needs_data:
    flags |= {'data_dir': config.data_dir}
  line = [sys.executable, '-m', 'optlab', run.program]
  line += [f'--{name}={value}' for name, value in flags.items()]
  if config.resume and (folder / 'record.jsonl').exists():
    line.append('--resume')
  return line


def check(claim: Claim, config: Config, ran: Sequence[str]) -> tuple[str, str]:
  """The number and the verdict of a claim."""
  if claim.run not in ran:
    return '', NOT_RUN
  return claim.judge(
    record.read(pathlib.Path(config.output_dir) / claim.run)[1]
  )


def main(config: Config) -> None:
  """Runs the programs, judges the claims, writes the table."""
  chosen = [
    name for name in config.only if config.data_dir or not RUNS[name].needs_data
  ]
  top = pathlib.Path(config.output_dir)
  for i, name in enumerate(chosen):
    folder = top / name
    folder.mkdir(parents=True, exist_ok=True)
    line = command(RUNS[name], config, folder)
    print(f'{i + 1}/{len(chosen)} {" ".join(line[1:])}', file=sys.stderr)
    status = stopping.run_child(line, folder / 'output.txt')
    if status == stopping.STATUS:
      raise flags.InterruptedRun('interrupted; go on with --resume')
    if status:
      raise flags.UserError(
        f'the run {name} failed; see above and {folder / "output.txt"}'
      )
  table = []
  for claim in CLAIMS:
    number, said = check(claim, config, chosen)
    table.append((claim.paper, claim.claim, claim.run, number, said))
  heads = ('paper', 'claim', 'run', 'number', 'verdict')
  lines = [heads, ('---',) * len(heads), *table]
  (top / 'claims.md').write_text(
    ''.join(f'| {" | ".join(line)} |\n' for line in lines)
  )
  (top / 'claims.json').write_text(
    json.dumps(
      {
        'versions': record.versions(),
        'runs': {name: RUNS[name]._asdict() for name in chosen},
        'claims': [dict(zip(heads, row, strict=True)) for row in table],
      },
      indent=1,
    )
  )
  tables.show(
    'Claims of the six papers',
    ('claim', 'verdict', 'number'),
    [
      (textwrap.fill(f'{paper}: {claim}', 34), said, textwrap.fill(number, 28))
      for paper, claim, _, number, said in table
    ],
  )
  print(f'{top / "claims.md"}')


if __name__ == '__main__':
  launch.run(main, Config)
