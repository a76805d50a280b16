"""What a package index shows, and the command `optlab`."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

from experiments import __main__ as command
from experiments.lab import launch

ROOT = pathlib.Path(__file__).parent.parent


def test_the_page_of_the_package_refers_to_nothing_that_it_lacks():
  page = runpy.run_path(str(ROOT / 'setup.py'))['page']
  text = page((ROOT / 'README.md').read_text())
  assert '![' not in text
  targets = re.findall(r'\]\(([^)]*)\)', text)
  assert targets
  assert all(target.startswith('https://') for target in targets)


def test_the_command_lists_every_program_with_what_it_does():
  programs = command.programs()
  assert {'compare', 'logistic_regression', 'plot'} <= set(programs)
  assert all(line.endswith('.') for line in programs.values())
  table = (ROOT / 'README.md').read_text().split('| program |')[1]
  rows = re.findall(r'^\| (`.*?) \|', table, re.MULTILINE)
  assert {*re.findall(r'\w+', ' '.join(rows)), 'plot'} == set(programs)


@pytest.mark.parametrize(
  ('gone', 'status', 'said'), [(True, 0, ''), (False, 1, 'No space left')]
)
def test_a_list_or_a_help_that_nobody_reads_is_no_traceback(
  gone, status, said, monkeypatch, capfd
):
  readers, writer = os.pipe()
  os.close(readers)
  writer = writer if gone else os.open('/dev/full', os.O_WRONLY)
  line = [sys.executable, '-m', 'experiments']
  result = subprocess.run(
    line, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True,
    check=False,
  )  # fmt: skip
  assert result.returncode == status
  assert said in result.stderr and result.stderr.count('\n') <= 1
  with open(writer, 'w') as file:
    monkeypatch.setattr(sys, 'stdout', file)
    monkeypatch.setattr(launch.absl_flags, 'FLAGS', lambda argv: print('help'))
    with pytest.raises(SystemExit) as left:
      launch._parse(['program', '--help'])
    monkeypatch.undo()
  assert (left.value.code or 0) == status
  assert said in capfd.readouterr().err


def test_the_command_runs_programs(tmp_path):
  flags = ['--problem=rosenbrock', '--dimension=2', '--max_steps=3']
  flags += ['--optimizers=gns', '--curvature=exact']
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'optlab',
      'nonlinear_equations',
      *flags,
      f'--output_dir={tmp_path}',
    ],
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'record.jsonl').exists()


def test_the_program_that_the_type_checkers_read_runs():
  runpy.run_path(str(ROOT / 'tests' / 'typing' / 'user.py'))


def test_an_unknown_program_is_named(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['optlab', 'compar'])
  with pytest.raises(SystemExit, match='optlab: no program compar'):
    command.main()
