"""Normalizers that are parameters, one or one for each context."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab.unnormalized import _coverage
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _noise_batch
from optlab.unnormalized import _trackers


class NceParams(NamedTuple):
  """A model's parameters beside the log-normalizer that is learned with them.

  Attributes:
    model: The parameters of the unnormalized model.
    log_normalizer: Scalar, or ``[contexts]``; start it at an estimate of log Z
      if there is one.
  """

  model: base.Params
  log_normalizer: jax.Array


@checks.domains(log_density=_likelihood.LOG_DENSITY)
def with_log_normalizer(
  log_density: _likelihood.LogDensity,
) -> _likelihood.LogDensity:
  """Subtracts a log-normalizer that is a parameter, as `nce` needs it.

  Args:
    log_density: The model, ``(params, rows) -> [rows]``, up to a constant.

  Returns:
    The same with `NceParams` as its parameters; auxiliary output passes.

  Raises:
    TypeError: ``log_density`` is not a function.
    ValueError: Where it is called, the normalizer is no scalar.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optlab import unnormalized
    >>> log_density = unnormalized.with_log_normalizer(lambda mean, x: mean * x)
    >>> params = unnormalized.NceParams(2.0, jnp.ones(()))
    >>> print(log_density(params, jnp.ones(1)))
    [1.]
  """
  checks.enforce(with_log_normalizer, locals())

  def normalized(params, rows) -> Any:
    checks.check_fields(
      'params', params, NceParams._fields, 'NceParams(model, log_normalizer)'
    )
    shape = jnp.shape(params.log_normalizer)
    if shape:
      raise ValueError(
        f'params.log_normalizer must be a scalar, got shape {shape}; of several'
        ' contexts give nce the model alone, and their number.'
      )
    out = log_density(params.model, rows)
    if isinstance(out, tuple):
      log_p, aux = out
      return log_p - params.log_normalizer, aux
    return out - params.log_normalizer

  return normalized


def with_log_normalizers(
  log_density: _likelihood.LogDensity, has_aux: bool
) -> _likelihood.LogDensity:
  """The model over pairs of a row and its context, normalizer subtracted."""
  inner = _likelihood.with_aux(log_density, has_aux)

  def model(params, pairs) -> Any:
    rows, contexts = pairs
    log_p, aux = inner(params.model, rows)
    _likelihood.check_rows(log_p, contexts.shape[0])
    log_p = log_p - params.log_normalizer[contexts]
    return (log_p, aux) if has_aux else log_p

  return model


def beside(
  batch: _noise_batch.NoiseBatch, contexts: int
) -> tuple[_noise_batch.NoiseBatch, tuple[jax.Array, jax.Array]]:
  """Rows with their contexts beside them, and which of them name one."""
  named, pairs = [], []
  for rows, index in (
    (batch.data, batch.contexts), (batch.noise, batch.noise_contexts)
  ):  # fmt: skip
    index = jnp.asarray(index)
    index = index.astype(jnp.promote_types(index.dtype, jnp.int32))
    named.append((index >= 0) & (index < contexts))
    pairs.append((rows, jnp.clip(index, 0, contexts - 1)))
  return batch._replace(data=pairs[0], noise=pairs[1]), (named[0], named[1])


def check(
  method: str, params: Any, batch: Any, contexts: int | None
) -> tuple[int, int]:
  """Raises unless the batch fits; returns its numbers of rows."""
  n, m = _noise_batch.check_batch(method, batch, needs_data_log_prob=True)
  if contexts is not None:
    _trackers.check(method, batch, n, m)
    checks.check_fields(
      'params',
      params,
      NceParams._fields,
      'NceParams(model, log_normalizer)',
    )
    shape = jnp.shape(params.log_normalizer)
    if shape != (contexts,):
      raise ValueError(
        f'{method} with contexts={contexts} needs params.log_normalizer of'
        f' shape ({contexts},), got {shape}.'
      )
    return n, m
  _trackers.refuse(
    method, batch, f'give {method} the number of contexts, and NceParams a'
    ' normalizer for each.',
  )  # fmt: skip
  if isinstance(params, NceParams):
    _coverage.check_apart(method, batch)
  return n, m
