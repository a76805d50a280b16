"""Bilevel optimization with many lower problems: BSVRB and its peers."""

from optlab.multi_block._blocks import BlockBatch
from optlab.multi_block._blocks import BlockObjective
from optlab.multi_block._blocks import PairedBlockBatch
from optlab.multi_block._bsvrb import BSVRBState
from optlab.multi_block._bsvrb import bsvrb
from optlab.multi_block._bsvrb import dual_variables
from optlab.multi_block._bsvrb import inner_variables
from optlab.multi_block._dual import Dual
from optlab.multi_block._dual import HessianState
from optlab.multi_block._dual import ProductState
from optlab.multi_block._dual import track_hessians
from optlab.multi_block._dual import track_products
from optlab.multi_block._info import BSVRBInfo
from optlab.multi_block._rsvrb import RSVRBState
from optlab.multi_block._rsvrb import Tracked
from optlab.multi_block._rsvrb import rsvrb
from optlab.multi_block._sampling import epoch_of_blocks
from optlab.multi_block._sampling import sample_blocks

__all__ = [
  'BSVRBInfo',
  'BSVRBState',
  'BlockBatch',
  'BlockObjective',
  'Dual',
  'HessianState',
  'PairedBlockBatch',
  'ProductState',
  'RSVRBState',
  'Tracked',
  'bsvrb',
  'dual_variables',
  'epoch_of_blocks',
  'inner_variables',
  'rsvrb',
  'sample_blocks',
  'track_hessians',
  'track_products',
]
