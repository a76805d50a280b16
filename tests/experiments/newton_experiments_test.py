"""The Newton programs from end to end, and what they say of bad input."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.optimize
from sklearn import datasets

from experiments import logistic_regression
from experiments import nonlinear_equations
from experiments import plot
from experiments import softmax_regression
from experiments.lab import flags
from experiments.lab import newton
from experiments.lab import record
from experiments.lab import sklearn_solvers
from experiments.methods import newton as methods
from experiments.problems import data
from experiments.problems import regressions
from experiments.problems import smooth
import optlab

ROOT = pathlib.Path(__file__).parents[2]


def program(*arguments):
  return subprocess.run(
    [sys.executable, '-m', *arguments],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip


@pytest.fixture
def small(tmp_path, x64):
  """A logistic regression that takes seconds."""
  return logistic_regression.Config(
    output_dir=str(tmp_path / 'run'),
    dataset='breast_cancer',
    l2=1e-2,
    curvature=('exact', 'gauss_newton'),
    optimizers=('gns', 'lbfgs', 'sklearn_newton_cg', 'sklearn_newton_cholesky'),
  )


def test_logistic_regression_from_flags_to_picture(small, capsys):
  logistic_regression.main(small)
  shown = capsys.readouterr().out
  folder = pathlib.Path(small.output_dir)
  assert (folder / 'suboptimality.png').stat().st_size > 10_000
  header, rows = record.read(folder)
  assert header['config']['dataset'] == 'breast_cancer'
  summaries = record.select(rows, 'summary')
  names = [row['method'] for row in summaries]
  assert names == [
    'gns, exact', 'gns, gauss_newton', 'optax.lbfgs', 'sklearn newton-cg',
    'sklearn newton-cholesky',
  ]  # fmt: skip
  for row in summaries:
    assert row['method'] in shown
    assert row['reached']
    assert -1e-12 < row['suboptimality'] <= 1e-8
    assert row['gradients'] > row['step'] - 1
  # Every method minimized one objective: their values agree.
  values = [row['value'] for row in summaries]
  np.testing.assert_allclose(values, values[0], rtol=1e-6)

  # A second look at the record alone draws the same curves.
  output = str(folder / '2.png')
  plot.main(plot.Config(records=(str(folder),), output=output))
  assert (folder / '2.png').stat().st_size > 10_000

  for wrong, words in (
    ('none/2.png', 'no folder .*none'),
    ('2.gif', 'not .png, .pdf or .svg'),
  ):
    with pytest.raises(flags.UserError, match=words):
      plot.main(plot.Config(records=(str(folder),), output=wrong))
  with pytest.raises(flags.UserError, match='no rows with both'):
    plot.main(plot.Config(records=(str(folder),), output=output, y='energy'))
  # Nor is one of several left out without a word.
  other = folder / 'other' / folder.name
  other.mkdir(parents=True)
  lines = (folder / 'record.jsonl').read_text().splitlines(True)
  (other / 'record.jsonl').write_text(lines[0])
  with pytest.raises(flags.UserError, match=f'^other/{folder.name}: no rows'):
    plot.main(plot.Config(records=(str(folder), str(other)), output=output))

  # A reader of the table that goes away ends it with a line, no traceback; so
  # does a disk that is full.
  command = [sys.executable, '-m', 'experiments.plot', str(folder)]
  reading, writing = os.pipe()
  os.close(reading)
  full = os.open('/dev/full', os.O_WRONLY)
  for place, said in (
    (writing, 'error: nobody reads the standard output; '),
    (full, 'error: standard output: No space left on device; '),
  ):
    ended = subprocess.run(
      [*command, f'--output={output}'],
      cwd=ROOT, stdout=place, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(place)
    assert ended.returncode == 1
    assert ended.stderr.startswith(said)
    assert ended.stderr.count('\n') == 1

  # Resumed, there is nothing left to do.
  before = (folder / 'record.jsonl').read_bytes()
  logistic_regression.main(dataclasses.replace(small, resume=True))
  assert (folder / 'record.jsonl').read_bytes() == before


@pytest.mark.parametrize(
  'load',
  [
    datasets.load_iris,
    pytest.param(datasets.load_wine, marks=pytest.mark.slow),
  ],
)
def test_softmax_regression(tmp_path, x64, load):
  """Of three classes, and of two, which scikit-learn takes in another form."""
  rows = load()
  kept = rows.target < (3 if load is datasets.load_iris else 2)
  scaled = rows.data[kept] / rows.data.max(0)
  path = tmp_path / 'rows.libsvm'
  datasets.dump_svmlight_file(
    scaled, rows.target[kept], str(path), zero_based=False
  )
  config = softmax_regression.Config(
    output_dir=str(tmp_path / 'run'), l2=1e-2, dataset=str(path),
    optimizers=('gns', 'sklearn_newton_cg'), curvature=('exact',),
  )  # fmt: skip
  softmax_regression.main(config)
  summaries = record.select(record.read(config.output_dir)[1], 'summary')
  assert [row['reached'] for row in summaries] == [True, True]


@pytest.mark.parametrize('make', [regressions.logistic, regressions.softmax])
def test_curvatures_called_exact_gauss_newton_and_fisher_are_one(x64, make):
  rng = np.random.default_rng(0)
  labels = np.arange(12) % 2
  rows = data.Dataset('rows', rng.normal(size=(12, 3)), labels, np.arange(2))
  problem = smooth.cast(make(rows, 0.1), np.float64)
  x = jax.numpy.asarray(problem.start(1))

  @jax.jit
  def matrices(x):
    of = lambda name: problem.curvatures[name].factory
    exact, *same = (
      optlab.dense(of(name))(x, problem.data).matrix
      for name in ('exact', 'gauss_newton', 'fisher')
    )
    return exact, same, of('empirical_fisher')(x, problem.data).matrix

  exact, same, empirical = matrices(x)
  for matrix in same:
    np.testing.assert_allclose(matrix, exact, rtol=1e-10, atol=1e-12)
  assert abs(empirical - exact).max() > 1e-3


def solve_equations(folder, problem):
  config = nonlinear_equations.Config(
    output_dir=str(folder), problem=problem, dimension=10, power=3,
    curvature=('gauss_newton',), optimizers=('gns',), f_tol=1e-6,
  )  # fmt: skip
  nonlinear_equations.main(config)
  return record.read(folder)[1]


@pytest.mark.parametrize(
  'problem',
  [
    name if name == 'rosenbrock' else pytest.param(name, marks=pytest.mark.slow)
    for name in nonlinear_equations.PROBLEMS
  ],
)
def test_nonlinear_equations(tmp_path, x64, problem):
  summaries = record.select(solve_equations(tmp_path, problem), 'summary')
  assert [row['reached'] for row in summaries] == [True]


def test_two_runs_differ_in_times_alone(tmp_path, x64):
  first, second = (
    record.without_times(solve_equations(tmp_path / name, 'chebyshev'))
    for name in ('first', 'second')
  )
  assert first == second


@pytest.mark.parametrize('name', ['gns', 'lbfgs'])
def test_a_drawn_step_pays_what_it_counts(x64, name):
  problem, calls = smooth.equations('rosenbrock', 2, 2), []

  def fun(x, data):
    jax.debug.callback(lambda: calls.append(0))
    return problem.fun(x, data)

  (method,) = methods.methods((name,), ('gauss_newton',), problem)
  starts = np.asarray(problem.start(0))[None]
  entry = newton._entry(
    problem._replace(fun=fun), method, jax.numpy.array(starts)
  )
  state = entry.start(None, None, 0, ())
  step = jax.jit(lambda state: entry.step(state, None, None, ()))
  for _ in range(4):
    state = step(state)
  jax.effects_barrier()
  assert len(calls) == state.gradients > 4


def test_the_rank_one_curvature_is_the_papers(x64):
  problem = smooth.equations('chebyshev', 4, 6)
  x = problem.start(1)
  jacobian = jax.jacobian(lambda x: smooth._chebyshev(x, ()))(x)
  u = smooth._chebyshev(x, ())
  expected = 2.0 * np.outer(jacobian.T @ u, jacobian.T @ u)
  operator = problem.curvatures['empirical_fisher'].factory(x, ())
  actual = operator.factor.T @ operator.factor
  np.testing.assert_allclose(actual, expected, rtol=1e-10)
  expected += u @ u * jacobian.T @ jacobian
  operator = problem.curvatures['gauss_newton'].factory(x, ())
  np.testing.assert_allclose(operator.matrix, expected, rtol=1e-10)


def test_float32_reaches_what_float32_can(small):
  config = dataclasses.replace(
    small,
    precision='float32',
    f_tol=1e-6,
    optimizers=('gns',),
    curvature=('exact',),
  )
  with jax.enable_x64(False):
    logistic_regression.main(config)
  for row in record.select(record.read(config.output_dir)[1], 'summary'):
    assert row['reached']


def test_a_small_sparse_file_has_a_least_value(tmp_path):
  """By the reference solvers, whose Hessian needs more than products."""
  path = tmp_path / 'toy.libsvm'
  path.write_text('+1 1:0.5 3:2\n-1 2:1\n' * 3)
  dataset = data.load(str(path))
  a, y = data.dense(dataset), data.signs(dataset)
  fun = lambda x: np.mean(np.logaddexp(0.0, -y * (a @ x))) + 0.005 * x @ x
  found = smooth.least_value(regressions.logistic(dataset, 1e-2))
  expected = scipy.optimize.minimize(fun, np.zeros(3), tol=1e-12).fun
  np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_scikit_learns_calls_are_counted(x64):
  problem = regressions.logistic(data.load('breast_cancer'), 0.1)
  with sklearn_solvers.counting(columns=30) as counts:
    sklearn_solvers.fit_sklearn(
      problem.regression, 'newton-cholesky', problem.start(0), 3, np.float64
    )
  assert counts['solves'] in (3, 4)
  assert counts['products'] == 30 * counts['solves']


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'dataset': 'nothing'}, 'no data set nothing: give one of mushrooms'),
    ({'dataset': 'digits'}, 'digits: labels are not binary'),
    ({'optimizers': ('gns', 'adam')}, '--optimizers=adam: not one of gns'),
    ({'optimizers': ()}, '--optimizers is empty'),
    ({'l2': 0.0}, '--l2=0.0: must be at least'),
    ({'l2': float('nan')}, '--l2=nan: not a finite number'),
    ({'precision': 'half'}, '--precision=half: not one of float32, float64'),
    ({'seeds': 0}, '--seeds=0: must be at least 1'),
    ({'seeds': 20_000}, '--seeds=20.*: must be at most 10,000; those above'),
    ({'seeds': 10**20}, '--seeds=1.*: must be at most 2,147,483,647'),
  ],
)
def test_bad_configurations(tmp_path, fields, words):
  output = tmp_path / 'run'
  with pytest.raises(flags.UserError, match=words):
    logistic_regression.main(
      logistic_regression.Config(output_dir=str(output), **fields)
    )
  assert not output.exists(), 'half-written output'


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['--dataset=nothing', '--output_dir=never'], 'no data set nothing'),
    pytest.param(
      ['--l2=much', '--output_dir=never'], 'l2', marks=pytest.mark.slow
    ),
    pytest.param(
      ['stray', '--output_dir=never'],
      'unexpected argument stray',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_errors_are_one_line_and_status_one(arguments, words):
  result = program('experiments.logistic_regression', *arguments)
  assert result.returncode == 1
  assert len(result.stderr.strip().split('\n')) == 1
  assert words in result.stderr
  assert not (ROOT / 'never').exists(), 'half-written output'


def test_help_names_the_flags():
  result = program('experiments.logistic_regression', '--help')
  # The usage line names --dataset too; these stand in the flags' list alone.
  for words in ('--dataset', '--seeds: Number of seeds', '--l2: Weight of'):
    assert words in result.stdout
  assert 'Traceback' not in result.stderr


def test_numbers_whose_squares_are_not_finite(tmp_path, small):
  path = tmp_path / 'large.libsvm'
  path.write_text('1 1:1e160\n-1 2:1\n')
  config = dataclasses.replace(small, dataset=str(path))
  with pytest.raises(flags.UserError, match=r'up to 1e\+160, whose squares fl'):
    logistic_regression.main(config)


def test_as_many_columns_as_rcv1(tmp_path):
  path = tmp_path / 'wide.libsvm'
  path.write_text('1 47236:1\n-1 1:1\n')
  problem = regressions.logistic(data.load(str(path)), 1e-2)
  at = problem.start(0)
  assert problem.fun(at, problem.data) == pytest.approx(np.log(2.0))


def test_an_output_folder_that_cannot_be_made(tmp_path, small):
  (tmp_path / 'file').write_text('')
  config = dataclasses.replace(small, output_dir=str(tmp_path / 'file' / 'run'))
  with pytest.raises(flags.UserError, match='--output_dir=.*: Not a directory'):
    logistic_regression.main(config)
