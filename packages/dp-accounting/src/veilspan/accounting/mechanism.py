"""The mechanisms whose privacy loss is counted: Poisson-sampled Gaussians, repeated."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from veilspan.accounting.sketched import SketchedClip

RELATIONS = ("add_remove", "replace")
_DRAWS = ("poisson", "without_replacement")
_MOST_RECORDS_PER_UNIT = 1_000_000
_LARGEST_COUNT = 10**15
_LARGEST_EPSILON = 1e100


@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """`steps` releases, each a sum over a fresh Poisson sample plus Gaussian noise.

    With the sensitivity scaled to 1, one release on a data set with the record of interest is
    distributed as `(1 - q) N(0, σ²) + q N(1, σ²)`, and without it as `N(0, σ²)`. With another value
    of the record it is at worst `(1 - q) N(0, σ²) + q N(-1, σ²)`. Where norms are estimated, the 1
    is replaced by a random size that may exceed it; where a unit may hold several records, by the
    random number of them that are in the sample.

    Args:
        noise_multiplier: σ, the noise standard deviation divided by the sensitivity; at least 0.
        sampling_probability: q, the chance of each record to be in a step's sample; in [0, 1].
        steps: Number of releases T; at least 0.
        relation: What two data sets may differ in: one record more or less ("add_remove"), or the
            value of one record ("replace").
        overflow: Chance, at most, that one step's sample is larger than what is processed, so that
            it is cut; 0 where samples of any size are.
        norms: How the norms are estimated by which contributions are clipped; `None` where they are
            exact, so that no contribution exceeds the threshold. For "add_remove" and
            `sampling_probability` below 1 only.
        records_per_unit: k, the most records that the unit of interest holds, each of them drawn
            and clipped by itself. Above 1 for "add_remove" and exact norms only.
        sampling: How a step's sample is drawn: each record by a chance of its own ("poisson"), or
            a share q of all records, every such share as likely as any other
            ("without_replacement"; for "replace", as the number of records is then public).

    Raises:
        ValueError: If an argument is outside its range, or `norms` or several records of a unit
            are given where nothing is proved.

    Examples:
        >>> SampledGaussian(noise_multiplier=1.0, sampling_probability=0.01, steps=1000).steps
        1000
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    relation: str = "add_remove"
    overflow: float = 0.0
    norms: SketchedClip | None = None
    records_per_unit: int = 1
    sampling: str = "poisson"

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier)
        if not self.noise_multiplier >= 0:
            raise ValueError(
                f"noise_multiplier is {self.noise_multiplier}; it must be at least 0 "
                "(0 adds no noise and has an infinite ε)."
            )
        check_probability("sampling_probability", self.sampling_probability)
        check_count("steps", self.steps)
        check_probability("overflow", self.overflow)
        if self.relation not in RELATIONS:
            choices = " or ".join(repr(relation) for relation in RELATIONS)
            raise ValueError(
                f"relation is {self.relation!r}; supported is {choices}. "
                "The noise for one relation is not the noise for another."
            )
        self._check_draws()
        self._check_norms()
        self._check_records()

    def _check_draws(self) -> None:
        if self.sampling not in _DRAWS:
            choices = " or ".join(repr(draws) for draws in _DRAWS)
            raise ValueError(f"sampling is {self.sampling!r}; supported is {choices}.")
        if self.sampling == "without_replacement" and self.relation != "replace":
            raise ValueError(
                f"sampling is 'without_replacement' and relation is {self.relation!r}: batches of "
                "a fixed share of the records show how many records there are, so that one more or "
                "less is not hidden. Use relation='replace'."
            )

    def _check_records(self) -> None:
        count = self.records_per_unit
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"records_per_unit is {count!r}; it must be a whole number of at least 1: the most "
                "records that one unit holds."
            )
        if count > _MOST_RECORDS_PER_UNIT:
            raise ValueError(
                f"records_per_unit is {count}; it must be at most {_MOST_RECORDS_PER_UNIT}. Bound "
                "the records of each unit when the data set is made."
            )
        if count > 1 and (self.norms is not None or self.relation != "add_remove"):
            raise ValueError(
                f"records_per_unit is {count}: several records of a unit are counted for "
                "relation='add_remove' and exact norms (norms=None) only. Use these, or keep one "
                "record of each unit (records_per_unit=1)."
            )

    def _check_norms(self) -> None:
        if self.norms is None:
            return
        if not isinstance(self.norms, SketchedClip):
            raise ValueError(f"norms is {self.norms!r}; it must be a SketchedClip, or None.")
        if self.relation != "add_remove":
            raise ValueError(
                f"norms are estimated and relation is {self.relation!r}: contributions that may "
                "exceed the threshold are counted for 'add_remove' only. Use relation='add_remove' "
                "or exact norms (norms=None)."
            )
        if self.sampling_probability == 1:
            raise ValueError(
                "norms are estimated and sampling_probability is 1: this is not counted here. Use "
                "exact norms (norms=None), or a sampling_probability below 1."
            )

    @property
    def distance(self) -> float:
        """Return how far apart two outputs without noise can be, a contribution's norm being 1."""
        return 2.0 if self.relation == "replace" else float(self.records_per_unit)

    @property
    def parts(self) -> tuple[SampledGaussian, ...]:
        """Return this mechanism as a composition of one phase."""
        return (self,)


