"""Model, records and step of the tests that run on every mesh of a world."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - or each rank would import it
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from veilspan.core import Flat, PrivateStep
from veilspan.core.groups import Clipping
from veilspan.core.losses import causal_lm_losses
from veilspan.core.testing.oracle import Oracle
from veilspan.parallel import (
    ContextShards,
    Layout,
    ParallelMesh,
    ReplicaReduction,
    context_parallel,
    shard_batch,
)

LENGTH, RECORDS, CLIP_NORM = 24, 5, 0.5
KEY = hashlib.sha256(b"a key for tests only").digest()


def every_pair(*choices: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return few combinations, among which every pair of values of two choices occurs."""
    rows = [*itertools.product(*(range(len(choice)) for choice in choices))]
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing, found = set().union(*pairs.values()), []
    while missing:
        row = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[row]
        found.append(tuple(choice[i] for choice, i in zip(choices, row, strict=True)))
    return found


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


def oracle(
    tied: bool, chosen: Sequence[int], clipping: Clipping | None = None
) -> dict[str, Tensor]:
    model = llama(torch.float64, "sdpa", tied=tied)
    input_ids, labels = (x[list(chosen)] for x in records())
    return Oracle.of(
        model,
        lambda m, batch: causal_lm_losses(m(batch["input_ids"]).logits, batch["labels"]),
        {"input_ids": input_ids, "labels": labels},
        clipping or Flat(clip_norm=CLIP_NORM),
    ).clipped_sum
