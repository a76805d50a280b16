"""Draws records: one line a method, with the spread over its seeds.

python -m experiments.plot RECORD... overlays any records, each a file or the
folder of a run. What is drawn comes from the records alone.
"""

from collections.abc import Callable, Sequence
import contextlib
import itertools
import math
import pathlib
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
import matplotlib.pyplot as plt
import numpy as np

from . import flags
from . import record

mpl.use('Agg')

LABELS = {
  'gradients': 'gradients',
  'products': 'Hessian-vector products',
  'samples': 'samples',
  'seconds': 'seconds (compilation excluded)',
  'solves': 'linear solves',
  'step': 'steps',
  'suboptimality': 'f - f*',
}
_STYLES = ('-', '--', '-.', ':')


def get(row: dict[str, Any], name: str) -> float:
  """A field of a row; ``calls`` may be the sum of gradients and products."""
  if name == 'calls' and name not in row:
    counts = [row.get('gradients'), row.get('products')]
    return sum(count for count in counts if count is not None)
  value = row.get(name)
  if value is not None and not isinstance(value, (int, float)):
    raise flags.UserError(
      f'{name} is {value!r} in a row of {row.get("method")}: no number to draw'
    )
  return math.nan if value is None else value


def axis_label(name: str, rows: Sequence[dict]) -> str:
  """What stands beside an axis; of calls, what they are in these rows."""
  if name == 'calls':
    newton = any('products' in row for row in rows)
    return 'oracle calls' + newton * ' (gradients + Hessian-vector products)'
  return LABELS.get(name, name)


