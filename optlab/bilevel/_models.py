"""Bilevel estimators of models with state and of random losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import base
from optlab import checks
from optlab import losses
from optlab import trees
from optlab.bilevel import _bilevel
from optlab.bilevel import _problem
from optlab.bilevel import _saba
from optlab.bilevel import _state
from optlab.bilevel import _statistics


class ModelsState(NamedTuple):
  """State of `with_models`.

  Attributes:
    estimator_state: The `BilevelState` of the estimator.
    loss: Step, model state ``(upper's, lower's)`` and key.
  """

  estimator_state: Any
  loss: losses.LossState


class _Sample(NamedTuple):
  """What a level gets for its batch."""

  batch: Any
  model_state: Any
  key: Any


@checks.domains(
  make=checks.Function('(upper, lower) -> estimator'), **_bilevel.LEVELS
)
def with_models(
  make: Callable[[_problem.Objective, _problem.Objective], Any],
  upper: Callable[..., Any],
  lower: Callable[..., Any],
  *,
  has_aux: bool = False,
  has_state: bool = False,
  has_key: bool = False,
) -> base.GradientEstimator:
  r"""A bilevel estimator of levels with model state and keys.

  What `value_and_grad` takes of one loss, for two. The model state is a pair,
  the upper level's and the lower one's: each level gets the whole pair and
  returns its own part.

  Args:
    make: ``(upper, lower) -> estimator``, any of this wing made with
      ``has_aux=True``.
    upper: ``(x, y, batch)``, with ``has_state`` ``(x, y, model_state, batch)``,
      and with ``has_key`` a key last. It returns the value; with ``has_aux``,
      ``(value, aux)``; with ``has_state``, ``(value, model_state)``, of its own
      part; with both, ``(value, (model_state, aux))``.
    lower: The same.
    has_aux: Whether both return auxiliary output: `Estimate.aux` is then a
      `BilevelAux`.
    has_state: Whether they have model state. ``init`` takes the pair after
      ``x``, ``y``; ``()`` for a level without.
    has_key: Whether they are random. ``init`` takes the key of the run last;
      each level gets it folded with the step, the lower steps one each.

  Returns:
    A `GradientEstimator` with a `ModelsState`.

  Raises:
    TypeError: ``make``, ``upper`` or ``lower`` is not a function, or a level
      returns something else than declared.
    ValueError: ``init`` gets too few arguments, model state changes its
      shapes, or a level depends on model state that x or y moves.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optlab
    >>> def upper(x, y, model_state, batch):
    ...   return jnp.sum((y - model_state[1]) ** 2), ()
    >>> def lower(x, y, model_state, batch):
    ...   mean = 0.5 * model_state[1] + 0.5 * batch
    ...   return jnp.sum((y - 2.0 * x) ** 2), mean
    >>> make = lambda f, g: optlab.soba(f, g, optax.sgd(0.2), 0.2, has_aux=True)
    >>> estimator = optlab.bilevel.with_models(
    ...     make, upper, lower, has_state=True)
    >>> tx, x = optax.sgd(0.02), jnp.zeros(1)
    >>> state = optlab.init(x, estimator, tx, x, ((), jnp.zeros(())))
    >>> step = jax.jit(optlab.train_step(estimator, tx))
    >>> for _ in range(200):
    ...   state, value = step(state, optlab.BilevelBatch((), jnp.ones(())))
    >>> print(f'{state.params[0]:.2f}')
    0.50

  Notes:
    Within a step the model state stands still: all evaluations and lower steps
    see that of its start, and what the last evaluation of each level at the
    step's sample returns is the next one. A rejected step holds it too. The
    hypergradient is that at a model state held fixed. So a level whose value
    depends on model state that x or y moves, as running statistics do, is
    refused: let it normalize by its batch, as in training, or declare by
    ``jax.lax.stop_gradient`` that this part may be left out.
    `saba`, whose memory assumes that a sample has one gradient, refuses both.
  """
  checks.enforce(with_models, locals())
  names = ['model_state'] * has_state + ['key'] * has_key
  levels = (
    _level('upper', upper, 0, has_aux, has_state, has_key),
    _level('lower', lower, 1, has_aux, has_state, has_key),
  )
  estimator = make(*levels)
  checks.ESTIMATOR.check('make(upper, lower)', estimator)

  def init(params, *inner):
    if len(inner) <= len(names):
      raise ValueError(
        f'init must get {", ".join(["params", "inner", *names])}, got'
        f' {len(inner)} after params.'
      )
    cut = len(inner) - len(names)
    given = dict(zip(names, inner[cut:], strict=True))
    checks.check_arrays('model_state', given.get('model_state', ()))
    return ModelsState(
      estimator.init(params, *inner[:cut]),
      losses.LossState(
        step=jnp.zeros((), jnp.int32),
        model_state=trees.own(given.get('model_state', ((), ()))),
        key=checks.as_key('key', given['key']) if has_key else (),
      ),
    )

  def estimate(params, state, batch):
    _state.check_batch(batch)
    if isinstance(
      getattr(state.estimator_state, 'memory', ()), _saba.SabaMemory
    ):
      raise ValueError(
        'with_models has no model state and no keys for saba, whose memory of'
        ' an IndexedBatch assumes that a block has one gradient: take soba.'
      )
    loss = state.loss
    batch = _with_models(batch, loss, has_key)
    if has_state:
      inner = getattr(state.estimator_state, 'inner', None)
      _statistics.check_still(
        levels, params, inner, (batch.upper, batch.lower), loss.model_state
      )
    result, new = estimator.estimate(params, state.estimator_state, batch)
    changed, aux = zip(result.aux.upper, result.aux.lower, strict=True)
    kept = trees.where(
      new.info.rejected,
      loss,
      loss._replace(step=loss.step + 1, model_state=changed),
    )
    result = result._replace(aux=_problem.BilevelAux(*aux) if has_aux else ())
    return result, ModelsState(new, kept)

  return base.GradientEstimator(init, estimate)


def _with_models(batch, loss, has_key):
  """The batch, with model state and keys for each of its samples."""
  keys: Any = ((),) * 3
  if has_key:
    key = jax.random.fold_in(loss.key, loss.step)
    keys = [jax.random.fold_in(key, i) for i in range(3)]
  samples = batch.step_samples
  if jax.tree.leaves(samples):
    steps = jnp.shape(jax.tree.leaves(samples)[0])[0]
    spread = lambda leaf: jnp.broadcast_to(leaf, (steps, *jnp.shape(leaf)))
    samples = _Sample(
      samples,
      jax.tree.map(spread, loss.model_state),
      jax.random.split(keys[2], steps) if has_key else (),
    )
  return batch._replace(
    upper=_Sample(batch.upper, loss.model_state, keys[0]),
    lower=_Sample(batch.lower, loss.model_state, keys[1]),
    step_samples=samples,
  )


def _level(name, fun, part, has_aux, has_state, has_key):
  """A level as ``(x, y, sample) -> (value, (model state, aux))``."""
  loss = losses.Loss(
    lambda pair, *rest: fun(*pair, *rest), has_aux, has_state, has_key, part
  )

  def objective(x, y, sample):
    if not isinstance(sample, _Sample):
      raise TypeError(
        f'{name} needs a batch to carry model state and keys, got'
        f' {type(sample).__name__}: give BilevelBatch step_samples with a leaf.'
      )
    return loss((x, y), sample.model_state, sample.batch, sample.key)

  return objective
