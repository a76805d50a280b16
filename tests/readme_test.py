"""Every Python block of the README runs as it stands."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / 'README.md'
BLOCKS = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)


def test_there_is_a_block_for_each_method():
  assert len(BLOCKS) >= 7


@pytest.mark.parametrize('block', BLOCKS, ids=range(len(BLOCKS)))
def test_runs(block):
  exec(compile(block, str(README), 'exec'), {'__name__': 'readme'})
