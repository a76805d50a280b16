"""Problems of many blocks: BSVRB and its peers, coupled compositions."""

from optlab.multi_block._blocks import BlockBatch
from optlab.multi_block._blocks import BlockObjective
from optlab.multi_block._blocks import PairedBlockBatch
from optlab.multi_block._bsvrb import bsvrb
from optlab.multi_block._dual import Dual
from optlab.multi_block._dual import HessianState
from optlab.multi_block._dual import ProductState
from optlab.multi_block._dual import track_hessians
from optlab.multi_block._dual import track_products
from optlab.multi_block._fcco import FCCOBatch
from optlab.multi_block._fcco import FCCOInfo
from optlab.multi_block._fcco import FCCOState
from optlab.multi_block._fcco import fcco
from optlab.multi_block._info import BSVRBInfo
from optlab.multi_block._rsvrb import RSVRBState
from optlab.multi_block._rsvrb import rsvrb
from optlab.multi_block._sampling import epoch_of_blocks
from optlab.multi_block._sampling import sample_blocks
from optlab.multi_block._state import BSVRBState
from optlab.multi_block._state import dual_variables
from optlab.multi_block._state import inner_variables
from optlab.multi_block._tracked import Tracked
from optlab.multi_block._trackers import Tracker
from optlab.multi_block._trackers import track_average
from optlab.multi_block._trackers import track_log_average
from optlab.multi_block._trackers import track_mirror
from optlab.multi_block._trackers import track_msvr

__all__ = [
  'BSVRBInfo',
  'BSVRBState',
  'BlockBatch',
  'BlockObjective',
  'Dual',
  'FCCOBatch',
  'FCCOInfo',
  'FCCOState',
  'HessianState',
  'PairedBlockBatch',
  'ProductState',
  'RSVRBState',
  'Tracked',
  'Tracker',
  'bsvrb',
  'dual_variables',
  'epoch_of_blocks',
  'fcco',
  'inner_variables',
  'rsvrb',
  'sample_blocks',
  'track_average',
  'track_hessians',
  'track_log_average',
  'track_mirror',
  'track_msvr',
  'track_products',
]
