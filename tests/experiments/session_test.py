"""The session of a program: record, checkpoints, resume, interruption."""

import codecs
import dataclasses
import errno
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab import checkpoints
from experiments.lab import flags
from experiments.lab import launch
from experiments.lab import memory
from experiments.lab import progress
from experiments.lab import record
from experiments.lab import repeating
from experiments.lab import resuming
from experiments.lab import stopping
from experiments.lab.session import Session
import optlab


@pytest.fixture(autouse=True)
def hangup_is_heard():
  """Also where the tests themselves are started by nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  rate: float = flags.flag(0.1, 'Rate.')
  precision: str = flags.flag('float32', 'Floating point type.')


def advance(state):
  """Noisy descent: all that it needs is in the state, the key too."""
  x, key = state
  key, now = jax.random.split(key)
  return x - 0.1 * (x + jax.random.normal(now, x.shape, x.dtype)), key


def evaluate(state):
  return {'value': jnp.sum(state[0] ** 2, axis=-1)}


def start():
  return jnp.ones((2, 3), jnp.float32), jax.random.key(0)


def go(session, steps=20, **kwargs):
  return session.run(
    'noisy', start(), advance, evaluate, steps=steps, seeds=(0, 1), **kwargs
  )


def numbers(folder):
  """What a run recorded, without its times."""
  return record.without_times(record.read(folder)[1])


@pytest.fixture
def config(tmp_path):
  return Config(output_dir=str(tmp_path / 'run'), checkpoint_every=0.0)


@pytest.fixture
def whole(tmp_path):
  """The rows of a run that nothing stopped."""
  config = Config(output_dir=str(tmp_path / 'whole'))
  with Session('test', config) as session:
    go(session)
  return numbers(tmp_path / 'whole')


def stop_at(session, step):
  """Interrupts as control-C does, once that step is recorded."""

  def stop(rows):
    if rows[0]['step'] == step:
      os.kill(os.getpid(), signal.SIGINT)
    return False

  with pytest.raises(flags.InterruptedRun, match='go on with --resume'):
    go(session, stop=stop)


def test_records_one_row_a_seed_and_step(config, whole):
  with Session('test', config) as session:
    go(session, every=5)
  rows = numbers(config.output_dir)
  evals = [row for row in rows if row['kind'] == 'eval']
  assert [(row['step'], row['seed']) for row in evals] == [
    (step, seed) for step in (0, 5, 10, 15, 20) for seed in (0, 1)
  ]


def test_a_resumed_run_gives_the_numbers_of_the_whole_run(config, whole):
  with Session('test', config) as session:
    stop_at(session, 7)
  with Session('test', dataclasses.replace(config, resume=True)) as more:
    go(more)
  assert numbers(config.output_dir) == whole


def test_a_signal_waits_for_a_checkpoint_that_is_read(
  config, whole, monkeypatch
):
  """Threads of the reader outlive no exception in silence."""
  with Session('test', config) as session:
    stop_at(session, 7)
  read, ends = checkpoints.read, []

  def interrupted(*args):
    os.kill(os.getpid(), signal.SIGINT)
    ends.append(read(*args))
    return ends[-1]

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, 'read', interrupted)
    with (
      pytest.raises(flags.InterruptedRun, match='go on with --resume'),
      Session('test', resumed(config)) as more,
    ):
      go(more)
  assert len(ends) == 1
  with Session('test', resumed(config)) as more:
    go(more)
  assert numbers(config.output_dir) == whole


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_signal_in_the_imports_ends_a_program_in_one_line(name):
  """As of ``python -m experiments.NAME``, whose package is loaded first."""
  code = f"""
