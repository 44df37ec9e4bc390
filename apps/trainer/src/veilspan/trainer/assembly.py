"""The parts of a run, put together from its recipe."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from veilspan.accounting import PrivacyPlan
from veilspan.core import GaussianNoise, PrivateStep, new_key
from veilspan.core.support import Report, preflight
from veilspan.trainer.budget import privacy_plan
from veilspan.trainer.data import Batch, Records, open_heldout, open_records
from veilspan.trainer.errors import ModelError, TrainerError
from veilspan.trainer.forecast import memory_forecast
from veilspan.trainer.logits import chunks_logits
from veilspan.trainer.mechanism import mechanism, noise_source
from veilspan.trainer.microbatch import Microbatch, chosen_microbatch, settled_microbatch
from veilspan.trainer.model_cost import count_cost
from veilspan.trainer.models import build_model, count_parameters
from veilspan.trainer.processes import Processes
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.releases import ReleaseGate
from veilspan.trainer.run_folder import recipe_digest
from veilspan.trainer.run_info import RunInfo, Start, software_versions
from veilspan.trainer.secrets import key_fingerprint
from veilspan.trainer.sequences import SequenceLosses
from veilspan.trainer.throughput import Throughput
from veilspan.trainer.tokenizer import load_tokenizer

_COMPARED = 16  # sequences, about
_ONE = Microbatch(size=1, reason="until with_microbatch decides")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run consists of before its first step.

    Args:
        recipe: The recipe.
        plan: Sampling, noise and clipping, of which ε follows.
        records: Protected units.
        heldout: Public records, if the recipe names any.
        model: The model, on its device, split over the processes of one sequence.
        vocabulary: Number of tokens the model knows.
        losses: How a batch becomes losses.
        microbatch: How many units go through the model at once.
    """

    recipe: Recipe
    plan: PrivacyPlan
    records: Records
    heldout: Records | None
    model: nn.Module
    vocabulary: int
    losses: SequenceLosses
    microbatch: Microbatch = _ONE

    @property
    def full_shape(self) -> tuple[int, int]:
        """Units and tokens of the largest micro-batch."""
        return self.microbatch.size, self.recipe.data.sequence_length


def assemble(recipe: Recipe, processes: Processes) -> Parts:
    """Open the data and build the model; nothing is written.

    Raises:
        TrainerError: If recipe, data, model and processes do not fit together.
    """
    tokenizer = load_tokenizer(recipe)
    records = open_records(recipe, tokenizer)
    plan = privacy_plan(recipe, records.num_units)
    heldout = open_heldout(recipe, tokenizer)
    split = processes.context[1] > 1
    model = build_model(
        recipe, tokenizer, attn_implementation=_shared_attention() if split else "sdpa"
    )
    losses = SequenceLosses(recipe, processes, chunked=chunks_logits(recipe, model))
    _place(model, recipe, processes, losses)
    return Parts(
        recipe=recipe,
        plan=plan,
        records=records,
        heldout=heldout,
        model=model,
        vocabulary=model.config.get_text_config().vocab_size,  # pyright: ignore
        losses=losses,
    )


