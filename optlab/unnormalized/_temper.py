"""Runs of tempered particles: from noise to model, and from data to noise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import special

from optlab.unnormalized import _kernels
from optlab.unnormalized import _samplers


class Library(NamedTuple):
  """What blackjax gives."""

  blackjax: Any
  base: Any
  ess: Any
  solver: Any
  resampling: Any


def library(user: str) -> Library:
  """The modules, or an error that names blackjax and who needs it."""
  names = ('base', 'ess', 'solver', 'resampling')
  modules = [f'blackjax.smc.{name}' for name in names]
  return Library(*_kernels.blackjax(user, 'blackjax', *modules))


class Path(NamedTuple):
  """From noise to model, with what moves the particles on it."""

  moves: _samplers.Sampler
  log_q: Callable[[jax.Array], jax.Array]
  log_ratio: Callable[[jax.Array], jax.Array]
  num_steps: int
  target_ess: Any
  max_stages: int

  def at(self, beta: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The log density of a temperature, ``[num, size] -> [num]``.

    It is minus infinity where the model's is, at the noise's temperature too:
    the path starts at the noise within the model's support.
    """

    def log_density(positions):
      log_ratio = self.log_ratio(positions)
      outside = log_ratio == -jnp.inf
      weighted = beta * jnp.where(outside, 0, log_ratio)
      return jnp.where(outside, -jnp.inf, self.log_q(positions) + weighted)

    return log_density


class Tempered(NamedTuple):
  """What one run of tempering found."""

  # Shape (), log Z over the noise's mass where the model has density, by
  # weights of the particles before
  forward: jax.Array
  backward: jax.Array  # shape (), by those after each temperature
  smallest_ess: jax.Array  # shape (), of all temperatures
  share: jax.Array  # shape (), of the start, where the model has density
  infinite: jax.Array  # shape (), int32, particles of no or infinite density
  stages: jax.Array  # shape (), int32, temperatures
  finished: jax.Array  # shape (), bool, whether it came to the end


class _Loop(NamedTuple):
  particles: jax.Array
  weights: jax.Array
  ratios: jax.Array  # log p / q of the particles
  passed: jax.Array  # shape (), how far from the start, in [0, 1]
  delta: jax.Array  # the last change of that
  memory: Any  # the sampler's
  key: jax.Array
  result: Tempered


def climb(
  library: Library, path: Path, key: jax.Array, positions: jax.Array
) -> tuple[Tempered, jax.Array]:
  """Takes draws of the noise to the model: what was found, where they end."""
  return _run(
    library, path, key, positions, positions, lambda passed: passed, 1
  )


def descend(
  library: Library, path: Path, key: jax.Array, positions: jax.Array
) -> jax.Array:
  """Log Z, as `Tempered.forward` is, by a run from rows to the noise."""
  move_key, key = jax.random.split(key)
  # Rows of data are not quite the model's.
  memory = path.moves.init(positions)
  start, _ = _moved(path, move_key, positions, jnp.ones(()), memory, 5)
  down, _ = _run(
    library, path, key, positions, start, lambda passed: 1 - passed, -1
  )
  done = down.finished & (down.infinite == 0)
  return jnp.where(done, -down.forward, jnp.inf)


def _moved(path, key, particles, beta, memory, times=1):
  """The particles after steps at a temperature, and the sampler's memory."""

  def move(carry, key):
    rows, memory = carry
    run = path.moves.step(path.at(beta), key, rows, memory)
    return (run.rows, run.state), None

  keys = jax.random.split(key, times * path.num_steps)
  return jax.lax.scan(move, (particles, memory), keys)[0]


def _within(library, path, key, positions):
  """Positions where the model has density, their ratios, and their share.

  Those outside give way to copies of those within.
  """
  ratios = path.log_ratio(positions)
  outside = ratios == -jnp.inf
  weights = jnp.where(outside, 0, 1 / jnp.maximum(jnp.sum(~outside), 1))
  index = library.resampling.systematic(
    jax.random.fold_in(key, 3), weights.astype(ratios.dtype), ratios.size
  )
  index = jnp.where(outside, index, jnp.arange(ratios.size))
  return positions[index], ratios[index], 1 - jnp.mean(outside)


def _most(path, loop, beta):
  """The longest change of temperature that the particles can vouch for.

  Where the heaviest of them lies further out than others do, the model is wider
  than they are, and their weights say nothing of the tail that they have not
  met. Those of a Gaussian's draws keep their variance up to half of the way.
  """
  left = 1 - loop.passed
  log_p = path.at(beta)(loop.particles)
  outward = log_p[jnp.argmax(loop.ratios)] < jnp.mean(log_p)
  return jnp.where(outward & (left > 2e-3), left / 2, left)


def _run(library, path, key, like, positions, beta_of, sign):
  """Moves particles from one end to the other, and once more there."""
  num = positions.shape[0]
  positions, ratios, share = _within(library, path, key, positions)
  dtype = ratios.dtype
  zero, none = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
  infinite = jnp.sum(~(ratios < jnp.inf)).astype(jnp.int32)
  result = Tempered(
    zero, zero, jnp.full((), num, dtype), share, infinite, none,
    jnp.asarray(False),
  )  # fmt: skip

  def body(loop):
    key, step_key = jax.random.split(loop.key)
    change = library.ess.ess_solver(
      lambda _: sign * loop.ratios, loop.particles, path.target_ess,
      1 - loop.passed, library.solver.dichotomy,
    )  # fmt: skip
    most = _most(path, loop, beta_of(loop.passed)) if sign > 0 else 1.0
    delta = jnp.clip(change, 0, jnp.minimum(most, 1 - loop.passed))
    delta = delta.astype(dtype)

    def update(keys, particles, parameters):
      return _moved(path, keys[0], particles, *parameters)

    def weigh(particles):
      return jnp.where(delta > 0, delta * sign * path.log_ratio(particles), 0)

    state, info = library.base.step(
      step_key,
      library.base.SMCState(
        loop.particles, loop.weights, (beta_of(loop.passed), loop.memory)
      ),
      update,
      weigh,
      library.resampling.systematic,
    )
    ratios = path.log_ratio(state.particles)
    back = -special.logsumexp(-loop.delta * sign * ratios)
    back = jnp.where(loop.delta > 0, back + jnp.log(float(num)), 0)
    result = Tempered(
      loop.result.forward + info.log_likelihood_increment,
      loop.result.backward + back,
      jnp.minimum(loop.result.smallest_ess, 1 / jnp.sum(state.weights**2)),
      loop.result.share,
      loop.result.infinite + jnp.sum(~(ratios < jnp.inf)).astype(jnp.int32),
      loop.result.stages + 1,
      loop.passed >= 1,
    )
    return _Loop(
      state.particles, state.weights, ratios, loop.passed + delta, delta,
      info.update_info, key, result,
    )  # fmt: skip

  loop = jax.lax.while_loop(
    lambda loop: (
      ~loop.result.finished & (loop.result.stages <= path.max_stages)
    ),
    body,
    _Loop(
      positions, jnp.full((num,), 1 / num, dtype), ratios, zero, zero,
      path.moves.init(like), key, result,
    ),
  )  # fmt: skip
  return loop.result, loop.particles
