"""The benchmarks start, and say what they ran on."""

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import steps


def test_the_roofline_of_a_cpu_says_so(monkeypatch, capsys):
  few = {name: steps.METHODS[name] for name in ('optax.adam', 'diffgrad')}
  monkeypatch.setattr(steps, 'METHODS', few)
  monkeypatch.setattr(steps, 'ROUNDS', 1)
  monkeypatch.setattr(steps, 'WIDTHS', {'cpu': 8})
  benchmarks.main(['steps'])
  shown = capsys.readouterr().out
  assert 'No accelerator is at hand: this table is of the CPU.' in shown
  lines = [line.split() for line in shown.strip().split('\n')[-2:]]
  assert [line[0] for line in lines] == list(few)
  # Seconds, operations, bytes, and the floor they give, are numbers.
  for line in lines:
    assert all(float(entry) >= 0 for entry in line[1:-1])
    assert float(line[4]) > 0
    assert line[-1] in ('bytes', 'flops')


def test_a_benchmark_that_is_not_there_is_named():
  with pytest.raises(SystemExit, match='no benchmark nothing; there are batch'):
    benchmarks.main(['nothing'])
