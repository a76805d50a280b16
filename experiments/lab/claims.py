"""The rules by which a run decides a claim of a paper."""

import numpy as np

from . import record
from . import verdicts
from .judging import Rows
from .judging import against
from .judging import all_worse
from .judging import gap_of
from .judging import grade
from .judging import interval
from .judging import median
from .judging import summary

# Each rule returns the number that it judges, and its verdict.


def newton_steps(rows: Rows) -> tuple[str, str]:
  """Ten times fewer steps than gradient descent."""
  ours = summary(rows, method='gns, exact')
  descent = summary(rows, method='gradient descent')
  steps = f'{ours["step"]} steps, gradient descent {descent["step"]}'
  steps += '' if descent['reached'] else ' and not there'
  return steps, grade(ours['reached'] and 10 * ours['step'] < descent['step'])


def newton_approximate(rows: Rows) -> tuple[str, str]:
  """At most twice the steps of the exact Hessian."""
  exact, *others = (
    summary(rows, method=f'gns, {name}')
    for name in ('exact', 'gauss_newton', 'fisher', 'empirical_fisher')
  )
  words = 'steps: exact {}, Gauss-Newton {}, Fisher {}, empirical Fisher {}'
  numbers = words.format(*(row['step'] for row in (exact, *others)))
  good = [row['reached'] and row['step'] <= 2 * exact['step'] for row in others]
  return numbers, grade(all(good), any(good))


def newton_seconds(rows: Rows) -> tuple[str, str]:
  """Less time than the fastest other solver."""
  there = [row for row in record.select(rows, 'summary') if row['reached']]
  found = {row['method']: row['seconds'] for row in there}
  ours = min(s for name, s in found.items() if name.startswith('gns'))
  others = {n: s for n, s in found.items() if not n.startswith('gns')}
  name = min(others, key=lambda name: others[name])
  numbers = f'{1e3 * ours:.1f} ms, {name} {1e3 * others[name]:.1f} ms'
  return numbers, grade(ours < others[name])


def rosenbrock(rows: Rows) -> tuple[str, str]:
  """The target is reached."""
  ours = summary(rows, method='gns, exact')
  return (
    f'{ours["step"]} steps to {ours["suboptimality"]:.0e}',
    grade(ours['reached']),
  )


def diffgrad_minima(rows: Rows) -> tuple[str, str]:
  """All starts end at the minimum, and more than of Adam."""
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


def diffgrad_images(rows: Rows) -> tuple[str, str]:
  """Both are worse, by the interval."""
  gaps = {
    name: against(
      rows, 'diffgrad, 32', f'{name}, 32', 'test_accuracy', more=True
    )
    for name in ('adam', 'sgd')
  }
  numbers = '; '.join(
    f'{100 * gap.mean:+.2f} points to {name} ({interval(gap, 100)})'
    for name, gap in gaps.items()
  )
  return numbers, all_worse([gap.said for gap in gaps.values()])


def against_best(rows: Rows) -> Rows:
  """What growing batches are beside the best constant one."""
  return [
    row
    for row in record.select(rows, 'comparison')
    if row['against'].startswith('best')
  ]


def batches_accuracy(rows: Rows) -> tuple[str, str]:
  """Less than 0.3 points below the best constant batch, by the interval."""
  found = against_best(rows)
  numbers = '; '.join(
    f'{row["batches"]} {100 * row["accuracy_gap"]:+.2f} points'
    f' ({100 * row["accuracy_gap_low"]:+.2f} to'
    f' {100 * row["accuracy_gap_high"]:+.2f})'
    for row in found
  )
  good = [row['accuracy_gap_low'] > -0.003 for row in found]
  return f'{numbers}; {found[0]["against"]}', grade(all(good), any(good))


def batches_steps(rows: Rows) -> tuple[str, str]:
  """More than two times fewer steps than the best constant batch."""
  found = {row['batches']: row['steps_ratio'] for row in against_best(rows)}
  numbers = '; '.join(f'{name} {ratio:.0f}' for name, ratio in found.items())
  return f'times fewer: {numbers}', grade(
    min(found.values()) > 2, max(found.values()) > 2
  )


def highest(rows: Rows, estimator: str, upper_step: str) -> tuple[float, ...]:
  """Highest value over rates from 0.03 to 1: median of the seeds, and worst."""
  row = summary(
    rows, estimator=estimator, upper_step=upper_step, schedule='cosine'
  )
  return row['wide_median'], row['wide_worst']


def cosh_robust(rows: Rows) -> tuple[str, str]:
  """Solved at every rate, where plain steps are not."""
  ours, worst = highest(rows, 'bo_rep', 'normalized')
  plain, _ = highest(rows, 'bo_rep', 'plain')
  return (
    f'highest median {ours:.2g} (worst seed {worst:.2g}); plain {plain:.2g}',
    grade(ours < 0.05 < plain, ours < 0.05),
  )


def cosh_peers(rows: Rows) -> tuple[str, str]:
  """Solved at every rate, where SOBA is not."""
  ours, _ = highest(rows, 'bo_rep', 'normalized')
  theirs, _ = highest(rows, 'soba', 'normalized')
  return (
    f'highest median {ours:.2g}; SOBA with the same step {theirs:.2g}',
    grade(ours < 0.05 <= theirs),
  )