import os, signal, sys
signal.signal(signal.{name}, signal.SIG_DFL)  # Not so in a background job.
sys.argv = ['-m']
import experiments
os.kill(os.getpid(), signal.{name})
"""
  done = subprocess.run(
    [sys.executable, '-c', code], check=False, capture_output=True, text=True
  )
  assert done.returncode == stopping.STATUS
  assert done.stderr.startswith('interrupted; no run was begun')


def test_a_time_limit_stops_it_and_another_run_goes_on(config, whole):
  short = dataclasses.replace(config, max_seconds=1e-9)
  for step in range(1, 4):  # A row each time, so that it comes to its end.
    short = dataclasses.replace(short, resume=step > 1)
    message = (
      f'--max_seconds=1e-09 ended at step {step} of noisy; the record is in'
    )
    with (
      pytest.raises(flags.InterruptedRun, match=message),
      Session('test', short) as session,
    ):
      go(session)
  with Session('test', dataclasses.replace(config, resume=True)) as more:
    go(more)
  assert numbers(config.output_dir) == whole


def test_a_torn_record_and_a_torn_checkpoint_are_survived(
  config, whole, capsys
):
  with Session('test', config) as session:
    stop_at(session, 7)
  folder = session.folder
  with (folder / 'record.jsonl').open('a') as file:
    file.write('{"kind": "eval", "method": "noi')
  checkpoints = sorted(folder.glob('checkpoints/noisy-*/*'), key=str)
  assert len(checkpoints) == 2
  for path in checkpoints[-1].rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:10])
  with Session('test', dataclasses.replace(config, resume=True)) as more:
    go(more)
  assert numbers(config.output_dir) == whole
  assert 'is not used' in capsys.readouterr().err


def test_rows_after_the_last_checkpoint_are_made_again(config, whole):
  slow = dataclasses.replace(config, checkpoint_every=1e9)
  with Session('test', slow) as session:

    def die(rows):
      if rows[0]['step'] == 9:
        raise RuntimeError('killed')
      return False

    with pytest.raises(RuntimeError):
      go(session, stop=die)
  with Session('test', dataclasses.replace(slow, resume=True)) as more:
    go(more)
  assert numbers(config.output_dir) == whole


def test_what_is_done_is_not_done_again(config):
  with Session('test', config) as session:
    last = go(session, keep_state=True)
  before = (session.folder / 'record.jsonl').read_bytes()
  with Session('test', dataclasses.replace(config, resume=True)) as more:
    again = go(more, keep_state=True)
  assert (session.folder / 'record.jsonl').read_bytes() == before
  np.testing.assert_array_equal(again[0], last[0])
  assert jnp.array_equal(again[1], last[1])


def test_a_last_state_that_is_damaged_is_made_anew_beside_the_record(config):
  """What was written after it keeps its place."""
  with Session('test', config) as session:
    last = go(session, keep_state=True)
    session.write(
      'summary', least=min(r.get('value', 9.0) for r in session.rows)
    )
  before = (session.folder / 'record.jsonl').read_bytes()
  for file in session.folder.glob('checkpoints/*/**/*'):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:10])
  with Session('test', resumed(config)) as more:
    again = go(more, keep_state=True)
    more.write('summary', least=min(r.get('value', 9.0) for r in session.rows))
    np.testing.assert_array_equal(again[0], last[0])
  assert (session.folder / 'record.jsonl').read_bytes() == before


def test_a_row_is_written_once_whatever_its_numbers(config):
  row = {'a': float('inf'), 'b': np.float32('nan'), 'c': [1.0, None]}
  for resume in (False, True):
    again = dataclasses.replace(config, resume=resume)
    with Session('test', again) as session:
      session.write('summary', **row)
      session.write('summary', **row | {'c': [2.0, None]})
  rows = record.read(session.folder)[1]
  assert [row['kind'] for row in rows] == ['summary', 'summary', 'end']


def resumed(config, **kwargs):
  return dataclasses.replace(config, resume=True, **kwargs)


def test_another_configuration_or_program_is_refused(config):
  with Session('test', config) as session:
    go(session)
  with pytest.raises(flags.UserError, match=r'--rate was 0\.1, is 0\.2'):
    Session('test', resumed(config, rate=0.2))
  with pytest.raises(flags.UserError, match='holds a run of test'):
    Session('other', resumed(config))
  assert (session.folder / 'record.jsonl').exists()


def test_other_versions_are_said_and_recorded(config, whole, capsys):
  with Session('test', config) as session:
    stop_at(session, 7)
  path = session.folder / 'record.jsonl'
  first, *lines = path.read_text().split('\n')
  header = json.loads(first)
  now = header['versions']['jax']
  header['versions']['jax'] = now[:-1] + chr(ord(now[-1]) + 1)  # As long.
  path.write_text('\n'.join([json.dumps(header), *lines]))
  for _ in range(2):
    with Session('test', resumed(config)) as more:
      go(more)
  assert f'jax was {header["versions"]["jax"]}, is {now}' in (
    capsys.readouterr().err
  )
  rows = numbers(config.output_dir)
  (row,) = record.select(rows, 'resumed')
  assert row['changed'] == {'jax': [header['versions']['jax'], now]}
  assert [row for row in rows if row['kind'] != 'resumed'] == whole
  assert rows.index(row) == 2 * 8  # After the rows of steps 0 to 7.


def test_a_run_that_was_not_finished_is_not_begun_anew(config, whole):
  with Session('test', config) as session:
    stop_at(session, 7)
  before = {path: path.stat() for path in session.folder.rglob('*')}
  with pytest.raises(flags.UserError, match='--resume, or give another --out'):
    Session('test', config)
  after = {path: path.stat() for path in session.folder.rglob('*')}
  lock = session.folder / '.lock'
  assert before.pop(lock).st_size == after.pop(lock).st_size
  assert {p: s.st_mtime for p, s in before.items()} == {
    p: s.st_mtime for p, s in after.items()
  }
  with Session('test', resumed(config)) as more:
    go(more)
  assert numbers(config.output_dir) == whole


def test_a_run_that_had_no_row_is_begun_anew(config, whole):
  """As one that ended by a flag that was refused."""
  with pytest.raises(flags.UserError), Session('test', config):
    raise flags.UserError('--rate: is too large')
  with Session('test', dataclasses.replace(config, rate=0.2)) as session:
    go(session)
  assert numbers(config.output_dir) == whole
  assert not list(session.folder.glob('record.1.jsonl'))


def change(folder, number, **fields):
  """Replaces fields of a line of a record; those that are None go."""
  path = pathlib.Path(folder) / 'record.jsonl'
  lines = path.read_text().split('\n')
  row = json.loads(lines[number]) | fields
  lines[number] = json.dumps({k: v for k, v in row.items() if v is not None})
  path.write_text('\n'.join(lines))


def test_a_flag_that_came_later_has_its_default(config, whole, capsys):
  with Session('test', config) as session:
    stop_at(session, 7)
  old = record.read(session.folder)[0]['identity']
  del old['rate']
  change(session.folder, 0, identity=old)
  with pytest.raises(flags.UserError, match=r'--rate was None, is 0\.2'):
    Session('test', resumed(config, rate=0.2))
  with Session('test', resumed(config)) as more:
    go(more)
  assert '--rate was None, is 0.1' in capsys.readouterr().err
  assert record.select(numbers(config.output_dir), 'eval') == (
    record.select(whole, 'eval')
  )


def test_rows_that_are_lost_or_there_twice_are_made_again(config, whole):
  """What comes after them too, in the order of a run that nothing befell."""
  path = pathlib.Path(config.output_dir) / 'record.jsonl'

  def program(session):
    for method in ('noisy', 'other'):
      session.run(
        method, start(), advance, evaluate, steps=4, seeds=(0, 1), every=2
      )
      last = session.select('eval', method=method)[-1]
      session.write('summary', method=method, value=last['value'])

  with Session('test', config) as session:
    program(session)
  good = numbers(config.output_dir)
  content = path.read_text().split('\n')
  for lines, said in (
    ([*content[:5], *content[3:]], 'a row of kind eval is there twice'),
    (content[:3] + content[4:], 'rows of noisy are lost or damaged'),
    ([*content[:4], content[4].replace('value', 'valve'), *content[5:]],
     'rows of noisy are lost or damaged'),
    ([*content[:9], content[7], *content[9:]], 'kind done is there twice'),
    (content[:11] + content[12:], 'rows of other are lost or damaged'),
  ):  # fmt: skip
    path.write_text('\n'.join(lines))
    rows = record.read(path)[1]
    assert said in resuming.damaged(rows)
    with Session('test', resumed(config)) as more:
      program(more)
    assert numbers(config.output_dir) == good


def test_a_last_look_with_more_fields_is_no_damage(config):
  def last(state):
    more = {'test': jnp.ones(2)} if state[2] == 4 else {}
    return evaluate(state[:2]) | more

  def on(state):
    return *advance(state[:2]), state[2] + 1

  with Session('test', config) as session:
    start_ = (*start(), jnp.zeros((), int))
    session.run('noisy', start_, on, last, steps=4, seeds=(0, 1))
    rows = session.rows
  assert 'test' in rows[-3]
  assert not resuming.damaged(rows)
  rows[-3].pop('test')
  assert resuming.damaged(rows) == 'rows of noisy are lost or damaged'


def test_rows_lost_before_a_checkpoint_are_made_again(config, whole, capsys):
  with Session('test', config) as session:
    stop_at(session, 9)
  path = pathlib.Path(config.output_dir) / 'record.jsonl'
  content = path.read_text().split('\n')
  twice = [*content[:3], content[4], *content[4:]]  # As many as there were.
  path.write_text('\n'.join(twice))
  rows = [json.loads(line) for line in twice if line]
  assert len(rows) == len([line for line in content if line])
  with Session('test', resumed(config)) as more:
    go(more)
  assert numbers(config.output_dir) == whole


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({'earlier': 3}, '3 are no names'),
    ({'earlier': ['record.7.jsonl']}, r'record\.7\.jsonl: No such file'),
  ],
)
def test_a_damaged_header_changes_nothing(config, fields, match):
  with Session('test', config) as session:
    go(session, steps=1)
  change(session.folder, 0, **fields)
  before = (session.folder / 'record.jsonl').read_bytes()
  with pytest.raises(flags.UserError, match=match):
    Session('test', resumed(config))
  assert (session.folder / 'record.jsonl').read_bytes() == before


def test_what_is_repeated_is_what_is_there(capsys):
  rows = [{'kind': 'eval', 'value': float(i), 'seconds': i} for i in range(3)]
  ended = [*rows, {'kind': 'end'}]
  repeating.check(rows[:2], ended)
  assert (
    '2 rows with the same numbers; that run was not finished, this one'
    in (capsys.readouterr().out)
  )
  for was, now in ((ended[1:], ended), ([rows[0], ended[-1]], ended)):
    with pytest.raises(flags.UserError, match='row 2 differs|row 3 differs'):
      repeating.check(was, now)
  with pytest.raises(flags.UserError, match='there were 4 rows, there are 3'):
    repeating.check(ended, rows)


@dataclasses.dataclass(frozen=True)
class Lists(Config):
  names: tuple[str, ...] = flags.flag(('a',), 'Names.')
  rates: tuple[float, ...] = flags.flag((0.1,), 'Rates.')
  target: float | None = flags.flag(None, 'Target.')
  data_dir: str = flags.flag('', 'Folder.')


def test_a_notebook_gives_lists_paths_and_numpys_numbers(tmp_path):
  found = Lists(
    names=['a', 'b'], rates=[1, np.float32(0.5)], seeds=np.int64(3), rate=1,
    output_dir=tmp_path,
  )  # fmt: skip
  assert found == Lists(
    names=('a', 'b'), rates=(1.0, 0.5), seeds=3, rate=1.0,
    output_dir=str(tmp_path),
  )  # fmt: skip
  assert isinstance(found.rate, float)
  assert type(found.seeds) is int
  for fields, match in (
    ({'names': 'a'}, r"--names='a': is not a list, as in \['a'\]"),
    ({'names': ('a', 'b', 'a')}, '--names: a is there twice'),
    ({'names': (1,)}, '--names=1: is not a text'),
    ({'seeds': 2.0}, r'--seeds=2\.0: is not a whole number'),
    ({'seeds': True}, '--seeds=True: is not a whole number'),
    ({'seeds': None}, '--seeds=None: is not a whole number'),
    ({'quick': 1}, '--quick=1: is not true or false'),
    ({'rate': '0.1'}, "--rate='0.1': is not a number"),
    ({'rates': (0.1, math.inf)}, '--rates=inf: not a finite number'),
    ({'target': math.nan}, '--target=nan: not a finite number'),
    ({'max_seconds': math.inf}, '--max_seconds=inf: not a finite number'),
    ({'data_dir': '/nowhere'}, '--data_dir=/nowhere: no such folder'),
  ):
    with pytest.raises(flags.UserError, match=match):
      Lists(**fields)


def test_one_run_a_folder(config):
  with Session('test', config) as session:
    go(session)
    with pytest.raises(flags.UserError, match='another run is writing there'):
      Session('test', resumed(config))
    with pytest.raises(flags.UserError, match='another run is writing there'):
      Session('test', config)
  with Session('test', resumed(config)):
    pass


def test_a_folder_of_its_own_for_each_run(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  default = dataclasses.replace(config, output_dir='')
  with pytest.raises(flags.UserError, match='no run in .*results/test;'):
    Session('test', resumed(default))
  for number in ('1', '2'):
    with Session('test', default) as session:
      go(session)
    assert session.folder == tmp_path / 'results' / 'test' / number
  assert record.read('results/test/latest') == record.read('results/test/2')
  assert record.read('results/test') == record.read('results/test/2')
  with Session('test', resumed(default)) as session:
    assert session.folder.name == '2'


def longer(config, folder, steps, **kwargs):
  seeds = tuple(range(config.seeds))
  state = jnp.ones((config.seeds, 3), jnp.float32), jax.random.key(0)
  with Session('test', config) as session:
    for method in ('a', 'b'):
      session.run(
        method, state, advance, evaluate, steps=steps, seeds=seeds, **kwargs
      )
    last = session.run(
      'fixed', start(), advance, evaluate, steps=3, seeds=(7, 8),
      keep_state=True,
    )  # fmt: skip
    session.write(
      'summary', least=min(r.get('value', 9.0) for r in session.rows)
    )
  return numbers(folder), last


@dataclasses.dataclass(frozen=True)
class Growing(Config):
  steps: int = flags.flag(10, 'Steps.', grows=True)


def test_a_count_is_one_that_a_device_can_hold(tmp_path):
  with pytest.raises(flags.UserError, match='--steps=.*at most 2,147,483,647'):
    Growing(output_dir=str(tmp_path), steps=2**31)


@pytest.mark.parametrize('prefix', [False, True])
@pytest.mark.parametrize('more', [{'seeds': 3}, {'steps': 14}])
def test_more_seeds_and_steps_give_the_numbers_of_the_larger_run(
  tmp_path, more, prefix
):
  """What was run already is not run again, and the record says it all."""
  begun = Growing(output_dir=str(tmp_path / 'begun'), steps=4, seeds=2)
  large = dataclasses.replace(begun, output_dir=str(tmp_path / 'large'), **more)
  expected, last = longer(large, large.output_dir, large.steps, prefix=prefix)
  longer(begun, begun.output_dir, begun.steps, prefix=prefix)
  again = resumed(large, output_dir=begun.output_dir)
  found, kept = longer(again, begun.output_dir, again.steps, prefix=prefix)
  assert found == expected
  np.testing.assert_array_equal(kept[0], last[0])
  # Times are copied with the rows that were not made again.
  before = record.read(tmp_path / 'begun' / 'record.1.jsonl')[1]
  now = record.read(begun.output_dir)[1]
  kept = {
    row['method']
    for row in before
    if row in now and row['kind'] == 'eval' and row['step'] > 0
  }
  assert kept == (
    {'a', 'b', 'fixed'} if more == {'steps': 14} and prefix else {'fixed'}
  )


def test_fewer_are_refused(config):
  config = Growing(output_dir=config.output_dir, steps=4, seeds=2)
  longer(config, config.output_dir, 4)
  with pytest.raises(flags.UserError, match='--seeds was 2, is 1'):
    Session('test', resumed(config, seeds=1))


@pytest.mark.parametrize('number', stopping.SIGNALS)
def test_a_signal_stops_at_once_where_no_piece_is_made(config, number, capfd):
  with (
    pytest.raises(flags.InterruptedRun, match='go on with --resume'),
    Session('test', config) as session,
  ):
    go(session)
    began = time.perf_counter()
    os.kill(os.getpid(), number)
    time.sleep(5.0)  # As scikit-learn does.
  assert time.perf_counter() - began < 2.0
  assert f'the record is in {session.folder}' in capfd.readouterr().err
  assert numbers(config.output_dir)[-1]['kind'] == 'done'


def test_a_signal_is_not_lost_in_a_callback(capfd):
  """What is raised in one is ignored: in the collector's, in a finalizer."""

  class Dying:
    def __del__(self):
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.1)

  began = time.perf_counter()
  with pytest.raises(flags.InterruptedRun), stopping.Listener():
    item = Dying()
    del item
    time.sleep(5.0)
  assert time.perf_counter() - began < 4.0
  said = capfd.readouterr().err
  assert said.count('stopping') == 1
  assert 'Traceback' not in said


