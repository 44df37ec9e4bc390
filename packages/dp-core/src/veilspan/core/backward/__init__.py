"""Backward strategies: what is kept of a micro-batch until its clipping factors are known."""

from __future__ import annotations

from veilspan.core.backward.base import Backward, Workspace
from veilspan.core.backward.bookkeeping import BookKeeping, PerLayerClipping
from veilspan.core.backward.per_sample import PerSample
from veilspan.core.backward.single_sample import SingleSample
from veilspan.core.backward.two_pass import TwoPass

__all__ = ["STRATEGIES", "Backward", "Workspace"]

STRATEGIES: dict[str, Backward] = {
    strategy.name: strategy
    for strategy in (SingleSample(), PerSample(), BookKeeping(), TwoPass(), PerLayerClipping())
}
