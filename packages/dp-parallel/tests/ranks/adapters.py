"""A LoRA model with frozen base weights on a mesh against one process."""

from __future__ import annotations

import families
import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from veilspan.parallel import (
    ContextShards,
    Layout,
    build_mesh,
    context_parallel,
    register_attention,
    shard_batch,
    shard_model,
)


def build(attention: str) -> nn.Module:
    settings = peft.LoraConfig(r=3, lora_dropout=0.0, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(families.build("llama", attention), settings)
    torch.manual_seed(5)
    with torch.no_grad():  # adapters start as zero maps, whose gradients are half zeros
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.double()


def body() -> dict[str, object]:
    mesh = build_mesh(context=dist.get_world_size())
    layout = Layout(length=16 * mesh.context_degree, ranks=mesh.context_degree, kind="zigzag")
    input_ids, labels = families.records(layout.length)
    whole = build("sdpa")
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    losses_B = families.losses(whole(input_ids).logits, shifted, (shifted != -100).sum(1))
    losses_B.sum().backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}

    model = shard_model(build(register_attention()), mesh, checkpointing="full")
    part = shard_batch(input_ids, labels, layout, mesh.context_rank)
    with context_parallel(mesh, layout):
        logits = model(input_ids=part.input_ids, position_ids=part.position_ids).logits
        families.losses(logits, part.labels, part.num_tokens_B).sum().backward()
    sharded = {name: p.grad for name, p in model.named_parameters()}
    found = {
        name: grad.full_tensor() for name, grad in sharded.items() if isinstance(grad, DTensor)
    }
    errors = [families.relative(found[name], grad) for name, grad in expected.items()]
    owned = [ContextShards(mesh).local(p).numel() for p in model.parameters()]
    return {
        "same parameters": sorted(found) == sorted(expected),
        "adapters only": all("lora_" in name for name in found),
        "error": max(errors),
        "share": sum(owned) / sum(p.numel() for p in whole.parameters()),
    }
