"""What a device can do: measured once, kept on disk, read by the cost model."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from veilspan.core.norms import sq_norm
from veilspan.core.products import compute_dtype
from veilspan.core.protocols import NormKernel

CACHE = Path.home() / ".cache" / "veilspan" / "device_rates.json"
"""Where measured rates are kept; delete the file to measure again."""

_MEASURED = ("flops", "norm_flops", "bandwidth", "reading", "call_seconds")
_SECONDS = 0.05  # of each measurement


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """What the cost model believes of a device.

    Args:
        flops: Matrix products of a few hundred rows in the dtype of the model's, operations per
            second.
        norm_flops: Products that norms and clipped sums are formed of, operations per second. A
            kernel may widen their operands to fp32, which is slower than bf16 nearly everywhere.
        bandwidth: Memory traffic of elementwise work on large tensors, bytes per second.
        reading: What norms of large tensors read, bytes per second.
        call_seconds: Time of one operation on almost nothing, seconds.
        free_bytes: Memory that a strategy may use beyond an ordinary backward pass, bytes.
        weight_passes: How often the products of a step read or write each weight, however few
            records there are: once each, and twice more where they copy it into another order.
        store_passes: How often a store crosses memory: twice where it fetches what it overwrites.
    """

    flops: float
    norm_flops: float
    bandwidth: float
    reading: float
    call_seconds: float = 1e-5
    free_bytes: int = 1 << 62
    weight_passes: float = 3.0
    store_passes: float = 1.0

    @classmethod
    def of(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        kernel: NormKernel,
        *,
        cache: Path | None = CACHE,
    ) -> DeviceRates:
        """Return the rates of `device`, with its free memory as it is now.

        Measured in half a second when a device, dtype, thread count or torch version is met for the
        first time. The file can be missing or read-only: then it is measured in every process.

        Args:
            device: Where the model is.
            dtype: Of the model's products.
            kernel: What forms norms and clipped sums.
            cache: File of measured rates; None measures anew and writes nothing.
        """
        key = _key(device, dtype, kernel)
        known = _read(cache)
        if key not in known:
            known[key] = _measure(device, dtype, kernel)
            _write(cache, known)
        free = usable_bytes(device)
        if device.type != "cpu":
            return cls(**known[key], free_bytes=free)
        return cls(**known[key], free_bytes=free, weight_passes=9.0, store_passes=2.0)


@dataclass(kw_only=True)
class RatesWhenNeeded:
    """The rates of a device for one model, taken when first asked for.

    By then the caller's autocast is at work, and says in which dtype weights are multiplied.

    Args:
        device: Where the model is.
        dtype: Of its weights.
        kernel: What forms norms and clipped sums.
    """

    device: torch.device
    dtype: torch.dtype
    kernel: NormKernel
    _known: DeviceRates | None = field(init=False, repr=False, default=None)

    def __call__(self) -> DeviceRates:
        """Return the rates."""
        if self._known is None:
            kind, dtype = self.device.type, self.dtype
            if dtype == torch.float32 and torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
            self._known = DeviceRates.of(self.device, dtype, self.kernel)
        return self._known


def _key(device: torch.device, dtype: torch.dtype, kernel: NormKernel) -> str:
    """Return what the rates depend on."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {type(kernel).__name__}"
    else:
        name = f"{device.type} {platform.processor() or platform.machine()}"
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, {dtype}, torch {torch.__version__}"


def _read(cache: Path | None) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(cache.read_text()) if cache is not None else {}
    except (OSError, ValueError):
        return {}
    sound = isinstance(found, dict) and all(
        isinstance(rates, dict) and all(rates.get(name, 0) > 0 for name in _MEASURED)
        for rates in found.values()
    )
    return found if sound else {}


def _write(cache: Path | None, known: dict[str, dict[str, float]]) -> None:
    if cache is None:
        return
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        draft = cache.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(known, indent=2) + "\n")
        draft.replace(cache)  # whole or not at all, also with several processes
    except OSError:
        return  # a home that cannot be written costs a measurement per process


@torch.no_grad()
def _measure(device: torch.device, dtype: torch.dtype, kernel: NormKernel) -> dict[str, float]:
    on_gpu = device.type == "cuda"
    rows, width = (2048, 4096) if on_gpu else (512, 512)
    stream = torch.Generator(device).manual_seed(0)  # the caller's draws stay the caller's
    left = torch.randn(rows, width, device=device, generator=stream)
    right = torch.randn(width, 4 * width, device=device, generator=stream)
    large = torch.zeros(1 << (26 if on_gpu else 25), device=device)
    other = torch.ones_like(large)
    small = torch.zeros(1, device=device)
    with torch.autocast(device.type, enabled=False):
        flops = _product_flops(left.to(dtype), right.to(dtype), device)
        norm_flops, wide = flops, compute_dtype(dtype)
        if on_gpu:
            norm_flops = _norm_flops(left.to(dtype), right.to(dtype), kernel)
        elif wide != dtype:  # on a CPU every kernel widens
            norm_flops = _product_flops(left.to(wide), right.to(wide), device)
        traffic = _time(lambda: large.add_(other, alpha=0.5), device)
        return {
            "flops": flops,
            "norm_flops": norm_flops,
            "bandwidth": 3.0 * 4 * large.numel() / traffic,
            "reading": 4.0 * large.numel() / _time(lambda: sq_norm(large), device),
            "call_seconds": _time(lambda: small.add_(small), device),
        }


def _product_flops(left: Tensor, right: Tensor, device: torch.device) -> float:
    seconds = _time(lambda: torch.mm(left, right), device)
    return 2.0 * left.numel() * right.shape[1] / seconds


def _norm_flops(left_TI: Tensor, right_IO: Tensor, kernel: NormKernel) -> float:
    """Return the rate at which `kernel` takes the norm of a product of as many tokens."""
    act_BTI, grad_BTO = left_TI[None], right_IO[None, : len(left_TI)]
    seconds = _time(lambda: kernel.sq_norm_direct(act_BTI, grad_BTO), left_TI.device)
    return 2.0 * left_TI.numel() * right_IO.shape[1] / seconds


def _time(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the best of three groups."""
    action()
    best, calls = float("inf"), 1
    for _ in range(3):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            action()
        _synchronize(device)
        each = (time.perf_counter() - start) / calls
        best, calls = min(best, each), max(1, int(_SECONDS / 3 / each))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Return the memory of `device` that nobody uses now, bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return 4 << 30


def usable_bytes(device: torch.device) -> int:
    """Return what a strategy may use of the memory of `device`: half of what nobody uses now."""
    return int(0.5 * free_bytes(device))
