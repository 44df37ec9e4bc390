"""Tiny Hugging Face decoders on a mesh against one process: the largest relative error per case."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from veilspan.parallel import (
    ContextShards,
    Layout,
    ParallelMesh,
    build_mesh,
    check_model,
    context_parallel,
    register_attention,
    shard_batch,
    shard_model,
)
from veilspan.parallel.attention import AttentionName
from veilspan.parallel.layout import LayoutKind
from veilspan.parallel.model import Checkpointing

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
    "use_cache": False,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 9}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen3": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "mistral": ("Mistral", WINDOW),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "_sliding_window_pattern": 2, **WINDOW}),
    "phi": ("Phi", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3": ("Phi3", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, **WINDOW}),
    "gpt2": (
        "GPT2",
        {"n_inner": 48, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
}
Case = tuple[LayoutKind, AttentionName, Checkpointing]

MOST_DIFFERENT = ("llama tied", "mistral", "gpt2")

ALL: list[Case] = [
    *itertools.product(("contiguous", "zigzag"), ("ulysses", "allgather"), ("none", "full"))
]
PAIRWISE: list[Case] = [  # every pair of settings occurs
    ("contiguous", "ulysses", "none"),
    ("contiguous", "allgather", "full"),
    ("zigzag", "ulysses", "full"),
    ("zigzag", "allgather", "none"),
]


def build(family: str, attention: str):
    kind, options = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # norms and biases that start as zeros or ones would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().train()


# Transformers imports a model when it is first asked for: here, and not once more in each rank.
with torch.device("meta"):
    for each in FAMILIES:
        build(each, "sdpa")


def losses(logits: Tensor, shifted_labels: Tensor, num_tokens_B: Tensor) -> Tensor:
    losses_BT = F.cross_entropy(logits.transpose(1, 2), shifted_labels, reduction="none")
    return losses_BT.sum(dim=1) / num_tokens_B


def records(length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    input_ids = torch.randint(1, 97, (2, length))
    labels = input_ids.clone()
    labels[:, :5] = -100
    labels[1, -7:] = -100
    return input_ids, labels


def reference(family: str, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    model = build(family, "sdpa")
    input_ids, labels = records(length)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    losses_B = losses(model(input_ids).logits, shifted, (shifted != -100).sum(1))
    losses_B.sum().backward()
    return losses_B.detach(), {n: p.grad for n, p in model.named_parameters()}


def error(family, mesh, layout, attention, checkpointing, expected) -> float:
    model = build(family, register_attention())
    check_model(model.config, mesh, layout, attention=attention)
    model = shard_model(model, mesh, checkpointing=checkpointing)
    part = shard_batch(*records(layout.length), layout, mesh.context_rank)
    with context_parallel(mesh, layout, attention):
        logits = model(input_ids=part.input_ids, position_ids=part.position_ids).logits
        losses_B = losses(logits, part.labels, part.num_tokens_B)
        losses_B.sum().backward()
    total_B = ContextShards(mesh).sum_scalars(losses_B.detach())
    errors = [relative(total_B, expected[0])]
    for name, parameter in model.named_parameters():
        errors.append(relative(parameter.grad.full_tensor(), expected[1][name]))
    return max(errors)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def body(names: Iterable[str]) -> dict[str, float]:
    keep_float64()
    ranks = dist.get_world_size()
    mesh = build_mesh(context=ranks)
    length = 16 * ranks
    errors: dict[str, float] = {}
    for family in names:
        expected = reference(family, length)
        for kind, attention, checkpointing in ALL if family == "llama tied" else PAIRWISE:
            layout = Layout(length=length, ranks=ranks, kind=kind)
            errors[f"{family}: {kind}, {attention}, {checkpointing}"] = error(
                family, mesh, layout, attention, checkpointing, expected
            )
        if family == "llama":
            errors |= controls(mesh, expected[0])
    return errors


def keep_float64() -> None:
    """Keep fp64 models in fp64 where their layers ask for fp32, so that 1e-10 is a fair test."""
    to = Tensor.to

    def wide_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = (*args, kwargs.get("dtype"))
        narrow = self.dtype is torch.float64 and any(a is torch.float32 for a in asked)
        return self if narrow else to(self, *args, **kwargs)

    Tensor.to = wide_to
    Tensor.float = lambda self: wide_to(self, torch.float32)


def local_views(mesh: ParallelMesh) -> dict[str, str]:
    """What is said where a rank would take its part for a whole sequence."""
    layout = Layout(length=16 * mesh.context_degree, ranks=mesh.context_degree)
    model = shard_model(build("llama", register_attention()), mesh)
    part = shard_batch(*records(layout.length), layout, mesh.context_rank)
    right = {"input_ids": part.input_ids, "position_ids": part.position_ids}

    def said(**inputs: Tensor) -> str:
        try:
            model(**inputs)
        except ValueError as error:
            return str(error)
        return "nothing was raised"

    packed = part.position_ids % (layout.tokens_per_rank // 2)  # a document begins on every rank
    found = {"outside": said(**right)}
    with torch.no_grad():
        whole, positions = records(layout.length)[0], torch.arange(layout.length)[None]
        found["evaluation"] = said(input_ids=whole)
        found["evaluation with positions"] = said(input_ids=whole, position_ids=positions)
        found["packed evaluation"] = said(input_ids=whole, position_ids=positions % 8)
    with context_parallel(mesh, layout):
        found["packed"] = said(input_ids=part.input_ids, position_ids=packed)
        found["positions"] = said(input_ids=part.input_ids)
        found["labels"] = said(**right, labels=part.labels)
        found["right"] = said(**right)
    return found


def gathers(mesh: ParallelMesh) -> int:
    """How often parameters are gathered in one forward and backward pass."""
    layout = Layout(length=16 * mesh.context_degree, ranks=mesh.context_degree)
    model = shard_model(build("llama", register_attention()), mesh)
    part = shard_batch(*records(layout.length), layout, mesh.context_rank)
    with context_parallel(mesh, layout, "ulysses"), CommDebugMode() as seen:
        model(input_ids=part.input_ids, position_ids=part.position_ids).logits.sum().backward()
    return seen.get_comm_counts()[torch.ops.c10d._allgather_base_]


def controls(mesh: ParallelMesh, expected_B: Tensor) -> dict[str, float]:
    """Relative error of the losses when one thing is done wrong; it must be seen."""
    layout = Layout(length=16 * mesh.context_degree, ranks=mesh.context_degree, kind="zigzag")
    model = build("llama", register_attention())
    input_ids, labels = records(layout.length)
    right = shard_batch(input_ids, labels, layout, mesh.context_rank)
    late = F.pad(layout.take(labels, mesh.context_rank, 1)[:, 1:], (0, 1), value=-100)
    local = torch.arange(layout.tokens_per_rank).expand(2, -1)
    wrong = {
        "nothing": right,
        "labels shifted after sharding": replace(right, labels=late),
        "positions counted from zero on every rank": replace(right, position_ids=local),
        "tokens counted on every rank alone": replace(
            right, num_tokens_B=(right.labels != -100).sum(1)
        ),
    }
    errors = {}
    for name, part in wrong.items():
        with torch.no_grad(), context_parallel(mesh, layout):
            logits = model(input_ids=part.input_ids, position_ids=part.position_ids).logits
        share_B = losses(logits, part.labels, part.num_tokens_B)
        errors[f"control: {name}"] = relative(ContextShards(mesh).sum_scalars(share_B), expected_B)
    return errors
