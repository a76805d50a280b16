"""Every family on eight devices, beside `optax.adam` in the same setting."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

# What a device holds beside the parameters, over what Adam has it hold, and the
# collectives of a step; Adam's are one to gather the parameters and one for the
# gradient. Bilevel estimators hold their lower parameters too, BSVRB four
# tables of 1,024 numbers; MECO and NCE set data and noise on top of each other,
# which moves rows, and one number says whether their gradient is finite.
STATE_AND_COLLECTIVES = {
  'adam': (1.0, 2),
  'value_and_grad': (0.0, 2),
  'diffgrad': (1.5, 2),
  'adagrad_norm': (0.0, 4),
  'normalized_momentum': (0.5, 6),
  'with_storm': (1.0, 3),
  'ghost_norms': (0.5, 5),
  'microbatch_means': (0.5, 5),
  'gns_newton': (0.5, 31),
  'soba': (1.0, 8),
  'bo_rep': (1.0, 10),
  'stocbio': (1.0, 23),
  'f2sa': (1.0, 13),
  'srba': (3.0, 19),
  'meco': (0.0, 26),
  'nce': (0.0, 22),
  'bsvrb': (4 * 1024 / (2 * 4352), 2),
}
SCALARS = 192  # Bytes; a row of a table has 512.


@pytest.mark.slow
def test_bytes_and_collectives_of_a_step():
  """Eight virtual devices need a process of their own."""
  root = pathlib.Path(__file__).parents[1]
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(root),
  }
  done = subprocess.run(
    [sys.executable, '-m', 'tests.eight_devices'],
    env=environment, cwd=root, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  # An eighth would be 0.125; merging and the update are of all parameters.
  assert max(found.pop('share').values()) <= 0.15
  assert found.keys() == STATE_AND_COLLECTIVES.keys()
  adam = found['adam']['before']
  assert adam < 2 * 4 * 4352 / 8 + SCALARS
  for name, (state, most) in STATE_AND_COLLECTIVES.items():
    before, after = (found[name].pop(when) for when in ('before', 'after'))
    assert after == before, name
    assert abs(before - state * adam) <= SCALARS, name
    assert sum(found[name].values()) <= most, (name, found[name])
