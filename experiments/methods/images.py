"""Optimizers and batch rules of image classification, on split images."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optlab

from ..lab import devices
from ..lab import flags
from ..lab import study
from ..problems import image_classifiers

WATCHED = 1024  # Images on which the signal-to-noise ratio is measured.
REPORTED = ('test_loss', 'train_loss', 'average_batch', 'batch_size')

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
  'adagrad': optax.adagrad,
  'adagrad_norm': optlab.adagrad_norm,
  'diffgrad': optlab.diffgrad,
  'adam': optax.adam,
  'amsgrad': optax.amsgrad,
  'adabelief': optax.adabelief,
  'sgd': lambda rate: optax.sgd(rate, momentum=0.9),
}


class Batches(NamedTuple):
  """How large batches are.

  Attributes:
    name: As the flag gives it.
    test: Of `grow_batch`; for a constant batch it only watches.
    size: The first size.
    limit: The last size.
    moments: Route to the moments.
    inner_products: Route to the inner products.
    grows: Whether the batch may grow.
    cap: The factor by which it may grow in a step, ``None`` for any.
    power: Of the batch by which the learning rate follows it.
  """

  name: str
  test: optlab.batches.Test
  size: int
  limit: int
  moments: Any
  inner_products: Any = None
  grows: bool = True
  cap: float | None = None
  power: float = 0.0


# How a learning rate follows the batch.
POWERS = {'root': 0.5, 'linear': 1.0}
# Test, and routes to the moments and the inner products.
TESTS: dict[str, tuple[Callable[..., optlab.batches.Test], Any, Any]] = {
  'norm': (optlab.norm_test, optlab.ghost_norms, None),
  'means': (optlab.norm_test, optlab.batches.microbatch_means, None),
  'coordinate': (
    optlab.batches.coordinate_norm_test, optlab.batches.vmap_grads, None
  ),
  'inner': (
    optlab.inner_product_test, optlab.batches.plain_grads,
    optlab.batches.jvp_inner_products,
  ),
  'augmented': (
    lambda theta, **memory: optlab.augmented_inner_product_test(
      theta, theta, **memory
    ),
    optlab.ghost_norms, optlab.batches.jvp_inner_products,
  ),
  'noise': (optlab.batches.noise_scale, optlab.ghost_norms, None),
}  # fmt: skip


def batches(
  name: str, first_size: int, length: int, decay: float = 0.95
) -> Batches:
  """Reads one entry of the flag ``--batches``.

  Args:
    name: A constant size, ``full``, or ``TEST:constant`` with TEST one of
      norm, inner, augmented, coordinate, means (norm test on microbatch means),
      noise; with ``+memory``, whose batch at most doubles in a step, and
      ``+root`` or ``+linear``, by which the learning rate follows the batch.
    first_size: Where a growing batch starts.
    length: Examples in the data set.
    decay: Of averages over steps, for tests with a memory.

  Returns:
    The `Batches`.

  Raises:
    UserError: It is none of these.
  """
  kind, _, text = name.partition(':')
  try:
    if not text:
      if name != 'full' and not name.isdecimal():
        raise flags.UserError(
          f'--batches={name}: not a size, full, or a test with its constant, as'
          ' in norm:1'
        )
      size = length if name == 'full' else int(name)
      if not 2 <= size <= length:
        raise flags.UserError(
          f'--batches={name}: a size must be from 2 to the {length} images'
        )
      plain = optlab.batches.plain_grads
      return Batches(
        name, optlab.norm_test(1.0), size, size, plain, None, False
      )
    value, *words = text.split('+')
    if kind not in TESTS:
      raise flags.UserError(
        f'--batches={name}: no test {kind}; there are {", ".join(TESTS)}'
      )
    unknown = set(words) - {'memory', *POWERS}
    if unknown or len(POWERS.keys() & set(words)) > 1:
      raise flags.UserError(
        f'--batches={name}: after the constant comes +memory, and +root or'
        ' +linear'
      )
    test, moments, inner_products = TESTS[kind]
    remembers = 'memory' in words or kind == 'noise'
    if remembers and moments is optlab.batches.plain_grads:
      moments = optlab.ghost_norms  # What is averaged is unbiased by them.
    return Batches(
      name, test(float(value), **({'decay': decay} if remembers else {})),
      first_size, length, moments, inner_products, True,
      2.0 if remembers else None, sum(POWERS.get(word, 0.0) for word in words),
    )  # fmt: skip
  except ValueError as error:
    raise flags.UserError(f'--batches={name}: {error}') from error


def shifted(pixels: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Moves each image by at most so many pixels either way, by a key each."""

  def move(image, key):
    if pixels >= min(image.shape[:2]):
      raise flags.UserError(
        f'--shift={pixels}: an image of {image.shape[0]} x {image.shape[1]}'
        ' pixels would be moved out of sight'
      )
    start = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
    around = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    return jax.lax.dynamic_slice(around, (*start, 0), image.shape)

  return jax.vmap(move)