def curves(
  rows: Sequence[dict], method: str, x: str, y: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Median x and y, and lowest and highest y, of a method's seeds by step.

  Args:
    rows: Rows of a record.
    method: The method's name.
    x: Field on the x axis.
    y: Field on the y axis.

  Returns:
    Four arrays with one entry a step.
  """
  by_step: dict[int, list[dict]] = {}
  for row in record.select(rows, 'eval', method=method):
    by_step.setdefault(row['step'], []).append(row)
  points = np.empty((0, 4))
  for step in sorted(by_step):
    xs = [get(row, x) for row in by_step[step]]
    ys = [get(row, y) for row in by_step[step]]
    row = [np.median(xs), np.median(ys), np.min(ys), np.max(ys)]
    points = np.vstack([points, row])
  return points[:, 0], points[:, 1], points[:, 2], points[:, 3]


def methods(rows: Sequence[dict]) -> list[str]:
  """The methods of a record, in order."""
  found = (row['method'] for row in rows if row['kind'] == 'eval')
  return list(dict.fromkeys(found))


def reported(method: str) -> bool:
  """Whether it is no trial of rates."""
  return ': tuning' not in method


def save(
  figure: plt.Figure, path: str | pathlib.Path, *, title: str | None = None
) -> None:
  """Writes a picture whole or not at all, and closes it."""
  if title:
    figure.suptitle(title)
  both = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
  for axis in both:
    _choose_ticks(axis)
  figure.draw_without_rendering()  # Now labels have places.
  for axis in both:
    _thin_ticks(axis)
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}')
  try:
    figure.savefig(
      temporary, format=path.suffix[1:], dpi=150, bbox_inches='tight'
    )
    temporary.replace(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise flags.UserError(f'{path}: {error.strerror}') from error
  finally:
    plt.close(figure)


def _choose_ticks(axis: Any) -> None:
  """Numbers on a logarithmic axis where powers of ten are too few.

  On a linear one 200k and 1M: a power of ten beside it runs into its label.
  """
  low, high = axis.get_view_interval()
  if axis.get_scale() != 'log':
    if axis.get_scale() == 'linear' and max(abs(low), abs(high)) >= 1e5:
      axis.set_major_formatter(ticker.EngFormatter(sep=''))
    return
  if high < 100.0 * low:
    axis.set_major_locator(
      ticker.LogLocator(subs=(1.0, 2.0, 5.0))
      if high > 10.0 * low
      else ticker.MaxNLocator(4)  # LogLocator's own here is far too dense.
    )
    axis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axis.set_minor_formatter(ticker.NullFormatter())


def band(
  axes: plt.Axes, x: Any, middle: Any, low: Any, high: Any, *,
  style: str = '-', color: Any = None, label: str = '',
  bold: bool = False, **kwargs: Any,
) -> None:  # fmt: skip
  """A line with the range around it."""
  (line,) = axes.plot(
    x, middle, style, color=color, label=label, lw=2.2 if bold else 1.2,
    **kwargs,
  )  # fmt: skip
  axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, lw=0)


def legend_right(figure: plt.Figure, axes: plt.Axes, **kwargs: Any) -> None:
  """One legend for all panels, beside them."""
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right center', **kwargs)


def labels(axis: Any) -> list[tuple[float, str, Any]]:
  """Place, text and box of the numbers that are seen on a drawn axis."""
  low, high = sorted(axis.get_view_interval())
  return [
    (tick.get_loc(), tick.label1.get_text(), tick.label1.get_window_extent())
    for tick in axis.get_major_ticks()
    if low <= tick.get_loc() <= high
    and tick.label1.get_text()
    and tick.label1.get_visible()
  ]


def _thin_ticks(axis: Any) -> None:
  """Leaves out every second number, or more, where they would touch."""
  kept = seen = labels(axis)
  for stride in range(1, len(seen) + 1):
    kept = seen[::stride]
    if not any(
      box.padded(2.0).overlaps(beside)
      for (_, _, box), (_, _, beside) in itertools.pairwise(kept)
    ):
      break
  if len(kept) < len(seen):
    places, texts, _ = zip(*kept, strict=True)
    axis.set_major_locator(ticker.FixedLocator(places))
    axis.set_major_formatter(ticker.FixedFormatter(texts))


def draw_lines(
  axes: plt.Axes,
  records: Sequence[tuple[str, Sequence[dict]]],
  x: str,
  y: str,
  *,
  log_x: bool = True,
  log_y: bool = True,
  floor: float = 1e-17,
  keep: Callable[[str], bool] = lambda method: True,
) -> None:
  """Draws y against x for every method of the records, the first in bold.

  Points whose x falls are fits of their own, and no line joins them.

  Args:
    axes: Where to draw.
    records: Pairs of a label, put before the methods' names, and rows.
    x: Field on the x axis.
    y: Field on the y axis.
    log_x: Whether x has a logarithmic axis.
    log_y: Whether y has a logarithmic axis.
    floor: On a logarithmic axis values below this are drawn at it.
    keep: Which methods to draw.
  """
  style = itertools.cycle(_STYLES)
  for label, rows in records:
    line = next(style)
    for i, method in enumerate(filter(keep, methods(rows))):
      xs, middle, low, high = curves(rows, method, x, y)
      if log_y:
        middle, low, high = (np.maximum(v, floor) for v in (middle, low, high))
      shown = np.isfinite(xs) & np.isfinite(middle)
      if log_x:
        shown &= xs > 0
      if not np.any(shown):
        continue
      color = f'C{i % 10}'
      name = f'{label}: {method}' if label else method
      mark = 'o' if np.sum(shown) < 40 else None
      apart = np.any(np.diff(xs[shown]) < 0)
      axes.plot(
        xs[shown], middle[shown], linestyle='none' if apart else line,
        color=color, label=name, marker='o' if apart else mark, markersize=3,
        linewidth=1.2 if i else 2.5, zorder=2 if i else 3,
      )  # fmt: skip
      if apart:
        continue
      axes.fill_between(
        xs[shown], low[shown], high[shown], color=color, alpha=0.15, lw=0
      )
  if not axes.lines:
    axes.text(
      0.5, 0.5, 'no value to show', ha='center', transform=axes.transAxes
    )
  axes.set_xscale('log' if log_x else 'linear')
  axes.set_yscale('log' if log_y else 'linear')
  every = [row for _, rows in records for row in rows]
  axes.set_xlabel(axis_label(x, every))
  axes.set_ylabel(axis_label(y, every))
  axes.grid(alpha=0.3)


def draw(
  records: Sequence[tuple[str, dict, Sequence[dict]]],
  path: str | pathlib.Path,
  *,
  x: Sequence[str],
  y: str,
  log_x: bool = True,
  log_y: bool = True,
) -> None:
  """Draws one panel for each x, and one legend.

  Args:
    records: Triples of label, header and rows.
    path: The picture's file, .png, .pdf or .svg.
    x: Fields on the x axes.
    y: Field on the y axes.
    log_x: Whether the x axes are logarithmic.
    log_y: Whether the y axes are logarithmic.
  """
  figure, panels = plt.subplots(
    1, len(x), figsize=(5.0 * len(x) + 1.5, 4.0), squeeze=False, sharey=True,
    layout='constrained',
  )  # fmt: skip
  pairs = [
    (label, [row for row in rows if reported(str(row.get('method')))])
    for label, _, rows in records
  ]
  for axes, name in zip(panels[0], x, strict=True):
    draw_lines(axes, pairs, name, y, log_x=log_x, log_y=log_y)
    axes.label_outer()
  drawn = [axes for axes in panels[0] if axes.lines]
  names = {
    text for axes in drawn for text in axes.get_legend_handles_labels()[1]
  }
  for label, rows in pairs:
    begins = f'{label}: ' if label else ''
    if names.isdisjoint(f'{begins}{method}' for method in methods(rows)):
      plt.close(figure)
      raise flags.UserError(
        f'{begins}no rows with both {" or ".join(x)} and {y} to draw'
      )
  legend_right(figure, drawn[0], fontsize=8)
  titles = dict.fromkeys(
    ' '.join(
      str(part)
      for part in (header['program'], header['config'].get('dataset', ''))
    ).strip()
    for _, header, _ in records
  )
  save(figure, path, title=', '.join(titles))