def require_alike(parts: Parts, processes: Processes) -> None:
    """Refuse processes that would draw from different data, or learn by different settings.

    Each draws by itself which units take part: with other data the draws are others too, and a unit
    might count twice in a step.

    Raises:
        TrainerError: On every process, naming what differs.
    """
    if not processes.distributed:
        return  # there is nobody to compare with, so nothing is read
    with processes.together():
        units, records = parts.records.num_units, parts.records
        some = range(0, len(records), max(1, len(records) // _COMPARED))
        tokens = hashlib.sha256(b"".join(records[number].tobytes() for number in some))
        told = {
            "recipes": recipe_digest(parts.recipe),
            "numbers of units": str(units),
            "training data": tokens.hexdigest(),
        }
    apart = processes.apart(told)
    if apart:
        raise TrainerError(
            f"The processes of this run have different {' and '.join(apart)}; this one has {units} "
            "units. Start all with one recipe, and give every machine the same files in data.train."
        )


def with_microbatch(parts: Parts, processes: Processes) -> Parts:
    """Decide the size of micro-batches; every process gets the smallest that any would take.

    The recipe of the result holds the size in place of "auto".

    Raises:
        PrivacyError: If the model cannot be trained with the stated guarantee.
    """
    with processes.together():
        microbatch = settled_microbatch(parts.recipe) or _chosen(parts, processes)
    size = int(-processes.largest(-microbatch.size))
    return replace(
        parts,
        recipe=parts.recipe.with_microbatch(size),
        microbatch=replace(microbatch, size=size),
    )


def describe(parts: Parts, processes: Processes, key: bytes) -> RunInfo:
    """Return the public facts that the run folder keeps, with this start as the first."""
    device = processes.device
    start = Start(
        releases=0,
        processes=processes.size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        versions=software_versions(),
    )
    parameters, trainable = count_parameters(parts.model)
    return RunInfo(
        recipe_digest=recipe_digest(parts.recipe),
        key_fingerprint=key_fingerprint(key),
        num_records=parts.records.num_units,
        num_heldout=0 if parts.heldout is None else len(parts.heldout),
        model_type=str(parts.model.config.model_type),  # pyright: ignore
        parameters=parameters,
        trainable=trainable,
        starts=(start,),
    )


def private_step(
    parts: Parts, processes: Processes, gate: ReleaseGate, *, first_step: int
) -> PrivateStep:
    """Attach the mechanism to the model.

    Guarantee:
        The noise key is drawn from the operating system at every start, travels in memory only and
        is stored nowhere: noise is never repeated, not even for a step that is repeated after a
        crash, and every process of a copy and every copy of the model draws the same noise.
    """
    noise_key = processes.broadcast(new_key() if processes.is_first else None)
    return PrivateStep(
        parts.model,
        **mechanism(parts.recipe, parts.plan),
        **_seams(parts.recipe, processes),
        noise=noise_source(parts.recipe.privacy.noise, noise_key),
        on_release=gate,
        first_step=first_step,
    )


def check(parts: Parts, step: PrivateStep, clock: Throughput) -> Report:
    """Run the preflight, and one micro-batch of the real shape, on synthetic records.

    Both are discarded before anything is released. They let the cost model choose, and memory run
    out, before the first private record is read.

    Raises:
        PrivacyError: If the model or its loss cannot be trained privately.
    """

    def losses_of(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts.losses.losses_B(model, Batch(**batch))

    with parts.losses.sharing():
        report = preflight(step, losses_of, _synthetic(parts, 2))
        batch = _synthetic(parts, parts.microbatch.size)
        with contextlib.suppress(_DiscardedError), step:
            with clock.microbatch(batch["input_ids"].numel(), full=True):
                step.backward(losses_of(parts.model, batch))
            raise _DiscardedError
    return report


def _seams(recipe: Recipe, processes: Processes) -> dict[str, Any]:
    """Return who holds the rest of the model and of each unit, as arguments of `PrivateStep`."""
    mesh = processes.mesh
    if mesh is None:
        return {}
    from veilspan.parallel import ContextShards, ReplicaReduction, ReplicaShards

    shards = ContextShards(mesh) if recipe.parallel.shard == "context" else ReplicaShards(mesh)
    return {"shards": shards, "reduction": ReplicaReduction(mesh)}


def _chosen(parts: Parts, processes: Processes) -> Microbatch:
    """Ask the cost model, through a step that is taken off again before anything is trained."""
    recipe = parts.recipe
    noise = GaussianNoise(new_key())  # never drawn
    wishes = mechanism(recipe, parts.plan)
    step = PrivateStep(parts.model, **wishes, **_seams(recipe, processes), noise=noise)
    try:
        cost = count_cost(recipe, load_tokenizer(recipe))
        memory = memory_forecast(recipe, cost, microbatch_size=1)
        with parts.losses.autocast():
            fastest = step.best_microbatch
            return chosen_microbatch(recipe, parts.plan, memory, fastest, processes.device)
    finally:
        step.detach()


class _DiscardedError(Exception):
    """Leaves a logical batch without a release."""


def _synthetic(parts: Parts, records: int) -> dict[str, torch.Tensor]:
    """Return records of full length that were never anybody's."""
    shape = (records, parts.recipe.data.sequence_length)
    ids = torch.randint(parts.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def _shared_attention() -> str:
    from veilspan.parallel import register_attention

    return register_attention()


def _place(model: nn.Module, recipe: Recipe, processes: Processes, losses: SequenceLosses) -> None:
    """Bring the model to its device and spread it over the processes, in place."""
    model.to(processes.device)
    full, low = recipe.compute.checkpointing == "full", recipe.model.dtype == "bfloat16"
    if processes.mesh is None:
        if full:
            _recompute(model)
        return
    from veilspan.parallel import check_model, shard_model

    try:
        if losses.layout is not None:
            check_model(
                model.config, processes.mesh, losses.layout, attention=recipe.parallel.attention
            )
        shard_model(
            model,
            processes.mesh,
            axis=recipe.parallel.shard,
            checkpointing=recipe.compute.checkpointing,
            param_dtype=torch.bfloat16 if low else None,
        )
    except ValueError as error:
        raise ModelError(
            f"The model cannot be trained by {processes.size} processes: {error}"
        ) from error


def _recompute(model: Any) -> None:
    """Keep only what flows between blocks, as transformers itself does it."""
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.23
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