def test_nohup_is_obeyed():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stopping.Listener():
      os.kill(os.getpid(), signal.SIGHUP)
      time.sleep(0.1)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_lines_where_there_is_no_terminal(config, capsys, monkeypatch):
  monkeypatch.setattr(progress, 'LOG_EVERY', 0.0)
  with Session('test', config) as session:
    go(session)
  first, *lines = capsys.readouterr().err.strip().split('\n')
  assert first == f'test: results go to {config.output_dir}'
  assert len(lines) == 20
  assert re.fullmatch(
    r'noisy: step 1 of 20, value [\d.]+, \d+ s, \d+ s left', lines[0]
  )
  assert lines[-1].startswith('noisy: step 20 of 20, value ')


def test_the_precision_of_the_record_is_that_of_the_numbers(config):
  """A program's main sets it; a session of another one is refused."""
  wide = dataclasses.replace(config, precision='float64')
  with pytest.raises(flags.UserError, match='but numbers are float32 here'):
    Session('test', wide)
  assert not pathlib.Path(config.output_dir).exists()

  @launch.program
  def main(config):
    with Session('test', config) as session:
      session.write('type', name=str(jnp.zeros(()).dtype))

  main(wide)
  header, rows = record.read(wide.output_dir)
  assert header['config']['precision'] == rows[0]['name'] == 'float64'


