"""The gate between a clipped sum and its noise: first the ledger, then everybody goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Literal, Protocol

from veilspan.accounting import BudgetExceeded, Ledger, LedgerError, PrivacyPlan, SketchedClip
from veilspan.core import Release
from veilspan.trainer.processes import Processes

Moment = Literal["before_ledger", "after_ledger", "after_optimizer", "during_save"]


class Observer(Protocol):
    """Somebody who is told where in a step the run is; gets no value that depends on data.

    The crash tests end the process here. Whatever an observer raises ends the run like any other
    error: everything that is already in the ledger counts.
    """

    def at(self, moment: Moment, step: int) -> None:
        """Take notice of a moment of a step."""
        ...


class Unobserved:
    """The observer of ordinary runs."""

    def at(self, moment: Moment, step: int) -> None:
        """Do nothing."""


class ReleaseGate:
    """Record each release in the ledger before any process draws its noise.

    Args:
        ledger: The ledger on the first process, None on the others.
        processes: Who waits for it.
        observer: Told before and after.

    Guarantee:
        When a call returns on any process, the release is on the first process's disk. If it
        cannot be recorded or would exceed the budget, the call raises on every process, so nobody
        adds noise, and nothing is released.
    """

    def __init__(self, ledger: Ledger | None, processes: Processes, observer: Observer) -> None:
        self._ledger = ledger
        self._processes = processes
        self._observer = observer

    def __call__(self, release: Release) -> None:
        """Record one release.

        Raises:
            LedgerError: If it cannot be recorded, or is not what the plan counts.
            BudgetExceeded: If the budget does not allow it.
        """
        self._observer.at("before_ledger", release.step)
        with self._processes.together():
            if self._ledger is not None:
                _require_covered(release, self._ledger.plan)
                attempt = self._ledger.next_attempt(release.step)
                self._ledger.append(step=release.step, attempt=attempt)
        self._observer.at("after_ledger", release.step)

    def require_budget(self, further: Callable[[], None] = lambda: None) -> None:
        """Raise before any work is done on a step that the budget does not allow.

        Args:
            further: Another check of each process, in the same exchange of messages; what it raises
                on one process, all raise.

        Raises:
            BudgetExceeded: On every process.
        """
        with self._processes.together():
            further()
            if self._ledger is not None:
                _require_budget(self._ledger)


def _require_covered(release: Release, plan: PrivacyPlan) -> None:
    """Refuse a release that costs more than the plan counts for it.

    Raises:
        LedgerError: Naming what differs.
    """
    law = None if release.norms is None else SketchedClip(**asdict(release.norms))
    if law is not None and law != plan.norms:
        raise LedgerError(
            f"The step takes norms by {law}, but the plan counts {plan.norms or 'exact norms'}. "
            "Build the plan with norms= of the step."
        )
    if release.noise_multiplier < plan.noise_multiplier:
        raise LedgerError(
            f"The step adds noise of multiplier {release.noise_multiplier}, but the plan counts "
            f"{plan.noise_multiplier}. Build both from one plan."
        )


def _require_budget(ledger: Ledger) -> None:
    most = ledger.most_releases
    if most is not None and ledger.releases >= most:
        raise BudgetExceeded(
            f"All {most} releases that the budget of ε = {ledger.budget_epsilon:g} allows are "
            "spent."
        )
