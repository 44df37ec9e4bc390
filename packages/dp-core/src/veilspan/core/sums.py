"""The clipped sum of one logical batch: one accumulator per trainable parameter.

Two kinds of accumulator: `RoundedSum` adds in fp32 (fp64 for fp64 gradients), `ExactSum` adds
integers, so that no order and no sharding changes a bit.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, final

import torch
from torch import Tensor, nn

from veilspan.core.protocols import (
    GradientReduction,
    NormKernel,
    SequenceShards,
    SplitModel,
)

Factor = float | Tensor
"""Factor of one sample: a number, or a scalar on a device that nobody waits for."""


class Accumulator(Protocol):
    """How contributions to one parameter are added, and what the sum is in numbers."""

    @property
    def sample_by_sample(self) -> bool:
        """Whether every sample must be added on its own, because each is rounded on its own."""
        ...

    def start(self, shape: torch.Size, gradient: Tensor) -> Tensor:
        """Return a sum of zeros of `shape` for gradients like `gradient`."""
        ...

    def scaled(self, gradient: Tensor, factor: Factor, clip_norm: float) -> tuple[Tensor, Factor]:
        """Return (x, a) such that a·x is `factor · gradient` in the units of the sum."""
        ...

    def value(self, total: Tensor, clip_norm: float) -> Tensor:
        """Return the sum in fp32 or fp64."""
        ...


@final
class RoundedSum:
    """Sums in fp32, or fp64 for fp64 gradients.

    Guarantee:
        Each addition is rounded to the nearest number. With n contributions of norm at most C, the
        rounding of two neighbouring sums differs by at most n²·2⁻²⁵·C (Higham, 2002, section 4.2):
        3 % of C for n = 1,024 contributions that all point the same way, below 0.1 % as measured.
        `ExactSum` has no such term.
    """

    sample_by_sample = False

    def start(self, shape: torch.Size, gradient: Tensor) -> Tensor:
        """Return zeros in fp32 or fp64."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return torch.zeros(shape, dtype=dtype, device=gradient.device)

    def scaled(self, gradient: Tensor, factor: Factor, clip_norm: float) -> tuple[Tensor, Factor]:
        """Return both as they are: the sum scales and adds in one pass."""
        return gradient, factor

    def value(self, total: Tensor, clip_norm: float) -> Tensor:
        """Return the sum itself."""
        return total


@final
class ExactSum:
    """Sums of whole multiples of C_m·2⁻⁴⁰, in int64.

    Guarantee:
        Contributions are truncated toward zero, which makes no norm larger, and integers add
        without rounding: one record changes the sum by at most C exactly, and the sum is bitwise
        the same in every order and on every number of replicas. Up to 2²² contributions, no
        overflow is possible.
    """

    BITS = 40
    MOST_RECORDS = 2**22
    sample_by_sample = True

    def start(self, shape: torch.Size, gradient: Tensor) -> Tensor:
        """Return zeros in int64."""
        return torch.zeros(shape, dtype=torch.int64, device=gradient.device)

    def scaled(self, gradient: Tensor, factor: Factor, clip_norm: float) -> tuple[Tensor, Factor]:
        """Return `factor · gradient` in multiples of C_m·2⁻⁴⁰, truncated toward zero, int64."""
        grains = gradient.double() * (factor * (2.0**self.BITS / clip_norm))
        return grains.to(torch.int64), 1

    def value(self, total: Tensor, clip_norm: float) -> Tensor:
        """Return the sum in fp64."""
        return total.double().mul_(clip_norm * 2.0**-self.BITS)


