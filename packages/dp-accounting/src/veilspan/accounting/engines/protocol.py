"""What every accounting engine offers."""

from __future__ import annotations

from typing import Protocol

from veilspan.accounting.bounds import EpsilonBounds
from veilspan.accounting.mechanism import Mechanism


class EngineError(RuntimeError):
    """An engine was asked for a case outside the range in which its answer is a valid bound."""


class Engine(Protocol):
    """Bound the ε of a mechanism in both directions of its neighbouring relation."""

    def epsilon(self, mechanism: Mechanism, delta: float) -> EpsilonBounds:
        """Return bounds on ε at `delta`.

        Raises:
            EngineError: If the engine cannot give a valid bound for this case.

        Guarantee:
            `upper` is at least the exact ε in both directions.
        """
        ...
