"""A Krylov basis for all shifts; `optlab.newton` compares the solvers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import _varying
from optlab import base
from optlab import checks
from optlab import trees
from optlab.newton import _conjugate

PART = 10  # Vectors of a basis that are looked at together.


@checks.domains(
  max_steps=checks.Integer(1),
  rtol=checks.NON_NEGATIVE._replace(optional=True),
  power=checks.NON_NEGATIVE,
)
def lanczos(
  max_steps: int = 100,
  rtol: float | jax.Array | None = None,
  power: float | jax.Array = 0.5,
) -> base.Solver:
  r"""One Krylov basis for all shifts.

  With :math:`A V_k = V_k T_k + \beta_k v_{k+1} e_k^\top` from :math:`b`, the
  solution for any shift is :math:`x = |b| V_k (T_k + s I)^{-1} e_1`: a
  tridiagonal system and no product. The basis grows until the residual is below
  :math:`\min(\text{rtol}, |b|^{\text{power}}) |b|` at the smallest shift that
  makes the operator positive definite, as far as the basis shows, among
  ``shift * 4 ** j``. Larger shifts have smaller residuals. The default for
  matrix-free operators.

  Args:
    max_steps: The most products, the size of the basis.
    rtol: The largest relative residual; ``None`` is 0.1, and 0.01 for up to 20
      parameters, where the last products are few and save evaluations.
    power: The power of the norm in the forcing term; 0 leaves ``rtol`` alone.

  Returns:
    A solver. ``ok`` is false where a pivot of ``T_k + shift`` is not positive.

  Raises:
    TypeError: ``max_steps`` is not an integer.
    ValueError: ``max_steps`` is below one, or ``rtol`` or ``power`` negative.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> solver = optlab.lanczos(rtol=1e-6)
    >>> solve = solver(lambda v: v * jnp.array([3.0, 15.0]), jnp.ones(2), 1.0)
    >>> print(solve(1.0)[0].round(4), solve(-4.0)[1])
    [0.25   0.0625] False

  Notes:
    Memory for ``max_steps`` vectors, filled up to a multiple of ten. Fully
    reorthogonalized: a step takes four passes over the vectors so far, by
    tens, beside its product.
  """
  checks.enforce(lanczos, locals())

  def solver(operator, b, shift):
    krylov = _krylov(operator, b, shift, max_steps, rtol, power)

    def solve(shift):
      x, definite, finite, _ = krylov.solve(shift)
      return x, definite & finite, jnp.zeros((), jnp.int32)

    return base.Prepared(solve, krylov.products)

  return solver


def few_products(
  fallback: base.Solver, max_steps: int = 100, rtol: float = 1e-3
) -> base.Solver:
  """`lanczos` where few products do; else another solver, for that shift.

  For operators whose products are cheap beside the other solver, but not beside
  what they are made of: solved this well, a system takes the steps that it
  would take solved exactly.

  Args:
    fallback: The other solver, which prepares without products.
    max_steps: The size of a basis.
    rtol: The largest relative residual.

  Returns:
    A solver. ``ok`` is false where the basis shows a direction of curvature
    that is not positive, or the other solver says so.
  """

  def solver(operator, b, shift):
    krylov = _krylov(operator, b, shift, max_steps, rtol, 0.5, hopeful=True)
    other = fallback(operator, b, shift)

    def solve(shift):
      x, ok, finite, small = krylov.solve(shift)
      # Not a branch: under vmap both sides of one run, for each lane; a loop
      # ends before it begins where no lane needs it. What did not depend on its
      # carry the compiler would move out of it.
      x, ok, _ = _varying.while_loop(
        lambda now: ~now[2],
        lambda now: (*other(jnp.where(now[2], 0, shift)), jnp.asarray(True)),
        (x, ok, ~ok | (finite & small)),
      )
      return x, ok, jnp.zeros((), jnp.int32)

    return base.Prepared(solve, krylov.products)

  return solver


class _Krylov(NamedTuple):
  """A basis, as far as it was built."""

  solve: Any  # shift -> (x, is definite, is finite, is the residual small)
  products: jax.Array


def _krylov(operator, b, shift, max_steps, rtol, power, hopeful=False):
  """Prepares a basis; see `lanczos`."""
  unit, norm, product = _conjugate.unit_and_product(operator, b)
  numbers = sum(leaf.size for leaf in jax.tree.leaves(unit))
  size = max(1, min(max_steps, numbers))
  tolerance = _conjugate.forcing(norm, rtol, power, unit)
  basis, diagonal, off, left, k = _krylov_basis(
    product,
    unit,
    norm == 0,
    # At several shifts at once.
    shift * 4.0 ** jnp.arange(16, dtype=norm.dtype),
    size,
    tolerance,
    hopeful,
  )
  off = jnp.where(jnp.arange(off.size) < k - 1, off, 0.0)

  def solve(shift):
    y, definite = _solve_tridiagonal(diagonal + shift, off, norm, k)
    x = _combination(y, basis)
    # A + shift I of the solution misses b along the next vector alone.
    small = left * jnp.abs(y[jnp.maximum(k - 1, 0)]) <= tolerance * norm
    return _conjugate.like(x, b), definite, trees.is_finite(x), small

  return _Krylov(solve, k)


def _krylov_basis(product, vector, empty, shifts, size, tolerance, hopeful):
  """Orthonormal vectors, the tridiagonal matrix in them, and their number.

  Where it is ``hopeful`` it ends early if the residual falls at less than a
  third of the rate that would bring it to the tolerance in time.
  """
  dtype, rows = shifts.dtype, _whole(size)

  def step(carry):
    basis, diagonal, off, _, vector, pivots, residuals, good, _, k = carry
    basis = jax.tree.map(lambda rows, leaf: rows.at[k].set(leaf), basis, vector)
    image = product(vector)
    alpha = trees.dot(vector, image)
    image = _orthogonal(basis, image, k, size, dtype)
    beta = trees.norm(image)
    last = off[jnp.maximum(k - 1, 0)]
    # Pivots and residuals of the recurrence.
    pivots = alpha + shifts - jnp.where(k > 0, last * (last / pivots), 0.0)
    good = good & (pivots > 0)
    residuals = residuals * beta / jnp.where(good, pivots, 1.0)
    first = jnp.argmax(good)
    scale = jnp.abs(alpha) + last
    # An invariant subspace has been found, up to rounding.
    done = beta <= 10 * jnp.finfo(dtype).eps * scale
    done |= good[first] & (residuals[first] <= tolerance)
    if hopeful:
      in_time = residuals[first] <= tolerance ** ((k + 1) / (3 * size))
      done |= (k + 1 >= size // 4) & ~(good[first] & in_time)
    off = off.at[k].set(jnp.where(done, 0.0, beta))
    vector = trees.divided(image, jnp.where(beta > 0, beta, 1.0))
    diagonal = diagonal.at[k].set(alpha)
    return (
      basis, diagonal, off, beta, vector, pivots, residuals, good, done, k + 1,
    )  # fmt: skip

  def unfinished(carry):
    *_, done, k = carry
    return ~done & (k < size)

  start = (
    jax.tree.map(
      lambda leaf: jnp.broadcast_to(jnp.zeros_like(leaf), (rows, *leaf.shape)),
      vector,
    ),
    jnp.zeros(rows, dtype),
    jnp.zeros(rows, dtype),
    jnp.zeros((), dtype),
    vector,
    jnp.ones_like(shifts),
    jnp.ones_like(shifts),
    jnp.ones(shifts.shape, bool),
    empty,
    jnp.zeros((), jnp.int32),
  )
  basis, diagonal, off, left, *_, k = _varying.while_loop(
    unfinished, step, start
  )
  return basis, diagonal, off, left, k


def _whole(size):
  """Rows of a basis for so many vectors: as many as its parts have."""
  return size if size <= PART else -(-size // PART) * PART


def _orthogonal(basis, image, k, size, dtype):
  """What of a vector is orthogonal to the first k + 1 rows of a basis.

  Part by part, those only that have vectors yet. Twice is enough (Kahan).

  Args:
    basis: Rows, zeros from k + 1 on.
    image: The vector.
    k: The last row.
    size: The most vectors.
    dtype: That of inner products.
  """
  rows, size = _whole(size), min(PART, size)

  def project(first, image):
    part = jax.tree.map(
      lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), basis
    )
    inside = _combination(_inner_products(part, image, size, dtype), part)
    return jax.tree.map(jnp.subtract, image, inside)

  if size == rows:
    return project(0, project(0, image))

  def turn(image, first):
    image = _varying.cond(
      first <= k, project, lambda first, image: image, first, image
    )
    return image, None

  firsts = jnp.tile(size * jnp.arange(rows // size, dtype=jnp.int32), 2)
  return jax.lax.scan(turn, image, firsts)[0]


def _solve_tridiagonal(diagonal, off, first, k):
  """Solves ``T y = first * e_1`` in k rows; also: are all pivots positive."""

  def forward(carry):
    i, ratio, before, rhs, good, ratios, z = carry
    pivot = diagonal[i] - ratio * before
    good &= pivot > 0
    ratio, before = off[i] / pivot, off[i]
    return (
      i + 1, ratio, before, -ratio * rhs, good,
      ratios.at[i].set(ratio), z.at[i].set(rhs / pivot),
    )  # fmt: skip

  zero, none = jnp.zeros_like(first), jnp.zeros_like(diagonal)
  start = (
    jnp.zeros_like(k),
    zero,
    zero,
    first,
    jnp.ones_like(first, bool),
    none,
    none,
  )
  *_, good, ratios, z = _varying.while_loop(
    lambda carry: carry[0] < k, forward, start
  )

  def backward(carry):
    i, after, y = carry
    after = z[i] - ratios[i] * after
    return i - 1, after, y.at[i].set(after)

  *_, y = _varying.while_loop(
    lambda carry: carry[0] >= 0, backward, (k - 1, zero, none)
  )
  return y, good


def _inner_products(basis, vector, size, dtype):
  """Those of a vector with all vectors of a basis."""
  products = jax.tree.leaves(jax.tree.map(trees.leaf_dot, basis, vector))
  return sum(
    (product.astype(dtype) for product in products),
    start=jnp.zeros(size, dtype),
  )


def _combination(weights, basis):
  """The weighted sum of a basis."""

  def leaf_wise(rows):
    own = weights.astype(rows.dtype)
    if rows.ndim == 2 and not trees.is_split(rows):
      return own @ rows
    return jnp.sum(own.reshape((-1,) + (1,) * (rows.ndim - 1)) * rows, 0)

  return jax.tree.map(leaf_wise, basis)
