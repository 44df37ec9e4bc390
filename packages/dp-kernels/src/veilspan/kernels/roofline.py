"""The least time an op can take: what it moves or computes over the peak, whichever is longer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GEMM_EFFICIENCY = 0.75
"""Share of the peak that cuBLAS reaches in bf16 products of the size of a layer."""

BANDWIDTH_EFFICIENCY = 0.90
"""Share of the memory bandwidth that a plain stream reaches."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a GPU can do at best.

    Args:
        flops: Dense bf16 tensor-core peak, FLOP/s.
        bandwidth: Memory bandwidth, bytes/s.
        integers: Integer instructions/s: multiprocessors · 64 · clock.
    """

    flops: float
    bandwidth: float
    integers: float


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "A100": Device(flops=312e12, bandwidth=2.039e12, integers=108 * 64 * 1.41e9),
        "H100": Device(flops=989e12, bandwidth=3.35e12, integers=132 * 64 * 1.83e9),
        "H200": Device(flops=989e12, bandwidth=4.8e12, integers=132 * 64 * 1.83e9),
    }
)
"""GPUs with forecasts; figures of the SXM variants in the data sheets."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call of an op computes and moves.

    Args:
        flops: Multiplications and additions on tensor cores.
        bytes: Bytes that must cross the memory bus, each operand counted once.
        integers: Integer instructions of all threads, for ops that are bound by them.
    """

    flops: float = 0.0
    bytes: float = 0.0
    integers: float = 0.0

    def seconds(self, device: Device, *, efficiency: float = GEMM_EFFICIENCY) -> float:
        """Return the forecast time on a device.

        Args:
            device: The GPU.
            efficiency: Share of the peak that the op's products reach.
        """
        computing = self.flops / (device.flops * efficiency)
        moving = self.bytes / (device.bandwidth * BANDWIDTH_EFFICIENCY)
        return max(computing, moving, self.integers / device.integers)
