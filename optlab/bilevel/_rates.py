"""What rates fit a bilevel problem, and how far its parts lag behind."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optlab import _systems
from optlab import base
from optlab import checks
from optlab import trees
from optlab.bilevel import _dual
from optlab.bilevel import _problem
from optlab.bilevel import _state


class RatesReport(NamedTuple):
  """Figures of `suggest_rates`, all of shape ()."""

  value: jax.Array  # f(x, y), what an estimate reports
  settled_value: jax.Array  # f where the lower level would settle, nearer F(x)
  lag: jax.Array  # distance of y from there, relative to its norm
  residual: jax.Array  # norm of g_yy z - f_y, relative to that of f_y
  largest: jax.Array  # curvature of g along y
  smallest: jax.Array  # an upper bound of the smallest curvature
  lower_lr: jax.Array  # suggested rates: one over the largest curvature
  dual_lr: jax.Array
  ok: jax.Array  # bool, no negative curvature was met


@checks.domains(
  upper=checks.Function('(x, y, batch) -> scalar'),
  lower=checks.Function('(x, y, batch) -> scalar'),
  products=checks.Integer(2),
)
def suggest_rates(
  upper: _problem.Objective,
  lower: _problem.Objective,
  params: base.Params,
  state: _state.BilevelState,
  batch: _state.BilevelBatch,
  key: jax.Array,
  *,
  products: int = 16,
) -> RatesReport:
  r"""Looks at the lower level where a run stands, by a few products.

  Call it at the start for rates, and now and then beside a run: a loss that
  falls while ``settled_value`` does not is f at a lower variable that follows x
  badly, and not F.

  Args:
    upper: The upper objective f, ``(x, y, batch) -> scalar``.
    lower: The lower objective g, ``(x, y, batch) -> scalar``.
    params: The upper variable x.
    state: The estimator's state.
    batch: A `BilevelBatch`, as large as may be; its ``step_samples`` are not
      used.
    key: A PRNG key, for the start of Lanczos' iteration.
    products: Hessian-vector products of it, and the most of the lower solve.

  Returns:
    A `RatesReport`.

  Raises:
    TypeError: An objective is not a function, or ``products`` no integer.
    ValueError: ``products`` is below two.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> upper = lambda x, y, batch: jnp.sum((y - 1.0) ** 2)
    >>> lower = lambda x, y, batch: jnp.sum(jnp.array([1., 4.]) * (y - x) ** 2)
    >>> state = optlab.soba(upper, lower, optax.sgd(0.1), 0.1).init(
    ...     jnp.ones(2), jnp.zeros(2))
    >>> report = optlab.bilevel.suggest_rates(
    ...     upper, lower, jnp.ones(2), state, optlab.BilevelBatch(None, None),
    ...     jax.random.key(0))
    >>> print(f'{report.largest:.1f} {report.lower_lr:.3f}')
    8.0 0.125
    >>> print(f'{report.value:.1f} {report.settled_value:.1f}')
    2.0 0.0

  Notes:
    Cost: an upper gradient, a lower linearization, up to three times
    ``products`` Hessian-vector products; memory of that many lower variables.
    A rate of one over the largest curvature on a small batch may be too large
    for another batch: take half of it.
  """
  checks.enforce(suggest_rates, locals())
  _state.check_batch(batch)
  problem = _problem.Problem(
    _problem.Level('upper', upper), _problem.Level('lower', lower), None
  )
  inner = state.inner
  value, _, _, grad_y = _problem.upper_value_and_grads(
    problem, params, inner, batch.upper
  )
  point = _problem.Point(params, inner, batch.lower, state.step)
  seen, apply = _problem.linearize(problem, point)
  wide = trees.zeros_accumulator(inner)
  multiply = lambda z: trees.cast_like(apply(z)[1], wide)
  largest, smallest = _extremes(multiply, wide, key, products)
  change, convex = _systems.cg(
    multiply, trees.cast_like(seen.grad, wide), None, rtol=1e-3,
    max_steps=products,
  )  # fmt: skip
  settled = trees.combine(jnp.subtract, inner, change)
  divide = lambda a, b: a / jnp.where(b > 0, b, 1)
  residual = trees.norm(trees.cast_like(grad_y, wide))
  if jax.tree.leaves(state.dual):
    residual = trees.norm(
      _dual.residual_of(state.dual, multiply(state.dual), grad_y)
    )
  rate = divide(jnp.ones_like(largest), largest)
  return RatesReport(
    value=value,
    settled_value=problem.upper(params, settled, batch.upper)[0],
    lag=divide(trees.norm(change), trees.norm(settled)),
    residual=divide(residual, trees.norm(grad_y)),
    largest=largest,
    smallest=smallest,
    lower_lr=rate,
    dual_lr=rate,
    ok=convex & (smallest > -1e-3 * largest),
  )


def _extremes(multiply, like, key, count):
  """The largest and the smallest Ritz value of Lanczos' iteration."""
  leaves, treedef = jax.tree.flatten(like)
  keys = jax.random.split(key, len(leaves))
  start = treedef.unflatten(
    [
      jax.random.normal(k, leaf.shape, leaf.dtype)
      for k, leaf in zip(keys, leaves, strict=True)
    ]
  )
  size = sum(leaf.size for leaf in leaves)
  count = min(count, size)
  scale = lambda v, s: jax.tree.map(lambda leaf: leaf * s.astype(leaf.dtype), v)
  basis = [scale(start, 1 / trees.norm(start))]
  rows = []
  for _ in range(count):
    product = multiply(basis[-1])
    rows.append([trees.inner_product(q, product) for q in basis])
    # Twice, since once leaves rounding that the next products amplify.
    for _ in range(2):
      for q in basis:
        part = trees.inner_product(q, product)
        product = jax.tree.map(
          lambda p, leaf, part=part: p - part.astype(p.dtype) * leaf, product, q
        )
    length = trees.norm(product)
    basis.append(scale(product, 1 / jnp.where(length > 0, length, 1)))
  matrix = jnp.stack(
    [jnp.stack(row + [jnp.zeros_like(row[0])] * (count - len(row)))
     for row in rows]
  )  # fmt: skip
  values = jnp.linalg.eigvalsh(matrix + jnp.tril(matrix, -1).T)
  return values[-1], values[0]
