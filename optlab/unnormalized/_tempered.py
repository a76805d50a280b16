"""log Z by adaptive tempered sequential Monte Carlo, sampled by blackjax."""

from collections.abc import Callable
import importlib
from typing import Any, NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp
from jax.scipy import special

from optlab import checks
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _walk


class Tempered(NamedTuple):
  """What one run of tempering found."""

  forward: jax.Array  # shape (), log Z by weights of the particles before
  backward: jax.Array  # shape (), by those after each temperature
  smallest_ess: jax.Array  # shape (), of all temperatures
  infinite: jax.Array  # shape (), int32, particles of no or infinite density
  stages: jax.Array  # shape (), int32, temperatures
  finished: jax.Array  # shape (), bool, whether it came to the model


@checks.domains(
  num_particles=checks.Integer(minimum=2),
  repeats=checks.Integer(minimum=2),
  num_steps=checks.Integer(),
  target_ess=checks.OPEN_FRACTION,
  max_stages=checks.Integer(),
)
def tempered_smc(
  num_particles: int = 256,
  *,
  repeats: int = 6,
  num_steps: int = 10,
  target_ess: float | jax.Array = 0.6,
  max_stages: int = 100,
) -> Callable[..., tuple[jax.Array, ...]]:
  r"""A ``method`` of `log_partition` for ten to a hundred dimensions.

  Particles go from the noise to the model through :math:`q^{1 - \beta}
  p_0^\beta`, with temperatures chosen by their effective sample size and MALA
  steps of blackjax, whose size follows the acceptance, at each. The error bar
  is that of independent repeats; weights taken backward, from the particles
  after a temperature's steps, must agree.

  Args:
    num_particles: Particles of a repeat.
    repeats: Independent runs.
    num_steps: MALA steps of a particle at each temperature.
    target_ess: Share of the particles that a change of temperature leaves
      effective.
    max_stages: The most temperatures; a run that needs more is refused.

  Returns:
    A function to pass as ``method``.

  Raises:
    ImportError: In `log_partition`, where blackjax is not installed.
    TypeError: An argument is not a number or no integer.
    ValueError: A count is too small, or ``target_ess`` not in (0, 1).

  References:
    Del Moral, Doucet, Jasra, `Sequential Monte Carlo samplers
    <https://doi.org/10.1111/j.1467-9868.2006.00553.x>`_, JRSS B 2006; `blackjax
    <https://github.com/blackjax-devs/blackjax>`_

  Notes:
    Rows are floating, and not bits or counts in floats. It takes the noise's
    density on trust: one that does not integrate to one is seen by importance
    sampling alone. Cost: ``repeats * num_particles * num_steps`` gradients of
    model and noise at each
    temperature.
  """
  checks.enforce(tempered_smc, locals())

  def method(log_density, noise, key):
    blackjax, adaptive, resampling = _blackjax()

    def run(key):
      rows = noise.sample(key, num_particles)
      logs, positions, back = _on_unit_scale(log_density, noise, rows)
      kernel = adaptive.build_kernel(
        *logs,
        blackjax.mala.build_kernel(),
        blackjax.mala.init,
        resampling.systematic,
        target_ess,
      )
      start = adaptive.init(positions)
      found, last = _temper(
        kernel, start, key, logs[1], positions, num_steps, max_stages
      )
      return found, back(last)

    runs, rows = jax.vmap(run)(jax.random.split(key, repeats))
    flat = rows.reshape(-1, rows.shape[-1])
    found = _summary(runs)
    return _stand(found, log_density, noise, jax.random.fold_in(key, 1), flat)

  return method


def _blackjax():
  try:
    return tuple(
      importlib.import_module(name)
      for name in (
        'blackjax',
        'blackjax.smc.adaptive_tempered',
        'blackjax.smc.resampling',
      )
    )
  except ImportError as error:
    raise ImportError(
      'tempered_smc samples by blackjax, which is not installed: pip install'
      " blackjax, or optlab with its extra 'scores'."
    ) from error


def _on_unit_scale(log_density, noise, rows):
  """Log q and log p / q of a vector, in units of the noise's spread."""
  for leaf in jax.tree.leaves(rows):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise TypeError(
        f'tempered_smc moves floating rows, got dtype {leaf.dtype}; score'
        ' discrete rows by importance sampling, method=None.'
      )
  first = jax.tree.map(lambda leaf: leaf[0], rows)
  _, unravel = flatten_util.ravel_pytree(first)
  flat = jax.vmap(lambda row: flatten_util.ravel_pytree(row)[0])(rows)
  mean, scale = jnp.mean(flat, 0), jnp.std(flat, 0)
  scale = jnp.where(scale > 0, scale, 1)
  wide = jnp.promote_types(flat.dtype, jnp.float32)

  def row_of(position):
    return jax.tree.map(
      lambda leaf: leaf[None], unravel(mean + scale * position)
    )

  def log_q(position):
    return noise.log_prob(row_of(position))[0].astype(wide)

  def log_ratio(position):
    log_p = log_density(row_of(position))
    _likelihood.check_rows(log_p, 1)
    return log_p[0].astype(wide) - log_q(position)

  back = lambda positions: mean + scale * positions
  return (log_q, log_ratio), ((flat - mean) / scale).astype(wide), back


