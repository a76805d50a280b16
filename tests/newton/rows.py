"""Rows of the contract table: GNS-Newton."""

import optlab
from tests.contract import Row
from tests.contract import loss
from tests.contract import plain

ROWS = [
  Row(
    'gns_newton',
    plain(lambda gamma: optlab.gns_newton(gamma_init=gamma)),
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
