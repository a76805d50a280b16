"""optlab's hypergradient estimators as a solver of benchmark_bilevel.

To run it there, in an environment with optlab and benchopt::

  git clone https://github.com/benchopt/benchmark_bilevel
  cp optlab_solver.py benchmark_bilevel/solvers/
  benchopt run benchmark_bilevel -s optlab -s SOBA -s SABA -d simulated
"""

from benchmark_utils.stochastic_jax_solver import StochasticJaxSolver
import jax
import jax.numpy as jnp
import optax

import optlab


class Solver(StochasticJaxSolver):
  """A hypergradient estimator of optlab, and an upper step.

  Rates follow the benchmark's convention: the upper rate is ``step_size /
  outer_ratio``. ``decay`` is the exponent of both rates' decay.
  """

  name = 'optlab'
  parameters = {
    'estimator': ['bo_rep', 'soba', 'saba', 'stocbio'],
    'upper_step': ['plain', 'normalized'],
    'storm': [None],
    'step_size': [0.1],
    'outer_ratio': [1.0],
    'decay': [0.0],
    'period': [2],
    'lower_steps': [5],
    'terms': [5],
    'batch_size': [64],
    **StochasticJaxSolver.parameters,
  }

  def skip(self, **objective):
    del objective
    if self.estimator == 'saba' and self.batch_size == 'full':
      return True, 'SABA needs more than one block'
    return False, None

  def _parts(self):
    """The estimator and the upper optimizer."""

    def rate(value):
      return lambda count: value / (1.0 + count) ** self.decay

    # The benchmark's functions take the inner variable first.
    upper = lambda x, y, start: self.f_outer(y, x, start)
    lower = lambda x, y, start: self.f_inner(y, x, start)
    lower_rate = rate(self.step_size)
    arguments = (upper, lower, optax.sgd(lower_rate), lower_rate)
    blocks = lambda samples, size: -(-samples // size)
    if self.estimator == 'bo_rep':
      estimator = optlab.bo_rep(
        *arguments, period=self.period, lower_steps=self.lower_steps
      )
    elif self.estimator == 'stocbio':
      estimator = optlab.stocbio(
        *arguments, lower_steps=self.lower_steps, neumann_steps=self.terms
      )
    elif self.estimator == 'saba':
      estimator = optlab.saba(
        *arguments,
        upper_blocks=blocks(self.n_outer_samples, self.batch_size_outer),
        lower_blocks=blocks(self.n_inner_samples, self.batch_size_inner),
      )
    else:
      estimator = optlab.soba(*arguments)
    if self.storm is not None:
      estimator = optlab.with_storm(estimator, self.storm)
    make = {'plain': optax.sgd, 'normalized': optlab.normalized_momentum}
    return estimator, make[self.upper_step](
      rate(self.step_size / self.outer_ratio)
    )

  def init(self):
    self.inner_var = jax.tree.map(jnp.copy, self.inner_var0)
    self.outer_var = jax.tree.map(jnp.copy, self.outer_var0)
    return {
      'inner_var': self.inner_var,
      'outer_var': self.outer_var,
      'state': optlab.init(self.outer_var, *self._parts(), self.inner_var),
      'state_inner_sampler': self.state_inner_sampler,
      'state_outer_sampler': self.state_outer_sampler,
    }

  def get_step(self, inner_sampler, outer_sampler):
    step = optlab.train_step(*self._parts())
    rounds = self.estimator in ('bo_rep', 'stocbio')
    indexed = self.estimator == 'saba'

    def one_step(carry, _):
      inner_state = carry['state_inner_sampler']

      def draw(state, _):
        start, index, _, state = inner_sampler(state)
        return state, (start, index)

      count = 1 + (self.lower_steps if rounds else 0)
      inner_state, (starts, indices) = jax.lax.scan(
        draw, inner_state, length=count
      )
      start, index, _, outer_state = outer_sampler(carry['state_outer_sampler'])
      upper, lower = start, starts[0]
      if indexed:
        upper = optlab.bilevel.IndexedBatch(index, upper)
        lower = optlab.bilevel.IndexedBatch(indices[0], lower)
      inner = starts[1:] if rounds else ()
      state, _ = step(carry['state'], optlab.BilevelBatch(upper, lower, inner))
      return {
        'inner_var': state.estimator_state.inner
        if self.storm is None
        else state.estimator_state.estimator_state.inner,
        'outer_var': state.params,
        'state': state,
        'state_inner_sampler': inner_state,
        'state_outer_sampler': outer_state,
      }, None

    return one_step
