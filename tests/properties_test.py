"""Properties over random input: solvers, trackers and the sampler of blocks.

Shapes are fixed, so that each function compiles once for all examples.
"""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

import optlab
from tests.public import PUBLIC

# Compiling takes longer than hypothesis allows an example.
SETTINGS = hypothesis.settings(
  max_examples=15,
  deadline=None,
  derandomize=True,
  database=None,
  # Float64 holds for all examples of a test.
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
N = 5  # Entries of a vector.
M, S = 6, 4  # Rows of a table, and rows of a batch.
seeds = st.integers(0, 2**31 - 1)
rates = st.floats(0.05, 0.95)


def split(vector):
  """A vector as a tree of two leaves."""
  return {'a': vector[:2], 'b': {'c': vector[2:].reshape(3, 1)}}


def join(tree):
  return np.concatenate([tree['a'], tree['b']['c'].ravel()])


@functools.cache
def compiled(name, low_rank):
  """``(matrix or factor, b, shift) -> (x, ok)`` of a solver, on trees."""
  exact = {'rtol': 0.0} if name in ('cg', 'lanczos') else {}
  solver = PUBLIC[name](**exact)
  make = optlab.newton.LowRank if low_rank else optlab.Dense

  @jax.jit
  def solve(array, b, shift):
    return solver(make(array), split(b), shift)(shift)

  return solve


def symmetric(seed, eigenvalues):
  """A symmetric matrix of the given eigenvalues, and a right-hand side."""
  rng = np.random.default_rng(seed)
  basis = np.linalg.qr(rng.normal(size=(N, N)))[0]
  return (basis * eigenvalues) @ basis.T, rng.normal(size=N)


@pytest.mark.parametrize('name', ['cholesky', 'eigh', 'cg', 'lanczos'])
@SETTINGS
@hypothesis.given(
  seed=seeds,
  eigenvalues=st.lists(st.floats(-1.0, 10.0), min_size=N, max_size=N),
  above=st.floats(0.1, 10.0),
)
def test_solvers_agree_with_numpy(x64, name, seed, eigenvalues, above):
  matrix, b = symmetric(seed, eigenvalues)
  shift = above - min(0.0, *eigenvalues)
  x, ok = compiled(name, False)(matrix, b, shift)
  assert ok
  expected = np.linalg.solve(matrix + shift * np.eye(N), b)
  np.testing.assert_allclose(join(x), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
  'name', ['cholesky', 'eigh', 'woodbury', 'cg', 'lanczos']
)
@SETTINGS
@hypothesis.given(seed=seeds, shift=st.floats(1e-3, 10.0))
def test_solvers_agree_with_numpy_on_low_rank(x64, name, seed, shift):
  rng = np.random.default_rng(seed)
  factor, b = rng.normal(size=(2, N)), rng.normal(size=N)
  x, ok = compiled(name, True)(factor, b, shift)
  assert ok
  expected = np.linalg.solve(factor.T @ factor + shift * np.eye(N), b)
  np.testing.assert_allclose(join(x), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('name', ['cholesky', 'eigh', 'lanczos'])
@SETTINGS
@hypothesis.given(
  seed=seeds,
  rest=st.lists(st.floats(0.5, 10.0), min_size=N - 1, max_size=N - 1),
  below=st.floats(0.1, 5.0),
)
def test_solvers_see_what_is_not_definite(x64, name, seed, rest, below):
  # One eigenvalue below -shift; a random b meets its eigenvector.
  shift = 0.5
  matrix, b = symmetric(seed, [-shift - below, *rest])
  assert not compiled(name, False)(matrix, b, shift)[1]


def tree(rng, rows=None):
  """A tree of two leaves, with a leading axis if ``rows`` is given."""
  lead = () if rows is None else (rows,)
  return {'a': rng.normal(size=(*lead, 3)), 'b': rng.normal(size=lead)}


def rule(name, rate, gamma):
  """The update of a leaf by numpy."""

  def expected(old, now, before):
    drift = {'ema': 0.0, 'storm': 1 - rate, 'msvr': gamma}[name]
    return (1 - rate) * old + rate * now + drift * (now - before)

  return expected


@functools.cache
def tracker(name):
  """``(tracker, now, before, rate, gamma, blocks) -> tracker``, compiled."""

  @jax.jit
  def follow(old, now, before, rate, gamma, blocks=None):
    if name == 'ema':
      return optlab.tracking.ema(old, now, rate, blocks=blocks)
    if name == 'storm':
      return optlab.tracking.storm(old, now, before, rate, blocks=blocks)
    return optlab.tracking.msvr(old, now, before, rate, gamma, blocks=blocks)

  return follow


NAMES = pytest.mark.parametrize('name', ['ema', 'storm', 'msvr'])


@NAMES
@SETTINGS
@hypothesis.given(seed=seeds, rate=rates, gamma=st.floats(0.0, 5.0))
def test_trackers_of_trees(x64, name, seed, rate, gamma):
  rng = np.random.default_rng(seed)
  old, now, before = tree(rng), tree(rng), tree(rng)
  new = tracker(name)(old, now, before, rate, gamma)
  expected = jax.tree.map(rule(name, rate, gamma), old, now, before)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
    new,
    expected,
  )


@NAMES
@SETTINGS
@hypothesis.given(
  seed=seeds,
  rate=rates,
  gamma=st.floats(0.0, 5.0),
  # Beyond the end: padding. Repeats are likely.
  blocks=st.lists(st.integers(0, M + 2), min_size=S, max_size=S),
)
def test_trackers_of_tables(x64, name, seed, rate, gamma, blocks):
  rng = np.random.default_rng(seed)
  old, now, before = tree(rng, M), tree(rng, S), tree(rng, S)
  blocks = np.array(blocks, np.int32)
  new = tracker(name)(old, now, before, rate, gamma, blocks)
  for leaf in old:
    expected = old[leaf].copy()
    seen = set()
    for i, block in enumerate(blocks):
      if block < M and block not in seen:  # The first wins, padding is dropped.
        expected[block] = rule(name, rate, gamma)(
          old[leaf][block], now[leaf][i], before[leaf][i]
        )
        seen.add(block)
    got = np.asarray(new[leaf])
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    untouched = [i for i in range(M) if i not in seen]
    np.testing.assert_array_equal(got[untouched], old[leaf][untouched])


@NAMES
@SETTINGS
@hypothesis.given(
  seed=seeds,
  blocks=st.lists(st.integers(-3, M), min_size=S, max_size=S),
)
def test_negative_blocks(x64, name, seed, blocks):
  """An error where they are seen; under jit they touch no row."""
  hypothesis.assume(min(blocks) < 0)
  rng = np.random.default_rng(seed)
  old, now = tree(rng, M), tree(rng, S)
  blocks = np.array(blocks, np.int32)
  with pytest.raises(ValueError, match='must not be negative'):
    optlab.tracking.ema(old, now, 0.5, blocks=blocks)
  follow = tracker(name)
  new = follow(old, now, now, 0.5, 0.5, blocks)
  padded = np.where(blocks < 0, M, blocks).astype(np.int32)
  same = follow(old, now, now, 0.5, 0.5, padded)
  jax.tree.map(np.testing.assert_array_equal, new, same)


@functools.cache
def sampler(num_blocks, sampled, replace=False):
  draw = lambda seed: optlab.sample_blocks(
    jax.random.key(seed), num_blocks, sampled, replace=replace
  )
  return jax.jit(jax.vmap(draw))


# Few of many go by Floyd's draws, many of few by a permutation.
SIZES = st.sampled_from([(1, 1), (7, 1), (7, 2), (7, 5), (7, 7), (50, 4)])


@SETTINGS
@hypothesis.given(seed=seeds, sizes=SIZES)
def test_sampled_blocks_are_distinct_and_in_range(seed, sizes):
  num_blocks, sampled = sizes
  draws = np.asarray(sampler(*sizes)(seed + np.arange(64, dtype=np.uint32)))
  assert draws.shape == (64, sampled)
  assert draws.dtype == np.int32
  assert draws.min() >= 0
  assert draws.max() < num_blocks
  assert all(len(set(draw)) == sampled for draw in draws)


@pytest.mark.parametrize('sizes', [(7, 2, False), (7, 5, False), (7, 9, True)])
def test_sampled_blocks_are_uniform(sizes):
  """As sets: every block, and every pair of blocks, is as likely."""
  num_blocks, sampled, replace = sizes
  num = 4096
  draws = np.asarray(sampler(*sizes)(np.arange(num, dtype=np.uint32)))
  counts = np.bincount(draws.ravel(), minlength=num_blocks)
  expected = num * sampled / num_blocks
  assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
  has = np.zeros((num, num_blocks))
  has[np.arange(num)[:, None], draws] = 1
  together = (has.T @ has)[np.triu_indices(num_blocks, 1)]
  share = sampled * (sampled - 1) / (num_blocks * (num_blocks - 1))
  if replace:
    without = lambda k: (1 - k / num_blocks) ** sampled
    share = 1 - 2 * without(1) + without(2)
  assert np.abs(together - num * share).max() < 5 * np.sqrt(num * share)


@SETTINGS
@hypothesis.given(seed=seeds, sizes=SIZES)
def test_an_epoch_has_every_block_once(seed, sizes):
  num_blocks, sampled = sizes
  epoch = np.asarray(
    optlab.multi_block.epoch_of_blocks(
      jax.random.key(seed), num_blocks, sampled
    )
  )
  assert epoch.shape == (-(-num_blocks // sampled), sampled)
  flat = epoch.ravel()
  np.testing.assert_array_equal(np.sort(flat)[:num_blocks], range(num_blocks))
  assert np.all(flat[num_blocks:] == num_blocks)
