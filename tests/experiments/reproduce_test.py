"""The table of claims: its runs are real, and its rules can say no."""

import dataclasses
import importlib
import json

import numpy as np
import pytest

from experiments import reproduce
from experiments.lab import flags


def test_every_run_has_a_claim_and_every_claim_a_run():
  assert {claim.run for claim in reproduce.CLAIMS} == set(reproduce.RUNS)


@pytest.mark.parametrize('name', reproduce.RUNS)
def test_the_flags_of_a_run_are_those_of_its_program(name):
  run = reproduce.RUNS[name]
  program = importlib.import_module(f'experiments.{run.program}')
  fields = {field.name for field in dataclasses.fields(program.Config)}
  assert set(run.flags) <= fields - {'output_dir', 'resume'}
  assert not run.needs_data or 'data_dir' in fields


@pytest.mark.slow
def test_a_claim_is_run_and_judged(tmp_path, capsys, monkeypatch):
  few = {
    'steps': '50',
    'seeds': '3',
    'functions': 'F1,F2',
    'optimizers': 'diffgrad,adam',
  }
  short = reproduce.Run('synthetic_functions', few)
  monkeypatch.setitem(reproduce.RUNS, 'landscapes', short)
  config = reproduce.Config(output_dir=str(tmp_path), only=('landscapes',))
  reproduce.main(config)
  found = json.loads((tmp_path / 'claims.json').read_text())['claims']
  ran = {row['run']: row for row in found if row['verdict'] != 'not run'}
  assert set(ran) == {'landscapes'}
  assert ran['landscapes']['verdict'] in ('holds', 'partly', 'not')
  assert 'of starts, Adam' in ran['landscapes']['number']
  assert (tmp_path / 'claims.md').read_text().count('\n') == 2 + len(found)
  assert 'Claims of the six papers' in capsys.readouterr().out
  # It goes on where it was: nothing is run again, the table is the same.
  record = tmp_path / 'landscapes' / 'record.jsonl'
  before = record.read_text()
  reproduce.main(dataclasses.replace(config, resume=True))
  assert record.read_text() == before


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
  broken = reproduce.Run('synthetic_functions', {'learning_rate': '-1'})
  monkeypatch.setitem(reproduce.RUNS, 'landscapes', broken)
  config = reproduce.Config(output_dir=str(tmp_path), only=('landscapes',))
  with pytest.raises(flags.UserError, match='the run landscapes failed'):
    reproduce.main(config)


def _judge(name):
  return next(claim.judge for claim in reproduce.CLAIMS if claim.run == name)


def _speedup(few, many):
  return [
    {'kind': 'summary', 'method': f'I={blocks} B=1', 'steps_to_target': steps}
    for blocks, steps in ((10, few), (100, many))
  ]


@pytest.mark.parametrize(
  ('few', 'many', 'verdict'),
  [
    (1000, 100, 'holds'),
    (300, 100, 'partly'),
    (100, 100, 'not'),
    (100, np.inf, 'not'),
  ],
)
def test_the_rule_of_the_speedup(few, many, verdict):
  assert _judge('speedup')(_speedup(few, many))[1] == verdict


@pytest.mark.parametrize(
  ('ours', 'verdict'), [(0.1, 'holds'), (0.3, 'not'), (np.nan, 'not')]
)
def test_the_rule_of_the_spoiled_labels(ours, verdict):
  rows = [
    {'kind': 'eval', 'method': method, 'seed': 0, 'step': 1, 'test': value}
    for method, value in (('bsvrb_v2', ours), ('frozen', 0.2))
  ]
  assert _judge('spoiled')(rows)[1] == verdict


@pytest.mark.parametrize(
  ('peer', 'verdict'),
  [
    ([0.90, 0.91, 0.90], 'holds'),
    ([0.90, 0.95, 0.93], 'not'),  # A tie, though ahead in the mean.
    ([0.97, 0.98, 0.97], 'not'),
  ],
)
def test_a_difference_counts_where_its_interval_leaves_out_zero(peer, verdict):
  ours = [0.94, 0.95, 0.94]
  values = {'bsvrb_v2': ours, 'listwise': peer, 'pointwise': peer}
  rows = [
    {'kind': 'eval', 'method': method, 'seed': seed, 'step': 1, 'ndcg10': value}
    for method, found in values.items()
    for seed, value in enumerate(found)
  ]
  number, found = _judge('ranking')(rows)
  assert found == verdict
  assert number.count(' to ') == 2
