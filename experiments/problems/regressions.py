"""Regressions of the Newton experiments, with the curvatures they have."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optlab

from . import data as data_lib
from . import smooth


def _regression_curvatures(
  row_loss: Callable[[jax.Array, jax.Array], jax.Array],
  labels: Any,
  l2: float,
  size: int,
) -> dict[str, smooth.Curvature]:
  """Curvatures of the mean of ``row_loss(a @ params, y)`` plus the penalty.

  The loss is minus the log-probability of a label, one of ``labels``.
  """

  def outputs_loss(outputs, data):
    return jnp.mean(jax.vmap(row_loss)(outputs, data[1]))

  def example_loss(params, features, label):
    return row_loss(features @ params, label)

  def log_probs(params, features):
    outputs = features @ params
    return -jax.vmap(lambda label: row_loss(outputs, label))(
      jnp.asarray(labels)
    )

  def ridge(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the penalty's curvature to a factory's operators."""

    def curvature(params, data):
      return jax.tree_util.Partial(
        lambda operator, v: jax.tree.map(
          lambda product, leaf: product + l2 * leaf, operator(v), v
        ),
        factory(params, data),
      )

    return curvature

  model = lambda params, data: data[0] @ params
  matrix_free = ridge(optlab.gauss_newton(model, outputs_loss))
  inputs = lambda data: data[0]
  # Rows are those of a dense matrix, which comes last.
  rows = lambda data: data[2] if len(data) > 2 else data[0]
  own = optlab.fisher(log_probs)
  fisher = ridge(lambda params, data: own(params, rows(data)))
  labelled = optlab.empirical_fisher(example_loss)
  empirical = ridge(lambda params, data: labelled(params, rows(data), data[1]))
  curvatures = {'gauss_newton': smooth.Curvature(matrix_free)}
  if size <= smooth.DENSE_LIMIT:
    curvatures['exact'] = smooth.Curvature(_narrow(matrix_free))
    if len(labels) == 2:
      # Of c outputs it would take c (c + 1) / 2 products of matrices.
      exact = optlab.linear_gauss_newton(inputs, outputs_loss, l2, jnp.float32)
      curvatures['exact'] = smooth.Curvature(exact, columns=size)
    curvatures['fisher'] = smooth.Curvature(optlab.dense(fisher), columns=size)
    curvatures['empirical_fisher'] = smooth.Curvature(
      optlab.dense(empirical), columns=size
    )
  else:
    # The Fisher matrix is the Gauss-Newton one, with a factor that is too big.
    curvatures['exact'] = smooth.Curvature(_narrow(matrix_free))
    curvatures['empirical_fisher'] = smooth.Curvature(empirical)
  return curvatures


def _narrow(factory: Callable[..., Any]) -> Callable[..., Any]:
  """The operators of a factory in float32: as many steps, half the memory."""
  narrow = lambda tree: jax.tree.map(
    lambda leaf: (
      leaf.astype(jnp.float32)
      if jnp.issubdtype(leaf.dtype, jnp.floating)
      else leaf
    ),
    tree,
  )

  def curvature(params, data):
    return jax.tree_util.Partial(
      lambda operator, v: operator(narrow(v)).astype(v.dtype),
      factory(narrow(params), narrow(data)),
    )

  return curvature


def logistic(dataset: data_lib.Dataset, l2: float) -> smooth.Problem:
  """Mean of ``log(1 + exp(-y a.x))`` plus ``l2 / 2 |x|^2``, no intercept.

  Args:
    dataset: A data set with two classes.
    l2: Weight of the penalty.

  Returns:
    The problem; parameters have shape ``[columns]``.
  """
  features, labels = data_lib.dense(dataset), data_lib.signs(dataset)
  data: tuple[Any, ...] = (features, labels)
  if not isinstance(dataset.features, np.ndarray):
    with jax.enable_x64(True):  # Runs in float64 use the values as well.
      # Only the formed matrix of few columns takes pairs of them.
      few = features.shape[1] <= smooth.DENSE_LIMIT
      products = optlab.sparse_matrix(dataset.features, gram=few)
    data = (products, labels, features)
  row_loss = lambda output, label: jax.nn.softplus(-label * output)

  def fun(params, data):
    margins = data[0] @ params
    losses = jax.nn.softplus(-data[1] * margins)
    return jnp.mean(losses) + 0.5 * l2 * jnp.vdot(params, params)

  size = features.shape[1]
  return smooth.Problem(
    name=f'logistic regression, {dataset.name}',
    fun=fun,
    data=data,
    start=smooth.start_near_zero((size,)),
    curvatures=_regression_curvatures(row_loss, (-1.0, 1.0), l2, size),
    regression=(dataset.features, labels, l2),
  )


def softmax(dataset: data_lib.Dataset, l2: float) -> smooth.Problem:
  """Mean cross-entropy of linear logits plus ``l2 / 2 |x|^2``, no intercept.

  Args:
    dataset: A data set.
    l2: Weight of the penalty.

  Returns:
    The problem; parameters have shape ``[columns, classes]``.
  """
  features, labels = data_lib.dense(dataset), dataset.labels
  row_loss = lambda outputs, label: jax.nn.logsumexp(outputs) - outputs[label]

  def fun(params, data):
    losses = jax.vmap(row_loss)(data[0] @ params, data[1])
    return jnp.mean(losses) + 0.5 * l2 * jnp.vdot(params, params)

  shape = (features.shape[1], len(dataset.classes))
  return smooth.Problem(
    name=f'softmax regression, {dataset.name}',
    fun=fun,
    data=(features, labels),
    start=smooth.start_near_zero(shape),
    curvatures=_regression_curvatures(
      row_loss, np.arange(shape[1]), l2, shape[0] * shape[1]
    ),
    regression=(dataset.features, labels, l2),
  )
