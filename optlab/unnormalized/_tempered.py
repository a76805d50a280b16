"""log Z by adaptive tempered sequential Monte Carlo, sampled by blackjax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp
from jax.scipy import special

from optlab import checks
from optlab.unnormalized import _kernels
from optlab.unnormalized import _likelihood
from optlab.unnormalized import _samplers
from optlab.unnormalized import _standing
from optlab.unnormalized import _temper


class Found(NamedTuple):
  """What a ``method`` of `log_partition` returns, in this order."""

  value: jax.Array  # shape (), log Z
  standard_error: jax.Array  # shape ()
  second: jax.Array  # shape (), log Z by backward weights
  second_error: jax.Array  # shape ()
  runs: Any  # what has smallest_ess, of each repeat
  rejected: jax.Array  # shape (), int32
  ok: jax.Array  # shape (), bool
  data_gap: Any = jnp.nan  # shape (), by how much data say that log Z is larger


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
  sampler: _samplers.Sampler | Callable[..., jax.Array] | None = None,
  repeats: int = 6,
  num_steps: int = 10,
  target_ess: float | jax.Array = 0.6,
  max_stages: int = 100,
) -> Callable[..., Found]:
  r"""A ``method`` of `log_partition` for ten to a hundred dimensions.

  Particles go from the noise to the model through :math:`q^{1 - \beta}
  p_0^\beta`, with temperatures chosen by their effective sample size and steps
  of a sampler at each. The error bar is that of independent repeats; weights
  taken backward, from the particles after a temperature's steps, must agree.

  Args:
    num_particles: Particles of a repeat.
    sampler: What moves them, in units of the noise's spread: `hmc_sampler`, any
      kernel of blackjax by `kernel_sampler`, or what else
      `contrastive_divergence` takes. ``None`` is blackjax's MALA, whose step
      size follows the acceptance. Bits and categories need a discrete one, such
      as `gibbs_sampler`, and move as they are.
    repeats: Independent runs.
    num_steps: Calls of the sampler at each temperature.
    target_ess: Share of the particles that a change of temperature leaves
      effective.
    max_stages: The most temperatures; a run that needs more is refused.

  Returns:
    A function to pass as ``method``.

  Raises:
    ImportError: In `log_partition`, where blackjax is not installed.
    TypeError: An argument is not a number or no integer, ``sampler`` is none;
      in `log_partition`, rows are discrete and the sampler is not.
    ValueError: A count is too small, or ``target_ess`` not in (0, 1).

  References:
    Del Moral, Doucet, Jasra, `Sequential Monte Carlo samplers
    <https://doi.org/10.1111/j.1467-9868.2006.00553.x>`_, JRSS B 2006; the check
    by data is the reverse run of Grosse, Ghahramani, Adams, `Sandwiching the
    marginal likelihood using bidirectional Monte Carlo
    <https://arxiv.org/abs/1511.02543>`_, 2015; `blackjax
    <https://github.com/blackjax-devs/blackjax>`_

  Notes:
    Fresh draws of the noise, 32 for each particle, tell a mode that the
    particles lost; one that neither has met is seen by ``data`` alone. They
    tell as well which share of the noise lies where the model has density:
    particles start there. Where that is fewer than eight of them the score is
    refused. Where the model is wider than the noise the temperatures come no
    nearer to the model than by half of the way at a time.

    It takes the noise's density on trust: one that does not integrate to one is
    seen by draws around the last particles, as far as by those of
    `log_partition`. Bits and counts in floats are refused without
    a discrete sampler. Cost: ``repeats * num_particles * num_steps``
    gradients of model and noise at each temperature, and 82 evaluations for
    each particle and 15,000 more; with ``data`` of
    `log_partition` somewhat more than twice that.
  """
  checks.enforce(tempered_smc, locals())
  if sampler is not None:
    sampler = _samplers.as_sampler('sampler', sampler)

  def method(log_density, noise, key, data=None):
    library = _temper.library('tempered_smc')
    moves = sampler

    def run(key):
      rows = noise.sample(key, num_particles)
      space = _space(log_density, noise, rows, moves)
      path = _temper.Path(
        moves or _mala(library.blackjax, space.positions.shape[1]),
        space.log_q, space.log_ratio, num_steps, target_ess, max_stages,
      )  # fmt: skip
      found, last = _temper.climb(library, path, key, space.positions)
      if data is None:
        return found, space.back(last), jnp.nan
      start = _spread(space.to(data), num_particles)
      reverse = _temper.descend(
        library, path, jax.random.fold_in(key, 2), start
      )
      return found, space.back(last), reverse

    runs, rows, reverse = jax.vmap(run)(jax.random.split(key, repeats))
    flat = rows.reshape(-1, rows.shape[-1])
    inside = _summary(runs)
    discrete = moves is not None and bool(moves.discrete)
    found = _standing.judged(
      inside, log_density, noise, jax.random.fold_in(key, 1), flat, discrete
    )
    return found if data is None else _reached(found, reverse, inside.value)

  return method


def _mala(blackjax, size):
  """MALA of blackjax, with the step that is right for a Gaussian."""
  return _kernels.kernel_sampler(
    blackjax.mala, 1, step_size=size ** (-1 / 3), target_acceptance=0.57
  )


class _Space(NamedTuple):
  """Where particles move: vectors, and what is known of them."""

  positions: jax.Array  # shape [num, size], of the noise's draws
  log_q: Callable[[jax.Array], jax.Array]
  log_ratio: Callable[[jax.Array], jax.Array]
  to: Callable[[Any], jax.Array]
  back: Callable[[jax.Array], jax.Array]


def _space(log_density, noise, rows, sampler):
  """Rows as vectors, floating ones in units of the noise's spread."""
  discrete = sampler is not None and sampler.discrete
  for leaf in jax.tree.leaves(rows):
    if not discrete and not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise TypeError(
        f'tempered_smc moves floating rows, got dtype {leaf.dtype}; give it a'
        ' discrete sampler, such as gibbs_sampler, or score by importance'
        ' sampling, method=None.'
      )
  if discrete and (not hasattr(rows, 'dtype') or rows.ndim != 2):
    raise TypeError(
      'tempered_smc with a discrete sampler moves rows that are one array'
      ' [num, columns].'
    )
  first = jax.tree.map(lambda leaf: leaf[0], rows)
  _, unravel = flatten_util.ravel_pytree(first)
  flatten = jax.vmap(lambda row: flatten_util.ravel_pytree(row)[0])
  flat = flatten(rows)
  mean, scale = jnp.mean(flat, 0), jnp.std(flat, 0)
  scale = jnp.where(scale > 0, scale, 1)
  wide = jnp.promote_types(flat.dtype, jnp.float32)
  if discrete:
    to, back = lambda rows: rows.astype(flat.dtype), lambda rows: rows
  else:
    to = lambda rows: ((flatten(rows) - mean) / scale).astype(wide)
    back = lambda positions: mean + scale * positions

  def log_q(positions):
    return noise.log_prob(jax.vmap(unravel)(back(positions))).astype(wide)

  def log_ratio(positions):
    log_p = log_density(jax.vmap(unravel)(back(positions)))
    _likelihood.check_rows(log_p, positions.shape[0])
    return log_p.astype(wide) - log_q(positions)

  return _Space(to(rows), log_q, log_ratio, to, back)


