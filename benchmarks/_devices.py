"""Virtual devices: their number is settled before JAX starts."""

import os
import subprocess
import sys

KINDS = {
  'all-reduce': 'AR',
  'all-gather': 'AG',
  'reduce-scatter': 'RS',
  'all-to-all': 'AA',
  'collective-permute': 'CP',
}


def run(module: str, argument: str, count: int) -> None:
  """Runs a benchmark's module, with an argument, on so many CPU devices."""
  flags = f'--xla_force_host_platform_device_count={count}'
  subprocess.run(
    [sys.executable, '-m', f'benchmarks.{module}', argument],
    check=True,
    env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
  )
