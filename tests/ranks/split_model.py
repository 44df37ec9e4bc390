"""A model that FSDP2 splits over ranks with different records: what was found, by property."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from kit import (
    CLIP_NORM,
    KEY,
    RECORDS,
    every_pair,
    full,
    llama,
    oracle,
    private_step,
    records,
    relative,
    whole,
)
from private_step import keep_float64
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from veilspan.core import (
    Flat,
    GaussianNoise,
    PerBlock,
    PerLayer,
    PerParameter,
    PrivacyError,
    PrivateQuantile,
    PrivateStep,
    poisson_batches,
)
from veilspan.core.groups import Clipping
from veilspan.core.losses import causal_lm_losses
from veilspan.core.sampling import Draw
from veilspan.parallel import ParallelMesh, ReplicaShards, build_mesh, shard_model
from veilspan.parallel.testing import rank_main

ALL = Draw(step=0, records=np.arange(RECORDS))
CASES: list[tuple[Clipping, str]] = [
    (PerLayer(clip_norm=CLIP_NORM), "per_layer"),
    (PerParameter(clip_norm=CLIP_NORM), "per_layer"),
    (Flat(clip_norm=CLIP_NORM), "bookkeeping"),
    (PerBlock(clip_norm=CLIP_NORM), "auto"),
]


def split(
    mesh: ParallelMesh, *, tied: bool = False, model: nn.Module | None = None, **options: Any
) -> nn.Module:
    """Return a model split over the replicate axis."""
    model = llama(torch.float64, "sdpa", tied=tied) if model is None else model
    return shard_model(model, mesh, axis="replicate", **options)


def add_draw(step: PrivateStep, mesh: ParallelMesh, draw: Draw, size: int = 2) -> None:
    """Run one logical batch; ranks whose share is shorter fill their micro-batches."""
    input_ids, labels = records()
    ranks = mesh.replicate_degree
    with step:
        for rows, is_record in draw.filled_microbatches(size, mesh.replicate_rank, ranks):
            losses_B = causal_lm_losses(step.model(input_ids[rows]).logits, labels[rows])
            step.backward(losses_B, torch.from_numpy(is_record))


def clipped_sums(mesh: ParallelMesh) -> dict[str, float]:
    """Relative error of the clipped sum against the per-sample loop, per case."""
    errors, expected = {}, functools.cache(oracle)
    for (clipping, backward), tied, (checkpointing, size) in every_pair(
        CASES, (False, True), (("none", 1), ("none", 2), ("full", 2))
    ):
        model = split(mesh, tied=tied, checkpointing=checkpointing)
        options = {"clipping": clipping, "backward": backward, "shards": ReplicaShards(mesh)}
        step = private_step(model, mesh, **options)
        add_draw(step, mesh, ALL, size)
        case = f"{type(clipping).__name__},{backward} tied={tied} {checkpointing},size={size}"
        errors[case] = relative(whole(step), expected(tied, range(RECORDS), clipping))
    return errors


def step_of(mesh: ParallelMesh, model: nn.Module | None = None, **options: Any) -> PrivateStep:
    defaults = {"clipping": PerLayer(clip_norm=CLIP_NORM), "backward": "per_layer"}
    parts = {"shards": ReplicaShards(mesh), **defaults, **options}
    return private_step(split(mesh) if model is None else model, mesh, **parts)


def digests(mesh: ParallelMesh) -> dict[str, Any]:
    """What must have the same bits on every number of ranks: exact sums, and noise."""
    exact = step_of(mesh, accumulate="exact")
    add_draw(exact, mesh, ALL)
    noise = step_of(mesh, noise_multiplier=3.0, noise=GaussianNoise(KEY))
    with noise:
        pass
    adaptive = step_of(
        mesh,
        clipping=PerLayer(clip_norm=CLIP_NORM, adaptive=PrivateQuantile()),
        noise_multiplier=1.0,
        noise=GaussianNoise(KEY),
    )
    add_draw(adaptive, mesh, ALL)
    return {
        "exact": digest(exact),
        "noise": digest(noise),
        "thresholds": adaptive.state_dict()["clip_norms"],
    }


def digest(step: PrivateStep) -> str:
    flat = torch.cat([x.flatten() for x in whole(step).values()])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def training(mesh: ParallelMesh) -> dict[str, Any]:
    """Ten Poisson draws with AdamW; empty ones are steps too."""
    model = split(mesh, tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    noise = GaussianNoise(KEY)
    step = step_of(mesh, model, noise_multiplier=0.5, expected_batch_size=2.0, noise=noise)
    sizes = []
    for draw in poisson_batches(RECORDS, 0.4, 10, key=KEY):
        sizes.append(len(draw))
        add_draw(step, mesh, draw)
        optimizer.step()
        optimizer.zero_grad()
    return {"sizes": sizes, "norms": [full(p.detach()).norm().item() for p in model.parameters()]}


def memory(mesh: ParallelMesh) -> dict[str, Any]:
    """What a rank holds of the clipped sum, and in which dtype, with bf16 arithmetic."""
    model = split(mesh, model=llama(torch.float32, "sdpa"), param_dtype=torch.bfloat16)
    step = step_of(mesh, model)
    add_draw(step, mesh, ALL)
    shards = ReplicaShards(mesh)
    held = sum(shards.local(p.grad).numel() for p in model.parameters() if p.grad is not None)
    return {
        "share": held / sum(p.numel() for p in model.parameters()),
        "dtypes": sorted({str(p.grad.dtype) for p in model.parameters() if p.grad is not None}),
        "error": relative(whole(step), oracle(False, range(RECORDS), step.clipping)),
    }


class Stray(nn.Module):
    """Uses the weight of a layer around its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(self.outer(self.inner(inputs)), self.inner.weight)


