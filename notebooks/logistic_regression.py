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
# # Logistic regression: Newton's method that cannot get lost
#
# Newton's method needs a handful of steps where gradient descent needs
# thousands, but only near the solution. From a start that is not near, it can
# run away. This notebook shows it running away on a real data set, and the one
# number that keeps it on the road.
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
# ## The data and the objective
#
# 8,124 mushrooms, edible or not, described by 112 binary features, with
#
# $$ f(x) = \frac1n \sum_{i=1}^n \log(1 + e^{-y_i \langle a_i, x \rangle})
#    + \frac{1}{2n} |x|^2. $$

# %%
mushrooms = data.load('mushrooms')
A, y = jnp.asarray(data.dense(mushrooms)), jnp.asarray(data.signs(mushrooms))
l2 = 1.0 / len(y)


def loss(margins, batch):
  return jnp.mean(jax.nn.softplus(-batch[1] * margins))


def objective(x):
  return loss(A @ x, (A, y)) + 0.5 * l2 * x @ x


# %% [markdown]
# ## Newton's method, as in the textbook
#
# $x^+ = x - \nabla^2 f(x)^{-1} \nabla f(x)$, started at zero and at two random
# points further out.

# %%
scales = jnp.array([0.0, 0.5, 2.0])
starts = scales[:, None] * jax.random.normal(jax.random.key(0), (3, 112))


@jax.jit
@jax.vmap
def newton(x):
  def step(x, _):
    grad, hessian = jax.grad(objective)(x), jax.hessian(objective)(x)
    return x - jnp.linalg.solve(hessian, grad), objective(x)

  return jax.lax.scan(step, x, length=25)[1]


newton_values = newton(starts)

# %% [markdown]
# ## The same step, with a brake
#
# GNS-Newton adds a multiple of the identity to the Hessian:
#
# $$ x^+ = x - (\nabla^2 f(x) + \lambda I)^{-1} \nabla f(x), \qquad
#    \lambda = |\nabla f(x)| / \gamma. $$
#
# Two things matter. First, $\lambda$ is *normalized by the gradient*: it fades
# as the solution comes near, and Newton's fast convergence is back. Second,
# $\gamma$ is not a constant that somebody has to know. It is searched: a step
# $d$ is accepted if
#
# $$ f(x) - f(x^+) \ge |\nabla f(x^+)|^2 / (8 \lambda), $$
#
# which is the paper's test, or if $f$ falls by a tenth of what the quadratic
# model promised, $\frac12 (\lambda |d|^2 - \langle \nabla f(x), d \rangle)$.
# Otherwise $\lambda$ is made four times larger. After a step it goes down as
# far as the error of the model just seen, $|\nabla f(x^+) + \lambda d| / |d|$,
# allows. `optlab.gns_newton()` is an optax transformation; `optlab.minimize`
# runs it in one compiled loop.

# %%
curvature = optlab.linear_gauss_newton(lambda batch: batch[0], loss, l2)


@jax.jit
@jax.vmap
def gns(x):
  return optlab.minimize(
    objective,
    x,
    optlab.gns_newton(),
    curvature=lambda x: curvature(x, (A, y)),
    max_steps=25,
    grad_tol=1e-12,
    trace=lambda now: (now.value, now.grad_norm, now.opt_state.info.shift),
  )


result = gns(starts)
gns_values, grad_norms, shifts = result.trace
best = float(jnp.min(gns_values[gns_values > 0]))

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for panel, name, values in (
  (panels[0], "Newton's method", newton_values),
  (panels[1], 'GNS-Newton', gns_values),
):
  for scale, row in zip(scales, values, strict=True):
    gap = jnp.where(row > 0, jnp.clip(row - best, 1e-16), jnp.nan)
    panel.semilogy(gap, marker='.', label=f'start of scale {scale:g}')
  panel.set(title=name, xlabel='steps', ylim=(1e-17, 1e7))
  panel.grid(alpha=0.3)
panels[0].set_ylabel('f - f*')
panels[0].legend()
plt.show()

# %% [markdown]
# Left, Newton's method from the furthest start is thrown to a value of 31,000
# and stays there. Right, all three runs come down, and each ends in the steep
# fall that Newton's method is loved for.