def problem(
  config: Any, data: image_classifiers.Images, methods: tuple[str, ...]
) -> study.Problem:
  """Training on images, by the flags of the program; a call is an image.

  Args:
    config: The flags.
    data: The images, with some held out: rates are picked by the loss on these
      where they are for validation.
    methods: What is compared, ``optimizer, batches``.

  Returns:
    The problem.
  """
  dtype = jnp.dtype(config.precision)
  model = image_classifiers.model(
    config.model, data.train[0].shape[1], data.classes, dtype
  )
  watch = optlab.per_example(model.losses, optlab.ghost_norms)
  length = len(data.train[1])

  def measure(state, resident):
    (x, y), (held_x, held_y) = resident
    train = state.run.train
    params = train.params
    estimate, _ = watch.estimate(params, (), (x[:WATCHED], y[:WATCHED]))
    count = estimate.extras['sample_size'] - 1
    variance = estimate.extras['sum_sq_diff_norm'] / count
    signal = optax.tree.norm(estimate.grads) ** 2 / variance
    right = jnp.argmax(model.logits(params, held_x), -1) == held_y
    loss = jnp.mean(model.losses(params, (held_x, held_y)))
    accuracy = jnp.mean(right.astype(dtype))
    values = {} if data.name == 'test' else {'tuning': loss}
    return values | {
      'value': accuracy,
      f'{data.name}_loss': loss,
      f'{data.name}_accuracy': accuracy,
      'train_loss': jnp.mean(model.losses(params, (x, y))),
      'signal_to_noise': signal,
      # Of the mean gradient of the batch that comes next.
      'batch_signal_to_noise': signal * state.size,
      'batch_size': state.size,
      'average_batch': images_seen(state.run, length)
      / jnp.maximum(train.step, 1),
    }

  return study.Problem(
    lambda name: entry(config, model, length, name),
    methods, config.learning_rates, config.epochs * length, 'images', measure,
    'test accuracy', more=True, reported=REPORTED,
    data=jax.tree.map(jnp.asarray, (data.train, data.held)), batched=True,
  )  # fmt: skip


class State(NamedTuple):
  """One lane."""

  run: optlab.batches.GrowingState
  size: jax.Array  # Of the batch that comes next.


def entry(
  config: Any, model: image_classifiers.Model, length: int, name: str
) -> study.Entry:
  """An optimizer with a batch rule, on so many images."""
  optimizer, rule_name = name.split(', ')
  if rule_name.isdigit():  # A growing batch's average, while rates are tuned.
    rule_name = str(min(int(rule_name), length))
  rule = batches(rule_name, config.first_size, length, config.decay)
  microbatch, route = config.microbatch, rule.moments
  losses: Any = model.losses
  if config.shift:
    losses = lambda params, batch, keys: model.losses(
      params, (shifted(config.shift)(batch[0], keys), batch[1])
    )
  if route is optlab.batches.microbatch_means:
    microbatch = min(microbatch, rule.size // 2)
  else:
    route = lambda losses, params, *rows: rule.moments(
      losses, params, *devices.split(rows)
    )
  estimator = optlab.per_example(
    losses, route, inner_products=rule.inner_products,
    microbatch_size=min(microbatch, rule.limit), has_key=bool(config.shift),
  )  # fmt: skip

  def make(rate):
    if not rule.grows:  # It would only watch: it pays for no moments.
      return OPTIMIZERS[optimizer](rate)
    grow = optlab.grow_batch(
      rule.test, rule.size, rule.limit, growth_cap=rule.cap
    )
    follow = optax.inject_hyperparams(OPTIMIZERS[optimizer])(
      optlab.batches.batch_learning_rate(rate, rule.size, power=rule.power)
    )
    return optax.chain(grow, follow)

  def state_of(run):
    size = optax.tree.get(run.train.opt_state, 'batch_size', rule.size)
    return State(run, jnp.asarray(size, jnp.int32))

  def start(key, rate, seed, data):
    del seed
    keys = jax.random.split(key)
    noise = [jax.random.fold_in(key, 2)] if config.shift else []
    return state_of(
      optlab.growing_init(
        model.start(keys[0]), estimator, make(rate), data[0], keys[1], *noise
      )
    )

  def step(state, key, rate, data):
    del key
    advance = optlab.growing_step(
      estimator, make(rate), batch_size=None if rule.grows else rule.size,
      rest=optlab.batches.keep,  # Equally many samples in every epoch.
    )  # fmt: skip
    return state_of(advance(state.run, data[0])[0])

  def moved(before, after):
    return images_seen(after.run, length) - images_seen(before.run, length)

  # The seeds of a constant batch are computed together; a vmap of loops would
  # be as slow as its largest batch.
  average = length / math.ceil(length / rule.size)
  return study.Entry(start, step, moved if rule.grows else average)


def images_seen(run: optlab.batches.GrowingState, length: int) -> jax.Array:
  """How many images a run has passed over."""
  return run.epochs.epoch * length + run.epochs.position
