"""Privacy for a training loop of your own: plan, sampler, step and ledger, joined by one call."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from veilspan.accounting import Ledger, PrivacyPlan, SketchedClip
from veilspan.core import Flat, PrivateStep, Sketch, new_key, poisson_batches
from veilspan.core.groups import Clipping
from veilspan.core.protocols import NoiseSource
from veilspan.core.rates import free_bytes
from veilspan.core.streams import check_count
from veilspan.trainer.budget import noise_named, plan_of
from veilspan.trainer.errors import RecipeError, TrainerError
from veilspan.trainer.microbatch import Microbatch, fastest_that_fits
from veilspan.trainer.private_batches import PrivateTraining, Records
from veilspan.trainer.private_checks import check_options, check_parts, collate_tensors
from veilspan.trainer.processes import Processes
from veilspan.trainer.recipe_errors import explain
from veilspan.trainer.recipe_section import Section
from veilspan.trainer.releases import ReleaseGate, Unobserved
from veilspan.trainer.sections import Compute, Privacy

_POSITIONS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # see records of many positions
_Section = TypeVar("_Section", bound=Section)


def make_private(  # noqa: PLR0913 - each is one number of the plan or one part of the loop
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Records,
    *,
    target_epsilon: float,
    delta: float | Literal["auto"],
    ledger: str | os.PathLike[str],
    steps: int | None = None,
    epochs: float | None = None,
    expected_batch_size: float | None = None,
    sampling_probability: float | None = None,
    clipping: Clipping | None = None,
    unit: str = "record",
    records_per_unit: int = 1,
    data: str | None = None,
    microbatch_size: int | Literal["auto"] = "auto",
    sequence_length: int | None = None,
    collate: Callable[[list[Any]], Any] = collate_tensors,
    noise: NoiseSource | None = None,
    key: bytes | None = None,
    **options: Any,
) -> PrivateTraining:
    """Join plan, Poisson sampler, private step and ledger for a training loop of your own.

    For one process; several processes, checkpoints and reports are the trainer's.

    Args:
        model: The model, on its device, with one loss per record; patched until `close`.
        optimizer: Yours; it must hold exactly the trainable parameters of the model.
        dataset: Map-style, with `len` and an item per record.
        target_epsilon: ε after all steps; the noise is computed from it.
        delta: δ, below 1/N for N records; "auto" is N^-1.1.
        ledger: File that counts the releases. One that exists is continued, if its plan is the
            same; to restore the model is then up to you.
        steps: Number of releases.
        epochs: In its place, expected passes over the records; rounded up to whole steps.
        expected_batch_size: Expected records of a logical batch.
        sampling_probability: In its place, the chance of each record to be in a batch.
        clipping: Who shares a threshold, and the rule; by default `Flat(clip_norm=1.0)`.
        unit: What is protected, in the singular, for statements: a record, or whoever holds some.
        records_per_unit: The most records that one unit holds. You see to it that none holds more:
            the guarantee covers all of them together, which takes more noise.
        data: Name of the data set, for its ledgers: those of one name add up, of two never. Not a
            digest, which would say something of the data.
        microbatch_size: Records per forward and backward; "auto" asks the cost model.
        sequence_length: Tokens or pixels of the largest record, for "auto"; a model with an
            embedding or a convolution takes one record at a time without it.
        collate: Makes a micro-batch of a list of records; by default PyTorch's `default_collate`,
            for tensors of one shape.
        noise: `GaussianNoise`, `PhiloxNoise` or veilspan.kernels' `TritonNoise`; by default AES
            with a fresh key from the operating system. The plan names its stream.
        key: 32 secret bytes of the sampler, which no other start on the same data may use: two
            releases of one draw cost more than two of independent draws. Fresh by default.
        **options: Further arguments of `PrivateStep`: `backward`, `norms`, `accumulate`, ….

    Returns:
        The run: iterate over its `batches`.

    Raises:
        ValueError: If an argument is wrong; the message names it.
        PrivacyError: If the model cannot be trained with the stated guarantee.
        LedgerError: If the ledger is damaged, in use, or of another plan.

    Guarantee:
        What the optimizer sees is (ε, δ)-differentially private for the ε that `epsilon()` states.
        Every release is in the ledger before its noise exists, and empty draws are releases.

    Examples:
        >>> import tempfile
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> dataset = [{"x": torch.randn(3), "y": torch.randn(1)} for _ in range(100)]
        >>> private = make_private(
        ...     model,
        ...     optimizer,
        ...     dataset,
        ...     target_epsilon=8.0,
        ...     delta=1e-4,
        ...     steps=5,
        ...     expected_batch_size=10,
        ...     ledger=tempfile.mkdtemp() + "/ledger.jsonl",
        ... )
        >>> for batch in private.batches():
        ...     with batch:
        ...         for records in batch.microbatches():
        ...             errors = model(records["x"]) - records["y"]
        ...             private.backward(errors.square().sum(1))
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> print(private.epsilon())
        ε ≤ 8.000 at δ = 0.0001
        >>> private.close()
    """
    clipping = Flat(clip_norm=1.0) if clipping is None else clipping
    check_parts(model, optimizer, dataset, clipping, ledger)
    check_options(options)
    size = _checked(Compute, {"microbatch_size": microbatch_size}).microbatch_size
    numbers = {
        "target_epsilon": target_epsilon,
        "delta": delta,
        "steps": steps,
        "expected_batch_size": expected_batch_size,
        "sampling_probability": sampling_probability,
        "clip_norm": clipping.clip_norm,
        "noise": noise_named(noise),
    }
    law = _law(model, clipping, options.get("norms"))
    plan = _plan(numbers, epochs, len(dataset), (unit, records_per_unit), law)
    key = new_key() if key is None else key
    poisson_batches(len(dataset), plan.sampling_probability, plan.steps, key=key)  # refuses a key
    assert plan.expected_batch_size is not None  # budget.plan_of always sets it
    step = PrivateStep(
        model,
        clipping=clipping,
        noise_multiplier=plan.noise_multiplier,
        expected_batch_size=plan.expected_batch_size,
        noise=noise,
        on_release=lambda release: gate(release),  # there is no ledger before all is accepted
        **options,
    )
    try:
        microbatch = _microbatch(step, size, sequence_length)
        account = _open(Path(ledger), plan, target_epsilon, data)
    except BaseException:
        step.detach()
        raise
    step.next_step = account.releases
    gate = ReleaseGate(account, Processes(device=torch.device("cpu")), Unobserved())
    return PrivateTraining(
        plan=plan,
        ledger=account,
        step=step,
        gate=gate,
        microbatch=microbatch,
        dataset=dataset,
        collate=collate,
        key=key,
    )


def _law(model: nn.Module, clipping: Clipping, norms: object) -> SketchedClip | None:
    """Return the law of estimated norms that the plan must count; None where they are exact."""
    if not isinstance(norms, Sketch):
        return None
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return SketchedClip(**asdict(norms.law(clipping, clipping.resolve(sizes))))


def _plan(
    numbers: Mapping[str, Any],
    epochs: float | None,
    num_records: int,
    unit: tuple[str, int],
    law: SketchedClip | None,
) -> PrivacyPlan:
    if (numbers["steps"] is None) == (epochs is None):
        raise TrainerError("give exactly one of steps and epochs to make_private.")
    if epochs is not None and not 0 < epochs < math.inf:
        raise TrainerError(f"epochs is {epochs}; it must be above 0 and finite.")
    given = {name: value for name, value in numbers.items() if value is not None}
    privacy = _checked(Privacy, {"steps": 1, **given})
    check_count("records_per_unit", unit[1], least=1)
    if epochs is not None:
        batch = privacy.expected_batch_size or (privacy.sampling_probability or 1.0) * num_records
        steps = math.ceil(round(epochs * num_records / batch, 6))  # 49 / (1 / 49 * 49) is above 49
        privacy = privacy.model_copy(update={"steps": max(1, steps)})
    try:
        return plan_of(
            privacy,
            num_records,  # there are not more units than records, so δ is below 1/N for theirs
            unit=unit[0],
            records_per_unit=unit[1],
            num_records=num_records,
            norms=law,
        )
    except RecipeError as error:
        raise TrainerError(
            str(error).replace("privacy.", "").replace("data.train", "dataset")
        ) from error


def _checked(section: type[_Section], values: Mapping[str, object]) -> _Section:
    """Return the section of a recipe with these arguments, or say what is wrong with them."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise TrainerError(explain(error, section, "the arguments of make_private")) from None


