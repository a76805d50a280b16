"""The program that compares anything with anything, and its study."""

import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import compare
from experiments.lab import contests
from experiments.lab import flags
from experiments.lab import functions
from experiments.lab import launch as launch_lib
from experiments.lab import oracles
from experiments.lab import record
from experiments.lab import session
from experiments.lab import study
from experiments.lab import tables
from experiments.lab import verdicts
from experiments.methods import bilevel
from experiments.methods import optimizers
from experiments.problems import classic
import optlab

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
  return compare.Config(
    output_dir=str(tmp_path / 'run'), problem='blocks',
    methods=('bsvrb_v2', 'rsvrb'), budget=400.0,
    learning_rates=(1e-3, 0.1), seeds=3, tuning_seeds=1, precision='float32',
    target=1.0,
  )  # fmt: skip


def test_tunes_runs_pairs_and_draws(config, capsys):
  compare.main(config)
  shown = capsys.readouterr().out
  _, rows = record.read(config.output_dir)
  summaries = {row['method']: row for row in record.select(rows, 'summary')}
  assert list(summaries) == ['bsvrb_v2', 'rsvrb']
  ends = {}
  for method, summary in summaries.items():
    label = f'blocks: {method}'
    runs = record.select(rows, 'eval', method=label)
    ends[method] = [r for r in runs if r['step'] == compare.PIECES]
    assert [row['seed'] for row in ends[method]] == [0, 1, 2]
    # Equal calls: ten blocks a step, 400 in all.
    assert [row['calls'] for row in ends[method]] == [400.0] * 3
    assert [row['updates'] for row in ends[method]] == [40] * 3
    assert ends[method][0]['value'] < runs[0]['value']
    # Picked on a seed of its own, with a grid that went on where it had to.
    tuned = [
      row
      for grid in range(3)
      for row in record.select(
        rows, 'eval', method=f'{label}: tuning, grid {grid}',
        step=study.TUNING_PIECES,
      )
    ]  # fmt: skip
    assert {row['seed'] for row in tuned} == {study.TUNING_SEED}
    assert len(tuned) > 2
    best = min(tuned, key=lambda row: row['tuning'])
    assert ends[method][0]['learning_rate'] == best['learning_rate']
    rates = {row['learning_rate'] for row in tuned}
    assert summary['edge'] == (
      best['learning_rate'] in (min(rates), max(rates))
    )
    # The first look at which the value is at the target.
    for seed, end in enumerate(ends[method]):
      there = [
        r['calls'] for r in runs if r['seed'] == seed and r['value'] <= 1
      ]
      assert end['reached'] == (there[0] if there else math.inf)
  values = [[row['value'] for row in ends[name]] for name in summaries]
  gaps = np.subtract(values[1], values[0])
  assert summaries['rsvrb']['gap'] == pytest.approx(np.mean(gaps), rel=1e-5)
  assert summaries['rsvrb']['wins'] == np.sum(gaps < 0)
  assert 'sampled blocks' in shown
  assert 'compare.png' in shown
  table = [line for line in shown.split('\n') if 'picture' not in line]
  assert max(len(line) for line in table if 'record' not in line) <= 80


def test_pairs_have_an_interval():
  found = verdicts.paired([1.0, 2.0, 3.0])
  # Student's t with two degrees of freedom: 4.303 standard errors.
  np.testing.assert_allclose(
    found[:3], [2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], rtol=1e-4
  )
  assert found.said == 'tie'
  # Mean 1, standard error 0.5477, and 2.776 of them at five seeds.
  assert verdicts.paired([0.0, 0.0, 1.0, 1.0, 3.0]).said == 'tie'
  assert verdicts.paired([1.0, 1.0, 2.0, 2.0, 4.0]).said == 'worse'
  assert verdicts.paired([-1.0, -1.1, -0.9]).said == 'better'
  assert verdicts.paired([1.0, 1.1, 0.9]).said == 'worse'
  assert verdicts.paired([0.0, 0.0]).said == 'tie'
  # What rounding leaves of values that began at 2 is no win of nothing.
  rows = [
    {'kind': 'eval', 'method': m, 'seed': s, 'step': i, 'value': v}
    for m, end in (('a', 3.5e-18), ('b', 0.0), ('c', 3e-15))
    for s in (0, 1)
    for i, v in enumerate((2.0, end + s * end / 10))
  ]
  small = verdicts.rounding(rows, 'a', 'value')
  assert small == 2.0 * np.finfo(jnp.result_type(float)).eps
  small = 2.0 * np.finfo(np.float64).eps
  for method, said, losses in (('b', 'tie', 0), ('c', 'worse', 2)):
    found = verdicts.summary(
      *(verdicts.last(rows, m) for m in (method, 'a')), 'value', small=small
    )
    assert (found['verdict'], found['losses']) == (said, losses)
    assert found['wins'] == 0
  assert (
    verdicts.paired([1.0]).said == verdicts.paired([1.0, math.inf]).said == '-'
  )


