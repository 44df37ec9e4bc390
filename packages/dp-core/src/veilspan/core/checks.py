"""Bad input of a private step, refused before anything is released."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from veilspan.core.errors import PrivacyError, UnsupportedModelError
from veilspan.core.groups import Clipping
from veilspan.core.protocols import SequenceShards


def check_numbers(
    clipping: Clipping, noise_multiplier: float, expected_batch_size: float, first_step: int
) -> None:
    """Refuse numbers outside of their range.

    Raises:
        ValueError: Naming the argument, its value, what is allowed, and the way out.
    """
    if not isinstance(clipping, Clipping):
        raise ValueError(
            f"clipping is {clipping!r}; pass Flat(clip_norm=...), PerBlock, PerLayer, "
            "PerParameter or ByPattern."
        )
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"noise_multiplier is {noise_multiplier}; it must be finite and ≥ 0.")
    if noise_multiplier > 0 and math.isinf(clipping.clip_norm):
        raise ValueError(
            "clip_norm is infinite with noise_multiplier > 0: no noise hides an unbounded "
            "gradient. Set a finite clip_norm, or noise_multiplier=0 for training without privacy."
        )
    if not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
        raise ValueError(
            f"expected_batch_size is {expected_batch_size}; it must be a positive public constant, "
            "sampling_probability * num_records."
        )
    if first_step < 0:
        raise ValueError(f"first_step is {first_step}; it must be at least 0.")


def refuse_mixed_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], shards: SequenceShards
) -> None:
    """Refuse what adds up gradients of different records before they are clipped.

    Raises:
        UnsupportedModelError: Naming a wrapper that averages over ranks, or a parameter that is
            split while each rank has whole sequences.
    """
    for name, module in model.named_modules():
        if isinstance(module, DataParallel | DistributedDataParallel | FullyShardedDataParallel):
            raise UnsupportedModelError(
                f"Module '{name}' is {type(module).__name__}, which averages the gradients of "
                "different records over ranks before they are clipped. Pass the bare model and "
                "reduction=, such as veilspan.parallel.ReplicaReduction(mesh)."
            )
    for name, parameter in parameters.items():
        held = shards.local(parameter.detach()).shape  # refuses what it cannot place
        if shards.degree == 1 and held != parameter.shape:
            raise UnsupportedModelError(
                f"Parameter '{name}' of shape {tuple(parameter.shape)} is split over ranks, of "
                f"which this one holds {tuple(held)}, but each rank has whole sequences of its "
                "own: FSDP would add up gradients of different records before they are clipped, "
                "and no strategy adds up clipped sums in parts. Shard over ranks that hold one "
                "sequence together, as veilspan.parallel.shard_model does."
            )


def check_losses(losses_B: Tensor) -> None:
    """Refuse anything but one differentiable loss per record.

    Raises:
        PrivacyError: Naming what was given and the way out.
    """
    if not torch.is_tensor(losses_B) or losses_B.ndim != 1 or not losses_B.is_floating_point():
        got = (
            f"a tensor of shape {tuple(losses_B.shape)} and dtype {losses_B.dtype}"
            if torch.is_tensor(losses_B)
            else type(losses_B).__name__
        )
        raise PrivacyError(
            f"losses_B is {got}; it must be one floating-point loss per record, shape [B]. A batch "
            "mean hides who contributed what. For a language model use "
            "veilspan.core.losses.causal_lm_losses(logits, labels)."
        )
    if len(losses_B) and not losses_B.requires_grad:
        raise PrivacyError(
            "losses_B does not require grad: the model ran under torch.no_grad(), or no trainable "
            "parameter takes part in the loss."
        )


@contextmanager
def second_pass_explained() -> Iterator[None]:
    """Say what to do where torch refuses to differentiate a graph a second time.

    Raises:
        PrivacyError: In place of torch's error about selective activation checkpointing.
    """
    try:
        yield
    except RuntimeError as error:
        if "selective activation checkpoint" not in str(error):
            raise
        raise PrivacyError(
            "Selective activation checkpointing lets a graph be differentiated once, but "
            "backward='two_pass' does it twice, and the first micro-batch of two or more records "
            "is probed. Use another strategy, and call step.probe(losses_B) once on a forward pass "
            "of its own, or use checkpointing that is not selective."
        ) from error
