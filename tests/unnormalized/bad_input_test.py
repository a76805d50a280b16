"""What the public functions of unnormalized say to bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from tests import inputs
from tests.inputs import INDEFINITE
from tests.inputs import INF
from tests.inputs import KEY
from tests.inputs import NAN
from tests.inputs import ROWS
from tests.inputs import X
from tests.inputs import estimate
from tests.inputs import family
from tests.inputs import same
from tests.inputs import zero

table = inputs.Table()
row = table.row

# Models without a normalizer.


def log_density(params, rows):
  return -jnp.sum((rows - params) ** 2, -1)


LOG_Q = np.zeros(4, np.float32)
BITS = np.asarray([[0, 1], [1, 1], [0, 0], [0, 1]], np.float32)
NOISY = optlab.NoiseBatch(ROWS, ROWS, LOG_Q, LOG_Q)
gaussian = family('gaussian', mean=X, covariance=np.eye(2))
NOISE = jax.jit(optlab.unnormalized.gaussian)(X, np.eye(2))
lattice = family('lattice', key=KEY, num=4, size=2)
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
denoising_score_matching = family(
  'denoising_score_matching', log_density=log_density, noise_scale=0.1
)
for wrong, bad, error, match in (
  ('integers', np.ones((4, 2), int), TypeError, 'floating array.*int64'),
  ('a list', [[0.0]], TypeError, 'floating array, got list'),
  ('no rows', ROWS[:0], ValueError, 'needs rows, one leading axis'),
  ('a scalar', np.float32(1.0), ValueError, 'needs rows, one leading axis'),
):
  row(
    'denoising_score_matching',
    f'rows that are {wrong}',
    lambda bad=bad: estimate(denoising_score_matching(), bad, inner=(KEY,)),
    error,
    match,
  )
row(
  'denoising_score_matching',
  'a key that is none',
  lambda: denoising_score_matching().init(X, 0.5),
  TypeError,
  'key must be a PRNG key such as',
)
row(
  'denoising_score_matching',
  'log_density returns a scalar',
  lambda: estimate(
    denoising_score_matching(log_density=lambda p, rows: jnp.sum(rows * p)),
    ROWS,
    inner=(KEY,),
  ),
  ValueError,
  r'log_density must return one number a row, shape \(\d,\), got \(',
)
row(
  'denoising_score_matching',
  'log_density returns auxiliary output',
  lambda: estimate(
    denoising_score_matching(log_density=lambda p, x: (log_density(p, x), 0)),
    ROWS,
    inner=(KEY,),
  ),
  TypeError,
  'log_density must return one number a row alone, got a tuple: leave',
)
with_log_normalizer = family('with_log_normalizer', log_density=log_density)
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
        got := jax.jit(
          lambda: make().estimate(
            X, make().init(X), NOISY._replace(data=ROWS * NAN, noise=ROWS * NAN)
          )
        )()
      )
      and zero(got[0].grads)
      and got[1].info.total_held == 1
      and got[1].info.rejected == 8
    ),
  )
langevin_sampler = family('langevin_sampler', step_size=0.1, num_steps=1)
gibbs_sampler = family('gibbs_sampler', num_sweeps=1)
discrete_langevin_sampler = family(
  'discrete_langevin_sampler', step_size=0.1, num_steps=1
)
kernel_sampler = family('kernel_sampler', make=lambda log_p: None, num_steps=1)
hmc_sampler = family('hmc_sampler', step_size=0.1, num_steps=1)
bernoulli = family('bernoulli', rates=np.full(2, 0.5))
categorical = family('categorical', weights=np.ones((2, 3)))
product = family('product', x=NOISE)
for make, argument, bad, error, match in (
  (bernoulli, 'rates', [0.5, 1.0], ValueError, r'rates must be in \(0.0, 1.0'),
  (bernoulli, 'rates', [0.5, NAN], ValueError, r'rates must be in \(0.0, 1.0'),
  (bernoulli, 'rates', 0.5, ValueError, r'rates must have shape \[d\], got \('),
  (bernoulli, 'rates', 'ab', TypeError, 'rates must be an array of numbers'),
  (categorical, 'weights', X, ValueError, r'weights must have shape \[d, k\]'),
  (categorical, 'weights', [[0.0]], ValueError, 'weights must be in'),
  (categorical, 'weights', None, TypeError, 'weights must be an array of num'),
  (product, 'x', 1.0, TypeError, 'x must be a distribution such as'),
):
  row(
    make.__name__,
    f'{argument}={bad}',
    functools.partial(make, **{argument: bad}),
    error,
    match,
  )
row('product', 'no part', optlab.unnormalized.product, ValueError, 'one part')
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
conditional_batch = family(
  'conditional_batch',
  noise=NOISE,
  key=KEY,
  conditions=ROWS[:, 0],
  data=ROWS,
  contexts=np.arange(4),
  num=2,
)
for name, call in (
  ('langevin', functools.partial(langevin, key=0)),
  ('lattice', functools.partial(lattice, key=None)),
  ('contrastive_divergence', lambda: contrastive_divergence().init(X, 0, ROWS)),
):
  row(name, 'a key that is none', call, TypeError, 'key must be a PRNG key')
row(
  'fit_gaussian',
  'half precision: in float32',
  lambda: (
    optlab.fit_gaussian(np.eye(3, 2, dtype=np.float16)).scale.dtype
    == np.float32
  ),
)
for make in (langevin_sampler, discrete_langevin_sampler, hmc_sampler):
  row(
    make.__name__,
    'rows of integers',
    lambda make=make: estimate(
      contrastive_divergence(sampler=make()),
      NOISY._replace(data=BITS if make is discrete_langevin_sampler else ROWS),
      inner=(KEY, BITS.astype(np.int32)),
    ),
    TypeError,
    'rows must be a floating array, got .* of dtype int32: convert them, or',
  )
for make in (noise_batch, conditional_batch):
  for bad in (ROWS[:, :1], ROWS[:, 0], {'y': ROWS}):
    row(
      make.__name__,
      f'data of shape {jax.tree.map(np.shape, bad)}',
      functools.partial(make, data=bad),
      ValueError,
      r"data must be rows of the noise's kind, at least one, got shapes",
    )
for argument, bad, error, match in (
  ('contexts', np.arange(5), ValueError, r"one length.*'contexts': \(5,\)"),
  ('contexts', np.int32(0), ValueError, r"one length.*'contexts': \(\)"),
  ('contexts', np.zeros((4, 1), int), ValueError, 'contexts no other'),
  ('contexts', np.zeros(4), TypeError, 'contexts must be integers, got dtype'),
  ('contexts', None, TypeError, 'contexts must be an array of numbers'),
  ('conditions', X, ValueError, r"one length.*'conditions': \(2,\)"),
  ('conditions', 1.0, ValueError, r"one length.*'conditions': \(\)"),
  ('data', ROWS[:0], ValueError, r"one length.*'data': \(0, 2\)"),
  ('key', 0, TypeError, 'key must be a PRNG key'),
):
  row(
    'conditional_batch',
    f'{argument}={bad}',
    functools.partial(conditional_batch, **{argument: bad}),
    error,
    match,
  )
log_partition = family(
  'log_partition',
  log_density=lambda rows: -jnp.sum(rows**2, -1),
  noise=NOISE,
  key=KEY,
  num=4,
  chunk=2,
)
mixture = family('mixture')
tempered_smc = family('tempered_smc')
defensive = family('defensive', noise=NOISE, wide=NOISE)
NOT_NOISE = (
  'must be a distribution such as optlab.unnormalized.gaussian makes, with'
  ' sample'
)
for bad in (None, 1.0, optlab.unnormalized.gaussian):
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
    (
      got := jax.jit(
        lambda: log_partition(log_density=lambda rows: rows[:, 0] * NAN)
      )()
    )
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
# What every worker makes while it collects is compiled in one piece.
ESTIMATE = jax.jit(
  lambda: optlab.log_partition(lambda rows: rows[:, 0], NOISE, KEY, 1, chunk=1)
)()
agree = family('agree', first=ESTIMATE, second=ESTIMATE)

# Noise.

fit_gaussian = family('fit_gaussian', rows=np.array([[0.0], [1.0]]))
gaussian_mixture = family(
  'gaussian_mixture',
  weights=np.ones(1),
  means=np.ones((1, 2)),
  covariances=np.eye(2)[None],
)
follow = family('follow', noise=NOISE, rows=ROWS, rate=0.1)
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
  (
    'noise=None',
    {'noise': None},
    TypeError,
    'noise must be a Gaussian, a Gauss',
  ),
  (
    'rows of another size',
    {'rows': ROWS[:, :1]},
    ValueError,
    r'\[num, 2\] with num',
  ),
  (
    'a vector',
    {'rows': X},
    ValueError,
    r'rows must have shape \[num, 2\] with',
  ),
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
  lambda: same(jax.jit(lambda: follow(rows=ROWS * NAN))(), NOISE),
)

init_flow = family('init_flow', key=KEY, rows=ROWS, num_layers=1, hidden=1)
FLOW = jax.jit(lambda: optlab.unnormalized.init_flow(KEY, ROWS, 1, 1))()
fit_flow = family('fit_flow', flow=FLOW, key=KEY, rows=ROWS, num_steps=1)
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


@pytest.mark.parametrize('row', table.rows, ids=inputs.identity)
def test_bad_input(row):
  inputs.check(row)


def test_docstrings_name_every_promised_error():
  inputs.check_docstrings(table.rows)


def kinked(params, rows):
  """Finite, but its derivative at a row of zeros is not a number."""
  return -params * jnp.sqrt(jnp.sum(rows**2, -1) * params**2)


ESTIMATORS = {
  'meco': lambda: optlab.meco(kinked),
  'ratio': lambda: optlab.meco(kinked, ratio_correction=True),
  'nce': lambda: optlab.nce(kinked),
  'ence': lambda: optlab.unnormalized.ence(kinked),
  'contrastive_divergence': lambda: optlab.contrastive_divergence(kinked, 0.1),
}


LIKE_IT = 'ratio', 'ence'


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow if name in LIKE_IT else ())
    for name in ESTIMATORS
  ],
)
def test_a_gradient_that_is_no_number_is_held(name):
  """The parameters became NaN, and every row after them was bad."""
  estimator, tx = ESTIMATORS[name](), optax.adam(0.1)
  noise = optlab.unnormalized.gaussian(jnp.zeros(1), jnp.eye(1))
  data = jnp.linspace(-1.0, 1.0, 4)[:, None]
  inner = ()
  if name == 'contrastive_divergence':
    inner = jax.random.key(1), data
  state = optlab.init(jnp.ones(()), estimator, tx, *inner)
  step = jax.jit(optlab.train_step(estimator, tx))
  batch = optlab.noise_batch(noise, jax.random.key(0), data, 4, True)
  before, _ = step(state, batch)
  assert not before.estimator_state.info.held
  zeros = jax.tree.map(lambda leaf: leaf.at[0].set(0), batch)
  after, _ = step(before, zeros)
  info = after.estimator_state.info
  assert info.held
  assert info.total_held == 1
  assert np.isfinite(after.params)
  again, _ = step(after, batch)
  assert not again.estimator_state.info.held
  assert again.params != after.params