def against_peers(field, ours, peers):
  """Medians, and in how many peers ours is no worse; less is better."""

  def judge(rows: Rows) -> tuple[str, str]:
    mine = median(rows, ours, field)
    found = {name: median(rows, name, field) for name in peers}
    best = min(found, key=lambda name: found[name])
    good = [mine <= 1.01 * value for value in found.values()]
    return (
      f'{field} {mine:.3g}, best peer ({best.replace(", cosine", "")})'
      f' {found[best]:.3g} ({interval(against(rows, ours, best, field))}); no'
      f' worse than {sum(good)} of {len(good)}',
      grade(all(good), any(good)),
    )

  return judge


def cleaning(rows: Rows) -> tuple[str, str]:
  """The weights part right from wrong labels."""
  found = summary(rows, method='bo_rep, normalized, cosine')
  auroc = found['auroc']
  return f'AUROC of the weights {auroc:.2f} at {found["problem"]}', grade(
    auroc > 0.8, auroc > 0.6
  )


def times_fewer(rows: Rows, few: str, many: str) -> float:
  """Steps of one cell over those of another; 0 where one is not there."""
  found = [
    summary(rows, method=name)['steps_to_target'] for name in (few, many)
  ]
  return found[0] / found[1] if np.all(np.isfinite(found)) else 0.0


def speedup_blocks(rows: Rows) -> tuple[str, str]:
  """At least five times fewer steps for ten times the blocks."""
  ratio = times_fewer(rows, 'I=10 B=1', 'I=100 B=1')
  return f'{ratio:.1f} times fewer for I = 100 than 10', grade(
    ratio >= 5, ratio > 1.5
  )


def speedup_rows(rows: Rows) -> tuple[str, str]:
  """At least 1.5 times fewer steps for eight times the rows."""
  ratio = times_fewer(rows, 'I=10 B=1', 'I=10 B=8')
  return f'{ratio:.1f} times fewer for B = 8 than 1', grade(
    ratio >= 1.5, ratio > 1
  )


def spoiled(rows: Rows) -> tuple[str, str]:
  """Equal weights are worse, by the interval."""
  ours, frozen = (median(rows, name, 'test') for name in ('bsvrb_v2', 'frozen'))
  gap = against(rows, 'bsvrb_v2', 'frozen', 'test')
  return (
    f'test loss {ours:.3f}, equal weights {frozen:.3f} ({interval(gap)})',
    all_worse([gap.said]),
  )


def ranking(rows: Rows) -> tuple[str, str]:
  """Both losses are worse, by the interval."""
  ours, said = 'bsvrb_v2', []
  numbers = f'NDCG@10 {ours} {median(rows, ours, "ndcg10"):.3f}'
  for name in ('listwise', 'pointwise'):
    gap = against(rows, ours, name, 'ndcg10', more=True)
    value = median(rows, name, 'ndcg10')
    numbers += f', {name} {value:.3f} ({interval(gap)})'
    said.append(gap.said)
  return numbers, all_worse(said)


def plane(rows: Rows) -> tuple[str, str]:
  """NCE is worse, by the interval, on all sets."""
  found = {
    row['problem']: row for row in record.select(rows, 'summary', method='nce')
  }
  said = [row['verdict'] for row in found.values()]
  numbers = '; '.join(
    f'{name} {row["gap"]:+.4f}'
    f' ({row["gap_low"]:+.4f} to {row["gap_high"]:+.4f})'
    for name, row in found.items()
  )
  return f'NCE minus MECO: {numbers}', all_worse(said)


def few_noise(rows: Rows) -> tuple[str, str]:
  """A tenth of the divergence without the average."""
  average, single = (
    summary(rows, method=method) for method in ('meco', 'snis')
  )
  ours, alone = average['median'], single['median']
  return (
    f'{ours:.3f}, gamma = 1 {alone:.3f} ({interval(gap_of(single))}):'
    f' {alone / ours:.0f} times',
    grade(alone >= 10 * ours, alone > ours),
  )


def far_mean(rows: Rows) -> tuple[str, str]:
  """It arrives, and NCE does not."""
  found = {
    method: summary(rows, method=method)
    for method in ('meco_ratio', 'meco', 'nce')
  }
  numbers = ', '.join(
    f'{name} {row["median"]:.2g}'
    + ('' if row['verdict'] == '-'
       else f' ({interval(gap_of(row))})')
    for name, row in found.items()
  )  # fmt: skip
  ours, plain, nce = (row['median'] for row in found.values())
  return f'error from a distance of 16: {numbers}', grade(
    max(ours, plain) < 0.005 < nce, ours < 0.005 < nce
  )


def ood(rows: Rows) -> tuple[str, str]:
  """No lower an AUROC than any other score, in the median."""
  found: dict[str, list[float]] = {}
  for row in record.select(rows, 'auroc'):
    found.setdefault(row['method'], []).append(row['auroc'])
  ours = np.array(found.pop('meco'))
  gaps = {
    name: verdicts.paired(ours - np.array(values))
    for name, values in found.items()
  }
  numbers = ', '.join(
    f'{name} {np.median(found[name]):.3f} ({interval(gap)})'
    for name, gap in gaps.items()
  )
  good = [np.median(ours) >= np.median(values) for values in found.values()]
  return f'AUROC {np.median(ours):.3f}; {numbers}', grade(all(good), any(good))
