"""What every public function says to bad input: one table over all of optlab.

A row is a public name, what is wrong, a call, and what must come of it: an
error of a type with a message, or a safe state (the call returns true). Most
rows are made by `reals` and `counts`, which replace one argument of a good call
by bad values; the message must then name the argument and the value. Nearly all
fail before anything is compiled; steps are only traced (`traced`).
"""

import ast
from collections.abc import Callable
import functools
import inspect
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse

import optlab
from optlab.newton import _search as smoothness
from tests.public import PUBLIC

NAN, INF = np.nan, np.inf
SCHEDULE = optax.constant_schedule(0.1)
NOT_REAL = ('0.1', None, 1j, SCHEDULE)
NOT_OPTIONAL_REAL = ('0.1', [0.1], 1j)  # Where None has a meaning.
NOT_SCHEDULED = ('0.1', None, True)  # Where a schedule is welcome.
NOT_INTEGER = ('2', None, 2.0, np.array(2))

POSITIVE = (0.0, -1.0, NAN, INF)
NON_NEGATIVE = (-1.0, NAN, INF)
DECAY = (1.0, -0.1, NAN, INF)  # [0, 1)
OPEN_RATE = (0.0, 1.0, -0.1, NAN, INF)  # (0, 1)
UNIT_RATE = (0.0, 1.1, NAN, INF)  # (0, 1]
CLOSED_RATE = (-0.1, 1.1, NAN, INF)  # [0, 1]


class Row(NamedTuple):
  """A bad input and what must come of it.

  Attributes:
    name: Public name.
    wrong: What is wrong.
    call: Makes the error; where none is promised, says whether all is well.
    error: Type of the error, or `None`.
    match: Regular expression for the message.
  """

  name: str
  wrong: str
  call: Callable[[], Any]
  error: type[Exception] | None = None
  match: str = ''


TABLE: list[Row] = []


def row(name, wrong, call, error=None, match=''):
  TABLE.append(Row(name, wrong, call, error, match))


def under_jit(call, argument, value):
  """Calls with a tracer."""
  jax.eval_shape(lambda value: (call(**{argument: value}), 0)[1], value)


def accepts(name, call, argument):
  """A row: under jit, vmap and inject_hyperparams the argument is a tracer."""

  row(
    name,
    f'{argument} is a tracer, which passes',
    lambda: under_jit(call, argument, 0.5) is None,
  )


def reals(call, not_real=NOT_REAL, traced=True, **bad):
  """Rows for real parameters: values out of range, and what is no number."""
  name = call.__name__
  for argument, values in bad.items():
    for value in (*values, *not_real):
      try:
        outside = np.issubdtype(np.asarray(value).dtype, np.floating)
      except (TypeError, ValueError):
        outside = False
      outside &= not isinstance(value, list)
      row(
        name,
        f'{argument}={value!r}',
        functools.partial(call, **{argument: value}),
        ValueError if outside else TypeError,
        rf'\b{argument}(\[\d\])? must be {"in" if outside else "a real number"}'
        rf'.*got {re.escape(repr(value))}',
      )
    if traced:
      accepts(name, call, argument)


def counts(call, minimum=1, not_integer=NOT_INTEGER, **bad):
  """Rows for integers that give shapes: too small, no integer, a tracer."""
  name = call.__name__
  for argument, values in bad.items():
    for value in values or (minimum - 1, -1):
      row(
        name,
        f'{argument}={value!r}',
        functools.partial(call, **{argument: value}),
        ValueError,
        rf'{argument} must be at least \d+, got {value}\.',
      )
    for value in not_integer:
      row(
        name,
        f'{argument}={value!r}',
        functools.partial(call, **{argument: value}),
        TypeError,
        rf'{argument} must be an integer, got {re.escape(repr(value))}',
      )
    row(
      name,
      f'{argument} is a tracer',
      functools.partial(under_jit, call, argument, 2),
      TypeError,
      rf'{argument} must be an integer.*pass a Python integer',
    )


def functions(call, optional=(), **expected):
  """Rows for arguments that must be functions; the signature is named."""
  for argument, signature in expected.items():
    for value in (1.0, 'f') if argument in optional else (1.0, 'f', None):
      row(
        call.__name__,
        f'{argument}={value!r}',
        functools.partial(call, **{argument: value}),
        TypeError,
        rf'{argument} must be a function .*{re.escape(signature)}.*'
        rf'got {re.escape(repr(value))}',
      )


GOOD: list[Callable[[], Any]] = []


def family(name, **good):
  """A public function with good arguments, some of which may be replaced."""

  def call(**replaced):
    return PUBLIC[name](**(good | replaced))

  call.__name__ = name
  GOOD.append(call)
  return call


def traced(function, *args):
  """Runs what is only traced; nothing is compiled."""
  return jax.eval_shape(function, *args)


def estimate(estimator, batch, params=None, inner=(), **state):
  """Traces an estimator's init and one estimate."""
  params = X if params is None else params

  def run():
    start = estimator.init(params, *inner)
    start = start._replace(**state) if state else start
    return estimator.estimate(params, start, batch)

  return traced(run)


def update(tx, updates=None, params=None, **extras):
  """Traces an optimizer's init and one update."""
  params = X if params is None else params
  updates = X if updates is None else updates
  tx = optax.with_extra_args_support(tx)
  return traced(lambda: tx.update(updates, tx.init(params), params, **extras))


def zero(tree):
  return all(bool(np.all(np.asarray(x) == 0)) for x in jax.tree.leaves(tree))


