# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Softmax regression: Newton's method without a Hessian
#
# With ten classes and 64 pixels the Hessian of softmax regression has 640 rows;
# with 28 x 28 pixels it has 7,840, and nobody wants to factorize that. This
# notebook trains on handwritten digits with Newton steps that never form a
# matrix, and shows why a step that was refused costs almost nothing.
#
# Run it from the project's root, or open the executed `.ipynb`.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from experiments.problems import data
import optlab

jax.config.update('jax_enable_x64', True)

# %% [markdown]
# ## The objective, in two parts
#
# A linear model gives ten logits, $u_i = W^\top a_i$; the loss is the mean
# cross-entropy and a small penalty. Kept apart, the two parts are all that
# `optlab.gauss_newton` asks for: with $J$ the derivative of the model, the
# curvature is
#
# $$ v \mapsto J^\top\, \nabla^2 \ell(u)\, J\, v, $$
#
# one pass forward and one back. For a linear model it *is* the Hessian.

# %%
digits = data.load('digits')
order = jax.random.permutation(jax.random.key(0), len(digits.labels))
A, labels = (
  jnp.asarray(digits.features)[order],
  jnp.asarray(digits.labels)[order],
)
train, test = (A[:1437], labels[:1437]), (A[1437:], labels[1437:])
l2 = 1e-3


def model(W, batch):
  return batch[0] @ W


def loss(logits, batch):
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  return jnp.mean(cross_entropy(logits, batch[1]))


def objective(W):
  return loss(model(W, train), train) + 0.5 * l2 * jnp.vdot(W, W)


gauss_newton = optlab.gauss_newton(model, loss)


def curvature(W):
  operator = gauss_newton(W, train)
  return jax.tree_util.Partial(lambda op, v: op(v) + l2 * v, operator)


# %% [markdown]
# ## One Krylov space a step, for every trial
#
# A step solves $(H + \lambda I) d = -g$, and if it is refused, solves it again
# with a larger $\lambda$. Lanczos' process builds one small basis from products
# $H v$; in that basis the system is tridiagonal *for every* $\lambda$. So the
# products are paid once a step, however many trials the step takes.


# %%
def trace(now):
  info = now.opt_state.info
  return now.value, info.total_products, info.total_trials


run = jax.jit(
  lambda W: optlab.minimize(
    objective,
    W,
    optlab.gns_newton(),
    curvature=curvature,
    max_steps=30,
    grad_tol=1e-10,
    trace=trace,
  )
)
result = run(jnp.zeros((64, 10)))
steps = int(result.steps)
values, products, trials = (row[: steps + 1] for row in result.trace)
best = float(result.value)

print('step  trials  products   f - f*')
for k in range(steps + 1):
  print(f'{k:4d} {trials[k]:7d} {products[k]:9d}   {values[k] - best:.1e}')

# %% [markdown]
# The last steps use more products: the closer to the solution, the more exactly
# the system is solved. That is what makes the last steps quadratic.
#
# ## Against L-BFGS, by what each asks of the machine
#
# A product costs about as much as a gradient, so both are counted alike.

# %%
lbfgs = jax.jit(
  lambda W: optlab.minimize(
    objective,
    W,
    optax.lbfgs(),
    max_steps=200,
    grad_tol=1e-7,
    trace=lambda now: (
      now.value,
      optax.tree.get(now.opt_state, 'num_linesearch_steps'),
    ),
  )
)
other = lbfgs(jnp.zeros((64, 10)))
count = int(other.steps)
lbfgs_values, searches = (row[: count + 1] for row in other.trace)
lbfgs_calls = 1 + jnp.cumsum(searches)
gns_calls = 1 + trials + products

figure, panel = plt.subplots(figsize=(6, 3.6))
for name, calls, row in (
  ('GNS-Newton, matrix-free', gns_calls, values),
  ('optax.lbfgs', lbfgs_calls, lbfgs_values),
):
  panel.semilogy(calls, jnp.maximum(row - best, 1e-16), '.-', label=name)
panel.set(xlabel='gradients + Hessian-vector products', ylabel='f - f*')
panel.set_ylim(1e-13, 10)
panel.grid(alpha=0.3)
panel.legend()
plt.show()

# %% [markdown]
# And by the clock: the processor's milliseconds, the least of five runs.

# %%
for name, solve, steps_taken in (
  ('GNS-Newton', run, steps),
  ('optax.lbfgs', lbfgs, count),
):
  seconds = []
  for _ in range(5):
    began = time.process_time()
    jax.block_until_ready(solve(jnp.zeros((64, 10))))
    seconds.append(time.process_time() - began)
  print(f'{name:12} {steps_taken:4d} steps {1e3 * min(seconds):7.1f} ms')

# %% [markdown]
# ## What was learned
#
# The weights of each class, as pictures: where ink speaks for the digit (red)
# and against it (blue).

# %%
W = result.params
figure, panels = plt.subplots(1, 10, figsize=(10, 1.4))
limit = float(jnp.max(jnp.abs(W)))
for digit, panel in enumerate(panels):
  image = W[:, digit].reshape(8, 8)
  panel.imshow(image, cmap='RdBu_r', vmin=-limit, vmax=limit)
  panel.set(xticks=[], yticks=[], title=str(digit))
plt.show()

accuracy = jnp.mean(jnp.argmax(model(W, test), axis=1) == test[1])
print(f'accuracy on {len(test[1])} digits not seen: {accuracy:.1%}')

# %% [markdown]
# **The moral.** Newton's method needs products with the Hessian, not the
# Hessian. One Krylov basis a step answers for every regularization that the
# search may try, and the count of products says honestly what it cost.
