r"""A multi-block bilevel quadratic with a hypergradient in closed form.

.. math::
  g_i &= \tfrac12 y^\top A_i y + \tfrac14 e^{0.2 x_1} |y|^2
    - (B_i x + c_i + \epsilon)^\top y \\
  f_i &= \tfrac12 |y - t_i - \epsilon'|^2 + \tfrac{\rho}{2} |x|^2

The lower solution moves nonlinearly with the first entry of :math:`x`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Block(NamedTuple):
  """The data of one block, or of all of them on a leading axis."""

  a: jax.Array  # shape (dim, dim)
  b: jax.Array  # shape (dim, params)
  c: jax.Array  # shape (dim,)
  t: jax.Array  # shape (dim,)
  rho: jax.Array  # shape ()


def make(num_blocks: int = 100, dim: int = 6, params: int = 5) -> Block:
  """Draws the blocks, with curvatures from 1 to 5, from a fixed stream.

  Args:
    num_blocks: The number of blocks.
    dim: Entries of a lower variable.
    params: Entries of the upper variable.

  Returns:
    All blocks, in float64 if it is enabled.
  """
  # A legacy stream, and in this order, so that figures recorded elsewhere
  # belong to the same blocks.
  random = np.random.RandomState(3)
  spectrum = np.diag(np.linspace(1.0, 5.0, dim))
  q = [np.linalg.qr(random.randn(dim, dim))[0] for _ in range(num_blocks)]
  a = np.stack([q @ spectrum @ q.T for q in q])
  b = random.randn(num_blocks, dim, params) / np.sqrt(params)
  c = random.randn(num_blocks, dim)
  t = random.randn(num_blocks, dim)
  rho = np.full(num_blocks, 0.1)
  return Block(*(jnp.asarray(leaf) for leaf in (a, b, c, t, rho)))


def lower(x: jax.Array, y: jax.Array, batch: tuple[Block, jax.Array]):
  """The lower objective of one block; ``batch`` has its data and noise."""
  block, noise = batch
  curvature = y @ block.a @ y + 0.5 * jnp.exp(0.2 * x[0]) * jnp.sum(y**2)
  return 0.5 * curvature - jnp.dot(block.b @ x + block.c + noise, y)


def upper(x: jax.Array, y: jax.Array, batch: tuple[Block, jax.Array]):
  """The upper objective of one block; ``batch`` has its data and noise."""
  block, noise = batch
  distance = jnp.sum((y - block.t - noise) ** 2)
  return 0.5 * distance + 0.5 * block.rho * jnp.sum(x**2)


def solution(x: jax.Array, block: Block) -> jax.Array:
  """The lower solution of one block."""
  shift = 0.5 * jnp.exp(0.2 * x[0]) * jnp.eye(block.c.shape[-1])
  return jnp.linalg.solve(block.a + shift, block.b @ x + block.c)


def objective(x: jax.Array, blocks: Block) -> jax.Array:
  """The upper objective of all blocks at the exact lower solutions.

  Its gradient, by automatic differentiation, is the exact hypergradient.

  Args:
    x: The upper variable.
    blocks: All blocks.

  Returns:
    Scalar.
  """

  def value(block):
    return upper(x, solution(x, block), (block, jnp.zeros_like(block.t)))

  return jnp.mean(jax.vmap(value)(blocks))


def minimizer(blocks: Block) -> jax.Array:
  """The minimizer of `objective`, by Newton's method."""

  def newton(x, _):
    grad = jax.grad(objective)(x, blocks)
    return x - jnp.linalg.solve(jax.hessian(objective)(x, blocks), grad), None

  start = jnp.zeros(blocks.b.shape[-1])
  return jax.lax.scan(newton, start, length=20)[0]