def test_profiles_are_shares_of_the_problems():
  rows = [
    {'problem': problem, 'method': method, 'reached': reached}
    for problem, method, reached in (
      ('p', 'a', 10.0), ('p', 'b', 30.0), ('q', 'a', math.inf), ('q', 'b', 5.0),
      ('r', 'a', math.inf), ('r', 'b', math.inf),
    )
  ]  # fmt: skip
  found = verdicts.profile(rows, ['a', 'b'])
  assert found['a'].tolist() == [1.0, math.inf, math.inf]
  assert found['b'].tolist() == [1.0, 3.0, math.inf]


@pytest.mark.parametrize(
  ('problem', 'method', 'match'),
  [
    ('blocks', 'adam', 'not one of bsvrb_v1'),
    ('ridge', 'bo_rep:lion', 'upper steps'),
    ('density', 'sgd', 'not one of meco'),
  ],
)
def test_unknown_methods_are_refused(problem, method, match):
  with pytest.raises(flags.UserError, match=match):
    contests.PROBLEMS[problem]().entry(method)


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    ('softmax', 'neither optlab nor optax'),
    ('MultiSteps', 'neither optlab nor optax'),
    ('optax.contrib.nothing', 'optax.contrib has no nothing'),
    ('no_such_package.tx', 'no such module'),
    ('optax:nothing', 'optax has no nothing'),
    ('adam(b3=1)', 'adam has no b3'),
    ('adam(0.1)', 'arguments are given as key=value'),
    (
      'adam(learning_rate=optax.constant_schedule(0.1))',
      'constant_schedule.*: is no number.* a schedule or another function',
    ),
    ('adam(b1=x)', 'b1=x: is no number'),
    ('adam(b1=)', 'invalid syntax'),
    ('adam(b1=[])', 'a search space is empty'),
    ('adam b1', 'is not NAME or NAME'),
    (':make', 'is not NAME or NAME'),
    ('optax.contrib.', 'is not NAME or NAME'),
    ('optax.contrib', 'module optax.contrib cannot be called'),
    ('adam(b1=0.8, b1=0.9)', 'an argument is there twice'),
    ('optax.tree.norm(tree=1.0)', 'no optimizer'),
  ],
)
def test_bad_optimizers_are_one_line(text, match):
  with pytest.raises(flags.UserError, match=match):
    optimizers.variants(text)


def step_of(text):
  (one,) = optimizers.variants(text)
  tx, ones = one.make(0.5), jnp.ones((2, 2))
  updates, _ = tx.update(3.0 * ones, tx.init(ones), ones)
  return one, updates


def test_optimizers_by_name_by_dots_and_with_arguments(tmp_path, monkeypatch):
  one, updates = step_of('sign_sgd')
  assert one.tuned
  np.testing.assert_array_equal(updates, -0.5)
  assert step_of('optax.contrib.muon')[0].tuned
  one, updates = step_of('optax:sgd(learning_rate=.25)')
  assert not one.tuned
  np.testing.assert_array_equal(updates, -0.75)
  package = tmp_path / 'mypackage'
  package.mkdir()
  (package / 'tx.py').write_text(
    'import optax\n'
    'def make(learning_rate, *, scale):\n'
    '  return optax.sgd(scale * learning_rate)\n'
  )
  monkeypatch.chdir(tmp_path)
  one, updates = step_of('mypackage.tx:make(scale=.5)')
  assert one.text == 'mypackage.tx:make(scale=0.5)'
  np.testing.assert_array_equal(updates, -0.75)
  with pytest.raises(flags.UserError, match='it needs scale too'):
    optimizers.variants('mypackage.tx.make')


