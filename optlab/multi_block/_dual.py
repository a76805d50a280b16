r"""The two ways in which `bsvrb` follows the dual variable of each block.

The hypergradient of a block needs :math:`v_i = (d_{yy} g_i)^{-1} d_y f_i`.
`track_products` (BSVRB v2) keeps :math:`v_i` itself and moves it along the
tracked residual of that linear system; `track_hessians` (BSVRB v1) tracks the
Hessian and solves with it.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.multi_block import _clock


class Dual(NamedTuple):
  """How a multi-block estimator follows its dual variables.

  The functions see the rows of the sampled blocks; a *held* quantity is what
  the blocks bring to a point, at the current and at the previous point stacked
  on a leading axis of two.

  Attributes:
    init: ``inner -> table`` for all blocks.
    held: ``(rows, elapsed, just_visited) -> held``, with the step lengths that
      have gone by since each row was written, of shape ``(2, sampled)``, and
      which rows the last step visited.
    direction: ``(held, upper_grad) -> dual`` at one point.
    sample: ``(product, upper_grad, hessian) -> sample`` at one point, the
      quantity to be tracked; ``hessian()`` computes it for each block.
    update: ``(rows, held, follow, use) -> rows``; ``follow(tracker)`` is the
      tracker after its step.
    lr_ratio: The step size of what it moves over that of the lower variables.
  """

  init: Callable[..., Any]
  held: Callable[..., Any]
  direction: Callable[..., Any]
  sample: Callable[..., Any]
  update: Callable[..., Any]
  lr_ratio: Any = 0.0


class ProductState(NamedTuple):
  """State of `track_products`."""

  dual: base.ArrayTree  # like inner: v at the block's last visit
  residual: base.ArrayTree  # like inner: u, times dual_lr_ratio


@checks.domains(
  dual_lr_ratio=checks.POSITIVE,
  radius=checks.POSITIVE._replace(optional=True),
)
def track_products(
  dual_lr_ratio: float | jax.Array = 1.0,
  radius: float | jax.Array | None = None,
) -> Dual:
  r"""Tracks Hessian-vector products: BSVRB v2.

  Choose it wherever the lower variable of a block has more than a few dozen
  entries: a block costs no more than three of its lower variables.

  .. math::
    u_i &\leftarrow \text{MSVR of } d_{yy} g_i\, v_i - d_y f_i \\
    v_i &\leftarrow \text{Proj}_{|v| \le V} (v_i - \tau_v u_i)
      \quad \text{for all } i

  Args:
    dual_lr_ratio: Scalar :math:`\tau_v / \tau`, the step of the dual variables
      over that of the lower ones.
    radius: Scalar :math:`V`, or ``None`` for no projection. Where it is active
      it biases the hypergradient.

  Returns:
    A `Dual` for `bsvrb`.

  Raises:
    TypeError: One of them is not a real number.
    ValueError: ``dual_lr_ratio`` or ``radius`` is not positive.

  Examples:
    >>> import optlab
    >>> dual = optlab.multi_block.track_products(dual_lr_ratio=0.5)
    >>> estimator = optlab.bsvrb(
    ...     lambda x, y, batch: y, lambda x, y, batch: y**2, 10, dual=dual)

  Notes:
    The projection takes place when a block is visited, after all the stale
    steps since its last visit; the paper projects in between, too.
  """
  checks.enforce(track_products, locals())

  def init(inner):
    return ProductState(
      dual=trees.zeros_accumulator(inner),
      residual=trees.zeros_accumulator(inner),
    )

  def held(rows, elapsed, just_visited):
    del just_visited
    dual = _clock.advance(rows.dual, rows.residual, elapsed)
    if radius is None:
      return dual
    norm = jax.vmap(jax.vmap(optax.tree.norm))(dual)
    factor = jnp.minimum(1.0, radius / jnp.maximum(norm, radius))
    return jax.tree.map(lambda leaf: leaf * trees.align(factor, leaf), dual)

  def sample(product, upper_grad, hessian):
    del hessian
    return jax.tree.map(
      lambda product, grad: (
        jnp.asarray(dual_lr_ratio, grad.dtype) * (product - grad)
      ),
      product,
      upper_grad,
    )

  def update(rows, held, follow, use):
    del use
    dual = jax.tree.map(lambda leaf: leaf[0], held)
    return ProductState(dual, follow(rows.residual))

  return Dual(
    init=init,
    held=held,
    direction=lambda dual, upper_grad: dual,
    sample=sample,
    update=update,
    lr_ratio=dual_lr_ratio,
  )


class HessianState(NamedTuple):
  """State of `track_hessians`; a zero matrix belongs to an unvisited block."""

  hessian: jax.Array  # shape (num_blocks, dim, dim)
  hessian_before: jax.Array  # shape (num_blocks, dim, dim), one visit ago


@checks.domains(
  floor=checks.POSITIVE._replace(
    remedy='It bounds the eigenvalues of every Hessian from below.'
  ),
)
def track_hessians(floor: float | jax.Array = 1e-2) -> Dual:
  r"""Tracks Hessians and solves with them: BSVRB v1.

  Choose it for lower variables of few entries, where it needs no step size for
  the dual variables and follows ill-conditioned lower problems better.

  .. math::
    H_i \leftarrow \text{Proj}_{H \succeq \mu I} (\text{MSVR of }
      d_{yy} g_i), \qquad v_i = H_i^{-1} d_y f_i

  A block whose tracker lies above the floor costs two Cholesky factorizations;
  the spectrum is only computed for a block whose tracker does not.

  Args:
    floor: Scalar :math:`\mu`, at most the strong convexity of the lower
      problems (plus the ``damping`` of `bsvrb`) for a hypergradient without
      bias. Where the lower Hessians are singular to working precision, a
      damping of 1e-2 or more keeps the trackers above the floor, and so the
      step cheap, at the price of a bias.

  Returns:
    A `Dual` for `bsvrb`.

  Raises:
    TypeError: ``floor`` is not a real number.
    ValueError: ``floor`` is not positive.

  Examples:
    >>> import optlab
    >>> estimator = optlab.bsvrb(
    ...     lambda x, y, batch: y, lambda x, y, batch: y**2, 10,
    ...     dual=optlab.multi_block.track_hessians(floor=0.1))

  Notes:
    Memory: two matrices of the size of a block's Hessian for each block.
    Before a block's first visit its dual variable counts as zero. A block whose
    samples themselves are concave on average is left out by the guard of
    `bsvrb`; without it the projection is all there is, as in the paper.
  """
  checks.enforce(track_hessians, locals())

  def init(inner):
    leaves = jax.tree.leaves(inner)
    dim = sum(math.prod(leaf.shape[1:]) for leaf in leaves)
    zeros = lambda: trees.zeros_rows(
      inner, (dim, dim), trees.accumulator_dtype(inner)
    )
    return HessianState(zeros(), zeros())

  def held(rows, elapsed, just_visited):
    del elapsed
    before = jnp.where(
      trees.align(just_visited, rows.hessian), rows.hessian_before, rows.hessian
    )
    return jnp.stack([rows.hessian, before])

  def direction(hessian, upper_grad):
    # After the projection every diagonal entry is positive.
    known = hessian[:, 0, 0] > 0
    identity = jnp.eye(hessian.shape[-1], dtype=hessian.dtype)
    factor = jnp.linalg.cholesky(
      jnp.where(trees.align(known, hessian), hessian, identity)
    )

    def solve(factor, known, grad):
      flat, unravel = flatten_util.ravel_pytree(grad)
      solution = jax.scipy.linalg.cho_solve(
        (factor, True), flat.astype(factor.dtype)
      )
      return unravel(jnp.where(known, solution, 0.0).astype(flat.dtype))

    return jax.vmap(solve)(factor, known, upper_grad)

  def sample(product, upper_grad, hessian):
    del product, upper_grad
    return hessian()

  def update(rows, held, follow, use):
    del held
    hessian = project_floor(follow(rows.hessian), floor, use)
    return HessianState(hessian, rows.hessian)

  return Dual(init, held, direction, sample, update)


def project_floor(matrices, floor, use):
  """Lifts the eigenvalues of the used matrices to ``floor`` where below it."""
  floor = jnp.asarray(floor, matrices.dtype)
  identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
  matrices = (matrices + jnp.swapaxes(matrices, -1, -2)) / 2
  # Besides keeping NaN from LAPACK, this orders the factorizations: `use` is
  # known after the solves of this step. On XLA's CPU backend a Cholesky and a
  # triangular solve that run at once may wait for each other for ever.
  matrices = jnp.where(
    trees.align(use, matrices), matrices, (1 + floor) * identity
  )
  factors = jnp.linalg.cholesky(matrices - floor * identity)
  above = jnp.all(jnp.isfinite(factors), axis=(-2, -1))

  # One spectrum a turn, and no turn where no matrix needs it. A loop keeps
  # that so under vmap, where a cond would compute both branches.
  def lift(carry):
    matrices, below = carry
    index = jnp.argmax(below)
    values, vectors = jnp.linalg.eigh(matrices[index])
    lifted = (vectors * jnp.maximum(values, floor)) @ vectors.T
    return matrices.at[index].set(lifted), below.at[index].set(False)

  carry = matrices, use & ~above
  return jax.lax.while_loop(lambda c: jnp.any(c[1]), lift, carry)[0]