def _spread(rows, num):
  """So many of the rows, evenly, or each of them several times."""
  return rows[jnp.arange(num) * rows.shape[0] // num]


def _reached(found, reverse, value):
  """Refuses where runs from the data to the noise find more mass."""
  num = reverse.shape[0]
  # 1 / Z is what a run estimates.
  log_z = jnp.log(float(num)) - special.logsumexp(-reverse)
  gap = log_z - value
  error = jnp.std(reverse, ddof=1) / jnp.sqrt(float(num))
  bound = 3 * jnp.hypot(error, found.standard_error) + 0.1
  return found._replace(ok=found.ok & (gap <= bound), data_gap=gap)


def _summary(runs):
  """The mean of Z over repeats, its error, and what speaks against it."""
  num = runs.forward.shape[0]
  mean = lambda logs: special.logsumexp(logs) - jnp.log(float(num))
  value, second = mean(runs.forward), mean(runs.backward)
  error = lambda logs: jnp.std(logs, ddof=1) / jnp.sqrt(float(num))
  # Student's quantile over the normal one, for few repeats.
  student = 1 + 1.25 / (num - 1)
  difference = runs.backward - runs.forward
  # What forward and backward differ by is error too, that repeats share; and
  # a constant in the log density takes digits from all that is added to it.
  standard_error = jnp.hypot(
    student * error(runs.forward),
    jnp.abs(jnp.mean(difference)) + jnp.finfo(value.dtype).eps * jnp.abs(value),
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
  return Found(value, standard_error, second, second_error, runs, rejected, ok)
