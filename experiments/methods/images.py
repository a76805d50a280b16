"""Optimizers and batch rules of image classification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optlab

from ..lab import flags

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
  'adagrad': optax.adagrad,
  'adagrad_norm': optlab.adagrad_norm,
  'diffgrad': optlab.diffgrad,
  'adam': optax.adam,
  'amsgrad': optax.amsgrad,
  'adabelief': optax.adabelief,
  'sgd': lambda rate: optax.sgd(rate, momentum=0.9),
}


class Batches(NamedTuple):
  """How large batches are.

  Attributes:
    name: As the flag gives it.
    test: Of `grow_batch`; for a constant batch it only watches.
    size: The first size.
    limit: The last size.
    moments: Route to the moments.
    inner_products: Route to the inner products.
    grows: Whether the batch may grow.
  """

  name: str
  test: optlab.batches.Test
  size: int
  limit: int
  moments: Any
  inner_products: Any
  grows: bool


def batches(name: str, first_size: int, length: int) -> Batches:
  """Reads one entry of the flag ``--batches``.

  Args:
    name: A constant size, ``full``, or ``TEST:constant`` with TEST one of
      norm, inner, augmented, coordinate, means (norm test on microbatch means).
    first_size: Where a growing batch starts.
    length: Examples in the data set.

  Returns:
    The `Batches`.

  Raises:
    UserError: It is none of these.
  """
  kind, _, text = name.partition(':')
  routes: dict[str, Any] = {}
  try:
    if not text:
      size = length if name == 'full' else int(name)
      if not 2 <= size <= length:
        raise flags.UserError(
          f'--batches={name}: a size must be from 2 to the {length} images'
        )
      return Batches(
        name,
        optlab.norm_test(1.0),
        size,
        size,
        optlab.batches.plain_grads,
        None,
        False,
      )
    value = float(text)
    routes: dict[str, Any] = {
      'norm': (optlab.norm_test, optlab.ghost_norms, None),
      'means': (optlab.norm_test, optlab.batches.microbatch_means, None),
      'coordinate': (
        optlab.batches.coordinate_norm_test,
        optlab.batches.vmap_grads,
        None,
      ),
      'inner': (
        optlab.inner_product_test,
        optlab.batches.plain_grads,
        optlab.batches.jvp_inner_products,
      ),
      'augmented': (
        lambda theta: optlab.augmented_inner_product_test(theta, theta),
        optlab.ghost_norms,
        optlab.batches.jvp_inner_products,
      ),
    }
    if kind not in routes:
      raise flags.UserError(
        f'--batches={name}: no test {kind}; there are {", ".join(routes)}'
      )
    test, moments, inner_products = routes[kind]
    return Batches(
      name, test(value), first_size, length, moments, inner_products, True
    )
  except ValueError as error:
    raise flags.UserError(f'--batches={name}: {error}') from error