def test_nothing_to_resume(config):
  with pytest.raises(flags.UserError, match='no run in'):
    Session('test', dataclasses.replace(config, resume=True))


def test_an_earlier_record_is_kept(config):
  for _ in range(2):
    with Session('test', config) as session:
      go(session)
  assert (session.folder / 'record.1.jsonl').exists()


def test_a_record_holds_what_json_cannot(tmp_path):
  writer = record.Writer(tmp_path / 'record.jsonl')
  header = {'program': 'test', 'config': {}, 'versions': {}, 'identity': {}}
  writer.write('run', **header)
  row = {'a': float('inf'), 'b': np.float32(0.5), 'c': jnp.arange(2)}
  writer.write('figure', **row)
  writer.close()
  _, rows = record.read(tmp_path)
  assert rows == [{'kind': 'figure', 'a': float('inf'), 'b': 0.5, 'c': [0, 1]}]


HEADER = json.dumps({
  'kind': 'run', 'program': 'test', 'config': {}, 'versions': {},
  'identity': {},
})  # fmt: skip


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'it has no whole line'),
    (b'hello\n', 'line 1 is not JSON'),
    (b'{"kind": "eval"}\n', 'its first line is no run'),
    (b'[1, 2]\n', 'line 1 is no row: it has no kind'),
    (b'{"kind": "run", "program": "x"}\n', 'kind run without config'),
    (b'HEADER\n{"kind": "eval"\n', 'line 2 is not JSON; up to the line bef'),
    (b'HEADER\n{"kind": "w", "a": "\xff"}\n', 'line 2 has a byte .*0xff'),
    (b'HEADER\n{"method": "a"}\n', 'line 2 is no row: it has no kind'),
    (b'HEADER\n{"kind": 3}\n', 'line 2 is no row: it has no kind'),
    (b'HEADER\n{"kind": "eval", "method": "a"}\n', 'without seed'),
    (b'HEADER\n\n', 'line 2 is not JSON'),
    (b'HEADER\n\0\0\n', 'line 2 is not JSON'),
    (b'HEADER\nHEADER\n', 'line 2 begins another'),
    (b'HEADER\n' + b'[' * 100_000 + b'\n', 'line 2 is not JSON'),
    (b'HEADER\n{"kind": "a", "b": ' + b'9' * 9999 + b'}\n', 'is not JSON'),
    (b'HEADER\n{"kind": "resumed"}\n', 'kind resumed without changed'),
  ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, content, message):
  with pytest.raises(flags.UserError, match='No such file'):
    record.read(tmp_path / 'nothing')
  path = tmp_path / 'bad'
  path.write_bytes(content.replace(b'HEADER', HEADER.encode()))
  with pytest.raises(flags.UserError, match=f'bad: .*{message}'):
    record.read(path)


