"""SPSA is added to a copy, as `docs/adding_a_method.md` tells: six files more.

The module and its tests lie in docs/added_method.
"""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NEW = {
  '_spsa.py': 'optlab/first_order/_spsa.py',
  'spsa_test.py': 'tests/first_order/spsa_test.py',
}
COPIED = (
  *('optlab', 'tests', 'docs', 'experiments', 'README.md', 'CHANGELOG.md'),
  *('CITATION.cff', 'pyproject.toml', 'setup.py'),
)

# File, a line of it, and what is added below.
ADDED = (
  ('optlab/first_order/__init__.py', ' scale_by_normalized_momentum\n',
   'from optlab.first_order._spsa import SpsaState\n'
   'from optlab.first_order._spsa import spsa\n'),
  ('optlab/first_order/__init__.py', '__all__ = [\n',
   "  'SpsaState',\n  'spsa',\n"),
  ('tests/first_order/rows.py', 'ROWS = [\n', """\
  Row(
    'spsa',
    lambda scale: (optlab.first_order.spsa(loss, scale), optax.sgd(0.05)),
    hyper=0.1,
    inner=lambda dtype: (jax.random.key(7),),
  ),
"""),
  ('tests/first_order/rows.py', 'import jax.numpy as jnp\n',
   'import jax\nimport optax\nfrom tests.contract import loss\n'),
  ('tests/first_order/bad_input_test.py', '# Transformations.\n',
   "family('spsa', fun=inputs.loss)\n"),
  ('README.md', '## The methods\n', 'Without derivatives: `spsa`.\n'),
  ('CHANGELOG.md', '## 0.1.0 (unreleased)\n', '\n- `spsa`.\n'),
)  # fmt: skip


def add(path, line, text):
  """Adds text below the first line that reads so."""
  head, found, tail = path.read_text().partition(line)
  assert found, (path, line)
  path.write_text(head + found + text + tail)


@pytest.mark.slow
def test_a_method_is_added_by_six_files(tmp_path):
  for name in COPIED:
    if (ROOT / name).is_dir():
      ignored = shutil.ignore_patterns('__pycache__', '_build', 'reference')
      shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    else:
      shutil.copy(ROOT / name, tmp_path / name)
  for source, target in NEW.items():
    shutil.copy(ROOT / 'docs' / 'added_method' / source, tmp_path / target)
  for name, line, text in ADDED:
    add(tmp_path / name, line, text)
  assert len({name for name, *_ in ADDED}) <= 6
  done = subprocess.run(
    [
      sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
      '-k', 'spsa or public or reference or package',
      *NEW.values(), 'tests/contract_test.py', 'tests/domains_test.py',
      'tests/public_test.py', 'tests/docs_test.py',
      'tests/first_order/bad_input_test.py',
    ],
    cwd=tmp_path, check=False, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout
  # What its row, its domains and all public names bring.
  assert int(re.findall(r'(\d+) passed', done.stdout)[0]) >= 30
