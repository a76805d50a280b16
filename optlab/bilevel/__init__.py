"""Bilevel optimization: BO-REP and its peers."""

from optlab.bilevel._bo_rep import bo_rep
from optlab.bilevel._bo_rep import refine
from optlab.bilevel._f2sa import F2saMemory
from optlab.bilevel._f2sa import f2sa
from optlab.bilevel._implicit import implicit
from optlab.bilevel._maps import proximal_map
from optlab.bilevel._models import ModelsState
from optlab.bilevel._models import with_models
from optlab.bilevel._mrbo import mrbo
from optlab.bilevel._problem import BilevelAux
from optlab.bilevel._problem import Objective
from optlab.bilevel._rates import RatesReport
from optlab.bilevel._rates import suggest_rates
from optlab.bilevel._saba import IndexedBatch
from optlab.bilevel._saba import SabaMemory
from optlab.bilevel._saba import SagaMemory
from optlab.bilevel._saba import saba
from optlab.bilevel._soba import soba
from optlab.bilevel._srba import SrbaMemory
from optlab.bilevel._srba import srba
from optlab.bilevel._state import BilevelBatch
from optlab.bilevel._state import BilevelInfo
from optlab.bilevel._state import BilevelState
from optlab.bilevel._stocbio import stocbio
from optlab.bilevel._ttsa import TtsaMemory
from optlab.bilevel._ttsa import ttsa
from optlab.bilevel._unrolled import unrolled

__all__ = [
  'BilevelAux',
  'BilevelBatch',
  'BilevelInfo',
  'BilevelState',
  'F2saMemory',
  'IndexedBatch',
  'ModelsState',
  'Objective',
  'RatesReport',
  'SabaMemory',
  'SagaMemory',
  'SrbaMemory',
  'TtsaMemory',
  'bo_rep',
  'f2sa',
  'implicit',
  'mrbo',
  'proximal_map',
  'refine',
  'saba',
  'soba',
  'srba',
  'stocbio',
  'suggest_rates',
  'ttsa',
  'unrolled',
  'with_models',
]