def test_a_device_is_no_record():
  """Some have no end."""
  with pytest.raises(flags.UserError, match='/dev/zero: a device, no file'):
    record.read('/dev/zero')


def test_a_pipe_is_read_and_not_waited_for(tmp_path):
  path = tmp_path / 'pipe'
  os.mkfifo(path)
  with pytest.raises(flags.UserError, match='no whole line'):
    record.read(path)
  ours, theirs = os.pipe()
  os.write(theirs, f'{HEADER}\n'.encode())
  # The rest of it comes after the reader is there.
  timer = threading.Timer(0.1, os.close, (theirs,))
  timer.start()
  assert record.read(f'/dev/fd/{ours}')[1] == []
  timer.join()
  os.close(ours)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda path: path.write_text(''), 'is there, and is no folder'),
    (lambda path: path.symlink_to('nowhere'), 'is there, and is no folder'),
    (lambda path: (path / '.lock').mkdir(parents=True), 'Is a directory'),
  ],
)
def test_a_folder_that_is_none_is_named(config, tmp_path, make, match):
  make(tmp_path / 'out')
  where = dataclasses.replace(config, output_dir=str(tmp_path / 'out'))
  with pytest.raises(flags.UserError, match=f'out: .*({match})'):
    Session('test', where)


def test_home_is_where_a_shell_would_put_it(config, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  where = dataclasses.replace(config, output_dir='~/out')
  assert where.output_dir == f'{tmp_path}/out'


def test_a_working_directory_that_is_gone_is_said(
  config, tmp_path, monkeypatch
):
  (tmp_path / 'gone').mkdir()
  monkeypatch.chdir(tmp_path / 'gone')
  (tmp_path / 'gone').rmdir()
  with pytest.raises(flags.UserError, match='working directory is not there'):
    Session('test', dataclasses.replace(config, output_dir=''))


def test_a_name_that_is_no_text_is_refused(config, tmp_path, capfd):
  for name, said in (('\udcff', r'\\udcff'), ('a\0b', r'a\\x00b')):
    where = dataclasses.replace(config, output_dir=f'{tmp_path}/{name}')
    with pytest.raises(flags.UserError, match=rf'{said}.*no text') as error:
      Session('test', where)
  stopping.say(f'{error.value} \udcff')
  assert 'no text' in capfd.readouterr().err


def test_marks_and_cut_lines_are_no_damage(tmp_path):
  path = tmp_path / 'record.jsonl'
  path.write_bytes(codecs.BOM_UTF8 + f'{HEADER}\n{{"kind": "ev'.encode())
  assert record.read(path)[1] == []


def test_a_full_disk_leaves_whole_rows(config):
  with Session('test', config) as session:
    go(session)
    before = (session.folder / 'record.jsonl').read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
      resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limit[1]))
      with pytest.raises(flags.UserError, match='too large.*--resume'):
        session.write('row', text='x' * 100)
      # Not one byte: what has no record is named, and the lock no hindrance.
      resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
      with pytest.raises(flags.UserError, match='none/record.*too large'):
        Session(
          'test',
          dataclasses.replace(config, output_dir=f'{config.output_dir}/none'),
        )
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limit)
      signal.signal(signal.SIGXFSZ, old)
    assert (session.folder / 'record.jsonl').read_bytes() == before


