"""What `minimize` counts, tells a callback, and does lane by lane."""

import jax
from jax.experimental import io_callback
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import training

START = jnp.array([-2.0, 2.0])


def rosenbrock(x):
  return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


HESSIAN = optlab.dense(optlab.hessian(rosenbrock))
BACKTRACKING = optax.scale_by_backtracking_linesearch(20, store_grad=True)
METHODS = {
  'gns': (optlab.gns_newton(), HESSIAN),
  'lbfgs': (optax.lbfgs(), None),
  'backtracking': (optax.chain(optax.sgd(1e-2), BACKTRACKING), None),
  'adam': (optax.adam(0.1), None),
}


@pytest.mark.parametrize('name', METHODS)
def test_counts_are_the_calls(name):
  tx, curvature = METHODS[name]
  calls = {'values': 0, 'gradients': 0}

  def called(kind):
    calls[kind] += 1

  @jax.custom_vjp
  def counted(x):
    io_callback(lambda: called('values'), None)
    return rosenbrock(x)

  counted.defvjp(
    lambda x: (counted(x), x),
    lambda x, cotangent: (
      io_callback(lambda: called('gradients'), None),
      (cotangent * jax.grad(rosenbrock)(x),),
    )[1],
  )
  if name == 'backtracking':  # It linearizes, which needs forward mode.
    counted = rosenbrock
  run = jax.jit(
    lambda x: training.minimize(
      counted, x, tx, max_steps=12, curvature=curvature
    )
  )(START)
  jax.effects_barrier()
  assert run.steps == 12
  values, gradients, products, solves = map(int, run.counts)
  if name == 'backtracking':
    assert gradients == 13 < values
  else:
    assert (values, gradients) == (calls['values'], calls['gradients'])
  if name == 'gns':
    assert products == 1  # Of the first smoothness; the matrix is given.
    assert solves == run.opt_state.info.total_solves > 12
  else:
    assert products == solves == 0


def test_a_callback_sees_the_steps_and_stops_them():
  seen = []

  def callback(progress):
    seen.append((int(progress.steps), int(progress.counts.values)))
    assert progress.params.shape == (2,)
    return progress.value < 1.0

  @jax.jit
  def run(x):
    return training.minimize(
      rosenbrock, x, optax.lbfgs(), max_steps=50, callback=callback
    )

  result = run(START)
  jax.effects_barrier()
  assert result.status == training.STOPPED and not result.success
  assert result.message == 'The callback stopped it.'
  assert result.value < 1.0 and result.steps < 50
  assert [step for step, _ in seen] == list(range(1, int(result.steps) + 1))
  assert seen[-1][1] == result.counts.values
  never = training.minimize(
    rosenbrock, START, optax.lbfgs(), max_steps=3, callback=lambda now: None
  )
  assert (never.status, never.steps) == (training.MAX_STEPS, 3)


def test_one_trial_a_step_takes_the_same_trials_and_fewer_rounds_of_a_vmap(x64):
  starts = 2 * jax.random.normal(jax.random.key(0), (16, 2), jnp.float64)

  @jax.jit
  @jax.vmap
  def run(x, max_trials):
    return optlab.minimize(
      rosenbrock, x, optlab.gns_newton(max_trials=max_trials), max_steps=200,
      grad_tol=1e-8, curvature=HESSIAN,
      trace=lambda now: now.opt_state.info.solves,
    )  # fmt: skip

  many, one = (run(starts, jnp.full(16, n)) for n in (40, 1))
  assert np.all(many.success) and np.all(one.success)
  np.testing.assert_array_equal(many.counts, one.counts)
  np.testing.assert_allclose(one.params, many.params, rtol=1e-12)
  # A vmapped step takes as many trials as its slowest lane.
  rounds = lambda result: int(np.max(result.trace, axis=0).sum())
  assert rounds(one) == int(np.max(one.counts.solves))
  assert 1.5 * rounds(one) < rounds(many)
