"""From forecasts to a decision: the fastest strategy, or the leanest of those that tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veilspan.core.cost import Forecast

_TIED = 1.01
"""Steps whose forecasts are closer than this take about the same time."""
_PLENTY = 0.1
"""Share of the memory there is, up to which nobody waits for less of it."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A decision of the cost model, with its reason and what it was compared with."""

    name: str
    reason: str
    forecasts: tuple[Forecast, ...] = ()


def choose(forecasts: Sequence[Forecast], memory: float, *, ordinary: float = 0.0) -> Choice | None:
    """Return the fastest strategy that fits into `memory` bytes, or None if none does.

    Where it would take much of them, it is the one with the least memory of those whose steps take
    about the same time.

    Args:
        forecasts: What each strategy costs.
        memory: Bytes that a strategy may use beyond an ordinary backward pass.
        ordinary: Seconds of the micro-batch without privacy.
    """
    fitting = [forecast for forecast in forecasts if forecast.bytes <= memory]
    if not fitting:
        return None
    fastest = min(fitting, key=lambda forecast: round(forecast.seconds, 9))
    most = fastest.seconds
    if fastest.bytes > _PLENTY * memory:
        most = _TIED * (ordinary + fastest.seconds) - ordinary
    # One record alone needs no rule and no slack: the norm is that of the very numbers it adds.
    alone = next((forecast for forecast in fitting if forecast.name == "single_sample"), None)
    tied = [forecast for forecast in fitting if forecast.seconds <= most]
    best = alone or min([fastest, *tied], key=lambda forecast: forecast.bytes)
    if best is alone:
        reason = "one record a micro-batch: its gradient is the batch's own"
    else:
        reason = "fastest by the cost model"
        if best.seconds > fastest.seconds:
            reason = f"about as fast as {fastest.name}, in less memory"
        if len(fitting) < len(forecasts):
            reason += f", of those that fit into {memory / 2**20:.0f} MiB"
    return Choice(name=best.name, reason=reason, forecasts=tuple(forecasts))
