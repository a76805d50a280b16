"""The documentation's code runs, and its reference names all there is."""

import pathlib
import re

import matplotlib.pyplot as plt
import pytest

import optlab
from tests.public import PUBLIC

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'docs'


def cells(page):
  """The code cells of a page, without their options."""
  found = re.findall(r'```\{code-cell\}\n(.*?)```', page.read_text(), re.DOTALL)
  return [re.sub(r'^:.*\n', '', cell, flags=re.MULTILINE) for cell in found]


PAGES = {
  str(page.relative_to(DOCS)): cells(page)
  for page in sorted(DOCS.rglob('*.md'))
  if cells(page)
}


def run(source, page, names):
  exec(compile(source, page, 'exec'), names)


def test_every_family_has_a_page_that_runs():
  assert sum(page.startswith('methods') for page in PAGES) == 6


@pytest.mark.parametrize('page', PAGES)
def test_runs(page, monkeypatch):
  plt.switch_backend('agg')
  names = {'__name__': 'page'}
  for cell in PAGES[page]:
    run(cell, page, names)
  plt.close('all')


def test_the_block_on_equinox_runs():
  pytest.importorskip('equinox')
  text = (DOCS / 'models.md').read_text()
  block = re.search(r'```python\n(import equinox.*?)```', text, re.DOTALL)
  names = {'__name__': 'page'}
  run(PAGES['models.md'][0], 'models.md', names)
  run(block.group(1), 'models.md', names)


def test_reference_names_everything_public():
  public = set(PUBLIC)
  listed = re.findall(r'^   (\w+)$', (DOCS / 'api.rst').read_text(), re.M)
  assert sorted(listed) == sorted(public)


def test_citation_has_the_version_and_the_papers():
  text = (ROOT / 'CITATION.cff').read_text()
  assert f'\nversion: {optlab.__version__}\n' in text
  cited = set(re.findall(r'arxiv.org/abs/([\d.]+)', text))
  table = (ROOT / 'README.md').read_text().split('## The methods')[1]
  table = table.split('Beside them')[0]
  assert cited == set(re.findall(r'arxiv.org/abs/([\d.]+)', table))
