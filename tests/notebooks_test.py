"""The notebooks run, and the executed files match their text twins."""

import jupytext
import nbformat
import pytest

from notebooks import build


@pytest.mark.parametrize(
  'name',
  # One of them takes a quarter of a minute.
  [
    pytest.param(name, marks=[pytest.mark.slow] if 'logistic' in name else [])
    for name in build.NAMES
  ],
)
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_runs_and_matches_its_text_twin(name):
  executed = build.execute(name)
  pictures = [
    output
    for cell in executed.cells
    for output in cell.get('outputs', ())
    if 'image/png' in output.get('data', {})
  ]
  assert len(pictures) >= 2
  stored = nbformat.read(build.FOLDER / f'{name}.ipynb', as_version=4)
  twin = jupytext.read(build.FOLDER / f'{name}.py')
  sources = [cell.source for cell in twin.cells]
  assert [cell.source for cell in stored.cells] == sources