def test_a_list_is_a_search_space():
  found = optimizers.variants('adam(b1=[0.8, 0.9], nesterov=True)')
  assert [one.text for one in found] == [
    'adam(b1=0.8, nesterov=True)', 'adam(b1=0.9, nesterov=True)',
  ]  # fmt: skip
  assert launch_lib._split('sgd,adam(b1=[0.8,0.9],b2=.9), lion') == [
    'sgd', 'adam(b1=[0.8,0.9],b2=.9)', 'lion',
  ]  # fmt: skip
  assert launch_lib._split('') == []


@jax.jit
def rows_of(x):
  return jnp.sin(x) ** 2


@pytest.mark.parametrize(
  ('step', 'values', 'gradients', 'products'),
  [
    (lambda f, x: f(x), 1, 0, 0),
    (lambda f, x: jax.grad(f)(x), 0, 1, 0),
    (lambda f, x: jax.jit(jax.grad(f))(x), 0, 1, 0),
    (lambda f, x: jax.vmap(jax.grad(f))(jnp.stack([x, x])), 0, 1, 0),
    (lambda f, x: jax.jvp(f, (x,), (x,)), 1, 0, 0),
    (lambda f, x: jax.jvp(jax.grad(f), (x,), (x,)), 0, 1, 1),
    (lambda f, x: jax.vjp(jax.grad(f), x)[1](x), 0, 1, 1),
    (lambda f, x: jax.linearize(jax.grad(f), x)[1](x), 0, 1, 1),
    (
      lambda f, x: jax.lax.fori_loop(0, 5, lambda _, x: jax.grad(f)(x), x),
      0, 5, 0,
    ),
    (lambda f, x: optax.adam(0.1).update(jax.grad(f)(x), optax.adam(
      0.1).init(x), x), 0, 1, 0),
  ],
)  # fmt: skip
def test_calls_are_counted(step, values, gradients, products):
  loss = lambda x: jnp.sum(rows_of(x))
  marked = oracles.marked(loss)
  x = jnp.ones(3)
  found = oracles.count(lambda x: step(marked, x), x)
  assert found == (values, gradients, products, False)
  np.testing.assert_allclose(
    jax.tree.leaves(step(marked, x))[0], jax.tree.leaves(step(loss, x))[0],
    rtol=1e-6,
  )  # fmt: skip


def test_a_loop_that_ends_on_a_condition_is_said():
  marked = oracles.marked(lambda x: jnp.sum(rows_of(x)))
  loop = lambda x: jax.lax.while_loop(
    lambda x: x[0] > 0.1, lambda x: x - jax.grad(marked)(x), x
  )
  assert oracles.count(loop, jnp.ones(3)).open


@pytest.mark.parametrize('lower_steps, neumann_steps', [(5, 5), (4, 3)])
@pytest.mark.parametrize('name', bilevel.methods(1, 1, blocks=(1, 1)))
def test_the_table_of_bilevel_costs_is_what_is_counted(
  name, lower_steps, neumann_steps
):
  table = bilevel.methods(lower_steps, neumann_steps, 7, blocks=(1, 1))
  method = table[name]
  levels = (
    oracles.marked(lambda x, y, _: jnp.sum((y - x) ** 2), 2),
    oracles.marked(lambda x, y, _: jnp.sum(y**2) * jnp.exp(x[0]) - x @ y, 2),
  )
  estimator = method.make(*levels, optax.sgd(0.1), 0.1)

  def sample(key):
    del key
    part = jnp.zeros(())
    if method.indexed:
      part = optlab.bilevel.IndexedBatch(jnp.zeros((), jnp.int32), part)
    return part, part

  def step(key):
    x = jnp.ones(3)
    state = method.init(estimator, optax.sgd(0.1), x, x, key)
    batch = bilevel.draw(key, sample, method.step_samples)
    return optlab.train_step(estimator, optax.sgd(0.1))(state, batch)[0]

  # The most rounds of conjugate gradients, and a random power's mean.
  rounds = {'implicit': 7, 'ttsa': (neumann_steps - 1) / 2}
  found = oracles.count(step, jax.random.key(0), rounds=rounds.get(name, 1))
  assert found.open == (name in rounds)
  # What is counted is the step that costs most; lower rounds come once in so
  # many steps.
  period = {'bo_rep': 2, 'bo_rep_period4': 4}.get(name, 1)
  saved = lower_steps * (1 - 1 / period)
  counted = found.gradients - saved, found.products
  assert counted == (method.gradients, method.products)


