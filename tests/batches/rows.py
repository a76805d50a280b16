"""Rows of the contract table: batches that grow."""

import optax

import optlab
from tests.contract import Row
from tests.contract import flat


def losses(params, batch):
  """One loss an example, without a penalty, that each would get a copy of."""
  x = flat(params)
  return 0.5 * (batch.astype(x.dtype) @ x - 1.0) ** 2


def growing(moments, tx_factory, **kwargs):
  """A row's `make` for a growth rule in front of an optimizer."""
  estimator = optlab.per_example(losses, moments, **kwargs)
  return lambda hyper: (estimator, tx_factory(hyper))


ROWS = [
  Row(
    'adadagrad',
    growing(
      optlab.ghost_norms,
      lambda hyper: optlab.adadagrad(0.3, optlab.norm_test(hyper), 8, 100),
    ),
    0.5,
    True,
  ),
  Row(
    'adadagrad_norm',
    growing(
      optlab.ghost_norms,
      lambda hyper: optlab.adadagrad_norm(
        1.0, optlab.augmented_inner_product_test(hyper, hyper), 8, 100
      ),
      inner_products=optlab.batches.jvp_inner_products,
    ),
    0.5,
    True,
  ),
  Row(
    'grow_batch_coordinate',
    growing(
      optlab.batches.vmap_grads,
      lambda hyper: optax.chain(
        optlab.grow_batch(optlab.batches.coordinate_norm_test(hyper), 8, 100),
        optax.sgd(0.1),
      ),
      microbatch_size=6,
    ),
    0.5,
    True,
  ),
  Row(
    'grow_batch_means',
    growing(
      optlab.batches.microbatch_means,
      lambda hyper: optax.chain(
        optlab.grow_batch(optlab.inner_product_test(hyper), 8, 100),
        optax.sgd(0.1),
      ),
      inner_products=optlab.batches.vmap_inner_products,
      microbatch_size=4,
    ),
    0.5,
    True,
  ),
]
