"""What reproduces of the six papers: one table of their claims.

python -m experiments.reproduce [--quick] [--data_dir=FOLDER]
    [--only=cosh,speedup]

Each claim is checked by a reduced run of one of the programs, and judged by a
rule of `lab.claims`. With ``--data_dir`` (TREC and LIBSVM's a8a) the
claims that need text or larger tables are run too. A run that was stopped goes
on where it was with ``--resume``.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys
import textwrap
from typing import NamedTuple

from .lab import claims
from .lab import flags
from .lab import judging
from .lab import launch
from .lab import record
from .lab import stopping
from .lab import tables
from .lab.judging import Claim

GNS, DIFFGRAD, ADADAGRAD, BO_REP, BSVRB, MECO = (
  'Semenov, Jaggi, Doikov', 'Dubey et al.', 'Lau, Liu, Kolar',
  'Hao, Gong, Liu', 'Hu et al.', 'Jiang et al.',
)  # fmt: skip


class Run(NamedTuple):
  """A reduced run of a program, which several claims may read."""

  program: str
  flags: dict[str, str]
  needs_data: bool = False


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
QUICK = ('newton', 'nonlinear', 'landscapes')
# On two cores; of other choices nobody knows.
MINUTES = {QUICK: 'about 2 minutes', tuple(RUNS): 'about 35 minutes'}


@dataclasses.dataclass(frozen=True)
class Config(flags.BareConfig):
  """Flags."""

  quick: bool = flags.flag(False, f'Only {", ".join(QUICK)}: two minutes.')
  output_dir: str = flags.flag('results/reproduce', 'Folder of results.')
  data_dir: str = flags.flag('', 'Folder with TREC and a8a; skipped if empty.')
  only: tuple[str, ...] = flags.flag(
    tuple(RUNS), 'Runs to do.', choices=tuple(RUNS)
  )
  resume: bool = flags.flag(False, 'Go on where a run in output_dir stopped.')

  def __post_init__(self):
    if self.quick and self.only == tuple(RUNS):
      object.__setattr__(self, 'only', QUICK)
    super().__post_init__()


CLAIMS = (
  Claim(GNS, 'A Newton method reaches high accuracy in few steps from any'
        ' start', 'newton', claims.newton_steps),
  Claim(GNS, 'Gauss-Newton and Fisher curvature keep the fast rate', 'newton',
        claims.newton_approximate),
  Claim(GNS, 'It is faster in time than first-order methods', 'newton',
        claims.newton_seconds),
  Claim(GNS, 'It converges on problems that are not convex', 'nonlinear',
        claims.rosenbrock),
  Claim(DIFFGRAD, 'It stops at the global minimum of F1 to F3 where Adam'
        ' overshoots', 'landscapes', claims.diffgrad_minima),
  Claim(DIFFGRAD, 'It classifies better than Adam and SGD with momentum',
        'images', claims.diffgrad_images),
  Claim(ADADAGRAD, 'Growing batches lose no accuracy for as many samples',
        'batches', claims.batches_accuracy),
  Claim(ADADAGRAD, 'They take several times fewer steps', 'batches',
        claims.batches_steps),
  Claim(BO_REP, 'It converges at every rate of two decades under unbounded'
        ' smoothness', 'cosh', claims.cosh_robust),
  Claim(BO_REP, 'Its peers do not, with the same upper step', 'cosh',
        claims.cosh_peers),
  Claim(BO_REP, 'It is no worse than its peers for as many oracle calls:'
        ' penalty of ridge regression', 'ridge',
        claims.against_peers('regret', 'bo_rep, normalized, cosine',
                       [f'{name}, {step}, cosine'
                        for name in ('soba', 'stocbio', 'ttsa')
                        for step in ('normalized', 'plain')])),
  Claim(BO_REP, 'The same: few-shot text', 'few_shot',
        claims.against_peers('test_loss', 'bo_rep, normalized, cosine',
                       [f'{name}, {step}, cosine'
                        for name in ('soba', 'stocbio')
                        for step in ('normalized', 'plain')])),
  Claim(BO_REP, 'It finds the sentences with wrong labels', 'cleaning',
        claims.cleaning),
  Claim(BSVRB, 'Iterations fall with the number of sampled blocks', 'speedup',
        claims.speedup_blocks),
  Claim(BSVRB, 'They fall with the rows of a block', 'speedup',
        claims.speedup_rows),
  Claim(BSVRB, 'Learned weights beat equal ones on spoiled labels', 'spoiled',
        claims.spoiled),
  Claim(BSVRB, 'Top-K thresholds rank better than pointwise and listwise'
        ' losses', 'ranking', claims.ranking),
  Claim(MECO, 'It beats NCE on densities in the plane', 'plane', claims.plane),
  Claim(MECO, 'The moving average makes few noise samples enough',
        'few_noise', claims.few_noise),
  Claim(MECO, 'It learns where the landscape of NCE is flat', 'far_mean',
        claims.far_mean),
  Claim(MECO, 'It detects what is out of distribution', 'ood', claims.ood),
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
    return '', judging.NOT_RUN
  return claim.judge(
    record.read(pathlib.Path(config.output_dir) / claim.run)[1]
  )


def main(config: Config) -> None:
  """Runs the programs, judges the claims, writes the table."""
  chosen = [
    name for name in config.only if config.data_dir or not RUNS[name].needs_data
  ]
  top = pathlib.Path(config.output_dir)
  told = MINUTES.get(config.only)
  took = f'{told} on two cores; ' if told else ''
  print(f'reproduce: {took}results go to {top.absolute()}', file=sys.stderr)
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