def _open(path: Path, plan: PrivacyPlan, budget_epsilon: float, data: str | None) -> Ledger:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return Ledger.create(path, plan, budget_epsilon=budget_epsilon, data=data)
    ledger = Ledger.open(path, plan=plan)
    if data is not None and ledger.data != data:
        named, ledger_name = f"data is {data!r}", ledger.data
        ledger.close()
        raise TrainerError(
            f"{named}, and the ledger {path} counts releases of "
            f"{'data without a name' if ledger_name is None else repr(ledger_name)}. Continue it "
            "with the name that it has, or begin another ledger."
        )
    return ledger


def _microbatch(step: PrivateStep, size: int | str, length: int | None) -> Microbatch:
    """Return what was asked for, or the cost model's choice under a rough forecast of memory."""
    if isinstance(size, int):
        return Microbatch(size=size, reason="set by the caller")
    if length is None and any(isinstance(m, _POSITIONS) for m in step.model.modules()):
        return Microbatch(size=1, reason="sequence_length was not given")
    tokens = 1 if length is None else check_count("sequence_length", length, least=1)
    parameters = list(step.model.parameters())
    # What goes into and comes out of each weight, and as much again for what lies between.
    widths = sum(len(p) + p[0].numel() for p in parameters if p.ndim > 1)
    state = 16 * sum(p.numel() for p in step.parameters.values())  # gradient, sum, optimizer
    return fastest_that_fits(
        lambda most: step.best_microbatch(tokens, most),
        bytes_free=free_bytes(parameters[0].device) - state,
        bytes_per_unit=8 * tokens * max(1, widths),
        expected=step.expected_batch_size,
    )
