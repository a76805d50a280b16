"""Block tables: pytrees whose leaves share a leading axis of blocks.

Rows of a table are named by an integer array ``blocks``. An index at or beyond
the number of blocks is padding and is dropped; of a block that is named twice
the first row counts; a negative index is an error, and dropped where it can't
be seen (under ``jit``).
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optlab import trees

Tree = TypeVar('Tree')  # A pytree of arrays.


def num_blocks_of(table: Any) -> int:
  """The number of rows of a table, or a ``ValueError``."""
  lengths = {(jnp.shape(leaf) or (-1,))[0] for leaf in jax.tree.leaves(table)}
  if len(lengths) != 1 or -1 in lengths:
    raise ValueError(
      'tracker must be a table, arrays with one leading axis of blocks, got'
      f' shapes {[jnp.shape(leaf) for leaf in jax.tree.leaves(table)]}.'
    )
  return lengths.pop()


def check_blocks(blocks: Any, num_blocks: int) -> None:
  """Raises unless ``blocks`` can name rows of a table of ``num_blocks`` rows.

  Args:
    blocks: The block indices of one step; their values are only seen where
      they are concrete.
    num_blocks: The number of rows.

  Raises:
    TypeError: ``blocks`` are not integers.
    ValueError: ``blocks`` is not a vector, is longer than the table, or has a
      negative entry.
  """
  dtype = getattr(blocks, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(
      f'blocks must be an integer array, got {blocks!r}; convert it with'
      ' jnp.asarray(blocks, jnp.int32).'
    )
  if blocks.ndim != 1:
    raise ValueError(
      f'blocks must have shape (sampled,), got shape {blocks.shape}.'
    )
  if blocks.shape[0] > num_blocks:
    raise ValueError(
      f'blocks names {blocks.shape[0]} blocks, more than num_blocks='
      f'{num_blocks}; sample at most num_blocks of them.'
    )
  if not isinstance(blocks, jax.core.Tracer) and np.any(np.asarray(blocks) < 0):
    raise ValueError(
      f'blocks must not be negative, got {np.asarray(blocks)}; pad with'
      f' num_blocks={num_blocks}, which is dropped.'
    )


def check_rows(
  name: str, tree: Any, size: int, like: str = 'num_blocks'
) -> None:
  """Raises a ``ValueError`` unless all leaves have a leading axis ``size``.

  Args:
    name: Name of ``tree``, for the message.
    tree: A table, or rows of one.
    size: How many rows it must have.
    like: What there is a row for, for the message.
  """
  for path, leaf in jax.tree.leaves_with_path(tree):
    shape = jnp.shape(leaf)
    if not shape or shape[0] != size:
      raise ValueError(
        f'{name}{jax.tree_util.keystr(path)} must have a leading axis of'
        f' {size}, one row for each of {like}; got shape {shape}.'
      )


def distinct_blocks(blocks: jax.Array, num_blocks: int) -> jax.Array:
  """Which rows of a batch count: in range, and the first with their index.

  Args:
    blocks: int array of shape ``(sampled,)``.
    num_blocks: The number of blocks.

  Returns:
    bool array of shape ``(sampled,)``.

  Raises:
    TypeError: ``blocks`` are not integers.
    ValueError: See `check_blocks`.

  Examples:
    >>> import jax.numpy as jnp, optlab
    >>> print(optlab.tables.distinct_blocks(jnp.array([2, 0, 2, 5]), 5))
    [ True  True False False]
  """
  check_blocks(blocks, num_blocks)
  blocks = jnp.asarray(blocks)  # Of numpy, it can't be indexed by tracers.
  order = jnp.argsort(blocks, stable=True)
  sorted_blocks = blocks[order]
  first = jnp.concatenate(
    [jnp.ones(1, bool), sorted_blocks[1:] != sorted_blocks[:-1]]
  )[: blocks.shape[0]]
  first = jnp.zeros_like(first).at[order].set(first, unique_indices=True)
  return first & (blocks >= 0) & (blocks < num_blocks)


def layout(table: jax.Array) -> jax.sharding.NamedSharding | None:
  """On an explicit mesh, how a table lies: what reads or writes it must say."""
  where = jax.typeof(table).sharding
  split = any(axis is not None for axis in where.spec)
  return where if split else None


def gather_rows(table: Tree, blocks: jax.Array) -> Tree:
  """Returns the rows of a table; an index out of range gives some row.

  Args:
    table: Pytree with leading axis ``num_blocks``.
    blocks: int array of shape ``(sampled,)``.

  Returns:
    Pytree with leading axis ``sampled``.
  """

  def leaf(table):
    where = layout(table)
    if where is not None:  # The rows, on every device.
      where = where.update(spec=jax.P(None, *where.spec[1:]))
    return table.at[blocks].get(
      mode='clip', wrap_negative_indices=False, out_sharding=where
    )

  return jax.tree.map(leaf, jax.tree.map(jnp.asarray, table))


def finite_rows(rows: Any, axis: int = 0) -> jax.Array:
  """Which rows have nothing but finite numbers.

  Args:
    rows: Pytree whose leaves have the rows on one axis.
    axis: Which.

  Returns:
    bool array of shape ``(sampled,)``.
  """
  return jax.vmap(trees.all_finite, axis)(rows)


def scatter_rows(
  table: Tree,
  rows: Tree,
  blocks: jax.Array,
  use: jax.Array,
) -> Tree:
  """Writes rows into a table, in place where the table's buffer is donated.

  Args:
    table: Pytree with leading axis ``num_blocks``.
    rows: Pytree with leading axis ``sampled``, cast to the table's dtypes.
    blocks: int array of shape ``(sampled,)``.
    use: bool array of shape ``(sampled,)``: which rows to write; among these no
      block may be named twice, see `distinct_blocks`.

  Returns:
    The table after the writes.
  """

  def leaf(table, rows):
    # Every unused row gets its own index beyond the end, where it is dropped.
    beyond = table.shape[0] + jnp.arange(blocks.shape[0], dtype=blocks.dtype)
    return table.at[jnp.where(use, blocks, beyond)].set(
      rows.astype(table.dtype),
      mode='drop',
      unique_indices=True,
      out_sharding=layout(table),
    )

  return jax.tree.map(leaf, table, rows)
