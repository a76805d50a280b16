"""optlab's estimators as a solver of benchopt/benchmark_bilevel.

``benchmarks/bilevel_benchopt.py`` copies it into the benchmark's ``solvers``.
"""

from benchmark_utils.stochastic_jax_solver import StochasticJaxSolver
from benchopt import safe_import_context

with safe_import_context() as import_ctx:
  from functools import partial

  import jax
  import jax.numpy as jnp
  import optax

  import optlab


class Solver(StochasticJaxSolver):
  """One estimator, with plain steps (or normalized ones)."""

  name = 'optlab'
  # Batches of lower and upper level that a step draws are in `BATCHES` of the
  # program beside; `exponent` is the decay of all rates.
  parameters = {
    'estimator': ['soba'],
    'step_size': [0.1],
    'outer_ratio': [1.0],
    'exponent': [0.0],
    'batch_size': [64],
    **StochasticJaxSolver.parameters,
  }

  def _make(self):
    upper = lambda x, y, start: self.f_outer(y, x, start)
    lower = lambda x, y, start: self.f_inner(y, x, start)
    decay = lambda rate: lambda step: rate * (step + 1.0) ** -self.exponent
    rate = decay(self.step_size) if self.exponent else self.step_size
    blocks = self.n_outer_samples // 64, self.n_inner_samples // 64
    whole = partial(self.f_outer.func, batch_size=self.n_outer_samples)
    below = partial(self.f_inner.func, batch_size=self.n_inner_samples)
    # A batch is where it starts; all data are named by a start below zero.
    either = lambda some, all_: (
      lambda x, y, start: jax.lax.cond(
        start < 0, lambda: all_(y, x, 0), lambda: some(y, x, start)
      )
    )
    name, _, steps = self.estimator.partition('-')
    steps = int(steps or 10)
    levels = upper, lower, optax.sgd(rate)
    estimator = {
      'soba': lambda: optlab.soba(*levels, rate),
      'saba': lambda: optlab.saba(
        *levels, rate, upper_blocks=blocks[0], lower_blocks=blocks[1]
      ),
      'srba': lambda: optlab.bilevel.srba(
        either(self.f_outer, whole), either(self.f_inner, below),
        optax.sgd(rate), rate, optlab.BilevelBatch(-1, -1), period=steps,
      ),
      'mrbo': lambda: optlab.bilevel.mrbo(*levels, rate),
      'bo_rep': lambda: optlab.bo_rep(*levels, rate, lower_steps=steps),
      'stocbio': lambda: optlab.stocbio(
        *levels, rate, lower_steps=steps, neumann_steps=10
      ),
      'ttsa': lambda: optlab.bilevel.ttsa(*levels, rate, neumann_steps=10),
      'implicit': lambda: optlab.implicit(*levels, lower_steps=steps),
      'unrolled': lambda: optlab.unrolled(*levels, lower_steps=steps),
      'f2sa': lambda: optlab.bilevel.f2sa(
        *levels, lambda step: 1.0 + 0.01 * step, lower_steps=steps
      ),
    }[name]()  # fmt: skip
    outer = self.step_size / self.outer_ratio
    tx = optax.sgd(decay(outer) if self.exponent else outer)
    drawn = 1 if name == 'ttsa' else steps
    rounds = ('bo_rep', 'stocbio', 'ttsa', 'implicit', 'unrolled', 'f2sa')
    return name, estimator, tx, drawn if name in rounds else 0

  def init(self):
    name, estimator, tx, _ = self._make()
    key = (jax.random.key(self.random_state),) if name == 'ttsa' else ()
    self.inner_var, self.outer_var = self.inner_var0, self.outer_var0
    state = optlab.init(self.outer_var0, estimator, tx, self.inner_var0, *key)
    return {
      'state': state,
      'inner': self.state_inner_sampler,
      'outer': self.state_outer_sampler,
      'inner_var': self.inner_var0,
      'outer_var': self.outer_var0,
    }

  def get_step(self, inner_sampler, outer_sampler):
    name, estimator, tx, drawn = self._make()
    train_step = optlab.train_step(estimator, tx)

    def one(carry, _):
      low, low_id, _, inner = inner_sampler(carry['inner'])
      up, up_id, _, outer = outer_sampler(carry['outer'])
      fresh = ()
      if drawn:

        def draw(state, _):
          start, *_, state = inner_sampler(state)
          return state, start

        inner, fresh = jax.lax.scan(draw, inner, length=drawn)
      if name == 'saba':
        up = optlab.bilevel.IndexedBatch(up_id, up)
        low = optlab.bilevel.IndexedBatch(low_id, low)
      batch = optlab.BilevelBatch(up, low, fresh)
      state, _ = train_step(carry['state'], batch)
      return {
        'state': state,
        'inner': inner,
        'outer': outer,
        'inner_var': state.estimator_state.inner,
        'outer_var': state.params,
      }, None

    return one

  def get_one_epoch_jitted(self, inner_sampler, outer_sampler):
    step = self.get_step(inner_sampler, outer_sampler)

    def one_epoch(carry, eval_freq):
      carry, _ = jax.lax.scan(step, carry, length=eval_freq)
      return jax.tree.map(jnp.asarray, carry)

    return jax.jit(one_epoch, static_argnums=(1,))
