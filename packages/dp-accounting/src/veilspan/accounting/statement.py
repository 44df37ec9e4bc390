"""The privacy statement: the guarantee and its assumptions in plain words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from veilspan.accounting.bounds import EpsilonBounds, at_least, at_most, round_up

if TYPE_CHECKING:
    from veilspan.accounting.phases import Phases
    from veilspan.accounting.plan import PrivacyPlan
    from veilspan.accounting.sketched import SketchedClip

_STREAMS = {
    "aes-ctr": (
        "The noise comes from AES-256 in counter mode, a cryptographic stream that nobody is "
        "known to tell from true randomness without its key."
    ),
    "chacha20": (
        "The noise comes from ChaCha20, a cryptographic stream that nobody is known to tell from "
        "true randomness without its key."
    ),
    "philox": (
        "The noise comes from Philox, a fast statistical generator keyed by the operating system. "
        "It passes statistical tests but is not cryptographic: an adversary who recovers its state "
        "from the releases recovers the noise."
    ),
}

_CHANGES = {
    "add_remove": "adding or removing one {unit}",
    "replace": "replacing one {unit} by another",
}
_QUESTIONS = {
    "add_remove": "whether a given {unit} was in the training data",
    "replace": "which of two given {unit}s was in the training data",
}
_RELATIONS = {
    "add_remove": (
        "The neighbouring relation is add or remove: data sets that differ by one {unit}. "
        "Replacing one {unit} by another counts as two changes."
    ),
    "replace": (
        "The neighbouring relation is replace: data sets of one size in which one {unit} differs. "
        "How many {unit}s there are is taken to be public."
    ),
}

_NOT_COVERED = (
    "Choosing hyper-parameters by looking at several runs: every run whose result was looked at "
    "has spent a budget of its own.",
    "A tokenizer, vocabulary, filter or deduplication that was fitted to the private data, and "
    "anything else computed from it outside the counted releases.",
    "Held-out data: metrics on it are about its own records, which this statement does not "
    "protect.",
    "Floating point: noise is drawn in finite precision, and the proof is about real numbers.",
    "Timing, memory and other side channels of the machines that trained.",
)


def write_statement(plan: PrivacyPlan) -> str:
    """Return the statement of a plan, as Markdown paragraphs; ε is always rounded up."""
    return _write(_guarantee((plan,), plan.epsilon()), _assumptions(plan))


def write_phases_statement(phases: Phases) -> str:
    """Return the statement of several phases on the same data; it names each of them."""
    plans = phases.plans
    most = max(plan.records_per_unit for plan in plans)
    lines = [
        "The phases ran one after the other on the same data, and no others did. The settings of "
        "each were fixed without looking at what earlier ones released.",
        *(f"Phase {number}: {_phase(plan)}" for number, plan in enumerate(plans, start=1)),
        *dict.fromkeys(line for plan in plans for line in _shared_assumptions(plan, most)),
        _delta_line(phases.delta, plans[0].unit, ""),
    ]
    return _write(_guarantee(plans, phases.epsilon()), lines)


def _write(guarantee: str, lines: list[str]) -> str:
    assumptions = "\n".join(f"- {line}" for line in lines)
    not_covered = "\n".join(f"- {line}" for line in _NOT_COVERED)
    return f"{guarantee}\n\nThis holds if\n\n{assumptions}\n\nIt does not cover\n\n{not_covered}\n"


def _guarantee(plans: tuple[PrivacyPlan, ...], bounds: EpsilonBounds) -> str:
    if math.isinf(bounds.upper):
        return (
            "NO PRIVACY GUARANTEE: the noise multiplier is 0, samples are cut too often, or norms "
            "are estimated from too few probes for so little noise, so ε is infinite. "
            "Use this for tests and debugging only."
        )
    unit, relation = plans[0].unit, plans[0].relation
    releases = f"{sum(plan.steps for plan in plans):,} noisy releases"
    if len(plans) > 1:
        releases += f" in {len(plans)} phases"
    least = (
        "the exact ε is at least"
        if all(plan.norms is None for plan in plans)
        else "that of the law which stands for estimated norms is at least"
    )
    return (
        f"After {releases} the trained model and everything released with it are "
        f"(ε, δ)-differentially private with ε ≤ {round_up(bounds.upper)} and "
        f"δ = {at_least(bounds.delta)}, with respect to {_CHANGES[relation].format(unit=unit)}. "
        f"Whatever is published, nobody can tell {_QUESTIONS[relation].format(unit=unit)} "
        f"with odds more than e^ε times what they were before, except with probability δ. "
        f"The number is an upper bound ({bounds.method}; both directions counted, the worse one "
        f"printed); {least} {at_most(bounds.lower)}."
    )


def _assumptions(plan: PrivacyPlan) -> list[str]:
    shared = _shared_assumptions(plan, plan.records_per_unit)
    lines = [
        _sampling(plan),
        *shared[:3],
        _contribution(plan),
        _STREAMS[plan.noise_stream],
        _delta_line(plan.delta, plan.unit, _records(plan)),
        shared[-1],
    ]
    return [*lines, *_divisor(plan)]


def _phase(plan: PrivacyPlan) -> str:
    parts = [f"{plan.steps:,} steps.", _sampling(plan), _contribution(plan), *_divisor(plan)]
    return " ".join(parts)


def _record(plan: PrivacyPlan) -> str:
    """Return what is drawn and clipped: the unit, or one of its records."""
    return plan.unit if plan.records_per_unit == 1 else "record"


def _sampling(plan: PrivacyPlan) -> str:
    if plan.records_per_unit == 1:
        return _drawn(plan)
    return (
        f"Each {plan.unit} holds at most {plan.records_per_unit:,} records; each record is drawn "
        "and clipped by itself. Nobody checks the number here: bound contributions when the data "
        f"set is made. {_drawn(plan)}"
    )


def _drawn(plan: PrivacyPlan) -> str:
    one = _record(plan)
    if plan.sampling == "full_batch":
        return f"Every {one} is in every step (full batch), so no sample hides it."
    if plan.sampling == "without_replacement":
        return (
            f"The batch of each step holds one and the same share, {plan.sampling_probability:g}, "
            f"of the {one}s, a whole number of them. It is drawn afresh, every set of that many "
            f"{one}s as likely as any other (without replacement). Shuffled batches would not do."
        )
    cut = ""
    if plan.sampling == "truncated_poisson":
        cut = (
            f". There are never more than {plan.most_records:,} {one}s, and a batch of more "
            f"than {plan.batch_cap:,} is cut to that many (truncated Poisson sampling), which "
            "happens in any of the steps with probability at most "
            f"{at_least(plan.cut_probability, 2)} and is charged to δ"
        )
    return (
        f"Every {one} enters the batch of each step independently with probability "
        f"{plan.sampling_probability:g} (Poisson sampling){cut}; empty batches are steps too. "
        "Shuffled batches would not do."
    )


def _contribution(plan: PrivacyPlan) -> str:
    if plan.noise_multiplier == 0:
        return "No noise is added."
    if plan.norms is not None:
        return _estimated(plan, plan.norms)
    return (
        f"The contribution of each {_record(plan)} to a step's sum has L2 norm at most "
        f"{plan.clip_norm:g} (clip norm), over all parameters together, and Gaussian noise of "
        f"standard deviation {plan.noise_multiplier * plan.clip_norm:g} per coordinate is added "
        f"(noise multiplier {plan.noise_multiplier:g})."
    )


def _estimated(plan: PrivacyPlan, norms: SketchedClip) -> str:
    unit, blocks, groups = plan.unit, "", ""
    if norms.blocks > 1:
        blocks = f", the largest mean of {norms.blocks} blocks of {norms.probes // norms.blocks}"
    if norms.groups > 1:
        groups = (
            f" The parameters are clipped in {norms.groups} groups of equal thresholds, "
            f"{plan.clip_norm:g}/√{norms.groups}, by independent estimates."
        )
    probes = (
        f"shared by all {unit}s of a step, so that how far they exceed the clip norm counts as "
        "revealed"
        if norms.probes_shared
        else f"every {unit} has secret ones of its own in every step"
    )
    return (
        f"The contribution of each {unit} to a step's sum is clipped to L2 norm "
        f"{plan.clip_norm:g} (clip norm), over all parameters together, by an estimate of its norm "
        f"from {norms.probes} Gaussian probes{blocks}: {probes}.{groups} A contribution may "
        "therefore exceed the clip norm; by how much and how often at most, whatever the "
        f"{unit}, is proved and counted in ε. This takes probes that are independent of the data "
        "and of each other, drawn afresh for every attempt at a step and never used again. "
        "Gaussian noise of standard deviation "
        f"{plan.noise_multiplier * plan.clip_norm:g} per coordinate is added (noise multiplier "
        f"{plan.noise_multiplier:g})."
    )


def _divisor(plan: PrivacyPlan) -> list[str]:
    if plan.expected_batch_size is None:
        return []
    return [
        f"Sums are divided by the public constant {plan.expected_batch_size:g}, not by the "
        "size of the batch that was drawn."
    ]


def _delta_line(delta: float, unit: str, records: str) -> str:
    return (
        f"δ = {at_least(delta)} is small for this data set. It is the chance that the bound on ε "
        f"fails; it must be far below one over the number of {unit}s{records}."
    )


def _shared_assumptions(plan: PrivacyPlan, most: int) -> list[str]:
    """Return what holds for every phase alike; the noise stream is the last but one.

    Args:
        plan: The phase.
        most: The most records that a unit holds in any phase.
    """
    return [
        "The key of the noise is random, secret, and never published: who knows it can undo it."
        if plan.sampling == "full_batch"
        else "The keys of the sampler and of the noise are random, secret, and never published: "
        "who knows them can undo both.",
        _RELATIONS[plan.relation].format(unit=plan.unit),
        f"The unit of privacy is one {plan.unit}. Whoever contributed several is protected less: "
        "k of them are a group of size k."
        if most == 1
        else f"The unit of privacy is one {plan.unit} with all of its records. Whoever contributed "
        f"more than is said here, also as several {plan.unit}s, is protected less.",
        _STREAMS[plan.noise_stream],
        "Every attempt at a step is counted, also one that crashed, as the ledger does.",
    ]


def _records(plan: PrivacyPlan) -> str:
    if plan.expected_batch_size is None or plan.sampling_probability == 0:
        return ""
    if plan.records_per_unit > 1:  # how many units the records belong to is not known here
        return ""
    records = plan.expected_batch_size / plan.sampling_probability
    return f", which is 1/{records:,.0f} = {1 / records:.1e} going by the expected batch size"
