"""Modules of sif2jax, the CUTEst collection for JAX, one by one."""

import importlib
import importlib.metadata
import pathlib
import sys
import types

from ..lab import flags

UNCONSTRAINED = 'cutest._unconstrained_minimisation'


def module(name: str, kind: str = UNCONSTRAINED) -> types.ModuleType:
  """A module of sif2jax without the package, which takes a minute to import.

  Args:
    name: Of the module, such as ``box3``.
    kind: Where it lies in the package.

  Returns:
    The module.

  Raises:
    UserError: sif2jax is not installed, or has no such module.
  """
  try:
    found = importlib.metadata.distribution('sif2jax')
    folder = pathlib.Path(str(found.locate_file('sif2jax')))
    package = 'sif2jax'
    for part in ('', *kind.split('.')):
      folder = folder / part
      package = f'{package}.{part}' if part else package
      if package not in sys.modules:
        stub = types.ModuleType(package)
        stub.__path__ = [str(folder)]
        sys.modules[package] = stub
    return importlib.import_module(f'sif2jax.{kind}.{name}')
  except (importlib.metadata.PackageNotFoundError, ImportError) as error:
    raise flags.UserError(
      f'cutest_{name}: {error}; pip install sif2jax'
    ) from error
