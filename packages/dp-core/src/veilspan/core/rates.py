"""What a device can do: measured once, kept on disk, read by the cost model."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from veilspan.core.norms import sq_norm

CACHE = Path.home() / ".cache" / "veilspan" / "device_rates.json"
"""Where measured rates are kept; delete the file to measure again."""

_MEASURED = ("flops", "bandwidth", "reading", "call_seconds")
_SECONDS = 0.05  # of each measurement


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """What the cost model believes of a device.

    Args:
        flops: Matrix products of a few hundred rows in fp32, operations per second.
        bandwidth: Memory traffic of elementwise work on large tensors, bytes per second.
        reading: What norms of large tensors read, bytes per second.
        call_seconds: Time of one operation on almost nothing, seconds.
        free_bytes: Memory that a strategy may use beyond an ordinary backward pass, bytes.
        weight_passes: How often the products of a step read or write each weight, however few
            records there are: once each, and twice more where they copy it into another order.
        store_passes: How often a store crosses memory: twice where it fetches what it overwrites.
    """

    flops: float
    bandwidth: float
    reading: float
    call_seconds: float = 1e-5
    free_bytes: int = 1 << 62
    weight_passes: float = 3.0
    store_passes: float = 1.0

    @classmethod
    def of(cls, device: torch.device, *, cache: Path | None = CACHE) -> DeviceRates:
        """Return the rates of `device`, with its free memory as it is now.

        Measured in a third of a second when a device, thread count or torch version is met for the
        first time. The file can be missing or read-only: then it is measured in every process.

        Args:
            device: Where the model is.
            cache: File of measured rates; None measures anew and writes nothing.
        """
        key = _key(device)
        known = _read(cache)
        if key not in known:
            measured = asdict(_measure(device))
            known[key] = {name: measured[name] for name in _MEASURED}
            _write(cache, known)
        free = int(0.5 * free_bytes(device))
        if device.type != "cpu":
            return cls(**known[key], free_bytes=free)
        return cls(**known[key], free_bytes=free, weight_passes=9.0, store_passes=2.0)


def _key(device: torch.device) -> str:
    """Return what the rates depend on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    return f"{device.type} {name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


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


def _measure(device: torch.device) -> DeviceRates:
    rows, width = (2048, 4096) if device.type == "cuda" else (512, 512)
    left = torch.randn(rows, width, device=device)
    right = torch.randn(width, 4 * width, device=device)
    large = torch.zeros(1 << (26 if device.type == "cuda" else 25), device=device)
    other = torch.ones_like(large)
    small = torch.zeros(1, device=device)
    product = _time(lambda: torch.mm(left, right), device)
    traffic = _time(lambda: large.add_(other, alpha=0.5), device)
    return DeviceRates(
        flops=2.0 * left.numel() * right.shape[1] / product,
        bandwidth=3.0 * 4 * large.numel() / traffic,
        reading=4.0 * large.numel() / _time(lambda: sq_norm(large), device),
        call_seconds=_time(lambda: small.add_(small), device),
    )


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
