"""Tables in the terminal."""

from collections.abc import Sequence
import math
import shutil
import textwrap
from typing import Any

from rich import box as rich_box
from rich import console as rich_console
from rich import markup as rich_markup
from rich import table as rich_table


def number(value: Any) -> str:
  """A number as a table shows it: short, and a dash where there is none."""
  if value is None:
    return '-'
  if isinstance(value, str):
    return value
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, int):
    return f'{value:,}'
  if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
    return f'{int(value):,}'
  if 1e3 <= abs(value) < 1e9:
    return f'{value:,.0f}'
  return f'{value:.3g}'


WIDTH, NARROWEST = 80, 40


def width() -> int:
  """Columns that a table may take: fewer than `WIDTH` on a narrow terminal."""
  return min(WIDTH, max(NARROWEST, shutil.get_terminal_size().columns))


def show(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
  """Prints a table, at most 80 columns wide, fewer on a narrow terminal.

  Args:
    title: Above the table.
    columns: The heads; the first column is aligned left, the others right.
    rows: One sequence of values a row. What does not fit beside the first
      column stands in another table below, with the first column again.
  """
  cells = [[number(value) for value in row] for row in rows]
  widths = [
    max(
      len(part)
      for line in [list(columns), *cells]
      for part in line[i].split('\n')
    )
    for i in range(len(columns))
  ]
  print('\n' + textwrap.fill(title, width()))
  for part in _parts(widths):
    _print(
      [columns[i] for i in part], [[row[i] for i in part] for row in cells]
    )


def _parts(widths: Sequence[int]) -> list[list[int]]:
  """The columns of each table, the first one in all of them."""
  parts: list[list[int]] = [[0]]
  for i in range(1, len(widths)):
    if sum(widths[j] + 3 for j in (*parts[-1], i)) + 1 > width() and (
      len(parts[-1]) > 1
    ):
      parts.append([0])
    parts[-1].append(i)
  return parts


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  table = rich_table.Table(box=rich_box.SIMPLE_HEAD, padding=(0, 1))
  for i, column in enumerate(columns):
    table.add_column(
      rich_markup.escape(column),
      justify='right' if i else 'left',
      no_wrap=True,
    )
  for row in rows:
    table.add_row(*map(rich_markup.escape, row))
  # A pipe has no width, and a narrow terminal would cut the numbers off.
  width = rich_console.Console(width=1000).measure(table).maximum
  rich_console.Console(width=width).print(table)