@dataclass(frozen=True, kw_only=True)
class Composed:
    """Several phases on the same data, one after the other; equal phases are merged.

    Args:
        parts: The phases, at least one. Their settings must not depend on what earlier phases
            released.

    Raises:
        ValueError: If there is no phase, or the phases' relations differ.

    Examples:
        >>> warm_up = SampledGaussian(noise_multiplier=2.0, sampling_probability=0.01, steps=100)
        >>> Composed(parts=(warm_up, warm_up)).parts[0].steps
        200
    """

    parts: tuple[SampledGaussian, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts is empty; a composition needs at least one phase.")
        if len({part.relation for part in self.parts}) > 1:
            raise ValueError("relation differs between the phases; a sum holds for one relation.")
        steps: dict[SampledGaussian, int] = {}
        for part in self.parts:
            kind = replace(part, steps=1)
            steps[kind] = steps.get(kind, 0) + part.steps
        merged = tuple(replace(kind, steps=count) for kind, count in steps.items())
        object.__setattr__(self, "parts", merged)

    @property
    def steps(self) -> int:
        """Return the number of releases of all phases together."""
        return sum(part.steps for part in self.parts)


Mechanism = SampledGaussian | Composed


def check_number(name: str, value: object) -> float:
    """Return `value` if it is a real number (infinity allowed, NaN and bool not).

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"{name} is {value!r}; it must be a number.")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} is beyond the range of a double; it must be a number in it.")
    return value


def check_probability(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a number in [0, 1]."""
    if not 0 <= check_number(name, value) <= 1:
        raise ValueError(f"{name} is {value!r}; it must lie in [0, 1].")


def check_count(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a whole number from 0 to 10^15."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 0.")
    if value > _LARGEST_COUNT:
        raise ValueError(f"{name} is above 10^15; it must be at most that.")


def check_delta(value: object) -> None:
    """Raise `ValueError` unless `value` is a number strictly between 0 and 1."""
    if not 0 < check_number("delta", value) < 1:
        raise ValueError(
            f"delta is {value!r}; it must lie strictly between 0 and 1, "
            "and well below 1 / (number of records) to mean anything."
        )


def check_epsilon(value: object) -> None:
    """Raise `ValueError` unless `value` is a number from 0 to 1e100."""
    if not 0 <= check_number("epsilon", value) <= _LARGEST_EPSILON:
        raise ValueError(f"epsilon is {value!r}; it must lie from 0 to {_LARGEST_EPSILON:g}.")
