"""Conjugate gradients for a few shifts at once, without a basis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import _varying
from optlab import base
from optlab import checks
from optlab import trees
from optlab.newton import _conjugate

LADDER = 16  # Shifts whose pivots are followed, at a scalar each.


@checks.domains(
  shifts=checks.Integer(1),
  max_steps=checks.Integer(1),
  rtol=checks.NON_NEGATIVE._replace(optional=True),
  power=checks.NON_NEGATIVE,
  factor=checks.Real(low=1.0, low_open=True),
)
def multishift_cg(
  shifts: int = 3,
  max_steps: int = 100,
  rtol: float | jax.Array | None = None,
  power: float | jax.Array = 0.5,
  factor: float | jax.Array = 4.0,
) -> base.Solver:
  r"""Conjugate gradients for a few shifts in one sequence, and no basis.

  The Krylov space of :math:`A + s I` is the same for all shifts. From the
  vectors :math:`v_k` of Lanczos' recurrence, with :math:`\alpha_k` and
  :math:`\beta_k`, each shift keeps a direction and a solution:

  .. math::
    \pi_k = \alpha_k + s - \beta_{k-1}^2 / \pi_{k-1}, \quad
    p_k = v_k - \frac{\beta_{k-1}}{\pi_{k-1}} p_{k-1}, \quad
    x_k = x_{k-1} + \frac{\zeta_k}{\pi_k} p_k, \quad
    \zeta_{k+1} = -\frac{\beta_k}{\pi_k} \zeta_k

  The shifts are ``shift * factor ** j``, the smallest ones whose pivots
  :math:`\pi_k` are positive: those that the search of `gns_newton` tries one
  after the other. The default for matrix-free operators of more than ten
  thousand parameters, where the basis of `lanczos` leaves the caches (8 MB) and
  the passes over it cost more than these vectors: on a CPU, products apart, a
  step of 30 takes 2.1 ms with a basis and 0.6 without at 10,000 parameters, 66
  and 11 at 100,000.

  Args:
    shifts: How many are solved at once, at two vectors each.
    max_steps: The most products of a sequence; the iterates reached are
      returned.
    rtol: The largest relative residual; ``None`` is 0.1, and 0.01 for up to 20
      parameters, where the last products are few and save evaluations.
    power: The power of the norm in the forcing term; 0 leaves ``rtol`` alone.
    factor: Between one shift and the next: that of the rule of `gns_newton`.

  Returns:
    A solver. ``ok`` is false where a pivot is not positive.

  Raises:
    TypeError: ``shifts`` or ``max_steps`` is not an integer.
    ValueError: ``shifts`` or ``max_steps`` is below one, ``rtol`` or ``power``
      negative, or ``factor`` not above one.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> solver = optlab.newton.multishift_cg(rtol=1e-6)
    >>> solve = solver(lambda v: v * jnp.array([3.0, 15.0]), jnp.ones(2), 1.0)
    >>> print(solve(1.0)[0].round(4), solve(-4.0)[1])
    [0.25   0.0625] False

  References:
    Frommer and Maass, `Fast CG-based methods for Tikhonov-Phillips
    regularization <https://doi.org/10.1137/S1064827596313310>`_, SIAM J. Sci.
    Comput. 1999; Dussault, Migot and Orban, `Scalable adaptive cubic
    regularization methods <https://arxiv.org/abs/2103.16659>`_, Math. Program.
    2024

  Notes:
    Memory for ``2 * shifts + 3`` vectors; a product and a pass over them a
    step. Where all shifts turn out too small the sequence begins again with
    larger ones, whose pivots were positive so far; a shift that is none of them
    takes conjugate gradients of its own. The vectors are not reorthogonalized:
    on CUTEst problems it takes 1.04 times the products of `lanczos` (`cg` 1.4
    times), to high accuracy on ill-conditioned systems some 1.6 times. A
    step of `gns_newton` holds 12 vectors like the parameters beside them and
    what the objective's linearization keeps (`lanczos` 113), `cg` 7.
  """
  checks.enforce(multishift_cg, locals())

  def solver(operator, b, shift):
    vector, norm, product = _conjugate.prepare(operator, b)
    tolerance = _conjugate.forcing(norm, rtol, power, vector)
    ladder = shift * jnp.asarray(factor, norm.dtype) ** jnp.arange(LADDER)
    ladder = ladder.astype(norm.dtype)
    end = _sequence(product, vector, norm, ladder, shifts, tolerance, max_steps)
    tried, good = _window(end.low, shifts, ladder, end.good)
    # What is too small for a part of the space is too small for all of it.
    lost = jnp.max(jnp.where(end.good, -jnp.inf, ladder))

    def solve(shift):
      eps = jnp.finfo(norm.dtype).eps
      hit = good & (jnp.abs(shift - tried) <= 16 * eps * jnp.abs(tried))
      found, small = jnp.any(hit), shift <= lost
      # Of zero, where it is not wanted; a vector of its own would be kept.
      unit = trees.divided(vector, jnp.where(found | small, jnp.inf, norm))
      other, ok, k = _conjugate.iterate(
        product, unit, shift, tolerance, max_steps
      )
      first = jnp.argmax(hit)
      x = jax.tree.map(
        lambda rows, leaf: jnp.where(found, rows[first], leaf), end.x, other
      )
      ok = found | (ok & ~small)
      x = trees.scaled(norm, x)
      return _conjugate.like(x, b), ok & trees.is_finite(x), k

    return base.Prepared(solve, end.products)

  return solver


class _Sequence(NamedTuple):
  """Where a sequence stands; vectors are trees, scalars one a rung."""

  vector: Any  # v_k
  before: Any  # v_{k-1}
  direction: Any  # p_{k-1} of each shift of the window, on a leading axis
  x: Any  # their solutions
  beta: jax.Array  # beta_{k-1}
  pivots: jax.Array  # of each rung of the ladder
  weights: jax.Array  # zeta_k of each
  good: jax.Array  # whether all pivots of it were positive
  low: jax.Array  # the rung where the window begins
  done: jax.Array
  k: jax.Array  # of this sequence
  products: jax.Array  # of all sequences


def _sequence(product, b, norm, ladder, shifts, tolerance, max_steps):
  """Solves for the smallest shifts that make the operator positive definite."""
  eps = jnp.finfo(ladder.dtype).eps

  def step(now):
    image = product(now.vector)
    alpha = trees.dot(now.vector, image)
    image = trees.scale_add(-alpha, now.vector, image)
    image = trees.scale_add(-now.beta, now.before, image)
    beta = trees.norm(image)
    ratios = jnp.where(now.good, now.beta / now.pivots, 0.0)
    pivots = alpha + ladder - ratios * now.beta
    good = now.good & (pivots > 0)
    pivots = jnp.where(good, pivots, 1.0)
    # The first vector is every shift's first direction: it may choose.
    first = jnp.argmax(good).astype(jnp.int32)
    low = jnp.where(now.k == 0, first, now.low)
    again = jnp.any(good) & (first >= low + shifts)
    ratio, weight, pivot = _window(low, shifts, ratios, now.weights, pivots)
    # A branch, since the compiler would form them twice, and keep the old ones.
    direction = _varying.cond(
      now.k == 0,
      lambda: _for_each(
        lambda row, leaf, s: jnp.zeros_like(row) + leaf,
        now.direction, now.vector, ratio,
      ),
      lambda: _for_each(
        lambda row, leaf, s: leaf - s * row, now.direction, now.vector, ratio
      ),
    )  # fmt: skip
    kept = jnp.where(now.k == 0, 0.0, 1.0)
    x = _for_each(
      lambda row, leaf, s: kept.astype(row.dtype) * row + s * leaf,
      now.x, direction, weight / pivot,
    )  # fmt: skip
    weights = -now.weights * beta / pivots
    # An invariant subspace has been found, up to rounding.
    done = beta <= 10 * eps * (jnp.abs(alpha) + now.beta)
    done |= jnp.abs(weights[first]) <= tolerance
    done |= ~jnp.any(good) | (now.k + 1 >= max_steps)
    begun = lambda new, old: trees.where(again, new, old)
    # One division for both: `b / norm` alone would be kept beside `b`.
    image, length = begun((b, norm), (image, beta))
    return _Sequence(
      vector=trees.divided(image, jnp.where(length > 0, length, 1.0)),
      before=now.vector,
      direction=direction,
      x=x,
      beta=begun(0.0, beta),
      pivots=begun(jnp.ones_like(pivots), pivots),
      weights=begun(jnp.ones_like(weights), weights),
      good=good,
      low=begun(first, low),
      done=done & ~again,
      k=begun(0, now.k + 1),
      products=now.products + 1,
    )

  return _varying.while_loop(
    lambda now: ~now.done, step, _start(b, norm, ladder, shifts)
  )


def _start(b, norm, ladder, shifts):
  """Before the first product."""
  rows = jax.tree.map(
    lambda leaf: jnp.broadcast_to(jnp.zeros_like(leaf), (shifts, *leaf.shape)),
    b,
  )
  return _Sequence(
    vector=trees.divided(b, jnp.where(norm > 0, norm, 1.0)),
    before=jax.tree.map(jnp.zeros_like, b),
    direction=rows,
    x=rows,
    beta=jnp.zeros((), ladder.dtype),
    pivots=jnp.ones_like(ladder),
    weights=jnp.ones_like(ladder),
    good=jnp.ones(LADDER, bool),
    low=jnp.zeros((), jnp.int32),
    done=norm == 0,
    k=jnp.zeros((), jnp.int32),
    products=jnp.zeros((), jnp.int32),
  )


def _window(low, shifts, *arrays):
  """The parts of arrays over the ladder that belong to the shifts solved."""
  rungs = jnp.minimum(low + jnp.arange(shifts), LADDER - 1)
  return tuple(array[rungs] for array in arrays)


def _for_each(function, rows, vectors, scales):
  """``function(row, vector, scale)`` for each shift, leaf by leaf.

  ``vectors`` may be one for all or, with a leading axis, one for each.
  """

  def leaf_wise(row, vector):
    by = scales.astype(row.dtype).reshape((-1,) + (1,) * (row.ndim - 1))
    return function(row, vector, by)

  return jax.tree.map(leaf_wise, rows, vectors)
