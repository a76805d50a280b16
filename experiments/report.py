"""Tables in the terminal."""

from collections.abc import Sequence
import math
from typing import Any

import rich
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
  return f'{value:.3g}'


def show(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
  """Prints a table.

  Args:
    title: Above the table.
    columns: The heads; the first column is aligned left, the others right.
    rows: One sequence of values a row.
  """
  table = rich_table.Table(title=title, title_justify='left')
  for i, column in enumerate(columns):
    table.add_column(
      column, justify='right' if i else 'left', no_wrap=not i, overflow='fold'
    )
  for row in rows:
    table.add_row(*(number(value) for value in row))
  rich.print(table)
