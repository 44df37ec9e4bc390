"""Estimated norms where ranks hold a sequence together: what was found, property by property."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from kit import (
    CLIP_NORM,
    KEY,
    LENGTH,
    RECORDS,
    every_pair,
    llama,
    private_step,
    records,
    relative,
    whole,
)
from private_step import MESHES, keep_float64
from torch import Tensor, nn

from veilspan.core import Automatic, Flat, GaussianNoise, PerLayer, PrivacyError, Sketch
from veilspan.core.groups import Clipping
from veilspan.core.losses import causal_lm_losses
from veilspan.core.step import PrivateStep
from veilspan.core.survey import trainable_parameters
from veilspan.core.testing.oracle import per_sample_gradients
from veilspan.parallel import (
    Layout,
    ParallelMesh,
    build_mesh,
    context_parallel,
    register_attention,
    shard_batch,
    shard_model,
)
from veilspan.parallel.testing import rank_main

PROBES, BLOCKS, SIZE = 4, 2, 2
RULE = Automatic(gamma=1e-3)  # not 0: some gradients of equal tokens are nothing but rounding
FLAT, LAYERS = (kind(clip_norm=CLIP_NORM, rule=RULE) for kind in (Flat, PerLayer))
CASES = [
    (FLAT, "two_pass", False),
    (FLAT, "two_pass", True),
    (FLAT, "bookkeeping", False),
    (FLAT, "bookkeeping", True),
    (LAYERS, "per_layer", False),  # a tied layer does not end within itself
]


def stream(replica: int) -> GaussianNoise:
    """Probes of one replica: all ranks of its sequences have them, and nobody else."""
    return GaussianNoise(hashlib.sha256(b"probes of replica %d" % replica).digest())


def shares(mesh: ParallelMesh) -> list[list[int]]:
    """The records of each replica; every replica runs as many micro-batches."""
    return [list(range(RECORDS))[r :: mesh.replicate_degree] for r in range(mesh.replicate_degree)]


def micro_batches(rows: list[int]) -> list[list[int]]:
    return [rows[start : start + SIZE] for start in range(0, len(rows), SIZE)]


def expected(mesh: ParallelMesh, clipping: Clipping, *, tied: bool) -> dict[str, Tensor]:
    """The sum whose factors follow from whole gradients times whole probes, in one process."""
    model = llama(torch.float64, "sdpa", tied=tied)
    owned = trainable_parameters(model)
    groups = clipping.resolve({name: p.numel() for name, p in owned.items()})
    total = {name: torch.zeros_like(p) for name, p in owned.items()}
    for replica, rows in enumerate(shares(mesh)):
        for number, chosen in enumerate(micro_batches(rows)):
            input_ids, labels = (x[chosen] for x in records())
            gradients = per_sample_gradients(
                model,
                lambda m, batch: causal_lm_losses(m(batch["input_ids"]).logits, batch["labels"]),
                {"input_ids": input_ids, "labels": labels},
            )
            probes = {n: drawn(n, p, len(chosen), number, replica) for n, p in owned.items()}
            for b, gradient in enumerate(gradients):
                add_clipped(total, gradient, {n: z[b] for n, z in probes.items()}, groups)
    return {name: value.detach() for name, value in total.items()}


def drawn(name: str, parameter: Tensor, size: int, number: int, replica: int) -> Tensor:
    shape = (parameter.numel() // len(parameter), size, PROBES)
    values = torch.zeros(shape, dtype=torch.float64)
    stream(replica).add_(
        values, stddev=1.0, step=number, name=f"probes/{KEY.hex()}/{name}", offset=0
    )
    return values.transpose(0, 1)


def add_clipped(
    total: dict[str, Tensor], gradient: dict[str, Tensor], probes: dict[str, Tensor], groups: Any
) -> None:
    for group in range(len(groups)):
        members = groups.members(group)
        estimate = torch.zeros(BLOCKS, dtype=torch.float64)
        for name in members:
            grad = gradient[name]
            if grad.ndim < 2:
                estimate += grad.square().sum()
            else:
                estimate += (grad @ probes[name]).square().sum(0).view(BLOCKS, -1).mean(1)
        factor = groups.factors(group, estimate.max()[None], slack=0.0)[0]
        for name in members:
            total[name] += factor * gradient[name]


def add_records(step: PrivateStep, mesh: ParallelMesh, layout: Layout, rows: list[int]) -> None:
    """Run one logical batch in micro-batches of several records."""
    with step, context_parallel(mesh, layout):
        for chosen in micro_batches(rows):
            input_ids, labels = (x[chosen] for x in records())
            part = shard_batch(input_ids, labels, layout, mesh.context_rank)
            logits = step.model(input_ids=part.input_ids, position_ids=part.position_ids).logits
            step.backward(
                causal_lm_losses(logits, part.labels, shifted=True, num_tokens_B=part.num_tokens_B)
            )


def sketched_step(mesh: ParallelMesh, model: nn.Module, **options: Any) -> PrivateStep:
    sketch = Sketch(probes=PROBES, blocks=BLOCKS, stream=stream(mesh.replicate_rank))
    defaults = {"norms": sketch, "clipping": FLAT, "backward": "auto"}
    return private_step(model, mesh, **(defaults | options))


def clipped_sums(mesh: ParallelMesh) -> dict[str, float]:
    """Relative error of the clipped sum against one process, per case."""
    errors = {}
    mine = shares(mesh)[mesh.replicate_rank]
    wanted = [expected(mesh, clipping, tied=tied) for clipping, _, tied in CASES]
    for number, kind, checkpointing in every_pair(
        range(len(CASES)), ("contiguous", "zigzag"), ("none", "full")
    ):
        clipping, backward, tied = CASES[number]
        model = llama(torch.float64, register_attention(), tied=tied)
        model = shard_model(model, mesh, checkpointing=checkpointing)
        step = sketched_step(mesh, model, clipping=clipping, backward=backward)
        layout = Layout(length=LENGTH, ranks=mesh.context_degree, kind=kind)
        add_records(step, mesh, layout, mine)
        case = f"{backward},tied={tied} {kind} {checkpointing}"
        errors[case] = relative(whole(step), wanted[number])
    return errors


def under_known_names(found: Callable[[ParallelMesh], Any], mesh: ParallelMesh) -> Any:
    """Let probes have names that can be repeated."""
    with patch("veilspan.core.measures.common_key", lambda shards, device: KEY):
        return found(mesh)


def own_keys(mesh: ParallelMesh) -> dict[str, Any]:
    """Without a stream, the ranks of a sequence agree on a key; with several streams, they stop."""
    layout = Layout(length=LENGTH, ranks=mesh.context_degree)
    lengths = []
    for _ in range(2):
        model = shard_model(llama(torch.float64, register_attention()), mesh)
        sketch = Sketch(probes=PROBES, blocks=1)
        step = sketched_step(mesh, model, norms=sketch, backward="auto")
        add_records(step, mesh, layout, [0] if mesh.replicate_rank == 0 else [])
        squares = [x.square().sum() for x in whole(step).values()]
        lengths.append(float(torch.stack(squares).sum().sqrt()))
    try:
        model = shard_model(llama(torch.float64, register_attention()), mesh)
        sketched_step(mesh, model, norms=Sketch(stream=stream(mesh.rank)))
        refusal = None
    except PrivacyError as error:
        refusal = str(error)
    return {"lengths": lengths, "refusal": refusal}


def refusals(mesh: ParallelMesh) -> dict[str, str]:
    """What estimates over ranks do not go with, and the message."""
    found = {}
    for name, options in {
        "strategy": {"backward": "single_sample"},
        "sums": {"backward": "two_pass", "accumulate": "exact"},
    }.items():
        try:
            model = shard_model(llama(torch.float64, register_attention()), mesh)
            sketched_step(mesh, model, **options)
        except ValueError as error:
            found[name] = str(error)
    return found


def body(arguments: list[str]) -> dict[str, Any]:
    keep_float64()
    reports = {}
    for replicate, context in MESHES[dist.get_world_size()]:
        if context == 1:
            continue
        mesh = build_mesh(replicate=replicate, context=context)
        reports[f"{replicate} x {context}"] = {
            "clipped sums": under_known_names(clipped_sums, mesh),
            "own keys": own_keys(mesh),
            "refusals": refusals(mesh),
        }
    return reports


if __name__ == "__main__":
    rank_main(body)
