"""Bad input of a private step, refused before anything is released."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from veilspan.core.errors import PrivacyError, UnsupportedModelError
from veilspan.core.groups import Clipping
from veilspan.core.protocols import (
    GradientReduction,
    SequenceShards,
    SplitModel,
    split_by_record,
)
from veilspan.core.reduction import LocalShards, processes


class FixedWhenBuilt:
    """Attributes that are set once: a step that was told other numbers later would not obey.

    Args:
        names: The attributes.
    """

    _fixed: tuple[str, ...] = ()

    def __init_subclass__(cls, names: tuple[str, ...] = ()) -> None:
        super().__init_subclass__()
        cls._fixed += names

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute.

        Raises:
            AttributeError: If it was set before and is one of those.
        """
        if name in self._fixed and name in vars(self):
            raise AttributeError(
                f"{name} of {type(self).__name__} is fixed when it is built. To train on with "
                "another one, detach() it, build a new one, and account for both as phases."
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        """Show the numbers that the guarantee depends on; keys and records are none of them."""
        shown = (f"{name}={vars(self)[name]!r}" for name in self._fixed if name in vars(self))
        return f"{type(self).__name__}({', '.join(shown)})"


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
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    shards: SequenceShards,
    reduction: GradientReduction | None,
) -> None:
    """Refuse what adds up gradients of different records before they are clipped, or never.

    Raises:
        ValueError: If there are ranks with other records, and nothing adds up their sums or counts.
        UnsupportedModelError: Naming a wrapper that averages over ranks or has hooks of its own, or
            a parameter that is split while each rank has whole sequences.
    """
    if split_by_record(shards) and reduction is None:
        raise ValueError(
            "reduction is None, but ranks with other records split the model; pass "
            "reduction=veilspan.parallel.ReplicaReduction(mesh)."
        )
    if reduction is None and not isinstance(shards, LocalShards) and processes() > shards.degree:
        raise ValueError(
            f"reduction is None, but {processes()} processes train, and a sequence is held by "
            f"{shards.degree}: the sums of the others would be released on their own, under the "
            "same noise. Pass reduction=veilspan.parallel.ReplicaReduction(mesh)."
        )
    for name, module in model.named_modules():
        if isinstance(module, DataParallel | DistributedDataParallel | FullyShardedDataParallel):
            raise UnsupportedModelError(
                f"Module '{name}' is {type(module).__name__}, which averages the gradients of "
                "different records over ranks before they are clipped. Pass the bare model and "
                "reduction=, such as veilspan.parallel.ReplicaReduction(mesh)."
            )
        if type(module).__module__.startswith("opacus.grad_sample"):
            raise UnsupportedModelError(
                f"Module '{name}' is {type(module).__name__} of Opacus, whose hooks take part in "
                "every backward pass. Pass the model itself, as .to_standard_module() gives it "
                "back, and the optimizer itself, without DPOptimizer."
            )
    for name, parameter in parameters.items():
        held = shards.local(parameter.detach()).shape  # refuses what it cannot place
        in_parts = shards.degree > 1 or split_by_record(shards)
        if not in_parts and held != parameter.shape:
            raise UnsupportedModelError(
                f"Parameter '{name}' of shape {tuple(parameter.shape)} is split over ranks, of "
                f"which this one holds {tuple(held)}, but each rank has whole sequences of its "
                "own: FSDP would add up gradients of different records before they are clipped. "
                "Pass shards=veilspan.parallel.ReplicaShards(mesh), which adds up clipped sums; or "
                "shard over ranks that hold one sequence together."
            )


def check_losses(losses_B: Tensor, size: int | None = None) -> None:
    """Refuse anything but one differentiable loss per record.

    Args:
        losses_B: What the caller gave.
        size: Records in the model's input, where it is known.

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
    if size is not None and len(losses_B) not in (0, size):
        raise PrivacyError(
            f"losses_B holds {len(losses_B)} losses, but the model's input holds {size} records. "
            "Return one loss per record (mean or sum over that record's own tokens)."
        )
    if len(losses_B) and not losses_B.requires_grad:
        raise PrivacyError(
            "losses_B does not require grad: the model ran under torch.no_grad(), or no trainable "
            "parameter takes part in the loss."
        )


def records_only(losses_B: Tensor, is_record_B: Tensor) -> Tensor:
    """Return the losses with those of rows that only fill the micro-batch set to 0.

    Raises:
        PrivacyError: If `is_record_B` is not one truth value per loss.
    """
    if is_record_B.dtype != torch.bool or is_record_B.shape != losses_B.shape:
        raise PrivacyError(
            f"is_record_B is {is_record_B.dtype} of shape {tuple(is_record_B.shape)}; it must be "
            f"torch.bool of shape {tuple(losses_B.shape)}: whether a row is a record of the draw."
        )
    return torch.where(is_record_B.to(losses_B.device), losses_B, 0.0)


def refuse_other_parameters(
    name: str, own: Mapping[str, nn.Parameter | None], module: nn.Module
) -> None:
    """Refuse to differentiate a module that runs with parameters that are not its own.

    Args:
        name: Module path.
        own: Its own parameters.
        module: The module, as it is called.

    Raises:
        PrivacyError: If one was exchanged, as `torch.func.functional_call` does.
    """
    now = module._parameters
    other = next((local for local, p in own.items() if now.get(local) is not p), None)
    if other is not None and torch.is_grad_enabled():
        raise PrivacyError(
            f"Module '{name}' was called with another '{other}' than its own "
            "(torch.func.functional_call), but its gradients would be formed with its own. Call it "
            "under torch.no_grad() where no gradient is wanted, call a copy of the model, or use "
            "backward='single_sample'."
        )


def require_agreement(together: SplitModel | None, value: int) -> None:
    """Refuse to go on where ranks that add up clipped sums together do different things.

    Args:
        together: The ranks; None where there are none.
        value: What must be the same on all of them.

    Raises:
        PrivacyError: On every rank, if `value` is not the same on all of them.
    """
    if together is not None and not together.agree(value):
        raise PrivacyError(
            "The ranks that split the model do not run the same micro-batches: another rank has a "
            "micro-batch more, of another size, or reached other layers. Give every rank the same "
            "number of micro-batches of the same size, as Draw.filled_microbatches does."
        )


def refuse_rounded_products(losses_B: Tensor) -> None:
    """Refuse a setting of torch that rounds the operands of fp32 products.

    A norm that is formed by another product than the sum could be too small by more than its slack.

    Raises:
        PrivacyError: If products in fp32 are computed in TF32 or bf16.
    """
    backends: Any = torch.backends
    matmul = backends.cuda.matmul if losses_B.is_cuda else backends.mkldnn.matmul
    if losses_B.dtype != torch.float64 and matmul.fp32_precision in ("tf32", "bf16"):
        raise PrivacyError(
            f"Products of fp32 numbers are computed in {matmul.fp32_precision}, so a norm may be "
            "too small by more than the clip factor allows for. Call "
            'torch.set_float32_matmul_precision("highest"), which does not slow bf16 models, or '
            "use backward='single_sample', whose norm is of the very numbers that are added."
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
