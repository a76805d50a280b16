"""Densities of tables: how each method is trained, stopped and scored."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optlab

from ..lab import flags
from ..lab.study import Entry
from ..lab.study import Problem
from ..problems import densities
from ..problems import tabular

ROWS = 256  # Of data, and of noise, in a step.
LOOK_EVERY, LOOK_DRAWS = 25, 4096
SMC_LOOK_EVERY = 100
DRAWS = 40_000
UNNORMALIZED = ('meco', 'snis', 'nce', 'ence', 'dsm')
NORMALIZED = ('flow', 'mixture', 'kernel')
METHODS = ('meco', 'nce', 'ence', 'dsm', 'flow', 'mixture', 'kernel')
MIXTURES = (2, 4, 8, 16)
WIDTH = 128
TINY = 1e-6


class Best(NamedTuple):
  """The parameters that were best on validation rows so far."""

  params: Any
  loss: jax.Array  # shape ()
  step: jax.Array  # shape (), int32


class Run(NamedTuple):
  """A method that is trained.

  Attributes:
    train: Its training state.
    best: What early stopping keeps.
    split: The data.
    noise: Fitted to the training rows.
    draws: Rows of noise that every look at the validation rows takes.
    steps: Steps so far.
  """

  train: Any
  best: Best
  split: tabular.Split
  noise: Any
  draws: jax.Array
  steps: jax.Array


class Fitted(NamedTuple):
  """A method that is not: its losses on validation and test rows."""

  valid: jax.Array
  test: jax.Array


def log_density(params: Any, rows: jax.Array) -> jax.Array:
  """A perceptron on top of N(0, I), up to its normalizer."""
  if isinstance(params, optlab.unnormalized.NceParams):
    params = params.model
  hidden = rows
  for weight, bias in params[:-1]:
    hidden = jax.nn.silu(hidden @ weight + bias)
  weight, bias = params[-1]
  return (hidden @ weight + bias)[..., 0] - jnp.sum(rows**2, -1) / 2


def estimator_of(name: str) -> tuple[Any, Callable[..., tuple]]:
  """An estimator, and ``(rows, batch with noise, key) -> its batch``."""
  base, _, number = name.partition(':')
  wing = optlab.unnormalized
  noisy = lambda batch: batch
  if base == 'dsm':
    scale = float(number or 0.2)
    return wing.denoising_score_matching(log_density, scale), (
      lambda batch: batch.data
    )
  if base == 'flow':
    loss = lambda flow, batch: -jnp.mean(flow.log_prob(batch.data))
    return optlab.value_and_grad(loss), noisy
  if base in ('nce', 'ence'):
    model = wing.with_log_normalizer(log_density)
    return getattr(wing, base)(model), noisy
  gamma = 1.0 if base == 'snis' else float(number or 0.1)
  return optlab.meco(log_density, gamma), noisy


def start_of(name: str, key: jax.Array, split: tabular.Split) -> Any:
  """The parameters at the start."""
  dim = split.train.shape[1]
  if name == 'flow':
    return optlab.unnormalized.init_flow(key, split.train)
  mlp = densities.init_mlp(key, (dim, WIDTH, WIDTH, 1))
  if name in ('nce', 'ence'):
    return optlab.unnormalized.NceParams(
      mlp, jnp.asarray(dim * 0.5 * jnp.log(2 * jnp.pi))
    )
  return mlp


def look(params: Any, run: Run, rows: jax.Array, smc: bool) -> jax.Array:
  """The loss on some rows; infinite where so few draws cannot tell."""
  if isinstance(params, optlab.unnormalized.Flow):
    return -jnp.mean(params.log_prob(rows))
  if smc:  # In more columns importance sampling cannot tell from early on.
    method = optlab.unnormalized.tempered_smc(128, repeats=3, num_steps=5)
    model = functools.partial(log_density, params)
    found = optlab.log_partition(
      model, run.noise, jax.random.key(2), method=method
    )
    loss = found.value - jnp.mean(model(rows))
    return jnp.where(found.ok, loss, jnp.inf)
  log_w = log_density(params, run.draws) - run.noise.log_prob(run.draws)
  log_z = jax.nn.logsumexp(log_w) - jnp.log(LOOK_DRAWS)
  ess = jnp.exp(2 * jax.nn.logsumexp(log_w) - jax.nn.logsumexp(2 * log_w))
  loss = log_z - jnp.mean(log_density(params, rows))
  return jnp.where((ess > 50) & jnp.isfinite(loss), loss, jnp.inf)


def measure(
  steps: int, smc: bool, state: Run | Fitted, _: Any = None
) -> dict[str, jax.Array]:
  """Losses of the best parameters so far; NaN where the score is refused.

  Args:
    steps: Of a run; before its end the value is a look.
    smc: Whether log Z is by tempering, else by importance sampling.
    state: Of a method.
    _: The problem's arrays; it has none.
  """
  if isinstance(state, Fitted):
    return {'tuning': state.valid, 'value': state.test}
  params, split = state.best.params, state.split

  def score():
    model = functools.partial(log_density, params)
    method = optlab.unnormalized.tempered_smc() if smc else None
    found = optlab.log_partition(
      model, state.noise, jax.random.key(1), DRAWS, method=method
    )
    return found.value - jnp.mean(model(split.test))

  cheap = lambda: look(params, state, split.test, smc)
  if isinstance(params, optlab.unnormalized.Flow):
    value = cheap()
  else:
    value = jax.lax.cond(state.steps >= steps, score, cheap)
  return {
    'tuning': state.best.loss + split.log_det, 'value': value + split.log_det,
  }  # fmt: skip


def trained(
  name: str, rows: jax.Array, keep: int | None, steps: int, smc: bool
) -> Entry:
  """A method with steps and a learning rate."""
  base = name.partition(':')[0]
  estimator, batch_of = estimator_of(name)

  def tx(rate):
    rate = optax.cosine_decay_schedule(rate, steps)
    return optax.chain(
      optax.clip_by_global_norm(10.0), optax.adamw(rate, weight_decay=0.01)
    )

  def start(key, rate, *_):
    keys = jax.random.split(key, 5)
    split = tabular.split(keys[0], rows, keep)
    noise = tabular.noise(keys[1], split.train)
    params = start_of(base, keys[2], split)
    inner = (keys[3],) if base == 'dsm' else ()
    best = Best(params, jnp.asarray(jnp.inf), jnp.zeros((), jnp.int32))
    train = optlab.init(params, estimator, tx(rate), *inner)
    draws = noise.sample(keys[4], LOOK_DRAWS)
    zero = jnp.zeros((), jnp.int32)
    return kept(Run(train, best, split, noise, draws, zero))

  def kept(run):
    loss = look(run.train.params, run, run.split.valid, smc)
    found = Best(run.train.params, loss, run.steps)
    better = loss < run.best.loss
    best = jax.tree.map(
      lambda new, old: jnp.where(better, new, old), found, run.best
    )
    return run._replace(best=best)

  def step(run, key, rate, *_):
    keys = jax.random.split(key)
    size = run.split.train.shape[0]
    chosen = run.split.train[jax.random.randint(keys[0], (ROWS,), 0, size)]
    batch = optlab.noise_batch(run.noise, keys[1], chosen, ROWS)
    train, _ = optlab.train_step(estimator, tx(rate))(
      run.train, batch_of(batch)
    )
    run = run._replace(train=train, steps=run.steps + 1)
    due = run.steps % (SMC_LOOK_EVERY if smc else LOOK_EVERY) == 0
    return jax.lax.cond(due, kept, lambda run: run, run)

  return Entry(start, step, 1.0)


def fitted(name: str, rows: jax.Array, keep: int | None, steps: int) -> Entry:
  """A method that is fitted at once."""

  def start(key, rate, *_):
    del rate
    keys = jax.random.split(key)
    split = tabular.split(keys[0], rows, keep)
    if name == 'kernel':
      losses = tabular.kernel_density(split)
    else:
      found = []
      for components in MIXTURES:
        density = tabular.fit_mixture(keys[1], split.train, components)
        loss = lambda rows, density=density: -jnp.mean(density.log_prob(rows))
        found.append(jnp.stack([loss(split.valid), loss(split.test)]))
      table = jnp.stack(found)
      losses = table[jnp.argmin(table[:, 0])]
    return Fitted(losses[0] + split.log_det, losses[1] + split.log_det)

  return Entry(start, lambda state, *_: state, steps, False)


def problem(name: str, steps: int, smc: bool) -> Problem:
  """The density of a table.

  Args:
    name: See `tabular.load`.
    steps: Of a run.
    smc: Whether log Z is by tempering, else by importance sampling.

  Returns:
    The `Problem`; a seed is a split, and a call a step.
  """
  loaded, keep = tabular.load(name)
  rows = jnp.asarray(loaded)

  def entry(method):
    base, _, number = method.partition(':')
    known = base in (*UNNORMALIZED, *NORMALIZED)
    if number:
      known = base in ('meco', 'dsm')
    try:
      known = known and (not number or float(number) > TINY)
    except ValueError:
      known = False
    if not known:
      raise flags.UserError(
        f'--methods={method}: not one of'
        f' {", ".join((*UNNORMALIZED, *NORMALIZED))}, meco:GAMMA or dsm:SCALE'
      )
    if method in ('mixture', 'kernel'):
      return fitted(method, rows, keep, steps)
    if method == 'dsm':
      variants = {
        f'dsm:{scale}': trained(f'dsm:{scale}', rows, keep, steps, smc)
        for scale in (0.1, 0.2, 0.4)
      }
      first = next(iter(variants.values()))
      return first._replace(variants=variants)
    return trained(method, rows, keep, steps, smc)

  return Problem(
    entry, METHODS, (0.001, 0.003, 0.01), steps, 'steps',
    functools.partial(measure, steps, smc), 'test nats',
  )  # fmt: skip
