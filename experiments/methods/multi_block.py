"""Methods for many lower problems at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import optlab


class Method(NamedTuple):
  """A hypergradient estimator over sampled blocks.

  Attributes:
    make: ``(upper, lower, num_blocks, inner_lr) -> estimator``.
    paired: Whether it samples blocks for the upper level apart.
  """

  make: Callable[..., optlab.GradientEstimator]
  paired: bool = False

  def batch(
    self, blocks: jax.Array, upper: Any, lower: Any, outer: jax.Array
  ) -> Any:
    """The batch of a step; ``outer`` are the blocks sampled apart."""
    if self.paired:
      return optlab.multi_block.PairedBlockBatch(blocks, upper, lower, outer)
    return optlab.BlockBatch(blocks, upper, lower)


def methods(
  *,
  alpha: float = 0.1,
  beta: float = 0.1,
  floor: float = 1e-2,
  damping: float = 0.0,
) -> dict[str, Method]:
  """The methods by name.

  Args:
    alpha: Rate of the trackers of a block.
    beta: Rate of the hypergradient.
    floor: Least eigenvalue of a tracked Hessian.
    damping: Added to each Hessian sample.

  Returns:
    `Method` by name.
  """

  def bsvrb(dual, damped=False):
    def make(upper, lower, num_blocks, inner_lr):
      return optlab.bsvrb(
        upper, lower, num_blocks, inner_lr=inner_lr, alpha=alpha, beta=beta,
        dual=dual, damping=damping if damped else None,
      )  # fmt: skip

    return Method(make)

  def rsvrb(upper, lower, num_blocks, inner_lr):
    return optlab.multi_block.rsvrb(
      upper, lower, num_blocks, inner_lr=inner_lr, beta=beta,
      floor=floor + damping,
    )  # fmt: skip

  return {
    'bsvrb_v1': bsvrb(optlab.multi_block.track_hessians(floor), True),
    'bsvrb_v2': bsvrb(optlab.multi_block.track_products()),
    'rsvrb': Method(rsvrb, paired=True),
  }


METHODS = tuple(methods())
