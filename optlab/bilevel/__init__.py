"""Bilevel optimization: BO-REP and its peers."""

from optlab.bilevel._bilevel import BilevelBatch
from optlab.bilevel._bilevel import BilevelState
from optlab.bilevel._bilevel import Objective
from optlab.bilevel._bo_rep import bo_rep
from optlab.bilevel._bo_rep import refine
from optlab.bilevel._hypergradient import implicit
from optlab.bilevel._hypergradient import soba
from optlab.bilevel._neumann import TtsaState
from optlab.bilevel._neumann import stocbio
from optlab.bilevel._neumann import ttsa
from optlab.bilevel._saba import IndexedBatch
from optlab.bilevel._saba import SabaState
from optlab.bilevel._saba import SagaMemory
from optlab.bilevel._saba import saba
from optlab.bilevel._unrolled import UnrolledState
from optlab.bilevel._unrolled import unrolled

__all__ = [
  'BilevelBatch',
  'BilevelState',
  'IndexedBatch',
  'Objective',
  'SabaState',
  'SagaMemory',
  'TtsaState',
  'UnrolledState',
  'bo_rep',
  'implicit',
  'refine',
  'saba',
  'soba',
  'stocbio',
  'ttsa',
  'unrolled',
]
