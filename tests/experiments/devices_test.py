"""Many devices and processes: the numbers of one device, for every method."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab import devices
from experiments.lab import flags
from experiments.lab import peers
from experiments.lab import record
from experiments.lab.session import Session
from tests.experiments import devices_programs

ROOT = pathlib.Path(__file__).parents[2]
# What sums in another order may differ by, in float64, after 20 to 100 steps.
TOLERANCE = 1e-9


def start(*arguments, host_devices=1):
  flags = f'--xla_force_host_platform_device_count={host_devices}'
  return subprocess.Popen(
    [sys.executable, '-m', 'tests.experiments.devices_programs', *arguments],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': flags},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def free_place():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return f'localhost:{free.getsockname()[1]}'


def run_all(folder, mesh, *, host_devices=1, processes=1):
  more = [[]]
  if processes > 1:
    place = free_place()
    more = [[place, str(processes), str(i)] for i in range(processes)]
  running = [
    start(str(folder), mesh, *own, host_devices=host_devices) for own in more
  ]
  outputs, codes = finish(running)
  assert not any(codes), outputs
  return folder


def finish(running):
  outputs = [process.communicate(timeout=3000)[0] for process in running]
  return outputs, [process.returncode for process in running]


@pytest.fixture(scope='module')
def eight_devices(tmp_path_factory):
  folder = tmp_path_factory.mktemp('devices')
  return run_all(folder, 'data=4,blocks=2', host_devices=8)


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
  folder = tmp_path_factory.mktemp('processes')
  return run_all(folder, 'data=2', processes=2)


@pytest.mark.slow
@pytest.mark.xdist_group('devices')
@pytest.mark.parametrize('method', devices_programs.PROGRAMS)
@pytest.mark.parametrize('where', ['eight_devices', 'two_processes'])
def test_many_devices_give_the_numbers_of_one(where, method, request):
  folder = request.getfixturevalue(where)
  one, many = (
    record.select(record.read(folder / method / kind)[1], 'eval')
    for kind in ('one', 'many')
  )
  assert len(one) == len(many) > 1
  for row, other in zip(one, many, strict=True):
    assert sum(other['collectives'].values()) > 0
    for name in row.keys() - {'seconds'}:
      if isinstance(row[name], str):
        assert other[name] == row[name]
        continue
      # Of grids: differences of numbers near one, whose rounding is absolute.
      absolute = 1e-14 if name in ('box_error', 'spacing_error') else 0.0
      np.testing.assert_allclose(
        np.asarray(other[name], float), np.asarray(row[name], float),
        rtol=TOLERANCE, atol=absolute, err_msg=f'{name} at step {row["step"]}',
      )  # fmt: skip


def launch(folder, process, place, *more):
  command = [
    sys.executable, '-m', 'experiments.density_estimation', '--mesh=data=2',
    f'--coordinator={place}', '--processes=2', f'--process={process}',
    f'--output_dir={folder}', '--sets=8gaussians', '--methods=meco',
    '--learning_rates=0.01', '--seeds=1', '--steps=2000', '--data_rows=64',
    '--noise_rows=64', '--checkpoint_every=0', *more,
  ]  # fmt: skip
  return subprocess.Popen(
    command, cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


def both(folder, *more):
  place = free_place()
  return [launch(folder, i, place, *more) for i in range(2)]


@pytest.mark.slow
def test_an_interrupt_to_one_process_stops_all_and_they_resume(tmp_path):
  cut, whole = tmp_path / 'cut', tmp_path / 'whole'
  outputs, codes = finish(both(whole))
  assert codes == [0, 0], outputs
  running = both(cut)
  while not list(cut.glob('checkpoints/*/*/meta')):
    time.sleep(0.05)
    if running[0].poll() is not None:
      break
  running[1].send_signal(signal.SIGINT)
  outputs, codes = finish(running)
  assert codes == [130, 130], outputs
  assert 'go on with --resume' in outputs[0]
  outputs, codes = finish(both(cut, '--resume'))
  assert codes == [0, 0], outputs
  found, expected = (
    record.without_times(record.read(folder)[1]) for folder in (cut, whole)
  )
  assert str(found) == str(expected)


@dataclasses.dataclass(frozen=True)
class Config(devices.Config):
  precision: str = flags.flag('float32', 'Floating point type.')


# Without a process of its own: the two devices of this one.


def sgd(state, data):
  """A step on half of the rows, and on a table with an entry a block."""
  x, table, key = state
  lane = jax.random.fold_in(key[0], jnp.int32(table[0, 0, 0]))
  rows = devices.split(data[jax.random.permutation(lane, len(data))[:4]])
  gradient = jnp.mean(jnp.tanh(rows @ x[0]) @ rows, keepdims=True) * x
  blocks = jnp.array([0, 5])
  return x - 0.1 * gradient, table.at[:, blocks].add(1.0 + x[0, 0]), key


def go(config, *, rows=8, **kwargs):
  data = jax.random.normal(jax.random.key(0), (rows, 3))
  state = jnp.ones((1, 3)), jnp.zeros((1, 6, 2)), jax.random.key(1)[None]
  with Session('test', config) as session:
    return session.run(
      'sgd', state, sgd,
      lambda state: {'value': state[0].sum(), 'table': state[1].sum()},
      steps=10, data=data, tables=6, keep_state=True, **kwargs,
    )  # fmt: skip


def values(folder):
  rows = record.select(record.read(folder)[1], 'eval')
  return [(row['step'], row['value'], row['table']) for row in rows]


@pytest.mark.parametrize('mesh', ['data=2', 'blocks=2', 'data=1,blocks=2'])
def test_a_session_on_a_mesh(mesh, tmp_path):
  one, many = (
    Config(output_dir=str(tmp_path / name), mesh=flag)
    for name, flag in (('one', ''), ('many', mesh))
  )
  expected, found = go(one), go(many)
  np.testing.assert_allclose(
    values(tmp_path / 'many'), values(tmp_path / 'one'), rtol=1e-6
  )
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
  assert found[1].sharding.is_fully_addressable
  rows = record.select(record.read(tmp_path / 'many')[1], 'eval')
  assert rows[-1]['collectives']


@pytest.mark.parametrize(
  'then', ['data=2', '', pytest.param('blocks=2', marks=pytest.mark.slow)]
)
def test_a_run_on_a_mesh_resumes_there_or_on_another(tmp_path, then, capsys):
  """On the same bit for bit, on another but for rounding, and says so."""
  config = Config(
    output_dir=str(tmp_path / 'cut'), mesh='data=2', checkpoint_every=0.0
  )
  go(dataclasses.replace(config, output_dir=str(tmp_path / 'whole')))

  def stop(rows):
    if rows[0]['step'] == 4:
      raise RuntimeError('cut')
    return False

  with pytest.raises(RuntimeError, match='cut'):
    go(config, stop=stop)
  go(dataclasses.replace(config, resume=True, mesh=then))
  cut, whole = values(tmp_path / 'cut'), values(tmp_path / 'whole')
  noted = record.select(record.read(tmp_path / 'cut')[1], 'resumed')
  if then == config.mesh:
    assert cut == whole
    assert not noted
  else:
    np.testing.assert_allclose(cut, whole, rtol=1e-6)
    changed = ['data=2', then or 'one device']
    assert [row['changed'] for row in noted] == [{'--mesh': changed}]
    assert f'--mesh was data=2, is {changed[1]}' in capsys.readouterr().err


def test_a_mesh_that_splits_nothing_is_said(tmp_path, capsys):
  config = Config(output_dir=str(tmp_path), mesh='blocks=2')
  data = jnp.ones((7, 3))
  with Session('test', config) as session:
    session.run(
      'still', jnp.ones((1, 3)), lambda state, data: state * data.mean(),
      lambda state: {'value': state.sum()}, steps=1, data=data,
    )  # fmt: skip
  assert 'no exchange between devices' in capsys.readouterr().err


@pytest.mark.parametrize(
  'mesh', ['data', 'data=0', 'rows=2', 'data=2;blocks=2']
)
def test_a_malformed_mesh(mesh):
  with pytest.raises(flags.UserError, match='is not data=N or blocks=N'):
    devices.make_mesh(mesh)


def test_more_devices_than_there_are():
  with pytest.raises(flags.UserError, match='16 devices, this run has'):
    devices.make_mesh('data=8,blocks=2')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'processes': 2}, '--processes=2 needs --coordinator'),
    ({'coordinator': 'localhost:1'}, '--coordinator needs --mesh'),
    (
      {'coordinator': 'localhost:1', 'mesh': 'data=2', 'process': 1},
      'must be below --processes=1',
    ),
  ],
)
def test_flags_that_do_not_fit(options, message):
  with pytest.raises(flags.UserError, match=message):
    peers.connect(devices.Config(**options))


@pytest.mark.parametrize(
  ('error', 'leaves'),
  [
    (ValueError('UNKNOWN: Gloo AllGather failed: Connection closed'), True),
    (jax.errors.JaxRuntimeError('UNAVAILABLE: connection lost'), True),
    (jax.errors.JaxRuntimeError('INTERNAL: out of memory'), False),
    (ValueError('no connection between x and y'), False),
  ],
)
def test_a_peer_that_is_gone_is_one_line(monkeypatch, error, leaves):
  def leave(message, status):
    assert 'another process of this run is gone' in message
    raise SystemExit(status)

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(peers, 'leave', leave)
  with pytest.raises(SystemExit if leaves else type(error)), peers.together():
    raise error


def test_a_batch_that_does_not_divide_stays_whole():
  mesh = devices.make_mesh('data=2')
  with jax.set_mesh(mesh):
    even, odd, scalar = jax.jit(devices.split)(
      (jnp.ones((4, 2)), jnp.ones(3), 1.0)
    )
  assert even.sharding.shard_shape(even.shape) == (2, 2)
  assert odd.sharding.is_fully_replicated
  assert scalar.sharding.is_fully_replicated
