"""What a step of GNS-Newton holds and gathers, by solver; nothing runs.

``vectors`` are the compiler's temporaries on one device, in vectors like the
float32 parameters, for an objective whose linearization keeps one. The other
columns are of a perceptron with 1.3 million parameters and the Gauss-Newton
matrix, rows and parameters split over eight virtual devices: temporaries in
bytes a parameter that the device holds, activations and gathered parameters
with them, and the volumes of all parameters that it gets from gathers, each
counted once, also where it stands in a loop.

  python -m benchmarks newton_memory
"""

import itertools
import sys

import jax
import jax.numpy as jnp

from benchmarks import _devices
from benchmarks import transformer
import optlab
from optlab import newton

DEVICES, ROWS, WIDTHS = 8, 1024, (256, 1024, 1024, 16)
SOLVERS = {
  'cg': optlab.cg,
  'cg, preconditioned': lambda: optlab.cg(
    preconditioner=newton.row_norms(jax.random.key(0))
  ),
  'multishift_cg': newton.multishift_cg,
  'lanczos': optlab.lanczos,
}


def compiled(solver, fun, factory, params, batch):
  """The program of a step, from shapes, with the state donated."""
  tx = optlab.gns_newton(solver)
  estimator = optlab.with_curvature(optlab.value_and_grad(fun), factory)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params
  )
  state = jax.eval_shape(lambda p: optlab.init(p, estimator, tx), shapes)
  if jax.device_count() == DEVICES:
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    like = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(params)}
    state = transformer.place(state, mesh, like)
  step = jax.jit(optlab.train_step(estimator, tx), donate_argnums=0)
  return step.lower(state, batch).compile()


def alone(solver) -> float:
  """Vectors like the parameters, on one device."""
  size = 1 << 20
  fun = lambda params, _: (
    jnp.sum(jnp.cosh(params['a'])) + jnp.sum(jnp.cosh(params['b']))
  )
  params = {
    'a': jax.ShapeDtypeStruct((size // 2,), jnp.float32),
    'b': jax.ShapeDtypeStruct((size // 4, 2), jnp.float32),
  }
  program = compiled(solver, fun, optlab.hessian(fun), params, None)
  return program.memory_analysis().temp_size_in_bytes / 4 / size


def network(params, batch):
  x = batch[0]
  for i in range(len(WIDTHS) - 1):
    x = transformer.by_rows(x @ params[f'w{i}'])
    x = jnp.tanh(x) if i + 2 < len(WIDTHS) else x
  return x


def squares(outputs, batch):
  return jnp.mean((outputs - batch[1]) ** 2)


def together(solver) -> tuple[float, float]:
  """Bytes a parameter of a device, and volumes that it gets."""
  mesh = jax.make_mesh(
    (DEVICES,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  on = lambda shape, *spec: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec))
  )
  params = {
    f'w{i}': on(shape, None, 'data')
    for i, shape in enumerate(itertools.pairwise(WIDTHS))
  }
  batch = on((ROWS, WIDTHS[0]), 'data'), on((ROWS, WIDTHS[-1]), 'data')
  fun = lambda params, batch: squares(network(params, batch), batch)
  factory = optlab.gauss_newton(network, squares)
  with jax.set_mesh(mesh):
    program = compiled(solver, fun, factory, params, batch)
  size = sum(leaf.size for leaf in params.values())
  lines = [x for x in program.as_text().splitlines() if 'all-gather' in x]
  _, volume = transformer.moved('\n'.join(lines))
  held = program.memory_analysis().temp_size_in_bytes
  return held / (size / DEVICES), volume / size / 4


def measure(name: str) -> None:
  """Prints a line, or a part of it."""
  solver = SOLVERS[name]()
  if jax.device_count() == 1:
    print(f'{name:24}{alone(solver):9.1f}', end='', flush=True)
  else:
    print('{:12.0f}{:9.1f}'.format(*together(solver)), flush=True)


def main() -> None:
  """Prints the table."""
  print(f'{"solver":24}{"vectors":>9}{"bytes/local":>12}{"gathered":>9}')
  for name in SOLVERS:
    for count in (1, DEVICES):
      _devices.run('newton_memory', name, count)


if __name__ == '__main__':
  measure(sys.argv[1])