def sharded_by_hand(mesh: ParallelMesh, model: nn.Module) -> nn.Module:
    """Split as a user of FSDP2 would, leaving what is reduced and how to FSDP2's defaults."""
    if mesh.replicate_degree > 1:
        for module in (*model.children(), model):
            fully_shard(module, mesh=mesh.replicate_mesh)
    return model


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def by_hand(mesh: ParallelMesh) -> float:
    """Error of a model that its user split, layers on their own included."""
    model = sharded_by_hand(mesh, small())
    inputs = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(1)).double()
    step = step_of(mesh, model)
    ranks = mesh.replicate_degree
    with step:
        for rows, real in ALL.filled_microbatches(2, mesh.replicate_rank, ranks):
            losses_B = step.model(inputs[rows % 4]).square().sum((1, 2))
            step.backward(losses_B, torch.from_numpy(real))
    found = whole(step)
    alone = small()
    plain = PrivateStep(
        alone, clipping=step.clipping, noise_multiplier=0.0, expected_batch_size=1.0
    )
    with plain:
        plain.backward(alone(inputs[ALL.records % 4]).square().sum((1, 2)))
    return relative(found, whole(plain))


def said(call: Any) -> str:
    try:
        call()
    except (ValueError, PrivacyError) as error:
        return str(error)
    return "nothing was raised"


def refusals(mesh: ParallelMesh) -> dict[str, str]:
    """What is refused, and with which words, on this rank."""
    released = []
    uneven = step_of(mesh, on_release=lambda release: released.append(release.step))
    odd = Draw(step=0, records=np.arange(2 + 2 * (mesh.replicate_rank == 0)))
    stray = step_of(mesh, fully_shard(Stray().double(), mesh=mesh.replicate_mesh))

    def uneven_batches() -> None:
        input_ids, labels = records()
        with uneven:
            for rows in odd.microbatches(2):
                uneven.backward(
                    causal_lm_losses(uneven.model(input_ids[rows]).logits, labels[rows])
                )

    def stray_batch() -> None:
        with stray:
            stray.backward(stray.model(torch.randn(1, 2, 8).double()).sum((1, 2)))

    attention = sharded_by_hand(mesh, nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)))
    return {
        "uneven": said(uneven_batches),
        "released": str(released),
        "stray": said(stray_batch),
        "records alone": said(lambda: step_of(mesh, attention)),
        "no reduction": said(lambda: step_of(mesh, reduction=None)),
        **{
            backward: said(lambda backward=backward: step_of(mesh, backward=backward))
            for backward in ("single_sample", "per_sample", "two_pass")
        },
        "narrow": said(lambda: ReplicaShards(mesh).scatter(torch.zeros(2), torch.zeros(2).half())),
    }


def body(arguments: list[str]) -> dict[str, Any]:
    mesh = build_mesh(replicate=dist.get_world_size())
    found: dict[str, Any] = {"memory": memory(mesh)}
    keep_float64()  # not for the memory of narrow arithmetic
    found |= {
        "clipped sums": clipped_sums(mesh),
        "digests": digests(mesh),
        "training": training(mesh),
        "by hand": by_hand(mesh),
    }
    if mesh.replicate_degree > 1:
        found["refusals"] = refusals(mesh)
        found["context"] = said(lambda: ReplicaShards(build_mesh(context=dist.get_world_size())))
    return found


if __name__ == "__main__":
    rank_main(body)
