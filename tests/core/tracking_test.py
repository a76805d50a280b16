"""Trackers of moving quantities, and tables of blocks."""

import collections
import itertools
import json
import pathlib

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optlab
from optlab import tables
from optlab import tracking

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'bsvrb'


def test_msvr_follows_the_recorded_trace(x64):
  golden = json.loads((GOLDEN / 'msvr_trace.json').read_text())
  gamma = tracking.msvr_gamma(golden['m'], golden['I'], golden['alpha'])
  np.testing.assert_allclose(gamma, golden['gamma'], rtol=1e-15)
  for chosen in (golden['gamma'], None):
    table = jnp.asarray(golden['trace'][0]['g_old'])
    for step in golden['trace']:
      blocks = jnp.asarray(step['blocks'])
      now, before = jnp.asarray(step['g_new']), jnp.asarray(step['g_old'])
      table = optlab.tracking.msvr(
        table, now[blocks], before[blocks], golden['alpha'], chosen,
        blocks=blocks,
      )  # fmt: skip
      np.testing.assert_allclose(table, step['s'], rtol=0, atol=1e-14)


def test_storm_follows_exactly_where_a_moving_average_lags(x64):
  path = [jnp.asarray([t**2, -3.0 * t]) for t in range(6)]
  tree = {'a': path[0], 'b': (path[0][0],)}
  storm = ema = tree
  for before, now in itertools.pairwise(path):
    now, before = ({'a': p, 'b': (p[0],)} for p in (now, before))
    storm = optlab.tracking.storm(storm, now, before, 0.2)
    ema = optlab.tracking.ema(ema, now, 0.2)
    for leaf, exact in zip(*map(jax.tree.leaves, (storm, now)), strict=True):
      np.testing.assert_allclose(leaf, exact, rtol=1e-15)
  assert np.abs(ema['a'] - path[-1]).max() > 5.0


def test_storm_is_msvr_that_samples_every_block(x64):
  assert tracking.msvr_gamma(7, 7, 0.3) == pytest.approx(0.7, abs=1e-16)
  old, now, before = np.random.default_rng(0).normal(size=(3, 4))
  np.testing.assert_allclose(
    optlab.tracking.msvr(old, now, before, 0.3),
    optlab.tracking.storm(jnp.asarray(old), now, before, 0.3),
    rtol=1e-14,
  )


