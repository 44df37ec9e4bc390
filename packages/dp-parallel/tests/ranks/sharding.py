"""Sharded models, their gradient shards and the sums between ranks, property by property."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from veilspan.parallel import (
    ContextShards,
    Layout,
    ReplicaReduction,
    broadcast_bytes,
    build_mesh,
    context_parallel,
    shard_model,
)
from veilspan.parallel.active import current_region


class Toy(nn.Module):
    """A decoder by structure: an embedding, blocks, a norm; row counts that do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3))
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 1)
        self.register_buffer("scale", torch.randn(3))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(self.norm(hidden)).clone()


def message(call, *arguments, **options) -> str:
    try:
        call(*arguments, **options)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was raised"


def everywhere_equal(tensors: list[Tensor]) -> bool:
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, flat)
    return all(torch.equal(flat, other) for other in gathered)


def shards_of(mesh) -> dict[str, object]:
    """Rebuild every parameter from what the ranks say they own, and where."""
    torch.manual_seed(0)
    whole = {name: p.detach().clone() for name, p in Toy().named_parameters()}
    torch.manual_seed(0)
    model = shard_model(Toy(), mesh, checkpointing="full")
    shards = ContextShards(mesh)
    rebuilt_right, owners_right, restored_right = True, True, True
    squares = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        local, offset = shards.local(parameter).detach(), shards.offset(parameter)
        rebuilt = torch.zeros(parameter.numel())
        owners = torch.zeros(parameter.numel())
        rebuilt[offset : offset + local.numel()] = local.reshape(-1)
        owners[offset : offset + local.numel()] = 1
        for tensor in (rebuilt, owners):
            if mesh.context_degree > 1:
                dist.all_reduce(tensor, group=mesh.context_group)
        rebuilt_right &= torch.equal(rebuilt.view(parameter.shape), whole[name])
        owners_right &= bool((owners == 1).all())
        parameter.grad = shards.restore(parameter, local.double())
        restored_right &= torch.equal(shards.local(parameter.grad), local)
        squares += local.double().pow(2).sum()
    with patch.object(shards, "_ranks") as listed:
        for parameter in model.parameters():
            shards.local(parameter)
    expected = sum(p.double().pow(2).sum() for p in whole.values())
    return {
        "rebuilt": rebuilt_right,
        "one owner": owners_right,
        "listed again": listed.call_count,
        "restored": restored_right,
        "names": [name for name, _ in model.named_parameters()] == list(whole),
        "norm error": abs(shards.sum_scalars(squares) / expected - 1).item(),
        "wrong shape": message(shards.restore, next(model.parameters()), torch.zeros(99)),
    }


def refusals(mesh) -> dict[str, object]:
    shards = ContextShards(mesh)
    whole = torch.zeros(4, 4)
    axis = mesh.context_mesh
    layout = Layout(length=8, ranks=mesh.context_degree)

    def nested() -> None:
        with context_parallel(mesh, layout), context_parallel(mesh, layout):
            pass

    return {
        "whole parameter": message(shards.local, whole),
        "whole parameter offset": message(shards.offset, whole),
        "replicated": message(shards.local, distribute_tensor(whole, axis, [Replicate()])),
        "columns": message(shards.local, distribute_tensor(whole, axis, [Shard(1)])),
        "narrow scalars": message(shards.sum_scalars, torch.zeros(1)),
        "twice sharded": message(shard_model, shard_model(Toy(), mesh), mesh),
        "nested": message(nested),
        "region after an error": current_region() is None,
        "layout of others": message(
            context_parallel(mesh, Layout(length=9, ranks=9)).__enter__,
        ),
        "no key": message(broadcast_bytes, None, mesh) if mesh.rank == 0 else "value is None",
    }


def replicas(mesh) -> dict[str, object]:
    torch.manual_seed(100 + dist.get_rank())
    model = shard_model(Toy(), mesh)
    shards = ContextShards(mesh)
    local = [*map(shards.local, model.parameters()), *model.buffers()]
    replica = [torch.full((3,), float(mesh.replicate_rank + 1)), torch.ones(2, 2).double()]
    sums = [*replica, torch.full((), 2.0)]
    ReplicaReduction(mesh, bucket_bytes=8).sum_(sums)
    total = mesh.replicate_degree * (mesh.replicate_degree + 1) / 2
    expected = [total, float(mesh.replicate_degree), 2.0 * mesh.replicate_degree]
    return {
        "equal": mesh.context_degree > 1 or everywhere_equal(local),
        "checksum": sum(t.double().sum().item() for t in local),
        "sums": all(bool((t == e).all()) for t, e in zip(sums, expected, strict=True)),
        "narrow": message(ReplicaReduction(mesh).sum_, [torch.zeros(1, dtype=torch.bfloat16)]),
        "key": broadcast_bytes(bytes(range(32)) if mesh.rank == 0 else None, mesh).hex(),
        "rank": [mesh.replicate_rank, mesh.context_rank],
    }


def narrow_compute(mesh) -> dict[str, object]:
    """Compute in bf16 and keep parameters and gradients in fp32, with and without sharding."""
    torch.manual_seed(0)
    model = shard_model(Toy(), mesh, param_dtype=torch.bfloat16)
    output = model(torch.arange(6).view(1, 6))
    output.float().sum().backward()
    return {
        "output": str(output.dtype),
        "parameters": sorted({str(p.dtype) for p in model.parameters()}),
        "gradients": sorted({str(p.grad.dtype) for p in model.parameters() if p.grad is not None}),
    }


def body() -> dict[str, object]:
    ranks = dist.get_world_size()
    context = build_mesh(context=ranks)
    found: dict[str, object] = {
        "shards": shards_of(context),
        "refusals": refusals(context),
        "replicas": replicas(build_mesh(replicate=ranks)),
        "narrow context": narrow_compute(context),
        "narrow replicas": narrow_compute(build_mesh(replicate=ranks)),
    }
    if ranks == 4:
        found["grid"] = replicas(build_mesh(replicate=2, context=2))
    found["wrong product"] = message(build_mesh, context=ranks + 1)
    return found
