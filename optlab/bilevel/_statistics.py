"""Model state that x moves, and a level feels: no formula here knows of it.

Running statistics of a network below are numbers of y, which x moves. A level
whose value depends on them has a slope along them that a hypergradient at model
state held fixed leaves out. The programs of both levels are read once, while a
step is traced.
"""

from typing import Any

import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp

from optlab import base


def check_still(
  levels: Any,
  params: base.Params,
  inner: base.Params,
  samples: Any,
  model_state: Any,
) -> None:
  """Raises a ``ValueError`` where a level's value feels what x or y moves.

  Args:
    levels: Both, ``(x, y, sample) -> (value, (model state, aux))``.
    params: The upper variable x.
    inner: The lower variable y.
    samples: Of each level; they carry a ``model_state``.
    model_state: The pair.
  """
  paths, treedef = jax.tree.flatten_with_path(model_state)
  leaves = [leaf for _, leaf in paths]
  floats = [
    i for i, leaf in enumerate(leaves)
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
  ]  # fmt: skip
  if not floats:
    return

  def run(k, point, leaves):
    state = treedef.unflatten(leaves)
    return levels[k](*point, samples[k]._replace(model_state=state))

  def changed(leaves, point):
    return [run(k, point, leaves)[1][0] for k in (0, 1)]

  def slopes(k, some, weight):
    def value(some):
      given = dict(zip(floats, some, strict=True))
      every = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
      return run(k, (params, inner), every)[0]

    return jax.vjp(value, some)[1](weight)[0]

  makes = jax.make_jaxpr(changed)(leaves, (params, inner))
  for k, name in enumerate(('upper', 'lower')):
    some = [leaves[i] for i in floats]
    weight = jax.eval_shape(lambda k=k: run(k, (params, inner), leaves)[0])
    pulls = jax.make_jaxpr(lambda *args, k=k: slopes(k, *args))(some, weight)
    if not _used(pulls, range(len(floats)))[-1]:
      continue
    for n, i in enumerate(floats):
      if _used(pulls, [n])[-1] and _moves(makes, i, len(leaves)):
        raise ValueError(
          f'{name} must not depend on model state that params or inner move,'
          f' got model_state{jax.tree_util.keystr(paths[i][0])}: how x moves it'
          ' is not in the hypergradient. Let the level normalize by its batch,'
          ' as in training, or leave that part out knowingly, by'
          ' jax.lax.stop_gradient of its model_state.'
        )


def _moves(makes: Any, leaf: int, count: int) -> bool:
  """Whether x or y moves a leaf, through other leaves too."""
  seen, before = {leaf}, set()
  while seen != before:
    before = seen
    used = _used(makes, seen)
    if any(used[count:]):
      return True
    seen = before | {i for i in range(count) if used[i]}
  return False


def _used(closed: Any, outputs: Any) -> list[bool]:
  """Which inputs some outputs of a program depend on."""
  kept = [i in outputs for i in range(len(closed.jaxpr.outvars))]
  return partial_eval.dce_jaxpr(closed.jaxpr, kept)[1]
