"""The one joint pass over data and noise that likelihood estimators share.

`meco`, `nce` and `ence` differ in one rule: how much each row's
``d log p0 / d theta`` counts. The rest is here: one forward and one backward
pass over data and noise together, and the second pass that keeps a bad row from
poisoning the gradient.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import base
from optlab import checks
from optlab import trees
from optlab.unnormalized import _noise_batch

#: ``(params, rows) -> [rows]``: a logarithm, up to a constant.
LogDensity = Callable[[Any, Any], jax.Array]
LOG_DENSITY = checks.Function('(params, rows) -> [rows]')
LOG_DENSITY_OF_ROWS = checks.Function('rows -> [rows]')


def check_rows(log_density_of_rows: jax.Array, num: int) -> None:
  """Raises unless a log density is one number a row, and nothing else."""
  if isinstance(log_density_of_rows, (tuple, list, dict)):
    raise TypeError(
      'log_density must return one number a row alone, got a'
      f' {type(log_density_of_rows).__name__}: leave auxiliary output out.'
    )
  shape = jnp.shape(log_density_of_rows)
  if shape != (num,):
    raise ValueError(
      f'log_density must return one number a row, shape {(num,)}, got {shape}.'
    )
  dtype = jnp.result_type(log_density_of_rows)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    raise TypeError(
      f'log_density must return real numbers, got dtype {dtype}: take jnp.real'
      ' of it, if it has no other part.'
    )


def joint_gradient(
  log_density: LogDensity,
  params: base.Params,
  batch: _noise_batch.NoiseBatch,
  rule: Callable[..., tuple[Iterable[jax.Array], Any]],
  dtype: Any,
  has_aux: bool = False,
) -> tuple[tuple[base.Updates, jax.Array], Any, Any]:
  """One `jax.vjp` over data and noise with the cotangents of ``rule``.

  A zero cotangent does not protect: backward through a row whose log density
  is NaN or infinite, ``0 * nan`` is NaN. Such rows are known only after the
  forward pass, so where the gradient is not finite the pass is repeated with
  those rows replaced by a good one. That is a loop of at most one turn, which
  costs nothing under `jax.vmap` while no lane needs it. Where it does not help
  the gradient is zero.

  Args:
    log_density: ``(params, rows) -> [rows]``.
    params: The parameters.
    batch: Data and noise, checked and `aligned`.
    rule: Maps the log densities of data ``[n]`` and noise ``[m]``, in
      ``dtype``, and the dtype that the model gave them, to their two cotangents
      and anything else; it must give zero to every row whose log density is not
      finite.
    dtype: In which the rule computes.
    has_aux: Whether ``log_density`` returns auxiliary output beside them.

  Returns:
    The gradient with the dtypes of ``params`` and whether it was finite; what
    else ``rule`` returned; the auxiliary output, ``()`` without any.
  """
  rows = jax.tree.map(
    lambda data, noise: jnp.concatenate([data, noise]), batch.data, batch.noise
  )
  n = jnp.shape(jax.tree.leaves(batch.data)[0])[0]
  total = jnp.shape(jax.tree.leaves(rows)[0])[0]
  model = with_aux(log_density, has_aux)
  log_p, pullback, output = jax.vjp(
    lambda p: model(p, rows), params, has_aux=True
  )
  check_rows(log_p, total)
  wide = log_p.astype(dtype)
  cotangents, aux = rule(wide[:n], wide[n:], log_p.dtype)
  cotangents = map(_laid_like, cotangents, (wide[:n], wide[n:]))
  cotangent = jnp.concatenate(tuple(cotangents)).astype(log_p.dtype)
  (grads,) = pullback(cotangent)

  good = jnp.isfinite(wide)

  def repeat(unused):
    del unused
    replaced = _replace_bad(rows, good)
    _, pullback, _ = jax.vjp(lambda p: model(p, replaced), params, has_aux=True)
    (grads,) = pullback(cotangent)
    # With no good row at all every cotangent is zero, and so is the gradient.
    silent = ~jnp.any(cotangent)
    fine = trees.all_finite(grads)
    zeros = optax.tree.zeros_like(grads)
    grads = trees.where(fine & ~silent, grads, zeros)
    return grads, ~fine & ~silent, jnp.asarray(False)

  # Sums, which take less of a step than a look at each number does.
  nothing = sum(jnp.sum(0 * leaf) for leaf in jax.tree.leaves(grads))
  bad = jnp.asarray(False)
  grads, bad, _ = jax.lax.while_loop(
    lambda carry: carry[2], repeat, (grads, bad, nothing != 0)
  )
  return (grads, ~bad), aux, output


def held_unless(fine: jax.Array, info: Any) -> Any:
  """Diagnostics that also count the step as held where its gradient is bad."""
  held = info.held | ~fine
  more = (held & ~info.held).astype(jnp.int32)
  return info._replace(held=held, total_held=info.total_held + more)


def with_aux(log_density: Callable[..., Any], has_aux: bool) -> Callable:
  """The model in one form, ``(params, rows) -> (log densities, aux)``."""

  def model(params, rows):
    out = log_density(params, rows)
    pair = isinstance(out, tuple) and len(out) == 2
    if pair != has_aux:
      raise ValueError(
        'log_density must return'
        f' {"(log densities, aux)" if has_aux else "one number a row"}, got'
        f' {type(out).__name__}: has_aux=True is for models with auxiliary'
        ' output.'
      )
    return out if has_aux else (out, ())

  return model


def _laid_like(array, like):
  """Laid out as ``like``, where the types of an explicit mesh differ."""
  sharding = jax.typeof(like).sharding
  if sharding.mesh.empty or jax.typeof(array).sharding == sharding:
    return array
  return jax.sharding.reshard(array, sharding)


def aligned(batch: _noise_batch.NoiseBatch) -> _noise_batch.NoiseBatch:
  """The batch with all rows laid out as the data are, on explicit meshes."""
  batch = jax.tree.map(jnp.asarray, batch)
  shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(batch)]
  explicit = jax.sharding.AxisType.Explicit
  meshes = [s.mesh for s in shardings if explicit in s.mesh.axis_types]
  if not meshes or len({sharding.spec[0] for sharding in shardings}) == 1:
    return batch

  def lay(axes):
    def leaf(array):
      spec = jax.P(axes, *jax.typeof(array).sharding.spec[1:])
      return jax.sharding.reshard(array, jax.NamedSharding(meshes[0], spec))

    return jax.tree.map(leaf, batch)

  try:
    return lay(shardings[0].spec[0])
  except ValueError:  # The devices do not divide the rows.
    return lay(None)


def _replace_bad(rows: Any, good: jax.Array) -> Any:
  """The rows, the first good one in place of every bad one."""
  first_good = _laid_like(jnp.arange(good.size) == jnp.argmax(good), good)
  # A sum, because an index into a sharded axis is not allowed.
  row = jax.tree.map(
    lambda leaf: jnp.sum(leaf, 0, leaf.dtype, keepdims=True),
    trees.where(first_good, rows, jax.tree.map(jnp.zeros_like, rows)),
  )
  row = jax.tree.map(
    lambda leaf, like: _laid_like(jnp.broadcast_to(leaf, like.shape), like),
    row,
    rows,
  )
  return trees.where(good, rows, row)


def mean_cotangent(slopes: jax.Array | float, good: jax.Array) -> jax.Array:
  """Cotangents of a mean over the good rows; zero where there is none."""
  return jnp.where(good, slopes, 0) / num_good(good, jnp.result_type(slopes))


def num_good(good: jax.Array, dtype: Any) -> jax.Array:
  """The number of good rows, at least one, to divide by."""
  return jnp.maximum(jnp.sum(good), 1).astype(dtype)


def zero_tally() -> dict[str, jax.Array]:
  """The fields of an info that `tally` keeps."""
  # Each has a buffer of its own: a state may be donated.
  return {
    'rejected': jnp.zeros((), jnp.int32),
    'total_rejected': jnp.zeros((), jnp.int32),
    'held': jnp.zeros((), bool),
    'total_held': jnp.zeros((), jnp.int32),
  }


def tally(
  info: Any, goods: tuple[jax.Array, ...], held: jax.Array
) -> dict[str, jax.Array]:
  """Counts a step: rows that are not good, and whether it was held."""
  # Sums of good rows stand elsewhere too, and are computed once.
  counts = [good.size - jnp.sum(good) for good in goods]
  rejected = jnp.sum(jnp.stack(counts)).astype(jnp.int32)
  return {
    'rejected': rejected,
    'total_rejected': info.total_rejected + rejected,
    'held': held,
    'total_held': info.total_held + held.astype(jnp.int32),
  }


def mean_of(values: jax.Array, good: jax.Array) -> jax.Array:
  """Mean over the good rows; zero where there is none."""
  total = jnp.sum(jnp.where(good, values, 0))
  return total / num_good(good, values.dtype)


def good_noise(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """Rows of noise that count; ``log_p = -inf`` is one, with weight zero."""
  return (log_p < jnp.inf) & jnp.isfinite(log_q)  # NaN < inf is false.


def rounding(dtype: Any, log_p: jax.Array) -> jax.Array:
  """What is lost of finite log densities that were computed in ``dtype``."""
  wide = log_p.astype(jnp.promote_types(jnp.float32, log_p.dtype))
  if not jnp.issubdtype(dtype, jnp.floating):
    return jnp.zeros((), wide.dtype)
  return jnp.finfo(dtype).eps * mean_of(jnp.abs(wide), jnp.isfinite(wide))


class Weights(NamedTuple):
  """Importance weights of a batch, from one exponential of each."""

  scaled: jax.Array  # shape [m], the weights over their largest
  log_scale: jax.Array  # shape (), the logarithm of the largest, -inf if none
  total: jax.Array  # shape (), the sum of `scaled`, 0 if none
  ess: jax.Array  # shape (), (sum w)^2 / sum w^2, 0 if none


def over_largest(log_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The logarithm of the largest weight, and all weights over the largest."""
  top = jnp.max(log_weights)
  return top, jnp.exp(log_weights - jnp.where(top > -jnp.inf, top, 0))


def importance_weights(log_weights: jax.Array) -> Weights:
  """Weights given by their logarithms, which are finite or -inf."""
  top, scaled = over_largest(log_weights)
  total = jnp.sum(scaled)
  squares = jnp.maximum(jnp.sum(scaled**2), jnp.finfo(scaled.dtype).tiny)
  return Weights(scaled, top, total, total**2 / squares)
