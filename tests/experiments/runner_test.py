"""The session of a program: record, checkpoints, resume, interruption."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab import flags
from experiments.lab import record
from experiments.lab.session import Session


@dataclasses.dataclass(frozen=True)
class Config(flags.Config):
  rate: float = flags.flag(0.1, 'Rate.')


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


def test_a_row_is_written_once_whatever_its_numbers(config):
  row = {'a': float('inf'), 'b': np.float32('nan'), 'c': [1.0, None]}
  for resume in (False, True):
    again = dataclasses.replace(config, resume=resume)
    with Session('test', again) as session:
      session.write('summary', **row)
      session.write('summary', **row | {'c': [2.0, None]})
  assert len(record.read(session.folder)[1]) == 2


def test_another_configuration_version_or_program_is_refused(config):
  with Session('test', config) as session:
    go(session)
  other = dataclasses.replace(config, resume=True, rate=0.2)
  with pytest.raises(flags.UserError, match=r'--rate was 0\.1, is 0\.2'):
    Session('test', other)
  same = dataclasses.replace(config, resume=True)
  with pytest.raises(flags.UserError, match='holds a run of test'):
    Session('other', same)
  path = session.folder / 'record.jsonl'
  lines = path.read_text().split('\n')
  header = json.loads(lines[0])
  header['versions']['jax'] = '0.0.1'
  path.write_text('\n'.join([json.dumps(header), *lines[1:]]))
  with pytest.raises(flags.UserError, match=r'jax was 0\.0\.1, is'):
    Session('test', same)


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
  writer.write('run', program='test')
  row = {'a': float('inf'), 'b': np.float32(0.5), 'c': jnp.arange(2)}
  writer.write('eval', **row)
  writer.close()
  _, rows = record.read(tmp_path)
  assert rows == [{'kind': 'eval', 'a': float('inf'), 'b': 0.5, 'c': [0, 1]}]


def test_a_file_that_is_no_record_is_named(tmp_path):
  with pytest.raises(flags.UserError, match='No such file'):
    record.read(tmp_path / 'nothing')
  (tmp_path / 'bad').write_text('hello\n')
  with pytest.raises(flags.UserError, match='line 1 is not JSON'):
    record.read(tmp_path / 'bad')
  (tmp_path / 'bad').write_text('{"kind": "eval"}\n')
  with pytest.raises(flags.UserError, match='not a record'):
    record.read(tmp_path / 'bad')


def test_seeds_run_one_after_the_other_under_one_name(config):
  with Session('test', config) as session:
    for seed in (0, 1):
      session.run(
        'noisy', start(), advance, lambda state: {'value': state[0][0, 0]},
        steps=2, seeds=(seed,),
      )  # fmt: skip
    rows = session.select('eval', method='noisy')
  assert [row['seed'] for row in rows] == [0, 0, 0, 1, 1, 1]