class ClippedSum:
    """Σ_b factor_b · gradient_b of the records seen so far, for each parameter.

    Args:
        parameters: Trainable parameters by name.
        shards: Which part of each parameter this rank owns.
        accumulator: How contributions are added.
        kernel: Adds what all samples contribute at once.
        in_parts: Whether the ranks of `shards` add up each parameter's sum in every micro-batch.

    Raises:
        ValueError: If ranks would add up parts of contributions that are truncated one by one.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        shards: SequenceShards,
        accumulator: Accumulator,
        kernel: NormKernel,
        *,
        in_parts: bool,
    ) -> None:
        self._parameters = parameters
        self._shards = shards
        self._accumulator, self._kernel = accumulator, kernel
        self._sums: dict[str, Tensor] = {}
        self._clip_norms: dict[str, float] = {}
        # The ranks that add up sums in parts, if any; sums of the parts owned here, parts that are
        # on their way, and a checksum of the order in which they were sent.
        self.together = shards if in_parts and isinstance(shards, SplitModel) else None
        if self.together is not None and shards.degree > 1 and accumulator.sample_by_sample:
            raise ValueError(
                "accumulate='exact' truncates each record's contribution once, but here ranks add "
                "up parts of it. Use accumulate='fp32', or exact norms."
            )
        self._parts: dict[str, Tensor] = {}
        self._under_way: deque[tuple[str, Callable[[], Tensor]]] = deque()
        self.order = 0

    @property
    def sample_by_sample(self) -> bool:
        """Whether every sample must be added on its own, because each is rounded on its own."""
        return self._accumulator.sample_by_sample

    def begin(self, clip_norms: Mapping[str, float]) -> None:
        """Begin a logical batch under these thresholds, by parameter name."""
        self.discard()
        self._clip_norms = dict(clip_norms)

    def add_(self, name: str, gradient: Tensor, factor: Tensor) -> None:
        """Add `factor · gradient`, the part of parameter `name` owned here.

        A factor is a scalar; 0 drops the gradient, finite or not. No host waits for one on a GPU.
        """
        if _known_zero(factor):
            return
        total = self._total(name, gradient.shape, gradient)
        if factor.device.type == "cpu" or self.sample_by_sample:
            part, alpha = self._scaled(name, gradient, factor)
            total.add_(part, alpha=alpha)
        else:
            self._kernel.add_weighted_(total, gradient[None], factor[None])

    def add_rows_(self, name: str, rows: Tensor, gradient_RD: Tensor, factor: Tensor) -> None:
        """Add `factor · gradient` to rows of parameter `name`, where `gradient` is fp32 or fp64."""
        if _known_zero(factor):
            return
        total = self._total(name, self._parameters[name].shape, gradient_RD)
        part, alpha = self._scaled(name, gradient_RD, factor)
        total.index_add_(0, rows, part.to(total.dtype), alpha=alpha)

    def add_samples_(self, name: str, grad_Bx: Tensor, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · grad_b; a zero factor drops its sample, finite or not."""
        if self.sample_by_sample:
            for gradient, factor in zip(grad_Bx.unbind(0), factor_B.unbind(0), strict=True):
                self.add_(name, gradient, factor)
        else:
            total = self._total(name, grad_Bx.shape[1:], grad_Bx)
            self._kernel.add_weighted_(total, grad_Bx, factor_B)

    def add_outer_products_(
        self,
        name: str,
        act_BTI: Tensor,
        grad_BTO: Tensor,
        factor_B: Tensor,
        size_B: Tensor | None,
    ) -> None:
        """Add Σ_b factor_b · G_bᵀA_b, in floating point; `size_B` is Σ_t ‖a_t‖‖g_t‖ if known."""
        total = self._total(name, self._parameters[name].shape, grad_BTO)
        limit = self._clip_norms[name]
        add_ = self._kernel.add_outer_products_
        add_(total, act_BTI, grad_BTO, factor_B, clip_norm=limit, size_B=size_B)

    def add_lookups_(self, name: str, ids_BT: Tensor, grad_BTD: Tensor, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · g_bt to rows id_bt of a parameter, in floating point."""
        total = self._total(name, self._parameters[name].shape, grad_BTD)
        self._kernel.add_lookups_(total, ids_BT, grad_BTD, factor_B)

    def settle(self, name: str) -> None:
        """Give each rank its part of what this micro-batch added to a parameter.

        At most one other parameter's whole sum is in memory meanwhile.
        """
        if self.together is None:
            return
        parameter = self._parameters[name]
        local = self._shards.local(parameter.detach())
        total = self._total(name, parameter.shape, local)
        del self._sums[name]
        self._under_way.append((name, self.together.scatter(parameter, total)))
        self.order = zlib.crc32(name.encode(), self.order)
        while len(self._under_way) > 1:
            self._arrive()

    def _arrive(self) -> None:
        name, wait = self._under_way.popleft()
        if name in self._parts:
            self._parts[name] += wait()
        else:
            self._parts[name] = wait()

    def discard(self) -> None:
        """Forget every contribution."""
        for held in (self._sums, self._parts, self._under_way):
            held.clear()
        self.order = 0

    def reduce(self, reduction: GradientReduction, extra: Sequence[Tensor] = ()) -> None:
        """Sum over replicas, in the units of the accumulators, together with `extra`."""
        while self._under_way:
            self._arrive()
        self._sums.update(self._parts)
        for name, parameter in self._parameters.items():
            local = self._shards.local(parameter.detach())
            self._total(name, local.shape, local)
        # Replicas that split the model have added up their sums already.
        summed = self.together is not None and self.together.different_records
        sums = [] if summed else [self._sums[name] for name in self._parameters]
        reduction.sum_([*sums, *extra])

    def take(self, name: str) -> Tensor:
        """Return the sum of one parameter in fp32 or fp64, and forget it."""
        return self._accumulator.value(self._sums.pop(name), self._clip_norms[name])

    def _scaled(self, name: str, gradient: Tensor, factor: Tensor) -> tuple[Tensor, float]:
        """Return (x, a) such that a·x is what the sum gets."""
        limit, known = self._clip_norms[name], factor.device.type == "cpu"
        finite = gradient if known else torch.where(factor == 0.0, 0.0, gradient)
        scale = float(factor) if known else factor
        part, alpha = self._accumulator.scaled(finite, scale, limit)
        return (part * alpha, 1) if isinstance(alpha, Tensor) else (part, alpha)

    def _total(self, name: str, shape: torch.Size, gradient: Tensor) -> Tensor:
        if name not in self._sums:
            self._sums[name] = self._accumulator.start(shape, gradient)
        return self._sums[name]


def _known_zero(factor: Tensor) -> bool:
    return factor.device.type == "cpu" and float(factor) == 0.0


def accumulator_named(name: str, *, clip_norm: float, expected_batch_size: float) -> Accumulator:
    """Return the accumulator that users call `fp32` or `exact`.

    Raises:
        ValueError: If there is none of that name, or integers cannot hold such a sum.
    """
    if name == "fp32":
        return RoundedSum()
    if name != "exact":
        raise ValueError(f"accumulate is {name!r}; it must be 'fp32' or 'exact'.")
    if math.isinf(clip_norm):
        raise ValueError(
            "accumulate='exact' counts in multiples of the clip norm, which is infinite. Set a "
            "finite clip_norm, or accumulate='fp32'."
        )
    if expected_batch_size > ExactSum.MOST_RECORDS / 2:
        raise ValueError(
            f"expected_batch_size is {expected_batch_size:g}; accumulate='exact' holds at most "
            f"{ExactSum.MOST_RECORDS // 2:,} expected records a logical batch. Use "
            "accumulate='fp32'."
        )
    return ExactSum()
