"""Rows of the contract table: GNS-Newton and its solvers."""

import jax

import optlab
from tests.contract import Row
from tests.contract import loss
from tests.contract import plain


def solved(solver):
  """A row's `make`: products of the Hessian, solved by one of the solvers."""
  return plain(lambda gamma: optlab.gns_newton(solver(), gamma_init=gamma))


def few_products():
  """Two of eight: the error of the model is not that of rounding alone.

  It moves the smoothness, which is compared.
  """
  near = optlab.newton.hutchinson(jax.random.key(1))
  return optlab.cg(max_steps=2, preconditioner=near)


ROWS = [
  Row(
    'cg',
    solved(few_products),
    1.0,
    is_transformation=True,
    whole=True,
  ),
  Row(
    'multishift_cg',
    solved(optlab.newton.multishift_cg),
    1.0,
    is_transformation=True,
    whole=True,
  ),
  Row(
    'gns_newton',
    plain(lambda gamma: optlab.gns_newton(gamma_init=gamma)),
    1.0,
    is_transformation=True,
    whole=True,
  ),
  Row(
    'layerwise',
    lambda gamma: (
      optlab.with_curvature(
        optlab.value_and_grad(loss),
        optlab.newton.layerwise(optlab.hessian(loss)),
      ),
      optlab.gns_newton(gamma_init=gamma),  # Which takes blockwise.
    ),
    1.0,
    is_transformation=True,
    whole=True,
  ),
  Row(
    'with_curvature',
    lambda gamma: (
      optlab.with_curvature(
        optlab.value_and_grad(loss), optlab.dense(optlab.hessian(loss))
      ),
      optlab.newton.gns_newton_paper(gamma_init=gamma),
    ),
    1.0,
    is_transformation=True,
    whole=True,
  ),
]