MINE = """
import jax
import jax.numpy as jnp

def start(key):
  return jnp.zeros(4)

def loss(params, key):
  x = jax.random.normal(key, (8, 4))
  return jnp.mean((x @ params - x.sum(1)) ** 2)

def measure(params):
  return jnp.sum((params - 1) ** 2)

LEARNING_RATES = (0.003, 0.01, 0.03)
BUDGET = 60
TARGET = 0.5
"""


def test_a_problem_of_the_users_own(tmp_path, capsys):
  path = tmp_path / 'mine.py'
  path.write_text(MINE)
  config = compare.Config(
    output_dir=str(tmp_path / 'run'), problem=str(path), seeds=2,
    methods=('adam(b1=[0.0, 0.9])', 'optax.sgd', 'gns_newton'),
    tuning_seeds=1,
  )  # fmt: skip
  compare.main(config)
  _, rows = record.read(config.output_dir)
  adam, sgd, newton = record.select(rows, 'summary')
  assert adam['variant'] in ('adam(b1=0.0)', 'adam(b1=0.9)')
  assert sgd['updates'] == sgd['calls'] == 60
  assert newton['learning_rate'] is None
  assert adam['variant'] in capsys.readouterr().out
  # The grid went on above its edge, where these rates are too low.
  assert sgd['learning_rate'] > 0.03
  assert sgd['reached'] < 60


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    ('', 'has no function start'),
    (MINE.replace('def measure', 'def other'), 'has no function measure'),
    (MINE.replace('jnp.zeros(4)', 'jnp.zeros(3)'), 'TypeError: dot_general'),
    (MINE.replace('jnp.sum', ''), 'scalars, not ShapeDtypeStruct'),
    (MINE.replace('jnp.sum((params - 1) ** 2)', 'params.sum(), 1'), 'scalars'),
    (MINE.replace('jnp.zeros(4)', 'jnp.zeros(4, int)'), 'TypeError: grad'),
    (MINE + 'BUDGET = 0', 'BUDGET is a positive number, not 0'),
    (MINE + 'BUDGET = "x"', 'could not convert string'),
    (MINE + 'LEARNING_RATES = ()', 'LEARNING_RATES are numbers'),
    (MINE + 'LEARNING_RATES = (0.1, -1.0)', 'LEARNING_RATES are numbers'),
    (MINE + 'LEARNING_RATES = "ab"', 'LEARNING_RATES: could not convert'),
    (MINE + 'TARGET = "low"', 'TARGET: could not convert string'),
    (MINE + 'TARGET = float("nan")', 'TARGET is nan, not a number'),
    (MINE + 'METHODS = ()', 'METHODS are names, at least one'),
    (MINE + 'METHODS = 3', 'METHODS are names, at least one, not 3'),
    (MINE.replace('jnp.zeros(4)', 'jnp.log(-jnp.ones(4))'), 'loss is not a n'),
    (
      MINE.replace('jnp.zeros(4)', 'jax.numpy.asarray(np.random.rand(4))')
      + 'import numpy as np',
      'start is another one when it is called again: .* Draw by the key',
    ),
    (
      MINE.replace('jnp.sum((', 'np.random.rand() * jnp.sum((')
      + 'import numpy as np',
      '(loss|measure) is another one when it is called again',
    ),
    ('raise SystemExit(3)', 'SystemExit: 3'),
    ('import nothing_at_all', 'ModuleNotFoundError: No module'),
    ('def', 'SyntaxError'),
  ],
)
def test_a_bad_file_is_one_line(tmp_path, text, match):
  path = tmp_path / 'mine.py'
  path.write_text(text)
  with pytest.raises(flags.UserError, match=f'--problem=.*{match}'):
    functions.of_file(str(path))


def test_a_method_that_does_not_run_is_said_before_work_begins(tmp_path):
  (tmp_path / 'mine.py').write_text(MINE)
  problem = functions.of_file(str(tmp_path / 'mine.py'))
  with pytest.raises(flags.UserError, match='adam.* does not run on this'):
    study.check_methods(problem, ["adam(b1='x')"])
  study.check_methods(problem, ["adam(b1='x')"], skip=True)


