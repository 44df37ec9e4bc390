"""Privacy plans with a certified ε, and the ledger that keeps them honest."""

from veilspan.accounting.bounds import EpsilonBounds
from veilspan.accounting.chain import LedgerEntry, LedgerError
from veilspan.accounting.ledger import BudgetExceeded, Ledger
from veilspan.accounting.plan import PrivacyPlan

__all__ = [
    "BudgetExceeded",
    "EpsilonBounds",
    "Ledger",
    "LedgerEntry",
    "LedgerError",
    "PrivacyPlan",
]
