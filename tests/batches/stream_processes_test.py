"""Streams in two processes: the numbers of one, and nobody waits for ever."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

import optlab
from tests.batches import stream_program as program

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    place = f'localhost:{free.getsockname()[1]}'
  running = [
    subprocess.Popen(
      [
        sys.executable, '-m', 'tests.batches.stream_program', place,
        str(process), str(tmp_path / 'end'),
      ],
      cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for process in range(2)
  ]  # fmt: skip
  outputs = [process.communicate(timeout=600)[0] for process in running]
  assert [process.returncode for process in running] == [0, 0], outputs
  halves = [program.half(process) for process in range(2)]
  whole = [
    np.stack([leaf.reshape(-1, program.HALF, *leaf.shape[1:]) for leaf in pair])
    .swapaxes(0, 1)
    .reshape(-1, *pair[0].shape[1:])
    for pair in zip(*halves, strict=True)
  ]
  stream = optlab.batches.stream(
    [tuple(whole)], program.WIDTH, sharding=program.split()
  )
  state, sizes = program.steps(stream, program.start(), 6)
  stream.close()
  assert sizes[-1] > program.WIDTH
  for process in range(2):
    end = np.load(tmp_path / f'end.{process}.npz')
    np.testing.assert_array_equal(end['sizes'], sizes)
    np.testing.assert_allclose(end['w'], state.params['w'], 1e-6, 1e-7)