BROKEN = """
def make(learning_rate):
  return {}['nothing']
"""

SAM = """
import optax

def make(learning_rate, clear=False):
  up = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
  return optax.contrib.sam(
    optax.sgd(learning_rate), up, sync_period=2, opaque_mode=not clear)
"""


def test_a_users_method_that_breaks_is_named_with_its_line(
  tmp_path, monkeypatch
):
  (tmp_path / 'broken_method.py').write_text(BROKEN)
  monkeypatch.chdir(tmp_path)
  problem = classic.CLASSIC['linear']()
  words = r"KeyError: 'nothing' \(.*broken_method.py, line 3\)"
  with pytest.raises(flags.UserError, match=words):
    study.check_methods(problem, ['broken_method:make'])


def test_what_is_measured_is_what_a_method_stands_for(tmp_path, monkeypatch):
  (tmp_path / 'sam_method.py').write_text(SAM)
  monkeypatch.chdir(tmp_path)
  loss = lambda params, key: jnp.sum((params - 1.0) ** 4)
  problem = functions.of_function(
    lambda key: jnp.arange(3.0), loss, lambda params: {'value': params},
    methods=(), learning_rates=(0.1,), budget=10.0, value='params',
  )  # fmt: skip
  key = jax.random.key(0)

  def answers(text, steps):
    entry = problem.entry(text)
    state, found = entry.start(key, 0.1), []
    for _ in range(steps):
      state = entry.step(state, key, 0.1)
      found.append(problem.measure(state, None)['value'])
    return entry, state, found

  # Between two steps SAM stands at a worse point, from which it comes back.
  entry, state, clear = answers('sam_method:make(clear=True)', 2)
  np.testing.assert_array_equal(clear[0], jnp.arange(3.0))
  np.testing.assert_array_equal(clear[1], state.params)
  assert entry.calls == 1
  # The same in one step of two gradients.
  entry, _, opaque = answers('sam_method:make', 1)
  np.testing.assert_allclose(opaque[0], clear[1], rtol=1e-6)
  assert entry.calls == 2
  name = 'optax.contrib.schedule_free_sgd(learning_rate=0.1)'
  _, state, free = answers(name, 2)
  average = optax.contrib.schedule_free_eval_params(
    state.opt_state, state.params
  )
  np.testing.assert_array_equal(free[1], average)
  assert np.max(np.abs(average - state.params)) > 1e-3


def test_defaults_only_takes_the_first_rate_and_no_search_space():
  problem = classic.CLASSIC['linear']()
  plan = study.Plan('', problem, 10.0, (0.1, 0.01), 1, 0)
  none: Any = None  # Nothing is run.
  assert study.tune(none, plan, 'adam').found.rate == 0.1
  with pytest.raises(flags.UserError, match='tuning_seeds=0 does not search'):
    study.tune(none, plan, 'adam(b1=[0.8,0.9])')


def test_the_page_on_comparing_runs(tmp_path, monkeypatch):
  """Its problem and its method, with a search space, beside two peers."""
  page = (ROOT / 'docs' / 'comparing.md').read_text()
  source = page.split(':caption: mine.py\n')[1].split('```')[0]
  (tmp_path / 'mine.py').write_text(source)
  monkeypatch.chdir(tmp_path)
  methods = launch_lib._split(page.split("--methods='")[2].split("'")[0])
  assert methods[0] == 'mine:signs(decay=[0.5,0.9])'
  config = compare.Config(
    problem='mine.py', methods=(methods[0], 'adam'), seeds=2, tuning_seeds=1,
    precision='float32', budget=60.0,
  )  # fmt: skip
  compare.main(config)
  signs, adam = record.select(record.read('results/compare')[1], 'summary')
  assert signs['variant'].startswith('mine:signs(decay=0.')
  assert adam['median'] < 3.7  # Where it started.


