"""Runs a program of each method on one device, and on a mesh.

python tests/experiments/devices_programs.py FOLDER MESH
  [COORDINATOR PROCESSES PROCESS]
"""

import pathlib
import sys

import jax

from experiments import density_estimation
from experiments import hyperparameter_optimization
from experiments import image_classification
from experiments import logistic_regression
from experiments import multi_block_hyperparameters
from experiments.lab import devices
from experiments.lab import peers

F64 = {'precision': 'float64'}
TUNED = F64 | {'seeds': 2, 'tuning_seeds': 1}
PROGRAMS = {
  'gns': (
    logistic_regression,
    F64
    | {
      # The matrix of 'exact' is of sums in float32, in another order there.
      'dataset': 'mushrooms', 'optimizers': ('gns',), 'max_steps': 8,
      'curvature': ('gauss_newton',), 'seeds': 1,
    },
  ),
  'diffgrad': (
    image_classification,
    TUNED
    | {
      'optimizers': ('diffgrad',), 'batches': ('32',),
      'learning_rates': (0.01,), 'epochs': 1,
    },
  ),
  'adadagrad': (
    image_classification,
    TUNED
    | {
      'optimizers': ('adagrad',), 'batches': ('norm:1',),
      'learning_rates': (0.01,), 'epochs': 1,
    },
  ),
  'bo_rep': (
    hyperparameter_optimization,
    TUNED
    | {
      'methods': ('bo_rep',), 'upper_steps': ('momentum',),
      'learning_rates': (0.1,), 'steps': 50,
    },
  ),
  'bsvrb': (
    multi_block_hyperparameters,
    F64
    | {
      'dataset': 'breast_cancer', 'methods': ('bsvrb_v2',), 'num_blocks': 16,
      'blocks': 8, 'rows': 8, 'seeds': 2, 'steps': 40,
      'looks': 2, 'learning_rates': (100.0,), 'inner_lrs': (1.0,),
    },
  ),
  'meco': (
    density_estimation,
    F64
    | {
      'sets': ('pinwheel',), 'methods': ('meco',), 'learning_rates': (0.02,),
      'seeds': 2, 'steps': 20, 'data_rows': 64, 'noise_rows': 64,
    },
  ),
}  # fmt: skip


def main(folder, mesh, coordinator='', processes='1', process='0'):
  """Writes FOLDER/METHOD/one and FOLDER/METHOD/many."""
  # Not on import, which a test does for the names.
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_x64', True)
  where = {
    'mesh': mesh, 'coordinator': coordinator, 'processes': int(processes),
    'process': int(process),
  }  # fmt: skip
  peers.connect(devices.Config(**where))
  with peers.together():
    for name, (program, flags) in PROGRAMS.items():
      for kind, more in (('one', {}), ('many', where)):
        output = pathlib.Path(folder) / name / kind
        program.main(program.Config(output_dir=str(output), **flags, **more))


if __name__ == '__main__':
  main(*sys.argv[1:])
