"""The privacy statement: the guarantee and its assumptions in plain words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from veilspan.accounting.bounds import EpsilonBounds, round_up

if TYPE_CHECKING:
    from veilspan.accounting.plan import PrivacyPlan

_STREAMS = {
    "aes-ctr": (
        "The noise comes from AES-256 in counter mode, a cryptographic stream that nobody is "
        "known to tell from true randomness without its key."
    ),
    "philox": (
        "The noise comes from Philox, a fast statistical generator keyed by the operating system. "
        "It passes statistical tests but is not cryptographic: an adversary who recovers its state "
        "from the releases recovers the noise."
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
    bounds = plan.epsilon()
    assumptions = "\n".join(f"- {line}" for line in _assumptions(plan))
    not_covered = "\n".join(f"- {line}" for line in _NOT_COVERED)
    return (
        f"{_guarantee(plan, bounds)}\n\n"
        f"This holds if\n\n{assumptions}\n\n"
        f"It does not cover\n\n{not_covered}\n"
    )


def _guarantee(plan: PrivacyPlan, bounds: EpsilonBounds) -> str:
    if math.isinf(bounds.upper):
        return (
            "NO PRIVACY GUARANTEE: the noise multiplier is 0, so ε is infinite. "
            "Use this for tests and debugging only."
        )
    return (
        f"After {plan.steps:,} steps the trained model and everything released with it are "
        f"(ε, δ)-differentially private with ε ≤ {round_up(bounds.upper)} and "
        f"δ = {plan.delta:g}, with respect to adding or removing one {plan.unit}. "
        f"Whatever is published, nobody can tell whether a given {plan.unit} was in the training "
        f"data with odds more than e^ε times what they were before, except with probability δ. "
        f"The number is an upper bound ({bounds.method}; both directions counted, the worse one "
        f"printed); the exact ε is at least {_round_down(bounds.lower)}."
    )


def _assumptions(plan: PrivacyPlan) -> list[str]:
    q = plan.sampling_probability
    lines = [
        f"Every {plan.unit} enters the batch of each step independently with probability "
        f"{q:g} (Poisson sampling); empty batches are steps too. Shuffled batches would not do.",
        "The keys of the sampler and of the noise are random, secret, and never published: who "
        "knows them can undo both.",
        f"The neighbouring relation is add or remove: data sets that differ by one {plan.unit}. "
        f"Replacing one {plan.unit} by another counts as two changes.",
        f"The unit of privacy is one {plan.unit}. Whoever contributed several is protected less: "
        f"k of them are a group of size k.",
        f"The contribution of each {plan.unit} to a step's sum has L2 norm at most "
        f"{plan.clip_norm:g} (clip norm), over all parameters together, and Gaussian noise of "
        f"standard deviation {plan.noise_multiplier * plan.clip_norm:g} per coordinate is added "
        f"(noise multiplier {plan.noise_multiplier:g})."
        if plan.noise_multiplier > 0
        else "No noise is added.",
        _STREAMS[plan.noise_stream],
        f"δ = {plan.delta:g} is small for this data set. It is the chance that the bound on ε "
        f"fails; it must be far below one over the number of {plan.unit}s" + _records(plan) + ".",
        "Every attempt at a step is counted, also one that crashed, as the ledger does.",
    ]
    if plan.expected_batch_size is not None:
        lines.append(
            f"Sums are divided by the public constant {plan.expected_batch_size:g}, not by the "
            "size of the batch that was drawn."
        )
    return lines


def _records(plan: PrivacyPlan) -> str:
    if plan.expected_batch_size is None or plan.sampling_probability == 0:
        return ""
    records = plan.expected_batch_size / plan.sampling_probability
    return f", which is 1/{records:,.0f} = {1 / records:.1e} going by the expected batch size"


def _round_down(value: float) -> str:
    return f"{math.floor(value * 1e4) / 1e4:g}"