def test_a_set_of_problems_has_a_profile(tmp_path, capsys, monkeypatch):
  few = {name: classic.CLASSIC[name] for name in ('linear', 'cutest_box3')}
  monkeypatch.setitem(classic.SETS, 'classic', few)
  config = compare.Config(
    output_dir=str(tmp_path), problems='classic', methods=('lbfgs', 'sgd'),
    learning_rates=(1e-3, 1e-2), seeds=2, tuning_seeds=1,
  )  # fmt: skip
  compare.main(config)
  assert '2 problems: the share on which' in capsys.readouterr().out
  for name in ('profile', 'linear', 'cutest_box3'):
    assert (tmp_path / f'{name}.png').stat().st_size > 5000
  rows = record.select(record.read(tmp_path)[1], 'summary')
  assert [row['problem'] for row in rows] == ['linear'] * 2 + [
    'cutest_box3'
  ] * 2
  reached = {(r['problem'], r['method']): r['reached'] for r in rows}
  assert reached['linear', 'lbfgs'] < 200


def test_wide_tables_stand_in_parts(capsys):
  tables.show(
    'A title that is so long that it goes on in another line, and in one more',
    ['method', *(f'column {i}' for i in range(12))],
    [['a[b]', *range(12)], ['b', *([1234567] * 12)]],
  )
  lines = capsys.readouterr().out.split('\n')
  assert sum('a[b]' in line for line in lines) == 3
  assert max(map(len, lines)) <= 80
  assert sum('method' in line for line in lines) == 3
  assert sum('1,234,567' in line for line in lines) == 3


def test_tables_on_a_narrow_terminal(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '60')
  tables.show('A title ' * 12, ['method', 'a' * 30, 'b' * 30], [['x', 1, 2]])
  lines = capsys.readouterr().out.split('\n')
  assert max(map(len, lines)) <= 60
  assert sum('method' in line for line in lines) == 2


@pytest.mark.slow
def test_a_record_can_be_repeated_and_a_difference_is_found(tmp_path):
  """In processes of their own, as users do."""

  def launch(*arguments):
    return subprocess.run(
      [sys.executable, '-m', 'experiments.synthetic_functions', *arguments],
      capture_output=True,
      text=True,
      check=False,
    )

  first, again = tmp_path / 'first', tmp_path / 'again'
  few = '--functions=F1', '--optimizers=diffgrad,sgd'
  ran = launch(f'--output_dir={first}', '--steps=10', '--seeds=2', *few)
  assert ran.returncode == 0, ran.stderr
  ran = launch(f'--repeat={first}', f'--output_dir={again}')
  assert ran.returncode == 0, ran.stderr
  header, rows = record.read(again)
  assert header['config']['steps'] == 10
  assert f'repeated: {len(rows)} rows with the same numbers' in ran.stdout

  # Other flags beside it would not be those of the record.
  ran = launch(f'--repeat={first}', f'--output_dir={again}', '--steps=20')
  assert ran.returncode == 1
  assert '--repeat takes the flags of the record, not --steps=20' in ran.stderr

  path = first / 'record.jsonl'
  lines = path.read_text().splitlines()
  row = json.loads(lines[1])
  assert row['kind'] == 'eval'
  lines[1] = json.dumps(row | {'seed': 17})
  path.write_text('\n'.join(lines) + '\n')
  ran = launch(f'--repeat={first}', f'--output_dir={again}')
  assert ran.returncode == 1
  assert 'row 2 differs: seed was 17, is 0' in ran.stderr
  assert 'Traceback' not in ran.stderr


def test_the_time_that_is_announced_is_that_of_the_flags():
  assert 'about 1 minute on two' in compare.Config().expected()
  quick = compare.Config(problems='classic', quick=True).expected()
  assert quick.startswith(f'about {compare.SET_MINUTES["classic"][0]} minutes')
  unknown = compare.Config(problems='classic', seeds=9).expected()
  assert 'not known' in unknown and '--quick' not in unknown


def test_states_beyond_the_memory_are_refused(tmp_path):
  entry = study.Entry(
    lambda key, rate, seed, data: jnp.zeros(2**40, jnp.float32),
    lambda state, key, rate, data: state, 1.0, tuned=False,
  )  # fmt: skip
  problem = study.Problem(
    lambda name: entry, ('large',), (1.0,), 1.0, 'calls',
    lambda state, data: {'value': state[0]}, 'value',
  )  # fmt: skip
  plan = study.Plan('', problem, 1.0, (1.0,), 1, 0)
  config = compare.Config(output_dir=str(tmp_path))
  with (
    jax.enable_x64(True),
    session.Session('compare', config) as opened,
    pytest.raises(flags.UserError, match='large: states of 1 .*GB'),
  ):
    study.study(opened, plan, ('large',))
