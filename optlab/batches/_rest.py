"""The end of an epoch: what happens to a rest that is less than a batch.

A rule is a function ``(size, left) -> (taken, skipped)`` of integers, on the
host or traced: how many examples the next batch takes, and how many of the
``left`` ones of the epoch it skips before them.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from optlab import checks

#: ``(size, left) -> (taken, skipped)``: what becomes of the end of an epoch.
Rest = Callable[[Any, Any], tuple[Any, Any]]
REST = checks.Function('(size, left) -> (taken, skipped), such as batches.wrap')


def wrap(size: Any, left: Any) -> tuple[Any, Any]:
  """The batch goes on in the next epoch: all batches have their size.

  After k N examples each of the N was seen k times. No batch has an example
  twice: the next order begins with examples that the rest does not hold. So a
  batch of N is all of them, wherever it begins.

  Args:
    size: The size of the batch, at most N.
    left: The examples that are left of the epoch, at least one.

  Returns:
    The examples that the batch takes, and those that it skips first.
  """
  del left
  return size, 0


def keep(size: Any, left: Any) -> tuple[Any, Any]:
  """The rest is a batch of its own, at the full rate, be it one example.

  Each epoch takes every example once and ends with a batch.

  Args:
    size: The size of the batch, at most N.
    left: The examples that are left of the epoch, at least one.

  Returns:
    The examples that the batch takes, and those that it skips first.
  """
  return size - (size > left) * (size - left), 0


def drop(size: Any, left: Any) -> tuple[Any, Any]:
  """The rest is left out: all batches have their size, and begin in an epoch.

  Each epoch leaves out other examples, up to ``size - 1``: they are seen
  equally often in expectation only.

  Args:
    size: The size of the batch, at most N.
    left: The examples that are left of the epoch, at least one.

  Returns:
    The examples that the batch takes, and those that it skips first.
  """
  return size, (size > left) * left


def ask(rest: Rest, size: Any, left: Any, xp: Any = jnp) -> tuple[Any, Any]:
  """What a rule says, within what an epoch can give.

  Args:
    rest: The rule.
    size: The size of the batch.
    left: The examples that are left.
    xp: ``numpy`` on the host.

  Returns:
    As the rule: from 1 to ``size`` taken, from 0 to ``left`` skipped.

  Raises:
    TypeError: It does not say two numbers.
  """
  found = rest(size, left)
  if not isinstance(found, tuple) or [xp.ndim(n) for n in found] != [0, 0]:
    raise TypeError(
      f'rest must return a pair of integers (taken, skipped), got {found!r}.'
    )
  return xp.clip(found[0], 1, size), xp.clip(found[1], 0, left)


def order_after(
  fresh: Any, order: Any, first: Any, head: Any, xp: Any = jnp
) -> Any:
  """A permutation whose head has no example of the old one's rest.

  Args:
    fresh: int32, shape (N,), the permutation that is changed for it as little
      as it can be.
    order: The old permutation.
    first: Where its rest begins.
    head: How many examples of the batch are new ones; at most ``first``.
    xp: ``numpy`` on the host.

  Returns:
    A permutation.
  """
  places = xp.arange(len(order))
  if xp is jnp:
    late = jnp.zeros(len(order), bool).at[order].set(places >= first)
  else:
    late = xp.empty(len(order), bool)
    late[order] = places >= first
  early = ~late[fresh]
  count = xp.cumsum(early)
  # The head's examples move to the front, the others behind, in their order.
  ahead = xp.minimum(count, head)
  place = xp.where(early & (count <= head), ahead - 1, head + places - ahead)
  if xp is jnp:
    return jnp.zeros_like(fresh).at[place].set(fresh, unique_indices=True)
  moved = xp.empty_like(fresh)
  moved[place] = fresh
  return moved