def test_seeds_run_one_after_the_other_under_one_name(config):
  with Session('test', config) as session:
    for seed in (0, 1):
      session.run(
        'noisy', start(), advance, lambda state: {'value': state[0][0, 0]},
        steps=2, seeds=(seed,),
      )  # fmt: skip
    rows = session.select('eval', method='noisy')
  assert [row['seed'] for row in rows] == [0, 0, 0, 1, 1, 1]


def test_what_takes_long_without_a_line_is_named(config, capsys, monkeypatch):
  monkeypatch.setattr(progress, 'SILENT', 0.05)

  def slow(state):
    jax.debug.callback(lambda: time.sleep(0.3))
    return advance(state)

  with Session('test', config) as session:
    time.sleep(0.3)
    session.run('noisy', start(), slow, evaluate, steps=1, seeds=(0, 1))
    time.sleep(0.3)
  said = capsys.readouterr().err
  for what in ('comes before the first', 'from step 0', 'comes after noisy'):
    assert re.search(rf'{what}.*: \d+ s so far', said)


def test_a_full_standard_error_ends_no_run(monkeypatch):
  with open('/dev/full', 'w') as full:
    monkeypatch.setattr('sys.stderr', full)
    progress.warn('what is said')
    progress.warn('and more')


def test_a_rename_that_fails_leaves_what_was_there(config, monkeypatch):
  """A run is set aside whole or not at all, and so is one that grows."""
  folder = pathlib.Path(config.output_dir)
  config = dataclasses.replace(config, checkpoint_every=30.0)
  with Session('test', config) as session:
    go(session, steps=2, keep_state=True)
  before = {path.name for path in folder.iterdir()}
  rows = numbers(folder)

  def full(path, *unused, **kwargs):
    if isinstance(path, pathlib.Path) and path.name.startswith('ch'):
      return os.rename(path, *unused)
    raise OSError(errno.ENOSPC, 'No space', str(path))

  def half(source, target, **kwargs):
    target.write_bytes(b'{"ki')
    full(target)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'rename', full)
    patch.setattr(pathlib.Path, 'replace', full)
    with pytest.raises(flags.UserError, match='aside: No space; give another'):
      Session('test', config)
    with pytest.raises(flags.UserError, match='No space'):
      Session('test', resumed(config, seeds=2))
    patch.setattr(shutil, 'copyfile', half)
    with pytest.raises(flags.UserError, match=r'record\.1\.jsonl: No space'):
      Session('test', resumed(config, seeds=2))
  assert {path.name for path in folder.iterdir()} == before
  assert numbers(folder) == rows
  with Session('test', config):
    pass
  after = {path.name for path in folder.iterdir()}
  assert after == before - {'checkpoints'} | {'record.1.jsonl', 'checkpoints.1'}


