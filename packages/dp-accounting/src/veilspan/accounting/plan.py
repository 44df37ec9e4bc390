"""The privacy plan: every number that the guarantee depends on, in one frozen value."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from veilspan.accounting.bounds import DeltaBounds, EpsilonBounds
from veilspan.accounting.calibration import find_noise
from veilspan.accounting.engines import CertifiedEngine, Engine
from veilspan.accounting.engines.overflow import overflow_probability
from veilspan.accounting.mechanism import SampledGaussian, check_count, check_delta, check_epsilon
from veilspan.accounting.plan_checks import check_fields, check_plan, draws
from veilspan.accounting.sketched import SketchedClip
from veilspan.accounting.statement import write_statement
from veilspan.accounting.tradeoff import TradeOff, find_tradeoff

SCHEMA = "veilspan.accounting.plan/1"
# Not written where they have these values, as plans without them have digests that ledgers hold.
_LEFT_OUT = {"batch_cap": None, "most_records": None, "norms": None, "records_per_unit": 1}


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What is released, how often, with how much noise, and about whom.

    Sampler, clipper and ledger are built from one plan, so that no number is typed twice.

    Args:
        noise_multiplier: σ, the noise standard deviation divided by `clip_norm`; 0 means no noise
            and an infinite ε.
        sampling_probability: q, the chance of each record to be in a step's batch; with
            "without_replacement" the batch size over the number of records.
        steps: Number of releases the plan allows for; empty batches are releases too.
        delta: δ, the probability the guarantee may fail with; far below 1 / number of records.
        clip_norm: Sensitivity of the sum: the L2 norm that one record's contribution never
            exceeds, over all groups together, unless `norms` are estimated. Infinite only where
            `noise_multiplier` is 0.
        expected_batch_size: The public constant by which sums are divided, in records; `None`
            where it is not known to the plan. ε does not depend on it.
        unit: Whose presence is hidden, in the singular: "record", "document", "user".
        sampling: Sampling law: "poisson", every record independently with chance q;
            "truncated_poisson", the same with samples cut to `batch_cap`; "without_replacement", a
            batch of one size for "replace"; "full_batch", every record in every step.
        relation: Neighbouring relation: "add_remove", one unit more or less; or "replace", one unit
            exchanged for another, which costs more.
        noise_stream: Where the noise comes from: "aes-ctr" or "chacha20" (cryptographic), or
            "philox", which is not.
        batch_cap: With "truncated_poisson", the most records a step processes; a larger sample is
            cut in any way. The chance of a cut is charged to δ.
        most_records: With "truncated_poisson", a public bound on the number of records.
        norms: How the norms are estimated by which contributions are clipped, as the clipper
            reports it; `None` where they are exact. A contribution may then exceed `clip_norm`, by
            a law that is counted; with "add_remove" and sampling only.
        records_per_unit: The most records that one unit holds. Each is drawn and clipped by itself;
            more than 1 with "add_remove" and exact norms only. Nobody checks it: bound them when
            the data set is made.

    Raises:
        ValueError: If a value is out of range or a name is unknown.

    Examples:
        >>> plan = PrivacyPlan(
        ...     noise_multiplier=1.0, sampling_probability=0.01, steps=1000, delta=1e-5
        ... )
        >>> print(plan.epsilon())
        ε ≤ 1.829 at δ = 1e-05
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    delta: float
    clip_norm: float = 1.0
    expected_batch_size: float | None = None
    unit: str = "record"
    sampling: str = "poisson"
    relation: str = "add_remove"
    noise_stream: str = "aes-ctr"
    batch_cap: int | None = None
    most_records: int | None = None
    norms: SketchedClip | None = None
    records_per_unit: int = 1

    def __post_init__(self) -> None:
        check_plan(self)
        # 64 and 64.0 are one plan and must have one digest.
        for field in fields(self):
            value = getattr(self, field.name)
            if "float" in str(field.type) and value is not None:
                object.__setattr__(self, field.name, float(value))

    @classmethod
    def calibrate(  # noqa: PLR0913 - the fields of a plan, with the target in place of the noise
        cls,
        *,
        target_epsilon: float,
        delta: float,
        sampling_probability: float,
        steps: int,
        clip_norm: float = 1.0,
        expected_batch_size: float | None = None,
        unit: str = "record",
        sampling: str = "poisson",
        relation: str = "add_remove",
        noise_stream: str = "aes-ctr",
        batch_cap: int | None = None,
        most_records: int | None = None,
        norms: SketchedClip | None = None,
        records_per_unit: int = 1,
    ) -> Self:
        """Return the plan with the least noise that is certified to keep `target_epsilon`.

        Args:
            target_epsilon: The ε that must not be exceeded after `steps` releases; above 0.
            delta: As for the plan, like all further arguments.
            sampling_probability: See the class.
            steps: See the class.
            clip_norm: See the class.
            expected_batch_size: See the class.
            unit: See the class.
            sampling: See the class.
            relation: See the class.
            noise_stream: See the class.
            batch_cap: See the class.
            most_records: See the class.
            norms: See the class.
            records_per_unit: See the class.

        Raises:
            ValueError: If an argument is out of range or the target cannot be reached.

        Guarantee:
            `plan.epsilon().upper <= target_epsilon`, and the noise multiplier is at most 0.1 %
            above the smallest one for which that can be certified.

        Examples:
            >>> plan = PrivacyPlan.calibrate(
            ...     target_epsilon=8.0, delta=1e-7, sampling_probability=1 / 512, steps=4000
            ... )
            >>> plan.epsilon().upper <= 8.0
            True
        """
        rest: dict[str, Any] = {
            "delta": delta,
            "sampling_probability": sampling_probability,
            "steps": steps,
            "clip_norm": clip_norm,
            "expected_batch_size": expected_batch_size,
            "unit": unit,
            "sampling": sampling,
            "relation": relation,
            "noise_stream": noise_stream,
            "batch_cap": batch_cap,
            "most_records": most_records,
            "norms": norms,
            "records_per_unit": records_per_unit,
        }
        draft = cls(noise_multiplier=1.0, **rest)  # refuses other arguments before the search
        bracket = find_noise(draft.mechanism(steps), target_epsilon, delta)
        return cls(noise_multiplier=bracket.noise_multiplier, **rest)

    def epsilon(self, delta: float | None = None, *, engine: Engine | None = None) -> EpsilonBounds:
        """Return bounds on ε after all of the plan's steps.

        Args:
            delta: The δ to answer for; the plan's own unless given.
            engine: Who bounds ε; the certified engine unless given.

        Raises:
            ValueError: If `delta` is outside (0, 1).

        Guarantee:
            The run is (`upper`, `delta`)-differentially private in both directions of the plan's
            relation, under the assumptions that `statement` names.
        """
        return self.epsilon_after(self.steps, delta, engine=engine)

    def epsilon_after(
        self, steps: int, delta: float | None = None, *, engine: Engine | None = None
    ) -> EpsilonBounds:
        """Return bounds on ε after `steps` releases, which may exceed the plan's.

        Args:
            steps: Number of releases; at least 0.
            delta: The δ to answer for; the plan's own unless given.
            engine: Who bounds ε; the certified engine unless given.

        Raises:
            ValueError: If `steps` or `delta` is out of range.

        Guarantee:
            As for `epsilon`; the releases may depend on earlier ones (adaptive composition).
        """
        check_count("steps", steps)
        asked = self.delta if delta is None else delta
        check_delta(asked)
        engine = CertifiedEngine() if engine is None else engine
        return engine.epsilon(self.mechanism(steps), asked)

    def delta_at(self, epsilon: float) -> DeltaBounds:
        """Return bounds on the δ that belongs to an ε, after all of the plan's steps.

        Args:
            epsilon: The ε to answer for; at least 0.

        Raises:
            ValueError: If `epsilon` is no number from 0 to 1e100.

        Guarantee:
            The run is (`epsilon`, `upper`)-differentially private in both directions of the plan's
            relation, under the assumptions that `statement` names.
        """
        check_epsilon(epsilon)
        return CertifiedEngine().delta(self.mechanism(self.steps), epsilon)

    def tradeoff(self, points: int = 48) -> TradeOff:
        """Return what any test for one unit's presence must put up with: its errors, at least.

        Args:
            points: Number of certified (ε, δ) that the curve is made of; more are tighter.

        Raises:
            ValueError: If `points` is below 2.

        Guarantee:
            As for `epsilon`, at every rate of false alarms.
        """
        return find_tradeoff(self.mechanism(self.steps), points)

    def mechanism(self, steps: int) -> SampledGaussian:
        """Return what the engines are asked about: `steps` releases of this plan."""
        return SampledGaussian(
            noise_multiplier=self.noise_multiplier,
            sampling_probability=self.sampling_probability,
            steps=steps,
            relation=self.relation,
            overflow=self._overflow,
            norms=self.norms,
            records_per_unit=self.records_per_unit,
            sampling=draws(self),
        )

    @property
    def _overflow(self) -> float:
        if self.batch_cap is None or self.most_records is None:
            return 0.0
        return overflow_probability(self.most_records, self.sampling_probability, self.batch_cap)

    @property
    def cut_probability(self) -> float:
        """Return the chance, at most, that any step of the plan has to cut its sample."""
        return min(self.steps * self._overflow, 1.0)

    def statement(self) -> str:
        """Return the guarantee in plain words, with every assumption it rests on."""
        return write_statement(self)

    @property
    def digest(self) -> str:
        """Return a SHA-256 of the plan's contents: equal plans, equal digests, on any machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the schema as plain values; an infinite number becomes "inf"."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, default in _LEFT_OUT.items():
            if values[name] == default:
                del values[name]
        for name, value in values.items():
            if isinstance(value, float) and math.isinf(value):
                values[name] = "inf"
            elif isinstance(value, SketchedClip):
                values[name] = asdict(value)
        return {"schema": SCHEMA, **values}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the plan that `to_dict` described.

        Raises:
            ValueError: If the schema is not one this version reads, or fields are unknown, missing
                or out of range.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else data
            raise ValueError(
                f"schema of the privacy plan is {found!r}; this version reads {SCHEMA!r}."
            )
        values = {name: value for name, value in data.items() if name != "schema"}
        check_fields(set(values), {f.name for f in fields(cls)})
        if values.get("clip_norm") == "inf":
            values["clip_norm"] = math.inf
        if isinstance(values.get("norms"), dict):
            values["norms"] = SketchedClip.from_dict(values["norms"])
        return cls(**values)

    def to_json(self) -> str:
        """Return the plan as one line of JSON with sorted keys, the same on every machine."""
        return json.dumps(self.to_dict(), sort_keys=True, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the plan that `to_json` wrote.

        Raises:
            ValueError: If `text` is not JSON or not a plan.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The privacy plan is not valid JSON: {error}.") from error
        return cls.from_dict(data)
