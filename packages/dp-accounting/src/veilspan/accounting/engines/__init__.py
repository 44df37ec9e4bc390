"""Engines that bound the ε of a mechanism, behind one protocol.

`PrvEngine` is in `veilspan.accounting.engines.prv`: it imports prv-accountant, which takes longer
than most questions.
"""

from veilspan.accounting.engines.certified import CertifiedEngine
from veilspan.accounting.engines.pld import PldEngine
from veilspan.accounting.engines.protocol import Engine, EngineError
from veilspan.accounting.engines.rdp import RdpEngine
from veilspan.accounting.mechanism import Composed, SampledGaussian

__all__ = [
    "CertifiedEngine",
    "Composed",
    "Engine",
    "EngineError",
    "PldEngine",
    "RdpEngine",
    "SampledGaussian",
]