@pytest.mark.parametrize('what', ['record.jsonl', '.'])
def test_a_record_that_is_removed_ends_its_run(config, what):
  """What would be written is lost, and its folder is not made again."""
  with (
    pytest.raises(flags.UserError, match=r'record\.jsonl: was removed'),
    Session('test', config) as session,
  ):

    def stop(rows):
      if rows[0]['step'] == 3:
        path = session.folder / what
        path.unlink() if path.is_file() else shutil.rmtree(path)
      return False

    go(session, stop=stop)
  assert session.folder.exists() == (what != '.')


def test_the_version_of_optlab_is_recorded(config, capsys):
  with Session('test', config) as session:
    pass
  versions = record.read(session.folder)[0]['versions']
  assert versions['optlab'] == optlab.__version__
  change(session.folder, 0, versions=versions | {'optlab': '0.0.9'})
  with Session('test', resumed(config)):
    pass
  said = f'optlab was 0.0.9, is {optlab.__version__}: what comes is made'
  assert said in capsys.readouterr().err


def test_a_piece_beyond_the_free_memory_is_refused(
  config, tmp_path, monkeypatch
):
  total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  assert 0 < memory.free() <= 2 * total
  limit = tmp_path / 'memory.max'
  monkeypatch.setattr(memory, '_LIMIT', limit)
  limit.write_text('max\n')
  assert memory.free() > 1000
  limit.write_text('20\n')  # The state is larger.
  with (
    pytest.raises(flags.UserError, match='noisy: steps, beside the state, tak'),
    Session('test', config) as session,
  ):
    go(session)
