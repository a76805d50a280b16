"""What is said of numbers: one statistic, one table, one profile."""

from collections.abc import Iterable, Sequence
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from . import plots
from . import record
from . import tables


def last(rows: Iterable[dict], method: str) -> list[dict]:
  """The rows of a method's last evaluation."""
  found = record.select(rows, 'eval', method=method)
  step = max((row['step'] for row in found), default=0)
  return [row for row in found if row['step'] == step]


class Paired(NamedTuple):
  """Differences within the seeds: their mean, an interval, and what it says.

  A tie is an interval that holds zero, and no proof that the two are equal.
  """

  mean: float
  low: float
  high: float
  said: str


def paired(
  differences: Sequence[float] | np.ndarray, small: float = 0.0
) -> Paired:
  """The mean of differences with its 95 % interval, by Student's t.

  Args:
    differences: Of a method from the first one, by seed; more is worse.
    small: What rounding leaves, which is no difference.

  Returns:
    `Paired`, which says ``better``, ``worse`` or ``tie``, and nothing of fewer
    than two seeds or of numbers that are not finite.
  """
  values = np.asarray(differences, float)
  if len(values) < 2 or not np.all(np.isfinite(values)):
    mean = float(np.mean(values)) if len(values) else math.nan
    return Paired(mean, math.nan, math.nan, '-')
  mean = float(np.mean(values))
  error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
  half = float(stats.t.ppf(0.975, len(values) - 1)) * error
  low, high = mean - half, mean + half
  # Nor is what rounding leaves of equal differences.
  small = max(small, 1e-12 * float(np.max(np.abs(values), initial=0.0)))
  said = 'worse' if low > small else 'better' if high < -small else 'tie'
  return Paired(mean, low, high, said)


def spread(ends: Sequence[dict], name: str) -> dict[str, float]:
  """Median and range of a field over the seeds."""
  values = [end[name] for end in ends]
  return {
    name: float(np.median(values)),
    f'{name}_low': float(np.min(values)),
    f'{name}_high': float(np.max(values)),
  }


def rounding(rows: Iterable[dict], method: str, name: str) -> float:
  """The rounding of a field, by the most that it was at a method's start."""
  start = [
    abs(row.get(name, 0.0))
    for row in record.select(rows, 'eval', method=method, step=0)
  ]
  most = max([value for value in start if math.isfinite(value)], default=0.0)
  return float(jnp.finfo(jnp.result_type(float)).eps) * most


def summary(
  ends: Sequence[dict],
  first: Sequence[dict],
  name: str,
  *,
  more: bool = False,
  small: float = 0.0,
) -> dict[str, Any]:
  """A field over the seeds, and its differences from another method's.

  Args:
    ends: The last rows of a method, one a seed.
    first: Those of the method that it is compared with, by the same seeds.
    name: The field.
    more: Whether more of it is better.
    small: What rounding leaves, which is no difference.

  Returns:
    ``median``, ``low``, ``high`` of the field; ``gap`` with its interval and
    ``verdict``, positive where it is worse; ``wins`` and ``losses`` by seed.
  """
  sign = -1.0 if more else 1.0

  def values(rows):
    found = sign * np.array([row[name] for row in rows], float)
    return np.where(np.isnan(found), np.inf, found)

  mine, theirs = values(ends), values(first)
  with np.errstate(invalid='ignore'):
    gaps = paired(mine - theirs, small)
  ordered = np.sort(sign * mine)
  return {
    'median': float(np.median(ordered)),
    'low': float(ordered[0]),
    'high': float(ordered[-1]),
    'gap': gaps.mean,
    'gap_low': gaps.low,
    'gap_high': gaps.high,
    'verdict': gaps.said,
    'wins': int(np.sum(mine < theirs - small)),
    'losses': int(np.sum(mine > theirs + small)),
  }


def rate(row: dict) -> str:
  """The rates of a summary row, with a mark at the edge of the grid."""
  if row['learning_rate'] is None:
    return '-'
  inner = '' if row['inner_lr'] is None else f', {row["inner_lr"]:g}'
  return f'{row["learning_rate"]:g}{inner}{" *" if row["edge"] else ""}'


def _gap(row: dict) -> str:
  if row['verdict'] == '-' or math.isnan(row['gap_low']):
    return '-'
  return f'{row["gap_low"]:+.1e} to {row["gap_high"]:+.1e}'


def _digits(value: float) -> str:
  """Four digits, which tell close methods apart."""
  if not math.isfinite(value):
    return tables.number(value)
  return f'{value:.4g}'


