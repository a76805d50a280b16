"""A search of a rate: over a grid that goes on past its edges."""

from collections.abc import Callable, Iterable, Sequence
import math
from typing import NamedTuple

import numpy as np

EXTENSIONS = 2  # How often a grid is continued, by its own length.


def continued(rates: list[float], best: float, count: int) -> list[float]:
  """So many rates beyond the edge that ``best`` is at; none if it is inside."""
  if len(rates) < 2 or best not in (rates[0], rates[-1]):
    return []
  edge, inside = rates[:2] if best == rates[0] else rates[:-3:-1]
  # Three digits, so that powers of ten and the like stay what they are.
  return [
    float(f'{edge * (edge / inside) ** k:.3g}') for k in range(1, count + 1)
  ]


class Found(NamedTuple):
  """What a search found.

  Attributes:
    rate: The best rate.
    values: The median value of each rate, by rate, sorted.
    edge: Whether it is at an edge of all that were tried.
  """

  rate: float
  values: dict[float, float]
  edge: bool


def search(
  rates: Sequence[float],
  measure: Callable[[list[float], int], Iterable[tuple[float, float]]],
) -> Found:
  """The rate of the least value, of a grid that goes on past its edges.

  Args:
    rates: The first grid.
    measure: ``(rates, number of the grid) -> pairs`` of a rate and a value, one
      for each tuning seed. What is not a number counts as infinite.

  Returns:
    `Found`, by medians over the seeds; of equal ones the least rate.
  """
  tried: dict[float, list[float]] = {}
  best, new = rates[0], sorted(rates)
  medians: dict[float, float] = {}
  for grid in range(1 + EXTENSIONS):
    for rate, value in measure(new, grid):
      tried.setdefault(rate, []).append(
        math.inf if math.isnan(value) else value
      )
    medians = {rate: float(np.median(tried[rate])) for rate in sorted(tried)}
    best = min(medians, key=lambda rate: medians[rate])
    new = continued(list(medians), best, len(rates))
    if not new:
      break
  edge = len(medians) > 1 and best in (min(medians), max(medians))
  return Found(best, medians, edge)
