"""A user's program: every family, as the type checkers of users see it."""

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

import optlab

key, x = jax.random.key(0), jnp.ones(3)
data = jax.random.normal(key, (64, 3))


def loss(params: jax.Array, batch: jax.Array) -> jax.Array:
  return jnp.mean((batch @ params - 1.0) ** 2)


def upper(x: jax.Array, y: jax.Array, batch: None) -> jax.Array:
  return jnp.sum(jnp.cosh(y - x))


def log_density(params: jax.Array, rows: jax.Array) -> jax.Array:
  return rows @ params - jnp.sum(rows**2, 1) / 2


estimator, tx = optlab.value_and_grad(loss), optlab.diffgrad(1e-3)
state = optlab.init(x, estimator, tx)
state, value = jax.jit(optlab.train_step(estimator, tx))(state, data)
print(float(value), optlab.report(state)['step'])

result = optlab.minimize(
  lambda x: jnp.sum(x**2),
  x,
  optlab.gns_newton(solver=optlab.cg()),
  curvature=optlab.hessian(lambda x: jnp.sum(x**2)),
  max_steps=10,
  trace=lambda now: now.value,
)
newton_state: optlab.newton.GNSNewtonState = result.opt_state
print(result.params, int(result.steps), newton_state.info.total_trials)

examples = optlab.per_example(
  lambda params, rows: (rows @ params - 1.0) ** 2,
  optlab.ghost_norms,
  microbatch_size=8,
)
rule = optlab.adadagrad(0.1, optlab.norm_test(0.5), 8, 64)
growing = optlab.growing_init(x, examples, rule, data, key)
growing, value = optlab.growing_step(examples, rule)(growing, data)

bilevel = optlab.bo_rep(
  upper, lambda x, y, batch: jnp.sum((y - x) ** 2), optax.sgd(0.2), 0.2
)
steps = optlab.normalized_momentum(optax.cosine_decay_schedule(0.1, 100))
state = optlab.init(x, bilevel, steps, x)
batch = optlab.BilevelBatch(upper=None, lower=None)
state, value = optlab.train_step(bilevel, steps)(state, batch)

blocks = optlab.bsvrb(
  lambda x, y, target: jnp.sum((y - target) ** 2),
  lambda x, y, batch: jnp.sum((y - x) ** 2),
  100,
)
state = optlab.init(x, blocks, optax.adam(0.1), jnp.zeros((100, 3)))
chosen = optlab.BlockBatch(optlab.sample_blocks(key, 100, 10), jnp.ones(10))

model = optlab.meco(log_density)
noise = optlab.fit_gaussian(data)
state = optlab.init(x, model, optlab.adagrad_norm(0.1))
estimate, memory = model.estimate(
  x, state.estimator_state, optlab.noise_batch(noise, key, data, 8)
)
print(estimate.value, optax.tree.norm(estimate.grads))
