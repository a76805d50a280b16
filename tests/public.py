"""All public names of optlab: those of the top, its wings and its modules."""

import optlab
from optlab import base
from optlab import estimators
from optlab import losses

HOMES = (
  optlab,
  optlab.newton,
  optlab.first_order,
  optlab.batches,
  optlab.bilevel,
  optlab.multi_block,
  optlab.unnormalized,
  base,
  estimators,
  losses,
  optlab.tracking,
  optlab.training,
)
MODULES = {module.__name__.rpartition('.')[2] for module in HOMES}
PUBLIC = {
  name: getattr(home, name)
  for home in HOMES
  for name in home.__all__
  if name not in MODULES
}
