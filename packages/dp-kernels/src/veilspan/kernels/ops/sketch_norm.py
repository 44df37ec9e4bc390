"""‖GᵀA‖² per sample, estimated from a few random projections of the output gradient.

Two thin products replace the large one: S = G·P with Gaussian probes P `[O, k]`, then AᵀS. Probes
come from a counter-based stream: an address has one value, so they are stored where that is faster
and drawn again where memory is short, and every rank that asks gets the same.

Shape letters: B samples, T tokens, I and O input and output features, k probes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from veilspan.kernels.checks import require_linear
from veilspan.kernels.operands import BLOCK_ELEMENTS, wide_dtype
from veilspan.kernels.ops.add_noise import add_noise_
from veilspan.kernels.ops.direct_norm import direct_norm
from veilspan.kernels.roofline import Work
from veilspan.kernels.streams import check_count, check_key, check_stream
from veilspan.kernels.tiles import exact_products

__all__ = ["Probes", "sketch_norm"]


@final
@dataclass(frozen=True, kw_only=True)
class Probes:
    """Standard normal probes of one layer at one step.

    Signs ±1 would not do: a gradient on two coordinates would have an estimate of 0 with
    probability 2⁻ᵏ, and no noise would cover it.

    Args:
        key: 32 secret bytes. Probes may share the key of the noise: streams are separate.
        step: Step of the run; probes must be fresh at every step.
        name: Name of the layer, the same on every rank.
        per_sample: Whether each sample has probes of its own, which then stay hidden; otherwise all
            samples share them, and they must be treated as revealed. An accountant must know which.
        number: Probes k.
        blocks: The estimate is the largest of this many independent block means; divides `number`.
        first_sample: Index of the first sample within the logical batch, over all ranks.
        stored: Whether the probes of a product are held whole, or drawn again some rows at a time.
        stream: `"chacha20"`, or `"philox4x32"`, which is not cryptographic.

    Raises:
        ValueError: If an argument is not as above.
    """

    key: bytes = field(repr=False)
    step: int
    name: str
    per_sample: bool
    number: int = 64
    blocks: int = 4
    first_sample: int = 0
    stored: bool = True
    stream: str = "chacha20"

    def __post_init__(self) -> None:
        check_key(self.key)
        check_stream(self.stream)
        for argument in ("step", "first_sample", "number", "blocks"):
            check_count(argument, getattr(self, argument))
        if self.number < 1 or self.blocks < 1 or self.number % self.blocks:
            raise ValueError(
                f"blocks is {self.blocks} and number is {self.number}; blocks must be at least 1 "
                "and divide number, as 4 divides 64."
            )

    def rows(
        self, first: int, count: int, outputs: int, device: torch.device, *, sample: int = 0
    ) -> Tensor:
        """Return some rows of the probes, `[count, k]` fp32.

        Args:
            first: First output feature.
            count: Number of output features.
            outputs: Output features of the layer, O.
            device: Where to draw them.
            sample: Position in the batch; without meaning where samples share the probes.

        Guarantee:
            A probe is a function of key, step, name, feature, its own index and, per sample, of the
            index of the sample in the logical batch: never of how features or samples are cut.
        """
        index = self.first_sample + sample if self.per_sample else 0
        probes = torch.zeros((count, self.number), device=device)
        add_noise_(
            probes,
            key=self.key,
            stddev=1.0,
            step=self.step,
            name=f"sketch/{self.name}",  # no parameter has a slash in its name
            offset=(index * outputs + first) * self.number,
            stream=self.stream,
        )
        return probes


def sketch_norm(act_BTI: Tensor, grad_BTO: Tensor, probes: Probes) -> Tensor:
    """Return an estimate of each sample's squared gradient norm.

    Args:
        act_BTI: Inputs of a linear map: fp32, fp16, bf16 or fp64, of any strides.
        grad_BTO: Gradients at its outputs, on the same device.
        probes: What to project on.

    Returns:
        The largest over blocks of ‖(G_b·P)ᵀA_b‖²/(k/blocks), `[B]` fp64; with one block its
        expectation is the squared norm.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit, or where PyTorch would multiply
            fp32 operands in TF32.

    Guarantee:
        Probes are fp32 normals, and products are formed and summed in fp32 (fp64 for fp64): the
        estimate is that of exact arithmetic up to fp32 rounding. It is random: clipping by it is
        private only with an accountant that knows k, blocks and who shares the probes.

    Source: Hutchinson (1990), https://doi.org/10.1080/03610919008812866.
    """
    require_linear(act_BTI, grad_BTO)
    projected_BTk = _projected(grad_BTO, probes)
    width = probes.number // probes.blocks
    blocks = [
        direct_norm(act_BTI, projected_BTk[:, :, start : start + width]) / width
        for start in range(0, probes.number, width)
    ]
    return torch.stack(blocks).amax(0)


def work(
    samples: int,
    tokens: int,
    inputs: int,
    outputs: int,
    *,
    probes: int = 64,
    operand_bytes: int = 2,
) -> Work:
    """Return what `sketch_norm` computes and moves: both operands and the projection are read.

    Its products are fp32, at about a fifteenth of the bf16 rate, and count so.
    """
    thin = 15 * 2.0 * samples * tokens * probes
    read = samples * tokens * ((inputs + outputs) * operand_bytes + 8.0 * probes)
    return Work(flops=thin * (inputs + outputs), bytes=read + 4.0 * outputs * probes)


def _projected(grad_BTO: Tensor, probes: Probes) -> Tensor:
    """Return G·P, `[B, T, k]` fp32 or fp64."""
    samples, tokens, _ = grad_BTO.shape
    wide = wide_dtype(grad_BTO)
    projected = torch.zeros((samples, tokens, probes.number), dtype=wide, device=grad_BTO.device)
    with exact_products(grad_BTO.device.type, wide):
        for chosen, features, matrix in _matrices(grad_BTO, probes):
            part = grad_BTO[chosen, :, features].to(wide)
            projected[chosen] += part @ matrix.to(wide)
    return projected


def _matrices(grad_BTO: Tensor, probes: Probes) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield samples, output features and the probes that these share."""
    samples, _, outputs = grad_BTO.shape
    step = outputs if probes.stored else max(1, BLOCK_ELEMENTS // (8 * probes.number))
    for sample in range(samples) if probes.per_sample else range(min(samples, 1)):
        chosen = slice(sample, sample + 1) if probes.per_sample else slice(None)
        for first in range(0, outputs, max(step, 1)):
            count = min(step, outputs - first)
            yield (
                chosen,
                slice(first, first + count),
                probes.rows(first, count, outputs, grad_BTO.device, sample=sample),
            )
