"""A recurrent encoder of sentences."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from . import text


class Encoder(nnx.Module):
  """Embedding and a GRU or LSTM; the state after the last word."""

  def __init__(
    self, vocabulary: int, width: int, rngs: nnx.Rngs, *, cell: str = 'gru',
    vectors: np.ndarray | None = None,
  ):  # fmt: skip
    self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
    if vectors is not None:
      self.embedding.embedding[...] = jnp.asarray(vectors)
    make = {'gru': nnx.GRUCell, 'lstm': nnx.OptimizedLSTMCell}[cell]
    self.recurrent = nnx.RNN(make(width, width, rngs=rngs), return_carry=True)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    lengths = jnp.sum(tokens != text.PAD, axis=-1)
    carry, _ = self.recurrent(self.embedding(tokens), seq_lengths=lengths)
    return carry[1] if isinstance(carry, tuple) else carry


def functional(
  make: Callable[[nnx.Rngs], nnx.Module],
) -> tuple[Callable[[jax.Array], Any], Callable[..., Any]]:
  """A module as two pure functions.

  Args:
    make: ``rngs -> module``.

  Returns:
    ``init(key) -> params`` and ``apply(params, *inputs)``; the parameters are
    a dictionary of arrays.
  """

  def split(key):
    return nnx.split(make(nnx.Rngs(params=key)), nnx.Param, ...)

  def init(key):
    return nnx.to_pure_dict(split(key)[1])

  def apply(params, *inputs):
    # Only the structure is used; under jit the fresh numbers are never made.
    graph, like, rest = split(jax.random.key(0))
    nnx.replace_by_pure_dict(like, params)
    return nnx.merge(graph, like, rest)(*inputs)

  return init, apply
