"""What the bilevel programs share: methods with their costs, upper steps.

Costs are oracle calls a step. A gradient is one of either level, on one sample
batch; a product is one Hessian-vector or one cross product.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optlab

PENALTY = 10.0  # Of f2sa.


class Method(NamedTuple):
  """A hypergradient estimator and what it takes.

  Attributes:
    make: ``(upper, lower, lower_optimizer, dual_lr) -> estimator``.
    step_samples: Length of ``batch.step_samples``.
    gradients: Gradients a step, on average.
    products: Hessian-vector and cross products a step, on average.
    keyed: Whether ``init`` takes a key too.
    indexed: Whether batches are blocks of a finite sum, with their index.
  """

  make: Callable[..., optlab.GradientEstimator]
  step_samples: int
  gradients: float
  products: float
  keyed: bool = False
  indexed: bool = False

  @property
  def calls(self) -> float:
    return self.gradients + self.products

  def steps(self, budget: float, multiple: int) -> int:
    """The steps that a budget of calls allows, a multiple, at least one."""
    return max(1, round(budget / self.calls / multiple)) * multiple

  def init(self, estimator, tx, params, inner, key):
    """The state of training before the first step."""
    extra = (key,) if self.keyed else ()
    return optlab.init(params, estimator, tx, inner, *extra)


def _bo_rep(period: int, lower_steps: int, average: bool = True) -> Method:
  def make(upper, lower, lower_optimizer, dual_lr):
    return optlab.bo_rep(
      upper, lower, lower_optimizer, dual_lr, period=period,
      lower_steps=lower_steps, average=average,
    )  # fmt: skip

  return Method(make, lower_steps, 2 + lower_steps / period, 2)


def methods(
  lower_steps: int,
  neumann_steps: int,
  max_steps: int = 10,
  blocks: tuple[int, int] | None = None,
) -> dict:
  """The methods by name.

  Args:
    lower_steps: Lower steps of a round, of every method that has rounds.
    neumann_steps: Terms of the Neumann series.
    max_steps: The most steps of conjugate gradients.
    blocks: Upper and lower blocks of a finite sum; without them, no saba.

  Returns:
    `Method` by name.
  """
  n, q = lower_steps, neumann_steps

  def stocbio(upper, lower, lower_optimizer, dual_lr):
    return optlab.stocbio(
      upper, lower, lower_optimizer, dual_lr, lower_steps=n, neumann_steps=q
    )

  def ttsa(upper, lower, lower_optimizer, dual_lr):
    return optlab.bilevel.ttsa(
      upper, lower, lower_optimizer, dual_lr, neumann_steps=q
    )

  def unrolled(warm):
    def make(upper, lower, lower_optimizer, dual_lr):
      del dual_lr
      return optlab.unrolled(
        upper, lower, lower_optimizer, lower_steps=n, warm=warm,
        checkpoint=False,
      )  # fmt: skip

    return make

  def implicit(upper, lower, lower_optimizer, dual_lr):
    del dual_lr
    return optlab.implicit(
      upper, lower, lower_optimizer, lower_steps=n, max_steps=max_steps
    )

  def mrbo(upper, lower, lower_optimizer, dual_lr):
    return optlab.bilevel.mrbo(upper, lower, lower_optimizer, dual_lr)

  def f2sa(central):
    def make(upper, lower, lower_optimizer, dual_lr):
      del dual_lr
      return optlab.bilevel.f2sa(
        upper, lower, lower_optimizer, PENALTY, lower_steps=n, central=central
      )

    return make

  table = {
    'bo_rep': _bo_rep(2, n),
    'bo_rep_period1': _bo_rep(1, n),
    'bo_rep_period4': _bo_rep(4, n),
    'bo_rep_single': _bo_rep(1, 1),
    'soba': Method(optlab.soba, 0, 2, 2),
    'stocbio': Method(stocbio, n, 2 + n, q + 1),
    'ttsa': Method(ttsa, 1, 3, (q - 1) / 2 + 2, keyed=True),
    'unrolled': Method(unrolled(True), n, 1 + n, 2 * n),
    'unrolled_cold': Method(unrolled(False), n, 1 + n, 2 * n),
    'implicit': Method(implicit, n, 2 + n, max_steps + 3),
    'mrbo': Method(mrbo, 0, 4, 4),
    'f2sa': Method(f2sa(False), n, 3 * n + 3, 0),
    'f2sa_central': Method(f2sa(True), n, 4 * n + 4, 0),
  }
  if blocks is not None:
    upper_blocks, lower_blocks = blocks

    def saba(upper, lower, lower_optimizer, dual_lr):
      return optlab.saba(
        upper, lower, lower_optimizer, dual_lr, upper_blocks=upper_blocks,
        lower_blocks=lower_blocks,
      )  # fmt: skip

    table['saba'] = Method(saba, 0, 2, 2, indexed=True)
  return table


METHODS = tuple(methods(1, 1))
# What is compared by default: bo_rep with its periods, and its peers.
COMPARED = (
  'bo_rep',
  'bo_rep_period1',
  'bo_rep_period4',
  'soba',
  'stocbio',
  'ttsa',
  'unrolled',
)
ONE_OF_EACH = ('bo_rep', 'soba', 'saba', 'stocbio', 'unrolled')
UPPER_STEPS = ('plain', 'momentum', 'clipped', 'normalized', 'adam')
SCHEDULES = ('constant', 'cosine')


def upper_step(name: str, rate: Any, beta: float) -> Any:
  """The optimizer of the upper variable.

  Args:
    name: ``plain`` is SGD and ``adam`` Adam; the others average gradients and
      take the average as it is (``momentum``), cut to norm one (``clipped``),
      or of norm one (``normalized``).
    rate: A number or a schedule.
    beta: Decay of the average.

  Returns:
    An optax transformation.
  """
  if name == 'plain':
    return optax.sgd(rate)
  if name == 'adam':
    return optax.adam(rate, beta)
  if name == 'normalized':
    return optlab.normalized_momentum(rate, beta)
  average = [optax.ema(beta, debias=False)]
  if name == 'clipped':
    average.append(optax.clip_by_global_norm(1.0))
  return optax.chain(*average, optax.scale_by_learning_rate(rate))


def schedule(rate: Any, cosine: Any, steps: int) -> optax.Schedule:
  """A constant rate, or its cosine decay to zero where ``cosine``.

  Args:
    rate: The rate at the start; may be a tracer.
    cosine: Whether it decays; may be a tracer.
    steps: Where the decay ends.

  Returns:
    An optax schedule.
  """
  decay = optax.cosine_decay_schedule(1.0, steps)

  def value(count):
    return rate * jnp.where(cosine, decay(count), 1.0)

  return value


def draw(key: jax.Array, sample: Callable, count: int) -> optlab.BilevelBatch:
  """Independent samples for one step.

  Args:
    key: A typed key.
    sample: ``key -> (upper, lower)``, the two levels' samples.
    count: How many step samples.

  Returns:
    A `BilevelBatch`.
  """
  keys = jax.random.split(key, 2 + count)
  fresh = jax.vmap(lambda k: sample(k)[1])(keys[2:]) if count else ()
  return optlab.BilevelBatch(
    upper=sample(keys[0])[0], lower=sample(keys[1])[1], step_samples=fresh
  )
