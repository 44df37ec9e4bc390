"""First cost model: seconds and bytes that pick the norm method and the backward strategy."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """What the model believes of a device.

    Args:
        flops: Matrix products, floating-point operations per second.
        bandwidth: Memory traffic of elementwise work, bytes per second.
        free_bytes: Memory that per-sample gradients may use, bytes.
    """

    flops: float
    bandwidth: float
    free_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceRates:
        """Return rates of `device`: a round figure per kind, with its free memory as it is now."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return cls(flops=4e14, bandwidth=2e12, free_bytes=int(0.5 * free))
        cores = torch.get_num_threads()
        return cls(flops=5e10 * cores, bandwidth=8e9, free_bytes=int(0.5 * _free_host_bytes()))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A decision of the cost model, with its reason in one sentence."""

    name: str
    reason: str


def norm_seconds(method: str, shape: tuple[int, int, int], rates: DeviceRates) -> float:
    """Return the forecast time of one sample's squared norm, seconds.

    Args:
        method: `direct` or `gram`.
        shape: Tokens T, input features I, output features O of the linear map.
        rates: The device.
    """
    length, inputs, outputs = shape
    if method == "direct":
        return (
            2.0 * length * inputs * outputs / rates.flops + 4.0 * inputs * outputs / rates.bandwidth
        )
    products = length * length * (inputs + outputs) / rates.flops  # half of the tiles
    return products + 12.0 * length * length / 2 / rates.bandwidth


def cheaper_norm(shape: tuple[int, int, int], rates: DeviceRates) -> str:
    """Return the norm method with the smaller forecast: `direct` or `gram`."""
    return min(("direct", "gram"), key=lambda method: norm_seconds(method, shape, rates))


def choose_backward(
    size: int, length: int, parameters: int, rates: DeviceRates, *, layered: bool = False
) -> Choice:
    """Return the strategy for micro-batches of `size` records of `length` tokens.

    Args:
        size: Records B of the micro-batch.
        length: Tokens T of each record held here.
        parameters: Trainable elements P.
        rates: The device.
        layered: Whether every clipping group ends within a layer.
    """
    if size <= 1:
        return Choice(
            name="single_sample", reason="one record a micro-batch: its gradient is the batch's own"
        )
    if layered:
        return Choice(
            name="per_layer", reason="every group ends within a layer: nothing has to be kept"
        )
    stored = 4 * size * parameters
    traffic = 3.0 * stored / rates.bandwidth
    second_pass = 2 * 2.0 * size * length * parameters / rates.flops
    needs = f"{size} per-sample gradients take {stored / 2**20:.0f} MiB"
    if stored > rates.free_bytes:
        limit = f"{needs}, more than {rates.free_bytes / 2**20:.0f} MiB to spare"
        return Choice(name="two_pass", reason=limit)
    if second_pass < traffic:
        return Choice(
            name="two_pass",
            reason=f"at {length} tokens a second pass ({second_pass:.2g} s) costs less than moving "
            f"per-sample gradients ({traffic:.2g} s)",
        )
    return Choice(
        name="per_sample",
        reason=f"{needs}; moving them ({traffic:.2g} s) costs less than a second pass "
        f"({second_pass:.2g} s)",
    )


def _free_host_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return 4 << 30
