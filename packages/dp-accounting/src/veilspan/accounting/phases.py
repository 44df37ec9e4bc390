"""Several phases on the same data: a warm-up, a continued run, the runs of several ledgers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from veilspan.accounting.bounds import DeltaBounds, EpsilonBounds
from veilspan.accounting.chain import LedgerError
from veilspan.accounting.engines import CertifiedEngine, Engine
from veilspan.accounting.ledger import Ledger
from veilspan.accounting.mechanism import Composed, check_delta, check_epsilon
from veilspan.accounting.plan import PrivacyPlan
from veilspan.accounting.statement import write_phases_statement
from veilspan.accounting.tradeoff import TradeOff, find_tradeoff

# What must be the same in all phases, as the sum is a statement about one kind of change.
_COMMON = ("unit", "relation")


@dataclass(frozen=True, kw_only=True, init=False)
class Phases:
    """Plans that ran, or will run, one after the other on the same data; their costs add up.

    Composing the losses of all phases costs less than adding up their ε.

    Args:
        plans: The phases, at least one, with the same unit and relation; everything else may
            differ. Their settings must not depend on what earlier phases released.
        delta: The δ of the sum; the plans' own unless given, if they agree.

    Raises:
        ValueError: If there is no phase, unit or relation differ, or the plans' δ differ and none
            is given.

    Guarantee:
        ε and δ hold for all phases together, in both directions of the relation, for outputs that
        depend on earlier ones (adaptive composition) with settings that do not.

    Examples:
        >>> warm_up = PrivacyPlan(
        ...     noise_multiplier=2.0, sampling_probability=0.01, steps=500, delta=1e-5
        ... )
        >>> main = PrivacyPlan(
        ...     noise_multiplier=1.0, sampling_probability=0.005, steps=1000, delta=1e-5
        ... )
        >>> print(Phases(plans=(warm_up, main)).epsilon())
        ε ≤ 0.9710 at δ = 1e-05
    """

    plans: tuple[PrivacyPlan, ...]
    delta: float

    def __init__(self, *, plans: Sequence[PrivacyPlan], delta: float | None = None) -> None:
        object.__setattr__(self, "plans", tuple(plans))
        if not self.plans:
            raise ValueError("plans is empty; a sum needs at least one phase.")
        for name in _COMMON:
            values = sorted({getattr(plan, name) for plan in self.plans})
            if len(values) > 1:
                raise ValueError(
                    f"{name} differs between the phases: {values}. A sum holds for one {name} "
                    f"only; state each phase by itself, or plan all phases with one {name}."
                )
        if delta is None:
            deltas = sorted({plan.delta for plan in self.plans})
            if len(deltas) > 1:
                raise ValueError(
                    f"delta differs between the phases: {deltas}. Give the delta of the sum."
                )
            delta = deltas[0]
        check_delta(delta)
        object.__setattr__(self, "delta", float(delta))

    @classmethod
    def from_ledgers(cls, ledgers: Sequence[Ledger], *, delta: float | None = None) -> Self:
        """Return what runs on the same data have spent so far, by their ledgers.

        Ledgers of data sets that share no unit need no sum: each ε holds for its own data.

        Args:
            ledgers: At least one; each counts with its releases, not with its plan's steps.
            delta: The δ of the sum; the plans' own unless given, if they agree.

        Raises:
            LedgerError: If one file is given twice, or two name different data sets.
            ValueError: As for `Phases`.
        """
        files: set[Path] = set()
        for ledger in ledgers:
            file = ledger.path.resolve()
            if file in files:
                raise LedgerError(f"{ledger.path} is given twice; name each ledger once.")
            files.add(file)
        named = [ledger for ledger in ledgers if ledger.data is not None]
        for ledger in named:
            if ledger.data != named[0].data:
                raise LedgerError(
                    f"{named[0].path} is of the data set {named[0].data!r} and {ledger.path} of "
                    f"{ledger.data!r}. Ledgers add up on the same data only. If no unit is in both "
                    "sets, each ε holds for its own data: ask for the ledgers one by one."
                )
        plans = [replace(ledger.plan, steps=ledger.releases) for ledger in ledgers]
        return cls(plans=plans, delta=delta)

    @property
    def mechanism(self) -> Composed:
        """Return what the engines are asked about."""
        return Composed(parts=tuple(plan.mechanism(plan.steps) for plan in self.plans))

    def epsilon(self, delta: float | None = None, *, engine: Engine | None = None) -> EpsilonBounds:
        """Return bounds on ε of all phases together.

        Args:
            delta: The δ to answer for; that of the sum unless given.
            engine: Who bounds ε; the certified engine unless given.

        Raises:
            ValueError: If `delta` is outside (0, 1).
        """
        asked = self.delta if delta is None else delta
        check_delta(asked)
        engine = CertifiedEngine() if engine is None else engine
        return engine.epsilon(self.mechanism, asked)

    def delta_at(self, epsilon: float) -> DeltaBounds:
        """Return bounds on the δ of all phases together at `epsilon`.

        Raises:
            ValueError: If `epsilon` is no number from 0 to 1e100.
        """
        check_epsilon(epsilon)
        return CertifiedEngine().delta(self.mechanism, epsilon)

    def tradeoff(self, points: int = 48) -> TradeOff:
        """Return the trade-off curve of all phases together; see `PrivacyPlan.tradeoff`."""
        return find_tradeoff(self.mechanism, points)

    def statement(self) -> str:
        """Return the guarantee in plain words; every phase is named in it."""
        return write_phases_statement(self)