def test_msvr_is_unbiased_on_average_where_a_moving_average_is_not(x64):
  """A quantity drifts, a row is visited with probability I/m.

  The mean of the error of MSVR vanishes as alpha does, because its gamma makes
  up for the steps that a row misses; a moving average of the same rate trails
  by drift / (alpha p).
  """
  m, sampled, alpha, steps = 20, 4, 0.02, 2000
  drift = 1.0
  random = np.random.default_rng(0)
  blocks = np.stack([random.permutation(m)[:sampled] for _ in range(steps)])

  def follow(rule):
    def step(table, item):
      t, blocks = item
      now = jnp.full(sampled, drift * t)
      table = rule(table, now, now - drift, blocks)
      return table, jnp.mean(table) - drift * t

    items = jnp.arange(1.0, steps + 1), jnp.asarray(blocks)
    return jax.lax.scan(step, jnp.zeros(m), items)[1][steps // 4 :].mean()

  msvr = follow(
    lambda table, now, before, blocks: optlab.tracking.msvr(
      table, now, before, alpha, blocks=blocks
    )
  )
  ema = follow(
    lambda table, now, before, blocks: optlab.tracking.ema(
      table, now, alpha, blocks=blocks
    )
  )
  p = sampled / m
  np.testing.assert_allclose(ema, -drift / (alpha * p), rtol=0.05)
  assert abs(msvr) < 0.03 * abs(ema)


def test_padding_repeats_and_negative_indices(x64):
  table = {'a': jnp.arange(5.0), 'b': jnp.zeros((5, 2))}
  rows = {'a': jnp.array([10.0, 20.0, 30.0]), 'b': jnp.ones((3, 2))}
  out = optlab.tracking.ema(table, rows, 1.0, blocks=jnp.array([3, 3, 5]))
  np.testing.assert_array_equal(out['a'], [0.0, 1.0, 2.0, 10.0, 4.0])
  np.testing.assert_array_equal(out['b'][:, 0], [0.0, 0.0, 0.0, 1.0, 0.0])
  with pytest.raises(ValueError, match=r'negative.*pad with num_blocks=5'):
    optlab.tracking.ema(table, rows, 1.0, blocks=jnp.array([3, -1, 2]))
  # Under jit the values can't be seen: dropped, not wrapped to the last block.
  jitted = jax.jit(
    lambda blocks: optlab.tracking.ema(table, rows, 1.0, blocks=blocks)
  )
  out = jitted(jnp.array([3, -1, 2]))
  np.testing.assert_array_equal(out['a'], [0.0, 1.0, 30.0, 10.0, 4.0])


def test_bad_blocks_and_rates_are_refused():
  table = jnp.zeros(3)
  for blocks, kind, message in [
    (jnp.array([0.0]), TypeError, 'integer'),
    (jnp.array([[0]]), ValueError, r'shape \(sampled,\)'),
    (jnp.array([0, 1, 2, 0]), ValueError, 'more than num_blocks=3'),
  ]:
    with pytest.raises(kind, match=message):
      optlab.tracking.ema(table, table, 0.5, blocks=blocks)
  for alpha in (0.0, 1.0, -0.1, float('nan')):
    with pytest.raises(ValueError, match=r'alpha must be in \(0'):
      optlab.tracking.msvr(table, table, table, alpha)
  with pytest.raises(ValueError, match='beta'):
    optlab.tracking.storm(table, table, table, 1.5)
  with pytest.raises(ValueError, match='rate'):
    optlab.tracking.ema(table, table, -0.5)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
  st.lists(st.integers(-3, 8), min_size=6, max_size=6), st.integers(6, 7)
)
def test_first_distinct_block_in_range_counts(blocks, num_blocks):
  use = jax.jit(tables.distinct_blocks, static_argnums=1)(
    jnp.asarray(blocks), num_blocks
  )
  seen = set()
  for block, used in zip(blocks, np.asarray(use), strict=True):
    assert used == (0 <= block < num_blocks and block not in seen)
    seen.add(block)


def test_trackers_keep_their_dtype():
  table = jnp.zeros(4, jnp.float32)
  now = jnp.ones(2, jnp.bfloat16)
  out = optlab.tracking.msvr(table, now, now, 0.1, blocks=jnp.array([0, 1]))
  assert out.dtype == jnp.float32


def test_samples_of_blocks_are_uniform_subsets():
  draw = jax.jit(
    jax.vmap(lambda key: optlab.sample_blocks(key, 5, 2)),
  )
  subsets = np.sort(draw(jax.random.split(jax.random.key(0), 4000)), axis=1)
  counts = collections.Counter(map(tuple, subsets.tolist()))
  assert set(counts) == set(itertools.combinations(range(5), 2))
  # Ten subsets, 400 each; six standard deviations.
  assert all(abs(count - 400) < 6 * 19 for count in counts.values())


def test_samples_with_and_without_replacement_and_by_epochs():
  key = jax.random.key(1)
  for sampled in (1, 3, 19, 20):  # Floyd's algorithm, and a permutation.
    blocks = np.asarray(optlab.sample_blocks(key, 20, sampled))
    assert len(set(blocks.tolist())) == sampled
    assert blocks.min() >= 0
    assert blocks.max() < 20
    assert blocks.dtype == np.int32
  # All of them: data laid out by block meet their own, as they are.
  np.testing.assert_array_equal(blocks, np.arange(20))
  epoch = np.asarray(optlab.multi_block.epoch_of_blocks(key, 20, 20))
  np.testing.assert_array_equal(epoch, np.arange(20)[None])
  many = np.asarray(optlab.sample_blocks(key, 3, 30, replace=True))
  assert set(many.tolist()) == {0, 1, 2}
  epoch = np.asarray(optlab.multi_block.epoch_of_blocks(key, 10, 4))
  assert epoch.shape == (3, 4)
  assert sorted(epoch.ravel().tolist()) == [*range(10), 10, 10]
  assert epoch[-1, 2:].tolist() == [10, 10]
  for bad in (0, 4):
    with pytest.raises(ValueError, match='sampled'):
      optlab.sample_blocks(key, 3, bad)
  with pytest.raises(TypeError, match='num_blocks'):
    optlab.sample_blocks(key, 3.0, 2)
