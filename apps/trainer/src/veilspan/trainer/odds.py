"""What ε and δ allow the best possible attacker."""

from __future__ import annotations

import math

_FALSE_ALARMS = (1e-2, 1e-3, 1e-4)


def detection_bounds(epsilon: float, delta: float) -> list[tuple[str, str]]:
    """Return (false alarms, most detections) for the best possible membership test.

    Source: Kairouz, Oh, Viswanath (2015), https://arxiv.org/abs/1311.0776.
    """
    rows = []
    for rate in _FALSE_ALARMS:
        by_odds = math.exp(min(epsilon, 700.0)) * rate + delta
        by_misses = 1 - math.exp(-epsilon) * (1 - rate - delta)
        rows.append((f"1 in {round(1 / rate):,}", _percent(min(by_odds, by_misses, 1.0))))
    return rows


def odds_factor(epsilon: float) -> str:
    """Write e^ε with about three digits, rounded up."""
    factor = math.exp(min(epsilon, 700.0))
    return f"{math.ceil(factor):,}" if factor >= 100 else f"{math.ceil(factor * 100) / 100:.2f}"


def _percent(share: float) -> str:
    """Write a share as a percentage, rounded up."""
    return f"{math.ceil(share * 1e4) / 1e2:.2f} %"
