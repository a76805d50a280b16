"""The moments of a part of the parameters, for rules that see no more."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optlab import base

# Extras that are one number for all parameters, and where a part of it is.
_PARTS = {
  'sum_sq_diff_norm': ('sum_sq_diff_norms', 'sum_sq_diff_grads'),
  'sum_sq_diff_inner': (),
}


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)


def is_part(updates: base.Updates) -> bool:
  """Whether `optax.masked` or `optax.partition` has hidden some leaves."""
  return any(map(_is_masked, jax.tree.leaves(updates, is_leaf=_is_masked)))


def own_moments(
  updates: base.Updates, extras: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """The moments of the leaves that are not hidden.

  Args:
    updates: The gradient with `optax.MaskedNode` in place of some leaves.
    extras: The moments of all parameters.

  Returns:
    The extras, with moments of the part; and the names of those that are known
    of all parameters only, which are left out.
  """
  own, unknown = dict(extras), []
  if extras.get('scaled_moments') is not None:
    own['scaled_moments'], _ = own_moments(updates, extras['scaled_moments'])
  for name in ('sum_sq_diff_norms', 'sum_sq_diff_grads', 'sq_norms'):
    if extras.get(name) is not None:
      own[name] = jax.tree.map(
        lambda update, rest: update if _is_masked(update) else rest,
        updates,
        extras[name],
        is_leaf=_is_masked,
      )
  for name, parts in _PARTS.items():
    if extras.get(name) is None:
      continue
    found = [own[part] for part in parts if own.get(part) is not None]
    del own[name]
    if found:
      own[name] = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(found[0]))
    else:
      unknown.append(name)
  return own, unknown
