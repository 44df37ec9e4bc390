"""The private step on every mesh of a world: what was found, property by property."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from veilspan.core import Flat, GaussianNoise, PrivateStep, poisson_batches
from veilspan.core.losses import causal_lm_losses
from veilspan.core.testing.oracle import Oracle
from veilspan.parallel import (
    ContextShards,
    Layout,
    ParallelMesh,
    ReplicaReduction,
    build_mesh,
    context_parallel,
    register_attention,
    shard_batch,
    shard_model,
)
from veilspan.parallel.testing import rank_main

LENGTH, RECORDS, CLIP_NORM = 24, 5, 0.5
KEY = hashlib.sha256(b"a key for tests only").digest()
MESHES = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(1, 4), (2, 2)]}


class Wide(nn.Module):
    """About 10⁶ parameters in rows that divide by 4, for statistics of noise alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(500, 500) for _ in range(4))

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return inputs


def llama(dtype: torch.dtype, attention: str, *, tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)


def records() -> tuple[Tensor, Tensor]:
    """Different records, one of a single token (its parts are aligned), one without labels."""
    torch.manual_seed(1)
    input_ids = torch.randint(1, 61, (RECORDS, LENGTH))
    input_ids[1] = 7
    labels = input_ids.clone()
    labels[2, : LENGTH // 2] = -100
    labels[3] = -100
    return input_ids, labels


def private_step(model: nn.Module, mesh: ParallelMesh, **options: Any) -> PrivateStep:
    defaults: dict[str, Any] = {
        "clipping": Flat(clip_norm=CLIP_NORM),
        "noise_multiplier": 0.0,
        "expected_batch_size": 1.0,
        "backward": "single_sample",
        "shards": ContextShards(mesh),
        "reduction": ReplicaReduction(mesh),
    }
    return PrivateStep(model, **{**defaults, **options})


def losses_of(model: nn.Module, mesh: ParallelMesh, layout: Layout, record: int) -> Tensor:
    input_ids, labels = (x[[record]] for x in records())
    part = shard_batch(input_ids, labels, layout, mesh.context_rank)
    logits = model(input_ids=part.input_ids, position_ids=part.position_ids).logits
    return causal_lm_losses(logits, part.labels, shifted=True, num_tokens_B=part.num_tokens_B)


def add_records(
    step: PrivateStep, mesh: ParallelMesh, layout: Layout, mine: list[int], *, poison: int = -1
) -> None:
    """Run one logical batch of the records `mine`; `poison` is not finite on one rank only."""
    with step, context_parallel(mesh, layout):
        for record in mine:
            losses_B = losses_of(step.model, mesh, layout, record)
            if record == poison and mesh.context_rank == mesh.context_degree - 1:
                losses_B = losses_B * math.nan
            step.backward(losses_B)


def whole(step: PrivateStep) -> dict[str, Tensor]:
    """Every gradient in full, in fp64."""
    found = {}
    for name, parameter in step.parameters.items():
        grad = parameter.grad
        assert grad is not None
        found[name] = full(grad).double()
    return found


def full(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be split over ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    length = torch.stack([x.square().sum() for x in expected.values()]).sum().sqrt()
    difference = torch.stack([(found[n] - x).square().sum() for n, x in expected.items()])
    return (difference.sum().sqrt() / length).item()


def oracle(tied: bool, chosen: list[int]) -> dict[str, Tensor]:
    model = llama(torch.float64, "sdpa", tied=tied)
    input_ids, labels = (x[chosen] for x in records())
    return Oracle.of(
        model,
        lambda m, batch: causal_lm_losses(m(batch["input_ids"]).logits, batch["labels"]),
        {"input_ids": input_ids, "labels": labels},
        Flat(clip_norm=CLIP_NORM),
    ).clipped_sum


def clipped_sums(mesh: ParallelMesh) -> dict[str, float]:
    """Relative error of the clipped sum against the per-sample loop, per case."""
    errors = {}
    mine = list(range(RECORDS))[mesh.replicate_rank :: mesh.replicate_degree]
    for tied in (False, True):
        expected = oracle(tied, list(range(RECORDS)))
        for kind, checkpointing, dtype in itertools.product(
            ("contiguous", "zigzag"), ("none", "full"), (torch.float64, torch.float32)
        ):
            model = llama(dtype, register_attention(), tied=tied)
            step = private_step(shard_model(model, mesh, checkpointing=checkpointing), mesh)
            layout = Layout(length=LENGTH, ranks=mesh.context_degree, kind=kind)
            add_records(step, mesh, layout, mine)
            errors[f"tied={tied} {kind} {checkpointing} {dtype}"] = relative(whole(step), expected)
    return errors


def uneven(mesh: ParallelMesh) -> dict[str, float]:
    """Replicas with different numbers of records, also none; a record that is not finite."""
    layout = Layout(length=LENGTH, ranks=mesh.context_degree)
    step = private_step(shard_model(llama(torch.float64, register_attention()), mesh), mesh)
    first = mesh.replicate_rank == 0
    found = {}
    four_and_one = [0, 1, 2, 3] + [4] * (mesh.replicate_degree > 1)
    add_records(step, mesh, layout, [0, 1, 2, 3] if first else [4])
    found["four and one"] = relative(whole(step), oracle(False, four_and_one))
    step.model.zero_grad()
    add_records(step, mesh, layout, [0, 4] if first else [])
    found["two and none"] = relative(whole(step), oracle(False, [0, 4]))
    step.model.zero_grad()
    add_records(step, mesh, layout, [0, 1, 4] if first else [], poison=1)
    found["not finite"] = relative(whole(step), oracle(False, [0, 4]))
    step.model.zero_grad()
    with torch.no_grad(), context_parallel(mesh, layout):
        losses_of(step.model, mesh, layout, 0)  # an evaluation between two steps
    add_records(step, mesh, layout, [1] if first else [])
    length = torch.stack([x.square().sum() for x in whole(step).values()]).sum().sqrt()
    found["aligned parts"] = length.item() / CLIP_NORM
    return found


def naive_norm_ratio(mesh: ParallelMesh) -> float:
    """The norm by adding the squares of the ranks, as a naive port would, over the true norm."""
    model = llama(torch.float64, register_attention())
    layout = Layout(length=LENGTH, ranks=mesh.context_degree)
    with context_parallel(mesh, layout):
        losses_of(model, mesh, layout, 1).sum().backward()
    part = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    squares = ContextShards(mesh).sum_scalars(part.square().sum())
    if mesh.context_degree > 1:
        dist.all_reduce(part, group=mesh.context_group)
    return (squares.sqrt() / part.norm()).item()


def noise(mesh: ParallelMesh) -> dict[str, Any]:
    """The gradient of an empty batch is noise alone."""
    torch.manual_seed(0)
    step = private_step(
        shard_model(Wide(), mesh), mesh, noise_multiplier=3.0, noise=GaussianNoise(KEY)
    )
    with step:
        pass
    gradients = {name: x.flatten() for name, x in whole(step).items()}
    everything = torch.cat(list(gradients.values()))
    weights = [x for name, x in gradients.items() if name.endswith("weight")]
    parts = [part for x in weights for part in x.chunk(4)]  # what each of 4 ranks would hold
    correlation = torch.corrcoef(torch.stack(parts)) - torch.eye(len(parts))
    return {
        "digest": hashlib.sha256(everything.numpy().tobytes()).hexdigest(),
        "std over sigma C": everything.std().item() / (3.0 * CLIP_NORM),
        "draws": everything.numel(),
        "correlation": correlation.abs().max().item() * math.sqrt(len(parts[0])),
    }


def twenty_steps(mesh: ParallelMesh) -> dict[str, Any]:
    """Train on Poisson draws; each replica takes its share of every draw."""
    layout = Layout(length=LENGTH, ranks=mesh.context_degree, kind="zigzag")
    model = shard_model(llama(torch.float64, register_attention(), tied=True), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = private_step(
        model, mesh, noise_multiplier=0.5, expected_batch_size=2.0, noise=GaussianNoise(KEY)
    )
    sizes = []
    for draw in poisson_batches(RECORDS, 0.4, 20, key=KEY):
        mine = draw.share(mesh.replicate_rank, mesh.replicate_degree)
        sizes.append(len(draw))
        add_records(step, mesh, layout, mine.records.tolist())
        optimizer.step()
        optimizer.zero_grad()
    local = [ContextShards(mesh).local(p).detach() for p in model.parameters()]
    return {
        "digest": hashlib.sha256(b"".join(x.numpy().tobytes() for x in local)).hexdigest(),
        "parameters": [full(p.detach()).norm().item() for p in model.parameters()],
        "sizes": sizes,
    }


def empty_draws(mesh: ParallelMesh) -> dict[str, Any]:
    """200 draws of which nine in ten are empty: each is a release, with noise."""
    torch.manual_seed(0)
    releases = []
    linear = nn.Linear(8, 4)
    model = shard_model(nn.Sequential(nn.ModuleList([linear])), mesh)
    step = private_step(
        model,
        mesh,
        noise_multiplier=1.0,
        noise=GaussianNoise(KEY),
        on_release=lambda release: releases.append(release.step),
    )
    pure, empty = [], 0
    for draw in poisson_batches(10, 0.01, 200, key=KEY):
        share = draw.share(mesh.replicate_rank, mesh.replicate_degree)
        with step:
            for _ in share.records:
                step.backward(linear(torch.ones(1, 8)).sum(dim=1) / mesh.context_degree)
        if len(draw) == 0:
            empty += 1
            pure.append(torch.cat([x.flatten() for x in whole(step).values()]))
        model.zero_grad()
    return {
        "releases": releases == list(range(200)),
        "empty": empty,
        "std over sigma C": torch.cat(pure).std().item() / CLIP_NORM,
    }


def unsharded(mesh: ParallelMesh) -> str:
    """A model that nobody sharded must not get as far as a step."""
    try:
        private_step(Wide(), mesh)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def body(arguments: list[str]) -> dict[str, Any]:
    keep_float64()
    found = {}
    for replicate, context in MESHES[dist.get_world_size()]:
        mesh = build_mesh(replicate=replicate, context=context)
        found[f"{replicate}x{context}"] = {
            "rank": [mesh.replicate_rank, mesh.context_rank],
            "clipped sums": clipped_sums(mesh),
            "uneven": uneven(mesh),
            "naive norm": naive_norm_ratio(mesh),
            "noise": noise(mesh),
            "twenty steps": twenty_steps(mesh),
            "empty draws": empty_draws(mesh),
            "unsharded": unsharded(mesh) if context > 1 else "",
        }
    return found


def keep_float64() -> None:
    """Keep fp64 models in fp64 where their layers ask for fp32, so that 1e-10 is a fair test."""
    to = Tensor.to

    def wide_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = (*args, kwargs.get("dtype"))
        narrow = self.dtype is torch.float64 and any(a is torch.float32 for a in asked)
        return self if narrow else to(self, *args, **kwargs)

    Tensor.to = wide_to
    Tensor.float = lambda self: wide_to(self, torch.float32)


if __name__ == "__main__":
    rank_main(body)
