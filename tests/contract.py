"""A row of the contract table, and the toy problem that most rows share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import optlab


def flat(params):
  """All numbers of a tree in one vector."""
  return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])


def loss(params, batch):
  """Least squares on rows of eight; strongly convex in expectation."""
  x = flat(params)
  residual = batch.astype(x.dtype) @ x - 1.0
  return 0.5 * jnp.mean(residual**2) + 0.05 * jnp.sum(x**2)


def rows(key, dtype=jnp.float32):
  return jax.random.normal(key, (16, 8), dtype)


class Row(NamedTuple):
  """One method.

  Attributes:
    name: Shown by pytest.
    make: ``hyper -> (estimator, tx)``; ``hyper`` may be a tracer.
    hyper: A value of the hyperparameter that works on the toy problem.
    is_transformation: Whether the method is the transformation ``tx`` (then
      the wrappers of optax are tried on it) or the estimator.
    batch: ``(key, dtype) -> batch`` with a leading axis of even length.
    inner: ``dtype -> tuple`` of inner variables for ``estimator.init``.
    shard: Whether each leaf of the batch may be sharded on its first axis, or
      ``batch -> tree of partition specs``.
    whole: Whether it evaluates ``value_fn``, which takes all parameters, so
      that a mask or partition must leave it all of them.
  """

  name: str
  make: Callable[[Any], tuple[Any, Any]]
  hyper: float
  is_transformation: bool = False
  batch: Callable[..., Any] = rows
  inner: Callable[[Any], tuple[Any, ...]] = lambda dtype: ()
  shard: bool | Callable[[Any], Any] = True
  whole: bool = False


def plain(tx_factory):
  """A row's `make` for a transformation that needs nothing but a gradient."""
  return lambda hyper: (optlab.value_and_grad(loss), tx_factory(hyper))
