"""Losses without logits where FSDP2 splits the head's weight: what was found, by mesh."""

from __future__ import annotations

import itertools
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from kit import (
    CLIP_NORM,
    KEY,
    LENGTH,
    RECORDS,
    every_pair,
    llama,
    oracle,
    private_step,
    records,
    relative,
    whole,
)
from kit import losses_of as losses_of_logits
from private_step import MESHES, keep_float64
from sketched_context import FLAT, expected, micro_batches, shares, sketched_step
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from veilspan.core import Flat, PerLayer, PrivateStep, UnsupportedModelError
from veilspan.core.head import fused_causal_lm_losses
from veilspan.core.sampling import Draw
from veilspan.parallel import (
    Layout,
    ParallelMesh,
    ReplicaShards,
    build_mesh,
    context_parallel,
    register_attention,
    shard_batch,
    shard_model,
)
from veilspan.parallel.blocks import decoder_blocks
from veilspan.parallel.testing import rank_main

CHUNK = 5


def fused(model: nn.Module, mesh: ParallelMesh, layout: Layout, rows: list[int]) -> Tensor:
    """This rank's shares of the losses of some records."""
    input_ids, labels = (x[rows] for x in records())
    part = shard_batch(input_ids, labels, layout, mesh.context_rank)
    return fused_causal_lm_losses(
        model,
        part.input_ids,
        part.labels,
        shifted=True,
        num_tokens_B=part.num_tokens_B,
        chunk=CHUNK,
        position_ids=part.position_ids,
    )


def context(mesh: ParallelMesh) -> dict[str, float]:
    """Relative error of losses and clipped sums where ranks hold a sequence together."""
    errors = {}
    mine = list(range(RECORDS))[mesh.replicate_rank :: mesh.replicate_degree]
    for tied, checkpointing, kind in every_pair(
        (False, True), ("none", "full"), ("contiguous", "zigzag")
    ):
        model = llama(torch.float64, register_attention(), tied=tied)
        model = shard_model(model, mesh, checkpointing=checkpointing)
        layout = Layout(length=LENGTH, ranks=mesh.context_degree, kind=kind)
        case = f"tied={tied} {checkpointing} {kind}"
        step = private_step(model, mesh)
        with step, context_parallel(mesh, layout):
            for record in mine:
                step.backward(fused(model, mesh, layout, [record]))
                errors[f"{case} evaluation"] = evaluated_apart(model, mesh, layout, record)
        errors[case] = relative(whole(step), oracle(tied, range(RECORDS)))
    return errors


def evaluated_apart(model: nn.Module, mesh: ParallelMesh, layout: Layout, record: int) -> float:
    """How far losses without logits are from those of logits, without a backward pass."""
    with torch.no_grad():
        got = fused(model, mesh, layout, [record])
        return (got - losses_of_logits(model, mesh, layout, record)).abs().max().item()


def sketched(mesh: ParallelMesh) -> dict[str, float]:
    """The same with estimated norms, several records at a time."""
    errors = {}
    layout = Layout(length=LENGTH, ranks=mesh.context_degree)
    for tied, backward in itertools.product((False, True), ("two_pass", "bookkeeping")):
        model = shard_model(llama(torch.float64, register_attention(), tied=tied), mesh)
        with patch("veilspan.core.measures.common_key", lambda shards, device: KEY):
            step = sketched_step(mesh, model, backward=backward)
            with step, context_parallel(mesh, layout):
                for rows in micro_batches(shares(mesh)[mesh.replicate_rank]):
                    step.backward(fused(model, mesh, layout, rows))
        wanted = expected(mesh, FLAT, tied=tied)
        errors[f"tied={tied} {backward}"] = relative(whole(step), wanted)
    return errors


def replicas(mesh: ParallelMesh) -> dict[str, float]:
    """The same where FSDP2 splits the model over ranks with different records."""
    errors = {}
    for tied, (clipping, backward), by_hand in every_pair(
        (False, True),
        ((PerLayer(clip_norm=CLIP_NORM), "per_layer"), (Flat(clip_norm=CLIP_NORM), "bookkeeping")),
        (False, True),
    ):
        model = llama(torch.float64, "sdpa", tied=tied)
        if by_hand:
            for module in (*decoder_blocks(model), model):  # the head is let go of, and gathered
                fully_shard(module, mesh=mesh.replicate_mesh, reshard_after_forward=True)
        else:
            model = shard_model(model, mesh, axis="replicate")
        options = {"clipping": clipping, "backward": backward, "shards": ReplicaShards(mesh)}
        step = private_step(model, mesh, **options)
        add_all(step, mesh)
        case = f"tied={tied} {backward} by_hand={by_hand}"
        errors[case] = relative(whole(step), oracle(tied, range(RECORDS), clipping))
    return errors


def add_all(step: PrivateStep, mesh: ParallelMesh) -> None:
    """Run one logical batch of all records, two at a time on each rank."""
    input_ids, labels = records()
    draw = Draw(step=0, records=np.arange(RECORDS))
    share = (mesh.replicate_rank, mesh.replicate_degree)
    with step:
        for rows, is_record in draw.filled_microbatches(2, *share):
            ids = input_ids[rows]
            losses_B = fused_causal_lm_losses(step.model, ids, labels[rows], chunk=CHUNK)
            step.backward(losses_B, torch.from_numpy(is_record))


class Scaled(nn.Module):
    """A decoder that scales its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 16), nn.Linear(16, 61)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (2.0 * self.head(self.embed(input_ids)),)


def refusals(mesh: ParallelMesh) -> dict[str, str]:
    """What cannot be served while the head's weight is split, and the message."""
    split, found = mesh.replicate_mesh, {}
    scaled, alone = Scaled(), Scaled()
    fully_shard(scaled, mesh=split)
    for module in (alone.head, alone):
        fully_shard(module, mesh=split)
    for name, model in (("scaled", scaled), ("on its own", alone)):
        try:
            fused_causal_lm_losses(model, records()[0])
        except UnsupportedModelError as error:
            found[name] = str(error)
    return found


def body(arguments: list[str]) -> dict[str, Any]:
    keep_float64()
    reports = {}
    for replicate, degree in MESHES[dist.get_world_size()]:
        mesh = build_mesh(replicate=replicate, context=degree)
        reports[f"{replicate}x{degree}"] = {
            "context": context(mesh),
            "sketched": sketched(mesh) if degree > 1 else {},
            "replicas": replicas(mesh) if degree == 1 < replicate else {},
            "refusals": refusals(mesh) if degree == 1 < replicate else {},
        }
    return reports


if __name__ == "__main__":
    rank_main(body)