class _Loop(NamedTuple):
  state: Any
  key: jax.Array
  log_step: jax.Array
  delta: jax.Array  # the last change of temperature
  result: Tempered


def _temper(kernel, start, key, log_ratio, positions, num_steps, max_stages):
  """Moves particles from temperature zero to one, and once at one."""
  num, size = positions.shape
  dtype = positions.dtype
  zero, none = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
  result = Tempered(
    zero, zero, jnp.full((), num, dtype), none, none, jnp.asarray(False)
  )
  start = start._replace(
    tempering_param=jnp.asarray(start.tempering_param, dtype),
    weights=start.weights.astype(dtype),
  )

  def body(loop):
    key, step_key = jax.random.split(loop.key)
    parameters = {'step_size': jnp.exp(loop.log_step)[None]}
    before = loop.state.tempering_param
    state, info = kernel(step_key, loop.state, num_steps, parameters)
    delta = state.tempering_param - before
    ratios = jax.vmap(log_ratio)(state.particles)
    bad = jnp.sum(~(ratios < jnp.inf)).astype(jnp.int32)
    back = -special.logsumexp(-loop.delta * ratios) + jnp.log(float(num))
    accepted = jnp.mean(info.update_info.acceptance_rate)
    result = Tempered(
      loop.result.forward + info.log_likelihood_increment,
      loop.result.backward + jnp.where(loop.delta > 0, back, 0),
      jnp.minimum(loop.result.smallest_ess, 1 / jnp.sum(state.weights**2)),
      loop.result.infinite + bad,
      loop.result.stages + 1,
      before >= 1,
    )
    log_step = loop.log_step + 2 * (accepted - 0.57)
    return _Loop(state, key, log_step, delta, result)

  log_step = jnp.log(jnp.asarray(size ** (-1 / 3), dtype))
  loop = _Loop(start, key, log_step, zero, result)
  loop = jax.lax.while_loop(
    lambda loop: ~loop.result.finished & (loop.result.stages <= max_stages),
    body,
    loop,
  )
  return loop.result, loop.state.particles


def _stand(found, log_density, noise, key, flat):
  """Refuses where the last particles do not stand still, as draws must not."""
  value, error, second, second_error, runs, rejected, ok = found
  layout = _walk.layout(jax.eval_shape(lambda: noise.sample(key, 1)))
  rows = jax.vmap(layout.unravel)(flat)
  log_p = log_density(rows).astype(value.dtype)
  log_w = log_p - noise.log_prob(rows).astype(value.dtype)
  fresh = noise.sample(key, 64)
  whole = _walk.whole(_walk.flatten(fresh, flat.dtype))
  reservoir = _walk.Reservoir(
    value, flat, log_w, log_p, jnp.min(flat, 0), jnp.max(flat, 0), whole
  )
  walked = _walk.walk(log_density, noise, key, reservoir, layout, 50)
  change, change_error = _walk.change_of(
    value, log_w, walked.log_w, jnp.asarray(flat.shape[0], value.dtype)
  )
  rejected += walked.infinite
  ok &= (walked.infinite == 0) & ~walked.escaped
  ok &= ~jnp.any(whole)  # MALA does not move bits.
  ok &= jnp.abs(change) <= 3 * change_error + 1e-3
  return value, error, second, second_error, runs, rejected, ok


def _summary(runs):
  """The mean of Z over repeats, its error, and what speaks against it."""
  num = runs.forward.shape[0]
  mean = lambda logs: special.logsumexp(logs) - jnp.log(float(num))
  value, second = mean(runs.forward), mean(runs.backward)
  error = lambda logs: jnp.std(logs, ddof=1) / jnp.sqrt(float(num))
  # Student's quantile over the normal one, for few repeats.
  student = 1 + 1.25 / (num - 1)
  difference = runs.backward - runs.forward
  # What forward and backward differ by is error too, that repeats share.
  standard_error = jnp.hypot(
    student * error(runs.forward), jnp.mean(difference)
  )
  second_error = student * error(difference)
  rejected = jnp.sum(runs.infinite)
  ok = (
    jnp.all(runs.finished)
    & (rejected == 0)
    & jnp.isfinite(value)
    & (standard_error < 0.5)
    & (jnp.abs(jnp.mean(difference)) <= 3 * second_error + 0.1)
  )
  return value, standard_error, second, second_error, runs, rejected, ok
