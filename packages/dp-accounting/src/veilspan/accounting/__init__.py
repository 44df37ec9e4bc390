"""Privacy plans with a certified ε, and the ledger that keeps them honest."""

from veilspan.accounting.bounds import DeltaBounds, EpsilonBounds
from veilspan.accounting.chain import LedgerEntry, LedgerError
from veilspan.accounting.ledger import BudgetExceeded, Ledger
from veilspan.accounting.phases import Phases
from veilspan.accounting.plan import PrivacyPlan
from veilspan.accounting.sketched import SketchedClip
from veilspan.accounting.tradeoff import TradeOff

__all__ = [
    "BudgetExceeded",
    "DeltaBounds",
    "EpsilonBounds",
    "Ledger",
    "LedgerEntry",
    "LedgerError",
    "Phases",
    "PrivacyPlan",
    "SketchedClip",
    "TradeOff",
]
