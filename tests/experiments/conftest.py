"""Every picture that a test's program draws is looked at as it is saved."""

import itertools

import numpy as np
import pytest

from experiments.lab import plots


def _faults(figure):
  """What a reader of the picture would stumble over, in words."""
  faults = []
  named = figure.get_suptitle() or any(a.get_title() for a in figure.axes)
  if not named:
    faults.append('no title')
  for place, axes in enumerate(figure.axes):
    if not axes.get_visible():
      continue
    where = f'panel {place} ({axes.get_title() or axes.get_ylabel()})'
    if not (axes.lines or axes.collections or axes.patches or axes.images):
      if not axes.texts:
        faults.append(f'{where}: empty, and does not say why')
      continue
    faults += [
      f'{where}: {one!r} runs into {other!r}'
      for axis in (axes.xaxis, axes.yaxis)
      for (_, one, box), (_, other, beside) in itertools.pairwise(
        plots.labels(axis)
      )
      if box.overlaps(beside)
    ]
    if axes.xaxis.get_offset_text().get_text():
      faults.append(f'{where}: a power of ten runs into the label')
    if axes.get_xlabel() in plots.LABELS.values():
      faults += [
        f'{where}: {line.get_label()!r} goes back in time'
        for line in axes.lines
        if line.get_linestyle() != 'None'
        and np.any(np.diff(line.get_xdata()) < 0)
      ]
  return faults


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
  """Fails a test whose picture is empty, untitled, or illegible."""
  save, seen = plots.save, {}

  def look(figure, path, **kwargs):
    save(figure, path, **kwargs)
    figure.draw_without_rendering()  # The file has another resolution.
    seen[str(path)] = _faults(figure)

  monkeypatch.setattr(plots, 'save', look)
  yield seen
  assert not any(seen.values()), seen