def same(a, b):
  return all(
    bool(np.array_equal(x, y))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


X = np.ones(2, np.float32)
KEY = jax.random.key(0)
ROWS = np.ones((4, 2), np.float32)


def loss(x, batch):
  return jnp.sum((batch @ x - 1.0) ** 2)


def losses(x, batch):
  return (batch @ x - 1.0) ** 2


# Transformations.

adagrad_norm = family('adagrad_norm', learning_rate=0.1)
scale_by_adagrad_norm = family('scale_by_adagrad_norm')
diffgrad = family('diffgrad', learning_rate=0.1)
scale_by_diffgrad = family('scale_by_diffgrad')
normalized_momentum = family('normalized_momentum', learning_rate=0.1)
scale_by_normalized_momentum = family('scale_by_normalized_momentum')
sizes = {
  'test': optlab.norm_test(0.5),
  'batch_size': 2,
  'max_batch_size': 8,
}
adadagrad = family('adadagrad', learning_rate=0.1, **sizes)
adadagrad_norm = family('adadagrad_norm', learning_rate=0.1, **sizes)
grow_batch = family('grow_batch', **sizes)

for tx in (
  adagrad_norm,
  diffgrad,
  normalized_momentum,
  adadagrad,
  adadagrad_norm,
):
  reals(tx, NOT_SCHEDULED, learning_rate=NON_NEGATIVE)
  row(
    tx.__name__,
    'a negative rate to ascend with',
    functools.partial(tx, learning_rate=-0.1),
    ValueError,
    r'learning_rate .*got -0\.1.*negate the objective',
  )
for tx in (scale_by_adagrad_norm, adagrad_norm, adadagrad, adadagrad_norm):
  reals(tx, initial_accumulator_value=NON_NEGATIVE, eps=NON_NEGATIVE)
for tx in (scale_by_diffgrad, diffgrad):
  reals(tx, b1=DECAY, b2=DECAY, eps=NON_NEGATIVE, eps_root=NON_NEGATIVE)
reals(diffgrad, NOT_OPTIONAL_REAL, weight_decay=NON_NEGATIVE)
for tx in (scale_by_normalized_momentum, normalized_momentum):
  reals(tx, beta=DECAY)
row(
  'scale_by_diffgrad',
  'a schedule where a number belongs',
  lambda: optlab.first_order.scale_by_diffgrad(b1=SCHEDULE),
  TypeError,
  'b1 must be a real number, got .*inject_hyperparams',
)

for tx in (grow_batch, adadagrad, adadagrad_norm):
  functions(tx, test='such as optlab.norm_test(0.5)')
  name = tx.__name__
  for argument in ('batch_size', 'max_batch_size'):
    for value, error, match in (
      (1, ValueError, 'must be at least 2, got 1. The variance of one'),
      (jnp.int32(0), ValueError, 'must be at least 2, got 0'),
      (2.0, TypeError, r'must be an integer, got 2\.0'),
      (jnp.array([2, 4]), TypeError, 'must be an integer, got Array'),
      (None, TypeError, 'must be an integer, got None'),
    ):
      row(
        name,
        f'{argument}={value!r}',
        functools.partial(tx, **{argument: value}),
        error,
        f'^{argument} {match}',
      )
  row(
    name,
    'batch_size above max_batch_size',
    functools.partial(tx, batch_size=16),
    ValueError,
    'batch_size must be at most max_batch_size=8, got 16',
  )
accepts('grow_batch', grow_batch, 'batch_size')
accepts('grow_batch', grow_batch, 'test_interval')
counts(grow_batch, not_integer=('2', None, 2.0), multiple_of=())
reals(grow_batch, NOT_OPTIONAL_REAL, growth_cap=(1.0, 0.0, NAN))
for wrong, arguments, error, match in (
  ('no multiple', {'batch_size': 3, 'multiple_of': 2}, ValueError, '4 or 2'),
  ('no int32', {'max_batch_size': 2**31}, ValueError, 'must be an int32'),
  (
    'half an interval',
    {'test_interval': 1.5},
    TypeError,
    'an integer, got 1.5',
  ),
  ('no interval', {'test_interval': 0}, ValueError, 'at least 1, got 0'),
  ('an unknown option', {'cap': 2.0}, TypeError, "argument 'cap'"),
):
  row(
    'grow_batch',
    wrong,
    functools.partial(grow_batch, **arguments),
    error,
    match,
  )

for make in (
  adagrad_norm,
  scale_by_adagrad_norm,
  diffgrad,
  scale_by_diffgrad,
  normalized_momentum,
  scale_by_normalized_momentum,
):
  row(
    make.__name__,
    'an empty tree: an empty update',
    lambda make=make: update(make(), {'a': {}}, {'a': {}})[0] == {'a': {}},
  )
for make in (
  scale_by_normalized_momentum,
  scale_by_adagrad_norm,
):
  row(
    make.__name__,
    'a zero gradient: a zero update',
    lambda make=make: zero(make().update(X * 0, make().init(X), X)[0]),
  )
for bad in (NAN, INF):
  for make in (scale_by_normalized_momentum,):
    row(
      make.__name__,
      f'a gradient with {bad}: a zero update, the state held',
      lambda make=make, bad=bad: zero(
        make().update(X * bad, make().init(X), X)
      ),
    )

# Tests of the batch size. What they need comes from `per_example`.

MOMENTS = {
  'sum_sq_diff_norm': 1.0,
  'sum_sq_diff_inner': 1.0,
  'sum_sq_diff_grads': X,
  'sample_size': 4,
}
for name, arguments, needs in (
  ('norm_test', {'eta': 0.5}, 'sum_sq_diff_norm'),
  ('coordinate_norm_test', {'eta': 0.5}, 'sum_sq_diff_grads'),
  ('inner_product_test', {'theta': 0.5}, 'sum_sq_diff_inner'),
  (
    'augmented_inner_product_test',
    {'theta': 0.5, 'nu': 1},
    'sum_sq_diff_inner',
  ),
):
  make = family(name, **arguments)
  reals(make, **dict.fromkeys(arguments, POSITIVE))
  for missing in (needs, 'sample_size'):
    extras = {k: v for k, v in MOMENTS.items() if k != missing}
    if missing == 'sum_sq_diff_norm':
      del extras['sum_sq_diff_grads']
    row(
      name,
      f'no {missing}',
      lambda make=make, extras=extras: make()(X, **extras),
      ValueError,
      rf'{name} needs the extra argument {missing}: pass {missing}=\.\.\. to'
      r' update, or take them from per_example\(',
    )
row(
  'coordinate_norm_test',
  'sum_sq_diff_grads of another tree',
  lambda: optlab.batches.coordinate_norm_test(0.5)(
    {'a': X}, sum_sq_diff_grads={'b': X}, sample_size=4
  ),
  ValueError,
  'sum_sq_diff_grads must have the tree structure of grads',
)
row(
  'adadagrad',
  'an estimator without moments',
  lambda: traced(
    lambda: optlab.train_step(optlab.value_and_grad(loss), adadagrad())(
      optlab.init(X, optlab.value_and_grad(loss), adadagrad()), ROWS
    )
  ),
  ValueError,
  'norm_test needs the extra arguments sum_sq_diff_norm, sample_size',
)

# Estimators, training.

NOT_ESTIMATOR = (
  r'estimator must be a GradientEstimator .*init and estimate; got'
)
NOT_TX = 'must be an optax transformation .*with init and update; got'
value_and_grad = family('value_and_grad', fun=loss)
stateless = family('stateless', estimate=lambda params, batch: None)
with_curvature = family(
  'with_curvature',
  estimator=optlab.value_and_grad(loss),
  curvature=optlab.hessian(loss),
)
with_storm = family(
  'with_storm', estimator=optlab.value_and_grad(loss), beta=0.1
)
init = family(
  'init',
  params=X,
  estimator=optlab.value_and_grad(loss),
  tx=optax.sgd(0.1),
)
train_step = family(
  'train_step', estimator=optlab.value_and_grad(loss), tx=optax.sgd(0.1)
)
minimize = family(
  'minimize',
  fun=lambda x: jnp.sum(x**2),
  params=X,
  tx=optax.sgd(0.1),
  max_steps=1,
)
functions(value_and_grad, fun='(params, batch) -> scalar')
functions(stateless, estimate='(params, batch) -> Estimate')
functions(with_curvature, curvature='(params, batch) -> operator')
reals(with_storm, beta=UNIT_RATE)
for make in (with_curvature, with_storm, init, train_step):
  for bad in (None, optax.sgd(0.1), loss):
    row(
      make.__name__,
      f'estimator={type(bad).__name__}',
      functools.partial(make, estimator=bad),
      TypeError,
      f'{NOT_ESTIMATOR} {type(bad).__name__}',
    )
for make in (init, train_step, minimize):
  for bad in (None, 0.1, optlab.value_and_grad(loss), optax.sgd):
    row(
      make.__name__,
      f'tx={type(bad).__name__}',
      functools.partial(make, tx=bad),
      TypeError,
      f'tx {NOT_TX} {type(bad).__name__}',
    )
functions(
  minimize,
  ('curvature', 'trace'),
  fun='params -> scalar',
  curvature='params -> operator',
  trace='MinimizeResult -> row',
)
counts(minimize, 0, max_steps=(-1,))
counts(minimize, not_integer=(2.0, '2', INF), stall_steps=(0, -1))
reals(minimize, grad_tol=NON_NEGATIVE, stall_tol=NON_NEGATIVE)
reals(minimize, target_value=(NAN,))
for wrong, params, error, match in (
  ('integer params', np.ones(2, int), TypeError, 'real- or complex-valued'),
  ('params=None', None, Exception, ''),
  ('params are words', 'abc', Exception, ''),
):
  row(
    'minimize',
    wrong,
    lambda params=params: traced(lambda: minimize(params=params)),
    error,
    match,
  )
row(
  'minimize',
  'a vector where a scalar belongs',
  lambda: traced(lambda: minimize(fun=lambda x: x)),
  TypeError,
  'scalar-output functions',
)
row(
  'minimize',
  'NaN at the start: stops there and says so',
  lambda: (
    (result := minimize(params=X * NAN)).status == 4 and result.steps == 0
  ),
)
row(
  'value_and_grad',
  'integer params',
  lambda: estimate(value_and_grad(), ROWS, np.ones(2, int)),
  TypeError,
  'real- or complex-valued inputs.*int',
)
row(
  'value_and_grad',
  'losses where their mean belongs',
  lambda: estimate(value_and_grad(fun=losses), ROWS),
  TypeError,
  'scalar-output functions',
)

# Per-example moments, growing batches.

ONES = np.ones(4, np.float32)
per_example = family('per_example', losses=losses)
functions(
  per_example,
  ('inner_products',),
  losses='(params, examples) -> (n,) losses',
  moments='such as optlab.ghost_norms',
  inner_products='such as optlab.batches.jvp_inner_products',
)
counts(per_example, not_integer=(2.0, '2', NAN), microbatch_size=(0, -1))
ROUTES = ('plain_grads', 'microbatch_means', 'vmap_grads', 'ghost_norms')
PRODUCTS = ('jvp_inner_products', 'vmap_inner_products')
for name in ROUTES + PRODUCTS:
  given = {'losses': losses, 'params': X, 'examples': ROWS, 'mask': ONES}
  if name in PRODUCTS:
    given['grads'] = X
  route = family(name, **given)
  for mask in (np.ones(4, bool), np.ones(4, int), None, [1.0] * 4):
    row(
      name,
      f'mask={mask!r}',
      functools.partial(route, mask=mask),
      TypeError,
      r'mask must be a floating array .*got .*jnp\.ones\(n\)',
    )
  row(
    name,
    'a mean in the loss',
    lambda route=route: traced(lambda: route(losses=loss)),
    (ValueError, IndexError, TypeError),
    r'one loss per example, shape \(4,\), got shape \(\): leave out the mean',
  )
  row(
    name,
    'integer params',
    lambda route=route: traced(lambda: route(params=np.ones(2, int))),
    TypeError,
    '(real- or complex-valued|must be floating|float or complex|tangent)',
  )
row(
  'ghost_norms',
  'a penalty on the weights in the loss',
  lambda: traced(
    lambda: optlab.ghost_norms(
      lambda x, b: losses(x, b) + jnp.sum(x**2), X, ROWS, ONES
    )
  ),
  ValueError,
  'ghost_norms can not be used: params.*use vmap_grads',
)
row(
  'microbatch_means',
  'no microbatch_size',
  lambda: per_example(moments=optlab.batches.microbatch_means),
  ValueError,
  'microbatch_means needs a microbatch_size, at most half',
)
row(
  'microbatch_means',
  'one microbatch',
  lambda: estimate(
    per_example(moments=optlab.batches.microbatch_means, microbatch_size=4),
    ROWS,
  ),
  ValueError,
  'at least two microbatches: .*at least 8 .*got 4. Lower microbatch_size',
)
LENGTHS = 'examples on its leading axis, got lengths'
for wrong, batch in (
  ('an empty batch', {}),
  ('batch=None', None),
  ('a scalar among the batch', (ROWS, 1.0)),
  ('lengths that differ', (ROWS, ROWS[:2])),
):
  row(
    'per_example',
    wrong,
    lambda batch=batch: estimate(per_example(), batch),
    ValueError,
    LENGTHS,
  )
row(
  'PaddedBatch',
  'no examples',
  lambda: estimate(per_example(), optlab.batches.PaddedBatch((), 2)),
  ValueError,
  LENGTHS,
)
row(
  'PaddedBatch',
  'size above the examples: all of them count, none twice',
  lambda: (
    per_example(microbatch_size=2)
    .estimate(X, (), optlab.batches.PaddedBatch(ROWS, np.int32(9)))[0]
    .extras['sample_size']
    == 4
  ),
)
row(
  'ResidentBatch',
  'no microbatch_size',
  lambda: estimate(
    per_example(), optlab.batches.ResidentBatch(ROWS, np.arange(4), 0, 2)
  ),
  ValueError,
  'per_example needs a microbatch_size to read a ResidentBatch',
)

growing_init = family(
  'growing_init',
  params=X,
  estimator=optlab.per_example(losses, microbatch_size=1),
  tx=optax.sgd(0.1),
  data=ROWS,
  key=KEY,
)
growing_step = family(
  'growing_step',
  estimator=optlab.per_example(losses, microbatch_size=1),
  tx=optax.sgd(0.1),
  batch_size=2,
)
growing_specs = family('growing_specs', axis_name='data')
counts(growing_init, not_integer=(2.0, '2', None), num_shards=())
for make in (growing_init, growing_step):
  for argument, match in (('estimator', NOT_ESTIMATOR), ('tx', f'tx {NOT_TX}')):
    row(
      make.__name__,
      f'{argument}=None',
      functools.partial(make, **{argument: None}),
      TypeError,
      match,
    )
for wrong, arguments, error, match in (
  ('no data', {'data': {}}, ValueError, LENGTHS),
  ('scalar data', {'data': 1.0}, ValueError, LENGTHS),
  ('uneven shards', {'num_shards': 3}, ValueError, 'got 4 .*leave out 1'),
  (
    'a batch larger than the data',
    {'tx': adadagrad()},
    ValueError,
    'max_batch_size must be at most the 4 examples of data, got 8',
  ),
  (
    'a first batch too small for the estimator',
    {
      'tx': adadagrad(max_batch_size=4),
      'estimator': optlab.per_example(
        losses, optlab.batches.microbatch_means, microbatch_size=2
      ),
    },
    ValueError,
    'at least two microbatches',
  ),
  ('key=None', {'key': None}, TypeError, 'key'),
):
  row(
    'growing_init',
    wrong,
    functools.partial(growing_init, **arguments),
    error,
    match,
  )
row(
  'growing_step',
  'no batch size anywhere',
  lambda: traced(lambda: growing_step(batch_size=None)(growing_init(), ROWS)),
  ValueError,
  'growing_step needs a batch size: put grow_batch into tx, or pass',
)
for bad, error in ((0, ValueError), (-2, ValueError), (2.5, TypeError)):
  row(
    'growing_step',
    f'batch_size={bad}',
    functools.partial(growing_step, batch_size=bad),
    error,
    rf'batch_size must be .*got {bad}',
  )
for bad in (None, 0, ('data',)):
  row(
    'growing_specs',
    f'axis_name={bad!r}',
    functools.partial(growing_specs, axis_name=bad),
    TypeError,
    r'axis_name must be the name of a mesh axis, got ',
  )

bucket_sizes = family('bucket_sizes', batch_size=2, max_batch_size=8)
host_loader = family(
  'host_loader', gather=lambda rows: rows, num_examples=4, buckets=(2, 4)
)
counts(bucket_sizes, batch_size=(), multiple_of=(), max_batch_size=(1, -1))
functions(host_loader, gather='indices -> examples')
counts(host_loader, num_examples=())
for bad, error, match in (
  ((), ValueError, r'buckets must be increasing, got \(\)'),
  ((4, 2), ValueError, r'buckets must be increasing, got \(4, 2\)'),
  ((0, 2), ValueError, 'buckets must be at least 1, got 0'),
  ((1.5, 2), TypeError, 'buckets must be an integer, got 1.5'),
  (4, TypeError, 'buckets must be a sequence such as bucket_sizes .*got 4'),
  (None, TypeError, 'buckets must be a sequence such as bucket_sizes .*None'),
):
  row(
    'host_loader',
    f'buckets={bad!r}',
    functools.partial(host_loader, buckets=bad),
    error,
    match,
  )
for bad, error, match in (
  (0, ValueError, 'batch_size must be at least 1, got 0'),
  (5, ValueError, 'batch_size must be at most the last bucket 4, got 5'),
  (1.5, TypeError, r'batch_size must be an integer, got 1\.5'),
  (None, TypeError, 'batch_size must be an integer, got None'),
):
  row(
    'HostLoader',
    f'take of {bad!r}',
    lambda bad=bad: host_loader().take(host_loader().init(0), bad),
    error,
    match,
  )
for bad, error in ((-1, ValueError), (None, TypeError), (0.5, TypeError)):
  row(
    'HostLoader',
    f'seed={bad!r}',
    lambda bad=bad: host_loader().init(bad),
    error,
    f'seed must be .*got {bad}',
  )

# Newton: curvature, solvers, the method.

hessian = family('hessian', fun=loss)
gauss_newton = family('gauss_newton', model=loss, loss=jnp.sum)
empirical_fisher = family('empirical_fisher', loss=loss)
fisher = family('fisher', log_probs=jax.nn.log_softmax)
linear_gauss_newton = family(
  'linear_gauss_newton', inputs=lambda a: a, loss=lambda u, a: jnp.sum(u**2)
)
dense = family('dense', factory=optlab.hessian(loss))
functions(hessian, fun='(params, *args) -> scalar')
functions(
  gauss_newton,
  model='(params, *args) -> outputs',
  loss='(outputs, *args) -> scalar',
)
functions(
  empirical_fisher,
  ('weights',),
  loss='(params, *example) -> scalar',
  weights='(losses) -> weights',
)
functions(fisher, log_probs='(params, *example) -> array')
functions(
  linear_gauss_newton,
  inputs='(*args) -> matrix',
  loss='(outputs, *args) -> scalar',
)
functions(dense, factory='(params, *args) -> operator')
reals(linear_gauss_newton, l2=NON_NEGATIVE)
for name, make in (
  ('hessian', optlab.hessian),
  ('gauss_newton', lambda fun: optlab.gauss_newton(losses, fun)),
  ('dense', lambda fun: optlab.dense(optlab.hessian(fun))),
):
  row(
    name,
    'a vector where a scalar belongs',
    lambda make=make: traced(lambda: make(lambda u, b: u)(X, ROWS)(X)),
    TypeError,
    'scalar-output functions',
  )
  row(
    name,
    'integer params',
    lambda make=make: traced(
      lambda: make(lambda u, b: jnp.sum(u))(np.ones(2, int), ROWS)(X)
    ),
    TypeError,
    '(real- or complex-valued|params must be floating, got dtype int)',
  )
row(
  'fisher',
  'one number where one a class belongs',
  lambda: traced(lambda: fisher(log_probs=jnp.sum)(X)(X)),
  ValueError,
  r'log_probs must return one number a class .*got shape \(\)',
)
row(
  'empirical_fisher',
  'examples of two lengths',
  lambda: traced(
    lambda: empirical_fisher(loss=lambda x, a, b: a @ x)(X, ROWS, ROWS[:2])(X)
  ),
  ValueError,
  'inconsistent sizes',
)
for wrong, params in (('a tree', {'a': X}), ('a cube', np.ones((2, 2, 2)))):
  row(
    'linear_gauss_newton',
    f'params are {wrong}',
    lambda params=params: linear_gauss_newton()(params, ROWS),
    ValueError,
    r'params that are one array of shape \(d,\) or \(d, classes\), got',
  )

SOLVERS = ('cholesky', 'eigh', 'woodbury', 'cg', 'lanczos')
for name in ('cg', 'lanczos'):
  make = family(name)
  counts(make, max_steps=())
  reals(make, rtol=NON_NEGATIVE, power=NON_NEGATIVE)
for name in SOLVERS:
  solver = family(name)()
  for wrong, operator, error, match in (
    ('a bare matrix', np.eye(2), TypeError, 'wrap a matrix in optlab.Dense'),
    ('operator=None', None, TypeError, 'operator must be a function v -> A v'),
    (
      'a Dense operator of another size',
      optlab.Dense(np.eye(3)),
      ValueError,
      r'operator must have a matrix of shape \(2, 2\), got \(3, 3\)',
    ),
    (
      'a LowRank operator of another size',
      optlab.newton.LowRank(np.ones((1, 3))),
      ValueError,
      r'operator must have a factor of shape \(r, 2\), got \(1, 3\)',
    ),
  ):
    if name == 'woodbury' and wrong != 'a LowRank operator of another size':
      error, match = TypeError, 'woodbury needs an operator with a factor'
    row(
      {'Dense': 'Dense', 'LowRank': 'LowRank'}.get(
        type(operator).__name__, name
      ),
      f'{name}: {wrong}',
      lambda solver=solver, operator=operator: traced(
        lambda: solver(operator, X, 1.0)(1.0)
      ),
      error,
      match,
    )
INDEFINITE = np.diag([1.0, -2.0]).astype(np.float32)
for name in ('cholesky', 'eigh', 'cg', 'lanczos'):
  row(
    name,
    'an indefinite matrix: not ok',
    lambda name=name: (
      not PUBLIC[name]()(optlab.Dense(INDEFINITE), X, 0.5)(0.5)[1]
    ),
  )
for name in ('cholesky', 'eigh', 'woodbury', 'cg', 'lanczos'):
  row(
    name,
    'a shift that is NaN: not ok',
    lambda name=name: (
      not PUBLIC[name]()(
        optlab.newton.LowRank(np.ones((1, 2), np.float32)), X, jnp.float32(NAN)
      )(jnp.float32(NAN))[1]
    ),
  )

gns_newton = family('gns_newton')
gns_newton_paper = family('gns_newton_paper')
VALUES = {'value': 2.0, 'grad': X, 'value_fn': lambda x: jnp.sum(x**2)}
for make in (gns_newton, gns_newton_paper):
  name = make.__name__
  functions(make, ('solver',), solver='(operator, b, shift) -> solve')
  reals(make, NOT_OPTIONAL_REAL, gamma_init=POSITIVE)
  for wrong, metric, error, match in (
    ('a zero', np.array([1.0, 0.0]), ValueError, r'metric must be in \(0.0'),
    ('NaN', {'a': NAN}, ValueError, r"metric\['a'\] must be in \(0.0, inf"),
    (
      'negative',
      optlab.Dense(-np.eye(2)),
      ValueError,
      r'metric must be in \(0.0, inf\), got ',
    ),
    ('a word', 'B', TypeError, "metric must be a real number, got 'B'"),
  ):
    row(
      name,
      f'a metric with {wrong}',
      functools.partial(make, metric=metric),
      error,
      match,
    )
  for missing in VALUES:
    row(
      name,
      f'no {missing}',
      lambda make=make, missing=missing: update(
        make(), **{k: v for k, v in VALUES.items() if k != missing}
      ),
      ValueError,
      rf'gns_newton needs the extra argument {missing}: pass {missing}=\.\.\.'
      ' to update, or take them from the estimator value_and_grad',
    )
  for wrong, change, error, match in (
    (
      'no function',
      {'value_fn': 1.0},
      TypeError,
      'value_fn must be a function',
    ),
    (
      'a matrix',
      {'curvature': np.eye(2)},
      TypeError,
      'curvature .*optlab.Dense',
    ),
    (
      'a curvature of another size',
      {'curvature': optlab.Dense(np.eye(3))},
      ValueError,
      r'curvature must have a matrix of shape \(2, 2\), got \(3, 3\)',
    ),
    ('another tree', {'grad': {'a': X}}, ValueError, 'grad must have the tree'),
    ('another shape', {'grad': ROWS}, ValueError, r'grad has shape \(4, 2\)'),
  ):
    row(
      name,
      f'{wrong} for {next(iter(change))}',
      lambda make=make, change=change: update(make(), **(VALUES | change)),
      error,
      match,
    )
  row(
    name,
    'params=None in update',
    lambda make=make: make().update(X, make().init(X), None, **VALUES),
    ValueError,
    'needs the extra argument params',
  )
  row(
    name,
    'a metric of another tree',
    lambda make=make: update(make(metric={'a': X}), **VALUES),
    ValueError,
    'metric must have the tree structure of params',
  )
reals(gns_newton, max_trials=(0.0, -1.0, NAN), gamma_offset=NON_NEGATIVE)
for bad in (smoothness.hold, 'hold', 2.0):
  row(
    'gns_newton',
    f'rule={bad!r}',
    functools.partial(gns_newton, rule=bad),
    TypeError,
    r'rule must be a SearchRule such as optlab.newton.hold\(\) makes, got',
  )
row(
  'gns_newton',
  'an empty tree: an empty update',
  lambda: (
    update(
      gns_newton(), {}, {}, value=0.0, grad={}, value_fn=lambda p: jnp.zeros(())
    )[0]
    == {}
  ),
)
row(
  'gns_newton',
  'a gradient with NaN: a zero update, no trial',
  lambda: (
    (
      result := gns_newton().update(
        X, gns_newton().init(X), X, **(VALUES | {'value': NAN})
      )
    )
    and zero(result[0])
    and result[1].trials == 0
  ),
)

matrix = scipy.sparse.csr_matrix(np.eye(3, 2))
sparse_matrix = family('sparse_matrix', matrix=matrix)
for bad in (np.eye(2), None, [[1.0]]):
  row(
    'sparse_matrix',
    f'matrix={type(bad).__name__}',
    functools.partial(sparse_matrix, matrix=bad),
    TypeError,
    f'matrix must be a scipy sparse matrix, got {type(bad).__name__}; use a',
  )
for vector, error, match in (
  (np.ones(3), ValueError, r'vector must have shape \(2,\) .*got \(3,\)'),
  (1.0, ValueError, r'vector must have shape \(2,\) .*got \(\)'),
  (np.ones(2, int), TypeError, 'vector must be floating.*got dtype int'),
):
  row(
    'SparseMatrix',
    f'times {vector!r}',
    lambda vector=vector: sparse_matrix() @ vector,
    error,
    match,
  )
row(
  'SparseMatrix',
  'gram without gram=True',
  lambda: sparse_matrix().gram(np.ones(3)),
  ValueError,
  r'make it with sparse_matrix\(\.\.\., gram=True\)',
)
row(
  'SparseMatrix',
  'weights of another length',
  lambda: sparse_matrix(gram=True).gram(jnp.ones(2)),
  ValueError,
  r'weights must have shape \(3,\), one a row, got \(2,\)',
)

# Two-level problems.


def upper(x, y, batch):
  return jnp.sum(x**2) + jnp.sum((y - batch) ** 2)


def lower(x, y, batch):
  return jnp.sum((y - x - batch) ** 2)


SAMPLE = optlab.BilevelBatch(X, X, np.ones((5, 2), np.float32))
LEVELS = {'upper': upper, 'lower': lower, 'lower_optimizer': optax.sgd(0.1)}
bo_rep = family('bo_rep', **LEVELS, linear_lr=0.1)
soba = family('soba', **LEVELS, linear_lr=0.1)
implicit = family('implicit', **LEVELS)
stocbio = family('stocbio', **LEVELS, neumann_lr=0.1)
ttsa = family('ttsa', **LEVELS, neumann_lr=0.1)
unrolled = family('unrolled', **LEVELS)
saba = family('saba', **LEVELS, linear_lr=0.1, upper_blocks=3, lower_blocks=3)
BILEVEL = (bo_rep, soba, implicit, stocbio, ttsa, unrolled, saba)
for make in BILEVEL:
  name = make.__name__
  functions(make, upper='(x, y, batch)', lower='(x, y, batch) -> scalar')
  for bad in (None, 0.1, optax.sgd):
    row(
      name,
      f'lower_optimizer={type(bad).__name__}',
      functools.partial(make, lower_optimizer=bad),
      TypeError,
      f'lower_optimizer {NOT_TX} {type(bad).__name__}',
    )
  inner = (X, KEY) if make is ttsa else (X,)
  for bad in (None, (X, X), {'upper': X, 'lower': X}):
    row(
      'BilevelBatch',
      f'{name} on a {type(bad).__name__}',
      lambda make=make, bad=bad, inner=inner: estimate(
        make(), bad, inner=inner
      ),
      TypeError,
      'batch must be a BilevelBatch, with upper and lower and inner; got '
      + type(bad).__name__,
    )
  if make not in (soba, saba):
    steps = 1 if make is ttsa else 5
    for wrong, samples in (('scalar', 1.0), ('too few', np.ones((3, 2)))):
      row(
        name,
        f'{wrong} inner samples',
        lambda make=make, bad=samples, inner=inner: estimate(
          make(), SAMPLE._replace(inner=bad), inner=inner
        ),
        ValueError,
        rf'batch.inner must have a leading axis of lower_steps = {steps}, got'
        r' shape .*: stack one fresh sample for each lower step',
      )
  if make is not saba:
    row(
      name,
      'an upper level that is no scalar',
      lambda make=make, inner=inner: estimate(
        make(upper=lambda x, y, b: y),
        SAMPLE._replace(
          inner=SAMPLE.inner[:1] if make is ttsa else SAMPLE.inner
        ),
        inner=inner,
      ),
      TypeError,
      'scalar-output functions',
    )
for make, argument in (
  (bo_rep, 'linear_lr'),
  (soba, 'linear_lr'),
  (saba, 'linear_lr'),
  (stocbio, 'neumann_lr'),
  (ttsa, 'neumann_lr'),
):
  reals(make, NOT_SCHEDULED, **{argument: POSITIVE})
for make, arguments in (
  (bo_rep, ('period', 'lower_steps')),
  (implicit, ('lower_steps', 'max_iterations')),
  (stocbio, ('lower_steps', 'neumann_steps')),
  (ttsa, ('neumann_steps',)),
  (unrolled, ('lower_steps',)),
  (saba, ('upper_blocks', 'lower_blocks')),
):
  counts(make, **dict.fromkeys(arguments, ()))
reals(bo_rep, NOT_OPTIONAL_REAL, radius=POSITIVE, z_radius=POSITIVE)
reals(implicit, tol=NON_NEGATIVE)
functions(unrolled, ('start',), start='(x, y) -> y')
for index, error, match in (
  (3, ValueError, 'batch.lower.index must be below lower_blocks=3, got 3'),
  (-1, ValueError, 'batch.lower.index must be at least 0, got -1'),
  (1.0, TypeError, r'batch.lower.index must be an integer, got 1\.0'),
):
  row(
    'IndexedBatch',
    f'index={index}',
    lambda index=index: estimate(
      saba(),
      optlab.BilevelBatch(
        optlab.bilevel.IndexedBatch(0, X), optlab.bilevel.IndexedBatch(index, X)
      ),
      inner=(X,),
    ),
    error,
    match,
  )
row(
  'IndexedBatch',
  'data without their index',
  lambda: estimate(saba(), SAMPLE, inner=(X,)),
  TypeError,
  'batch.upper must be an IndexedBatch, with index and data; got ndarray',
)
row(
  'ttsa',
  'no key',
  lambda: estimate(ttsa(), SAMPLE, inner=(X,)),
  TypeError,
  "missing 1 required positional argument: 'key'",
)
row(
  'soba',
  'data with NaN: a zero gradient, the state held and counted',
  lambda: (
    (start := soba().init(X, X))
    and (got := soba().estimate(X, start, optlab.BilevelBatch(X, X * NAN)))
    and zero(got[0].grads)
    and got[1].rejected == 1
    and same(got[1]._replace(rejected=0), start._replace(rejected=0))
  ),
)

refine = family(
  'refine',
  lower=lower,
  params=X,
  inner=X,
  batches=np.ones((3, 2), np.float32),
  learning_rate=0.1,
  first_steps=1,
  epochs=2,
)
functions(refine, lower='(x, y, batch) -> scalar')
reals(refine, learning_rate=POSITIVE)
reals(refine, NOT_OPTIONAL_REAL, radius=POSITIVE)
counts(refine, first_steps=(), epochs=())
for bad in (1.0, np.ones((2, 2))):
  row(
    'refine',
    f'batches of shape {np.shape(bad)}',
    functools.partial(refine, batches=bad),
    ValueError,
    r'must have a leading axis of first_steps \* \(2\*\*epochs - 1\) = 3, got',
  )

# Many blocks.

BLOCKS = np.arange(2, dtype=np.int32)
DATA = np.ones((2, 2), np.float32)
TABLE_OF_4 = np.ones((4, 2), np.float32)
bsvrb = family('bsvrb', upper=upper, lower=lower, num_blocks=4)
rsvrb = family('rsvrb', upper=upper, lower=lower, num_blocks=4)
track_products = family('track_products')
track_hessians = family('track_hessians')
BLOCK_BATCH = {
  'bsvrb': optlab.BlockBatch(BLOCKS, DATA, DATA),
  'rsvrb': optlab.multi_block.PairedBlockBatch(BLOCKS, DATA, DATA, BLOCKS),
}
for make in (bsvrb, rsvrb):
  name = make.__name__
  functions(
    make, upper='(params, inner, batch)', lower='(params, inner, batch)'
  )
  counts(make, num_blocks=())
  reals(make, NOT_SCHEDULED, step_size=NON_NEGATIVE)
  batch = BLOCK_BATCH[name]
  for field, bad, error, match in (
    ('blocks', [0, 1], TypeError, r'blocks must be an integer array, got \[0'),
    (
      'blocks',
      BLOCKS * 1.0,
      TypeError,
      'blocks must be an integer array.*int32',
    ),
    (
      'blocks',
      BLOCKS[:, None],
      ValueError,
      r'shape \(sampled,\), got .*\(2, 1',
    ),
    (
      'blocks',
      BLOCKS - 1,
      ValueError,
      r'negative, got \[-1  0\]; pad with num',
    ),
    ('blocks', np.arange(5), ValueError, '5 blocks, more than num_blocks=4'),
    (
      'upper',
      DATA[:1],
      ValueError,
      'batch.upper must have a leading axis of 2',
    ),
    ('lower', 1.0, ValueError, 'batch.lower must have a leading axis of 2'),
    ('lower', {'a': DATA[:1]}, ValueError, r"batch.lower\['a'\] must have"),
  ):
    row(
      type(batch).__name__,
      f'{name}: {field}={bad!r}',
      # The blocks stay numbers: tracers pass.
      lambda make=make, batch=batch, change={field: bad}: make().estimate(
        X, make().init(X, TABLE_OF_4), batch._replace(**change)
      ),
      error,
      match,
    )
  for bad in (None, (BLOCKS, DATA, DATA), optlab.BilevelBatch(DATA, DATA)):
    row(
      type(batch).__name__,
      f'{name} on a {type(bad).__name__}',
      lambda make=make, bad=bad: make().estimate(
        X, make().init(X, TABLE_OF_4), bad
      ),
      TypeError,
      f'batch must be a (Paired)?BlockBatch, .*got {type(bad).__name__}',
    )
  for bad in (DATA, 1.0, {'a': TABLE_OF_4, 'b': DATA}):
    row(
      name,
      f'inner without num_blocks rows: {jax.tree.map(np.shape, bad)}',
      lambda make=make, bad=bad: make().init(X, bad),
      ValueError,
      r"inner(\['b'\])? must have a leading axis of 4, one row for each of",
    )
  row(
    name,
    'a first batch of some blocks only',
    lambda make=make: make().init(
      X, TABLE_OF_4, optlab.BlockBatch(BLOCKS, DATA, DATA)
    ),
    ValueError,
    'first must have each of the num_blocks=4 blocks once, got 2 blocks',
  )
row(
  'PairedBlockBatch',
  'a BlockBatch has no outer blocks',
  lambda: rsvrb().estimate(
    X, rsvrb().init(X, TABLE_OF_4), BLOCK_BATCH['bsvrb']
  ),
  TypeError,
  'PairedBlockBatch, with .* and outer; got BlockBatch',
)
reals(bsvrb, NOT_SCHEDULED, alpha=OPEN_RATE, beta=UNIT_RATE)
reals(bsvrb, NOT_OPTIONAL_REAL, gamma=NON_NEGATIVE)
reals(rsvrb, NOT_SCHEDULED, beta=OPEN_RATE)
reals(rsvrb, floor=POSITIVE)
reals(track_products, step_ratio=POSITIVE)
reals(track_products, NOT_OPTIONAL_REAL, radius=POSITIVE)
reals(track_hessians, floor=POSITIVE, damping=NON_NEGATIVE)
for bad in ('products', optlab.multi_block.track_products, 1.0):
  row(
    'bsvrb',
    f'dual={bad!r}',
    functools.partial(bsvrb, dual=bad),
    TypeError,
    r'dual must be a Dual such as track_products\(\)',
  )
row(
  'dual_variables',
  'a state of track_hessians, which keeps none',
  lambda: optlab.multi_block.dual_variables(
    bsvrb(dual=optlab.multi_block.track_hessians()).init(X, TABLE_OF_4)
  ),
  TypeError,
  r'state.dual must be the state of track_products\(\), .*got HessianState',
)
for name in ('inner_variables', 'dual_variables'):
  row(
    name,
    'the state of another method',
    lambda name=name: PUBLIC[name](rsvrb().init(X, TABLE_OF_4)),
    TypeError,
    'state must be the state of bsvrb, .*got RSVRBState',
  )

sample_blocks = family('sample_blocks', key=KEY, num_blocks=4, sampled=2)
epoch_of_blocks = family('epoch_of_blocks', key=KEY, num_blocks=4, sampled=2)
for make in (sample_blocks, epoch_of_blocks):
  counts(make, num_blocks=(), sampled=())
  row(
    make.__name__,
    'more blocks than there are',
    functools.partial(make, sampled=5),
    ValueError,
    'sampled must be at most num_blocks=4, got 5; lower it, or .*replace=True',
  )
  row(
    make.__name__,
    'key=None',
    functools.partial(make, key=None),
    TypeError,
    'key',
  )

ema = family('ema', tracker=X, now=X, rate=0.1)
storm = family('storm', tracker=X, now=X, before=X, beta=0.1)
msvr = family('msvr', tracker=X, now=X, before=X, alpha=0.1)
msvr_gamma = family('msvr_gamma', num_blocks=4, sampled=2, alpha=0.1)
reals(ema, rate=CLOSED_RATE)
reals(storm, beta=CLOSED_RATE)
reals(msvr, alpha=OPEN_RATE)
reals(msvr, NOT_OPTIONAL_REAL, gamma=NON_NEGATIVE)
reals(msvr_gamma, alpha=OPEN_RATE)
counts(msvr_gamma, num_blocks=())
for bad, error in ((0, ValueError), (2.0, TypeError), (None, TypeError)):
  row(
    'msvr_gamma',
    f'sampled={bad}',
    functools.partial(msvr_gamma, sampled=bad),
    error,
    f'sampled must be .*got {bad}',
  )
for make in (ema, storm, msvr):
  name = make.__name__
  for wrong, arguments, error, match in (
    (
      'an integer tracker',
      {'tracker': np.ones(2, int)},
      TypeError,
      'tracker .*',
    ),
    (
      'now of another shape',
      {'now': 1.0},
      ValueError,
      r'now has shape \(\), but',
    ),
    (
      'now of another tree',
      {'now': {'a': X}},
      ValueError,
      'structure of tracker',
    ),
    ('now=None', {'now': None}, ValueError, 'now must have the tree structure'),
    (
      'a scalar for a table',
      {'tracker': np.float32(1), 'blocks': BLOCKS},
      ValueError,
      r'tracker must be a table, .*got shapes \[\(\)\]',
    ),
    (
      'an empty table',
      {'tracker': {}, 'blocks': BLOCKS},
      ValueError,
      r'tracker must be a table, .*got shapes \[\]',
    ),
    (
      'rows for other blocks',
      {'tracker': TABLE_OF_4, 'blocks': BLOCKS, 'now': TABLE_OF_4},
      ValueError,
      r'now has shape \(4, 2\), but tracker\[blocks\] has shape \(2, 2\)',
    ),
    (
      'blocks that are no integers',
      {'tracker': TABLE_OF_4, 'blocks': BLOCKS * 1.0, 'now': DATA},
      TypeError,
      'blocks must be an integer array',
    ),
    (
      'a negative block',
      {'tracker': TABLE_OF_4, 'blocks': BLOCKS - 1, 'now': DATA},
      ValueError,
      'negative, got .* pad with num_blocks=4, which is dropped',
    ),
    (
      'more blocks than rows',
      {'tracker': TABLE_OF_4, 'blocks': np.arange(5), 'now': DATA},
      ValueError,
      'names 5 blocks, more than num_blocks=4',
    ),
  ):
    row(name, wrong, functools.partial(make, **arguments), error, match)

# Models without a normalizer.


def log_density(params, rows):
  return -jnp.sum((rows - params) ** 2, -1)


LOG_Q = np.zeros(4, np.float32)
NOISY = optlab.NoiseBatch(ROWS, ROWS, LOG_Q, LOG_Q)
gaussian = family('gaussian', mean=X, covariance=np.eye(2))
NOISE = optlab.unnormalized.gaussian(X, np.eye(2))
meco = family('meco', log_density=log_density)
nce = family('nce', log_density=log_density)
ence = family('ence', log_density=log_density)
contrastive_divergence = family(
  'contrastive_divergence',
  log_density=log_density,
  step_size=0.1,
  num_steps=1,
)
langevin = family(
  'langevin',
  log_density=lambda rows: -jnp.sum(rows**2, -1),
  key=KEY,
  rows=ROWS,
  step_size=0.1,
  num_steps=1,
)
with_log_normalizer = family('with_log_normalizer', log_density=log_density)
for make in (meco, nce, ence, contrastive_divergence, with_log_normalizer):
  functions(make, log_density='(params, rows) -> [rows]')
reals(meco, NOT_SCHEDULED, gamma=UNIT_RATE)
reals(nce, NOT_OPTIONAL_REAL, nu=POSITIVE)
reals(ence, max_exponent=(0.0, -1.0, NAN))
reals(contrastive_divergence, step_size=POSITIVE, restart=CLOSED_RATE)
reals(langevin, step_size=POSITIVE)
counts(contrastive_divergence, num_steps=())
counts(langevin, num_steps=())
functions(langevin, log_density='rows -> [rows]')
for make in (meco, nce, ence, contrastive_divergence):
  name = make.__name__
  inner = (KEY, ROWS) if make is contrastive_divergence else ()
  for bad in (None, ROWS, (ROWS, ROWS, LOG_Q)):
    row(
      name,
      f'a batch that is a {type(bad).__name__}',
      lambda make=make, bad=bad, inner=inner: estimate(
        make(), bad, inner=inner
      ),
      TypeError,
      f'{name} takes a NoiseBatch, got {type(bad).__name__}: build one with',
    )
  for wrong, fields, error, match in (
    ('no data', {'data': None}, ValueError, 'one structure'),
    (
      'no rows of data',
      {'data': ROWS[:0]},
      ValueError,
      'data must have one lead',
    ),
    (
      'no rows of noise',
      {'noise': ROWS[:0]},
      ValueError,
      'noise must have one',
    ),
    (
      'scalar data',
      {'data': 1.0},
      ValueError,
      'data must have one leading axis',
    ),
    (
      'rows of another shape',
      {'data': ROWS[:, :1]},
      ValueError,
      'one shape, got',
    ),
    ('no log q', {'noise_log_prob': None}, ValueError, 'needs noise_log_prob'),
    (
      'log q of another length',
      {'noise_log_prob': LOG_Q[:3]},
      ValueError,
      r'noise_log_prob must have shape \(4,\), got \(3,\)',
    ),
    (
      'log q in a list',
      {'noise_log_prob': [0.0] * 4},
      TypeError,
      'noise_log_prob must be an array, got list; convert it with jnp.asarray',
    ),
  ):
    row(
      'NoiseBatch',
      f'{name}: {wrong}',
      lambda make=make, fields=fields, inner=inner: estimate(
        make(), NOISY._replace(**fields), inner=inner
      ),
      error,
      f'{name}.*{match}',
    )
  for wrong, bad in (('a scalar', jnp.sum), ('a column', lambda r: r[:, :1])):
    row(
      name,
      f'log_density returns {wrong}',
      lambda make=make, bad=bad, inner=inner: estimate(
        make(log_density=lambda p, rows: bad(rows * p)), NOISY, inner=inner
      ),
      ValueError,
      r'log_density must return one number a row, shape \(\d,\), got \(',
    )
for make in (nce, ence):
  row(
    make.__name__,
    'no data_log_prob',
    lambda make=make: estimate(make(), NOISY._replace(data_log_prob=None)),
    ValueError,
    r'needs data_log_prob: build .*noise_batch\(\.\.\., score_data=True\)',
  )
for make in (meco, nce, ence):
  row(
    make.__name__,
    'no good row: a zero gradient, held and counted',
    lambda make=make: (
      (
        got := make().estimate(
          X, make().init(X), NOISY._replace(data=ROWS * NAN, noise=ROWS * NAN)
        )
      )
      and zero(got[0].grads)
      and got[1].held == 1
      and got[1].rejected == 8
    ),
  )
for bad in ({'model': X}, X, None):
  row(
    'NceParams',
    f'params are a {type(bad).__name__}',
    lambda bad=bad: with_log_normalizer()(bad, ROWS),
    TypeError,
    r'params must be NceParams\(model, log_normalizer\), .*; got '
    + type(bad).__name__,
  )
for wrong, chains, arguments, match in (
  (
    'of other rows',
    ROWS[:, :1],
    {},
    r'shape of the rows of noise, \(2,\), got',
  ),
  (
    'fewer than the data',
    ROWS[:3],
    {'persistent': False},
    'as many as a batch',
  ),
):
  row(
    'contrastive_divergence',
    f'chains {wrong}',
    lambda chains=chains, arguments=arguments: estimate(
      contrastive_divergence(**arguments), NOISY, inner=(KEY, chains)
    ),
    ValueError,
    match,
  )
for rows in (ROWS.astype(int), [[1.0]], None):
  row(
    'langevin',
    f'rows={type(rows).__name__} of {getattr(rows, "dtype", "no dtype")}',
    functools.partial(langevin, rows=rows),
    TypeError,
    f'rows must be a floating array, got {type(rows).__name__} of dtype',
  )
row(
  'langevin',
  'log_density returns a scalar',
  functools.partial(langevin, log_density=jnp.sum),
  ValueError,
  r'one number a row, shape \(4,\), got \(\)',
)

noise_batch = family('noise_batch', noise=NOISE, key=KEY, data=ROWS, num=4)
log_partition = family(
  'log_partition',
  log_density=lambda rows: -jnp.sum(rows**2, -1),
  noise=NOISE,
  key=KEY,
  num=4,
  chunk=2,
)
mixture = family('mixture')
defensive = family('defensive', noise=NOISE, wide=NOISE)
counts(noise_batch, num=())
counts(log_partition, chunk=())
counts(log_partition, num=(1, 0))
functions(log_partition, log_density='rows -> [rows]')
reals(log_partition, min_ess=NON_NEGATIVE, max_share=POSITIVE)
NOT_NOISE = (
  'must be a distribution such as optlab.unnormalized.gaussian makes, with'
  ' sample'
)
for bad in (None, 1.0, optlab.unnormalized.gaussian):
  for make, argument in (
    (noise_batch, 'noise'),
    (log_partition, 'noise'),
    (defensive, 'noise'),
    (defensive, 'wide'),
  ):
    row(
      make.__name__,
      f'{argument}={type(bad).__name__}',
      functools.partial(make, **{argument: bad}),
      TypeError,
      f'{NOT_NOISE} and log_prob; got {type(bad).__name__}',
    )
  row(
    'mixture',
    f'a component is {type(bad).__name__}',
    lambda bad=bad: optlab.unnormalized.mixture([0.5, 0.5], NOISE, bad),
    TypeError,
    rf'components\[1\] {NOT_NOISE}',
  )
for weights, error, match in (
  ([1.0], ValueError, r'weights must have shape \(2,\), one a component, got'),
  (
    0.5,
    ValueError,
    r'weights must have shape \(2,\), one a component, got \(\)',
  ),
  ([0.5, 0.0], ValueError, r'weights must be in \(0.0, inf\), got'),
  ([0.5, NAN], ValueError, r'weights must be in \(0.0, inf\), got'),
  ('ab', TypeError, "weights must be an array of numbers, got 'ab'"),
  (None, TypeError, 'weights must be an array of numbers, got None'),
):
  row(
    'mixture',
    f'weights={weights!r}',
    lambda weights=weights: optlab.unnormalized.mixture(weights, NOISE, NOISE),
    error,
    match,
  )
row(
  'mixture',
  'no components',
  lambda: optlab.unnormalized.mixture(np.ones(0)),
  ValueError,
  r'weights must have shape \(0,\)|at least one component',
)
reals(defensive, weight=OPEN_RATE)
row(
  'log_partition',
  'a num that chunk does not divide',
  functools.partial(log_partition, num=5),
  ValueError,
  'num must be a multiple of chunk, 2, got 5',
)
row(
  'log_partition',
  'log_density returns a scalar',
  functools.partial(log_partition, log_density=jnp.sum),
  ValueError,
  r'log_density must return one number a row, shape \(2,\), got \(\)',
)
row(
  'log_partition',
  'a model that is NaN: not ok, and NaN',
  lambda: (
    (got := log_partition(log_density=lambda rows: rows[:, 0] * NAN))
    and not got.ok
    and np.isnan(got.value)
    and got.rejected == 4
  ),
)

GRID = optlab.unnormalized.grid_log_partition
grid_log_partition = family(
  'grid_log_partition',
  log_density=lambda rows: -jnp.sum(rows**2, -1),
  low=-1.0,
  high=1.0,
  num=2,
)
functions(grid_log_partition, log_density='[rows, d] -> [rows]')
counts(grid_log_partition, 2, num=())
reals(grid_log_partition, tolerance=POSITIVE)
for corners, error, match in (
  (
    (1.0, -1.0),
    ValueError,
    r'low must be below high, got \[1\.\] and \[-1\.\]',
  ),
  ((1.0, 1.0), ValueError, 'low must be below high'),
  ((NAN, 1.0), ValueError, 'low must be below high'),
  ((-INF, 1.0), ValueError, 'low and high must be finite, got'),
  (([0.0, 0.0], 1.0), ValueError, r'one or two entries, got shapes \(2,\)'),
  (([0.0] * 3, [1.0] * 3), ValueError, 'use log_partition in more dimensions'),
  ((None, 1.0), TypeError, 'low must be numbers, got None'),
  ((0.0, 'b'), TypeError, "high must be numbers, got 'b'"),
):
  row(
    'grid_log_partition',
    f'corners {corners!r}',
    functools.partial(grid_log_partition, low=corners[0], high=corners[1]),
    error,
    match,
  )
row(
  'grid_log_partition',
  'log_density returns a column',
  functools.partial(grid_log_partition, log_density=lambda rows: rows),
  ValueError,
  r'log_density must return one number a row, shape \(1,\), got \(1, 1\)',
)
ESTIMATE = optlab.log_partition(lambda rows: rows[:, 0], NOISE, KEY, 1, chunk=1)
agree = family('agree', first=ESTIMATE, second=ESTIMATE)
reals(agree, sigmas=POSITIVE)
for argument in ('first', 'second'):
  for bad in (1.0, None):
    row(
      'agree',
      f'{argument}={bad}',
      functools.partial(agree, **{argument: bad}),
      TypeError,
      f'{argument} must be a result of log_partition, .*{type(bad).__name__}',
    )

# Noise.

fit_gaussian = family('fit_gaussian', rows=np.array([[0.0], [1.0]]))
gaussian_mixture = family(
  'gaussian_mixture',
  weights=np.ones(1),
  means=np.ones((1, 2)),
  covariances=np.eye(2)[None],
)
follow = family('follow', noise=NOISE, rows=ROWS, rate=0.1)
reals(fit_gaussian, traced=False, inflate=POSITIVE)
reals(gaussian_mixture, inflate=POSITIVE)
reals(follow, rate=CLOSED_RATE, floor=POSITIVE)
for wrong, arguments, error, match in (
  (
    'another size',
    {'mean': np.ones(3)},
    ValueError,
    r'\[d\] and \[d, d\], got',
  ),
  ('a scalar mean', {'mean': 1.0}, ValueError, r'\[d\] and \[d, d\], got \(\)'),
  ('NaN in the mean', {'mean': X * NAN}, ValueError, r'mean must be in \(-inf'),
  (
    'not definite',
    {'covariance': INDEFINITE},
    ValueError,
    'add a small multiple',
  ),
  (
    'singular',
    {'covariance': ROWS[:2]},
    ValueError,
    'must be positive definite',
  ),
  (
    'NaN',
    {'covariance': np.eye(2) * NAN},
    ValueError,
    'covariance must be posit',
  ),
  ('mean=None', {'mean': None}, TypeError, 'mean must be an array of num'),
  ('a word', {'mean': 'ab'}, TypeError, "mean must be .*got 'ab'"),
):
  row('gaussian', wrong, functools.partial(gaussian, **arguments), error, match)
for wrong, rows, match in (
  ('a vector', X, r'rows must have shape \[num, d\], got \(2,\)'),
  ('one row', ROWS[:1], 'must be positive definite; add a small multiple'),
  ('NaN', ROWS * NAN, 'mean must be in .*nan'),
  ('no rows', ROWS[:0], 'rows must have at least one row'),
):
  row(
    'fit_gaussian',
    wrong,
    functools.partial(fit_gaussian, rows=rows),
    ValueError,
    match,
  )
for wrong, arguments, match in (
  (
    'weights of another length',
    {'weights': X},
    r'\[k\], \[k, d\] and \[k, d, d',
  ),
  ('a flat mean', {'means': X}, r'must have shapes \[k\], \[k, d\] and'),
  (
    'a zero weight',
    {'weights': [0.0]},
    r'weights must be in \(0.0, inf\), got',
  ),
  ('NaN in a mean', {'means': [[NAN, 0.0]]}, r'means must be in \(-inf, inf\)'),
  (
    'not definite',
    {'covariances': -np.eye(2)[None]},
    'must be positive definite',
  ),
):
  row(
    'gaussian_mixture',
    wrong,
    functools.partial(gaussian_mixture, **arguments),
    ValueError,
    match,
  )
for wrong, arguments, error, match in (
  ('noise=None', {'noise': None}, TypeError, 'noise must be a Gaussian, with'),
  (
    'rows of another size',
    {'rows': ROWS[:, :1]},
    ValueError,
    r'\[num, 2\], as',
  ),
  ('a vector', {'rows': X}, ValueError, r'rows must have shape \[num, 2\], as'),
  (
    'log_weights of another length',
    {'log_weights': X},
    ValueError,
    r'log_weights must have shape \(4,\), one a row, got \(2,\)',
  ),
):
  row('follow', wrong, functools.partial(follow, **arguments), error, match)
row(
  'follow',
  'rows that are all NaN: the noise is held',
  lambda: same(follow(rows=ROWS * NAN), NOISE),
)

init_flow = family('init_flow', key=KEY, rows=ROWS, num_layers=1, hidden=1)
FLOW = optlab.unnormalized.init_flow(KEY, ROWS, 1, 1)
fit_flow = family('fit_flow', flow=FLOW, key=KEY, rows=ROWS, num_steps=1)
counts(init_flow, num_layers=(), hidden=())
counts(fit_flow, num_steps=(), batch_size=())
reals(fit_flow, learning_rate=NON_NEGATIVE, jitter=NON_NEGATIVE)
for wrong, rows in (
  ('one column', ROWS[:, :1]),
  ('a vector', X),
  ('no rows', ROWS[:0]),
):
  for make in (init_flow, fit_flow):
    row(
      make.__name__,
      wrong,
      functools.partial(make, rows=rows),
      ValueError,
      rf'rows must have shape \[num, .*got {re.escape(str(rows.shape))}',
    )
row(
  'init_flow',
  'NaN',
  lambda: init_flow(rows=ROWS * NAN),
  ValueError,
  r'rows must be in \(-inf, inf\)',
)
row(
  'fit_flow',
  'flow=None',
  lambda: fit_flow(flow=None),
  TypeError,
  'flow must be a Flow that init_flow makes, .*got NoneType',
)


# What need not have a row, and why.
EXEMPT = {
  name
  for name, value in PUBLIC.items()
  if inspect.isclass(value)
  and issubclass(value, tuple)
  and name not in {row.name for row in TABLE}
}  # Records that users read and optlab fills; what takes one checks it.


def identity(row):
  text = f'{row.name}: {row.wrong}'
  # Addresses differ between the processes of a parallel run.
  return re.sub(r' at 0x[0-9a-f]+', '', text)


@pytest.mark.parametrize('row', TABLE, ids=identity)
def test_bad_input(row):
  if row.error is None:
    assert row.call()
    return
  with pytest.raises(row.error) as caught:
    row.call()
  assert re.search(row.match, str(caught.value), re.DOTALL)


def test_every_public_callable_has_a_row():
  public = {
    name
    for name, value in PUBLIC.items()
    if inspect.isfunction(value) or inspect.isclass(value)
  }
  rows = {row.name for row in TABLE}
  assert len(TABLE) >= 150
  assert public - rows - EXEMPT == set()
  assert rows - public == set()


@pytest.mark.parametrize('name', sorted({row.name for row in TABLE}))
def test_the_docstring_names_every_promised_error(name):
  public = PUBLIC[name]
  if inspect.isclass(public):  # Its users' docstrings name the errors.
    return
  raises = inspect.getdoc(public).partition('Raises:')[2]
  for row in TABLE:
    if row.name == name and row.error and row.error is not Exception:
      kinds = row.error if isinstance(row.error, tuple) else (row.error,)
      assert any(kind.__name__ in raises for kind in kinds), row


# Those that run at once are tried on shapes.
def test_the_good_arguments_are_good():
  for call in GOOD:
    if call not in (minimize, mixture):
      traced(lambda call=call: (call(), 0)[1])


def test_no_optional_package_is_needed():
  """Whatever is imported comes with jax and optax, or is for types alone."""
  needed = {'jax', 'numpy', 'optax', 'optlab', 'chex'}
  for path in pathlib.Path(optlab.__file__).parent.glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module or '']
      for name in names:
        root = name.split('.')[0]
        assert root in needed or root in __import__('sys').stdlib_module_names