def show(
  title: str,
  value: str,
  rows: Sequence[dict],
  *,
  target: float | None = None,
  reported: Sequence[str] = (),
) -> None:
  """Prints the table of a study, one line a method.

  Args:
    title: Above it.
    value: What the value is.
    rows: Summary rows; with several problems their names stand before.
    target: What counts as solved, or ``None``.
    reported: Other fields, shown by their medians and ranges.
  """
  several = len({row['problem'] for row in rows}) > 1
  first = rows[0]
  columns = ['method', 'rate', 'median', 'low', 'high', 'updates']
  columns += ['95 % of the gap', 'verdict', 'won, lost']
  lines = [
    [
      f'{row["problem"]}: {row["variant"]}' if several else row['variant'],
      rate(row),
      *(_digits(row[name]) for name in ('median', 'low', 'high')),
      row['updates'],
      _gap(row),
      row['verdict'],
      f'{row["wins"]}, {row["losses"]}' if row is not first else '-',
    ]
    for row in rows
  ]
  said = ''
  if target is not None:
    columns.append('to target')
    said = f'; calls to a value of {target:g}'
    for row, line in zip(rows, lines, strict=True):
      there = math.isfinite(row['reached'])
      line.append(row['reached'] if there else 'not reached')
  for name in reported:
    columns.append(name.replace('_', ' '))
    for row, line in zip(rows, lines, strict=True):
      low, high = _digits(row[f'{name}_low']), _digits(row[f'{name}_high'])
      line.append(f'{_digits(row[name])} ({low} to {high})')
  tables.show(
    f'{title}: {value}; an asterisk is a rate at the edge of the grid; gap: the'
    f' mean of how much worse it is than {rows[0]["variant"]} by seed, with its'
    f' 95 % interval{said}',
    columns,
    lines,
  )


def profile(
  rows: Iterable[dict], methods: Sequence[str]
) -> dict[str, np.ndarray]:
  """How many times the calls of the best a method takes to the target.

  Args:
    rows: Summary rows of several problems.
    methods: The methods.

  Returns:
    By method one ratio a problem, at least 1, sorted; infinite where it does
    not get there. The share of those below tau is its performance profile
    (Dolan and More, 2002).
  """
  calls: dict[str, dict[str, float]] = {}
  for row in rows:
    calls.setdefault(row['problem'], {})[row['method']] = row['reached']
  found: dict[str, list[float]] = {method: [] for method in methods}
  for by_method in calls.values():
    best = min(by_method.values())
    for method in methods:
      own = by_method.get(method, math.inf)
      solved = math.isfinite(own) and math.isfinite(best)
      # A start that is at the target already took nothing.
      found[method].append(
        max(own, 1.0) / max(best, 1.0) if solved else math.inf
      )
  return {method: np.sort(ratios) for method, ratios in found.items()}


def show_profile(rows: Sequence[dict], methods: Sequence[str]) -> None:
  """Prints the aggregate over the problems."""
  ratios = profile(rows, methods)
  share = lambda method, most: float(np.mean(ratios[method] <= most))
  tables.show(
    f'{len(next(iter(ratios.values())))} problems: the share on which a method'
    ' reaches the target within so many times the calls of the best one',
    ['method', 'best', '2 times', '10 times', 'at all'],
    [
      [method, *(f'{share(method, m):.2f}' for m in (1.0, 2.0, 10.0, 1e300))]
      for method in sorted(
        methods, key=lambda name: (-share(name, 2.0), -share(name, 1e300))
      )
    ],
  )


def draw_profile(
  rows: Sequence[dict], methods: Sequence[str], path: Any, name: str
) -> None:
  """The performance profile of a set of problems, the first method in bold."""
  ratios = profile(rows, methods)
  count = len(next(iter(ratios.values())))
  finite = [r for v in ratios.values() for r in v if math.isfinite(r)]
  end = 1.1 * max(finite, default=2.0)
  figure, axes = plt.subplots(figsize=(7.2, 4.2), layout='constrained')
  for i, (method, values) in enumerate(ratios.items()):
    x = np.append(values[np.isfinite(values)], end)
    y = np.minimum(np.arange(1, len(x) + 1), len(x) - 1) / len(values)
    axes.step(
      np.append(1.0, x), np.append(0.0, y), '-' if i < 10 else '--',
      where='post', label=method, color=f'C{i % 10}', lw=1.2 if i else 2.5,
    )  # fmt: skip
  axes.set(
    title=f'{name}: performance profile of {count} problems',
    xscale='log', ylim=(0, 1.05), ylabel='share of the problems',
    xlabel='calls to the target, times those of the best method',
  )  # fmt: skip
  figure.legend(fontsize=8, loc='outside right upper')
  axes.grid(alpha=0.3)
  plots.save(figure, path)