# %%
for scale, plain, ours in zip(scales, newton_values, gns_values, strict=True):
  print(
    f'start of scale {scale:3.1f}:  Newton ends at {plain[-1]:9.3g},'
    f'  GNS-Newton at {ours[ours > 0][-1]:.8f}'
  )

# %% [markdown]
# ## What the brake does
#
# Along the run from zero: the regularization falls with the gradient, so the
# steps become Newton steps by themselves.

# %%
steps = int(result.steps[0])
figure, panel = plt.subplots(figsize=(5, 3.4))
panel.semilogy(grad_norms[0, : steps + 1], marker='.', label='|gradient|')
panel.semilogy(
  range(1, steps + 1), shifts[0, 1 : steps + 1], marker='.', label='lambda'
)
panel.set(xlabel='steps')
panel.grid(alpha=0.3)
panel.legend()
plt.show()

# %% [markdown]
# ## And beside L-BFGS
#
# The best first-order solver of optax on the same objective, from zero, to
# $f - f^* \le 10^{-8}$: steps, and milliseconds of the processor (compiling
# apart, the least of five runs). A row of the data has 21 ones among 112
# columns; `optlab.sparse_matrix` prepares products that look at these alone,
# for both solvers, and the Hessian $A^\top W A$ of Newton's.


# %%
def solver(tx, newton=False):
  """Compiled ``(A, y, l2, f*) -> MinimizeResult``."""

  @jax.jit
  def solve(A, y, l2, best):
    fun = lambda x: loss(A @ x, (A, y)) + 0.5 * l2 * x @ x
    hessian = optlab.linear_gauss_newton(lambda batch: batch[0], loss, l2)
    return optlab.minimize(
      fun,
      jnp.zeros(A.shape[1]),
      tx,
      curvature=(lambda x: hessian(x, (A, y))) if newton else None,
      max_steps=8000,
      target_value=best + 1e-8,
    )

  return solve


solvers = {
  'GNS-Newton': solver(optlab.gns_newton(), newton=True),
  'L-BFGS': solver(optax.lbfgs()),
}


def race(*problem):
  """Steps and milliseconds of each solver."""
  rows = {}
  for name, solve in solvers.items():
    run, seconds = jax.block_until_ready(solve(*problem)), []
    for _ in range(5):
      began = time.process_time()
      jax.block_until_ready(solve(*problem))
      seconds.append(time.process_time() - began)
    rows[name] = int(run.steps), 1e3 * min(seconds)
  return rows


ones = optlab.sparse_matrix(mushrooms.features, gram=True)
for name, (steps, ms) in race(ones, y, l2, best).items():
  print(f'{name:12} {steps:4d} steps {ms:7.1f} ms')

# %% [markdown]
# ## Who wins where
#
# A Hessian costs what many gradients cost, and a few of them have to pay off.
# What decides is the condition of the problem: how much longer the valley is
# than wide. Here are 1,000 rows of 50 columns whose scales differ more and
# more, so that the Hessian's condition grows from 1 to a million.

# %%
keys = jax.random.split(jax.random.key(0), 3)
features = jax.random.normal(keys[0], (1000, 50))
plane = jax.random.normal(keys[1], (50,))
noise = 3.0 * jax.random.normal(keys[2], (1000,))
labels = jnp.sign(features @ plane + noise)
conditions = [1e0, 1e2, 1e4, 1e6]
table = {name: [] for name in solvers}
for condition in conditions:
  scales = jnp.logspace(0.0, -0.5 * jnp.log10(condition), 50)
  problem = features * scales, labels, 1e-13
  least = solvers['GNS-Newton'](*problem, -jnp.inf).value
  for name, row in race(*problem, least).items():
    table[name].append(row)

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.4))
for name, rows in table.items():
  for panel, values in zip(panels, zip(*rows, strict=True), strict=True):
    panel.loglog(conditions, values, marker='.', label=name)
panels[0].set(xlabel='condition', ylabel='steps')
panels[1].set(xlabel='condition', ylabel='milliseconds')
for panel in panels:
  panel.grid(alpha=0.3)
panels[0].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# **The moral.** Global convergence costs Newton's method one number, which the
# method finds itself. Its steps hardly notice the condition, those of L-BFGS
# grow with its root: take L-BFGS where the problem is well conditioned, and a
# Hessian where the condition is in the thousands or nobody knows it.
# `python -m experiments.logistic_regression` measures it on real data, and
# `make bench` says it as a ratio.
