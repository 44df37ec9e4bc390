"""What an accountant answers: ε or δ as a lower bound, an estimate, an upper bound."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, Literal

Direction = Literal["remove", "add", "both"]


@dataclass(frozen=True, kw_only=True)
class EpsilonBounds:
    """Bounds on the smallest ε for which the mechanism is (ε, δ)-differentially private.

    Only `upper` may be reported: it holds in both directions of the neighbouring relation.

    Args:
        lower: The true ε is at least this; where norms are estimated, the ε of the law which stands
            for the estimates.
        estimate: A number between the two bounds, for plots and comparisons.
        upper: The true ε is at most this; infinity where nothing is guaranteed.
        delta: The δ that the three numbers belong to.
        direction: Which change of the data set decided `upper`; "both" where they are equal.
        method: The engine that answered.

    Raises:
        ValueError: If the three numbers are not ordered.

    Guarantee:
        Whoever builds one promises `lower ≤ ε ≤ upper` for the exact ε of the mechanism under
        its neighbouring relation, rounding of the last digits of a double included.
    """

    lower: float
    estimate: float
    upper: float
    delta: float
    direction: Direction
    method: str

    def __post_init__(self) -> None:
        if not 0 <= self.lower <= self.estimate <= self.upper:
            raise ValueError(
                f"Bounds on ε are not ordered: lower {self.lower}, estimate {self.estimate}, "
                f"upper {self.upper}; they must satisfy 0 ≤ lower ≤ estimate ≤ upper."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary of plain numbers and text."""
        return asdict(self)

    def __str__(self) -> str:
        return f"ε ≤ {round_up(self.upper)} at δ = {at_least(self.delta)}"


@dataclass(frozen=True, kw_only=True)
class DeltaBounds:
    """Bounds on the smallest δ for which the mechanism is (ε, δ)-differentially private.

    Only `upper` may be reported.

    Args:
        lower: The true δ is at least this; where norms are estimated, the δ of the law which stands
            for the estimates.
        estimate: A number between the two bounds.
        upper: The true δ is at most this; 1 where nothing is guaranteed.
        epsilon: The ε that the three numbers belong to.
        direction: Which change of the data set decided `upper`; "both" where they are equal.
        method: The engine that answered.

    Raises:
        ValueError: If the three numbers are not ordered.

    Guarantee:
        Whoever builds one promises `lower ≤ δ(ε) ≤ upper` for the exact δ of the mechanism under
        its neighbouring relation, rounding of the last digits of a double included.
    """

    lower: float
    estimate: float
    upper: float
    epsilon: float
    direction: Direction
    method: str

    def __post_init__(self) -> None:
        if not 0 <= self.lower <= self.estimate <= self.upper <= 1:
            raise ValueError(
                f"Bounds on δ are not ordered: lower {self.lower}, estimate {self.estimate}, "
                f"upper {self.upper}; they must satisfy 0 ≤ lower ≤ estimate ≤ upper ≤ 1."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary of plain numbers and text."""
        return asdict(self)

    def __str__(self) -> str:
        return f"δ ≤ {round_up_short(self.upper)} at ε = {at_least(self.epsilon)}"


def round_up(value: float, digits: int = 4) -> str:
    """Write a non-negative number with `digits` significant digits, rounded up, never down.

    Examples:
        >>> round_up(7.99901), round_up(0.0123411), round_up(float("inf"))
        ('8.000', '0.01235', 'infinity')
    """
    if math.isinf(value):
        return "infinity"
    if value == 0:
        return "0"
    exact = Decimal(value)
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{exact.quantize(step, rounding=ROUND_CEILING):f}"


def round_up_short(value: float, digits: int = 4) -> str:
    """Write a non-negative number as `round_up` does, with an exponent where it is tiny.

    Examples:
        >>> round_up_short(3.00001e-9), round_up_short(0.25)
        ('3.001e-9', '0.2500')
    """
    if value == 0 or math.isinf(value) or value >= 1e-3:
        return round_up(value, digits)
    exact = Decimal(value)
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{exact.quantize(step, rounding=ROUND_CEILING):e}"


def at_least(value: float, digits: int = 6) -> str:
    """Write a non-negative number as short as `:g` does, and rounded up where that would be less.

    Examples:
        >>> at_least(1e-5), at_least(1 / 70_000)
        ('1e-05', '1.42858e-5')
    """
    short = f"{value:.{digits}g}"
    return short if float(short) >= value else round_up_short(value, digits)


def at_most(value: float, digits: int = 6) -> str:
    """Write a non-negative number as short as `:g` does, and rounded down where that would be more.

    Examples:
        >>> at_most(2.0), at_most(123.4567)
        ('2', '123.456')
    """
    short = f"{value:.{digits}g}"
    if float(short) <= value:
        return short
    exact = Decimal(value)
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{float(exact.quantize(step, rounding=ROUND_FLOOR)):.{digits}g}"
