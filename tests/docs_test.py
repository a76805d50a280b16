"""The documentation's code runs, and its reference names all there is."""

import importlib
import pathlib
import re
import runpy
import sys
from unittest import mock

import matplotlib.pyplot as plt
import pytest

import optlab
from tests.public import HOMES
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
  assert sum(page.startswith('methods') for page in PAGES) == 7


# The pages of the methods run in `make docs` and among the slow tests.
@pytest.mark.parametrize(
  'page',
  [
    pytest.param(page, marks=pytest.mark.slow) if '/' in page else page
    for page in PAGES
  ],
)
def test_runs(page, monkeypatch):
  plt.switch_backend('agg')
  names = {'__name__': 'page'}
  for cell in PAGES[page]:
    run(cell, page, names)
  plt.close('all')


def test_reference_names_everything_public():
  """A page a wing is made from its `__all__`; here are all that have one."""
  listed = re.findall(
    r'^   (optlab\.\w+)$', (DOCS / 'api.rst').read_text(), re.M
  )
  homes = [home.__name__ for home in HOMES if home is not optlab]
  assert sorted(listed) == sorted({*homes, 'optlab.aliases'})
  below = {
    name for path in listed for name in importlib.import_module(path).__all__
  }
  assert set(PUBLIC) <= below


def test_citation_has_the_version_and_the_papers():
  text = (ROOT / 'CITATION.cff').read_text()
  assert f'\nversion: {optlab.__version__}\n' in text
  cited = set(re.findall(r'arxiv.org/abs/([\d.]+)', text))
  table = (ROOT / 'README.md').read_text().split('## The methods')[1]
  table = table.split('Beside them')[0]
  assert cited == set(re.findall(r'arxiv.org/abs/([\d.]+)', table))


def test_mathematics_is_read_as_tex_reads_it(monkeypatch):
  monkeypatch.setattr('sys.path', list(sys.path))
  with mock.patch.dict('os.environ'):
    to_mathml = runpy.run_path(str(DOCS / 'conf.py'))['to_mathml']
  half = re.sub(r'\s', '', to_mathml(r'\tfrac12 (x + y)', block=True))
  assert '<mfrac><mn>1</mn><mn>2</mn></mfrac>' in half
  assert '\\' not in to_mathml(r'\text{inner\_lr}', block=False)
