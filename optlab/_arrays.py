"""Checks of trees of arrays: their dtypes, their structure, their keys."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab import base


def check_floating(name: str, tree: Any, remedy: str = '') -> None:
  """Raises a ``TypeError`` for leaves of integers or bools.

  Args:
    name: Name of ``tree``, for the message.
    tree: A tree of arrays.
    remedy: What to do about it, for the message.
  """
  for path, leaf in jax.tree.leaves_with_path(tree):
    dtype = jnp.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f'{name}{jax.tree_util.keystr(path)} must be floating, got dtype'
        f' {dtype}.' + (f' {remedy}' if remedy else '')
      )


def check_params(name: str, tree: Any) -> None:
  """Raises a ``TypeError`` for a leaf that no gradient step can move.

  Args:
    name: Name of ``tree``, for the message.
    tree: Parameters, a tree of floating or complex arrays.
  """
  for path, leaf in jax.tree.leaves_with_path(tree):
    where = f'{name}{jax.tree_util.keystr(path)}'
    dtype = getattr(leaf, 'dtype', None)
    if dtype is None and isinstance(leaf, numbers.Number):
      dtype = np.asarray(leaf).dtype
    if dtype is None:
      raise TypeError(
        f'{where} must be an array, got {leaf!r} of type'
        f' {type(leaf).__name__}; keep functions and settings out of the'
        ' parameters, for example by nnx.split or equinox.partition.'
      )
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f'{where} must be floating, got dtype {dtype}; what is not trained'
        ' belongs to the loss, to the batch or to the model state.'
      )
    if jnp.finfo(dtype).bits < 16:
      raise TypeError(
        f'{where} must have 16 bits or more, got dtype {dtype}; keep wider'
        ' parameters, and cast them in the loss.'
      )


def check_arrays(name: str, tree: Any) -> None:
  """Raises a ``TypeError`` for a leaf that no state can carry."""
  for path, leaf in jax.tree.leaves_with_path(tree):
    if not hasattr(leaf, 'dtype') and not isinstance(leaf, numbers.Number):
      raise TypeError(
        f'{name}{jax.tree_util.keystr(path)} must be an array, got {leaf!r} of'
        f' type {type(leaf).__name__}; keep functions and settings out of it,'
        ' for example by nnx.split or equinox.partition.'
      )


def check_real_params(name: str, tree: Any) -> None:
  """As `check_params`; complex leaves raise too.

  For methods that do not conjugate: on complex leaves what `jax.grad` returns
  points the wrong way.
  """
  check_params(name, tree)
  for path, leaf in jax.tree.leaves_with_path(tree):
    if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
      raise TypeError(
        f'{name}{jax.tree_util.keystr(path)} must be real, got dtype'
        f' {jnp.result_type(leaf)}: pass real and imaginary parts as two'
        ' leaves.'
      )


def as_key(name: str, value: Any) -> jax.Array:
  """A copy of a PRNG key, typed; or a ``TypeError`` that names it."""
  dtype = getattr(value, 'dtype', None)
  if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return jax.random.clone(value)
  if dtype == jnp.uint32 and value.shape[-1:] == (2,):
    return jax.random.wrap_key_data(jnp.array(value))
  raise TypeError(
    f'{name} must be a PRNG key such as jax.random.key(0), got {value!r}.'
  )


def as_array(name: str, value: Any) -> jax.Array:
  """An array of ``value``, or a ``TypeError`` that names it."""
  try:
    return jnp.asarray(value)
  except (TypeError, ValueError) as error:
    raise TypeError(
      f'{name} must be an array of numbers, got {value!r}.'
    ) from error


def check_same_tree(
  name: str, tree: base.ArrayTree, like_name: str, like: base.ArrayTree
) -> None:
  """Raises a ``ValueError`` unless both trees have one structure and shapes.

  Args:
    name: Name of ``tree``, for the message.
    tree: The tree to check.
    like_name: Name of ``like``, for the message.
    like: The tree that it must match.
  """
  treedef, like_treedef = jax.tree.structure(tree), jax.tree.structure(like)
  if treedef != like_treedef:
    raise ValueError(
      f'{name} must have the tree structure of {like_name}: got {treedef},'
      f' expected {like_treedef}.'
    )
  leaves = jax.tree.leaves_with_path(tree)
  for (path, leaf), other in zip(leaves, jax.tree.leaves(like), strict=True):
    if jnp.shape(leaf) != jnp.shape(other):
      raise ValueError(
        f'{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but'
        f' {like_name}{jax.tree_util.keystr(path)} has shape'
        f' {jnp.shape(other)}.'
      )
